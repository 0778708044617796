"""The wheel, installed as a stranger installs it, serves; and it notices when a foreign package is in the way."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PACKAGES, ROOT, Processes, product_sources
from tests.serving import Server

SOURCES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it was."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--outdir", copy / "dist", copy)
    return next((copy / "dist").glob("nbdserver-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment with the wheel in it."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--python",
        environment / "bin/python",
    ]
    run(*pip, "install", "--no-compile", wheel)
    return environment / "bin"


def run(*command: str | os.PathLike[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def test_the_wheel_holds_our_packages_with_every_module_and_nothing_else(wheel: Path) -> None:
    held = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {path.parts[0] for path in held if not path.parts[0].endswith(".dist-info")} == set(PACKAGES)
    modules = {path.relative_to(ROOT) for path in product_sources()}
    assert modules <= held
    assert all(Path(package) / "py.typed" in held for package in PACKAGES)


def test_the_installed_program_serves_from_another_folder(
    installed: Path,
    processes: Processes,
    tmp_path: Path,
    free_port: Callable[[], int],
    needs: Callable[[str, str], str],
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    server = Server(
        processes,
        tmp_path / "data",
        free_port(),
        {"disk0": "1G"},
        program=(str(installed / "nbdserver"),),
        cwd=elsewhere,
    )
    assert f"ready: nbd://127.0.0.1:{server.port}/" in server.printed
    assert run(needs("nbdinfo", "libnbd-bin"), "--size", server.uri("disk0")).strip() == str(1 << 30)
    assert server.stop() == 0


def test_a_strangers_package_of_the_same_name_is_named(installed: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "protocol"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("raise SystemExit('a line of the stranger was run')\n")
    answer = subprocess.run(
        [installed / "nbdserver", "status"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert str(stranger) in answer.stderr
    assert len(answer.stderr.splitlines()) == 1

"""The shape of the tree: which way imports point, what the lowest layer may not touch, which names are not rooms."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("protocol", "metadata", "nbdserver")  # each may import those before it
IMPURE = {
    "asyncio",
    "concurrent",
    "os",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "time",
}
DRAWERS = {"util", "utils", "common", "helper", "helpers", "misc"}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no sources in {package}"
    return found


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            yield node.lineno, ".".join(part for part in (base, node.module or "") if part)


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every call of a plain or dotted name."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_one_way(package: str) -> None:
    above = LAYERS[LAYERS.index(package) + 1 :]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(package)
        for line, module in imports(path)
        if module.split(".")[0] in (*above, "tests")
    ]
    assert not wrong


def test_the_protocol_touches_no_socket_clock_disk_or_thread() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources("protocol")
        for line, module in imports(path)
        if module.split(".")[0] in IMPURE
    ]
    wrong += [
        f"{path.relative_to(ROOT)}:{line} calls {name}()"
        for path in sources("protocol")
        for line, name in calls(path)
        if name in ("open", "print", "input")
    ]
    assert not wrong


def test_fast_paths_are_derived_from_the_declarations_in_one_place() -> None:
    places = {
        str(path.relative_to(ROOT))
        for package in LAYERS
        for path in sources(package)
        if packer_names(path) & {name for _, name in calls(path)}
    }
    assert places == {"protocol/layout.py"}


def packer_names(path: Path) -> set[str]:
    """What the standard library's `struct.Struct` is called in a file (construct has a Struct too)."""
    return {"struct.Struct"} | {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "struct"
        for alias in node.names
    }


def test_nothing_is_packed_by_a_format_string() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} calls {name}()"
        for package in LAYERS
        for path in sources(package)
        for line, name in calls(path)
        if name.startswith("struct.") and name != "struct.Struct"
    ]
    assert not wrong


def test_nothing_loads_grpc_but_the_registry_on_etcd() -> None:
    grpc_users = {
        str(path.relative_to(ROOT))
        for package in LAYERS
        for path in sources(package)
        if {module.split(".")[0] for _, module in imports(path)} & {"grpc", "aetcd"}
    }
    assert grpc_users == {"metadata/etcd_grpc.py"}
    others = "metadata.embedded_registry, metadata.etcd_settings, nbdserver.cli.main, nbdserver.node.control"
    check = f"import sys, {others}, nbdserver.node.data, nbdserver.api.server"
    check += "; assert not {'grpc', 'aetcd'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_no_process_is_forked_where_grpc_may_be_loaded() -> None:
    forks = {"os.fork", "os.forkpty", "pty.fork", "fork", "forkpty", "ProcessPoolExecutor"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} forks: start a program instead"
        for package in LAYERS
        for path in sources(package)
        for line, name in [*calls(path), *imports(path)]
        if name in forks or name.startswith("multiprocessing")
    ]
    wrong += [
        f"{path.relative_to(ROOT)}:{node.value.lineno} runs Python in a forked process"
        for package in LAYERS
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "preexec_fn"
    ]
    assert not wrong


def test_no_module_is_a_drawer() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for package in (*LAYERS, "tests")
        for path in sources(package)
        if DRAWERS & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    ]
    assert not wrong


def test_the_wheel_holds_the_three_packages_and_nothing_else() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(settings["tool"]["setuptools"]["packages"]["find"]["include"]) == sorted(
        f"{name}*" for name in LAYERS
    )


def test_missing_types_are_ignored_for_exactly_the_untyped_libraries() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ignored = {
        module.removesuffix(".*")
        for override in settings["tool"]["mypy"]["overrides"]
        if override.get("ignore_missing_imports")
        for module in override["module"]
    }
    imported = {
        module.split(".")[0] for package in LAYERS for path in sources(package) for _, module in imports(path)
    } - set(LAYERS)
    distributions = importlib.metadata.packages_distributions()
    third_party = {module for module in imported if module in distributions}
    assert ignored == {module for module in third_party if not is_typed(module, distributions[module])}


def is_typed(module: str, distributions: list[str]) -> bool:
    """True if a library ships types (py.typed), or a stub package for it is installed."""
    return any(
        file.name == "py.typed" and file.parts[0] == module
        for distribution in distributions
        for file in importlib.metadata.files(distribution) or []
    ) or any(
        file.parts[0] == f"{module}-stubs"
        for distribution in importlib.metadata.distributions()
        for file in distribution.files or []
    )

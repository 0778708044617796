"""What every level of tests shares.

Rules
- What a machine lacks is a skip with the reason in it. Under REQUIRE_ALL=1 every skip and every xfail is a failure.
- Processes are started through the `processes` fixture, which ends exactly those, by pid. When the run ends, whatever
  was started from it and is still alive fails it: it is known by a token that it inherited in its environment.
- Ports come from `free_port`: below 32768, because the kernel hands out the ones above to outgoing connections.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "metadata", "nbdserver")
REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"
TOKEN_NAME = "NBDSERVER_TEST_RUN"
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
PORTS = range(20000 + WORKER, 32000, WORKERS)  # each worker has its own: a node that restarts finds its port free
STOP_TIMEOUT_S = 10.0
LEFT_BY_WORKERS = pytest.StashKey[list[tuple[int, str]]]()

# An unprivileged user's PATH does not hold the programs of nbd-client, mkfs and their like.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])

# In CI a test's examples depend on its own text alone: what passed once passes again. `make fuzz` draws others.
hypothesis.settings.register_profile("default", deadline=None, derandomize=REQUIRE_ALL)
hypothesis.settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20000")), print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fuzz: mutates input; `make fuzz` runs it with many more examples")
    if not _is_controller(config):
        os.environ[TOKEN_NAME] = uuid.uuid4().hex
    os.environ["PATH"] = SEARCH_PATH
    # The tests start programs by the hundred; where a container's image sets this, each would compile all of ours.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _is_controller(config: pytest.Config) -> bool:
    """True in the pytest-xdist process that only hands tests out."""
    return bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")


# --- REQUIRE_ALL ----------------------------------------------------------------------------------------------------


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not REQUIRE_ALL or not (report.outcome == "skipped" or hasattr(report, "wasxfail")):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", report.longrepr)
    if hasattr(report, "wasxfail"):
        del report.wasxfail
    report.outcome = "failed"
    report.longrepr = f"REQUIRE_ALL=1 allows no skip and no xfail: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _refuse_skip(report)
    return report


def product_sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


class MissingProgramError(Exception):
    """Its text says which Debian package has the program."""


def program_path(program: str, package: str) -> str:
    """Its path. MissingProgramError."""
    path = shutil.which(program, path=SEARCH_PATH)
    if path is None:
        raise MissingProgramError(f"{program} is missing: apt-get install {package}")
    return path


@pytest.fixture(scope="session")
def needs() -> Callable[[str, str], str]:
    """`needs(program, package)`: the program's path, or a skip that names the Debian package."""

    def find(program: str, package: str) -> str:
        try:
            return program_path(program, package)
        except MissingProgramError as error:
            pytest.skip(str(error))

    return find


# --- ports and processes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """`free_port()`: a TCP port that nobody listened on a moment ago, on IPv4 and IPv6 loopback."""
    generator = random.Random()
    given: set[int] = set()

    def find() -> int:
        for port in generator.sample(PORTS, 200):
            if port not in given and _is_free(port):
                given.add(port)
                return port
        raise RuntimeError("200 ports in a row are taken")

    return find


def _is_free(port: int) -> bool:
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if family == socket.AF_INET or error.errno == 98:  # EADDRINUSE; a machine may have no IPv6
                    return False
    return True


class Processes:
    """Starts programs, each in a process group of its own, and ends exactly those, at the latest with its context."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Like subprocess.Popen; `env` is added to the environment."""
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def kill(self, process: "subprocess.Popen[bytes]", signal_number: int = signal.SIGKILL) -> int:
        """Send a signal (to the process, not its group), wait, return its exit code; SIGKILL if it does not go."""
        if process.poll() is None:
            process.send_signal(signal_number)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.wait()

    def end(self) -> None:
        for process in reversed(self.started):
            self.kill(process, signal.SIGTERM)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as guard:
        yield guard


@pytest.fixture(scope="module")
def module_processes() -> Iterator[Processes]:
    """Like `processes`, for what a whole module shares."""
    with Processes() as guard:
        yield guard


def _leftovers(token: str) -> list[tuple[int, str]]:
    """(pid, command line) of the living processes that inherited this run's token."""
    wanted = f"{TOKEN_NAME}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append((int(entry.name), command))
        except OSError:
            continue  # gone meanwhile, or another user's
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if _is_controller(config):
        left = config.stash.get(LEFT_BY_WORKERS, [])
    else:
        left = _leftovers(os.environ[TOKEN_NAME])
        for pid, _ in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    if hasattr(config, "workeroutput"):
        config.workeroutput["left"] = left
        return
    for pid, command in left:
        config.get_terminal_writer().line(f"\nleft running by the tests: {pid} {command}", red=True)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended; its own exit status goes nowhere, so it passes on what it found."""
    left = node.config.stash.setdefault(LEFT_BY_WORKERS, [])
    left += getattr(node, "workeroutput", {}).get("left", [])

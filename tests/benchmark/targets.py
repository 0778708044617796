"""The servers under test, each with the settings that are tried for it.

Rules
- One unix socket, one export, files on one file system, every byte written through NBD before anything is measured.
- Settings that weaken what flush promises (`cache=unsafe`, no `flush` in nbd-server) are not candidates: every target's
  flush is an fdatasync. Settings that no option of the server itself can give (patches, LD_PRELOAD) are not either,
  nor are those that keep a part of the protocol from the clients: nbdkit without structured replies is a target of its
  own, which is measured when it is asked for.
- A peer runs in each row with the setting that was best for it in that row; ours has one setting for all rows.

To add a target, write a subclass of Target and put it into TARGETS.
"""

import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import machine
from .memory_group import MemoryGroup
from .processes import BenchmarkError, Server, free_ports

EXPORT = "bench"
CLIENT = "client"  # in its certificate


def nbd_engine(uri: str) -> list[str]:
    """fio's arguments for its NBD engine and what it works on."""
    return ["--ioengine=nbd", f"--uri={uri}"]


@dataclass(frozen=True)
class Setting:
    """A way to start a target. `arguments` are command line arguments, or lines of a configuration file."""

    name: str
    arguments: tuple[str, ...] = ()


class Target(ABC):
    """One server on one file or directory below `directory`."""

    name = ""
    title = ""
    program = ""
    package = ""
    settings: tuple[Setting, ...] = (Setting("default"),)

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.directory = directory / self.name
        self.size_bytes = size_bytes
        self.socket_path = directory / f"{self.name}.sock"
        self.file = self.directory / "disk"
        self.server: Server | None = None
        self.setting = self.settings[0]
        self.memory: MemoryGroup | None = None
        self.certificates: Path | None = None
        """Of the server; those of the client lie below it. If given, the server speaks TLS only."""

    @property
    def uri(self) -> str:
        return self.uri_of(EXPORT)

    def uri_of(self, export: str) -> str:
        if self.certificates:
            mine = self.certificates / "clients" / CLIENT
            return f"nbds+unix:///{export}?socket={self.socket_path}&tls-certificates={mine}"
        return f"nbd+unix:///{export}?socket={self.socket_path}"

    def fio_arguments(self) -> list[str]:
        return nbd_engine(self.uri)

    @classmethod
    def missing(cls) -> str | None:
        """The package that brings this server, if it is not installed."""
        return None if shutil.which(cls.program) else cls.package

    @classmethod
    def version(cls) -> str:
        """The first line that the program says about its version."""
        said = subprocess.run([cls.program, "--version"], capture_output=True, text=True, check=False)
        return (said.stdout or said.stderr).strip().splitlines()[0]

    def prepare(self) -> None:
        """Make the empty disk."""
        self.directory.mkdir(parents=True)
        with self.file.open("wb") as file:
            file.truncate(self.size_bytes)

    @abstractmethod
    def command(self, setting: Setting) -> list[str]: ...

    def shown_command(self, setting: Setting) -> str:
        """The command line as published, without this run's directory."""
        return " ".join(self.command(setting)).replace(f"{self.directory.parent}/", "")

    def start(self, setting: Setting) -> None:
        """Serve with `setting`; does nothing if that is what runs. BenchmarkError if it does not start."""
        if self.server is not None and self.setting == setting:
            return
        self.stop()
        self.server = self._start(setting)
        self.setting = setting

    def _start(self, setting: Setting) -> Server:
        return self._run(self.command(setting))

    def _run(self, command: list[str], pid_file: Path | None = None) -> Server:
        entered = self.memory.entering(command) if self.memory else command
        return Server(entered, self.socket_path, self.log_path, pid_file)

    @property
    def log_path(self) -> Path:
        return self.directory.parent / f"{self.name}.log"

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None


class Nbdserver(Target):
    """This server, from the environment that runs the benchmark, checksums on (they have no switch)."""

    name = "nbdserver"
    title = "nbdserver"
    program = sys.executable

    def __init__(self, directory: Path, size_bytes: int) -> None:
        super().__init__(directory, size_bytes)
        self.port = 0  # of no use here, but the default one may be taken: drawn at each start

    @property
    def exports(self) -> list[str]:
        return [EXPORT]

    def _start(self, setting: Setting) -> Server:
        self.port = free_ports(1)
        return super()._start(setting)

    @classmethod
    def version(cls) -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("nbdserver")
        except PackageNotFoundError:
            number = "from the source tree"
        python = ".".join(str(part) for part in sys.version_info[:3])
        return f"nbdserver {number} ({machine.commit()}), Python {python}"

    def prepare(self) -> None:
        self.directory.mkdir(parents=True)
        if self.certificates:
            files = {"certificate": "server-cert.pem", "key": "server-key.pem", "client_ca": "ca-cert.pem"}
            lines = [
                "tls:",
                "  mode: required",
                *(f"  {key}: {self.certificates / file}" for key, file in files.items()),
            ]
            (self.directory.parent / "tls.yaml").write_text("\n".join([*lines, ""]))

    def command(self, setting: Setting) -> list[str]:
        entry = "import sys; sys.argv[0] = 'nbdserver'; from nbdserver.cli.main import main; sys.exit(main())"
        return [sys.executable, "-c", entry, *self._arguments(setting)]

    def _arguments(self, setting: Setting) -> list[str]:
        place = ["--data", str(self.directory), "--socket", str(self.socket_path), "--listen", f"127.0.0.1:{self.port}"]
        created = [part for name in self.exports for part in ("--create", f"{name}={self.size_bytes}")]
        tls = ["--config", str(self.directory.parent / "tls.yaml")] if self.certificates else []
        return ["serve", *place, *created, *tls, *setting.arguments]

    def shown_command(self, setting: Setting) -> str:
        return " ".join(["nbdserver", *self._arguments(setting)]).replace(f"{self.directory.parent}/", "")


class Nbdkit(Target):
    """nbdkit with its file plugin."""

    name = "nbdkit"
    title = "nbdkit file"
    program = "nbdkit"
    package = "nbdkit"
    settings = (
        Setting("threads=16"),
        Setting("threads=1", ("--threads=1",)),
        Setting("threads=2", ("--threads=2",)),
        Setting("threads=4", ("--threads=4",)),
        Setting("threads=4, fadvise=random", ("--threads=4", "fadvise=random")),
    )

    def command(self, setting: Setting) -> list[str]:
        # nbdkit's own options stand before the plugin, the plugin's after it.
        options = [argument for argument in setting.arguments if argument.startswith("--")]
        plugin = [argument for argument in setting.arguments if not argument.startswith("--")]
        if self.certificates:
            options += ["--tls=require", f"--tls-certificates={self.certificates}", "--tls-verify-peer"]
        return ["nbdkit", "--foreground", f"--unix={self.socket_path}", *options, "file", str(self.file), *plugin]


class NbdkitSimple(Nbdkit):
    """nbdkit that offers no structured replies: less for its clients to parse, and less that it can tell them."""

    name = "nbdkit-simple"
    title = "nbdkit file, simple replies"
    settings = tuple(
        Setting(f"{setting.name}, no structured replies", (*setting.arguments, "--no-sr"))
        for setting in Nbdkit.settings
    )


class QemuNbd(Target):
    """qemu-nbd on a raw file."""

    name = "qemu-nbd-raw"
    title = "qemu-nbd raw"
    program = "qemu-nbd"
    package = "qemu-utils"
    image_format = "raw"
    settings = (
        Setting("cache=writeback, aio=threads", ("--cache=writeback", "--aio=threads")),
        Setting("cache=writeback, aio=io_uring", ("--cache=writeback", "--aio=io_uring")),
        Setting("cache=writethrough, aio=threads", ("--cache=writethrough", "--aio=threads")),
        Setting("cache=none, aio=native", ("--cache=none", "--aio=native")),
        Setting("cache=none, aio=io_uring", ("--cache=none", "--aio=io_uring")),
    )

    def command(self, setting: Setting) -> list[str]:
        place = [f"--format={self.image_format}", f"--socket={self.socket_path}", f"--export-name={EXPORT}"]
        if self.certificates:
            place += ["--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={self.certificates},verify-peer=yes"]
            place += ["--tls-creds=tls0"]
        return ["qemu-nbd", "--persistent", "--shared=20", *place, *setting.arguments, str(self.file)]


class QemuNbdQcow2(QemuNbd):
    """qemu-nbd on a qcow2 image of 64 KiB clusters; its table cache (32 MiB) covers the whole image."""

    name = "qemu-nbd-qcow2"
    title = "qemu-nbd qcow2"
    image_format = "qcow2"

    def prepare(self) -> None:
        self.directory.mkdir(parents=True)
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(self.file), str(self.size_bytes)]
        if subprocess.run(create, check=False).returncode:
            raise BenchmarkError(f"cannot make a qcow2 image: {' '.join(create)}")


class NbdServer(Target):
    """nbd-server, the reference implementation's server. It daemonizes (its foreground mode serves one client only)."""

    name = "nbd-server"
    title = "nbd-server"
    program = "nbd-server"
    package = "nbd-server"
    settings = (
        Setting("max_threads=4"),
        Setting("max_threads=1", ("max_threads = 1",)),
        Setting("max_threads=2", ("max_threads = 2",)),
        Setting("splice", ("splice = true",)),
    )

    @classmethod
    def version(cls) -> str:
        said = subprocess.run([cls.program, "-V"], capture_output=True, text=True, check=False)
        return (said.stdout + said.stderr).strip().splitlines()[0].removeprefix("This is ")

    def command(self, setting: Setting) -> list[str]:
        return ["nbd-server", "-C", str(self.directory / "config"), "-p", str(self.directory / "pid")]

    def shown_command(self, setting: Setting) -> str:
        """Its configuration file, in one line: the command line itself says nothing."""
        return "nbd-server -C config with " + "; ".join(self._configuration(setting)).replace(
            f"{self.directory.parent}/", ""
        )

    def _configuration(self, setting: Setting) -> list[str]:
        generic = ["[generic]", f"unixsock = {self.socket_path}"]
        if self.certificates:
            files = {"certfile": "server-cert.pem", "keyfile": "server-key.pem", "cacertfile": "ca-cert.pem"}
            generic += [*(f"{key} = {self.certificates / file}" for key, file in files.items()), "force_tls = true"]
        export = [f"[{EXPORT}]", f"exportname = {self.file}", "flush = true", "fua = true"]
        for line in setting.arguments:
            (generic if line.startswith("max_threads") else export).append(line)
        return generic + export

    def _start(self, setting: Setting) -> Server:
        (self.directory / "config").write_text("\n".join(self._configuration(setting)) + "\n")
        return self._run(self.command(setting), self.directory / "pid")


@contextmanager
def stopped_at_the_end(*servers: Target) -> Iterator[None]:
    """None of them runs after this, whatever happens, a failure to stop another included."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        yield


TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (Nbdserver, Nbdkit, QemuNbd, QemuNbdQcow2, NbdServer, NbdkitSimple)
}
USUAL_TARGETS = tuple(name for name in TARGETS if name != NbdkitSimple.name)
SUBJECT = Nbdserver.name

"""The data directory: where everything of a node is, which version of it this is, and who has it open.

    DATA/format               "nbdserver data directory, version 4": the first file made, the last one to change
    DATA/lock                 flock, held by the control process and its data process; says who holds it
    DATA/registry/            LevelDB: the embedded registry
    DATA/families/<id>/       segments/ and maps/ (LevelDB) of one family
    DATA/directory/           LevelDB: this node's copy of the cluster's directory
    DATA/ballast              room that the registry gets when the file system is full
    DATA/scrub.json           how far scrubs are, and when the last one was
    DATA/events.jsonl         events, with events.1.jsonl
    DATA/api.sock             the HTTP API, for whoever may open it (mode 0600)
    DATA/own.sock             NBD for the program's own commands (mode 0600)
    DATA/api.token            the token of the HTTP API on TCP (mode 0600)

Rules: the version is read before anything is changed; a newer one is refused, and so is a directory that holds
something else. The lock is inherited by the data process, so that a new node cannot start while an orphan still
dies.
"""

import os
import re
import shutil
import time
from pathlib import Path

from nbdserver.host.data_directory import DataDirectoryError, DataDirectoryLock, refuse_unfit_file_system
from nbdserver.node.addresses import MAX_SOCKET_PATH_BYTES
from nbdserver.node.errors import NodeError, WrongInputError
from protocol.invariant import invariant

FORMAT_VERSION = 4
_FORMAT_LINE = "nbdserver data directory, version {}\n"
_FORMAT_PATTERN = re.compile(r"nbdserver data directory, version ([0-9]+)\n")

ORPHAN_TIMEOUT_S = 10.0
"""How long a start waits for the data process of a node that was killed."""

OWN_SOCKET = "own.sock"

_HARMLESS = {"lock", "format.new", "lost+found"}
"""What a directory may hold before its format file is written: the remains of a first start, or a fresh ext4."""

ENVIRONMENT_VARIABLE = "NBDSERVER_DATA"


def default_path() -> Path:
    """Return /var/lib/nbdserver for root, ~/.local/share/nbdserver for anybody else."""
    if os.geteuid() == 0:
        return Path("/var/lib/nbdserver")
    return Path("~/.local/share/nbdserver").expanduser()


class DataDirectory:
    """The paths in a data directory, its version and its lock."""

    def __init__(self, path: Path, inherited_lock: int | None = None) -> None:
        """`inherited_lock` is the locked file's descriptor, if the process before handed it over."""
        self.path = Path(os.path.abspath(path))
        self._inherited_lock = inherited_lock
        self._lock: DataDirectoryLock | None = None

    @property
    def registry(self) -> Path:
        return self.path / "registry"

    @property
    def cluster_directory(self) -> Path:
        return self.path / "directory"

    @property
    def families(self) -> Path:
        return self.path / "families"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def scrub(self) -> Path:
        return self.path / "scrub.json"

    @property
    def ballast(self) -> Path:
        return self.path / "ballast"

    @property
    def api_socket(self) -> Path:
        return self.path / "api.sock"

    @property
    def own_socket(self) -> Path:
        return self.path / OWN_SOCKET

    @property
    def api_token(self) -> Path:
        return self.path / "api.token"

    @property
    def lock_descriptor(self) -> int:
        """The open, locked file; a child that inherits it shares the lock."""
        invariant(self._lock is not None, "the data directory is not locked")
        return self._lock.descriptor if self._lock else -1

    def family(self, family_id: str) -> Path:
        return self.families / family_id

    def check(self) -> None:
        """Raise WrongInputError unless this is, or can become, a data directory of ours. Changes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise WrongInputError(f"{self.path} is not a directory; name one with --data")
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        try:
            refuse_unfit_file_system(str(there))
        except (DataDirectoryError, OSError) as error:
            raise WrongInputError(str(error)) from None
        if len(os.fsencode(self.api_socket)) > MAX_SOCKET_PATH_BYTES:
            raise WrongInputError(
                f"the data directory's path {self.path} is too long: its api.sock would need more than "
                f"{MAX_SOCKET_PATH_BYTES} bytes; choose a shorter one with --data"
            )
        if not self.path.exists():
            return
        try:
            self._check_content()
        except PermissionError as error:
            raise WrongInputError(
                f"{error.filename or self.path} may not be read by this user; name another directory with --data"
            ) from None

    def _check_content(self) -> None:
        version = self.version()
        if version is None:
            strangers = sorted(entry.name for entry in self.path.iterdir() if entry.name not in _HARMLESS)
            if strangers:
                raise WrongInputError(
                    f"{self.path} holds other files ({', '.join(strangers[:3])}) and no data of ours; "
                    "name an empty directory with --data"
                )
        elif version < 1:
            raise WrongInputError(
                f"{self.path / 'format'} says version {version}, which there never was: the file is damaged"
            )
        elif version > FORMAT_VERSION:
            raise WrongInputError(
                f"{self.path} has data format version {version}, this program knows up to {FORMAT_VERSION}; "
                "use a newer nbdserver"
            )

    def version(self) -> int | None:
        """Return the format version, or None when there is no format file. Raises WrongInputError for a foreign one."""
        try:
            text = (self.path / "format").read_text(errors="replace")
        except FileNotFoundError:
            return None
        match = _FORMAT_PATTERN.fullmatch(text)
        if match is None:
            raise WrongInputError(
                f"{self.path / 'format'} is not a format file of ours; name another directory with --data"
            )
        return int(match[1])

    def require(self) -> None:
        """Raise WrongInputError unless this is a data directory already."""
        self.check()
        if self.version() is None:
            raise WrongInputError(
                f"{self.path} is not a data directory; name one with --data (nbdserver serve makes it)"
            )

    def open(self) -> None:
        """Make what is missing and take the lock. Raises WrongInputError, or NodeError naming the holder."""
        self.check()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = self._take_lock()
            if self.version() != FORMAT_VERSION:
                self._write_format()  # what an older one holds is read as it is
            self.families.mkdir(mode=0o700, exist_ok=True)
        except DataDirectoryError as error:
            raise NodeError(str(error)) from None
        except OSError as error:
            self.release()
            raise WrongInputError(
                f"{error.filename or self.path} cannot be written: {error.strerror}; name another directory with --data"
            ) from None

    def _take_lock(self) -> DataDirectoryLock:
        """Take the lock; if its holder is dead, wait for what is left of it (a data process in its last fsync)."""
        deadline_s = time.monotonic() + ORPHAN_TIMEOUT_S
        while True:
            try:
                return DataDirectoryLock(str(self.path), self._inherited_lock)
            except DataDirectoryError:
                if self._holder_is_alive() or time.monotonic() > deadline_s:
                    raise
            time.sleep(0.02)

    def _holder_is_alive(self) -> bool:
        try:
            pid = int((self.path / "lock").read_bytes())
            state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, IndexError):
            return True  # not known: whoever it is keeps it
        return state not in (b"Z", b"X")

    def release(self) -> None:
        """Give the lock back (a child that inherited it may still hold it)."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def remove_family(self, family_id: str) -> None:
        """Delete a family's directory, if it is there."""
        if self.family(family_id).exists():
            shutil.rmtree(self.family(family_id))

    def _write_format(self) -> None:
        new = self.path / "format.new"
        with new.open("w") as file:
            file.write(_FORMAT_LINE.format(FORMAT_VERSION))
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.path / "format")
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

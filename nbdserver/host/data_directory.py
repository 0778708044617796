"""The data directory: on what it may lie, and that one server at a time has it.

Rules of this file
- A file system that forgets at reboot (tmpfs) or whose fsync is somebody else's promise (network, FUSE) is refused:
  what we acknowledge as durable must be.
- The lock is `flock` on DATA/lock: the kernel lets go of it when its holder dies, however it dies. The pid in the file
  is for the message only and decides nothing.

Known weakness: the kind of file system is known by its magic number, so one that is not in the table passes.
"""

import ctypes
import errno
import fcntl
import os

_REFUSED = {
    0x01021994: ("tmpfs", "it forgets everything at reboot"),
    0x858458F6: ("ramfs", "it forgets everything at reboot"),
    0x6969: ("NFS", "a network file system"),
    0x517B: ("SMB", "a network file system"),
    0xFF534D42: ("CIFS", "a network file system"),
    0xFE534D42: ("SMB2", "a network file system"),
    0x00C36400: ("CephFS", "a network file system"),
    0x01021997: ("9p", "a network file system"),
    0x5346414F: ("AFS", "a network file system"),
    0x6B414653: ("AFS", "a network file system"),
    0x73757245: ("Coda", "a network file system"),
    0x0BD00BD0: ("Lustre", "a network file system"),
    0x19830326: ("BeeGFS", "a network file system"),
    0x786F4256: ("vboxsf", "a folder of another machine"),
    0x65735546: ("FUSE or virtiofs", "its durability is another program's promise"),
}


class DataDirectoryError(Exception):
    """The data directory cannot be used; the text says why and what to do."""


def file_system_type(path: str) -> int:
    """The magic number (`statfs` f_type) of the file system that holds `path`. OSError if there is no such path."""
    library = ctypes.CDLL(None, use_errno=True)
    result = ctypes.create_string_buffer(1024)  # struct statfs is some 120 bytes; f_type is its first word
    if library.statfs(os.fsencode(path), result) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(ctypes.c_ulong.from_buffer(result).value) & 0xFFFFFFFF


def refuse_unfit_file_system(path: str) -> None:
    """Raise DataDirectoryError if `path` (which must exist) lies on a file system that cannot keep our promises."""
    kind = _REFUSED.get(file_system_type(path))
    if kind is not None:
        name, reason = kind
        raise DataDirectoryError(
            f"{path} is on {name} ({reason}): put the data directory on a local disk, such as ext4 or xfs (--data DIR)"
        )


def is_locked(directory: str | os.PathLike[str]) -> bool:
    """Whether someone has the data directory just now; False for a directory that cannot be looked into."""
    try:
        descriptor = os.open(os.path.join(directory, "lock"), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


class DataDirectoryLock:
    """The exclusive lock of a data directory, held from construction to `release` (or death of every holder).

    Raises DataDirectoryError, naming the holder's pid, if another process has it; OSError if the file cannot be made.
    A descriptor of the locked file that was `inherited` is used if it is this directory's.
    """

    def __init__(self, directory: str, inherited: int | None = None) -> None:
        path = os.path.join(directory, "lock")
        if inherited is not None and _is_file(inherited, path):
            self.descriptor = inherited
        else:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self.descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(self.descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise DataDirectoryError(
                f"{directory} is in use by process {holder or '(not known yet)'}: stop that server first, "
                "or give this one another directory (--data DIR)"
            ) from None
        # Always as long, and in place: on a full file system a truncated file would not get its block back.
        os.pwrite(self.descriptor, f"{os.getpid():<15}\n".encode("ascii"), 0)

    def release(self) -> None:
        """Let go of the lock. The file stays: removing it could take it from under a newcomer."""
        os.close(self.descriptor)

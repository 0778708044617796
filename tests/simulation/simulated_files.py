"""The twin of HostFiles: files in memory, with a page cache that a power cut loses.

Theory. A file is what a reader sees (`content`) and what the device may hold instead. Every write remembers the pages
that it covers as they were before, once a *generation*; an fdatasync that succeeds drops the generations begun before
its call. A power cut takes each page that is in a generation back to any of its versions, or leaves it torn between
two, sector by sector. A failed fdatasync does what Linux does: the pages count as clean, keep their new content in the
page cache, and are on the device as they were (`abandoned`), until someone writes them again.

Directory entries are durable after sync_directory; before that a power cut takes each back or not, in order per name.

Rules of this file
- `SimulatedDrive` outlives crashes; a `SimulatedFiles` is the view of one life and is dead after `crash`.
- kill -9 keeps everything written; what was in flight off the loop is done, half done or not.
- Every effect asks `world_ends()` first and in the middle: a planned crash can be inside any call.
"""

import errno
import posixpath
from collections.abc import Callable, Sequence

from metadata.seams import Buffer, Clock, Done
from tests.simulation.faults import FaultMix
from tests.simulation.world import SimulatedCrash, World

Pieces = list[bytes]
PAGE_BYTES = 4096
SECTOR_BYTES = 512
HELD_BACK_BYTES = 80 << 20
"""Of a file system: the ballast of a family, and what its pool leaves free."""

Pages = dict[int, bytes]


class _File:
    """An inode."""

    __slots__ = ("abandoned", "content", "generations", "synced_size")

    def __init__(self, size_bytes: int) -> None:
        self.content = bytearray(size_bytes)
        self.generations: list[Pages] = [{}]
        self.abandoned: Pages = {}
        self.synced_size = 0

    def write(self, data: bytes, offset: int) -> None:
        end = offset + len(data)
        content, newest = self.content, self.generations[-1]
        if end > len(content):
            content.extend(bytes(end - len(content)))
        for page in range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)):
            if page not in newest:
                at = page * PAGE_BYTES
                # An abandoned page is on the device as it was before the failed sync, whatever the cache shows.
                device = self.abandoned.pop(page, None)
                newest[page] = bytes(content[at : at + PAGE_BYTES]) if device is None else device
        content[offset:end] = data

    def begin_sync(self) -> list[Pages]:
        """Everything written so far belongs to the sync; returns what `end_sync` needs."""
        covered = self.generations
        self.generations = [*covered, {}]
        return covered

    def end_sync(self, covered: list[Pages], failed: bool) -> None:
        """The sync that covers these generations is over."""
        gone = {id(generation) for generation in covered}
        self.generations = [each for each in self.generations if id(each) not in gone]
        if not failed:
            self.synced_size = len(self.content)
            return
        for generation in covered:
            for page, old in generation.items():
                newer = next((each for each in self.generations if page in each), None)
                if newer is None:
                    self.abandoned.setdefault(page, old)
                else:
                    newer[page] = (
                        old  # dirtied again meanwhile: the next sync writes it, until then the device has this
                    )

    def is_clean(self) -> bool:
        return not self.abandoned and not any(self.generations)


class SimulatedDrive:
    """What is on the device and in the page cache of one file system."""

    def __init__(self, world: World, capacity_bytes: int) -> None:
        self.world = world
        self.capacity_bytes = capacity_bytes
        self.files: dict[str, _File] = {}
        self.directories: set[str] = {""}
        self.store_bytes = 0
        self.watch: Callable[[bytes, int], None] = lambda data, offset: None  # sees every append
        # Names as they were before the changes that are not durable yet, oldest first, by directory.
        self._unsynced_names: dict[str, list[tuple[str, _File | None]]] = {}

    def used_bytes(self) -> int:
        return sum(len(file.content) for file in self.files.values()) + self.store_bytes

    def set_name(self, path: str, file: _File | None) -> None:
        """Enter or (None) remove a name."""
        before = self.files.get(path)
        self._unsynced_names.setdefault(posixpath.dirname(path), []).append((path, before))
        if file is None:
            del self.files[path]
        else:
            self.files[path] = file

    def sync_names(self, directory: str) -> None:
        self._unsynced_names.pop(directory, None)

    def forget_unsynced(self) -> None:
        """The power loss that is to come at this moment takes all that it can."""
        for file in self.files.values():
            self._lose_pages(file, FaultMix(), keep_all=False, keep_none=True)
            file.generations, file.abandoned = [{}], {}

    def lose_power(self, mix: FaultMix) -> None:
        """Take back any part of what was not synced."""
        rng = self.world.random
        for changes in self._unsynced_names.values():
            kept: set[str] = set()
            # From the newest back: once a change of a name stays, so do the older ones of that name.
            for path, before in reversed(changes):
                if path in kept or rng.random() < 0.5:
                    kept.add(path)
                elif before is None:
                    self.files.pop(path, None)
                else:
                    self.files[path] = before
        self._unsynced_names.clear()
        keep_all, keep_none = rng.random() < 0.1, rng.random() < 0.2
        for _, file in sorted(self.files.items()):
            if not file.is_clean():
                self._lose_pages(file, mix, keep_all, keep_none)
            if file.synced_size != len(file.content) and rng.random() < 0.3:
                size = rng.choice([0, rng.randrange(len(file.content) + 1)])
                del file.content[max(size, file.synced_size) :]
            file.generations, file.abandoned, file.synced_size = [{}], {}, len(file.content)

    def _lose_pages(self, file: _File, mix: FaultMix, keep_all: bool, keep_none: bool) -> None:
        rng, content = self.world.random, file.content
        for page, old in file.abandoned.items():
            content[page * PAGE_BYTES : page * PAGE_BYTES + len(old)] = old
        for page in sorted(set().union(*file.generations)):
            at = page * PAGE_BYTES
            versions = [each[page] for each in file.generations if page in each]
            versions.append(bytes(content[at : at + PAGE_BYTES]))
            if keep_all or keep_none:
                content[at : at + PAGE_BYTES] = versions[-1 if keep_all else 0]
                continue
            version = rng.choice(versions)
            if rng.random() < mix.tear:
                other = rng.choice(versions)
                version = b"".join(
                    (version if rng.random() < 0.5 else other)[sector : sector + SECTOR_BYTES]
                    for sector in range(0, len(version), SECTOR_BYTES)
                )
            content[at : at + len(version)] = version

    def rot(self) -> None:
        """Flip a bit of some file."""
        rng = self.world.random
        written = [path for path, file in sorted(self.files.items()) if file.content]
        if written:
            file = self.files[rng.choice(written)]
            at = rng.randrange(len(file.content))
            file.content[at] ^= 1 << rng.randrange(8)
            self.world.note("rot", at)


class SimulatedFiles:
    """The Files seam over a SimulatedDrive, for one life of the process."""

    def __init__(self, drive: SimulatedDrive, clock: Clock, mix: FaultMix) -> None:
        self.mix = mix
        self.operations_left: int | None = None  # the process ends inside the call that makes it 0
        self.counts = dict.fromkeys(
            ["append", "read", "cold", "sync", "sync-error", "prepare", "create", "unlink", "lost", "misdirected"], 0
        )
        self._drive = drive
        self._clock = clock
        self._world = drive.world
        self._random = drive.world.random
        self._handles: dict[int, _File] = {}
        self._next_handle = 100
        self._preparing: list[tuple[str, int]] = []
        self._dead = False

    # Ends.

    def world_ends(self) -> bool:
        """Whether the planned crash is in this call. Raises SimulatedCrash in a life that is over."""
        if self._dead or self._world.has_crashed:
            raise SimulatedCrash
        if self.operations_left is None:
            return False
        self.operations_left -= 1
        return self.operations_left < 0

    def crash(self, power: bool) -> None:
        """End this life: of the process (kill -9), or of the machine's memory too."""
        self._dead = True
        for path, size_bytes in self._preparing:
            if path not in self._drive.files and self._random.random() < 0.5:
                self._drive.set_name(path, _File(self._random.choice([0, size_bytes // 2, size_bytes])))
        if power:
            self._drive.lose_power(self.mix)
        if self.mix.rot and self._random.random() < self.mix.rot * 10:
            self._drive.rot()

    def _later(self, callback: Callable[[], None], slow: float = 0.0) -> None:
        factor = 100 if self._chance(slow) else 1
        self._clock.call_later(factor * self._random.expovariate(1 / self.mix.latency_s), callback)

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    # Files that come and go.

    def create(self, path: str, size_bytes: int) -> int:
        path = _normal(path)
        ends = self.world_ends()
        self.counts["create"] += 1
        self._world.note("create", path)
        if path in self._drive.files:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self._check_directory(path)
        if self.free_bytes() < size_bytes or self._chance(self.mix.create_error):
            raise OSError(errno.ENOSPC, "no space left on the simulated device", path)
        file = _File(size_bytes)
        self._drive.set_name(path, file)
        if ends:
            self._world.crash()
        return self._enter(file)

    def open(self, path: str) -> int:
        path = _normal(path)
        if path not in self._drive.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return self._enter(self._drive.files[path])

    def close(self, handle: int) -> None:
        del self._handles[handle]

    def size_bytes(self, handle: int) -> int:
        return len(self._handles[handle].content)

    def list(self, directory: str) -> list[str]:
        directory = _normal(directory)
        if directory not in self._drive.directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", directory)
        paths = [*self._drive.files, *(each for each in self._drive.directories if each)]
        return sorted(posixpath.basename(path) for path in paths if posixpath.dirname(path) == directory)

    def make_directory(self, path: str) -> None:
        self._drive.directories.add(_normal(path))

    def rename(self, path: str, new_path: str) -> None:
        if self.world_ends():
            self._world.crash()
        file = self._drive.files[_normal(path)]
        self._drive.set_name(_normal(new_path), file)
        self._drive.set_name(_normal(path), None)

    def unlink(self, path: str) -> None:
        path = _normal(path)
        ends = self.world_ends()
        self._world.note("unlink", path)
        self.counts["unlink"] += 1
        if path not in self._drive.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        self._drive.set_name(path, None)
        if ends:
            self._world.crash()

    def unlink_later(self, path: str, done: Done) -> None:
        def finish() -> None:
            try:
                self.unlink(path)
            except OSError as error:
                done(error.errno or errno.EIO)
                return
            done(0)

        self._later(finish)

    def sync_directory(self, path: str) -> None:
        if self.world_ends():
            self._world.crash()
        self._drive.sync_names(_normal(path))

    def sync_directory_later(self, path: str, done: Done) -> None:
        def finish() -> None:
            self.sync_directory(path)
            done(0)

        self._later(finish)

    def free_bytes(self) -> int:
        return max(0, self._drive.capacity_bytes - self._drive.used_bytes())

    # Bytes.

    def append(self, handle: int, buffers: Sequence[Buffer], offset: int) -> None:
        file = self._handles[handle]
        data = b"".join(buffers)
        self._drive.watch(data, offset)
        self.counts["append"] += 1
        self._world.note("append", handle, offset, len(data))
        if self.world_ends():
            file.write(data[: self._random.randrange(len(data) + 1)], offset)
            self._world.crash()
        if self._chance(self.mix.append_error):
            file.write(data[: self._random.randrange(len(data) + 1)], offset)
            raise OSError(errno.EIO, "simulated write error")
        if self._chance(self.mix.lost_write):
            self.counts["lost"] += 1
            return
        if self._chance(self.mix.misdirected_write):
            self.counts["misdirected"] += 1
            offset = max(0, min(len(file.content) - len(data), offset + self._random.randrange(-64, 64) * SECTOR_BYTES))
        file.write(data, offset)

    def read_cached(self, handle: int, length: int, offset: int) -> bytes | None:
        content = self._handles[handle].content
        if offset + length > len(content) or self._chance(self.mix.cold_read):
            self.counts["cold"] += 1
            return None
        return bytes(content[offset : offset + length])

    def read_into(self, handle: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        content = self.read_cached(handle, sum(map(len, buffers)), offset)
        if content is None:
            raise BlockingIOError(errno.EAGAIN, "simulated: not in the page cache")
        for buffer in buffers:
            buffer[:], content = content[: len(buffer)], content[len(buffer) :]
        return sum(map(len, buffers))

    def read(self, handle: int, length: int, offset: int) -> bytes:
        self.counts["read"] += 1
        if self._chance(self.mix.read_error):
            raise OSError(errno.EIO, "simulated read error")
        return bytes(self._handles[handle].content[offset : offset + length])

    answers_from_cache = True

    def fetch_later(self, extents: Sequence[tuple[int, int, int]], done: Callable[[], None]) -> None:
        """It does not last: the next `read_cached` may say None all the same."""
        for handle, _, _ in extents:
            assert handle in self._handles, "a file that is open"
        self.counts["read"] += 1
        self._later(done, self.mix.slow)

    def read_later(self, handle: int, extents: Sequence[tuple[int, int]], done: Callable[[int, Pieces], None]) -> None:
        file = self._handles[handle]
        self.counts["read"] += 1

        def finish() -> None:
            # Read at the last moment: a segment that was reused too early shows its new life.
            pieces = [bytes(file.content[offset : offset + length]) for length, offset in extents]
            short = any(len(piece) != length for piece, (length, _) in zip(pieces, extents, strict=True))
            if short or self._chance(self.mix.read_error):
                done(errno.EIO, [])
            else:
                done(0, pieces)

        self._later(finish, self.mix.slow)

    def read_device_later(self, handle: int, length: int, offset: int, done: Callable[[int, Buffer], None]) -> None:
        self.read_later(handle, [(length, offset)], lambda errno, pieces: done(errno, pieces[0] if pieces else b""))

    def fdatasync_later(self, handles: Sequence[int], done: Done) -> None:
        """Each sync covers what was written when it was asked for; they run one after the other."""
        files = [self._handles[handle] for handle in handles]
        self._world.note("sync", *handles)
        covered = [file.begin_sync() for file in files]

        def sync(index: int) -> None:
            if self.world_ends():
                self._world.crash()
            if index == len(files):
                done(0)
                return
            self.counts["sync"] += 1
            failed = self._chance(self.mix.sync_error)
            files[index].end_sync(covered[index], failed)
            if failed:
                self.counts["sync-error"] += 1
                done(errno.EIO)
                return
            self._later(lambda: sync(index + 1))

        self._later(lambda: sync(0))

    def fdatasync(self, handles: Sequence[int]) -> None:
        for handle in handles:
            file = self._handles[handle]
            if self.world_ends():
                self._world.crash()
            self.counts["sync"] += 1
            failed = self._chance(self.mix.sync_error)
            file.end_sync(file.begin_sync(), failed)
            if failed:
                self.counts["sync-error"] += 1
                raise OSError(errno.EIO, "simulated sync error")

    def create_later(self, path: str, size_bytes: int, done: Callable[[int, int], None]) -> None:
        self._make_later(path, size_bytes, done)

    def prepare_later(self, path: str, size_bytes: int, done: Callable[[int, int], None]) -> None:
        def written(errno_: int, handle: int) -> None:
            if not errno_:
                self._handles[handle].synced_size = size_bytes
                self._drive.sync_names(posixpath.dirname(_normal(path)))
            done(errno_, handle)

        self.counts["prepare"] += 1
        self._make_later(path, size_bytes, written)

    def _make_later(self, path: str, size_bytes: int, done: Callable[[int, int], None]) -> None:
        entry = (_normal(path), size_bytes)
        self._preparing.append(entry)

        def finish() -> None:
            if self.world_ends():
                self._world.crash()
            self._preparing.remove(entry)
            try:
                handle = self.create(path, size_bytes)
            except OSError as error:
                done(error.errno or errno.EIO, -1)
                return
            done(0, handle)

        self._later(finish)

    # Inside.

    def _enter(self, file: _File) -> int:
        self._next_handle += 1
        self._handles[self._next_handle] = file
        return self._next_handle

    def _check_directory(self, path: str) -> None:
        if posixpath.dirname(path) not in self._drive.directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", posixpath.dirname(path))


def _normal(path: str) -> str:
    normal = posixpath.normpath(path) if path else ""
    return "" if normal == "." else normal

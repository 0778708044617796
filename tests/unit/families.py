"""One family under test: a LogDisk over the simulated seams, or over real files and a real LevelDB.

Both are driven the same way: `write`, `read`, `discard`, `flush` do what a session does (inline first, `later` if that
cannot be), wait for the answer and return it. `close` and `open` are a clean end and the next life; `crash` is kill -9,
or with `power=True` the loss of everything that was not synced (simulated only).
"""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metadata.leveldb import LevelSettings, LevelStore
from metadata.seams import Buffer
from nbdserver.block import Operation
from nbdserver.frontend.inline_reads import rooms
from nbdserver.host.clock import HostClock
from nbdserver.host.completions import Completions, Workers
from nbdserver.host.files import HostFiles
from nbdserver.logdisk.devices import Head
from nbdserver.logdisk.disk import DiskSettings, LogDisk
from nbdserver.logdisk.opening import Replicated
from tests.simulation.faults import FaultMix
from tests.simulation.simulated_files import HELD_BACK_BYTES, SimulatedDrive, SimulatedFiles
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.world import SimulatedClock, World

BLOCK_BYTES = 4096
FAMILY = bytes(range(16))
CALM = FaultMix(cold_read=0.0, latency_s=0.0001, tear=0.0)
SETTINGS = DiskSettings(cache_bytes=64 << 20, checkpoint_bytes=1 << 30, checkpoint_interval_s=3600.0)


def block(number: int) -> bytes:
    """4 KiB that tell their number."""
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


class FamilyUnderTest(ABC):
    """What both kinds share."""

    disk: LogDisk
    device: Head  # of the first volume
    files: Any
    store: Any
    clock: Any

    def __init__(self, size_bytes: int, segment_bytes: int, settings: DiskSettings) -> None:
        self.size_bytes = size_bytes
        self.segment_bytes = segment_bytes
        self.settings = settings
        self.epoch = 0
        self.replicated: Replicated | None = None
        self.boot_id = "boot-1"
        self.events: list[tuple[str, dict[str, object]]] = []

    @abstractmethod
    def wait(self, ask: Callable[[Callable[..., None]], None]) -> tuple[Any, ...]:
        """Call `ask(done)` and return what `done` was called with."""

    def report(self, kind: str, fields: dict[str, object]) -> None:
        self.events.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def _open_disk(self) -> None:
        self.epoch += 1
        self.disk = LogDisk.open(
            self.files, self.store, self.clock, self.rng, self.settings, self.epoch, self.boot_id,
            self.report, replicated=self.replicated,
        )  # fmt: skip
        self.device = self.disk.head(1)

    rng: random.Random

    # -- a session's way

    def write(self, offset: int, data: bytes) -> int:
        if self.device.write(offset, memoryview(data)):
            return self.device.commit()
        errno = self.device.commit()
        return errno or int(self._later(Operation.WRITE, offset, len(data), data)[0])

    def put(self, lba: int, number: int, count: int = 1) -> None:
        """Write `count` blocks, numbered from `number`; it must succeed."""
        data = b"".join(block(number + index) for index in range(count))
        assert self.write(lba * BLOCK_BYTES, data) == 0

    def discard(self, offset: int, length: int) -> int:
        if self.device.discard(offset, length):
            return self.device.commit()
        errno = self.device.commit()
        return errno or int(self._later(Operation.DISCARD, offset, length, None)[0])

    def read(self, offset: int, length: int) -> bytes:
        """OSError for an errno."""
        found = self.device.read(offset, length)
        if length == BLOCK_BYTES and offset % BLOCK_BYTES == 0:
            room = rooms(0).blocks
            if not self.device.read_blocks([offset], room, 0):
                alone = bytes(room[0][0][0])
                assert found is None or b"".join(found) == alone, "the two inline reads differ"
                found = [alone]
        if found is None and self.fetch(offset, length):
            found = self.device.read(offset, length)
        if found is None:
            errno, found = self._later(Operation.READ, offset, length, None)
            if errno:
                raise OSError(errno, "read")
        buffers: list[Buffer] = list(found)
        return b"".join(buffers)

    def fetch(self, offset: int, length: int) -> bool:
        """Whether something was done about it."""
        took: list[bool] = []

        def ask(done: Callable[..., None]) -> None:
            took.append(self.device.fetch([(offset, length)], done))
            if not took[0]:
                done()

        self.wait(ask)
        return took[0]

    def extents(self, offset: int, length: int, limit: int = 1000) -> list[tuple[int, int]]:
        found = self.device.extents(offset, length, limit)
        if found is None:
            errno, found = self._later(Operation.EXTENTS, offset, length, None, limit)
            assert errno == 0
        return list(found)

    def number_at(self, lba: int) -> int:
        """The number of the block at an LBA, 0 for zeros."""
        data = self.read(lba * BLOCK_BYTES, BLOCK_BYTES)
        assert data == data[:8] * (BLOCK_BYTES // 8)
        return int.from_bytes(data[:8], "little")

    def flush(self) -> int:
        return int(self.wait(self.device.flush)[0])

    def checkpoint(self) -> None:
        self.wait(lambda done: self.disk.checkpointer.when_done(done))

    def _later(self, operation: Operation, offset: int, length: int, data: bytes | None, limit: int = 1) -> Any:
        return self.wait(lambda done: self.device.later(operation, offset, length, data, done, limit))


class SimulatedFamily(FamilyUnderTest):
    """A family in memory; time is virtual."""

    def __init__(
        self,
        size_bytes: int = 1 << 30,
        segment_bytes: int = 1 << 20,
        settings: DiskSettings = SETTINGS,
        mix: FaultMix = CALM,
        seed: int = 1,
        replicated: Replicated | None = None,
    ) -> None:
        super().__init__(size_bytes, segment_bytes, settings)
        self.replicated = replicated
        self.world = World(seed)
        self.mix = mix
        self.rng = self.world.random
        self.drive = SimulatedDrive(self.world, mix.room_segments * segment_bytes + HELD_BACK_BYTES)
        self.table = SimulatedTable(self.world)
        self._begin()
        LogDisk.format(self.files, self.store, FAMILY, size_bytes, segment_bytes, self.rng)
        self.open()

    def _begin(self) -> None:
        self.clock = SimulatedClock(self.world)
        self.files: SimulatedFiles = SimulatedFiles(self.drive, self.clock, self.mix)
        self.store: SimulatedStore = SimulatedStore(self.table, self.clock, self.mix, self.files.world_ends)

    def open(self) -> None:
        self._begin()
        self._open_disk()

    def wait(self, ask: Callable[[Callable[..., None]], None]) -> tuple[Any, ...]:
        answers: list[tuple[Any, ...]] = []
        ask(lambda *arguments: answers.append(arguments))
        assert self.clock.run_until(lambda: bool(answers)), "never answered"
        return answers[0]

    def run(self, duration_s: float) -> None:
        self.clock.run(duration_s)

    def close(self) -> None:
        self.wait(self.disk.close)
        self.run(1.0)

    def crash(self, power: bool = False) -> None:
        """End this life as kill -9 or a power cut does, and reboot for the latter."""
        self.store.crash()
        self.files.crash(power)
        if power:
            self.boot_id += "+"

    def places(self, number: int) -> list[tuple[bytearray, int]]:
        """Where the device has the block of this number: (content of a file, offset)."""
        found = []
        for content in (file.content for file in self.drive.files.values()):
            at = -1
            while (at := content.find(block(number), at + 1)) >= 0:
                found.append((content, at))
        return found

    def rot(self, number: int) -> None:
        """Spoil the block of this number wherever the device has it."""
        found = self.places(number)
        assert found, "the block lies nowhere"
        for content, at in found:
            content[at + 7] ^= 4


class RealFamily(FamilyUnderTest):
    """A family in a directory, with its threads and its event loop."""

    def __init__(
        self,
        directory: Path,
        size_bytes: int = 1 << 30,
        segment_bytes: int = 1 << 20,
        settings: DiskSettings = SETTINGS,
        seed: int = 1,
        write_buffer_bytes: int = 16 << 20,
    ) -> None:
        super().__init__(size_bytes, segment_bytes, settings)
        self.directory = directory
        self._level_settings = LevelSettings(block_cache_bytes=1 << 20, write_buffer_bytes=write_buffer_bytes)
        self.rng = random.Random(seed)
        if not (directory / "maps").exists():
            self._begin()
            LogDisk.format(self.files, self.store, FAMILY, size_bytes, segment_bytes, self.rng)
            self.let_go()

    def _begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.unhandled: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.unhandled.append(context))
        completions = Completions(self.loop)
        self.clock = HostClock(self.loop)
        self.files = HostFiles(str(self.directory), completions)
        readers, writer = Workers(completions, 1, "test-read"), Workers(completions, 1, "test-write")
        self._workers = [readers, writer]
        try:
            self.store = LevelStore(str(self.directory / "maps"), readers, writer, self._level_settings)
        except BaseException:
            self.store = None
            self.let_go()
            raise

    def open(self) -> None:
        """Raises what opening raises, and leaves nothing open then."""
        self._begin()
        try:
            self._open_disk()
        except BaseException:
            self.let_go()
            raise

    def wait(self, ask: Callable[[Callable[..., None]], None]) -> tuple[Any, ...]:
        answer: asyncio.Future[tuple[Any, ...]] = self.loop.create_future()
        ask(lambda *arguments: answer.set_result(arguments))
        return self.loop.run_until_complete(asyncio.wait_for(answer, 20))

    def close(self) -> None:
        """A clean end."""
        self.wait(self.disk.close)
        self.let_go()

    def crash(self) -> None:
        """What kill -9 leaves: everything appended, nothing said."""
        self.disk.background.stop()
        self.disk.cleaner.stop()
        self.disk.checkpointer.abandon()
        self.disk.pool.close()
        self.let_go()

    def let_go(self) -> None:
        if self.store is not None:
            self.store.close()
        self.files.shut_down()
        for workers in self._workers:
            workers.close()
        self.loop.close()

"""The whole block interface against an array of bytes: hypothesis looks for the shortest story that tells them apart.

Unlike the seeds of test_crash, operations here come one after the other, so the model needs no sets of contents; what
hypothesis finds it makes small. After kill -9 everything is there; a power cut comes after a flush.
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdserver.block import DIRTY, HOLE, ZERO, Operation
from nbdserver.logdisk.devices import View
from nbdserver.logdisk.disk import DiskSettings, LogDisk
from tests.simulation.faults import FaultMix
from tests.simulation.registers import pattern
from tests.simulation.simulated_files import SimulatedDrive, SimulatedFiles
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.world import SimulatedClock, World

pytestmark = pytest.mark.fuzz
BLOCK_BYTES = 4096
BLOCKS = 5000  # 20 map pages; a discard of more than 4,096 blocks is worked in later
SIZE_BYTES = BLOCKS * BLOCK_BYTES
LOOKED_AT_BYTES = 4 << 20  # of each snapshot and clone, at the end
PLENTY = 1 << 40

OFFSETS = st.one_of(
    st.integers(0, 40).map(lambda block: block * BLOCK_BYTES),
    st.integers(0, BLOCKS - 1).map(lambda block: block * BLOCK_BYTES),
    st.integers(0, 40 * BLOCK_BYTES),
    st.integers(0, SIZE_BYTES - 1),
)
LENGTHS = st.one_of(
    st.just(BLOCK_BYTES),
    st.integers(1, 64).map(lambda blocks: blocks * BLOCK_BYTES),
    st.integers(1, 3 * BLOCK_BYTES),
)


class BlockDeviceMachine(RuleBasedStateMachine):
    """A LogDisk beside a bytearray."""

    @initialize(
        seed=st.integers(0, 1 << 32),
        cold=st.sampled_from([0.0, 0.5, 1.0]),
        segment_kib=st.sampled_from([64, 256, 1024]),
    )
    def begin(self, seed: int, cold: float, segment_kib: int) -> None:
        self.world = World(seed)
        self.mix = FaultMix(cold_read=cold)
        self.drive = SimulatedDrive(self.world, PLENTY)
        self.table = SimulatedTable(self.world)
        self.model = bytearray(SIZE_BYTES)
        self.snapshots: dict[int, bytes] = {}
        self.clones: dict[int, bytearray] = {}
        self.label = 0
        self.epoch = 0
        self.boot = 1
        self.fatal: list[object] = []
        self._begin_life()
        LogDisk.format(self.files, self.store, b"m" * 16, SIZE_BYTES, segment_kib << 10, self.world.random)
        self._open()

    def _begin_life(self) -> None:
        self.clock = SimulatedClock(self.world)
        self.files = SimulatedFiles(self.drive, self.clock, self.mix)
        self.store = SimulatedStore(self.table, self.clock, self.mix, self.files.world_ends)

    def _open(self) -> None:
        self.epoch += 1
        self.disk = LogDisk.open(
            self.files, self.store, self.clock, self.world.random, DiskSettings(0, 1 << 18, 1.0), self.epoch,
            f"{self.boot:036d}", self._report,
        )  # fmt: skip
        self.device = self.disk.head(1)

    def _report(self, kind: str, fields: dict[str, object]) -> None:
        if kind in ("family-failed", "append-failed", "checksum-error", "segment-not-cleaned"):
            self.fatal.append((kind, fields))

    def _wait(self, answers: list[Any]) -> Any:
        assert self.clock.run_until(lambda: bool(answers), 600.0), "never answered"
        assert len(answers) == 1
        return answers[0]

    def _later(self, operation: Operation, offset: int, length: int, data: bytes | None, limit: int = 1) -> Any:
        answers: list[Any] = []
        self.device.later(operation, offset, length, data, lambda errno, found: answers.append((errno, found)), limit)
        assert not answers, "answered from inside the call"
        errno, found = self._wait(answers)
        assert errno == 0
        return found

    # Operations.

    @rule(offset=OFFSETS, length=LENGTHS)
    def write(self, offset: int, length: int) -> None:
        self.write_batch([(offset, length)])

    @rule(places=st.lists(st.tuples(OFFSETS, LENGTHS), min_size=2, max_size=8))
    def write_batch(self, places: list[tuple[int, int]]) -> None:
        for offset, length in places:
            length = min(length, SIZE_BYTES - offset)
            self.label += 1
            data = pattern(self.label, offset, length)
            if not self.device.write(offset, memoryview(data)):
                assert self.device.commit() == 0
                self._later(Operation.WRITE, offset, length, data)
            self.model[offset : offset + length] = data
        assert self.device.commit() == 0

    @rule(offset=OFFSETS, length=st.one_of(LENGTHS, st.integers(1, SIZE_BYTES)))
    def discard(self, offset: int, length: int) -> None:
        length = min(length, SIZE_BYTES - offset)
        if not self.device.discard(offset, length):
            self._later(Operation.DISCARD, offset, length, None)
        assert self.device.commit() == 0
        self.model[offset : offset + length] = bytes(length)

    @rule(offset=OFFSETS, length=LENGTHS)
    def read(self, offset: int, length: int) -> None:
        length = min(length, SIZE_BYTES - offset)
        found = self.device.read(offset, length)
        fetched: list[bool] = []
        if found is None and self.device.fetch([(offset, length)], lambda: fetched.append(True)):
            self._wait(fetched)
            found = self.device.read(offset, length)
        if found is None:
            found = self._later(Operation.READ, offset, length, None)
        assert b"".join(found) == self.model[offset : offset + length]

    @rule(offset=OFFSETS, length=st.one_of(LENGTHS, st.just(SIZE_BYTES)), limit=st.sampled_from([1, 2, 1000]))
    def extents(self, offset: int, length: int, limit: int) -> None:
        length = min(length, SIZE_BYTES - offset)
        found = self.device.extents(offset, length, limit)
        if found is None:
            found = self._later(Operation.EXTENTS, offset, length, None, limit)
        assert 1 <= len(found) <= limit
        assert sum(size for size, _ in found) <= length
        for size, flags in found:
            assert size > 0
            assert flags in (0, HOLE | ZERO)
            if flags:
                assert not any(self.model[offset : offset + size]), "data is said to be zeros"
            offset += size

    @rule(offset=OFFSETS, length=LENGTHS)
    def cache(self, offset: int, length: int) -> None:
        self._later(Operation.CACHE, offset, min(length, SIZE_BYTES - offset), None)

    # Snapshots.

    def _change(self, operation: str, *arguments: Any) -> None:
        answers: list[int] = []
        getattr(self.disk, operation)(*arguments, answers.append)
        assert not answers, "answered from inside the call"
        assert self._wait(answers) == 0

    @precondition(lambda self: len(self.snapshots) < 8)
    @rule()
    def snapshot(self) -> None:
        self.label += 1
        self._change("snapshot", 1, f"{self.label}", self.label)
        layer = self.disk.snapshots()[-1].layer
        self.snapshots[layer] = bytes(self.model)

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 7))
    def delete_snapshot(self, which: int) -> None:
        layer = sorted(self.snapshots)[which % len(self.snapshots)]
        self._change("delete_snapshot", layer)
        del self.snapshots[layer]

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 7))
    def roll_back(self, which: int) -> None:
        layer = sorted(self.snapshots)[which % len(self.snapshots)]
        self._change("rollback", 1, layer)
        self.model[:] = self.snapshots[layer]

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 7), volume=st.integers(2, 3))
    def clone_or_delete_the_clone(self, which: int, volume: int) -> None:
        layer = sorted(self.snapshots)[which % len(self.snapshots)]
        if volume in self.clones:
            self._change("delete_volume", volume)
            del self.clones[volume]
        else:
            self._change("clone", layer, volume)
            self.clones[volume] = bytearray(self.snapshots[layer])

    @precondition(lambda self: self.clones)
    @rule(volume=st.integers(2, 3), offset=OFFSETS, length=LENGTHS)
    def write_clone(self, volume: int, offset: int, length: int) -> None:
        if volume not in self.clones:
            return
        self.label += 1
        length = min(length, len(self.clones[volume]) - offset)
        if length <= 0:
            return
        data = pattern(self.label, offset, length)
        answers: list[Any] = []
        self.disk.head(volume).later(Operation.WRITE, offset, length, data, lambda errno, _: answers.append(errno))
        assert self._wait(answers) == 0
        self.clones[volume][offset : offset + length] = data

    @precondition(lambda self: self.clones)
    @rule(
        volume=st.integers(2, 3), size_bytes=st.one_of(OFFSETS.map(lambda offset: offset + 1), st.just(2 * SIZE_BYTES))
    )
    def resize_clone(self, volume: int, size_bytes: int) -> None:
        if volume in self.clones:
            self._change("resize", volume, size_bytes)
            now = self.clones[volume][:size_bytes]
            self.clones[volume] = now + bytes(size_bytes - len(now))
            assert self.disk.head(volume).size_bytes == size_bytes

    @precondition(lambda self: self.snapshots or self.clones)
    @rule(which=st.integers(0, 9), offset=OFFSETS, length=LENGTHS)
    def read_another(self, which: int, offset: int, length: int) -> None:
        others = [*sorted(self.snapshots), *sorted(self.clones)]
        other = others[which % len(others)]
        if other in self.snapshots and which % len(others) < len(self.snapshots):
            device: Any = self.disk.view(other)
            expected = self.snapshots[other]
        else:
            device, expected = self.disk.head(other), bytes(self.clones[other])
        length = max(0, min(length, len(expected) - offset))
        assert self._read_all(device, offset, length) == expected[offset : offset + length]
        if isinstance(device, View):
            device.close()

    def _read_all(self, device: Any, offset: int, length: int) -> bytes:
        answers: list[Any] = []
        device.later(Operation.READ, offset, length, None, lambda errno, found: answers.append((errno, found)))
        errno, found = self._wait(answers)
        assert errno == 0
        return b"".join(found)

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 7), to=st.integers(0, 8), offset=OFFSETS, limit=st.sampled_from([1, 9, 512]))
    def changed_since(self, which: int, to: int, offset: int, limit: int) -> None:
        """What a backup would copy makes the older snapshot's content the newer one's, or the volume's."""
        layers = sorted(self.snapshots)
        newer = layers[to] if to < len(layers) else 0
        device: Any = self.disk.view(newer) if newer else self.device
        expected = self.snapshots[newer] if newer else bytes(self.model)
        older = [layer for layer in layers if not newer or layer < newer]
        assert list(device.bitmaps().values()) == older
        if older:
            restored = bytearray(self.snapshots[older[which % len(older)]])
            position = offset
            while position < SIZE_BYTES:
                for length, dirty in self._changed(device, older[which % len(older)], position, limit):
                    if dirty:
                        restored[position : position + length] = expected[position : position + length]
                    position += length
            assert restored[offset:] == expected[offset:], "a change was not told"
        if newer:
            device.close()

    def _changed(self, device: Any, since: int, offset: int, limit: int) -> list[tuple[int, int]]:
        answers: list[Any] = []
        device.changed(since, offset, SIZE_BYTES - offset, limit, lambda *answer: answers.append(answer))
        assert not answers, "answered from inside the call"
        errno, extents = self._wait(answers)
        assert errno == 0
        assert 1 <= len(extents) <= limit
        assert all(length > 0 and dirty in (0, DIRTY) for length, dirty in extents)
        found: list[tuple[int, int]] = extents
        return found

    @rule()
    def flush(self) -> None:
        answers: list[int] = []
        self.device.flush(answers.append)
        assert self._wait(answers) == 0

    @rule(seconds=st.sampled_from([0.001, 0.3, 3.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.clock.run(seconds)

    # Ends.

    @rule()
    def close_and_open(self) -> None:
        answers: list[bool] = []
        self.disk.close(lambda: answers.append(True))
        self._wait(answers)
        self._end_and_open(power=False)

    @rule()
    def kill_and_open(self) -> None:
        self._end_and_open(power=False)

    @precondition(lambda self: self.label)
    @rule()
    def flush_lose_power_and_open(self) -> None:
        self.flush()
        self._end_and_open(power=True)

    def _end_and_open(self, power: bool) -> None:
        self.files.crash(power)
        self.store.crash()
        self.boot += power
        self._begin_life()
        self._open()

    @invariant()
    def nothing_failed(self) -> None:
        assert not getattr(self, "fatal", [])

    def teardown(self) -> None:
        """Everything once more."""
        if not hasattr(self, "disk"):
            return
        for offset in range(0, SIZE_BYTES, 1 << 20):
            length = min(1 << 20, SIZE_BYTES - offset)
            assert b"".join(self._later(Operation.READ, offset, length, None)) == self.model[offset : offset + length]
        for layer, content in list(self.snapshots.items())[-2:]:
            view = self.disk.view(layer)
            assert self._read_all(view, 0, LOOKED_AT_BYTES) == content[:LOOKED_AT_BYTES]
            view.close()
        for volume, written in self.clones.items():
            length = min(len(written), LOOKED_AT_BYTES)
            assert self._read_all(self.disk.head(volume), 0, length) == written[:length]
        self.clock.run(100.0)
        layers = self.disk.maps.tree.layers.values()
        assert all(layer.row.kind or len(layer.children) > 1 for layer in layers), "a layer is left that nothing needs"


TestBlockDevice = BlockDeviceMachine.TestCase
# `make test` tells the same stories each time; `make fuzz` looks for new ones.
FUZZ = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
TestBlockDevice.settings = settings(
    max_examples=max(120, int(os.environ.get("FUZZ_EXAMPLES", "20000")) // 10) if FUZZ else 120,  # each of 40 steps
    derandomize=not FUZZ,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

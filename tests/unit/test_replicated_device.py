"""A replicated volume as its sessions see it: what is answered at once, what later, and what never."""

import errno
from collections import deque
from collections.abc import Callable

import pytest

from metadata.seams import Done
from nbdserver.block import BLOCK_BYTES, IN_FLIGHT, Operation
from nbdserver.frontend.inline_reads import rooms
from nbdserver.replication.device import ReplicatedDevice
from tests.unit.memory_device import MemoryDevice
from tests.unit.session_rig import HandClock

SIZE_BYTES = 1 << 20
ROOM_BYTES = 1 << 30


class Ordered:
    """An owner whose others answer when the test says so."""

    def __init__(self) -> None:
        self.is_deposed = False
        self.has_authority = True
        self.ordered_txid = 0
        self.committed_txid = 0
        self.room = ROOM_BYTES
        self.blocks: dict[int, int] = {}  # txid of each block that was written
        self.waiting: deque[tuple[int, Done]] = deque()
        self.flushes: list[Done] = []
        self.asked: deque[tuple[int, Done]] = deque()

    @property
    def is_settled(self) -> bool:
        return self.committed_txid == self.ordered_txid

    def room_bytes(self) -> int:
        return self.room

    def ask_for_room(self, size_bytes: int, done: Done) -> None:
        self.asked.append((size_bytes, done))

    def when_committed(self, txid: int, done: Done) -> None:
        self.waiting.append((txid, done))

    def flush(self, done: Done) -> None:
        self.flushes.append(done)

    def unacknowledged(self, lba: int, count: int) -> int:
        newest = max(self.blocks.get(block, 0) for block in range(lba, lba + count))
        return newest if newest > self.committed_txid else 0

    def order(self, *blocks: int) -> None:
        self.ordered_txid += 1
        self.blocks.update(dict.fromkeys(blocks, self.ordered_txid))

    def commit(self, commit: Callable[[], int]) -> int:
        return commit()

    def acknowledge(self, txid: int) -> None:
        self.committed_txid = txid
        while self.waiting and self.waiting[0][0] <= txid:
            self.waiting.popleft()[1](0)

    def depose(self) -> None:
        self.is_deposed, self.has_authority = True, False
        while self.waiting:
            self.waiting.popleft()[1](errno.ESHUTDOWN)


class Rig:
    def __init__(self) -> None:
        self.clock = HandClock()
        self.inner = MemoryDevice(SIZE_BYTES, self.clock.call_soon)
        self.owner = Ordered()
        self.device = ReplicatedDevice(self.inner, self.owner)

    def write(self, block: int) -> int:
        assert self.device.write(block * BLOCK_BYTES, memoryview(b"x" * BLOCK_BYTES))
        result = self.device.commit()
        self.owner.order(block)
        return result

    def later(self, operation: Operation, block: int) -> list[int]:
        """The errnos of its answers so far."""
        told: list[int] = []
        data = b"y" * BLOCK_BYTES if operation is Operation.WRITE else None
        self.device.later(operation, block * BLOCK_BYTES, BLOCK_BYTES, data, lambda errno, result: told.append(errno))
        self.clock.run()
        return told


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_commit_is_in_flight_until_the_others_have_it(rig: Rig) -> None:
    told: list[int] = []
    assert rig.write(3) == IN_FLIGHT
    rig.device.acknowledged(told.append)
    assert told == []
    rig.owner.acknowledge(1)
    assert told == [0]


def test_only_what_may_be_shown_is_fetched(rig: Rig) -> None:
    rig.write(3)
    assert not rig.device.fetch([(0, BLOCK_BYTES), (3 * BLOCK_BYTES, BLOCK_BYTES)], lambda: None)
    assert rig.device.fetch([(0, BLOCK_BYTES)], lambda: None)
    rig.owner.acknowledge(1)
    assert rig.device.fetch([(0, BLOCK_BYTES), (3 * BLOCK_BYTES, BLOCK_BYTES)], lambda: None)


def test_of_several_blocks_those_are_read_that_may_be_shown(rig: Rig) -> None:
    rig.write(3)
    rig.inner.cold = {7 * BLOCK_BYTES}
    offsets = [number * BLOCK_BYTES for number in (1, 3, 5, 7, 9)]
    room = rooms(16).blocks
    assert rig.device.read_blocks(offsets, room, 2) == [1, 3]
    rig.owner.acknowledge(1)
    assert rig.device.read_blocks(offsets, room, 2) == [3]
    assert bytes(room[3][0][0]) == b"x" * BLOCK_BYTES
    rig.owner.has_authority = False
    assert list(rig.device.read_blocks(offsets, room, 2)) == [0, 1, 2, 3, 4]


def test_a_commit_for_which_there_is_no_room_is_failed(rig: Rig) -> None:
    rig.inner.commit_error = errno.ENOSPC
    assert rig.device.commit() == errno.ENOSPC


def test_who_waits_for_a_log_that_has_failed_is_told_nothing(rig: Rig) -> None:
    told: list[int] = []
    rig.inner.commit_error = errno.EIO
    assert rig.device.commit() == IN_FLIGHT
    rig.device.acknowledged(told.append)
    rig.clock.run()
    assert (told, list(rig.owner.waiting)) == ([], [])


READS: dict[str, Callable[[Rig], object]] = {
    "read": lambda rig: rig.device.read(3 * BLOCK_BYTES, BLOCK_BYTES),
    "extents": lambda rig: rig.device.extents(3 * BLOCK_BYTES, BLOCK_BYTES, 1),
}


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_only_what_is_acknowledged_is_shown_at_once(rig: Rig, read: Callable[[Rig], object]) -> None:
    assert read(rig) is not None
    rig.write(4)
    assert read(rig) is not None, "another block waits, not this one"
    rig.write(3)
    assert read(rig) is None
    rig.owner.acknowledge(2)
    assert read(rig) is not None


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_nothing_is_shown_without_authority(rig: Rig, read: Callable[[Rig], object]) -> None:
    rig.owner.has_authority = False
    assert read(rig) is None


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_what_is_in_the_open_batch_is_not_shown(rig: Rig, read: Callable[[Rig], object]) -> None:
    assert rig.device.write(3 * BLOCK_BYTES, memoryview(b"x" * BLOCK_BYTES))
    assert read(rig) is None
    rig.device.commit()
    assert read(rig) is not None


def test_a_read_waits_for_what_it_shows_and_for_nothing_later(rig: Rig) -> None:
    rig.write(3)
    told = rig.later(Operation.READ, 3)
    rig.write(3)
    assert told == []
    rig.owner.acknowledge(1)
    assert told == [0]


@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.DISCARD])
def test_a_change_that_had_to_wait_waits_for_the_others_too(rig: Rig, operation: Operation) -> None:
    rig.owner.order(3)
    told = rig.later(operation, 3)
    assert told == []
    rig.owner.acknowledge(1)
    assert told == [0]


def test_without_room_nothing_is_ordered(rig: Rig) -> None:
    rig.owner.room = 0
    rig.device.commit()
    assert not rig.device.write(0, memoryview(b"x" * BLOCK_BYTES))
    told = rig.later(Operation.WRITE, 0)
    assert told == []
    assert rig.owner.asked[0][0] == BLOCK_BYTES
    rig.owner.asked.popleft()[1](errno.ENOSPC)
    assert told == [errno.ENOSPC]
    assert rig.device.discard(0, BLOCK_BYTES), "what makes room goes on"
    rig.owner.room = ROOM_BYTES
    rig.device.commit()
    assert rig.device.write(0, memoryview(b"x" * BLOCK_BYTES))


def test_a_write_that_was_held_back_is_ordered_when_there_is_room(rig: Rig) -> None:
    rig.owner.room = 0
    told = rig.later(Operation.WRITE, 3)
    rig.owner.room = ROOM_BYTES
    rig.owner.order(3)
    rig.owner.asked.popleft()[1](0)
    rig.clock.run()
    assert told == [], "the others do not have it yet"
    rig.owner.acknowledge(1)
    assert told == [0]
    assert rig.inner.read(3 * BLOCK_BYTES, BLOCK_BYTES) == [b"y" * BLOCK_BYTES]


def test_a_batch_takes_no_more_than_there_is_room_for(rig: Rig) -> None:
    rig.owner.room = 3 * BLOCK_BYTES
    rig.device.commit()
    taken = [rig.device.write(block * BLOCK_BYTES, memoryview(b"x" * BLOCK_BYTES)) for block in range(5)]
    assert taken == [True, True, True, False, False]


def test_nobody_is_told_anything_when_the_owner_is_deposed(rig: Rig) -> None:
    told: list[int] = []
    rig.write(3)
    rig.device.acknowledged(told.append)
    told_later = rig.later(Operation.READ, 3)
    rig.device.flush(told.append)
    rig.owner.depose()
    rig.owner.flushes[0](errno.ESHUTDOWN)
    assert told == told_later == []
    assert not rig.device.discard(0, BLOCK_BYTES)


def test_a_flush_is_the_owners(rig: Rig) -> None:
    told: list[int] = []
    rig.device.flush(told.append)
    rig.owner.flushes[0](0)
    assert told == [0]
    assert rig.inner.flushes == 0

"""The log of a replica, in memory: the twin of the log disk behind the `ReplicaLog` protocol.

Theory. A `MemoryDisk` outlives processes: a base, which is the last checkpoint, and the records behind it. A
`MemoryLog` is one opening of it. What the log says is what replaying the records onto the base gives; a cut drops
records, a power loss those that were not synced, and nothing else ever changes them.

Rules of this file
- Appends and copies have one lane, what is persisted has another; in each, calls are answered in their order, late.
- A checkpoint moves the base forward at any time, but not past what is synced and committed.
- A region has REGION_BLOCKS blocks here, so that a small volume has many.
"""

import errno
import random
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial

from metadata.ranges import numbers_of, runs_of
from metadata.seams import Clock, Done
from nbdserver.replication.replica_log import BlockSource, Tap
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, EXTENT_BYTES, EXTENT_DATA, EXTENT_HOLE, WRITE, extents_of_array
from protocol.invariant import invariant
from protocol.packing import Packer, digest, travelling
from protocol.peer import BEGINNING, INCARNATIONS_LIMIT, Copy, Epochs, Modification, Position, RegionState, Runs

REGION_BLOCKS = 4
CAPACITY_BYTES = 1 << 30


class Image:
    """What a replica shows: blocks and regions, each with the txid of its last modification."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int, bytes | None]] = {}
        self.region_txids: dict[int, int] = {}
        self.last = BEGINNING
        self.epochs: Epochs = ()

    def copy(self) -> "Image":
        image = Image()
        image.blocks, image.region_txids = dict(self.blocks), dict(self.region_txids)
        image.last, image.epochs = self.last, self.epochs
        return image

    def apply(self, record: Modification | Copy) -> None:
        if isinstance(record, Copy):
            self._apply_copy(record)
            return
        position = record.position
        data = b"".join(record.data)
        at = 0
        for lba, count, kind in extents_of_array(array("Q", record.body[: EXTENT_BYTES * record.extents])):
            for block in range(lba, lba + count):
                content = None
                if kind == EXTENT_DATA:
                    content = data[at : at + BLOCK_BYTES]
                    at += BLOCK_BYTES
                self.blocks[block] = (position.txid, content)
                self.region_txids[block // REGION_BLOCKS] = position.txid
        self.last = position
        kept = self.epochs[:-1] if self.epochs and self.epochs[-1].epoch == position.epoch else self.epochs
        self.epochs = (*kept, position)

    def _apply_copy(self, copy: Copy) -> None:
        entries = array("Q", copy.entries)
        data = b"".join(copy.data)
        kept = left_out(copy)
        theirs: dict[int, tuple[int, bytes | None]] = {}
        at = 0
        for lba, txid in zip(entries[::2], entries[1::2], strict=True):
            if lba in kept:
                theirs[lba] = (txid, self.blocks[lba][1])
            else:
                theirs[lba] = (txid, data[at : at + BLOCK_BYTES])
                at += BLOCK_BYTES
        first = copy.region * REGION_BLOCKS
        for lba in range(first, first + REGION_BLOCKS):
            if lba in theirs:
                self.blocks[lba] = theirs[lba]
            else:
                self.blocks.pop(lba, None)
        self.region_txids[copy.region] = max(copy.region_txid, self.region_txids.get(copy.region, 0))

    def read(self, lba: int) -> bytes:
        return self.blocks.get(lba, (0, None))[1] or bytes(BLOCK_BYTES)


def left_out(copy: Copy) -> dict[int, int]:
    """By LBA: the checksums of the blocks that do not travel."""
    lbas, checksums = array("Q", copy.entries)[::2], array("I", copy.checksums)
    travels = set(travelling(copy.kept, lbas) if copy.kept else lbas)
    return {lba: checksum for lba, checksum in zip(lbas, checksums, strict=True) if lba not in travels}


class MemoryDisk:
    """A disk that holds one replica."""

    def __init__(self, rng: random.Random) -> None:
        self.promised_epoch = 0
        self.has_started_over = False
        self.start_over(rng)

    def start_over(self, rng: random.Random) -> None:
        """Be empty."""
        self.base = Image()
        self.records: list[Modification | Copy] = []
        self.dropped = 0  # records that are in the base
        self.synced = 0  # records, those that were dropped too
        self.incarnation = rng.randrange(1 << 40, 1 << 50)
        self.incarnations: tuple[int, ...] = ()
        self.resync: set[int] = set()
        self.fetched_txid = 0  # what was committed when a region was fetched last
        self.has_lost_power = False

    def incarnation_step(self, rng: random.Random) -> int:
        """From one incarnation to the next."""
        return rng.randrange(1, 1 << 20)

    def copied(self) -> "MemoryDisk":
        """As it is now, byte for byte."""
        other = copy(self)
        other.base, other.records, other.resync = self.base.copy(), [*self.records], {*self.resync}
        return other

    def crash(self, rng: random.Random, power: bool) -> None:
        """The process ends; without power what was not synced may be gone, from some record on."""
        if power:
            self.has_lost_power = True
            del self.records[rng.randint(self.synced - self.dropped, len(self.records)) :]

    def forget_unsynced(self) -> None:
        """The power loss that is to come takes all that it can."""
        del self.records[self.synced - self.dropped :]

    def sync_all(self) -> None:
        """The power loss that is to come takes nothing."""
        self.synced = self.dropped + len(self.records)

    def replay(self) -> Image:
        image = self.base.copy()
        for record in self.records:
            image.apply(record)
        return image


class MemoryLog:
    """`ReplicaLog`."""

    def __init__(self, disk: MemoryDisk, clock: Clock, rng: random.Random, slow: float = 0.0) -> None:
        self.disk = disk
        self._clock = clock
        self._random = rng
        self._slow = slow
        self._tap: Tap | None = None
        self.at_once = 0.0  # how often something need not wait
        self._lanes: dict[str, deque[tuple[Callable[[], int], Done, bool]]] = {"log": deque(), "store": deque()}
        self._committed_txid = 0
        self._packer = Packer()
        self.is_full = False
        self.epoch = 0
        self._open()
        self._checkpoint_sometimes()

    def _open(self) -> None:
        disk = self.disk
        disk.incarnation += disk.incarnation_step(self._random)
        disk.incarnations = (*(() if disk.has_lost_power else disk.incarnations), disk.incarnation)
        disk.incarnations = disk.incarnations[-INCARNATIONS_LIMIT:]
        disk.has_lost_power = False
        disk.synced = disk.dropped + len(disk.records)  # the recovered tail is written anew
        self.image = disk.replay()
        self._durable = self.image.last

    # --- what it says of itself ---

    @property
    def incarnation(self) -> int:
        return self.disk.incarnation

    @property
    def incarnations(self) -> Sequence[int]:
        return self.disk.incarnations

    @property
    def promised_epoch(self) -> int:
        return self.disk.promised_epoch

    @property
    def last(self) -> Position:
        return self.image.last

    @property
    def durable(self) -> Position:
        return self._durable

    @property
    def committed_txid(self) -> int:
        return max(self._committed_txid, self.disk.base.last.txid)

    @property
    def room_bytes(self) -> int:
        return 0 if self.is_full else CAPACITY_BYTES

    @property
    def epochs(self) -> Epochs:
        return self.image.epochs

    # --- lanes ---

    def _later(self, lane: str, act: Callable[[], int], done: Done, may_be_given_up: bool = False) -> None:
        queue = self._lanes[lane]
        queue.append((act, done, may_be_given_up))
        if len(queue) == 1:
            self._clock.call_later(self._latency_s(lane), lambda: self._next(lane))

    def _latency_s(self, lane: str) -> float:
        if self._slow and self._random.random() < self._slow:
            return 0.2 * self._random.random()
        return 0.002 * self._random.random() if lane == "store" or self._random.random() < 0.1 else 0.0

    def _next(self, lane: str) -> None:
        queue = self._lanes[lane]
        act, done, _ = queue[0]
        result = act()
        queue.popleft()
        if queue:
            self._clock.call_later(self._latency_s(lane), lambda: self._next(lane))
        done(result)

    # --- an owner's ---

    def begin_epoch(self, epoch: int) -> None:
        invariant(epoch <= self.promised_epoch, "an epoch is promised before it begins")
        self.epoch = epoch

    def tap(self, tap: Tap | None) -> None:
        self._tap = tap

    def order(self, lba: int, blocks: Sequence[bytes | None]) -> Modification:
        """Blocks one after the other are written, or discarded (None), as an owner's client asked for it."""
        invariant(self._tap is not None, "nobody owns this log")
        extents = array("Q")
        for index, content in enumerate(blocks):
            extents.extend((lba + index, 1 | (EXTENT_HOLE if content is None else EXTENT_DATA) << 32))
        data = [content for content in blocks if content is not None]
        body = extents.tobytes() + array("Q", [0] * len(data)).tobytes() + array("I", map(crc32c, data)).tobytes()
        txid = self.last.txid + 1
        modification = Modification(self.epoch, txid, WRITE, 1, len(blocks), len(data), body, data)
        self._take(modification)
        assert self._tap is not None
        self._tap(modification)
        return modification

    def _take(self, record: Modification | Copy) -> None:
        self.disk.records.append(record)
        self.image.apply(record)

    # --- a replica's ---

    def promise(self, epoch: int, done: Done) -> None:
        def act() -> int:
            self.disk.promised_epoch = max(epoch, self.disk.promised_epoch)
            return 0

        self._later("store", act, done)

    def append(self, modifications: Sequence[Modification], done: Done) -> None:
        def act() -> int:
            if modifications and self.is_full:
                return errno.ENOSPC
            for each in modifications:
                if each.txid != self.last.txid + 1 or each.epoch < self.last.epoch:
                    return errno.ESTALE
                self._take(each)
            return 0

        self._later("log", act, done, may_be_given_up=True)

    def settle(self, done: Done) -> None:
        lane = self._lanes["log"]
        given_up = [each for each in lane if each is not lane[0] and each[2]]
        self._lanes["log"] = deque(each for each in lane if each not in given_up)
        for _, given_up_done, _ in given_up:
            self._clock.call_soon(partial(given_up_done, errno.ECANCELED))
        self._later("log", lambda: 0, done)

    def append_now(self, modifications: Sequence[Modification]) -> int | None:
        if self._lanes["log"]:
            return None
        if self.is_full or self._slow or not self.at_once or self._random.random() >= self.at_once:
            return 0
        for count, each in enumerate(modifications):
            if each.txid != self.last.txid + 1 or each.epoch < self.last.epoch:
                return count
            self._take(each.kept())
        return len(modifications)

    def set_committed(self, txid: int) -> None:
        self._committed_txid = max(txid, self._committed_txid)

    def sync(self, done: Done) -> None:
        disk, last, incarnation = self.disk, self.last, self.incarnation
        number = disk.dropped + len(disk.records)

        def act() -> int:
            if incarnation == self.incarnation:  # it was not cut since
                disk.synced = max(disk.synced, number)
                self._durable = max(self._durable, last)
            return 0

        self._later("store", act, done)

    # --- logs that differ ---

    def modifications(
        self, after: Position, limit_bytes: int, done: Callable[[int, Sequence[Modification] | None], None]
    ) -> None:
        def answer() -> None:
            base = self.disk.base.last
            if after < base:
                done(0, None)
                return
            found: list[Modification] = []
            size_bytes = 0
            for record in self.disk.records:
                if isinstance(record, Modification) and record.position > after and size_bytes < limit_bytes:
                    found.append(record)
                    size_bytes += record.size_bytes
            done(0, found)

        self._clock.call_later(0.002 * self._random.random(), answer)

    def cut(self, at: Position, done: Done) -> None:
        def act() -> int:
            if at < self.disk.base.last or at.txid < self.disk.fetched_txid:
                if at != BEGINNING:
                    return errno.ENOENT
                self.disk.start_over(self._random)
                self.disk.has_started_over = True
                self._committed_txid = 0
            if at > self.last:
                return errno.EINVAL
            records = self.disk.records
            positions = [record.position if isinstance(record, Modification) else BEGINNING for record in records]
            invariant(at in (self.disk.base.last, *positions), f"{at} is not in the log")
            # Copies right behind `at` are of it, and stay.
            kept = next((index for index, position in enumerate(positions) if position > at), len(records))
            del records[kept:]
            self._tap = None
            self._open()
            return 0

        self._later("log", act, done)

    @property
    def tree(self) -> bytes:
        return b""  # this log has one layer

    def skip(self, to: Position, epochs: Epochs, regions: Runs, tree: bytes, done: Done) -> None:
        def act() -> int:
            image = self.image
            image.last, image.epochs = to, epochs
            self.disk.resync.update(numbers_of(regions))
            self._rebase(image.copy(), len(self.disk.records))
            self._durable = to
            return 0

        self._later("log", act, done)

    def _rebase(self, base: Image, dropped: int) -> None:
        disk = self.disk
        disk.base = base
        del disk.records[:dropped]
        disk.dropped += dropped
        disk.synced = max(disk.synced, disk.dropped)

    def _checkpoint_sometimes(self) -> None:
        self._clock.call_later(5.0 * self._random.random(), self._checkpoint_sometimes)
        self.checkpoint()

    def checkpoint(self) -> None:
        """Move the base to the last record that may not be cut away any more."""
        disk = self.disk
        taken = 0
        for index, record in enumerate(disk.records[: disk.synced - disk.dropped]):
            if isinstance(record, Modification):
                if record.txid > self.checkpoint_limit_txid:
                    break
                taken = index + 1  # copies behind it stay records
        if taken and self._random.random() < 0.7:
            base = disk.base.copy()
            for record in disk.records[:taken]:
                base.apply(record)
            self._rebase(base, taken)

    @property
    def checkpoint_limit_txid(self) -> int:
        """No checkpoint passes it."""
        return self._committed_txid

    # --- regions ---

    def regions_after(self, txid: int) -> Runs:
        return runs_of(sorted(region for region, last in self.image.region_txids.items() if last > txid))

    @property
    def resync(self) -> Runs:
        return runs_of(sorted(self.disk.resync))

    @property
    def resync_count(self) -> int:
        return len(self.disk.resync)

    def resync_done(self, regions: Runs, done: Done) -> None:
        committed_txid = self.committed_txid

        def act() -> int:
            self.disk.resync.difference_update(numbers_of(regions))
            self.disk.fetched_txid = committed_txid
            return 0

        self._later("store", act, done)

    def digest_region(self, region: int, done: Callable[[Mapping[int, bytes]], None]) -> None:
        def answer() -> None:
            done({lba: digest(content) for lba, _, content in self._blocks_in(region)})

        self._clock.call_later(0.002 * self._random.random(), answer)

    def _blocks_in(self, region: int) -> list[tuple[int, int, bytes]]:
        """(LBA, txid, content) of a region."""
        first = region * REGION_BLOCKS
        found = ((lba, *self.image.blocks.get(lba, (0, None))) for lba in range(first, first + REGION_BLOCKS))
        return [(lba, txid, content) for lba, txid, content in found if content is not None]

    def read_region(
        self, region: int, known: Mapping[int, bytes] | None, done: Callable[[int, Copy | None], None]
    ) -> None:
        def answer() -> None:
            blocks = self._blocks_in(region)
            same = [known is not None and known.get(lba) == digest(content) for lba, _, content in blocks]
            data = [content for (_, _, content), is_same in zip(blocks, same, strict=True) if not is_same]
            entries = array("Q", [value for lba, txid, _ in blocks for value in (lba, txid)])
            checksums = array("I", [crc32c(content) for _, _, content in blocks]).tobytes()
            region_txid = self.image.region_txids.get(region, 0)
            bits = sum(is_same << at for at, is_same in enumerate(same))
            kept = bits.to_bytes((len(blocks) + 7) // 8, "little") if bits else b""
            parts = [] if known is None else [self._packer.pack([content]) for content in data]
            done(0, Copy(region, self.last.txid, region_txid, entries.tobytes(), checksums, data, kept, parts))

        self._clock.call_later(self._random.choice([0.001, 0.01, 0.2]) * self._random.random(), answer)

    def apply_copy(self, copy: Copy, done: Done) -> None:
        def act() -> int:
            if copy.txid != self.last.txid:
                return errno.ESTALE
            for lba, checksum in left_out(copy).items():
                content = self.image.blocks.get(lba, (0, None))[1]
                if content is None or crc32c(content) != checksum:
                    return errno.ENOENT
            self._take(copy)
            return 0

        self._later("log", act, done, may_be_given_up=True)

    def check_region(self, region: int, done: Callable[[RegionState], None]) -> None:
        def act() -> int:
            blocks = b"".join(digest(content) for _, _, content in self._blocks_in(region))
            done(RegionState(self.image.region_txids.get(region, 0), digest(blocks)))
            return 0

        self._later("log", act, lambda errno: None)

    # --- single blocks: this log has none that rot ---

    def repair_from(self, source: BlockSource | None) -> None:
        pass

    def read_blocks(self, mbas: Sequence[int], is_patient: bool, done: Callable[[Mapping[int, bytes]], None]) -> None:
        self._clock.call_soon(lambda: done({}))

"""Operations that have to wait: for map pages, for cold data, for room.

Theory. An operation is cut into pieces of at most one logical page (1 MiB). Each piece is tried inline, exactly like
on the hot path; if that fails, what it lacks is brought in off the loop and it is tried again. So every decision
(which PBA, which content a partial block is merged with) is taken where the record is ordered, from the maps as they
are then. A block that is read off the loop is used for a merge only if its MBA still has the PBA that was read.

After a whole piece of _PIECE_BYTES (some 0.3 ms of reading or writing) the operation goes on in another turn of the
loop. Of operations with more than that, each turn has one.

Rules
- What cannot be had is said: EIO for a block whose checksum is wrong and that no other replica has (cold_read.py),
  ENOSPC when no room can be gained.
- Every operation ends: with success, with an errno, or with EIO when the family fails.

Known weakness: pieces of one operation go one after the other, so a large cold read does not use the device's whole
queue.
"""

import errno as errnos
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from metadata.logical_map import LAYER_SHIFT
from metadata.pages import MIN_PAGES, PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT
from metadata.seams import Buffer, Clock, Files
from nbdserver.block import HOLE, ZERO, Extents, Later, Operation
from nbdserver.logdisk.cold_read import BlockPlace, ColdRead, place_of
from nbdserver.logdisk.devices import Device, Head
from nbdserver.logdisk.maps import SMALL_HOLE_BLOCKS
from nbdserver.logdisk.next_page import NextPage
from nbdserver.logdisk.segments import CLIENTS_KEEP
from protocol.disk import BLOCK_BYTES, WRITE, body_bytes

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_PIECE_BYTES = PAGE_BLOCKS * BLOCK_BYTES
_TRIES = 3  # with a large piece, before it is halved: its pages do not fit into the cache together
_MOST_REPAIRS = 3  # in one piece: a device that loses what was just written to it is given up
_MOST_EXTENT_PAGES = 64  # looked at for one EXTENTS


class SlowPath:
    """Runs operations that could not be answered inline."""

    def __init__(self, disk: "LogDisk", files: Files, clock: Clock) -> None:
        self.under_way = 0
        self.cold_reads = 0
        self.cold_bytes = 0
        self._disk = disk
        self._files = files
        self._clock = clock
        self._parked: list[Callable[[], None]] = []
        self._continued: deque[Callable[[], None]] = deque()

    def submit(
        self,
        device: Device,
        operation: Operation,
        offset: int,
        length: int,
        data: bytes | None,
        done: Later,
        limit: int,
    ) -> None:
        """See BlockDevice.later."""
        self.under_way += 1
        self._disk.background.stir()
        _Waiting(self, device, operation, offset, length, data, done, limit)

    def wake(self) -> None:
        """Something may have changed for those who wait for room."""
        if self._parked:
            parked, self._parked = self._parked, []
            for retry in parked:
                self._clock.call_soon(retry)

    def park(self, retry: Callable[[], None]) -> None:
        """Call `retry` at the next `wake`."""
        self._parked.append(retry)

    def continue_later(self, go_on: Callable[[], None]) -> None:
        """Call it in another turn of the loop, when those that asked before have had theirs."""
        self._continued.append(go_on)
        if len(self._continued) == 1:
            self._clock.call_soon(self._continue)

    def _continue(self) -> None:
        go_on = self._continued.popleft()
        if self._continued:
            self._clock.call_soon(self._continue)
        go_on()


class _Waiting:
    """One operation under way."""

    def __init__(
        self,
        slow_path: SlowPath,
        device: Device,
        operation: Operation,
        offset: int,
        length: int,
        data: bytes | None,
        done: Later,
        limit: int,
    ) -> None:
        self._slow_path = slow_path
        self._device = device
        self._disk = device.disk
        self._operation = operation
        self._at = offset
        self._start = offset
        self._end = offset + length
        self._data = memoryview(data) if data is not None else memoryview(b"")
        self._done = done
        self._limit = limit
        self._over = False
        self._tries = 0
        self._repairs = 0  # of the piece
        self._piece_bytes = _PIECE_BYTES
        self._pieces: list[Buffer] = []
        self._extents: Extents = []
        self._extent_pages = 0
        self._ahead: NextPage | None = None
        self._cold: dict[int, tuple[BlockPlace, bytes]] = {}  # LBA → (place, content), for merging
        if length > _PIECE_BYTES:
            slow_path.continue_later(self._go_on)
        else:
            slow_path._clock.call_soon(self._go_on)

    @property
    def _first_page(self) -> int:
        return self._device.layer << LAYER_SHIFT

    @property
    def _head(self) -> Head:
        device = self._device
        assert isinstance(device, Head)  # a view takes nothing that changes
        return device

    # -- going on

    def _go_on(self) -> None:
        try:
            self._run()
        except Exception as error:
            self._disk.parted(error)
            self._finish(errnos.EIO)

    def _run(self) -> None:
        disk = self._disk
        stop = self._at + _PIECE_BYTES
        while not self._over:
            if disk.failure or self._device.gone:
                self._finish(errnos.EIO)
                return
            if self._at >= self._end:
                self._finish(0)
                return
            piece_end = min(self._end, (self._at // self._piece_bytes + 1) * self._piece_bytes)
            if not self._try(piece_end):
                return
            self._tries = self._repairs = 0
            if stop <= self._at < self._end:
                self._slow_path.continue_later(self._go_on)
                return

    def _finish(self, errno: int) -> None:
        """Hand the result over, from the loop: what the caller does with it is not this operation's any more."""
        if self._over:
            return
        self._over = True
        result: Sequence[Buffer] | Extents | None = None
        if not errno and self._operation == Operation.READ:
            result = self._pieces
        elif not errno and self._operation == Operation.EXTENTS:
            result = self._extents[: self._limit]

        def hand_over() -> None:
            self._slow_path.under_way -= 1
            self._done(errno, result)

        self._slow_path._clock.call_soon(hand_over)

    def _try(self, end: int) -> bool:
        """Do the piece up to `end` and move on; False if a callback will call `_go_on` again, or the operation
        ended."""
        operation = self._operation
        if operation in (Operation.READ, Operation.CACHE):
            return self._try_read(end)
        if operation == Operation.EXTENTS:
            return self._try_extents()
        return self._try_change(end)

    def _load(self, lba: int, count: int, first_mba: int = 1) -> bool:
        """Whether the pages for these blocks are there; otherwise they are being loaded. The middle map is left out for
        MBAs lower than `first_mba`."""
        need = self._disk.maps.needed(self._device.first_address + lba, count, MIN_PAGES // 2, first_mba)
        if not need:
            return True
        self._tries += 1
        if self._tries > _TRIES and self._piece_bytes > BLOCK_BYTES:
            self._piece_bytes >>= 1
            self._tries = 0
        self._disk.maps.load(need, self._go_on)
        return False

    # -- reading

    def _try_read(self, end: int) -> bool:
        found = self._device.read(self._at, end - self._at)
        if found is not None:
            if self._operation == Operation.READ:
                self._pieces += found
            self._at = end
            return True
        lba = self._at >> 12
        count = ((end + 4095) >> 12) - lba
        if self._load(lba, count):
            self._read_cold(lba, count, lambda blocks: self._cold_arrived(lba, blocks, end))
        return False

    def _cold_arrived(self, lba: int, blocks: list[bytes], end: int) -> None:
        if self._operation == Operation.READ:
            whole = b"".join(blocks)
            begin = self._at - (lba << 12)
            self._pieces.append(memoryview(whole)[begin : begin + end - self._at])
        self._at = end
        self._go_on()

    def _read_cold(self, lba: int, count: int, arrived: Callable[[list[bytes]], None]) -> None:
        """Read resident-mapped blocks of one piece off the loop and check them; EIO ends the operation."""
        slow_path = self._slow_path
        slow_path.cold_reads += 1
        slow_path.cold_bytes += count * BLOCK_BYTES
        places = [self._place(lba + index) for index in range(count)]

        def read(errno: int, blocks: list[bytes]) -> None:
            self._repairs += errno == errnos.EAGAIN
            if not errno:
                arrived(blocks)
            elif errno == errnos.EAGAIN and self._repairs <= _MOST_REPAIRS:
                self._go_on()
            else:
                self._finish(errnos.EIO)

        ColdRead(self._disk, slow_path._files, self._device.layer, lba, places, read)

    def _place(self, lba: int) -> BlockPlace | None:
        """Of a block whose pages are resident, None for a hole."""
        maps = self._disk.maps
        page = maps.page(self._first_page + (lba >> PAGE_SHIFT))
        assert page is not None
        mba = page[lba & PAGE_MASK]
        if not mba:
            return None
        middle = maps.middle.get(mba >> PAGE_SHIFT)
        assert middle is not None
        return place_of(mba, middle)

    # -- changing

    def _try_change(self, end: int) -> bool:
        """WRITE and DISCARD."""
        disk = self._disk
        if disk.background.must_wait_for_checkpoint():
            disk.checkpointer.when_done(self._go_on)
            return False
        if self._operation == Operation.WRITE and disk.background.must_wait_for_cleaner():
            self._slow_path.park(self._go_on)
            return False
        if self._has_to_wait_for_segment(end):
            self._slow_path.park(self._go_on)
            return False
        if self._operation == Operation.DISCARD:
            return self._try_discard(end)
        aligned_end = self._aligned_end(end)
        lba = self._at >> 12
        # What whole blocks replace is not looked up if it is shared: it stays where it is.
        owned = 1 if (self._at | aligned_end) & 4095 else disk.maps.tree.first_mba(self._head.layer)
        if not self._load(lba, ((aligned_end + 4095) >> 12) - lba, owned):
            return False
        begin = self._at - self._start
        data = self._data[begin : begin + aligned_end - self._at]
        if (self._at | aligned_end) & 4095:
            held = self._held(lba)
            if held is None:
                return False
            merged = bytearray(held)
            within = self._at & 4095
            merged[within : within + len(data)] = data
            data = memoryview(bytes(merged))
        return self._changed(self._head.writer.write_now(lba, data), aligned_end)

    def _has_to_wait_for_segment(self, end: int) -> bool:
        appending, pool = self._disk.appending, self._disk.pool
        if self._operation == Operation.DISCARD:
            return appending.has_to_wait(BLOCK_BYTES, pool.keep_of_discard(self._end - self._at))
        blocks = ((end + 4095) >> 12) - (self._at >> 12)
        return appending.has_to_wait(body_bytes(WRITE, 1, blocks) + blocks * BLOCK_BYTES, CLIENTS_KEEP)

    def _aligned_end(self, end: int) -> int:
        """Where the piece from `_at` on ends so that it is whole blocks or lies in one block."""
        if self._at & 4095:
            return min(end, (self._at | 4095) + 1)
        return end & ~4095 if end & ~4095 > self._at else end

    def _held(self, lba: int) -> bytes | None:
        """The present content of a block to be merged with, or None: it is being read."""
        inline = self._device.read(lba << 12, BLOCK_BYTES)
        if inline is not None:
            return b"".join(inline)
        place = self._place(lba)
        if place is None:
            return bytes(BLOCK_BYTES)
        cold = self._cold.get(lba)
        if cold is not None and cold[0] == place:
            return cold[1]

        def arrived(blocks: list[bytes]) -> None:
            self._cold[lba] = (place, blocks[0])
            self._go_on()

        self._read_cold(lba, 1, arrived)
        return None

    def _try_discard(self, end: int) -> bool:
        disk = self._disk
        first = (self._at + 4095) >> 12
        stop = self._end >> 12
        if self._at & 4095 or stop <= first:
            # An edge: zeros merged into one block, unless it holds zeros.
            return self._zero_edge(min(self._end, (self._at | 4095) + 1))
        if stop - first > SMALL_HOLE_BLOCKS:
            layer = self._head.layer
            if not disk.maps.has_many_cuts(layer):
                if not disk.maps.can_take_hole(layer):
                    self._slow_path.park(self._go_on)
                    return False
                return self._changed(self._head.writer.discard_now(first, stop - first), stop << 12)
        stop = min(stop, end >> 12) if end >> 12 > first else stop
        stop = min(stop, first + max(1, self._piece_bytes >> 12))
        if not self._load(first, stop - first, disk.maps.tree.first_mba(self._head.layer)):
            return False
        return self._changed(self._head.writer.discard_now(first, stop - first), stop << 12)

    def _zero_edge(self, end: int) -> bool:
        lba = self._at >> 12
        if not self._load(lba, 1):
            return False
        held = self._held(lba)
        if held is None:
            return False
        within = self._at & 4095
        merged = bytearray(held)
        merged[within : within + end - self._at] = bytes(end - self._at)
        if merged == held:
            self._at = end
            return True
        return self._changed(self._head.writer.write_now(lba, memoryview(bytes(merged))), end)

    def _changed(self, errno: int, end: int) -> bool:
        if errno == errnos.ENOSPC:
            if self._piece_bytes > BLOCK_BYTES:
                self._piece_bytes >>= 1  # a smaller piece may still fit
                return True
            if self._disk.background.can_gain_room():
                self._slow_path.park(self._go_on)
                return False
        if errno:
            self._finish(errno)
            return False
        self._at = end
        return True

    # -- extents

    def _try_extents(self) -> bool:
        disk = self._disk
        found = self._device.extents(self._at, self._end - self._at, self._limit + 1)
        if found is not None:
            self._extents = self._joined(found)
            self._finish(0)
            return False
        maps = disk.maps
        number = self._at >> 12 >> PAGE_SHIFT
        if maps.page(self._first_page + number) is not None:
            page_end = min(self._end, ((number + 1) << PAGE_SHIFT) << 12)
            found = self._device.extents(self._at, page_end - self._at, 1 << 16) or []
            self._extents = self._joined(found)
            self._at = page_end
            self._extent_pages += 1
            if len(self._extents) > self._limit or self._extent_pages >= _MOST_EXTENT_PAGES:
                self._finish(0)
                return False
            return True
        layers = [layer.row.layer for layer in maps.tree.chain(self._device.layer)]
        if self._ahead is None:
            self._ahead = NextPage(disk, (self._end - 1) >> 12 >> PAGE_SHIFT)
        self._ahead.find(layers, number, self._next_page)
        return False

    def _next_page(self, following: int) -> None:
        """Everything before the next page that exists anywhere is a hole."""
        number = self._at >> 12 >> PAGE_SHIFT
        if following <= number:
            maps = self._disk.maps
            if maps.page(self._first_page + number) is None:
                maps.load([(maps.logical, self._first_page + number)], self._go_on)
            else:
                self._go_on()
            return
        hole_end = min(self._end, (following << PAGE_SHIFT) << 12)
        self._extents = self._joined([(hole_end - self._at, HOLE | ZERO)])
        self._at = hole_end
        self._go_on()

    def _joined(self, more: Extents) -> Extents:
        joined = list(self._extents)
        for length, flags in more:
            if joined and joined[-1][1] == flags:
                joined[-1] = (joined[-1][0] + length, flags)
            else:
                joined.append((length, flags))
        return joined[: self._limit + 1]

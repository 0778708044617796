"""The segment files of one family: which are open, spare, awaiting their readers, or to be unlinked.

Theory. A recycled file's blocks are allocated and its pages are cached, which makes an append three times cheaper than
one to a new file. So a freed segment goes on a stack and the next life takes the most recently freed one. At rest only
max(8, 2 % of the live data) stay spare; what was not needed for a while is unlinked, so that `df` tells the truth.
Where none is freed, because data is new, a thread makes files ahead of need (making.py): the loop waits for none.

Full disk. `CLIENTS_KEEP` spare files are not for clients: the cleaner, discards and deletions append with them, in this
order, and they are how a full disk gets room again. As long as there is room to make it anew, half of what is kept from
somebody may be *lent* to him, so that a burst does not wait for the thread. When all are in use, the end of the open
one (`LAST_ROOM_BYTES`) is for whoever may have the last one, and for the cleaner. A limit set by people (budget.py) is
kept in the same way: `full` says which of the ends was met.

Rules
- A file is given out only after `freed`, that is when the checkpoint batch that no longer names it is synced, and only
  when no read that looked up an address in it is in flight.
- Numbers start at 1 and the lowest unused one is taken, so that the lists indexed by number stay short.
- The reserve is made beyond a budget too: without it nothing could be brought back below.
- Who can wait asks `is_at_hand` first, and has one made (`make_ahead`) if none is. Who cannot wait is served all the
  same: then `take` makes it on the loop.
"""

from collections.abc import Callable
from functools import partial

from metadata.seams import Files
from nbdserver.logdisk.budget import Budget
from nbdserver.logdisk.making import Ballast, Making
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from protocol.disk import RECORD_HEADER_BYTES, SEAL_BYTES, SEGMENT_HEADER_BYTES

CLIENTS_KEEP = 4  # of the spare files, by those who append for clients
MADE_AHEAD = 2  # beyond those, for clients
CLEANER_KEEPS = 2  # one is for discards
DISCARDS_KEEP = 1
DELETIONS_KEEP = 0  # the last one is for deletions and for discards of a segment's length: a full disk can be emptied
LAST_ROOM_BYTES = 16 << 10  # at the end of the open segment when no other one can be had, for what brings one
SPARE_SEGMENTS = 8
SPARE_FRACTION = 0.02
SHORT_SEGMENTS = 8  # so few that clients may still take: garbage is cleaned up as if nothing else was to do
DIRECTORY = "segments"
_FREE, _TAKEN = -1, -2  # no handles: of a number that may be used, and of one whose file is being made or unlinked
_FREE_FLOOR_BYTES = 64 << 20  # of the file system that is left to LevelDB and the neighbours


def segment_path(segment: int) -> str:
    """Path of a segment file below the family's directory."""
    return f"{DIRECTORY}/{segment:08d}.seg"


class SegmentPool:
    """Files by segment number. `handles[number]` is an open handle, or negative."""

    def __init__(self, files: Files, segment_bytes: int, report: Callable[[str, dict[str, object]], None]) -> None:
        self.handles: list[int] = [_FREE]
        self.segment_bytes = segment_bytes
        # The most that one record can have of body and data.
        self.record_bytes = segment_bytes - SEGMENT_HEADER_BYTES - SEAL_BYTES - RECORD_HEADER_BYTES
        self.spare: list[int] = []  # a stack
        self.created = 0
        self.recycled = 0
        self.unlinked = 0
        self.full = ""  # why clients get no further segment: "disk", "max-data", "node-max-data"
        self.budget = Budget()
        self.shared_budget = Budget()  # with other families
        self._files = files
        self._report = report
        self._short: set[int] = set()  # files that are not of segment_bytes
        self._readers: dict[int, int] = {}
        self._awaiting_readers: set[int] = set()
        self._lowest_spare = 0  # since the last `trim_spare`
        self.ballast = Ballast(files, report)
        self.settled: Callable[[], None] = lambda: None
        """Called when a thread is done with a file, however that ended."""
        self._making = Making(files, segment_bytes, report)
        self._unlinking = 0

    # -- opening

    def adopt(self, in_use: set[int]) -> None:
        """Open the files of the segments in use and take every other one as spare, until replay knows better and
        `drop_short` unlinks those that are not whole. OSError if one in use is missing."""
        present = self._present()
        for segment in sorted(in_use):
            self._set_handle(segment, self._files.open(segment_path(segment)))
        for path, segment in present:
            if segment in in_use or self.is_there(segment):
                continue
            self._set_handle(segment, self._files.open(path))
            self.spare.append(segment)
        for segment in (*in_use, *self.spare):
            if self._files.size_bytes(self.handles[segment]) != self.segment_bytes:
                self._short.add(segment)  # a power cut took its length; the log may go on in it all the same
        if self.spare:
            # A crash may have come between making a file and making its name durable.
            self._files.sync_directory(DIRECTORY)
        self.ballast.adopt()
        self._lowest_spare = len(self.spare)

    def open_all(self) -> None:
        """Open every file that is there, for who only reads. OSError."""
        for _, segment in self._present():
            self.open_if_present(segment)

    def _present(self) -> list[tuple[str, int]]:
        """(path, segment) of every file that is there, by path. OSError."""
        names = (name.partition(".") for name in sorted(self._files.list(DIRECTORY)))
        return [
            (f"{DIRECTORY}/{stem}.{suffix}", int(stem))
            for stem, _, suffix in names
            if suffix == "seg" and stem.isdigit()
        ]

    def open_if_present(self, segment: int) -> bool:
        """Open a segment that replay met and the checkpoint does not know."""
        if self.is_there(segment):
            return True
        try:
            handle = self._files.open(segment_path(segment))
        except FileNotFoundError:
            return False
        self._set_handle(segment, handle)
        return True

    def drop_short(self) -> None:
        """Replay knows by now which files are in use: unlink the spare ones that are not whole, at once, because the
        log may begin in a new file of the same name. OSError if that fails."""
        for segment in [each for each in self.spare if each in self._short]:
            self.spare.remove(segment)
            self._forget(segment)
            self._files.unlink(segment_path(segment))
            self._number_free(segment)

    def keep(self, segment: int) -> None:
        """Replay found the segment in use."""
        if segment in self.spare:
            self.spare.remove(segment)

    @property
    def is_busy(self) -> bool:
        """Whether a thread is at work on a file: `close` has to wait for it."""
        return self.is_making or self._unlinking > 0

    def close(self) -> None:
        """Close every file."""
        self.share_budget(Budget())
        for segment, handle in enumerate(self.handles):
            if handle >= 0:
                self._files.close(handle)
                self.handles[segment] = _FREE

    # -- giving out

    def take(self, keep: int) -> int:
        """A free segment file for a new life, or 0 when there is none but `keep` of the spare ones."""
        segment = 0
        if self.is_at_hand(keep):
            segment = self.spare.pop()
            self.recycled += 1
        elif self._has_room(keep):
            segment = self._make_now(self._unused_number())
        self._lowest_spare = min(self._lowest_spare, len(self.spare))
        if segment:
            crash_point("segment-before-reuse")
        return segment

    def is_at_hand(self, keep: int = CLIENTS_KEEP) -> bool:
        """Whether `take` would find one that is there: a spare one, or one that can be lent, because another is being
        made or can be."""
        if self._has_spare(keep):
            return True
        return len(self.spare) > keep // 2 and (self._has_spare(keep, self._making.busy) or self._has_room(keep))

    def can_take(self, keep: int = CLIENTS_KEEP) -> bool:
        """Whether another segment could be had now."""
        return self.is_at_hand(keep) or self._has_room(keep)

    def kept_of_open_bytes(self, keep: int) -> int:
        """Bytes at the end of the open segment that are not for those who leave `keep` spare files alone; mostly 0."""
        brings_room = keep in (DELETIONS_KEEP, CLEANER_KEEPS)
        return 0 if brings_room or self.can_take(DELETIONS_KEEP) else LAST_ROOM_BYTES

    def keep_of_discard(self, length_bytes: int) -> int:
        """How many spare files a discard of that length leaves alone: the last one is for what can bring another."""
        return DISCARDS_KEEP if length_bytes < self.segment_bytes else DELETIONS_KEEP

    def segments_to_be_had(self, keep: int, most: int = 8) -> int:
        """How many segments could be had one after the other, counted up to `most`; the ballast besides, if that is to
        be made yet: who relies on it is sent so much later."""
        spare = max(0, len(self.spare) - keep) if self._has_spare(keep) else 0
        files = spare
        besides_bytes = self.ballast.missing_bytes
        while files < most and self._has_room_for(files - spare + self._files_with_reserve(keep), besides_bytes):
            files += 1
        return files

    def is_short(self) -> bool:
        """Whether clients can get only a few more segments."""
        if len(self.spare) - CLIENTS_KEEP >= SHORT_SEGMENTS:
            return False
        files = SHORT_SEGMENTS + CLIENTS_KEEP - len(self.spare)
        return self._overdrawn() or not self._has_room_for(files)

    def note_full(self, full: bool) -> None:
        """Say once that clients can get no further segment, and why, and once that they can again."""
        if full != bool(self.full):
            self.full = self._why_full() if full else ""
            fields = {"reason": self.full} if full else {}
            self._report("disk-full" if full else "disk-has-room", {**fields, "free_bytes": self._files.free_bytes()})

    # -- budgets

    def share_budget(self, budget: Budget) -> None:
        """Draw from this one, instead of the one before, together with other families."""
        self.shared_budget.use(-self.budget.used_bytes)
        self.shared_budget = budget
        budget.use(self.budget.used_bytes)

    def trim_to_budget(self) -> None:
        """Unlink spare files, but for the reserve, until no budget is overdrawn."""
        while self._overdrawn() and len(self.spare) > CLIENTS_KEEP:
            self._drop(self.spare.pop(0))

    def _overdrawn(self) -> bool:
        return bool(self.budget.overdrawn_bytes or self.shared_budget.overdrawn_bytes)

    def _use(self, size_bytes: int) -> None:
        self.budget.use(size_bytes)
        self.shared_budget.use(size_bytes)

    def _why_full(self) -> str:
        needed_bytes = self._files_with_reserve(CLIENTS_KEEP) * self.segment_bytes
        for budget, name in ((self.budget, "max-data"), (self.shared_budget, "node-max-data")):
            if budget.left_bytes(needed_bytes) < needed_bytes:
                return name
        return "disk"

    def is_there(self, segment: int) -> bool:
        """Whether there is a file of that number."""
        return segment < len(self.handles) and self.handles[segment] >= 0

    def take_number(self, segment: int) -> bool:
        """Take the file of one given number: a family's first."""
        if segment in self.spare:
            self.spare.remove(segment)
        elif not self.is_there(segment):
            return self._has_room(CLIENTS_KEEP) and self._make_now(segment) != 0
        return True

    def return_unused(self, segment: int) -> None:
        """Put back a file that was taken and not written."""
        self.spare.append(segment)

    # -- getting back

    def freed(self, segment: int) -> None:
        """The segment's life is over; it may be given out when its readers have left."""
        if holds(Rule.REUSE_AFTER_READERS_LEFT) and self._readers.get(segment):
            self._awaiting_readers.add(segment)
        elif segment in self._short:
            self._drop(segment)
        else:
            self.spare.append(segment)

    def begin_read(self, segment: int) -> None:
        """A read off the loop has looked up an address in the segment."""
        self._readers[segment] = self._readers.get(segment, 0) + 1

    def end_read(self, segment: int) -> None:
        left = self._readers[segment] - 1
        if left:
            self._readers[segment] = left
            return
        del self._readers[segment]
        if segment in self._awaiting_readers:
            self._awaiting_readers.discard(segment)
            self.freed(segment)

    @property
    def is_making(self) -> bool:
        """Whether a thread is making a file."""
        return self._making.busy or self.ballast.busy

    def keep_ready(self, calm: bool) -> None:
        """Make what a full disk and the next writes will need, one file at a time: written with zeros while little is
        written."""
        self._making.has_failed = False  # another try
        reserve_missing = len(self.spare) < CLIENTS_KEEP
        if self.is_making or not (self._has_room(0) or (reserve_missing and self._disk_has_room_for(1))):
            return
        if calm and not self.ballast.is_there:
            self.ballast.make(self.settled)
        elif self._lacks_spare():
            self._begin_making(self._unused_number(), self._making.write if calm else self._making.allocate)

    def make_ahead(self, segment: int = 0) -> bool:
        """Begin to make the next file, or the one of a given number, if there is room for it and need; whether it is
        worth while to wait until this is `settled`. Not again after one that failed, until `keep_ready`."""
        if segment < len(self.handles) and self.handles[segment] == _TAKEN:
            return self.is_busy
        if not self.is_making and self._lacks_spare() and not self._making.has_failed and self._has_room(0):
            self._begin_making(segment or self._unused_number(), self._making.allocate)
        return self.is_making

    def _lacks_spare(self) -> bool:
        return len(self.spare) < CLIENTS_KEEP + MADE_AHEAD

    def trim_spare(self, live_bytes: int) -> None:
        """Unlink spare files that were not needed since the last call, down to what may stay."""
        surplus = min(self._lowest_spare, len(self.spare)) - self._may_stay(live_bytes)
        for _ in range(surplus):
            self._drop(self.spare.pop(0))  # the longest unused one
        self._lowest_spare = len(self.spare)

    def has_surplus(self, live_bytes: int) -> bool:
        """Whether `trim_spare` will unlink files if they are not needed."""
        return len(self.spare) > self._may_stay(live_bytes)

    def _may_stay(self, live_bytes: int) -> int:
        return max(SPARE_SEGMENTS, int(live_bytes * SPARE_FRACTION) // self.segment_bytes)

    # -- inside

    def _make_now(self, segment: int) -> int:
        handle = self._making.now(segment_path(segment))
        if handle < 0:
            return 0
        self._set_handle(segment, handle)
        self.created += 1
        return segment

    def _begin_making(self, segment: int, make: Callable[[str, Callable[[int], None]], None]) -> None:
        self._set_handle(segment, _TAKEN)
        make(segment_path(segment), partial(self._made, segment))

    def _made(self, segment: int, handle: int) -> None:
        if handle < 0:
            self._use(-self.segment_bytes)
            self._number_free(segment)
        else:
            self._set_handle(segment, handle)
            self.created += 1
            self.spare.insert(0, segment)
        self.settled()

    def _has_spare(self, keep: int, more: int = 0) -> bool:
        return len(self.spare) + more > keep and (keep < CLIENTS_KEEP or not self._overdrawn())

    def _has_room(self, keep: int) -> bool:
        """Whether one more file can be made, and the reserve besides."""
        return self._has_room_for(self._files_with_reserve(keep))

    def _files_with_reserve(self, keep: int) -> int:
        """One, and those of the `keep` spare ones that are neither there nor being made."""
        return 1 + max(0, keep - len(self.spare) - self._making.busy)

    def _has_room_for(self, files: int, besides_bytes: int = 0) -> bool:
        size_bytes = files * self.segment_bytes
        left_bytes = self.budget.left_bytes(self.shared_budget.left_bytes(size_bytes))
        return left_bytes == size_bytes and self._disk_has_room_for(files, besides_bytes)

    def _disk_has_room_for(self, files: int, besides_bytes: int = 0) -> bool:
        return self._files.free_bytes() >= files * self.segment_bytes + besides_bytes + _FREE_FLOOR_BYTES

    def _unused_number(self) -> int:
        try:
            return self.handles.index(_FREE, 1)
        except ValueError:
            return len(self.handles)

    def _set_handle(self, segment: int, handle: int) -> None:
        while len(self.handles) <= segment:
            self.handles.append(_FREE)
        if self.handles[segment] == _FREE:
            self._use(self.segment_bytes)
        self.handles[segment] = handle

    def _drop(self, segment: int) -> None:
        self._forget(segment)
        self._unlinking += 1
        self._files.unlink_later(segment_path(segment), partial(self._unlinked, segment))

    def _forget(self, segment: int) -> None:
        self._short.discard(segment)
        self._use(-self.segment_bytes)
        self._files.close(self.handles[segment])
        self.handles[segment] = _TAKEN
        self.unlinked += 1

    def _unlinked(self, segment: int, errno: int) -> None:
        self._unlinking -= 1
        if not errno:
            self._number_free(segment)
        self.settled()

    def _number_free(self, segment: int) -> None:
        self.handles[segment] = _FREE

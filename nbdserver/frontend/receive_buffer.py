"""The buffer that a connection receives into.

Theory: requests and their payloads are used where they landed. Bytes between `start` and `end` are received and not
used yet; the connection writes behind `end`. When all is used both go back to 0, so that a busy connection works in
memory that is in the CPU's cache; only the remains of a cut-off request are ever moved. What is used and may be asked
for once more is *set aside*: it stays where it is, and what comes next goes into other memory.

Rules: a view that was given out is valid until the next `room`. The buffer grows only to hold one request whole and
shrinks back when the caller says so; it is replaced, never resized, because views of it may still be held.
"""

from protocol.invariant import invariant

NORMAL_BYTES = 512 << 10  # a few 128 KiB writes; small enough to stay in the CPU's cache
NOTHING = memoryview(b"")
MINIMUM_ROOM_BYTES = 16 << 10  # less room than this behind `end` is not worth a system call


class ReceiveBuffer:
    """Bytes of one connection that were received and not used yet. The attributes are read by the hot path."""

    __slots__ = ("_spare", "aside", "capacity_bytes", "data", "end", "start", "view")
    data: bytearray
    view: memoryview

    def __init__(self, size_bytes: int = NORMAL_BYTES) -> None:
        self.start = 0
        self.end = 0
        self.aside = NOTHING
        """What was set aside last, until it is NOTHING again: then its memory may go, if it was large."""
        self._spare: bytearray | None = None  # of the same size, once something was set aside
        self._replace(size_bytes)

    def room(self) -> memoryview:
        """Where the next bytes go: at least one byte."""
        if self.end + MINIMUM_ROOM_BYTES > len(self.data) and self.start:
            self._move_to_front()
        return self.view[self.end :]

    @property
    def has_room_behind(self) -> bool:
        """Whether `room` is there without moving anything."""
        return self.end + MINIMUM_ROOM_BYTES <= len(self.data)

    def put(self, data: bytes) -> None:
        """Append bytes that came another way."""
        self.reserve(self.end - self.start + len(data))
        self.data[self.end : self.end + len(data)] = data
        self.end += len(data)

    def used(self, position: int) -> int:
        """Everything before `position` is used; return the new `start`."""
        if position == self.end:
            self.start = self.end = 0
            return 0
        invariant(self.start <= position < self.end, "used bytes lie between start and end")
        self.start = position
        return position

    def set_aside(self, position: int) -> None:
        """Everything before `position` is used, and can be read in `aside` until the next call, or it is forgotten."""
        self.aside = self.view[self.start : position]
        held_bytes = self.end - position
        data = self._spare or bytearray(self.capacity_bytes)
        if held_bytes:
            data[:held_bytes] = self.view[position : self.end]
        self._spare = self.data
        self.data, self.view = data, memoryview(data)
        self.start, self.end = 0, held_bytes

    def reserve(self, size_bytes: int) -> None:
        """Make room for `size_bytes` from `start` on."""
        if self.start + size_bytes <= len(self.data):
            return
        if size_bytes <= len(self.data):
            self._move_to_front()
            return
        held = bytes(self.view[self.start : self.end])
        self._replace(size_bytes)
        self.data[: len(held)] = held
        self.start, self.end = 0, len(held)

    def shrink(self) -> bool:
        """Go back to the normal size if what is held fits; say whether the size is normal now."""
        held_bytes = self.end - self.start
        if len(self.data) > NORMAL_BYTES and held_bytes < NORMAL_BYTES // 2:
            held = bytes(self.view[self.start : self.end])
            self._replace(NORMAL_BYTES)
            self.data[:held_bytes] = held
            self.start, self.end = 0, held_bytes
        return len(self.data) == NORMAL_BYTES

    def _move_to_front(self) -> None:
        held_bytes = self.end - self.start
        self.view[:held_bytes] = self.view[self.start : self.end]  # memmove: overlap is fine
        self.start, self.end = 0, held_bytes

    def _replace(self, size_bytes: int) -> None:
        self.capacity_bytes = size_bytes
        self.data = bytearray(size_bytes)
        self.view = memoryview(self.data)
        self._spare = None

"""What each block may hold: the judge of every simulated run.

Theory. Each block is a register. Operations on it overlap, so what it holds is a *set* of contents: every order of the
overlapping operations that respects "answered before asked" (Herlihy and Wing, "Linearizability", 1990). Operations
that overlap form a group; when all of a group are answered it collapses into a state, the set of contents after it.
States are kept from the last flush on, because a power cut may go back to any of them; kill -9 may not go back at all.

Rules of this file
- An operation that was answered happened. One that failed, or is unanswered at a crash, may have happened: once, each
  block of it whole, in any place of its group.
- What was read after a recovery is what is: it is durable, and no later crash may take it back.
- Blocks that nobody touched are zeros.
"""

from array import array
from collections.abc import Mapping
from itertools import pairwise

from nbdserver.block import ZERO

BLOCK_BYTES = 4096
ZEROS = bytes(BLOCK_BYTES)
MOST_OPEN = 4  # operations of one group that are open at a time: orders grow with the factorial
MOST_CONTENTS = 64  # that a block may have at a time: each write of a part of it that fails doubles them


class ViolationError(BaseException):
    """A promise was broken. No `except Exception` of the product may hide it."""


class Change:
    """One modification of one block: `data` at `start`."""

    __slots__ = ("answered", "asked", "data", "happened", "label", "ordered", "start")

    def __init__(self, label: str, start: int, data: bytes, asked: int) -> None:
        self.label = label
        self.start = start
        self.data = data
        self.asked = asked
        self.ordered: int | None = None  # what is asked after this moment comes after it
        self.answered = False
        self.happened = False  # for certain

    def apply(self, content: bytes) -> bytes:
        if len(self.data) == BLOCK_BYTES:
            return self.data
        return content[: self.start] + self.data + content[self.start + len(self.data) :]


Changes = list[tuple[int, Change]]


class State:
    """Contents after a group (`final`) and in the middle of it."""

    __slots__ = ("at", "final", "middle")

    def __init__(self, at: int, final: set[bytes], middle: set[bytes]) -> None:
        self.at = at
        self.final = final
        self.middle = middle


class Register:
    """One block."""

    __slots__ = ("ever", "group", "readers", "states")

    def __init__(self) -> None:
        self.states = [State(0, {ZEROS}, set())]
        self.group: list[Change] = []
        self.readers: list[set[bytes]] = []
        self.ever: set[bytes] = {ZEROS}

    def now(self) -> set[bytes]:
        """What a read that is asked and answered at this moment may return."""
        if not self.group:
            return self.states[-1].final
        return _contents(self.states[-1].final, self.group, certain_only=True)

    def after_power_loss(self) -> set[bytes]:
        allowed: set[bytes] = set(self.states[0].final)
        for state in self.states[1:]:
            allowed |= state.final | state.middle
        return allowed | _contents(self.states[-1].final, self.group, certain_only=False)

    def collapse(self, at: int) -> None:
        """End the group if all of it is answered."""
        if not all(change.answered for change in self.group):
            return
        middle = _contents(self.states[-1].final, self.group, certain_only=False)
        self.states.append(State(at, self.now(), middle))
        self.group = []
        self.ever |= middle
        for reader in self.readers:
            reader |= middle

    def settle(self, contents: set[bytes], at: int) -> None:
        """After recovery: one of these it is, and nothing before it counts."""
        self.states = [State(at, contents, set())]
        self.group = []
        self.readers = []


def _contents(base: set[bytes], group: list[Change], certain_only: bool) -> set[bytes]:
    """Contents after any part of `group` that is closed under "answered before asked", in any order that respects it.

    With `certain_only` the parts hold every change that certainly happened.
    """
    if len(group) == 1:  # nearly always
        after = {group[0].apply(content) for content in base}
        return after if certain_only and group[0].happened else base | after
    found: set[bytes] = set()
    certain = {index for index, change in enumerate(group) if change.happened}
    seen: set[tuple[frozenset[int], bytes]] = set()
    work: list[tuple[frozenset[int], bytes]] = [(frozenset(), content) for content in base]
    while work:
        item = work.pop()
        if item in seen:
            continue
        seen.add(item)
        done, content = item
        if not certain_only or certain <= done:
            found.add(content)
        for index, change in enumerate(group):
            if index in done:
                continue
            others = [(number in done, other) for number, other in enumerate(group) if number != index]
            if not any(
                _precedes(change, other) if is_done else other.happened and _precedes(other, change)
                for is_done, other in others
            ):
                work.append((done | {index}, change.apply(content)))
    return found


def _precedes(one: Change, other: Change) -> bool:
    return one.ordered is not None and one.ordered < other.asked


class Registers:
    """All blocks of a volume, and the order of what was asked and answered."""

    def __init__(self) -> None:
        self.blocks: dict[int, Register] = {}
        self._open_discards: list[tuple[int, int, Changes]] = []
        self._count = 0

    def tick(self) -> int:
        """The next moment."""
        self._count += 1
        return self._count

    def block(self, lba: int) -> Register:
        register = self.blocks.get(lba)
        if register is None:
            register = self.blocks[lba] = Register()
            # A discard of terabytes is one of the blocks that were ever asked about; here is another one.
            for offset, end, changes in self._open_discards:
                if offset < (lba + 1) << 12 and lba << 12 < end:
                    self._discard_block(lba, offset, end, changes)
        return register

    def _discard_block(self, lba: int, offset: int, end: int, changes: Changes) -> None:
        first, last = max(offset, lba << 12), min(end, (lba + 1) << 12)
        like = changes[0][1]
        change = Change(like.label, first & 4095, bytes(last - first), like.asked)
        change.ordered = like.ordered
        self.blocks[lba].group.append(change)
        changes.append((lba, change))

    def is_busy(self, offset: int, length: int) -> bool:
        """Whether a block of the range has as many open changes, or is as doubtful, as the judge can take. A read of it
        ends the doubt."""
        return any(
            len(self.blocks[lba].group) >= MOST_OPEN or len(self.blocks[lba].states[-1].final) >= MOST_CONTENTS
            for lba in self._known(offset, length)
        )

    def _known(self, offset: int, length: int) -> list[int]:
        """The blocks of the range that were ever asked about; the others are zeros."""
        touched = _touched(offset, length)
        if len(touched) > len(self.blocks):
            return sorted(lba for lba in self.blocks if lba in touched)
        return [lba for lba in touched if lba in self.blocks]

    # Changes.

    def ask(self, label: str, offset: int, data: bytes | None, length: int) -> Changes:
        """A write of `data`, or (None) a discard of `length` bytes, is asked for."""
        at = self.tick()
        changes: Changes = []
        end = offset + length
        if data is None:
            changes.append((-1, Change(label, 0, b"", at)))  # what the blocks' changes are like
            for lba in self._known(offset, length):
                self._discard_block(lba, offset, end, changes)
            self._open_discards.append((offset, end, changes))
            return changes
        for lba in _touched(offset, length):
            first, last = max(offset, lba << 12), min(end, (lba + 1) << 12)
            change = Change(label, first & 4095, data[first - offset : last - offset], at)
            self.block(lba).group.append(change)
            changes.append((lba, change))
        return changes

    def order(self, changes: Changes) -> None:
        """What is asked from now on comes after these, although they are not answered yet (the open batch)."""
        at = self.tick()
        for _, change in changes:
            change.ordered = at

    def answer(self, changes: Changes) -> None:
        """It happened."""
        self._end(changes, happened=True)

    def doubt(self, changes: Changes) -> None:
        """It failed in a way that leaves open whether it happened."""
        self._end(changes, happened=False)

    def _end(self, changes: Changes, happened: bool) -> None:
        at = self.tick()
        for lba, change in self._closed(changes):
            change.ordered = change.ordered or at
            change.answered, change.happened = True, happened or change.happened
            self.blocks[lba].collapse(at)

    def _closed(self, changes: Changes) -> Changes:
        self._open_discards = [each for each in self._open_discards if each[2] is not changes]
        return [(lba, change) for lba, change in changes if lba >= 0]

    # Flushes.

    def flushed(self, asked: int) -> None:
        """Everything answered before the moment `asked` is durable."""
        for register in self.blocks.values():
            states = register.states
            if len(states) > 1:
                last = max((index for index, state in enumerate(states) if state.at < asked), default=0)
                if last:
                    register.states = states[last:]

    # Reads.

    def begin_read(self, offset: int, length: int) -> list[tuple[Register, set[bytes]]]:
        """A read that takes time is asked for."""
        begun = []
        for lba in _touched(offset, length):
            register = self.block(lba)
            allowed = set(register.now())
            register.readers.append(allowed)
            begun.append((register, allowed))
        return begun

    def end_read(self, begun: list[tuple[Register, set[bytes]]], offset: int, data: bytes | None) -> None:
        """It was answered with `data`, or (None) failed."""
        for (register, allowed), lba in zip(begun, _touched(offset, len(data or b"")), strict=False):
            allowed |= _contents(register.states[-1].final, register.group, certain_only=False)
            if data is not None:
                _judge(f"a read of block {lba}", lba, offset, data, allowed, self)
        for register, allowed in begun:
            register.readers = [each for each in register.readers if each is not allowed]

    def shown(self, offset: int, data: bytes) -> None:
        """An answer showed `data`: what is open and was seen by it certainly happens. For writes of whole blocks, each
        with content of its own."""
        for lba in _touched(offset, len(data)):
            piece = data[(lba << 12) - offset :][:BLOCK_BYTES]
            for change in self.block(lba).group:
                if change.data == piece and any(piece):
                    change.happened = True

    def read(self, offset: int, data: bytes) -> None:
        """A read was asked for and answered at this moment."""
        for lba in _touched(offset, len(data)):
            register = self.blocks.get(lba)
            allowed = {ZEROS} if register is None else register.now()
            piece = _judge(f"a read of block {lba}", lba, offset, data, allowed, self)
            if register is not None and len(allowed) > 1 and len(piece) == BLOCK_BYTES and not register.group:
                register.states[-1].final = {piece}

    def extents(self, offset: int, length: int, found: list[tuple[int, int]], settled: bool) -> None:
        """Extents were answered; `settled`: at this moment, so that what they call zeros has to be zeros now."""
        covered = sum(each for each, _ in found)
        if not found or covered > length or any(each <= 0 for each, _ in found):
            raise ViolationError(f"extents {found} of {length} bytes")
        if any(one[1] == other[1] for one, other in pairwise(found)):
            raise ViolationError(f"neighbours of equal flags are not merged: {found}")
        for size, flags in found:
            if settled and flags & ZERO:
                self.zeros(offset, size)
            offset += size

    def zeros(self, offset: int, length: int) -> None:
        """The device says that the range reads as zeros."""
        for lba in self._known(offset, length):
            first, last = max(offset, lba << 12), min(offset + length, (lba + 1) << 12)
            _judge(f"extents of block {lba}", lba, first, bytes(last - first), self.blocks[lba].now(), self)

    def recovered(self, lba: int, content: bytes | None, power: bool, lying: bool) -> None:
        """A recovery shows `content` (None: it cannot be read) in the block, after a power loss or kill -9 alone.

        A device that lied may have lost what was written last, but what it shows was in the block at some time.
        """
        register = self.blocks[lba]
        allowed = register.after_power_loss() if power else register.now()
        if lying:
            allowed |= register.ever | register.after_power_loss()
        if content is None:
            register.settle(set(allowed), self._count)
            return
        what = f"block {lba} after {'a power loss' if power else 'kill -9'}"
        _judge(what, lba, lba << 12, content, allowed, self)
        register.settle({content}, self._count)

    def went_back(self) -> None:
        """What was answered and not flushed may be gone, in each block on its own: what a power loss may leave counts,
        and what was before does not."""
        for register in self.blocks.values():
            register.settle(register.after_power_loss(), self.tick())

    def replaced(self, contents: Mapping[int, frozenset[bytes]], certain: bool) -> None:
        """Every block became what `contents` has (or zeros), durably; or (not `certain`) may have."""
        at = self.tick()
        for lba, register in self.blocks.items():
            content = set(contents.get(lba, (ZEROS,)))
            register.ever |= content
            if certain:
                register.settle(content, at)
            else:
                register.states[-1].final |= content

    def crashed(self) -> None:
        """Nothing is under way any more."""
        self._open_discards = []

    def describe(self, content: bytes, lba: int) -> str:
        """Where a content comes from, for the message of a violation."""
        if not any(content):
            return "zeros"
        for other, register in self.blocks.items():
            for state in register.states:
                if content in state.final or content in state.middle:
                    return f"a state of block {other}" if other != lba else "an older state of this block"
        tags = [content[at : at + 16].hex() for at in range(0, len(content), 512)]
        return "unknown: " + " ".join(f"{tag}x{tags.count(tag)}" for tag in dict.fromkeys(tags))


def _touched(offset: int, length: int) -> range:
    return range(offset >> 12, (offset + length + BLOCK_BYTES - 1) >> 12) if length else range(0)


def _judge(what: str, lba: int, offset: int, data: bytes, allowed: set[bytes], registers: Registers) -> bytes:
    """Return the part of `data` that lies in the block; ViolationError unless an allowed content has it."""
    first, last = max(offset, lba << 12), min(offset + len(data), (lba + 1) << 12)
    piece = data[first - offset : last - offset]
    start = first & 4095
    if not any(content[start : start + len(piece)] == piece for content in allowed):
        expected = " or ".join(sorted({content[start : start + 16].hex() for content in allowed})[:4])
        raise ViolationError(
            f"{what} gave what it may not hold: {piece[:16].hex()}... ({registers.describe(piece, lba)}); "
            f"expected {expected}..."
        )
    return piece


def right_length(data: bytes, length: int) -> None:
    """Raise ViolationError unless a read was answered with as many bytes as it asked for."""
    if len(data) != length:
        raise ViolationError(f"a read of {length} bytes was answered with {len(data)}")


def pattern(label: int, offset: int, length: int) -> bytes:
    """Content that names its operation and place in every 16 bytes, wherever it is cut."""
    first = offset // 16
    count = (offset + length + 15) // 16 - first
    words = array("Q", bytes(16 * count))
    words[0::2] = array("Q", [label]) * count
    words[1::2] = array("Q", range(first, first + count))
    return words.tobytes()[offset - first * 16 :][:length]

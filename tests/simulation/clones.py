"""Clones in a simulated run: volumes of their own, each judged by registers of its own.

Theory. A clone begins with what its snapshot may show and is then a volume like the first: written, discarded, flushed
with the others, made larger and smaller, cloned again, deleted. Here one operation is under way at a time; what a crash
cuts off is in doubt, as everywhere. A clone that was answered for is there after any crash, with one of the sizes that
it may have; one that was deleted does not come back.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from nbdserver.block import Operation
from tests.simulation.registers import BLOCK_BYTES, Registers, ViolationError, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.simulation.run import Run

_MOST = 4
_BLOCKS = 20  # looked at in each, after a recovery


class Clone:
    """What one of them may be."""

    def __init__(self, content: "Mapping[int, frozenset[bytes]]", size_bytes: int) -> None:
        self.registers = Registers()
        self.sizes_bytes = {size_bytes}  # one of these
        for lba, contents in content.items():
            register = self.registers.block(lba)
            register.settle(set(contents), 0)
            register.ever |= contents

    def content(self) -> dict[int, frozenset[bytes]]:
        """What each block may hold now."""
        return {lba: frozenset(register.now()) for lba, register in self.registers.blocks.items()}


class Clones:
    """All clones of one run, by the number of their volume."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._certain: dict[int, Clone] = {}
        self._doubtful: dict[int, Clone] = {}
        self._next = 2
        self._power = False  # was lost since the last look

    def step(self, snapshots: "Mapping[str, tuple[int, Mapping[int, frozenset[bytes]]]]") -> None:
        """Do something to one of them, or make one of a snapshot: its layer and what it may show, by name."""
        run, rng = self._run, self._run.random
        if snapshots and len(self._certain) < _MOST and rng.random() < 0.3:
            layer, content = snapshots[rng.choice(sorted(snapshots))]
            self._make(layer, Clone(content, run.disk.maps.tree.layers[layer].row.size_bytes))
        operations = (self._write, self._discard, self._read, self._resize, self._branch, self._delete)
        for _ in range(rng.choice([1, 1, 4])):
            if self._certain and not run.disk.failure:
                rng.choices(operations, (8, 3, 3, 2, 1, 1))[0](rng.choice(sorted(self._certain)))

    # -- what the run tells

    def ask_flush(self) -> dict[int, int]:
        """A flush is asked for: the moment of each."""
        return {number: clone.registers.tick() for number, clone in self._certain.items()}

    def flushed(self, asked: dict[int, int]) -> None:
        """It was answered."""
        for number, moment in asked.items():
            if number in self._certain:
                self._certain[number].registers.flushed(moment)

    def crashed(self, power: bool) -> None:
        """Nothing is under way any more."""
        self._power |= power
        for clone in (*self._certain.values(), *self._doubtful.values()):
            clone.registers.crashed()

    def look(self) -> None:
        """After a recovery: those that were promised are there and hold what they may."""
        run = self._run
        there = {row.volume for row in run.disk.volumes()} - {1}
        if not run.mix.lies:
            if missing := set(self._certain) - there:
                raise ViolationError(f"clones {sorted(missing)} are gone")
            if strangers := there - set(self._certain) - set(self._doubtful):
                raise ViolationError(f"clones {sorted(strangers)} were never asked for, or are back")
        known = self._doubtful | self._certain
        self._certain = {number: known[number] for number in sorted(there & set(known))}
        self._doubtful.clear()
        for number, clone in self._certain.items():
            self._look(number, clone)
            for row in run.disk.snapshots_of(number):  # of a branch that was cut off
                self._answer("deleting a snapshot", partial(run.disk.delete_snapshot, row.layer))
        self._power = self._power and bool(run.disk.failure)

    def _look(self, number: int, clone: Clone) -> None:
        run = self._run
        size_bytes = run.disk.head(number).size_bytes
        if size_bytes not in clone.sizes_bytes and not run.mix.lies:
            raise ViolationError(f"clone {number} has {size_bytes} bytes, and not one of {sorted(clone.sizes_bytes)}")
        clone.sizes_bytes = {size_bytes}
        blocks = sorted(clone.registers.blocks)
        whole = [lba for lba in blocks if (lba + 1) * BLOCK_BYTES <= size_bytes]
        looked_at = set(run.random.sample(whole, min(_BLOCKS, len(whole))))
        for lba in blocks:
            data = None
            if lba in looked_at:
                data = self._later(number, Operation.READ, lba * BLOCK_BYTES, BLOCK_BYTES, None)
            clone.registers.recovered(lba, None if data is None else b"".join(data), self._power, run.mix.lies)

    def delete_all(self) -> None:
        """However full the disk is, every clone can be deleted."""
        for number in sorted(self._certain):
            del self._certain[number]
            if errno := self._answer("deleting a clone", partial(self._run.disk.delete_volume, number)):
                raise ViolationError(f"clone {number} cannot be deleted: errno {errno}")

    # -- operations

    def _answer(self, what: str, begin: "Callable[[Callable[[int], None]], None]") -> int:
        """Do one change of the tree of layers; everything that was acknowledged before is durable after it."""
        run, answers = self._run, list[int]()
        asked = (run.registers.tick(), self.ask_flush())
        begin(answers.append)
        run.wait(what, lambda: bool(answers))
        run.world.note(what, answers)
        if answers[0]:
            run.accept(answers[0], what)
        else:
            run.registers.flushed(asked[0])
            self.flushed(asked[1])
        return answers[0]

    def _later(self, number: int, operation: Operation, offset: int, length: int, data: bytes | None) -> Any:
        """What it was answered with; None for an error that the faults explain."""
        run, answers = self._run, list[tuple[int, Any]]()
        head = run.disk.head(number)
        head.later(operation, offset, length, data, lambda errno, found: answers.append((errno, found)))
        run.wait(f"{operation.name} of a clone", lambda: bool(answers))
        run.world.note("clone", number, operation, offset, answers[0][0])
        if answers[0][0]:
            run.accept(answers[0][0], f"{operation.name} of a clone")
            return None
        return answers[0][1] if operation == Operation.READ else b""

    def _make(self, layer: int, clone: Clone) -> int:
        """Make a clone; returns its number, 0 if it was refused."""
        number, self._next = self._next, self._next + 1
        self._run.tell(f"clone {number} of layer {layer}")
        self._doubtful[number] = clone
        if self._answer("a clone", partial(self._run.disk.clone, layer, number)):
            if number not in self._run.disk.maps.tree.heads and not self._run.disk.failure:
                del self._doubtful[number]
            return 0
        self._certain[number] = self._doubtful.pop(number)
        self._run.counters["clones"] += 1
        return number

    def _place(self, number: int) -> tuple[int, int]:
        """A (offset, length) that lies in the clone; length 0 if there is none."""
        run = self._run
        (size_bytes,) = self._certain[number].sizes_bytes
        first, blocks = run.random.choice(run.sizes.areas)
        offset = (first + run.random.randrange(blocks)) * BLOCK_BYTES
        length = run.random.choice([1, 1, 5]) * BLOCK_BYTES - run.random.choice([0, 0, 100])
        return offset, max(0, min(length, size_bytes - offset))

    def _write(self, number: int) -> None:
        run, registers = self._run, self._certain[number].registers
        offset, length = self._place(number)
        if not length or registers.is_busy(offset, length):
            return
        run.label += 1
        data = pattern(run.label, offset, length)
        run.tell(f"write {run.label} of clone {number} {offset / BLOCK_BYTES:.3f}+{length / BLOCK_BYTES:.3f}")
        changes = registers.ask(f"write {run.label}", offset, data, length)
        head = run.disk.head(number)
        if head.write(offset, memoryview(bytearray(data))):
            errno = head.commit()
            run.accept(errno, "a write of a clone")
            is_done = not errno
        else:
            is_done = self._later(number, Operation.WRITE, offset, length, data) is not None
        (registers.answer if is_done else registers.doubt)(changes)
        run.counters["writes of clones"] += is_done

    def _discard(self, number: int) -> None:
        run, registers = self._run, self._certain[number].registers
        (size_bytes,) = self._certain[number].sizes_bytes
        offset, length = self._place(number)
        if run.random.random() < 0.3:
            offset, length = 0, size_bytes
        if not length or registers.is_busy(offset, length):
            return
        run.label += 1
        run.tell(f"discard {run.label} of clone {number} {offset / BLOCK_BYTES:.3f}+{length / BLOCK_BYTES:.3f}")
        changes = registers.ask(f"discard {run.label}", offset, None, length)
        is_done = self._later(number, Operation.DISCARD, offset, length, None) is not None
        (registers.answer if is_done else registers.doubt)(changes)

    def _read(self, number: int) -> None:
        offset, length = self._place(number)
        if length:
            data = self._later(number, Operation.READ, offset, length, None)
            if data is not None:
                self._certain[number].registers.read(offset, b"".join(data))

    def _resize(self, number: int) -> None:
        """To any size; what is cut off reads as zeros when it is there again."""
        run, clone = self._run, self._certain[number]
        (old_bytes,) = clone.sizes_bytes
        first, blocks = run.random.choice(run.sizes.areas)
        cut_bytes = (first + run.random.randrange(blocks)) * BLOCK_BYTES + BLOCK_BYTES // 2
        size_bytes = run.random.choice([run.sizes.size_bytes, 2 * run.sizes.size_bytes, cut_bytes])
        changes = []
        if size_bytes < old_bytes:
            end = -(-old_bytes // BLOCK_BYTES) * BLOCK_BYTES
            if clone.registers.is_busy(size_bytes, end - size_bytes):
                return
            changes = clone.registers.ask("shrinking", size_bytes, None, end - size_bytes)
        run.tell(f"resize clone {number} from {old_bytes} to {size_bytes}")
        clone.sizes_bytes = {old_bytes, size_bytes}
        if self._answer("a resize", partial(run.disk.resize, number, size_bytes)):
            if not run.disk.failure:
                clone.sizes_bytes = {run.disk.head(number).size_bytes}
            clone.registers.doubt(changes)
            return
        clone.sizes_bytes = {size_bytes}
        clone.registers.answer(changes)
        run.counters["resizes"] += 1

    def _branch(self, number: int) -> None:
        """A clone of a clone, whose snapshot goes at once."""
        run, clone = self._run, self._certain[number]
        if len(self._certain) >= _MOST or len(clone.sizes_bytes) > 1:
            return
        content, (size_bytes,) = clone.content(), clone.sizes_bytes
        if self._answer("a snapshot", lambda done: run.disk.snapshot(number, "branch", 0, done)):
            return
        row = run.disk.snapshot_row(number, "branch")
        assert row is not None
        if self._make(row.layer, Clone(content, size_bytes)):
            run.counters["clones of clones"] += 1
        if not run.disk.failure:
            self._answer("deleting a snapshot", partial(run.disk.delete_snapshot, row.layer))

    def _delete(self, number: int) -> None:
        run = self._run
        if run.disk.snapshots_of(number):
            return  # a branch that could not be finished
        run.tell(f"delete clone {number}")
        self._doubtful[number] = self._certain.pop(number)
        if self._answer("deleting a clone", partial(run.disk.delete_volume, number)):
            if not run.disk.failure:
                self._certain[number] = self._doubtful.pop(number)
            return
        del self._doubtful[number]
        run.counters["clones deleted"] += 1

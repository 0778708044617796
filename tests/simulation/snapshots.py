"""Snapshots in a simulated run: which must be there, and what each may show.

Theory. A snapshot is asked for at a moment when no operation is under way; what each block may hold then is what the
registers say, and the snapshot shows that for ever. One that was answered is durable; one that was not, because of an
error or a crash, is there or not, and if it is there it shows the same. So is one whose deletion was not answered.
"""

import errno as errnos
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from nbdserver.block import Operation
from nbdserver.logdisk.devices import View
from tests.simulation.registers import BLOCK_BYTES, ZEROS, ViolationError

if TYPE_CHECKING:
    from tests.simulation.run import Run

_MOST = 12
_MOST_LOOKED_AT = 3  # after each opening
_BLOCKS = 25  # looked at in each
_COMPARED = 5  # of these

Content = dict[int, frozenset[bytes]]


class Snapshots:
    """All snapshots of one run's volume."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._certain: dict[str, Content] = {}
        self._doubtful: dict[str, Content] = {}

    def step(self) -> None:
        """Make, delete or look at one."""
        run, rng = self._run, self._run.random
        layers = self._layers()
        if not run.in_flight and self._certain and rng.random() < 0.2:
            name = rng.choice(sorted(self._certain))
            self._roll_back(name, layers[name])
        elif not run.in_flight and len(layers) < _MOST and rng.random() < 0.6:
            self._make(f"s{run.registers.tick()}")
        elif layers:
            name = rng.choice(sorted(layers))
            if rng.random() < 0.5:
                self._delete(name, layers[name])
            else:
                self._look(name, layers[name])

    def look_at_some(self) -> None:
        """After a recovery: those that were promised are there, and show what they should."""
        run = self._run
        layers = self._layers()
        if run.mix.lies:
            self._certain = {name: content for name, content in self._certain.items() if name in layers}
            return
        for name in self._certain:
            if name not in layers:
                raise ViolationError(f"snapshot {name} is gone")
        for name in layers:
            if name not in self._certain and name not in self._doubtful:
                raise ViolationError(f"snapshot {name} was never asked for, or is back")
            self._certain.setdefault(name, self._doubtful.get(name, {}))
        self._doubtful.clear()
        for name in run.random.sample(sorted(layers), min(_MOST_LOOKED_AT, len(layers))):
            self._look(name, layers[name])

    def delete_all(self) -> None:
        """However full the disk is, every snapshot can be deleted."""
        run = self._run
        for name, layer in sorted(self._layers().items()):
            self._certain.pop(name, None)
            answers: list[int] = []
            run.disk.delete_snapshot(layer, answers.append)
            run.wait("deleting a snapshot", lambda answers=answers: bool(answers))  # type: ignore[misc]
            if answers[0]:
                raise ViolationError(f"snapshot {name} cannot be deleted: errno {answers[0]}")

    def _layers(self) -> dict[str, int]:
        return {row.name: row.layer for row in self._run.disk.snapshots_of(1)}

    def contents(self) -> dict[str, tuple[int, Content]]:
        """The layer of each that is there for certain, and what it may show."""
        layers = self._layers()
        return {name: (layers[name], content) for name, content in self._certain.items() if name in layers}

    def _make(self, name: str) -> None:
        run = self._run
        content = {lba: frozenset(register.now()) for lba, register in run.registers.blocks.items()}
        self._doubtful[name] = content
        asked, asked_of_clones = run.registers.tick(), run.clones.ask_flush()
        run.tell(f"snapshot {name}")

        def made(errno: int) -> None:
            run.in_flight -= 1
            run.world.note("snapshot", name, errno)
            if errno:
                run.accept(errno, "a snapshot")
                if name not in self._layers() and not run.disk.failure:
                    self._doubtful.pop(name, None)  # a record whose appending failed may be there after a recovery
            else:
                self._certain[name] = self._doubtful.pop(name)
                run.registers.flushed(asked)
                run.clones.flushed(asked_of_clones)
                run.counters["snapshots"] += 1

        run.in_flight += 1
        run.disk.snapshot(1, name, 0, made)

    def _roll_back(self, name: str, layer: int) -> None:
        run = self._run
        content = self._certain[name]
        run.tell(f"roll back to {name}")
        # Until the answer it may have happened or not.
        before = {lba: frozenset(register.now()) for lba, register in run.registers.blocks.items()}
        run.registers.replaced(content, certain=False)
        answers: list[int] = []
        run.disk.rollback(1, layer, answers.append)
        run.wait("a rollback", lambda: bool(answers))
        run.world.note("rollback", name, answers)
        if answers[0]:
            run.accept(answers[0], "a rollback")
            if not run.disk.failure:
                run.registers.replaced(before, certain=False)
        else:
            run.registers.replaced(content, certain=True)
            run.counters["rollbacks"] += 1

    def _delete(self, name: str, layer: int) -> None:
        run = self._run
        if name not in self._certain:
            return  # just being made or deleted
        self._doubtful[name] = self._certain.pop(name)
        run.tell(f"delete snapshot {name}")

        def deleted(errno: int) -> None:
            run.in_flight -= 1
            run.world.note("snapshot deleted", name, errno)
            if errno:
                run.accept(errno, "deleting a snapshot")
            else:
                self._doubtful.pop(name, None)
                run.counters["snapshots deleted"] += 1

        run.in_flight += 1
        run.disk.delete_snapshot(layer, deleted)

    def _look(self, name: str, layer: int) -> None:
        run = self._run
        content = self._certain.get(name)
        if content is None:
            return
        view = run.disk.view(layer)
        blocks = sorted(run.registers.blocks)
        lbas = run.random.sample(blocks, min(_BLOCKS, len(blocks)))
        left = 1

        def finished() -> None:
            nonlocal left
            left -= 1
            if not left:
                view.close()

        def looked(lba: int, errno: int, data: Any) -> None:
            run.in_flight -= 1
            if errno:
                run.accept(errno, "a read of a snapshot")
            elif not run.mix.lies and b"".join(data) not in content.get(lba, {ZEROS}):
                raise ViolationError(f"snapshot {name} shows what block {lba} did not hold")
            finished()

        left += len(lbas) + self._compare(view, name, content, lbas[:_COMPARED], finished)
        for lba in lbas:
            run.in_flight += 1
            self._read(view, lba, partial(looked, lba))
        finished()

    def _read(self, view: View, lba: int, looked: Callable[[int, Any], None]) -> None:
        data = view.read(lba << 12, BLOCK_BYTES)
        if data is not None:
            looked(0, data)
        else:
            view.later(Operation.READ, lba << 12, BLOCK_BYTES, None, looked)

    def _compare(self, view: View, name: str, content: Content, lbas: list[int], finished: Callable[[], None]) -> int:
        """What is told to be as in an older snapshot may be so. Returns how many comparisons `finished` is called for,
        later."""
        run = self._run
        older = {other: layer for other, layer in view.bitmaps().items() if other in self._certain}
        if not older or not lbas:
            return 0
        other = run.random.choice(sorted(older))
        then = self._certain[other]

        def compared(lba: int, errno: int, extents: Any) -> None:
            run.in_flight -= 1
            if errno == errnos.ESTALE:
                pass  # deleted meanwhile
            elif errno:
                run.accept(errno, "a comparison of snapshots")
            else:
                run.counters["comparisons"] += 1
                is_dirty = extents[0][1]
                if not run.mix.lies and not is_dirty and not content.get(lba, {ZEROS}) & then.get(lba, {ZEROS}):
                    raise ViolationError(f"block {lba} of {name} is told to be as in {other}, and cannot be")
            finished()

        for lba in lbas:
            run.in_flight += 1
            view.changed(older[other], lba * BLOCK_BYTES, BLOCK_BYTES, 1, partial(compared, lba))
        return len(lbas)

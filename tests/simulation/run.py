"""One simulated run: several lives of a LogDisk under one seed, judged by registers.

Theory. A run draws a fault mix and sizes, then lives: open, read everything, work in wakes (a batch of operations, a
commit, now and then a flush), until a clean end or a crash that is planned for a step, a crash point or the middle of
a call of Files or Store. What is read back is judged by `registers`; time, order and faults come from the seed alone.

Rules of this file
- An errno is accepted only if the mix can cause it; an operation that is never answered is a violation.
- Everything that happens is noted, so that two runs of a seed can be compared.
"""

import errno as errnos
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from metadata.seams import Buffer
from nbdserver.block import Operation
from nbdserver.logdisk.devices import Head
from nbdserver.logdisk.disk import DiskError, LogDisk
from nbdserver.logdisk.ordering import CRASH_POINTS, OF_REPLICAS, hooked
from nbdserver.logdisk.records import parse_segment_header
from nbdserver.logdisk.scrub import Progress
from protocol.disk import SEGMENT_HEADER_BYTES
from tests.simulation.clones import Clones
from tests.simulation.faults import FaultMix, changed, draw_mix, without_faults
from tests.simulation.registers import BLOCK_BYTES, Changes, Registers, ViolationError, pattern, right_length
from tests.simulation.simulated_files import HELD_BACK_BYTES, SimulatedDrive, SimulatedFiles
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.sizes import Bend, draw_hot_sizes, draw_sizes
from tests.simulation.snapshots import Snapshots
from tests.simulation.world import SimulatedClock, SimulatedCrash, World

FAMILY = bytes(range(16))
ANSWER_LIMIT_S = 900.0  # of virtual time, after which an operation counts as forgotten
FAILURES = {
    "family-failed",
    "append-failed",
    "checksum-error",
    "segment-not-scrubbed",
    "value-damaged",
}  # reports that need a fault
REST_S = 90.0
POINTS = sorted(name for name, rule in CRASH_POINTS.items() if rule not in OF_REPLICAS)
MOST_SPARE = 8  # of volumes as small as these


class Run:
    """All lives of one seed. `go` raises ViolationError (or what the product raised) if a promise was broken."""

    def __init__(
        self, seed: int, bend: Bend | None = None, lying: bool = False, story: Callable[[str], None] | None = None
    ) -> None:
        self.world = World(seed)
        self.random = self.world.random
        self.bend = bend = bend or Bend()
        self.mix = changed(draw_mix(self.random, lying), bend.mix)
        self.sizes = draw_hot_sizes(self.random) if bend.hot else draw_sizes(self.random)
        if bend.snapshots:
            self.sizes = replace(self.sizes, snapshots=bend.snapshots)
        self.hits: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self.reports: Counter[str] = Counter()
        self.registers = Registers()
        self.snapshots = Snapshots(self)
        self.clones = Clones(self)
        room = self.mix.room_segments * self.sizes.segment_bytes
        self.drive = SimulatedDrive(self.world, room + HELD_BACK_BYTES)
        self.drive.watch = self._watch_salts
        self.salts: dict[bytes, int] = {}
        self.table = SimulatedTable(self.world)
        self.scrubbed = Progress()
        self.epoch = 0
        self.boot = 1
        self.label = 0
        self._story = story
        self._verify_power: bool | None = None  # how the last life ended, until someone has looked at every block
        self._was_clean: bool | None = True  # whether the last life ended cleanly; None: unknown
        self._generation_due = False
        self._plan_point: tuple[str, int] | None = None
        self._opened = False
        self.clock: SimulatedClock
        self.files: SimulatedFiles
        self.store: SimulatedStore
        self.disk: LogDisk
        self.device: Head
        self.in_flight = 0

    def tell(self, what: str) -> None:
        if self._story is not None:
            self._story(f"{self.world.now_s:12.6f} {what}")

    # Lives.

    def go(self) -> "Run":
        self.tell(f"{self.mix}\n{self.sizes}")
        with hooked(self._at_crash_point):
            self._begin_life(without_faults(self.mix))
            LogDisk.format(self.files, self.store, FAMILY, self.sizes.size_bytes, self.sizes.segment_bytes, self.random)
            self._end_life(power=False)
            for _ in range(self.sizes.lives):
                self._live()
            self._look_at_the_end()
        return self

    def _begin_life(self, mix: FaultMix) -> None:
        self.clock = SimulatedClock(self.world)
        self.files = SimulatedFiles(self.drive, self.clock, mix)
        self.store = SimulatedStore(self.table, self.clock, mix, self.files.world_ends)
        self.in_flight = 0
        self._plan_point = None
        self.world.has_crashed = False

    def _end_life(self, power: bool) -> None:
        self.counters.update(self.files.counts)
        self.counters["batches"] += self.store.batches
        if self._opened:
            self.counters["recycled"] += self.disk.pool.recycled
            for name in ("layers_merged", "layers_dropped", "layers_blocks_freed"):
                self.counters[name] += self.disk.counters()[name]
        self.files.crash(power)
        self.store.crash()
        self.registers.crashed()
        self.clones.crashed(power)
        if power:
            self.boot += 1
            self._generation_due |= self._opened and self._was_clean is False
        self._opened = False
        self._verify_power = bool(self._verify_power) or power
        self.world.note("end of life", power)

    def _live(self) -> None:
        rng = self.random
        power = rng.random() < self.mix.power
        plan = "crash" if self.bend.crash_at else rng.choice(["clean", "step", "crash", "crash", "crash"])
        wakes = rng.randrange(1, self.sizes.wakes + 1)
        try:
            self._begin_life(self.mix)
            if plan == "crash":
                self._plan_crash()
            if not self._open():
                return
            self._look_at_everything()
            self._look_at_snapshots()
            for _ in range(wakes):
                self._wake()
                if self.disk.failure:
                    break
            if plan == "clean" and not self.disk.failure:
                self._close()
                self.counters["clean end"] += 1
                power = rng.random() < 0.5
            self.tell(f"the life ends ({plan}, power={power})")
        except SimulatedCrash:
            self.counters["crash in a call"] += 1
            self.tell(f"crash (power={power})")
        self._end_life(power)

    def _plan_crash(self) -> None:
        rng = self.random
        if self.bend.crash_at:
            self._plan_point = (self.bend.crash_at, rng.choice([1, 1, 2, 5]))
        elif rng.random() < self.mix.crash_in_io:
            self.files.operations_left = int(rng.expovariate(1 / 100))
        else:
            self._plan_point = (rng.choice(POINTS), rng.choice([1, 1, 2, 5, 20]))

    def _at_crash_point(self, name: str) -> None:
        if self.world.has_crashed:
            return
        self.hits[name] += 1
        self.world.note("point", name)
        if self._plan_point is not None and self._plan_point[0] == name:
            left = self._plan_point[1] - 1
            self._plan_point = (name, left)
            if left <= 0:
                self.tell(f"crash point {name}")
                self.counters[f"crash at {name}"] += 1
                self.world.crash()

    def _open(self) -> bool:
        """Open the disk; False if errors of the device prevented it (the life is over then)."""
        self.epoch += 1
        raised = self.reports["generation-raised"]
        was_clean, self._was_clean = self._was_clean, False
        boot_id = f"{self.boot:036d}"
        try:
            self.disk = LogDisk.open(
                self.files, self.store, self.clock, self.random, self.sizes.settings, self.epoch, boot_id, self._report
            )
        except DiskError as error:
            self.tell(f"refused to open: {error}")
            errors = self.mix.sync_error + self.mix.append_error + self.mix.read_error + self.mix.store_write_error
            if not errors and not self.mix.lies:
                raise ViolationError(f"the disk does not open again: {error}") from error
            self.counters["refused"] += 1
            self._end_life(power=self.random.random() < self.mix.power)
            return False
        self.device = self.disk.head(1)
        if was_clean and self.reports["generation-raised"] > raised:
            raise ViolationError("the generation rose although the log was closed cleanly")
        if self._generation_due:
            raise ViolationError("acknowledged writes may be lost, and the generation did not rise")
        self._opened = True
        self.counters["lives"] += 1
        return True

    def _close(self) -> None:
        self.wait("operations", lambda: not self.in_flight)
        if self.disk.failure:
            return
        closed: list[bool] = []
        asked, asked_of_clones = self.registers.tick(), self.clones.ask_flush()
        self.disk.close(lambda: closed.append(True))
        self.wait("close", lambda: bool(closed))
        if not self.disk.failure:
            self.registers.flushed(asked)
            self.clones.flushed(asked_of_clones)
            self._was_clean = True
        elif "the clean end" in self.disk.failure:
            self._was_clean = None  # everything was synced, and a batch whose writing failed may be there

    def _look_at_the_end(self) -> None:
        """Without any further fault, everything that was promised is there."""
        self._begin_life(without_faults(self.mix))
        if self._open():
            self._look_at_everything()
            self._look_at_snapshots()
            self._rest()
            self._trim_and_write()
            self._close()
        self._end_life(power=False)

    def _rest(self) -> None:
        """Left alone, the disk comes to rest, and gives back what it does not need."""
        self.clock.run(REST_S)
        appended = self.files.counts["append"]
        self.clock.run(REST_S)
        if self.disk.failure or self.mix.lies:
            return
        moved = self.files.counts["append"] - appended
        if moved:
            raise ViolationError(f"at rest for {REST_S} s, and still {moved} appends in as long again")
        spare = len(self.disk.pool.spare)
        if spare > MOST_SPARE:
            raise ViolationError(f"{spare} spare segments after {2 * REST_S} s at rest")

    def _trim_and_write(self) -> None:
        """However full the disk was: a trim of everything is taken, gives room, and what is written then is there."""
        if self.disk.failure or self.mix.lies:
            return
        self.clones.delete_all()  # what they show takes room, and so do snapshots
        self.snapshots.delete_all()
        label = self.label = self.label + 1
        trim = self.registers.ask(f"discard {label}", 0, None, self.sizes.size_bytes)
        self._later(Operation.DISCARD, 0, self.sizes.size_bytes, None, lambda errno, _: self._must_happen(trim, errno))
        self.wait("a trim of everything", lambda: not self.in_flight)
        self.clock.run(REST_S)
        first, blocks = self.sizes.areas[0]
        offset, length = first * BLOCK_BYTES, min(blocks, 16) * BLOCK_BYTES
        data = pattern(label, offset, length)
        write = self.registers.ask(f"write {label}", offset, data, length)
        self._later(Operation.WRITE, offset, length, data, lambda errno, _: self._must_happen(write, errno))
        self.wait("a write after the trim", lambda: not self.in_flight)
        self._look_at_everything()

    def _must_happen(self, changes: Changes, errno: int) -> None:
        if errno:
            raise ViolationError(f"{changes[0][1].label} failed with errno {errno} although there must be room")
        self.registers.answer(changes)

    def _report(self, kind: str, fields: dict[str, object]) -> None:
        if self.world.has_crashed:
            return
        self.tell(f"report {kind} {fields}")
        self.reports[kind] += 1
        if kind == "generation-raised":
            self._generation_due = False
        self.world.note("report", kind)
        if kind in FAILURES and not self._may_fail():
            raise ViolationError(f"{kind} without a cause: {fields}")

    def _may_fail(self) -> bool:
        mix = self.mix
        return bool(
            mix.append_error
            or mix.sync_error
            or mix.store_read_error
            or mix.store_write_error
            or mix.read_error
            or mix.lies
        )

    def _watch_salts(self, data: bytes, offset: int) -> None:
        """Each life of a segment has a salt of its own: a client that knew it could write what passes for a record."""
        start = parse_segment_header(data[:SEGMENT_HEADER_BYTES]) if not offset else None
        if start is not None and self.salts.setdefault(start.salt, start.sequence) != start.sequence:
            raise ViolationError(f"lives {self.salts[start.salt]} and {start.sequence} have the same salt")

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        if not self.clock.run_until(holds, ANSWER_LIMIT_S):
            raise ViolationError(f"{what} never ended ({self.in_flight} operations in flight, {self.disk.failure!r})")

    # Looking.

    def _look_at_everything(self) -> None:
        """Read every block after a recovery, and judge what is there."""
        lbas = sorted(self.registers.blocks)
        self.world.random.shuffle(lbas)
        power = bool(self._verify_power)
        for lba in lbas:
            if self.disk.failure:
                return
            data = self.device.read(lba << 12, BLOCK_BYTES)
            if data is not None:
                self._recovered(lba, data, power)
                continue
            self.in_flight += 1
            self.device.later(Operation.READ, lba << 12, BLOCK_BYTES, None, partial(self._looked, lba, power))
        self.wait("reads after a recovery", lambda: not self.in_flight)
        if not self.disk.failure:
            self._verify_power = None
        self.tell(f"looked at {len(lbas)} blocks")

    def _look_at_snapshots(self) -> None:
        if not self.disk.failure:
            self.snapshots.look_at_some()
            self.wait("reads of snapshots", lambda: not self.in_flight)
        if not self.disk.failure:
            self.clones.look()

    def _looked(self, lba: int, power: bool, errno: int, data: Any) -> None:
        self.in_flight -= 1
        if errno:
            self.accept(errno, "a read after a recovery")
            if not self.disk.failure:
                self.registers.recovered(lba, None, power, self.mix.lies)
        else:
            self._recovered(lba, data, power)

    def _recovered(self, lba: int, data: Sequence[Buffer], power: bool) -> None:
        content = b"".join(data)
        self.world.note("look", lba, content[:8])
        self.registers.recovered(lba, content, power, self.mix.lies)

    # Working.

    def _wake(self) -> None:
        """What one wake of the loop brings: some operations, then one commit."""
        rng, device = self.random, self.device
        inline: list[Changes] = []
        for _ in range(rng.choice([1, 1, 3, 12])):
            kind = rng.choices(range(8), self.sizes.weights)[0]
            if kind <= 3:
                self._change(kind, inline)
            elif kind == 4:
                self._read()
            elif kind == 5:
                self._extents()
            elif kind == 6:
                offset, length = self._place(64)
                self._later(Operation.CACHE, offset, length, None, lambda errno, _: self.accept(errno, "cache"))
            else:
                break
        if inline:
            errno = device.commit()
            self.world.note("commit", errno)
            for changes in inline:
                self._changed(changes, errno)
        if rng.random() < self.sizes.weights[7] / 4:
            self._flush()
        if rng.random() < self.sizes.snapshots and not self.disk.failure:
            self.snapshots.step()
            if rng.random() < 0.5 and not self.disk.failure:
                self.clones.step(self.snapshots.contents())
        if self.bend.scrubs and rng.random() < self.bend.scrubs and not self.disk.failure:
            self._scrub()
        self._pass_time()

    def _scrub(self) -> None:
        """Begin a scrub, or go on with one of a life before; what it reports needs a fault."""
        disk, rng = self.disk, self.random
        if disk.scrub is not None and disk.scrub.running:
            return
        begin = self.scrubbed if rng.random() < 0.5 else Progress()

        def finished(failure: str) -> None:
            self.counters["scrubs"] += not failure
            if failure and not disk.failure:
                raise ViolationError(f"a scrub failed: {failure}")

        disk.start_scrub(begin, rng.choice([1 << 20, 1 << 30]), lambda: disk.moved_bytes, finished)
        assert disk.scrub is not None
        self.scrubbed = disk.scrub.progress

    def _pass_time(self) -> None:
        rng = self.random
        choice = rng.random()
        if choice < 0.5:
            for _ in range(rng.randrange(4)):
                self.clock.step(self.world.now_s + 0.1)
        elif choice < 0.97:
            self.clock.run(rng.expovariate(1 / 0.005))
        else:
            self.clock.run(rng.choice([0.5, 5.0, 30.0]))

    def _place(self, most_blocks: int) -> tuple[int, int]:
        """A block-aligned (offset, length) in one of the areas."""
        rng = self.random
        first, blocks = rng.choice(self.sizes.areas)
        start = rng.randrange(blocks)
        if rng.random() < 0.3:
            start = min(start, int(rng.expovariate(0.2)))  # a hot beginning
        count = min(blocks - start, 1 if rng.random() < 0.6 else rng.randrange(1, most_blocks + 1))
        return (first + start) * BLOCK_BYTES, count * BLOCK_BYTES

    def _change(self, kind: int, inline: list[Changes]) -> None:
        rng = self.random
        offset, length = self._place(40 if kind else 16)
        if kind == 3:
            length = min(self.sizes.size_bytes, rng.choice([32 << 20, 1 << 40]))
            offset = rng.randrange(self.sizes.size_bytes - length + 1)
        if kind == 1 or (kind >= 2 and rng.random() < 0.3):
            cut = rng.randrange(min(length, BLOCK_BYTES))
            offset, length = offset + cut, max(1, length - cut - rng.randrange(BLOCK_BYTES))
        if self.registers.is_busy(offset, length):
            return
        self.label += 1
        data = pattern(self.label, offset, length) if kind < 2 else None
        self.world.note("change", kind, offset, length)
        name = f"{'write' if data is not None else 'discard'} {self.label}"
        self.tell(f"{name} {offset / BLOCK_BYTES:.3f}+{length / BLOCK_BYTES:.3f}")
        changes = self.registers.ask(name, offset, data, length)
        if data is not None:
            done = self.device.write(offset, memoryview(bytearray(data)))
        else:
            done = self.device.discard(offset, length)
        if done:
            self.registers.order(changes)
            inline.append(changes)
            return
        operation = Operation.DISCARD if data is None else Operation.WRITE
        # The open batch must not wait for this; it goes its own way.
        self._later(operation, offset, length, data, lambda errno, _: self._changed(changes, errno))

    def _changed(self, changes: Changes, errno: int) -> None:
        if not errno:
            self.registers.answer(changes)
            return
        self.tell(f"{changes[0][1].label}: errno {errno}")
        self.accept(errno, "a change")
        self.registers.doubt(changes)

    def _later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Callable[[int, Any], None]
    ) -> None:
        self.in_flight += 1
        self.counters["later"] += 1

        def answered(errno: int, result: Any) -> None:
            self.in_flight -= 1
            self.world.note("answer", operation, offset, errno)
            done(errno, result)

        self.device.later(operation, offset, length, data, answered, 4)

    def _read(self) -> None:
        offset, length = self._place(64)
        if self.random.random() < 0.2:
            cut = self.random.randrange(BLOCK_BYTES)
            offset, length = offset + cut, max(1, length - cut)
        if not self._read_inline(offset, length):
            self.in_flight += 1
            if not self.device.fetch([(offset, length)], partial(self._fetched, offset, length)):
                self._fetched(offset, length)

    def _read_inline(self, offset: int, length: int) -> bool:
        found = self.device.read(offset, length)
        if found is None:
            return False
        data = b"".join(found)
        right_length(data, length)
        self.registers.read(offset, data)
        return True

    def _fetched(self, offset: int, length: int) -> None:
        self.in_flight -= 1
        if not self._read_inline(offset, length):
            self._read_later(offset, length)

    def _read_later(self, offset: int, length: int) -> None:
        begun = self.registers.begin_read(offset, length)

        def answered(errno: int, result: Any) -> None:
            if errno:
                self.accept(errno, "a read")
                self.registers.end_read(begun, offset, None)
                return
            data = b"".join(result)
            right_length(data, length)
            self.registers.end_read(begun, offset, data)

        self._later(Operation.READ, offset, length, None, answered)

    def _extents(self) -> None:
        offset, length = self._place(64)
        if self.random.random() < 0.2:
            length = self.sizes.size_bytes - offset
        limit = self.random.choice([1, 4, 1000])
        found = self.device.extents(offset, length, limit)
        if found is not None:
            if len(found) > limit:
                raise ViolationError(f"{len(found)} extents, asked for at most {limit}")
            self.registers.extents(offset, length, found, settled=True)
            return
        busy = set(self.registers.blocks) if self.in_flight else set()
        before = self.registers.tick()

        def answered(errno: int, result: Any) -> None:
            if errno:
                self.accept(errno, "extents")
                return
            # Only if nothing happened meanwhile do the answer and the registers speak of one moment.
            self.registers.extents(offset, length, result, settled=not busy and self.registers.tick() == before + 1)

        self._later(Operation.EXTENTS, offset, length, None, answered)

    def _flush(self) -> None:
        asked, asked_of_clones = self.registers.tick(), self.clones.ask_flush()
        self.in_flight += 1

        def answered(errno: int) -> None:
            self.in_flight -= 1
            self.world.note("flushed", errno)
            self.tell(f"flush of moment {asked}: errno {errno}")
            if errno:
                self.accept(errno, "a flush")
            else:
                self.registers.flushed(asked)
                self.clones.flushed(asked_of_clones)

        self.device.flush(answered)

    def accept(self, errno: int, what: str) -> None:
        """Raise unless the mix can be the cause of the errno."""
        mix = self.mix
        if not errno or self.world.has_crashed:
            return
        self.counters[f"errno {errno}"] += 1
        if errno == errnos.ENOSPC and (mix.room_segments < 100 or mix.create_error):
            return
        if errno == errnos.EIO and (self.disk.failure or mix.read_error or mix.store_read_error or mix.lies):
            return
        raise ViolationError(f"{what} failed with errno {errno}, and nothing in {mix} is the cause")


def lies(seed: int) -> bool:
    """One seed of five has a device that lies."""
    return seed % 5 == 4


def try_seed(seed: int, bend: Bend | None = None) -> tuple[str, Run]:
    """What went wrong (or ""), and the run."""
    run = Run(seed, bend, lies(seed) and bend is None)
    try:
        run.go()
    except (Exception, ViolationError) as error:
        return f"{type(error).__name__}: {error}", run
    return "", run

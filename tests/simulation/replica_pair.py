"""Two replicas of one family on two machines that lose what was not synced, through crashes, cuts and returns.

Theory. One orders, the other follows as far as it is told. A crash (kill -9 or a power cut, between two calls or at a
crash point) takes one of them or both; then they are opened, the one with the longest log of those in sync orders on,
the other is cut where they part, and is told the rest, or skips and fetches regions. What was durable on both may not
be lost, and in the end both show the same, hold the same, and have nothing wrong with them.

Rules of this file
- A write is numbered, and its blocks hold its number: what is found must be as late as the last one that was durable
  wherever it had to be.
- Rot meets a block that both have, in the part of the log that no replay reads; nobody who reads may notice.
- One that is not told anything is out of sync from then on, and the other's log is durable up to there (the removal
  names it); only one in sync may order.
"""

import errno
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from nbdserver.logdisk.ordering import CRASH_POINTS, hooked
from nbdserver.logdisk.segments import segment_path
from nbdserver.replication.replica_log import Found, common_position
from protocol.peer import BEGINNING, Modification
from tests.simulation.faults import FaultMix
from tests.simulation.registers import ViolationError
from tests.simulation.world import SimulatedCrash
from tests.unit.families import BLOCK_BYTES, SETTINGS, block
from tests.unit.replica_rig import ReplicaFamily, taken

BLOCKS = 3000
ROUNDS = 5
MIX = FaultMix(cold_read=0.2, latency_s=0.001, tear=0.5)


class PairRun:
    """One seed. `go` raises if a promise was broken."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        small = replace(SETTINGS, cache_bytes=0, checkpoint_bytes=rng.choice([64, 512]) << 10)
        small = replace(small, checkpoint_interval_s=rng.choice([0.05, 1.0, 30.0]))
        self.machines = [ReplicaFamily(settings=small, seed=seed * 2 + index, mix=MIX) for index in range(2)]
        self.in_sync = [True, True]
        self.owner = 0
        self.epoch = 0
        self.number = 0
        self.told: list[Modification] = []
        self.written: dict[int, list[tuple[int, int]]] = {}  # LBA → (number of the change, 0 or its content)
        self.floor = 0  # up to here changes may not be lost
        self.doubtful: set[int] = set()  # but for those that a crash came between
        self.lost = [False, False]  # whether the page cache went, since all was alike
        self.hits: Counter[str] = Counter()
        self._running = 0
        self._plan: tuple[str, int] = ("", 0)

    def go(self) -> None:
        with hooked(self._at_crash_point):
            self._survive(self._take_over)
            for _ in range(ROUNDS):
                if self.random.random() < 0.7:
                    self._plan = (self.random.choice(sorted(CRASH_POINTS)), self.random.choice([1, 1, 2, 4]))
                self._survive(self._work)
                if self.random.random() < 0.5:
                    self._crash(self.random.choice([(0,), (1,), (0, 1)]))
                self._survive(self._take_over)
            self._plan = ("", 0)
            self._take_over()
            self._compare()

    # -- crashes

    def _at_crash_point(self, name: str) -> None:
        self.hits[name] += 1
        planned, left = self._plan
        if name == planned:
            self._plan = (name, left - 1) if left > 1 else ("", 0)
            if left <= 1:
                self.hits[f"crash at {name}"] += 1
                raise SimulatedCrash

    def _survive(self, work: Callable[[], None]) -> None:
        """Do it; after a crash everything is taken up again until it holds."""
        try:
            work()
        except SimulatedCrash:
            self._crash((self._running,))
            self._survive(self._take_over)

    def _crash(self, which: tuple[int, ...]) -> None:
        """The machines end, and begin again."""
        self.doubtful.update(range(self.floor + 1, self.number + 1))
        for index in which:
            machine = self.machines[index]
            power = self.random.random() < 0.5
            self.hits["power" if power else "kill"] += 1
            machine.crash(power)
            self.lost[index] |= power
        for index in which:
            try:
                self._on(index).open()
                self.machines[index].replica.repair_from(partial(self._fetch_blocks, index))
            except SimulatedCrash:
                self._crash((index,))

    def _on(self, index: int) -> ReplicaFamily:
        self._running = index
        return self.machines[index]

    def _ask(self, index: int, name: str, *arguments: Any) -> tuple[Any, ...]:
        machine = self._on(index)
        return machine.wait(lambda done: getattr(machine.replica, name)(*arguments, done))

    # -- working

    def _work(self) -> None:
        rng = self.random
        stays = rng.random() < 0.6
        for _ in range(rng.randrange(1, 30)):
            self._change()
            if self.in_sync[1 - self.owner]:
                if stays or rng.random() < 0.8:
                    self._tell()
                else:
                    self._remove()
            if rng.random() < 0.2:
                self._flush()
            if rng.random() < 0.1 and all(self.in_sync) and not self.told:
                self._rot(rng.randrange(2))
            for index in range(2):
                self._on(index).run(rng.choice([0.0, 0.001, 0.01, 0.3]))

    def _change(self) -> None:
        rng, owner = self.random, self._on(self.owner)
        self.number += 1
        lba = rng.choice([0, 1000, 2000]) + rng.randrange(rng.choice([4, 400]))
        count = rng.choice([1, 1, 1, 5, 20])
        choice = rng.random()
        if choice < 0.8:
            self._note(range(lba, lba + count), self.number)
            if owner.write(lba * BLOCK_BYTES, block(self.number) * count):
                raise ViolationError("a write failed")
        elif choice < 0.88:
            count = rng.choice([3, 300, 9000])
            self._note(range(lba, min(BLOCKS, lba + count)), 0)
            if owner.discard(lba * BLOCK_BYTES, count * BLOCK_BYTES):
                raise ViolationError("a discard failed")
        elif choice < 0.95:
            owner.change("snapshot", 1, f"s{self.number}", 0)
        elif owner.disk.snapshots():
            owner.change("delete_snapshot", rng.choice(owner.disk.snapshots()).layer)

    # -- rot

    def _rot(self, index: int) -> None:
        """A block rots here, and is read."""
        machine = self._on(index)
        machine.checkpoint()
        lba = self.random.choice(sorted(self.written) or [0])
        number = machine.number_at(lba)
        if not number:
            return
        place = machine.place_of(lba)
        machine.drive.files[segment_path(place.segment)].content[place.offset + 9] ^= 4
        self.hits["rot"] += 1
        machine.replica.repair_from(partial(self._fetch_blocks, index))
        if machine.number_at(lba) != number:
            raise ViolationError(f"LBA {lba} was repaired with something else")

    def _fetch_blocks(self, index: int, mbas: Sequence[int], done: Callable[[Found], None]) -> None:
        """From the other one, which does not crash meanwhile."""
        plan, self._plan = self._plan, ("", 0)
        (blocks,) = self._ask(1 - index, "read_blocks", mbas, False)
        self._plan = plan
        found = {mba: ("other", data) for mba, data in blocks.items()}
        self._on(index).clock.call_soon(lambda: done(found))

    def _note(self, lbas: range, content: int) -> None:
        for lba in lbas:
            self.written.setdefault(lba, []).append((self.number, content))

    def _tell(self) -> None:
        if self._ask(1 - self.owner, "append", taken(self.told)) != (0,):
            raise ViolationError("a modification that follows was refused")
        self._commit()

    def _commit(self) -> None:
        last = self.machines[self.owner].replica.last
        for index in range(2):
            if self.in_sync[index]:
                self._on(index).replica.set_committed(last.txid)

    def _remove(self) -> None:
        """The other one is not told any more."""
        self._ask(self.owner, "sync")
        self.in_sync[1 - self.owner] = False
        self.hits["removed"] += 1
        self._commit()

    def _flush(self) -> None:
        number = self.number
        for index in range(2):
            if self.in_sync[index] and self._ask(index, "sync") != (0,):
                raise ViolationError("a sync failed")
        self.floor = number

    # -- after a crash

    def _take_over(self) -> None:
        """The longest log of those in sync orders on; the other one is made like it."""
        self.told.clear()
        lasts = [self.machines[index].replica.last if self.in_sync[index] else (-1, 0) for index in range(2)]
        other = 1 - self.owner
        if all(self.in_sync) and not self.lost[other] and self.random.random() < 0.5:
            self.owner = other  # the one that ordered cannot be reached in time
        else:
            self.owner = lasts.index(max(lasts))
        self.epoch += 1
        for index in range(2):
            if self._ask(index, "promise", self.epoch) != (0,):
                raise ViolationError("a promise was refused")
        owner, other = self.machines[self.owner].replica, 1 - self.owner
        self._running = self.owner
        owner.begin_epoch(self.epoch)
        owner.tap(self.told.append)
        follower = self.machines[other].replica
        common = common_position(owner.epochs, follower.epochs)
        if not self.in_sync[other] and self.random.random() < 0.2:
            self.hits["started over"] += 1
            follower.set_committed(follower.last.txid)
            self._on(other).checkpoint()
            if self._ask(other, "cut", BEGINNING) != (0,):
                raise ViolationError("a replica could not start over")
            self.machines[other].look()
            common = BEGINNING
        if follower.last != common:
            self.hits["cut"] += 1
            if self._ask(other, "cut", common) == (errno.ENOENT,) and not self.in_sync[other]:
                self.hits["started over"] += 1  # it has fetched regions behind what the owner has lost
                common = BEGINNING
            if follower.last != common and self._ask(other, "cut", common) != (0,):
                raise ViolationError(f"a log could not be cut at {common}")
            self.machines[other].look()
        if follower.last != common:
            raise ViolationError(f"a log that was cut at {common} ends at {follower.last}")
        while follower.last != owner.last:
            if self.random.random() < 0.3:
                self._skip(other)
                continue
            error, found = self._ask(self.owner, "modifications", follower.last, 1 << 16)
            if error:
                raise ViolationError("the log could not be read")
            if found is None:
                self._skip(other)
            elif self._ask(other, "append", found) != (0,):
                raise ViolationError("what was read back was refused")
            else:
                self.hits["caught up"] += 1
        self._fetch(other)
        self.in_sync[other] = True
        self._flush()
        self.lost = [False, False]
        self._commit()

    def _skip(self, other: int) -> None:
        self.hits["skipped"] += 1
        owner = self.machines[self.owner].replica
        self._ask(self.owner, "sync")
        lacks = owner.regions_after(self.machines[other].replica.last.txid)
        if self._ask(other, "skip", owner.last, owner.epochs, lacks, owner.tree) != (0,):
            raise ViolationError("a skip was refused")

    def _fetch(self, other: int) -> None:
        """Regions, while the owner writes on."""
        follower = self.machines[other].replica
        while follower.resync:
            region = follower.resync[0][0]
            if self.random.random() < 0.3:
                self._change()
            (known,) = self._ask(other, "digest_region", region)
            if self.random.random() < 0.5:
                self._change()
            error, copy = self._ask(self.owner, "read_region", region, known)
            if error or self._ask(other, "append", taken(self.told)) != (0,):
                raise ViolationError(f"region {region} could not be read")
            # A copy may wait for a checkpoint, and that for the owner to say in its next frame what is committed.
            self._on(other).clock.call_later(0.01, partial(follower.set_committed, follower.last.txid))
            if self._ask(other, "apply_copy", copy) != (0,):
                raise ViolationError(f"region {region} could not be copied")
            self._ask(other, "sync")
            follower.set_committed(follower.last.txid)
            self._ask(other, "resync_done", ((region, 1),))
            self.hits["copied"] += 1
            self.hits["kept"] += bool(copy.kept)

    # -- judging

    def _compare(self) -> None:
        one, two = self.machines
        if one.replica.last != two.replica.last or one.shown() != two.shown() or one.contents() != two.contents():
            raise ViolationError("the replicas differ")
        for lba, changes in self.written.items():
            found = one.number_at(lba)
            sure = [number for number, _ in changes if number <= self.floor and number not in self.doubtful]
            floor = max(sure, default=0)
            if not any(number >= floor and content == found for number, content in [(0, 0), *changes]):
                raise ViolationError(f"LBA {lba} holds {found}, and change {floor} of it was durable")
        for machine in self.machines:
            machine.run(60.0)
            if findings := machine.findings():
                raise ViolationError(f"the check finds {findings[0]}")


def try_pair(seed: int) -> tuple[str, PairRun]:
    """What went wrong (or ""), and the run."""
    run = PairRun(seed)
    try:
        run.go()
    except (Exception, ViolationError) as error:
        return f"{type(error).__name__}: {error}", run
    return "", run

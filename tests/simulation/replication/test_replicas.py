"""Whole replicated families on simulated log disks: no answer is ever wrong, and all replicas are the same in the end.

Each class of fault has a canary: what guards against it is taken away, and the simulator must notice.
"""

from collections.abc import Callable, Sequence

import pytest

from metadata.seams import Done
from nbdserver.logdisk import cold_read, reader
from nbdserver.logdisk.disk import DiskError, LogDisk
from nbdserver.logdisk.region_copies import Views
from nbdserver.logdisk.region_reading import RegionReading
from nbdserver.logdisk.repair import Repairs
from nbdserver.logdisk.replica_append import ReplicaAppend
from nbdserver.logdisk.store_writes import StoreWrites
from nbdserver.replication.device import ReplicatedDevice
from nbdserver.replication.owner import Owner
from nbdserver.replication.takeover import Takeover
from protocol.checksum import crc32c
from protocol.invariant import InvariantError
from tests.simulation.registers import ViolationError
from tests.simulation.replication.on_log_disks import Bend, replicas_run
from tests.simulation.seeds import try_seed, wrong_seeds

SEEDS = 16
CHUNK = 8
FOUND = (
    9000000646,  # a change of the tree was answered after the judge had looked for the last time
    1795644292186,  # the owner changed while the judge looked for the last time
    1795678630532,  # what a volume was cut off came back at replicas that had skipped the merge of its layers
)
FULL = Bend(room_segments=14, of_the_tree=0.1, trouble=0.05)
FOUND_ON_SMALL_DISKS = (
    1030,  # whose log had a hole where it had skipped something cut the stream of who had nothing, again and again
    1039,  # the same, with two nodes
)
TRIES = 120  # for each canary; each is noticed by every fifth run or more
NOTICED = (ViolationError, InvariantError, DiskError)
"""What a promise that is broken is noticed by; anything else is a canary that does not fit the code any more."""
WORLD = "replicas"
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_wrong_is_seen_and_all_replicas_are_the_same_when_it_is_healed(first: int) -> None:
    wrong = wrong_seeds(WORLD, range(first, first + CHUNK))
    assert not wrong, wrong


@pytest.mark.parametrize("seed", FOUND)
def test_seeds_that_once_went_wrong_do_not(seed: int) -> None:
    assert not wrong_seeds(WORLD, [seed])


@pytest.mark.parametrize("seed", FOUND_ON_SMALL_DISKS)
def test_seeds_that_once_went_wrong_on_small_disks_do_not(seed: int) -> None:
    _, run = replicas_run(seed, FULL)
    run.go()


def test_the_first_seeds_meet_everything_that_can_happen() -> None:
    missed = {
        "write", "discard", "read at once", "read later", "flush", "snapshot", "deletion", "rollback", "clone",
        "resize", "look", "generation", "conspiracy", "left behind", "owner-deposed", "replica-removed",
        "replica-added", "replica-cut", "replica-skipped", "placed", "rot", "block-repaired",
        "two are down", "all are down", "no room", "made whole",
    }  # fmt: skip
    for seed in range(TRIES):
        scenario, run = replicas_run(seed, Bend(trouble=0.1))
        run.go()
        missed -= {*scenario.answers, *scenario.reports}
        if not missed:
            return
    pytest.fail(f"nobody met {missed}")


def test_the_same_seed_gives_the_same_run() -> None:
    assert len({try_seed(WORLD, 3).fingerprint for _ in range(2)}) == 1


# --- canaries ---------------------------------------------------------------------------------------------------------


def a_sync_does_nothing(patch: pytest.MonkeyPatch) -> None:
    def flush(self: LogDisk, done: Done) -> None:
        self.log.durable_lsn, self.log.durable_txid = self.log.lsn, self.log.txid
        self.call_soon(lambda: done(0))

    patch.setattr(LogDisk, "flush", flush)


def copies_leave_snapshots_out(patch: pytest.MonkeyPatch) -> None:
    honest = RegionReading._views

    def views(self: RegionReading) -> Views | None:
        found = honest(self)
        if found is None:
            return None
        newest = max(found)
        return {
            layer: view if layer == newest else type(view)("Q", bytes(8 * len(view))) for layer, view in found.items()
        }

    patch.setattr(RegionReading, "_views", views)


def the_tree_changes_on_the_owner_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReplicaAppend, "_try_tree", lambda self, modification: self._append(modification, lambda _: None))


def nobody_repairs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Repairs, "source", property(lambda self: None, lambda self, source: None), raising=False)


def an_owner_shows_what_it_may_not(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReplicatedDevice, "_may_show", lambda self, offset, length: not self._is_open)


def the_generation_stays(patch: pytest.MonkeyPatch) -> None:
    honest = Takeover._settle_set

    def settle_set(self: Takeover, nodes: Sequence[str], generation: int) -> None:
        honest(self, nodes, self._value.generation)

    patch.setattr(Takeover, "_settle_set", settle_set)


def checksums_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    class Anything(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

    for module in (cold_read, reader):
        patch.setattr(module, "crc32c", lambda data: Anything(crc32c(data)))


def a_store_that_could_not_write_goes_on(patch: pytest.MonkeyPatch) -> None:
    honest = StoreWrites._written
    patch.setattr(StoreWrites, "_written", lambda self, errno: honest(self, 0))


def room_is_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Owner, "room_bytes", lambda self: 1 << 40)


DEATHS = {"kill": 600.0, "isolation": 600.0}
POWER = {"power of all": 600.0, "isolation": 300.0}
SILENCE = {"one-way split": 1200.0, "registry outage": 600.0, "clog": 1200.0}
MISDIRECTED = 1e-9  # nothing rots, but some appends of that disk land elsewhere
CAUGHT: Sequence[tuple[str, Patch, Bend]] = (
    ("power", a_sync_does_nothing, Bend(POWER, trouble=0.1)),
    ("power", the_generation_stays, Bend({"power of all": 600.0, "slow disk": 0.3}, trouble=0.05)),
    ("kill", copies_leave_snapshots_out, Bend(DEATHS, trouble=0.3, of_the_tree=0.1)),
    ("kill", the_tree_changes_on_the_owner_alone, Bend(DEATHS, trouble=0.1, of_the_tree=0.3)),
    ("silence", an_owner_shows_what_it_may_not, Bend(SILENCE, trouble=0.1, of_the_tree=0.0)),
    ("rot", nobody_repairs, Bend(rots=0.5)),
    ("rot", checksums_are_not_compared, Bend(rots=0.5)),
    ("misdirected", nobody_repairs, Bend(rots=MISDIRECTED)),
    ("misdirected", checksums_are_not_compared, Bend(rots=MISDIRECTED)),
    ("disk-error", a_store_that_could_not_write_goes_on, Bend({"disk error": 0.1, "kill": 600.0}, trouble=0.1)),
    ("disk-full", room_is_not_asked_for, Bend({}, trouble=0.0, of_the_tree=0.1, room_segments=12)),
)


def noticed(bend: Bend) -> str:
    for seed in range(TRIES):
        _, run = replicas_run(seed, bend)
        try:
            run.go()
        except NOTICED as error:
            return f"seed {seed}: {error}"
    return ""


@pytest.mark.parametrize(
    ("canary", "bend"),
    [(canary, bend) for _, canary, bend in CAUGHT],
    ids=[f"{fault}-{canary.__name__}" for fault, canary, _ in CAUGHT],
)
def test_what_is_taken_away_is_missed(canary: Patch, bend: Bend, monkeypatch: pytest.MonkeyPatch) -> None:
    canary(monkeypatch)
    assert noticed(bend), f"nobody noticed in {TRIES} runs"

"""Simulated replicated volumes: no answer is ever wrong, and all replicas are the same when all is healed.

Each rule of docs/replication.md has a canary: the rule is taken away, and the simulator must notice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, cast

import pytest

from metadata.ranges import numbers_of
from metadata.registry import Family
from metadata.registry_calls import Outcome, Swap
from metadata.replica_set import Change, Member, ReplicaSet
from metadata.seams import Buffer, Done
from nbdserver.node.recovered import Verdict, Word
from nbdserver.replication import in_sync_set as set_module
from nbdserver.replication import takeover as takeover_module
from nbdserver.replication.in_sync_set import InSyncSet
from nbdserver.replication.link import Link
from nbdserver.replication.owner import Owner
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.replication.replica import Replica
from nbdserver.replication.takeover import Takeover
from protocol.invariant import InvariantError
from protocol.peer import Append, Copy, Epochs, Position, Runs
from protocol.peer_decoding import decode
from tests.simulation.cluster.faults import Mix
from tests.simulation.registers import ViolationError
from tests.simulation.replication import keeping as keeping_module
from tests.simulation.replication import plays
from tests.simulation.replication.in_memory import replication_run
from tests.simulation.replication.keeping import KeepingRegistry, Kept, KeptSets
from tests.simulation.replication.memory_log import REGION_BLOCKS, Image, MemoryDisk, MemoryLog
from tests.simulation.seeds import try_seed, wrong_seeds

SEEDS = 20
CHUNK = 5
TRIES = 60  # runs in which a canary must be found
WORLD = "replication"
FOUND = (
    1795634723482,  # a copy that lay right behind where its log was cut went with the cut
    1795635763228,  # all lost their power, and one that was away had more in its checkpoint: it could not be cut, ever
    1795635764062,  # the same, and regions that it had fetched went with the cut
    1795635764404,
)
Patch = Callable[[pytest.MonkeyPatch], None]
Play = Callable[[], None]
PLAYS: list[Play] = [
    play
    for play in vars(plays).values()
    if isinstance(play, FunctionType) and play.__module__ == plays.__name__ and not play.__code__.co_argcount
]


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_wrong_is_seen_and_all_replicas_are_the_same_when_it_is_healed(first: int) -> None:
    wrong = wrong_seeds(WORLD, range(first, first + CHUNK))
    assert not wrong, wrong


@pytest.mark.parametrize("seed", FOUND)
def test_seeds_that_once_went_wrong_do_not(seed: int) -> None:
    assert not wrong_seeds(WORLD, [seed])


def test_the_first_seeds_meet_everything_that_can_happen_to_a_replica() -> None:
    missed = {
        "write", "write unknown", "read at once", "read later", "flush", "taken over", "not taken over", "generation",
        "conspiracy", "owner-deposed", "replica-removed", "replica-added", "replica-cut", "replica-skipped",
        "placed", "placement-changed", "made whole",
    }  # fmt: skip
    for seed in range(TRIES):
        scenario, run = replication_run(seed, trouble=0.1)
        run.go()
        missed -= {*scenario.answers, *scenario.reports}
        if not missed:
            return
    pytest.fail(f"nobody met {missed}")


def test_the_same_seed_gives_the_same_run() -> None:
    prints = {try_seed(WORLD, 7).fingerprint for _ in range(2)}
    assert len(prints) == 1
    assert try_seed(WORLD, 8).fingerprint not in prints


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: play.__name__)
def test_a_play_ends_well(play: Play) -> None:
    play()


# --- canaries ---------------------------------------------------------------------------------------------------------


def acknowledged_by_the_owner_alone(patch: pytest.MonkeyPatch) -> None:  # rule 1
    def commit(self: Owner) -> None:
        self._committed_txid = self._log.last.txid
        self._log.set_committed(self._committed_txid)
        self._release()

    patch.setattr(Owner, "_commit", commit)


def grants_are_not_needed(patch: pytest.MonkeyPatch) -> None:  # rule 2
    def has_authority(self: Owner) -> bool:
        return not self.is_deposed and self._committed_txid >= self._begin_txid

    patch.setattr(Owner, "has_authority", property(has_authority))


def a_candidate_does_not_wait(patch: pytest.MonkeyPatch) -> None:  # rule 3
    patch.setattr(takeover_module, "OPEN_WAIT_S", 0.0)  # which alone would be long enough
    honest = Takeover._wait

    def wait(self: Takeover) -> None:
        self._replica.granted_until_s = 0.0
        honest(self)

    patch.setattr(Takeover, "_wait", wait)


def a_candidate_goes_on_granting(patch: pytest.MonkeyPatch) -> None:  # rule 3
    patch.setattr(Replica, "withhold", lambda self, epoch: None)


def who_starts_has_granted_nothing(patch: pytest.MonkeyPatch) -> None:  # rule 3
    patch.setattr(takeover_module, "OPEN_WAIT_S", 0.0)
    honest = Replica.__init__

    def init(self: Replica, *arguments: Any) -> None:
        honest(self, *arguments)
        self.granted_until_s = 0.0

    patch.setattr(Replica, "__init__", init)


def a_new_owner_answers_at_once(patch: pytest.MonkeyPatch) -> None:  # rule 5, and the grants that hide it
    patch.setattr(Owner, "has_authority", property(lambda self: not self.is_deposed))


def what_does_not_follow_is_appended(patch: pytest.MonkeyPatch) -> None:  # rule 7
    frames_get_lost(patch)
    patch.setattr(Replica, "_follows", lambda self, modifications: True)

    def append(self: MemoryLog, modifications: Any, done: Done) -> None:
        def act() -> int:
            for each in modifications:
                self._take(each)
            return 0

        self._later("log", act, done)

    patch.setattr(MemoryLog, "append", append)


def frames_get_lost(patch: pytest.MonkeyPatch) -> None:
    """No fault of the product: what a network might do that is worse than any."""
    honest = PeerStream.send_packed
    count = 0

    def send_packed(self: PeerStream, buffers: Sequence[Buffer]) -> None:
        nonlocal count
        frame = decode(b"".join(buffers))
        count += isinstance(frame, Append)
        if not isinstance(frame, Append) or not frame.modifications or count % 50:
            honest(self, buffers)

    patch.setattr(PeerStream, "send_packed", send_packed)


def acknowledged_before_the_removal_is_known(patch: pytest.MonkeyPatch) -> None:  # rule 8
    honest = InSyncSet.remove

    def remove(self: InSyncSet, node: str, reason: str) -> None:
        honest(self, node, reason)
        owner = cast(Owner, self._events)
        owner._needed = [link for link in owner._needed if link.node != node]
        owner._commit()

    patch.setattr(InSyncSet, "remove", remove)


def who_is_being_added_is_not_needed(patch: pytest.MonkeyPatch) -> None:  # rule 9
    honest = InSyncSet._set_needed

    def set_needed(self: InSyncSet) -> None:
        self.adding = ""
        honest(self)

    patch.setattr(InSyncSet, "_set_needed", set_needed)


def checkpoints_pass_the_committed_txid(patch: pytest.MonkeyPatch) -> None:  # rule 10
    patch.setattr(MemoryLog, "checkpoint_limit_txid", 1 << 60)


def a_divergent_tail_stays(patch: pytest.MonkeyPatch) -> None:  # rule 11
    honest = Link.follow

    def follow(self: Link) -> None:
        if self.opened is not None:
            patch.setattr(
                "nbdserver.replication.link.common_position",
                lambda ours, theirs: theirs[-1] if theirs else Position(0, 0),
            )
        honest(self)

    patch.setattr(Link, "follow", follow)


def nobody_starts_over(patch: pytest.MonkeyPatch) -> None:  # rule 11
    honest = Link.follow

    def follow(self: Link) -> None:
        self._cut_at = None
        honest(self)

    patch.setattr(Link, "follow", follow)


def what_was_fetched_may_be_cut_away(patch: pytest.MonkeyPatch) -> None:  # rule 13
    patch.setattr(MemoryDisk, "fetched_txid", property(lambda self: 0, lambda self, txid: None), raising=False)


def regions_to_fetch_are_noted_later(patch: pytest.MonkeyPatch) -> None:  # rule 12
    honest = MemoryLog.skip

    def skip(self: MemoryLog, to: Position, epochs: Epochs, regions: Runs, tree: bytes, done: Done) -> None:
        def note() -> int:
            self.disk.resync.update(numbers_of(regions))
            return 0

        honest(self, to, epochs, (), tree, lambda errno: self._later("store", note, done))

    patch.setattr(MemoryLog, "skip", skip)


def what_was_to_be_fetched_is_forgotten(patch: pytest.MonkeyPatch) -> None:  # rule 12
    honest = MemoryLog.skip

    def skip(self: MemoryLog, to: Position, epochs: Epochs, regions: Runs, tree: bytes, done: Done) -> None:
        self._later("log", lambda: self.disk.resync.clear() or 0, lambda errno: None)
        honest(self, to, epochs, regions, tree, done)

    patch.setattr(MemoryLog, "skip", skip)


def a_copy_does_not_say_when_its_region_changed(patch: pytest.MonkeyPatch) -> None:  # rule 15
    honest = Image._apply_copy
    patch.setattr(Image, "_apply_copy", lambda self, copy: honest(self, replace(copy, region_txid=0)))


def a_bit_is_cleared_when_its_copy_is_applied(patch: pytest.MonkeyPatch) -> None:  # rule 13
    honest = MemoryLog.apply_copy

    def apply_copy(self: MemoryLog, copy: Copy, done: Done) -> None:
        self.resync_done(((copy.region, 1),), lambda errno: None)
        honest(self, copy, done)

    patch.setattr(MemoryLog, "apply_copy", apply_copy)


def a_bit_is_cleared_before_what_it_holds_is_committed(patch: pytest.MonkeyPatch) -> None:  # rule 13
    honest = Replica._clear_bits

    def clear_bits(self: Replica) -> None:
        self._durable = [(region, 0) for region, _ in self._durable]
        honest(self)

    patch.setattr(Replica, "_clear_bits", clear_bits)


def a_copy_is_older_than_its_place(patch: pytest.MonkeyPatch) -> None:  # rule 14
    honest = MemoryLog.read_region

    def read_region(
        self: MemoryLog, region: int, known: Mapping[int, bytes] | None, done: Callable[[int, Copy | None], None]
    ) -> None:
        def read(errno: int, copy: Copy | None) -> None:
            self._clock.call_later(0.5, lambda: done(errno, copy and replace(copy, txid=self.last.txid)))

        honest(self, region, known, read)

    patch.setattr(MemoryLog, "read_region", read_region)


def a_copy_only_adds(patch: pytest.MonkeyPatch) -> None:  # rule 15
    honest = Image._apply_copy

    def apply_copy(self: Image, copy: Copy) -> None:
        first = copy.region * REGION_BLOCKS
        before = {lba: self.blocks[lba] for lba in range(first, first + REGION_BLOCKS) if lba in self.blocks}
        honest(self, copy)
        for lba, block in before.items():
            self.blocks.setdefault(lba, block)

    patch.setattr(Image, "_apply_copy", apply_copy)


def is_whole_if(patch: pytest.MonkeyPatch, holds: Callable[[Member, Sequence[int]], bool]) -> None:
    for module in (set_module, takeover_module):
        patch.setattr(module, "is_whole", holds)


def whoever_comes_back_is_whole(patch: pytest.MonkeyPatch) -> None:  # rule 16
    is_whole_if(patch, lambda member, incarnations: True)


def incarnations_are_counted(patch: pytest.MonkeyPatch) -> None:  # rule 20
    patch.setattr(MemoryDisk, "incarnation_step", lambda self, rng: 1)
    is_whole_if(patch, lambda member, incarnations: incarnations[0] <= member.incarnation <= incarnations[-1])


def the_registry_keeps_the_incarnation_of_who_was_added(patch: pytest.MonkeyPatch) -> None:  # rule 20
    patch.setattr(InSyncSet, "_note_newest", lambda self: None)


def the_generation_stays(patch: pytest.MonkeyPatch) -> None:  # rule 16
    honest = Takeover._settle_set

    def settle_set(self: Takeover, nodes: Any, generation: int) -> None:
        honest(self, nodes, self._value.generation)

    patch.setattr(Takeover, "_settle_set", settle_set)


def the_shortest_log_wins(patch: pytest.MonkeyPatch) -> None:  # rule 6
    patch.setattr(
        Takeover, "_longest", lambda self, complete: min(complete, key=lambda node: complete[node].last, default=None)
    )


def room_is_not_asked_for(patch: pytest.MonkeyPatch) -> None:  # rule 18
    patch.setattr(Owner, "room_bytes", lambda self: 1 << 40)


def who_leaves_goes_at_once(patch: pytest.MonkeyPatch) -> None:  # rule 19
    patch.setattr(ReplicaSet, "can_let_go", property(lambda self: bool(self.leaving)))


def a_member_is_kept_that_cannot_be_brought_along(patch: pytest.MonkeyPatch) -> None:  # rule 11
    honest = Owner.may_skip
    patch.setattr(Owner, "may_skip", lambda self, link: self.value.member(link.node) is None and honest(self, link))


def what_is_not_acknowledged_is_read(patch: pytest.MonkeyPatch) -> None:  # rule 17
    patch.setattr(Owner, "unacknowledged", lambda self, lba, count: 0)


def an_unknown_change_counts_as_made(patch: pytest.MonkeyPatch) -> None:
    honest = Change._swapped

    def swapped(self: Change, swap: Swap) -> None:
        honest(self, Swap(Outcome.SWAPPED) if swap.outcome is Outcome.UNKNOWN else swap)

    patch.setattr(Change, "_swapped", swapped)


def a_lost_change_counts_as_made(patch: pytest.MonkeyPatch) -> None:
    honest = Change._swapped

    def swapped(self: Change, swap: Swap) -> None:
        honest(self, Swap(Outcome.SWAPPED) if swap.outcome is Outcome.LOST else swap)

    patch.setattr(Change, "_swapped", swapped)


def a_flush_is_the_owners_alone(patch: pytest.MonkeyPatch) -> None:
    def durable(self: Owner) -> None:
        self._durable_txid = self._log.durable.txid
        self._release()

    patch.setattr(Owner, "_durable", durable)


def a_sync_does_nothing(patch: pytest.MonkeyPatch) -> None:
    def sync(self: MemoryLog, done: Done) -> None:
        last = self.last

        def act() -> int:
            self._durable = max(self._durable, last)
            return 0

        self._later("store", act, done)

    patch.setattr(MemoryLog, "sync", sync)


def what_is_acted_on_is_not_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Kept, "keep", lambda self, value: True)
    patch.setattr(KeptSets, "newest", lambda self, there: there)


def what_adds_a_member_is_not_noted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeepingRegistry, "note", lambda self, change: None)


def members_that_are_silent_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    honest = keeping_module.verdict

    def verdict(family: Family, words: Mapping[str, Word], there: ReplicaSet | None, without: Sequence[str]) -> Verdict:
        told = [word.kept for word in words.values() if word.kept is not None]
        newest = max(told, key=lambda value: value.number)
        silent = [word for word in newest.in_sync if word.node not in words]
        return Verdict(family, newest) if silent else honest(family, words, there, without)

    patch.setattr(keeping_module, "verdict", verdict)


CAUGHT_IN_A_PLAY: dict[Patch, Play] = {
    grants_are_not_needed: plays.the_owner_sleeps_and_is_asked_when_it_wakes,
    a_candidate_does_not_wait: plays.the_owner_is_cut_off_and_somebody_attaches_at_once,
    a_candidate_goes_on_granting: plays.somebody_attaches_elsewhere_while_all_is_well,
    who_starts_has_granted_nothing: plays.a_member_is_started_anew_and_the_owner_does_not_hear_of_it,
    a_new_owner_answers_at_once: plays.a_new_owner_reads_what_only_it_has,
    the_shortest_log_wins: plays.the_longest_log_is_not_the_candidates,
    who_is_being_added_is_not_needed: plays.a_replica_is_added_and_the_owner_does_not_hear_of_it,
    a_divergent_tail_stays: plays.an_old_owner_comes_back_with_a_tail,
    a_member_is_kept_that_cannot_be_brought_along: plays.a_new_owner_cannot_read_what_it_alone_has,
    nobody_starts_over: plays.all_lose_their_power_and_one_that_was_away_has_more_in_its_checkpoint,
    what_was_fetched_may_be_cut_away: plays.all_lose_their_power_and_one_has_fetched_regions_behind_what_is_lost,
    regions_to_fetch_are_noted_later: plays.a_replica_dies_when_it_has_skipped,
    what_was_to_be_fetched_is_forgotten: plays.a_replica_that_fetches_regions_is_left_behind_again,
    a_copy_does_not_say_when_its_region_changed: plays.a_replica_that_has_fetched_regions_is_what_another_one_follows,
    a_bit_is_cleared_when_its_copy_is_applied: plays.a_replica_loses_its_power_when_it_has_fetched_a_region,
    a_bit_is_cleared_before_what_it_holds_is_committed: plays.a_region_is_fetched_with_what_is_never_committed,
    what_is_not_acknowledged_is_read: plays.what_is_read_dies_with_the_owner,
    a_flush_is_the_owners_alone: plays.a_flush_is_all_that_is_left,
    room_is_not_asked_for: plays.a_member_has_no_room,
    incarnations_are_counted: plays.a_disk_is_put_back_as_it_was_and_nobody_else_is_up,
    the_registry_keeps_the_incarnation_of_who_was_added: (
        plays.a_disk_is_put_back_as_it_was_while_the_registry_knows_an_older_incarnation
    ),
    who_leaves_goes_at_once: plays.a_member_leaves_when_another_has_come,
    what_is_acted_on_is_not_kept: plays.a_registry_is_put_back_to_when_a_member_was_one_that_is_none_any_more,
    what_adds_a_member_is_not_noted: (
        plays.a_registry_is_put_back_to_before_a_member_was_added_that_nobody_has_heard_of
    ),
}


@pytest.mark.parametrize("canary", CAUGHT_IN_A_PLAY, ids=lambda canary: canary.__name__)
def test_a_rule_that_is_taken_away_is_missed_in_a_play(canary: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    canary(monkeypatch)
    with pytest.raises(ViolationError):
        CAUGHT_IN_A_PLAY[canary]()


DEATHS = {"kill": 600.0, "isolation": 600.0}
CAUGHT_BY_CHANCE: dict[Patch, dict[str, float]] = {
    acknowledged_by_the_owner_alone: DEATHS,
    what_does_not_follow_is_appended: DEATHS,
    acknowledged_before_the_removal_is_known: DEATHS | {"registry delay": 0.5, "registry outage": 600.0},
    checkpoints_pass_the_committed_txid: DEATHS,
    a_copy_is_older_than_its_place: DEATHS,
    a_copy_only_adds: DEATHS,
    whoever_comes_back_is_whole: {"power": 1200.0, "isolation": 600.0},
    the_generation_stays: {"power of all": 600.0},
    an_unknown_change_counts_as_made: DEATHS | {"registry unknown": 0.2},
    a_lost_change_counts_as_made: DEATHS,
    a_sync_does_nothing: {"power of all": 600.0},
    what_is_acted_on_is_not_kept: DEATHS | {"registry put back": 3600.0},
    members_that_are_silent_are_not_waited_for: DEATHS | {"registry put back": 3600.0},
}


@pytest.mark.parametrize("canary", CAUGHT_BY_CHANCE, ids=lambda canary: canary.__name__)
def test_a_rule_that_is_taken_away_is_missed_by_chance(canary: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    canary(monkeypatch)
    for seed in range(TRIES):
        _, run = replication_run(seed, Mix(CAUGHT_BY_CHANCE[canary]), trouble=0.1)
        try:
            run.go()
        except (ViolationError, InvariantError):
            return
    pytest.fail(f"nobody noticed in {TRIES} runs")


def test_frames_that_get_lost_are_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    frames_get_lost(monkeypatch)
    _, run = replication_run(4, Mix(DEATHS), trouble=0.1)
    run.go()

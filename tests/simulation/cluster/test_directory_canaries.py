"""Rules of the directory have canaries: each is taken away from production's code, and the simulator must notice.

Theory: a promise of docs/directory.md rests on a rule, a rule is a few lines of code. A canary replaces those lines by
what somebody could have written who did not know of the rule. Where two rules guard one promise both are taken away.

The faults of the runs in which each is looked for, what is said of it, and the seed that is tried first, only to save
time: it is one that found it.

Known weakness: a canary that is found by one seed says nothing about the next way of breaking the same rule. Rules that
need two faults within milliseconds are in test_directory_moments.py.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from metadata.directory import made_whole
from metadata.directory.collecting import Collecting, Turn
from metadata.directory.confirmations import Confirmations
from metadata.directory.delegate import Delegate
from metadata.directory.election import Election
from metadata.directory.expiries import Expiries
from metadata.directory.follower import Follower
from metadata.directory.history import History
from metadata.directory.kept import Kept
from metadata.directory.master import Master
from metadata.directory.node import DirectoryNode
from metadata.directory.registry_keys import KEPT_PREFIX, MasterState
from metadata.directory.replica import Replica, _assemble
from metadata.directory.replica_store import ReplicaStore
from metadata.directory.reports import Answer, Reports, Waiting
from metadata.directory.stubs import Move, StubQueue
from metadata.directory.term import Term
from metadata.registry_calls import Change, Outcome, Swap
from metadata.registry_guard import RegistryGuard
from protocol import sealed_frames
from protocol.directory import NOWHERE, Heartbeat, Position, Updates
from protocol.directory_control import Promise
from tests.simulation.cluster import directory
from tests.simulation.cluster.directory import directory_run
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.registry_twin import Backup, RegistryTwin
from tests.simulation.cluster.simulated_registry import SimulatedRegistry
from tests.simulation.registers import ViolationError

TRIES = 60  # runs in which a canary must be found


Patch = Callable[[pytest.MonkeyPatch], None]


def a_candidate_does_not_need_the_registry(patch: pytest.MonkeyPatch) -> None:
    honest = Election._swapped

    def swapped(self: Election, attempt: int, new: Any, swap: Swap) -> None:
        honest(self, attempt, new, Swap(Outcome.SWAPPED) if swap.outcome is Outcome.LOST else swap)

    patch.setattr(Election, "_swapped", swapped)


def one_voter_is_a_majority(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Confirmations,
        "majority_of",
        lambda self, voters: max((self._persisted.get(node, 0) for node in voters), default=0),
    )


def what_is_taken_counts_as_persisted(patch: pytest.MonkeyPatch) -> None:
    honest = ReplicaStore.move_to

    def move_to(self: ReplicaStore, position: Position, starts: Any) -> None:
        honest(self, position, starts)
        self.persisted = position
        self._tell_persisted(position, self.promised)

    patch.setattr(ReplicaStore, "move_to", move_to)


def the_winner_keeps_its_own_copy(patch: pytest.MonkeyPatch) -> None:
    def take_newest(self: Collecting) -> None:
        self._move(Turn.NEWEST_HERE)
        self._read_kept()

    patch.setattr(Collecting, "_take_newest", take_newest)


def messages_of_an_epoch_that_was_not_entered_are_taken(patch: pytest.MonkeyPatch) -> None:
    honest = Follower.updates
    patch.setattr(
        Follower,
        "updates",
        lambda self, updates, now_s: honest(self, replace(updates, epoch=self.epoch), now_s),
    )
    patch.setattr(Replica, "insert", lambda self, message, now_s: self.queue.insert(message, now_s))


def a_snapshot_is_used_before_it_is_exact(patch: pytest.MonkeyPatch) -> None:
    honest = Replica.stage_end

    def stage_end(self: Replica, end: Position, now_s: float) -> None:
        if self.staging is not None:
            end = self.staging.begin
        honest(self, end, now_s)

    patch.setattr(Replica, "stage_end", stage_end)


def a_snapshot_has_holes(patch: pytest.MonkeyPatch) -> None:
    honest = Delegate._next

    def next_entries(self: Delegate, sending: Any) -> tuple[list[Any], bool]:
        entries, is_last = honest(self, sending)
        return entries[::2], is_last

    patch.setattr(Delegate, "_next", next_entries)


def every_history_is_the_masters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(History, "has", lambda self, position: True)


def a_missing_message_is_skipped(patch: pytest.MonkeyPatch) -> None:
    honest = StubQueue.take

    def take(self: StubQueue, now_s: float) -> Iterator[Any]:
        while (
            self.taken + 1 in self._places
            and self._places[self.taken + 1].message is None
            and self.newest > self.taken + 3
        ):
            self.taken += 1
            del self._places[self.taken]
        return honest(self, now_s)

    patch.setattr(StubQueue, "take", take)


def a_request_is_never_made_again(patch: pytest.MonkeyPatch) -> None:
    honest = StubQueue._unask

    def unask(self: StubQueue, place: Any, move: Move, now_s: float) -> None:
        honest(self, place, move, now_s)
        place.due_s = float("inf")

    patch.setattr(StubQueue, "_unask", unask)


def an_old_report_replaces_a_newer_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Term, "is_old", lambda self, update: False)


def nothing_expires(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Expiries, "over", lambda self, now_s: iter(()))


def what_is_kept_is_not_in_the_registry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Kept, "change", lambda self, update, taken, failed: taken())


def a_kept_change_that_was_lost_counts_as_made(patch: pytest.MonkeyPatch) -> None:
    honest = Kept._swapped

    def swapped(self: Kept, swap: Swap, number: bytes, value: bytes | None) -> None:
        honest(self, Swap(Outcome.SWAPPED) if swap.outcome is Outcome.LOST else swap, number, value)

    patch.setattr(Kept, "_swapped", swapped)


def a_master_changes_what_is_kept_whoever_is_the_master(patch: pytest.MonkeyPatch) -> None:
    honest = SimulatedRegistry.swap_later

    def swap_later(self: SimulatedRegistry, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        honest(self, [change for change in changes if change.key.startswith(KEPT_PREFIX)] or changes, done)

    patch.setattr(SimulatedRegistry, "swap_later", swap_later)


def one_promise_is_a_majority(patch: pytest.MonkeyPatch) -> None:
    honest = Collecting.promised

    def promised(self: Collecting, node: int, promise: Promise) -> None:
        honest(self, node, promise)
        self._majority_at_s = self._majority_at_s or self._clock.now()

    patch.setattr(Collecting, "promised", promised)


def a_voter_goes_on_listening_after_its_promise(patch: pytest.MonkeyPatch) -> None:
    honest = Follower.heartbeat

    def heartbeat(self: Follower, sender: int, heartbeat: Heartbeat, now_s: float) -> bool:
        store = self._replica.store
        promised, store.promised = store.promised, min(store.promised, heartbeat.epoch)
        try:
            return honest(self, sender, heartbeat, now_s)
        finally:
            store.promised = promised

    def updates(self: Follower, updates: Updates, now_s: float) -> None:
        store = self._replica.store
        promised, store.promised = store.promised, min(store.promised, updates.epoch)
        try:
            honest_updates(self, updates, now_s)
        finally:
            store.promised = promised

    honest_updates = Follower.updates
    patch.setattr(Follower, "heartbeat", heartbeat)
    patch.setattr(Follower, "updates", updates)


def a_process_goes_on_in_the_epoch_of_its_former_life(patch: pytest.MonkeyPatch) -> None:
    honest = Election._read_state

    def read_state(self: Election) -> None:
        value = self._state_value
        if value is not None and (state := MasterState.decode(value)).master == self._me.node:
            self._state_value = replace(state, incarnation=self._replica.store.incarnation).encode()
        honest(self)
        self._state_value = value

    patch.setattr(Election, "_read_state", read_state)


def a_snapshots_deletions_are_taken_before_its_entries(patch: pytest.MonkeyPatch) -> None:
    honest = Replica.drain

    def drain(self: Replica, now_s: float) -> None:
        staging = self.staging
        if staging is not None and staging.end is None:
            for message in staging.stubs.take(now_s):
                update = _assemble(staging.parts, message)
                if update is not None:
                    self._stage_update(staging, Position(message.epoch, message.sequence), update)
        honest(self, now_s)

    patch.setattr(Replica, "drain", drain)


def a_damaged_frame_is_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sealed_frames.hmac, "compare_digest", lambda one, other: True)


def a_master_that_ends_says_that_nothing_was_done(patch: pytest.MonkeyPatch) -> None:
    honest = Master.wait

    def wait(self: Master, sequence: int, done: Any) -> None:
        honest(self, sequence, done and (lambda answer: done(Answer.NOT_DONE if answer is Answer.UNKNOWN else answer)))

    patch.setattr(Master, "wait", wait)


def what_was_said_to_a_master_counts_as_not_done(patch: pytest.MonkeyPatch) -> None:
    def answer(self: Waiting, answer: Answer) -> None:
        if self.done is not None:
            self.done(answer)

    patch.setattr(Waiting, "answer", answer)


def what_was_seen_counts_in_every_history(patch: pytest.MonkeyPatch) -> None:
    honest = Reports.confirm

    class Every:
        def has(self, position: Position) -> bool:
            return position != NOWHERE

    patch.setattr(Reports, "confirm", lambda self, history, confirmed: honest(self, Every(), confirmed))
    patch.setattr(Reports, "replaced", lambda self, directory, history: None)


def a_new_stream_across_a_wan_goes_on_where_the_last_one_was(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Master, "unlink", lambda self, node: None)
    patch.setattr(DirectoryNode, "_far_opened", lambda self: None)


def a_master_that_was_suspected_stays_so(patch: pytest.MonkeyPatch) -> None:
    honest = Master._look

    def look(self: Master, now_s: float) -> None:
        self._suspected.discard(self.me.name)
        honest(self, now_s)

    patch.setattr(Master, "_look", look)


def a_lease_that_comes_back_with_a_backup_never_ends(patch: pytest.MonkeyPatch) -> None:
    honest = RegistryTwin.put_back

    def put_back(self: RegistryTwin, backup: Backup) -> set[str]:
        return honest(self, replace(backup, leases={}))

    patch.setattr(RegistryTwin, "put_back", put_back)


def a_registry_that_was_put_back_is_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RegistryGuard, "admit", lambda self, there, home: "")


def a_registry_in_a_higher_life_is_taken_wherever_it_is(patch: pytest.MonkeyPatch) -> None:
    honest = RegistryGuard.admit
    patch.setattr(RegistryGuard, "admit", lambda self, there, home: honest(self, there, there.cluster_id))


def a_registry_is_made_whole_from_what_it_holds_alone(patch: pytest.MonkeyPatch) -> None:
    def state(me: Any, known: Any, present: MasterState | None) -> MasterState:
        return made_whole.state_from(me, [replace(each, epoch=0, state=None) for each in known], present)

    patch.setattr(directory, "state_from", state)


ROUGH = {"loss": 0.1, "kill": 240.0, "split": 120.0, "isolation": 240.0}
PUT_BACK = {"registry put back": 720.0, "kill": 360.0, "isolation": 360.0}
TWO_MASTERS = {"bridge": 240.0, "registry delay": 0.5}
CANARIES: dict[Patch, tuple[dict[str, float], str, int]] = {
    a_candidate_does_not_need_the_registry: (ROUGH | {"registry delay": 0.5}, "publish in epoch", 24),
    one_voter_is_a_majority: (ROUGH, "was confirmed", 20),
    what_is_taken_counts_as_persisted: (ROUGH | {"power of all": 240.0, "slow disk": 0.3}, "was confirmed", 16),
    one_promise_is_a_majority: (ROUGH | {"isolation": 600.0, "registry delay": 0.5}, "was confirmed", 20),
    a_voter_goes_on_listening_after_its_promise: (TWO_MASTERS, "was confirmed", 23),
    the_winner_keeps_its_own_copy: (ROUGH, "was confirmed", 1),
    a_process_goes_on_in_the_epoch_of_its_former_life: (
        {"kill": 360.0},
        "epochs and their starts rise|publish in epoch|another message",
        3,
    ),
    every_history_is_the_masters: (ROUGH, "has not what others have|another message|was confirmed", 0),
    messages_of_an_epoch_that_was_not_entered_are_taken: (TWO_MASTERS, "another message|has not what others", 50),
    a_snapshot_is_used_before_it_is_exact: ({"loss": 0.3}, "has not what others have", 19),
    a_snapshot_has_holes: ({}, "has not what others have there", 0),
    a_snapshots_deletions_are_taken_before_its_entries: (ROUGH, "has not what others have", 0),
    a_missing_message_is_skipped: ({"loss": 0.1}, "InvariantError|took message|has not what others have", 0),
    a_request_is_never_made_again: ({"loss": 0.3}, "is not active|is at", 0),
    a_damaged_frame_is_taken: ({"corruption": 0.1}, "MemoryError|another message|has not", 0),
    an_old_report_replaces_a_newer_one: ({"reordering": 0.9, "duplication": 0.9}, "its node says", 18),
    a_master_that_ends_says_that_nothing_was_done: (TWO_MASTERS, "answered with not done", 0),
    what_was_said_to_a_master_counts_as_not_done: (TWO_MASTERS, "answered with not done", 2),
    what_was_seen_counts_in_every_history: (TWO_MASTERS, "was confirmed", 23),
    nothing_expires: ({}, "has not expired", 0),
    what_is_kept_is_not_in_the_registry: ({}, "the registry keeps", 0),
    a_kept_change_that_was_lost_counts_as_made: (TWO_MASTERS, "was confirmed|the registry keeps", 2),
    a_master_changes_what_is_kept_whoever_is_the_master: (TWO_MASTERS, "the registry keeps", 2),
    a_master_that_was_suspected_stays_so: (ROUGH, "suspected of being dead", 13),
    a_lease_that_comes_back_with_a_backup_never_ends: (PUT_BACK, "is not active", 0),
    a_registry_that_was_put_back_is_taken: (PUT_BACK, "was confirmed", 0),
    a_registry_in_a_higher_life_is_taken_wherever_it_is: (
        PUT_BACK | {"kill": 720.0, "disk lost": 120.0, "registry outage": 240.0, "loss": 0.3},
        "was confirmed",
        55,
    ),
    a_registry_is_made_whole_from_what_it_holds_alone: (PUT_BACK, "epochs and their starts rise|is not active", 3),
    a_new_stream_across_a_wan_goes_on_where_the_last_one_was: ({"stream reset": 0.1}, "has not|is at", 0),
}


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.__name__)
def test_a_rule_that_is_taken_away_is_missed(canary: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    strengths, says, first = CANARIES[canary]
    found = []
    canary(monkeypatch)
    for seed in sorted(range(TRIES), key=lambda seed: seed != first):
        _, run = directory_run(seed, Mix(strengths))
        try:
            run.go()
        except (Exception, ViolationError) as error:
            found.append(f"{type(error).__name__}: {error}")
            if re.search(says, found[-1]):
                return
    pytest.fail(f"nobody noticed in {TRIES} runs; found was {Counter(found)}")

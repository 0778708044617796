"""Simulated clusters with production's directory on every node: nothing wrong is ever seen, everything converges.

Each promise of docs/directory.md has a canary: the rule that it rests on is taken away, and the simulator must notice.
"""

import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from metadata.directory.collecting import Collecting, Turn
from metadata.directory.confirmations import Confirmations
from metadata.directory.delegate import Delegate
from metadata.directory.election import Election
from metadata.directory.expiries import Expiries
from metadata.directory.history import History
from metadata.directory.kept import Kept
from metadata.directory.replica_store import ReplicaStore
from metadata.directory.stubs import Move, StubQueue
from metadata.directory.term import Term
from metadata.registry_calls import Outcome, Swap
from protocol.directory import Position
from tests.conftest import ROOT
from tests.simulation.cluster.directory import directory_run
from tests.simulation.cluster.faults import CATALOGUE, Mix
from tests.simulation.registers import ViolationError
from tests.simulation.seeds import try_seed

SEEDS = 100
CHUNK = 5
TRIES = 60  # runs in which a canary must be found
WORLD = "directory"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What the nodes log of refused frames is of no interest here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_wrong_is_seen_and_all_converges_when_it_is_healed(first: int) -> None:
    tried = [try_seed(WORLD, seed) for seed in range(first, first + CHUNK)]
    wrong = [f"seed {each.seed}: {each.wrong}\n    {each.again}" for each in tried if each.wrong]
    assert not wrong, "\n".join(wrong)


def test_the_fixed_seeds_meet_every_fault_and_every_answer() -> None:
    hits: Counter[str] = Counter()
    for seed in range(SEEDS):
        scenario, run = directory_run(seed)
        run.go()
        hits.update(run.cluster.hits)
        hits.update(scenario.answers)
        hits["compared"] += scenario.judge.compared
        hits["masters"] += len(scenario.judge.masters) - 1
        if all(hits[fault.name] for fault in CATALOGUE) and seed > 15:
            break
    assert not [fault.name for fault in CATALOGUE if not hits[fault.name]]
    for name in ("CONFIRMED", "NOT_DONE", "UNKNOWN", "compared", "masters"):
        assert hits[name] > 10, f"{name}: {hits[name]}"


def test_the_same_seed_gives_the_same_run_in_every_process() -> None:
    seed = 7
    here = try_seed(WORLD, seed)
    program = "\n".join(
        (
            "import logging; logging.disable()",
            "from tests.simulation.seeds import try_seed",
            f"print(try_seed({WORLD!r}, {seed}).fingerprint)",
        )
    )
    prints = {here.fingerprint, try_seed(WORLD, seed).fingerprint}
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        prints.add(done.stdout.strip())
    assert len(prints) == 1
    assert here.events > 1000
    assert try_seed(WORLD, seed + 1).fingerprint not in prints


# --- canaries ---------------------------------------------------------------------------------------------------------

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


ROUGH = {"loss": 0.1, "kill": 240.0, "split": 120.0, "isolation": 240.0}
CANARIES: dict[Patch, tuple[dict[str, float], str]] = {
    a_candidate_does_not_need_the_registry: (ROUGH | {"registry delay": 0.5}, "publish in epoch"),
    one_voter_is_a_majority: (ROUGH, "was confirmed"),
    what_is_taken_counts_as_persisted: (ROUGH | {"power of all": 240.0, "slow disk": 0.3}, "was confirmed"),
    the_winner_keeps_its_own_copy: (ROUGH, "was confirmed"),
    a_snapshot_has_holes: ({}, "has not what others have there"),
    every_history_is_the_masters: (ROUGH, "has not what others have|another message|was confirmed"),
    a_missing_message_is_skipped: ({"loss": 0.1}, "InvariantError|took message|has not what others have"),
    a_request_is_never_made_again: ({"loss": 0.3}, "is not active|is at"),
    an_old_report_replaces_a_newer_one: ({"reordering": 0.9, "duplication": 0.9}, "its node says"),
    nothing_expires: ({}, "has not expired"),
    what_is_kept_is_not_in_the_registry: ({}, "the registry keeps"),
}


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.__name__)
def test_a_rule_that_is_taken_away_is_missed(canary: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    strengths, says = CANARIES[canary]
    found = []
    canary(monkeypatch)
    for seed in range(TRIES):
        _, run = directory_run(seed, Mix(strengths))
        try:
            run.go()
        except (Exception, ViolationError) as error:
            found.append(f"{type(error).__name__}: {error}")
            if re.search(says, found[-1]):
                return
    pytest.fail(f"nobody noticed in {TRIES} runs; found was {Counter(found)}")

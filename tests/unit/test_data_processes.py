"""What several data processes know of each other, and how they answer as one."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node.export_table import ExportTable
from nbdserver.node.shared_figures import SharedBudget, SharedCensus, SharedFigures
from nbdserver.node.worker_answers import merged

LISTING = {"description": "", "allowed": [], "tls": "inherit"}


# --- the table of exports ---


def test_what_one_says_of_its_exports_is_told_to_the_others_once() -> None:
    table = ExportTable(3)
    table.note(1, "disk0", LISTING)
    table.note(1, "disk0", None)
    table.note(2, "disk1", LISTING)
    assert table.take_changes() == {1: {"disk0": None}, 2: {"disk1": LISTING}}
    assert table.take_changes() == {}
    assert table.others(2) == {}
    assert table.others(0) == {2: {"disk1": LISTING}}


def test_one_that_is_started_again_is_known_by_what_it_had_until_it_has_said_what_it_has() -> None:
    table = ExportTable(2)
    for name in ("kept", "gone"):
        table.note(1, name, LISTING)
    table.take_changes()
    table.begins(1)
    assert table.others(0) == {1: {"kept": LISTING, "gone": LISTING}}
    table.note(1, "kept", LISTING)
    table.note(1, "new", LISTING)
    table.has_begun(1)
    assert table.take_changes() == {1: {"kept": LISTING, "new": LISTING, "gone": None}}
    assert table.others(0) == {1: {"kept": LISTING, "new": LISTING}}


def test_the_snapshots_of_all_of_them_are_told_apart_from_volumes() -> None:
    table = ExportTable(2)
    snapshot = LISTING | {"created_s": 1, "size_bytes": 4096}
    table.note(0, "disk0", LISTING)
    table.note(0, "disk0@b", snapshot)
    table.note(1, "disk1@a", snapshot)
    table.note(1, "disk1@c", snapshot)
    table.note(1, "disk1@c", None)
    assert table.snapshots() == {"disk0@b": snapshot, "disk1@a": snapshot}


# --- answers ---


@given(st.lists(st.sets(st.integers(0, 60).map(lambda number: f"{number:02}"), max_size=20), min_size=1, max_size=4))
def test_pages_of_several_processes_bring_every_family_once_or_more_and_come_to_an_end(parts: list[set[str]]) -> None:
    page = 3

    def answer(part: set[str], after: str) -> dict[str, object]:
        rest = sorted(family for family in part if family > after)
        last = rest[page - 1] if len(rest) > page else ""
        return {"families": dict.fromkeys(rest[:page], True), "last": last}

    found: set[str] = set()
    after = ""
    for _ in range(1 + sum(map(len, parts))):
        merged_page = merged("volumes", [answer(part, after) for part in parts])
        found |= set(merged_page["families"])
        if not merged_page["last"]:
            break
        assert merged_page["last"] > after
        after = merged_page["last"]
    else:
        raise AssertionError("the pages do not come to an end")
    assert found == set().union(*parts)


def test_figures_of_the_node_are_sums_but_for_the_longest_turn() -> None:
    def answer(worker: int, handshakes: int, longest_s: float, last: str) -> dict[str, Any]:
        gauges = {"connections": 2, "loop_longest_turn_seconds": longest_s}
        node = {"counters": {"tls_handshakes": handshakes}, "gauges": gauges}
        return {"worker": worker, "node": node, "volumes": {}, "last": last}

    answers = [answer(0, 3, 0.1, ""), answer(1, 4, 0.3, "ff")]
    together = merged("counters", answers)
    assert together["node"]["counters"] == {"tls_handshakes": 7}
    assert together["node"]["gauges"] == {"connections": 4, "loop_longest_turn_seconds": 0.3}
    assert together["workers"] == {"0": answers[0]["node"], "1": answers[1]["node"]}
    assert together["last"] == "ff"


def test_clients_stand_by_number_and_one_that_was_disconnected_was_somewhere() -> None:
    assert merged("clients", [[{"id": 3}], [{"id": 1}, {"id": 4}]]) == [{"id": 1}, {"id": 3}, {"id": 4}]
    assert merged("disconnect", [False, True]) is True
    assert merged("disconnect", [False, False]) is False


# --- figures in shared memory ---


@pytest.fixture
def page() -> Iterator[int]:
    descriptor = SharedFigures.make(3)
    yield descriptor
    os.close(descriptor)


def test_no_number_of_a_client_is_given_twice_whichever_process_gives_it_and_whichever_dies(page: int) -> None:
    censuses = [SharedCensus(SharedFigures(page, 3), worker, 3) for worker in range(3)]
    censuses[1].used(100)  # a client that was handed over
    given: list[int] = []
    for turn in range(40):
        given.append(censuses[turn % 7 % 3].next_id())
        if turn == 20:
            SharedFigures(page, 3).clear(1)
    assert len(set(given)) == len(given)
    assert min(given) > 100


def test_the_numbers_of_one_process_alone_are_in_order() -> None:
    descriptor = SharedFigures.make(1)
    census = SharedCensus(SharedFigures(descriptor, 1), 0, 1)
    os.close(descriptor)
    assert [census.next_id() for _ in range(3)] == [1, 2, 3]


def test_clients_and_bytes_count_for_all_until_their_process_ends(page: int) -> None:
    figures = [SharedFigures(page, 3) for _ in range(3)]
    censuses = [SharedCensus(figures[worker], worker, 3) for worker in range(3)]
    budgets = [SharedBudget(figures[worker], worker) for worker in range(3)]
    for worker, budget in enumerate(budgets):
        budget.limit_bytes = 100
        budget.use(40)
        censuses[worker].note(worker + 1)
    assert [census.others() for census in censuses] == [5, 4, 3]
    assert [budget.overdrawn_bytes for budget in budgets] == [20] * 3
    budgets[0].use(-30)
    assert [budget.left_bytes(50) for budget in budgets] == [10] * 3
    figures[0].clear(1)
    assert [census.others() for census in censuses] == [3, 4, 1]
    assert [budget.left_bytes(70) for budget in budgets] == [50] * 3

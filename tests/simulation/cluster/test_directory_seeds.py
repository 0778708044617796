"""Seeds that once found something wrong in the directory: what it was, and that they find nothing now."""

import pytest

from tests.simulation.cluster.directory import directory_run
from tests.simulation.cluster.faults import Mix

FOUND = {
    3: "a second-kind node joined over a stream whose other end was gone, for ever",
    8: "a joiner kept asking a dead master of the epoch that it had heard",
    23: "a second-kind node gave its stream up again and again, for a suspicion older than it",
    95: "a report was answered as confirmed in another history",
    125: "a node whose first write failed did not start",
    415: "a filtered snapshot left stubs that nobody filled",
    5105: "what a node said of itself was overtaken by what it got with a snapshot, and refused for ever",
    1795647399055: "the judge expected of a master that stood still what a newer one had confirmed between two looks",
    1795664202007: "a registry without a directory was made whole with voters who had never met, and none could lead",
    112737005583: "a frame with a damaged length held up all that a node said over its stream, for ever",
    478502801138: "the judge took the master that a registry named for the newest, which had been put back",
    569: "a report that had been published was answered with not done",
}


@pytest.mark.parametrize("seed", FOUND, ids=str)
def test_a_seed_that_found_something_finds_nothing_now(seed: int) -> None:
    _, run = directory_run(seed)
    run.go()


def test_what_a_master_said_of_itself_is_said_again_when_its_term_was_for_nothing() -> None:
    _, run = directory_run(25, Mix({"registry outage": 900.0, "isolation": 3000.0}))
    run.go()

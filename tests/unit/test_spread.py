"""On which nodes replicas are put."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node.errors import ConflictError
from nbdserver.node.spread import Place, choose, for_family

GIB = 1 << 30


def test_replicas_are_spread_over_fault_domains_before_room_counts() -> None:
    places = [
        Place("n1", "rack1", 900 * GIB),
        Place("n2", "rack1", 800 * GIB),
        Place("n3", "rack2", 100 * GIB),
        Place("n4", "rack3", 50 * GIB),
    ]
    assert choose(places, 3) == ("n1", "n3", "n4")
    assert choose(places, 4) == ("n1", "n3", "n4", "n2")


def test_what_is_kept_stays_and_the_asked_node_comes_before_others_as_good() -> None:
    places = [Place("n1", "a", 9 * GIB), Place("n2", "b", 5 * GIB), Place("n3", "c", 7 * GIB)]
    assert choose(places, 2, first="n2") == ("n2", "n1")
    assert choose(places, 2, kept=["n2"]) == ("n2", "n1")
    assert choose(places, 3, kept=["n2", "n1"]) == ("n2", "n1", "n3")


def test_too_few_nodes_are_refused_with_what_is_in_the_way() -> None:
    places = [Place("n1", "a", GIB), Place("n2", "b", GIB, "is silent"), Place("n3", "c", GIB, "is being drained")]
    with pytest.raises(ConflictError, match=r"need as many nodes, and there are 1 .*n2 is silent, n3 is being"):
        choose(places, 2)


def test_a_node_that_cannot_promise_the_size_gets_no_new_replica_and_keeps_the_one_that_it_has() -> None:
    places = [Place("n1", "a", 9 * GIB, promisable_bytes=2 * GIB), Place("n2", "b", GIB, promisable_bytes=5 * GIB)]
    places.append(Place("n3", "c", GIB))
    assert choose(for_family(places, 2 * GIB), 2) == ("n1", "n2")
    assert choose(for_family(places, 3 * GIB), 2) == ("n2", "n3")
    assert choose(for_family(places, 3 * GIB, kept=["n1"]), 3, kept=["n1"]) == ("n1", "n2", "n3")
    with pytest.raises(ConflictError, match=r"n1 may promise 2.0 GiB more, not 6.0 GiB \(overcommit\)"):
        choose(for_family(places, 6 * GIB), 2)


@given(
    st.lists(
        st.builds(Place, st.sampled_from([f"n{i}" for i in range(8)]), st.sampled_from("abc"), st.integers(0, GIB)),
        unique_by=lambda place: place.node,
        min_size=1,
    ),
    st.integers(1, 8),
)
def test_no_fault_domain_has_two_more_than_one_that_could_have_taken_one(places: list[Place], replicas: int) -> None:
    if replicas > len(places):
        with pytest.raises(ConflictError):
            choose(places, replicas)
        return
    chosen = choose(places, replicas)
    assert len(set(chosen)) == replicas
    taken = Counter(place.fault_domain for place in places if place.node in chosen)
    for place in places:
        if place.node not in chosen:
            assert max(taken.values()) <= taken[place.fault_domain] + 1

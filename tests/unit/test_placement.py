"""Families are spread evenly, in the same way at every start, and stay where they are meanwhile."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from metadata.registry import Family, Volume
from nbdserver.node.placement import Placement, worker_of


def family(number: int, sizes: list[int]) -> Family:
    volumes = tuple(Volume(index, f"v{number}-{index}", size) for index, size in enumerate(sizes, 1))
    return Family(id=f"{number:032x}", segment_bytes=1 << 20, owner="", volumes=volumes)


FAMILIES = st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=5), max_size=30).map(
    lambda all_sizes: [family(number, sizes) for number, sizes in enumerate(all_sizes)]
)


@given(FAMILIES, st.integers(1, 8), st.randoms())
def test_families_are_spread_evenly_and_in_the_same_way_at_every_start(families, workers, random) -> None:  # type: ignore[no-untyped-def]
    placement, again = Placement(workers), Placement(workers)
    placement.place_all(families)
    shuffled = list(families)
    random.shuffle(shuffled)
    again.place_all(shuffled)
    assert [placement.worker(one.id) for one in families] == [again.worker(one.id) for one in families]
    loads = [sum(len(one.volumes) for one in placement.families(worker, families)) for worker in range(workers)]
    assert sum(loads) == sum(len(one.volumes) for one in families)
    assert max(loads) - min(loads) <= max((len(one.volumes) for one in families), default=0)


def test_four_volumes_are_two_on_each_of_two_processes() -> None:
    placement = Placement(2)
    families = [family(number, [1 << 30]) for number in range(4)]
    placement.place_all(families)
    assert [len(placement.families(worker, families)) for worker in range(2)] == [2, 2]


def test_a_new_family_goes_where_least_is_and_no_other_moves() -> None:
    placement = Placement(3)
    families = [family(0, [10]), family(1, [10, 10]), family(2, [20])]
    placement.place_all(families)
    before = [placement.worker(one.id) for one in families]
    assert sorted(str(worker) for worker in before) == ["0", "1", "2"]
    new = family(3, [1])
    assert placement.worker(new.id) is None
    assert placement.place(new.id, families) == before[0]
    assert [placement.worker(one.id) for one in families] == before


def test_what_was_deleted_leaves_room() -> None:
    placement = Placement(2)
    families = [family(number, [1]) for number in range(4)]
    placement.place_all(families)
    left = placement.families(0, families)
    new = family(9, [1])
    assert placement.place(new.id, left) == 1


def test_a_replica_is_in_the_process_that_its_id_says_and_counts_there() -> None:
    placement = Placement(2)
    replicas = [replace(family(number, [10]), replicas=3) for number in (1, 3)]
    own = [family(number, [10]) for number in (4, 6)]
    placement.place_all([*own, *replicas])
    assert [placement.worker(one.id) for one in replicas] == [worker_of(one.id, 2) for one in replicas] == [1, 1]
    assert [placement.worker(one.id) for one in own] == [0, 0]

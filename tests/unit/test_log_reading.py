"""The log read back: what follows a modification, or that it does not go back that far."""

import random
from collections.abc import Callable, Sequence

import pytest

from protocol.peer import BEGINNING, Modification, Position
from tests.unit.families import BLOCK_BYTES
from tests.unit.replica_rig import ReplicaFamily


def owner() -> tuple[ReplicaFamily, list[Modification]]:
    family = ReplicaFamily()
    told: list[Modification] = []
    family.own(1, told.append)
    return family, told


def read(family: ReplicaFamily, after: Position, limit_bytes: int = 1 << 20) -> Sequence[Modification] | None:
    errno, found = family.wait(lambda done: family.replica.modifications(after, limit_bytes, done))
    assert errno == 0
    return found  # type: ignore[no-any-return]


def plain(modifications: Sequence[Modification]) -> list[tuple[object, ...]]:
    return [(m.position, m.kind, m.layer, m.extents, m.blocks, m.body, b"".join(m.data)) for m in modifications]


def test_what_was_ordered_is_read_back_from_any_place_in_any_pieces() -> None:
    family, told = owner()
    rng = random.Random(1)
    for number in range(80):
        family.put(rng.randrange(300), number + 1, count=rng.choice([1, 1, 5, 30]))
        if number % 20 == 7:
            family.discard(rng.randrange(300) * BLOCK_BYTES, 20 * BLOCK_BYTES)
            assert family.change("snapshot", 1, f"s{number}", 0) == 0
    assert len(family.disk.maps.segments.in_use) > 5
    for limit_bytes in (1, 50_000, 1 << 30):
        after, found = BEGINNING, []
        while piece := read(family, after, limit_bytes):
            found += piece
            after = piece[-1].position
        assert plain(found) == plain(told)
    for at in range(0, len(told), 9):
        piece = read(family, told[at].position, 1 << 30)
        assert piece is not None
        assert plain(piece) == plain(told[at + 1 :])
    assert read(family, family.replica.last) == []


def test_moves_of_the_cleaner_are_passed_over() -> None:
    family, told = owner()
    for number in range(60):
        family.put(number, number + 1)
    for number in range(0, 60, 2):
        family.put(number, 100 + number)
    family.replica.set_committed(family.replica.last.txid)
    family.run(2.0)  # files are made ahead
    family.disk.cleaner.urgent = True
    assert family.disk.cleaner.start()
    family.run(1.0)
    assert family.disk.cleaner.blocks_moved
    family.put(3, 999)
    found = read(family, told[70].position)
    assert found is not None
    assert plain(found) == plain(told[71:])


def test_a_log_that_was_recycled_or_is_another_says_that_it_does_not_go_back_so_far() -> None:
    family, told = owner()
    for number in range(200):
        family.put(number % 4, number + 1)
        family.replica.set_committed(family.replica.last.txid)
        if number % 20 == 0:
            family.checkpoint()
    assert family.disk.pool.recycled
    assert read(family, BEGINNING) is None
    assert read(family, Position(0, 150)) is None
    assert read(family, Position(1, 1000)) is None
    found = read(family, told[-2].position)
    assert found is not None
    assert plain(found) == plain(told[-1:])


def test_a_rotten_block_is_not_sent() -> None:
    family, told = owner()
    for number in range(10):
        family.put(number, number + 1)
    content = family.drive.files["segments/00000001.seg"].content
    at = content.find(b"".join(told[5].data)[:64])
    content[at] ^= 1
    found = read(family, BEGINNING)
    assert found is not None
    assert plain(found) == plain(told[:5])
    assert read(family, told[4].position) is None


def test_what_was_cut_away_is_not_read() -> None:
    family, told = owner()
    for number in range(40):
        family.put(number, number + 1)
    family.crash()
    family.open()
    assert family.cut(told[9].position) == 0
    family.look()
    assert family.replica.last == told[9].position
    again: list[Modification] = []
    family.own(2, again.append)
    for number in range(40):
        family.put(number, 100 + number)
    found = read(family, BEGINNING, 1 << 30)
    assert found is not None
    assert plain(found) == plain(told[:10] + again)


def test_records_that_are_longer_than_what_is_read_at_a_time_are_not_read_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, told = owner()
    for number in range(20):
        family.put(8 * number, number + 1, count=8)
    reading = family.replica._reading
    reading.piece_bytes = 32_768  # a record is that and its header
    read_bytes = 0
    read_later = family.files.read_later

    def counted(handle: int, extents: Sequence[tuple[int, int]], done: Callable[[int, list[bytes]], None]) -> None:
        nonlocal read_bytes
        read_bytes += sum(length for length, _ in extents)
        read_later(handle, extents, done)

    monkeypatch.setattr(family.files, "read_later", counted)
    found = read(family, BEGINNING, 1 << 30)
    assert found is not None
    assert plain(found) == plain(told)
    assert read_bytes < 1.5 * 20 * 8 * BLOCK_BYTES


def test_it_is_told_about_how_long_the_log_is_behind_a_place() -> None:
    family, told = owner()
    for number in range(40):
        family.put(number, number + 1, count=4)
    replica = family.replica
    whole = replica.log_bytes_after(0)
    assert 40 * 4 * BLOCK_BYTES < whole < 1.2 * 40 * 4 * BLOCK_BYTES
    assert replica.log_bytes_after(told[-1].txid) == 0
    for at, modification in enumerate(told):
        assert abs(replica.log_bytes_after(modification.txid) - whole * (1 - (at + 1) / len(told))) < 8 * BLOCK_BYTES

"""The simulator itself: a page cache that loses what it may, a store of whole batches, a judge who is not fooled."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from metadata.seams import Clock, Files, Store
from tests.simulation.faults import FaultMix
from tests.simulation.registers import BLOCK_BYTES, MOST_CONTENTS, ZEROS, Registers, ViolationError, pattern
from tests.simulation.simulated_files import SimulatedDrive, SimulatedFiles
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.world import SimulatedClock, SimulatedCrash, World

OLD, NEW = b"o" * 4096, b"n" * 4096


def _life(seed: int = 1, **mix: float) -> tuple[SimulatedDrive, SimulatedClock, SimulatedFiles]:
    world = World(seed)
    drive = SimulatedDrive(world, 1 << 30)
    clock = SimulatedClock(world)
    fields: dict[str, Any] = {"cold_read": 0.0, **mix}
    return drive, clock, SimulatedFiles(drive, clock, FaultMix(**fields))


def _durable_file(files: SimulatedFiles, blocks: int) -> int:
    handle = files.create("a", blocks * 4096)
    files.append(handle, [OLD] * blocks, 0)
    files.fdatasync([handle])
    files.sync_directory("")
    return handle


def _after_power_loss(write: Callable[[SimulatedClock, SimulatedFiles, int], None], **mix: float) -> set[bytes]:
    """All contents of the first page that power cuts of many seeds leave."""
    found = set()
    for seed in range(60):
        drive, clock, files = _life(seed, **mix)
        handle = _durable_file(files, 4)
        write(clock, files, handle)
        files.crash(power=True)
        found.add(bytes(drive.files["a"].content[:4096]))
    return found


def test_the_twins_are_seams() -> None:
    drive, clock, files = _life()
    seams: tuple[Clock, Files, Store] = (
        clock,
        files,
        SimulatedStore(SimulatedTable(drive.world), clock, files.mix, files.world_ends),
    )
    assert len(seams) == 3


def test_kill_keeps_what_was_written() -> None:
    drive, _, files = _life()
    handle = _durable_file(files, 1)
    files.append(handle, [NEW], 0)
    files.crash(power=False)
    assert drive.files["a"].content == NEW


def test_a_power_cut_may_take_back_or_keep_or_tear_what_was_not_synced() -> None:
    found = _after_power_loss(lambda clock, files, handle: files.append(handle, [NEW], 0), tear=0.5)
    assert {OLD, NEW} < found
    assert all(set(page[at : at + 512]) in ({111}, {110}) for page in found for at in range(0, 4096, 512))


def test_a_power_cut_takes_nothing_back_that_was_synced() -> None:
    def write(clock: SimulatedClock, files: SimulatedFiles, handle: int) -> None:
        files.append(handle, [NEW], 0)
        files.fdatasync_later([handle], lambda number: None)
        clock.run(10.0)

    assert _after_power_loss(write) == {NEW}


def test_what_is_written_during_a_sync_is_not_covered_by_it() -> None:
    newer = b"+" * 4096

    def write(clock: SimulatedClock, files: SimulatedFiles, handle: int) -> None:
        files.append(handle, [NEW], 0)
        files.fdatasync_later([handle], lambda number: None)
        files.append(handle, [newer], 0)
        clock.run(10.0)

    assert _after_power_loss(write, tear=0.0) == {NEW, newer}


def test_after_a_failed_sync_a_second_one_does_not_help_but_writing_again_does() -> None:
    def write_once(clock: SimulatedClock, files: SimulatedFiles, handle: int, again: bool = False) -> None:
        files.append(handle, [NEW], 0)
        files.mix = FaultMix(cold_read=0.0, sync_error=1.0)
        with pytest.raises(OSError):
            files.fdatasync([handle])
        files.mix = FaultMix(cold_read=0.0)
        assert files.read(handle, 4096, 0) == NEW
        if again:
            files.append(handle, [NEW], 0)
        files.fdatasync([handle])

    assert _after_power_loss(write_once) == {OLD}
    assert _after_power_loss(lambda clock, files, handle: write_once(clock, files, handle, again=True)) == {NEW}


def test_names_are_durable_only_after_their_directory_was_synced() -> None:
    present = set()
    for seed in range(30):
        drive, _, files = _life(seed)
        files.create("kept", 4096)
        files.sync_directory("")
        files.unlink("kept")
        files.create("new", 4096)
        files.crash(power=True)
        present.add(tuple(sorted(drive.files)))
    assert present == {(), ("kept",), ("new",), ("kept", "new")}


def test_a_planned_crash_tears_an_append() -> None:
    lengths = set()
    for seed in range(30):
        drive, _, files = _life(seed)
        handle = files.create("a", 8)
        files.operations_left = 0
        with pytest.raises(SimulatedCrash):
            files.append(handle, [b"12345678"], 0)
        files.crash(power=False)
        lengths.add(len(bytes(drive.files["a"].content).rstrip(b"\0")))
    assert lengths == set(range(9))


def test_a_batch_in_flight_at_a_crash_is_there_whole_or_not_at_all() -> None:
    found = set()
    for seed in range(20):
        drive, clock, files = _life(seed)
        table = SimulatedTable(drive.world)
        store = SimulatedStore(table, clock, files.mix, files.world_ends)
        batch = store.batch()
        batch.put(b"a", b"1")
        batch.put(b"b", b"2")
        store.write_later(batch, lambda number: None)
        assert store.get(b"a") is None
        store.crash()
        found.add(tuple(table.values))
    assert found == {(), (b"a", b"b")}


def test_a_full_device_says_so_and_makes_no_file() -> None:
    drive, _, files = _life()
    drive.capacity_bytes = 4096
    with pytest.raises(OSError) as caught:
        files.create("a", 8192)
    assert caught.value.errno == errno.ENOSPC
    assert files.list("") == []


# The judge.


def _write(registers: Registers, label: int, offset: int = 0, length: int = BLOCK_BYTES) -> bytes:
    data = pattern(label, offset, length)
    registers.answer(registers.ask("write", offset, data, length))
    return data


def test_the_judge_wants_what_was_answered() -> None:
    registers = Registers()
    data = _write(registers, 1)
    registers.read(0, data)
    with pytest.raises(ViolationError):
        registers.read(0, ZEROS)
    with pytest.raises(ViolationError):
        registers.recovered(0, ZEROS, power=False, lying=False)


def test_the_judge_lets_a_power_cut_go_back_to_the_last_flush_and_no_further() -> None:
    for content_of, allowed in ((0, False), (1, True), (2, True)):
        registers = Registers()
        versions = [ZEROS, _write(registers, 1)]
        registers.flushed(registers.tick())
        versions.append(_write(registers, 2))
        if allowed:
            registers.recovered(0, versions[content_of], power=True, lying=False)
            registers.recovered(0, versions[content_of], power=True, lying=False)
        else:
            with pytest.raises(ViolationError):
                registers.recovered(0, versions[content_of], power=True, lying=False)


def test_the_judge_takes_any_order_of_what_overlaps_but_not_a_mixture() -> None:
    for winner in (1, 2):
        registers = Registers()
        asked = [registers.ask("write", 0, pattern(label, 0, BLOCK_BYTES), BLOCK_BYTES) for label in (1, 2)]
        for changes in asked:
            registers.answer(changes)
        registers.read(0, pattern(winner, 0, BLOCK_BYTES))
        with pytest.raises(ViolationError):  # what was read once is what is
            registers.read(0, pattern(3 - winner, 0, BLOCK_BYTES))
    registers = Registers()
    for label in (1, 2):
        registers.ask("write", 0, pattern(label, 0, BLOCK_BYTES), BLOCK_BYTES)
    half = BLOCK_BYTES // 2
    with pytest.raises(ViolationError):
        registers.read(0, pattern(1, 0, half) + pattern(2, half, half))


def test_the_judge_knows_a_stranger() -> None:
    registers = Registers()
    _write(registers, 1, 0)
    data = _write(registers, 2, BLOCK_BYTES)
    with pytest.raises(ViolationError, match="a state of block 1"):
        registers.read(0, data)


def test_the_judge_remembers_an_open_discard_of_blocks_it_meets_later() -> None:
    registers = Registers()
    discard = registers.ask("discard", 0, None, 1 << 40)
    data = _write(registers, 1)
    registers.read(0, data)
    registers.read(0, ZEROS)
    registers.answer(discard)
    registers.read(0, ZEROS)
    with pytest.raises(ViolationError):
        registers.read(0, data)


def test_a_block_whose_content_is_too_doubtful_is_busy_until_it_was_read() -> None:
    registers = Registers()
    for number in range(100):
        if registers.is_busy(0, BLOCK_BYTES):
            break
        changes = registers.ask(f"write {number}", 16 * number, bytes([number + 1]) * 16, 16)
        registers.doubt(changes)
    (register,) = registers.blocks.values()
    assert len(register.now()) == MOST_CONTENTS
    registers.read(0, min(register.now()))
    assert not registers.is_busy(0, BLOCK_BYTES)

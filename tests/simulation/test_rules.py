"""Each ordering rule is needed: without it some run breaks a promise, with it the same run does not.

The seeds are not fixed, because a seed's story changes with the product; each rule has a *bend* that makes its moment
frequent, and the first seeds of that are searched.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from nbdserver.block import Operation
from nbdserver.logdisk.disk import DiskError, DiskSettings, LogDisk
from nbdserver.logdisk.ordering import CRASH_POINTS, OF_REPLICAS, Rule, disabled
from nbdserver.logdisk.recovery import Replay
from tests.simulation.faults import FaultMix
from tests.simulation.run import try_seed
from tests.simulation.simulated_files import SimulatedDrive, SimulatedFiles
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.sizes import Bend
from tests.simulation.test_layer_rules import (
    compare_with_the_newest_named_one,
    merge_into_one_of_several,
    shrink_by_the_size_alone,
)
from tests.simulation.world import SimulatedClock, World

SEEDS = 150
ERRORS = ("read_error", "append_error", "sync_error", "store_read_error", "store_write_error", "create_error")
HONEST = {**dict.fromkeys(ERRORS, 0.0), "room_segments": 1000}
SLOW = {**HONEST, "slow": 1.0, "latency_s": 0.001}
POWER = {**HONEST, "power": 1.0}

BENDS = {
    Rule.FLUSH_OLDEST_FIRST: Bend(POWER, hot=True),
    Rule.CHECKPOINT_BEHIND_SYNC: Bend(POWER),
    Rule.FREE_ONLY_IN_CHECKPOINT: Bend(SLOW, hot=True),
    Rule.REUSE_AFTER_BATCH_SYNCED: Bend(SLOW, hot=True),
    Rule.NAME_DURABLE_FIRST: Bend(POWER, hot=True),
    Rule.REUSE_AFTER_READERS_LEFT: Bend({**SLOW, "slow": 0.2, "cold_read": 0.5}, hot=True),
    Rule.MOVE_ONLY_IF_UNCHANGED: Bend(HONEST),
    Rule.TAIL_SYNCED_BEFORE_SERVING: Bend({**POWER, "power": 0.5}),
    Rule.ACK_AFTER_APPEND: Bend({**HONEST, "append_error": 0.02, "power": 0.0}),
    Rule.FSYNC_FAILURE_IS_FATAL: Bend({**POWER, "sync_error": 0.3}),
    Rule.SALT_DRAWN_PER_LIFE: Bend(HONEST, hot=True),
    Rule.MERGE_FREES_WHAT_IS_HIDDEN: Bend(HONEST, snapshots=0.3),
    Rule.MERGED_ENTRIES_STAY: Bend(HONEST, snapshots=0.3),
    Rule.TREE_SYNCED_BEFORE_REPORT: Bend(POWER, snapshots=0.5),
    Rule.REPLAY_VERIFIES_DATA: Bend({**POWER, "tear": 1.0}),
}


def _first_violation(bend: Bend) -> tuple[int, str]:
    for seed in range(SEEDS):
        message = try_seed(seed, bend)[0]
        if message:
            return seed, message
    return -1, ""


@pytest.mark.parametrize("rule", BENDS, ids=lambda rule: rule.name)
def test_without_the_rule_a_promise_is_broken(rule: Rule) -> None:
    with disabled(rule):
        seed, message = _first_violation(BENDS[rule])
    assert message, f"{SEEDS} runs without the rule went well: {rule.value}"
    assert not try_seed(seed, BENDS[rule])[0]


def _read_through_a_hole_below_what_was_durable() -> bytes:
    """Three flushed writes, kill -9, the first of them rots in the log: what a recovery makes of the second."""
    world = World(1)
    drive, table = SimulatedDrive(world, 1 << 30), SimulatedTable(world)

    def begin_life(epoch: int) -> tuple[LogDisk, SimulatedClock, SimulatedFiles]:
        clock = SimulatedClock(world)
        files = SimulatedFiles(drive, clock, FaultMix(cold_read=0.0))
        store = SimulatedStore(table, clock, files.mix, files.world_ends)
        if epoch == 1:
            LogDisk.format(files, store, bytes(16), 64 * 4096, 1 << 16, world.random)
        disk = LogDisk.open(
            files, store, clock, world.random, DiskSettings(), epoch, "0" * 36, lambda kind, fields: None
        )
        return disk, clock, files

    disk, clock, files = begin_life(1)
    for number in range(3):
        answers: list[int] = []
        content = bytes([number + 1]) * 4096
        disk.head(1).later(Operation.WRITE, number * 4096, 4096, content, partial(_note, answers))
        clock.run(1.0)
        disk.flush(answers.append)
        clock.run(1.0)
        assert answers == [0, 0]
    files.crash(power=False)
    segment = drive.files["segments/00000001.seg"].content
    at = segment.find(bytes([1]) * 4096)
    assert at > 0
    segment[at] ^= 1
    disk, clock, _ = begin_life(2)
    read: list[Any] = []
    disk.head(1).later(Operation.READ, 4096, 4096, None, lambda errno, data: read.append(data))
    clock.run(1.0)
    return b"".join(read[0])


def _note(answers: list[int], errno: int, _: object) -> None:
    answers.append(errno)


def test_a_log_that_ends_below_what_was_durable_is_refused() -> None:
    with pytest.raises(DiskError, match="damaged"):
        _read_through_a_hole_below_what_was_durable()


def test_without_that_rule_flushed_data_is_lost_silently() -> None:
    with disabled(Rule.LOG_ENDS_ONLY_ABOVE_DURABLE):
        assert _read_through_a_hole_below_what_was_durable() == bytes(4096)  # it was 2, 2, 2, ... and flushed


def test_every_rule_has_its_test() -> None:
    assert set(BENDS) | {Rule.LOG_ENDS_ONLY_ABOVE_DURABLE} | set(OF_REPLICAS) == set(Rule)
    assert set(CRASH_POINTS.values()) <= set(Rule)


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary: a flush that is answered too early, as if every device kept what it was given."""
    monkeypatch.setattr(LogDisk, "flush", lambda disk, done: disk.clock.call_soon(lambda: done(0)))
    assert "after a power loss" in _first_violation(Bend({**POWER, "tear": 0.0}))[1]


def test_a_planted_bug_in_recovery_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another: replay forgets discards."""
    monkeypatch.setattr(Replay, "_apply_hole", lambda replay, lba, count: None)
    assert "ViolationError" in _first_violation(Bend(HONEST))[1]


@pytest.mark.parametrize(
    "plant", [compare_with_the_newest_named_one, merge_into_one_of_several, shrink_by_the_size_alone]
)
def test_planted_bugs_in_layers_are_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: Any) -> None:
    """By clones, which share with others what a volume alone would not."""
    plant(monkeypatch)
    bend = Bend(HONEST, snapshots=0.4)  # some runs end earlier, at an address that leads nowhere
    assert any("ViolationError" in try_seed(seed, bend)[0] for seed in range(SEEDS))

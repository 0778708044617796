"""Plays: for each rule that chance meets too rarely, the few steps after which it is all that stands.

Each raises ViolationError if something is wrong in the end, or on the way.
"""

from collections.abc import Callable

from protocol.peer import Position
from tests.simulation.registers import ViolationError
from tests.simulation.replication.memory_log import MemoryDisk
from tests.simulation.replication.stage import Stage


def the_owner_is_cut_off_and_somebody_attaches_at_once() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    stage.isolate(1)
    stage.scenario.attach_at(stage.node(2))
    stage.run(0.5)


def somebody_attaches_elsewhere_while_all_is_well() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    stage.attach(2)
    stage.end()


def a_member_is_started_anew_and_the_owner_does_not_hear_of_it() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    stage.isolate(1)
    stage.kill(2)
    stage.start(2)
    stage.scenario.attach_at(stage.node(2))
    stage.run(0.5)


def a_new_owner_reads_what_only_it_has() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    mend = stage.block((1,), (3,))
    stage.write(1, 0)
    stage.until(lambda: stage.node(2).log.last == stage.node(1).log.last)
    stage.kill(1, power=True)
    mend()
    stage.scenario.attach_at(stage.node(2))
    stage.until(lambda: stage.node(2).family.owner is not None)
    mend = stage.block((2,), (3,))
    stage.read(2, 0)
    stage.run(0.1)
    stage.kill(2, power=True)
    mend()
    stage.attach(3)
    stage.read(3, 0)
    stage.run(0.1)


def a_replica_is_added_and_the_owner_does_not_hear_of_it() -> None:
    stage = Stage(2)
    stage.kill(2)
    stage.until(lambda: stage.in_sync() == {1})
    stage.start(2)
    stage.until(lambda: stage.owner(1).in_sync.adding != "")
    stage.cluster.registry.unknown = 1.0
    stage.until(lambda: stage.in_sync() == {1, 2}, 60.0)
    mend = stage.isolate(1)
    stage.write(1, 0)
    stage.run(0.5)
    stage.cluster.registry.unknown = 0.0
    stage.attach(2)
    stage.read(2, 0)
    stage.run(0.1)
    mend()
    stage.end()


def one_goes_away(stage: Stage) -> None:
    """Node 3 dies when all is written, and is no member any more."""
    stage.write_everywhere(1)
    stage.kill(3)
    stage.until(lambda: stage.in_sync() == {1, 2})


def away_for_long(stage: Stage) -> None:
    """Node 3 was away, and the logs of the others do not go back any more."""
    one_goes_away(stage)
    stage.write_everywhere(1)
    stage.forget_log(1)
    stage.start(3)


def a_replica_dies_when_it_has_skipped() -> None:
    stage = Stage()
    away_for_long(stage)
    stage.until(lambda: stage.node(3).log.last == stage.node(1).log.last)
    stage.kill(3)
    stage.start(3)
    stage.end()


def a_replica_that_fetches_regions_is_left_behind_again() -> None:
    stage = Stage()
    away_for_long(stage)
    stage.until(lambda: stage.node(3).log.resync_count > 1)
    stage.kill(3)
    stage.write(1, 0)
    stage.until(lambda: not stage.node(1).open)
    stage.forget_log(1)
    stage.start(3)
    stage.end()


def a_replica_that_has_fetched_regions_is_what_another_one_follows() -> None:
    stage = Stage()
    one_goes_away(stage)
    stage.write_everywhere(1)
    stage.kill(2)
    stage.until(lambda: stage.in_sync() == {1})
    stage.write_everywhere(1)
    stage.forget_log(1)
    stage.start(3)
    stage.until(lambda: stage.in_sync() == {1, 3}, 30.0)
    stage.kill(1)
    stage.attach(3)
    stage.start(2)
    stage.start(1)
    stage.end()


def a_replica_loses_its_power_when_it_has_fetched_a_region() -> None:
    stage = Stage()
    away_for_long(stage)
    stage.until(lambda: stage.node(3).log.resync_count > 1)
    left = stage.node(3).log.resync_count
    stage.until(lambda: stage.node(3).log.resync_count < left)
    stage.node(3).log.disk.forget_unsynced()
    stage.kill(3, power=True)
    stage.start(3)
    stage.end()


def a_region_is_fetched_with_what_is_never_committed() -> None:
    stage = Stage()
    away_for_long(stage)
    stage.until(lambda: stage.node(3).log.resync_count > 0)
    stage.block((1,), (2,))
    for lba in range(0, 24, 4):
        stage.write(1, lba)
    stage.cluster.run_until(lambda: stage.node(3).log.resync_count == 0, 0.7)
    stage.kill(1, power=True)
    stage.attach(2)
    stage.end()


def what_is_read_dies_with_the_owner() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    stage.block((1,), (2, 3))
    stage.write(1, 0)
    stage.read(1, 0)
    stage.run(0.1)
    stage.kill(1, power=True)
    stage.attach(2)
    stage.read(2, 0)
    stage.run(0.1)


def a_flush_is_all_that_is_left() -> None:
    stage = Stage(slow=(2, 3))
    stage.write(1, 0)
    stage.until(lambda: not stage.node(1).open)
    stage.scenario.flush(stage.owner(1))
    stage.until(lambda: stage.scenario.answers["flush"] == 1)
    for number in (2, 3):
        stage.node(number).log.disk.forget_unsynced()
    stage.kill_all(power=True)
    stage.cluster.machines["node-1"].lose_disk()
    stage.start_all()
    stage.attach(2)
    stage.end()


def the_longest_log_is_not_the_candidates() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    before = stage.node(1).log.image.read(0)
    stage.run(2.0)  # synced
    stage.write(1, 0)
    stage.until(lambda: not stage.node(1).open)
    after = stage.node(1).log.image.read(0)
    stage.node(3).log.disk.sync_all()
    for number in (1, 2):
        stage.node(number).log.disk.forget_unsynced()
    stage.kill_all(power=True)
    stage.start_all()
    stage.attach(2)
    stage.end()
    assert before != after
    if stage.node(1).log.image.read(0) != after:
        raise ViolationError("what a replica still had is gone")


def a_member_has_no_room() -> None:
    stage = Stage()
    stage.node(3).log.is_full = True
    stage.run(1.0)
    stage.write(1, 0)
    stage.run(2.0)
    if stage.scenario.reports["replica-removed"]:
        raise ViolationError("a full replica was given what it cannot take")
    stage.node(3).log.is_full = False
    stage.run(1.0)
    stage.write(1, 0)
    stage.until(lambda: stage.scenario.answers["write"] == 1)
    stage.end()


def an_old_owner_comes_back_with_a_tail() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    mend = stage.isolate(1)
    stage.write(1, 0)
    stage.run(0.1)
    stage.attach(2)
    stage.write(2, 4)
    stage.run(1.0)
    mend()
    stage.end()
    assert stage.scenario.reports["replica-cut"]


def the_owner_sleeps_and_is_asked_when_it_wakes() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    stage.cluster.machines["node-1"].pause()
    stage.attach(2)
    stage.write_everywhere(2)
    stage.cluster.machines["node-1"].resume()
    stage.read(1, 0)
    stage.end()


def all_lose_their_power_and_the_longest_log_does_not_go_back_to_the_others() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    stage.node(1).log.disk.sync_all()
    for _ in range(30):
        stage.node(1).log.checkpoint()
    stage.write(1, 0)
    stage.until(lambda: not stage.node(1).open)
    stage.node(1).log.disk.sync_all()
    for number in (2, 3):
        stage.node(number).log.disk.forget_unsynced()
    stage.kill_all(power=True)
    stage.start_all()
    stage.attach(1)
    stage.end()
    if stage.scenario.value().generation != 2:
        raise ViolationError("nobody says that acknowledged writes may be gone")


def lost_by_all_members(stage: Stage) -> None:
    """Nodes 1 and 2 lose with their power what node 3, which is no member, has on its disk."""
    for number in (1, 2):
        stage.node(number).log.disk.forget_unsynced()
    stage.kill_all(power=True)
    stage.cluster.registry.come_back()
    stage.start_all()
    stage.attach(1)
    stage.end()


def all_lose_their_power_and_one_that_was_away_has_more_in_its_checkpoint() -> None:
    stage = Stage()
    one_goes_away(stage)
    stage.cluster.registry.go_down()
    stage.start(3)
    stage.until(lambda: stage.node(3).log.last == stage.node(1).log.last)
    stage.run(2.0)  # synced
    stage.write(1, 0)
    stage.until(lambda: not stage.node(1).open)
    log = stage.node(3).log
    stage.until(lambda: log.last == stage.node(1).log.last)
    log.set_committed(log.last.txid)  # as the next beat says
    log.disk.sync_all()
    while log.disk.records:
        log.checkpoint()
    lost_by_all_members(stage)
    assert stage.scenario.value().generation == 2


def all_lose_their_power_and_one_has_fetched_regions_behind_what_is_lost() -> None:
    stage = Stage()
    one_goes_away(stage)
    stage.write_everywhere(1)
    stage.forget_log(1)
    stage.cluster.registry.go_down()
    stage.start(3)
    stage.until(lambda: stage.node(3).log.resync_count > 0)
    log = stage.node(3).log
    stage.write(1, 0)
    stage.until(lambda: log.last == stage.node(1).log.last and not stage.node(1).open)
    for each in (log, stage.node(1).log):
        each.set_committed(log.last.txid)
    stage.until(lambda: log.resync_count == 0)
    lost_by_all_members(stage)


def a_member_leaves_when_another_has_come() -> None:
    stage = Stage(4)
    stage.place(1, 1, 2, 3)
    stage.until(lambda: stage.in_sync() == {1, 2, 3})
    stage.write_everywhere(1)
    stage.kill(4)
    stage.place(1, 1, 2, 4)
    stage.until(lambda: stage.scenario.value().leaving == ("node-3",))
    stage.run(3.0)
    if stage.in_sync() != {1, 2, 3}:
        raise ViolationError("a member was let go before another one was there")
    stage.start(4)
    stage.until(lambda: stage.in_sync() == {1, 2, 4}, 30.0)
    stage.write_everywhere(1)
    stage.end()


def the_owner_dies_while_a_member_is_leaving() -> None:
    stage = Stage(4)
    stage.place(1, 1, 2, 3)
    stage.until(lambda: stage.in_sync() == {1, 2, 3})
    stage.kill(4)
    stage.place(1, 1, 2, 4)
    stage.until(lambda: stage.scenario.value().leaving == ("node-3",))
    stage.kill(1)
    stage.attach(3)
    stage.write_everywhere(3)
    stage.start(4)
    stage.start(1)
    stage.until(lambda: stage.in_sync() == {1, 2, 3, 4}, 30.0)
    if stage.scenario.value().owner != "node-3":
        raise ViolationError("an owner that was to leave is none any more")
    stage.attach(2)
    stage.until(lambda: stage.in_sync() == {1, 2, 4}, 30.0)
    stage.end()


def a_new_owner_cannot_read_what_it_alone_has() -> None:
    """It has rotted in its log, but not for its clients."""
    stage = Stage()
    stage.write_everywhere(1)
    stage.run(2.0)
    stage.block((1,), (3,))
    stage.write(1, 0)
    stage.until(lambda: stage.node(2).log.last == stage.node(1).log.last)
    stage.kill(1, power=True)
    log = stage.node(2).log
    honest = log.modifications
    until = log.last

    def modifications(after: Position, limit_bytes: int, done: Callable[..., None]) -> None:
        if after < until:
            done(0, None)
        else:
            honest(after, limit_bytes, done)

    log.modifications = modifications  # type: ignore[method-assign]
    stage.attach(2)
    stage.read(2, 0)
    stage.start(1)
    stage.end()
    if not stage.scenario.reports["replica-skipped"]:
        raise ViolationError("nobody has fetched regions")


def started_anew(stage: Stage) -> MemoryDisk:
    """Node 3 is started anew; returns its disk as it was before."""
    stage.kill(3)
    disk = stage.copy_disk(3)
    stage.start(3)
    return disk


def it_alone_with_an_old_disk_is_no_owner(stage: Stage, disk: MemoryDisk) -> None:
    """All end, and node 3 comes back with its disk as it was; the others later."""
    stage.kill_all()
    stage.put_disk_back(3, disk)
    stage.start(3)
    stage.scenario.attach_at(stage.node(3))
    stage.run(15.0)
    if stage.node(3).family.owner is not None:
        raise ViolationError("what was acknowledged is not on the disk of who owns the family")
    stage.start(1)
    stage.start(2)
    stage.end()


def a_disk_is_put_back_as_it_was_and_nobody_else_is_up() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    disk = started_anew(stage)
    stage.until(lambda: stage.in_sync() == {1, 2, 3})
    stage.write_everywhere(1)
    stage.run(1.0)
    it_alone_with_an_old_disk_is_no_owner(stage, disk)


def a_disk_is_put_back_as_it_was_while_the_registry_knows_an_older_incarnation() -> None:
    """The node was started anew so quickly that nobody has missed it."""
    stage = Stage()
    disk = started_anew(stage)
    stage.run(1.0)
    if stage.scenario.reports["replica-removed"]:
        raise ViolationError("it was away for too long")
    stage.write_everywhere(1)
    it_alone_with_an_old_disk_is_no_owner(stage, disk)


def a_disk_is_put_back_as_it_was_and_the_owner_says_so() -> None:
    stage = Stage()
    stage.write_everywhere(1)
    disk = started_anew(stage)
    stage.until(lambda: stage.in_sync() == {1, 2, 3})
    one_goes_away(stage)
    stage.put_disk_back(3, disk)
    stage.start(3)
    stage.until(lambda: stage.in_sync() == {1, 2, 3}, 30.0)
    if stage.scenario.reports["replica-disk-changed"] != 1:
        raise ViolationError("nobody says that the disk was put back")
    stage.end()


def it_may_not_be_owned_by(stage: Stage, number: int) -> None:
    """Somebody attaches where what was acknowledged is not, while nobody else is up."""
    stage.scenario.attach_at(stage.node(number))
    stage.run(15.0)
    if stage.node(number).family.owner is not None:
        stage.read(number, 0)
        stage.run(0.5)
        raise ViolationError("who lacks what was acknowledged owns the family")


def a_registry_is_put_back_to_when_a_member_was_one_that_is_none_any_more() -> None:
    stage = Stage(keeps=True)
    backup = stage.cluster.registry.back_up()
    one_goes_away(stage)
    stage.write_everywhere(1)
    stage.start(3)
    stage.isolate(3)
    stage.put_registry_back(backup)
    if not stage.recover():
        raise ViolationError("all members answer")
    stage.kill(1)
    stage.kill(2)
    stage.cluster.registry.cuts.clear()
    it_may_not_be_owned_by(stage, 3)


def a_registry_is_put_back_to_before_a_member_was_added_that_nobody_has_heard_of() -> None:
    """The owner ends before it hears that the member is one, and that one goes on alone."""
    stage = Stage(2, keeps=True)
    stage.kill(2)
    stage.until(lambda: stage.in_sync() == {1})
    backup = stage.cluster.registry.back_up()
    stage.start(2)
    stage.until(lambda: stage.owner(1).in_sync.adding != "")
    stage.cluster.registry.unknown = 1.0
    stage.until(lambda: stage.in_sync() == {1, 2}, 60.0)
    stage.kill(1)
    stage.cluster.registry.unknown = 0.0
    stage.attach(2)
    stage.write_everywhere(2)
    stage.kill(2)
    stage.put_registry_back(backup)
    stage.start(1)
    stage.run(1.0)
    if stage.recover():
        it_may_not_be_owned_by(stage, 1)
    stage.start(2)
    stage.run(1.0)
    if not stage.recover():
        raise ViolationError("all answer")
    stage.end()

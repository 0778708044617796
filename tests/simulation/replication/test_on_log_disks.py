"""Owners and replicas over real log disks, on simulated files: what one node writes all nodes have.

What the log in memory proves of the rules is not proved again here; this shows that the two fit together.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import nbdserver.replication.comparison as comparison_module
from metadata.region_table import RegionTable
from metadata.replica_state import ReplicaState
from metadata.seams import Buffer
from nbdserver.block import Operation
from nbdserver.logdisk.scrub import Progress
from nbdserver.logdisk.segments import segment_path
from nbdserver.replication.comparison import Difference
from nbdserver.replication.link import Link
from nbdserver.replication.peer_stream import PeerStream
from protocol.peer import Opened
from tests.simulation.registers import BLOCK_BYTES
from tests.simulation.replication.log_stage import VOLUME, LogStage
from tests.simulation.replication.on_log_disks import REGION_BLOCKS


@pytest.fixture
def stage() -> LogStage:
    return LogStage()


def test_what_is_acknowledged_is_in_every_log(stage: LogStage) -> None:
    stage.write_some(1)
    stage.end()
    stage.flush(1)
    assert all(stage.node(number).log.durable.txid >= 20 for number in (1, 2, 3))


@pytest.mark.parametrize("power", [False, True], ids=["killed", "without power"])
def test_a_replica_that_was_away_has_what_it_missed(stage: LogStage, power: bool) -> None:
    stage.write_some(1)
    stage.cluster.machines["node-3"].end(power)
    stage.write_through(1, 0)
    stage.write_some(1)
    stage.cluster.start("node-3")
    stage.write_some(1)
    stage.end()


@pytest.mark.parametrize("power", [False, True], ids=["killed", "without power"])
def test_another_node_goes_on_when_the_owner_dies(stage: LogStage, power: bool) -> None:
    stage.write_some(1)
    stage.cluster.machines["node-1"].end(power)
    stage.attach(2)
    stage.write_some(2)
    stage.cluster.start("node-1")
    stage.write_some(2)
    stage.end()
    stage.attach(1)
    stage.write_some(1)
    stage.end()


def test_an_old_owners_tail_is_cut_away(stage: LogStage) -> None:
    stage.write_some(1)
    mend = stage.cluster.isolate("node-1")
    kept = dict(stage.expected)
    told = stage.write(1, 0, 8)
    stage.expected = kept
    stage.attach(2)
    stage.write_some(2)
    assert told == []
    mend()
    stage.end()
    assert any(kind == "replica-cut" for kind, _ in stage.reports)
    assert told == []


def test_all_lose_their_power_and_what_was_flushed_is_there(stage: LogStage) -> None:
    stage.write_some(1)
    stage.flush(1)
    for number in (1, 2, 3):
        stage.cluster.machines[f"node-{number}"].end(power=True)
    for number in (1, 2, 3):
        stage.cluster.start(f"node-{number}")
    stage.attach(2)
    assert stage.owner(2).value.generation == 2
    stage.end()


def away_for_long(stage: LogStage) -> None:
    """Node 3 was away, and the logs of the others do not go back any more."""
    stage.write_some(1)
    stage.cluster.machines["node-3"].end(power=False)
    for _ in range(2):
        for _ in range(60):  # several segments, whose blocks are soon overwritten
            stage.write_through(1, stage.any_block(44), 16)
        stage.cluster.run(2.0)
        for number in (1, 2):
            stage.node(number).log.disk.checkpointer.start()
        stage.cluster.run(2.0)
    stage.cluster.start("node-3")


def test_regions_are_fetched_when_the_logs_do_not_go_back(stage: LogStage) -> None:
    away_for_long(stage)
    stage.write_some(1)
    stage.end()
    assert any(kind == "replica-skipped" for kind, _ in stage.reports)
    copying = stage.owner(1).links["node-3"].copying
    assert (copying.regions_left, copying.reason) == (0, "")
    assert copying.bytes_per_s > 0
    assert 0 < copying.sent_bytes < copying.saved_bytes


def test_a_replica_that_has_nearly_everything_is_sent_the_rest(stage: LogStage) -> None:
    away_for_long(stage)
    stage.until(lambda: stage.node(3).log.resync_count > 0)
    stage.end()
    link = stage.owner(1).links["node-3"]
    sent_bytes = link.copying.sent_bytes
    for region in range(4):
        link.copying.add(region)
    stage.until(lambda: not link.regions_left)
    assert link.copying.sent_bytes == sent_bytes
    assert link.copying.saved_bytes > 4 << 12
    stage.end()


def test_a_replica_of_the_version_before_gets_whole_copies(stage: LogStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows neither what asks it for blocks nor parts: whatever it is sent is of version 1."""
    versions: list[int] = []
    honest_send, honest_opened = PeerStream.send_packed, Link._opened

    def send_packed(self: PeerStream, buffers: Sequence[Buffer]) -> None:  # modifications leave by it alone
        versions.append(buffers[0][4])
        honest_send(self, buffers)

    def opened(self: Link, frame: Opened) -> None:
        honest_opened(self, replace(frame, version=1))

    monkeypatch.setattr(PeerStream, "send_packed", send_packed)
    monkeypatch.setattr(Link, "_opened", opened)
    away_for_long(stage)
    stage.end()
    copying = stage.owner(1).links["node-3"].copying
    assert set(versions) == {1}
    assert (copying.saved_bytes, copying.sent_bytes > 0) == (0, True)


def test_a_replica_that_dies_while_it_fetches_regions_goes_on_with_them(stage: LogStage) -> None:
    away_for_long(stage)
    stage.until(lambda: stage.node(3).log.resync_count > 0)
    stage.cluster.machines["node-3"].end(power=True)
    stage.write_some(1)
    stage.cluster.start("node-3")
    stage.end()


def all_lose_their_power_and_one_has_fetched_regions_behind_what_is_lost(stage: LogStage) -> None:
    """The one is no member: the registry cannot be asked. What is lost was acknowledged, so the generation rises."""
    away_for_long(stage)
    stage.cluster.registry.go_down()
    stage.until(lambda: stage.node(3).log.resync_count > 0)
    for number in (1, 2):
        stage.node(number).log.sync = lambda done: None  # type: ignore[method-assign]
    lost = {lba: stage.expected[lba] for lba in stage.expected if lba % REGION_BLOCKS == 0}
    for lba in range(0, 4 * REGION_BLOCKS, REGION_BLOCKS):
        stage.write_through(1, lba)
    assert lost
    last = stage.node(1).log.last
    stage.until(lambda: stage.node(3).log.resync_count == 0)
    assert stage.node(1).log.durable < last == stage.node(3).log.last
    for number in (1, 2):
        stage.cluster.machines[f"node-{number}"].drive.forget_unsynced()
    for number in (1, 2, 3):
        stage.cluster.machines[f"node-{number}"].end(power=True)
    stage.cluster.registry.come_back()
    for number in (1, 2, 3):
        stage.cluster.start(f"node-{number}")
    stage.attach(1)
    assert stage.owner(1).value.generation == 2
    assert stage.node(1).log.last < last
    for lba in range(0, 4 * REGION_BLOCKS, REGION_BLOCKS):
        stage.expected.pop(lba)
    stage.expected.update(lost)
    stage.end()


def test_what_was_fetched_behind_what_all_have_lost_is_not_cut_away(stage: LogStage) -> None:
    all_lose_their_power_and_one_has_fetched_regions_behind_what_is_lost(stage)


def test_without_that_rule_a_region_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a checkpoint has come in between, which forbids that cut too."""
    monkeypatch.setattr(ReplicaState, "fetched_txid", property(lambda self: 0, lambda self, txid: None), raising=False)

    def is_noticed(seed: int) -> bool:
        try:
            all_lose_their_power_and_one_has_fetched_regions_behind_what_is_lost(LogStage(seed))
        except AssertionError as error:
            return "has other contents" in str(error)
        return False

    assert any(map(is_noticed, range(6)))


def rot(stage: LogStage, number: int, lba: int) -> None:
    """The block of that node."""
    place = stage.node(number).place_of(VOLUME, lba)
    assert place is not None
    segment, offset = place
    stage.cluster.machines[f"node-{number}"].drive.files[segment_path(segment)].content[offset + 9] ^= 4


def read_through(stage: LogStage, number: int, lba: int) -> bytes:
    """As a client does: it waits for what it asked."""
    device = stage.device(number)
    found = device.read(lba * BLOCK_BYTES, BLOCK_BYTES)
    if found is None:
        answers: list[tuple[int, Any]] = []
        device.later(
            Operation.READ, lba * BLOCK_BYTES, BLOCK_BYTES, None, lambda errno, data: answers.append((errno, data))
        )
        stage.until(lambda: bool(answers))
        assert answers[0][0] == 0, f"a client of node-{number} reads block {lba} with errno {answers[0][0]}"
        found = answers[0][1]
    return b"".join(found)


def helpers(stage: LogStage) -> set[object]:
    return {fields["from"] for kind, fields in stage.reports if kind == "block-repaired"}


@pytest.mark.parametrize("rotten", [(1,), (1, 2), (1, 3)])
def test_a_client_does_not_see_rot_that_another_member_can_repair(stage: LogStage, rotten: tuple[int, ...]) -> None:
    stage.write_some(1)
    stage.cluster.run(1.0)
    for number in rotten:
        for lba in stage.expected:
            rot(stage, number, lba)
    for lba, content in stage.expected.items():
        assert read_through(stage, 1, lba) == content
    # Node 2 is asked first; if it was asked in vain it has found its own rot that way.
    asked = [number for number in rotten if number < 3]
    stage.until(lambda: all(stage.node(number).log.disk.repairs.repaired_blocks for number in asked))


def test_a_member_whose_stream_is_lost_meanwhile_is_asked_again(stage: LogStage) -> None:
    stage.write_some(1)
    stage.cluster.machines["node-3"].end(power=False)
    stage.until(lambda: len(stage.owner(1).members) == 1)
    stage.cluster.run(1.0)
    lba, content = next(iter(stage.expected.items()))
    rot(stage, 1, lba)
    stage.owner(1).links["node-2"].reopen()
    assert read_through(stage, 1, lba) == content


def test_what_no_member_has_is_an_error_within_a_bound(stage: LogStage) -> None:
    stage.write_some(1)
    stage.cluster.run(1.0)
    lba = next(iter(stage.expected))
    for number in (1, 2, 3):
        rot(stage, number, lba)
    with pytest.raises(AssertionError, match="errno 5"):
        read_through(stage, 1, lba)
    assert stage.node(1).log.disk.damage.listed() == [{"number": 1, "snapshot": "", "lba": lba}]


def test_a_replica_that_scrubs_repairs_its_own_from_the_owner(stage: LogStage) -> None:
    stage.write_some(1)
    stage.cluster.run(1.0)
    for lba in stage.expected:
        rot(stage, 2, lba)
    disk = stage.node(2).log.disk
    ends: list[str] = []
    disk.start_scrub(Progress(), 1 << 40, lambda: 0, ends.append)
    stage.until(lambda: bool(ends), 600.0)
    assert disk.repairs.repaired_blocks >= len(stage.expected)
    assert helpers(stage) == {"node-1"}
    stage.end()


# --- comparing


def alter(stage: LogStage, number: int, lba: int) -> None:
    """The middle map of that node has lost an update: an MBA has another block than everywhere else."""
    maps = stage.node(number).log.disk.maps
    mbas = [maps.page(1 << 32 | each >> 8)[each & 255] for each in (lba, lba + 1)]  # type: ignore[index]
    pages = [maps.middle.get(mba >> 8) for mba in mbas]
    other = pages[1]
    assert other is not None
    maps.set_middle(mbas[0], *(other[column + (mbas[1] & 255)] for column in (0, 256, 512)))


def compared(stage: LogStage, number: int) -> list[Difference]:
    ends: list[str] = []
    family = stage.node(number).family
    family.compare(1 << 40, ends.append)
    stage.until(lambda: bool(ends), 60.0)
    left = [each for each in family.differences if not each.is_repaired]
    assert ends[0].startswith(f"the replicas differ in {len(left)} regions" if left else "")
    assert not left or ends[0].endswith(left[0].to_do)
    return family.differences


def alike_at(stage: LogStage) -> int:
    """All have the blocks from there on, and know that."""
    stage.write_through(1, 1024, 8)
    stage.write_some(1)
    stage.write_through(1, 1024, 8)
    stage.cluster.run(1.0)
    assert compared(stage, 1) == []
    return 1026


def test_replicas_that_are_alike_are_found_to_be_while_clients_write(stage: LogStage) -> None:
    lba = alike_at(stage)
    for _ in range(10):
        told = stage.write(1, lba, 3)
        assert compared(stage, 1) == []
        stage.until(lambda told=told: told == [0])  # type: ignore[misc]


def test_a_member_that_holds_something_else_than_the_others_is_sent_it_again(stage: LogStage) -> None:
    lba = alike_at(stage)
    alter(stage, 2, lba)
    assert stage.content(2, lba) == stage.expected[lba + 1]
    (found,) = compared(stage, 1)
    assert (found.offset_bytes, found.wrong, found.is_repaired, found.to_do) == (4 << 20, "node-2", True, "")
    stage.until(lambda: stage.content(2, lba) == stage.expected[lba])
    assert compared(stage, 1) == []
    stage.end()


def test_a_member_that_has_not_had_a_modification_is_wrong_even_if_the_others_disagree_with_the_owner(
    stage: LogStage,
) -> None:
    lba = alike_at(stage)
    for number in (2, 3):
        alter(stage, number, lba)
        regions = stage.node(number).log.disk.maps.regions
        regions.recent.clear()
        stage.node(number).log.disk.maps.regions = RegionTable()
    found = compared(stage, 1)
    assert [each.offset_bytes >> 22 for each in found] == [0, 1, 2, 3]
    assert {(each.wrong, each.is_repaired) for each in found} == {("node-2, node-3", True)}
    stage.until(lambda: all(stage.content(number, lba) == stage.expected[lba] for number in (2, 3)))
    assert compared(stage, 1) == []


def test_an_owner_that_is_wrong_says_where_to_go(stage: LogStage) -> None:
    lba = alike_at(stage)
    alter(stage, 1, lba)
    (found,) = compared(stage, 1)
    assert (found.wrong, found.is_repaired) == ("node-1", False)
    assert "take the volume over at node-2" in found.to_do
    stage.attach(2)
    assert [each.is_repaired for each in compared(stage, 2)] == [True]
    stage.until(lambda: stage.content(1, lba) == stage.expected[lba])
    assert compared(stage, 2) == []


def test_of_two_nobody_can_say_who_is_right_and_nothing_is_touched(stage: LogStage) -> None:
    lba = alike_at(stage)
    stage.cluster.machines["node-3"].end(power=False)
    stage.until(lambda: len(stage.owner(1).members) == 1)
    alter(stage, 2, lba)
    (found,) = compared(stage, 1)
    assert (found.wrong, found.is_repaired) == ("", False)
    assert "backup" in found.to_do
    stage.cluster.run(2.0)
    assert stage.content(2, lba) == stage.expected[lba + 1]
    assert [fields["to_do"] for kind, fields in stage.reports if kind == "replicas-differ"] == [found.to_do]


def test_what_cannot_be_compared_is_said(stage: LogStage, monkeypatch: pytest.MonkeyPatch) -> None:
    alike_at(stage)
    stage.until(lambda: stage.owner(1).value.member("node-3") is not None)
    link = stage.owner(1).links["node-3"]
    link.copying.begin([0], 1)  # something that is never over
    link.copying.more = lambda: None  # type: ignore[method-assign]
    monkeypatch.setattr(comparison_module, "TRIES", 2)
    ends: list[str] = []
    stage.node(1).family.compare(1 << 40, ends.append)
    stage.until(lambda: bool(ends), 120.0)
    assert ends == ["4 regions could not be compared with all members"]


def test_a_comparison_ends_with_its_owner(stage: LogStage) -> None:
    alike_at(stage)
    ends: list[str] = []
    stage.node(1).family.compare(1, ends.append)
    stage.cluster.run(0.5)
    assert ends == []
    stage.attach(2)
    assert len(ends) == 1
    assert ends[0].startswith("the replicas were not all compared")

"""Which regions are copied when, and what is left out: one link's copies, with the replica's answers made up."""

import errno
from array import array
from collections.abc import Callable, Mapping
from typing import Any

from metadata.region_table import REGION_BYTES
from nbdserver.replication.copy_budget import CopyBudget
from nbdserver.replication.copying import COPIES_AT_ONCE, WINDOW_BYTES, CopyCounts, Copying
from protocol.checksum import crc32c
from protocol.packing import digest
from protocol.peer import Compare, Compared, Copied, Copy, Frame, Part
from tests.simulation.world import SimulatedClock, World
from tests.unit.families import block

BLOCK = block(1)
WHOLE_AT_ONCE = WINDOW_BYTES // REGION_BYTES
Read = Callable[[int, Copy | None], None]


class Rig:
    """The owner's end: a log that is read when the test says so, and a link that notes what is sent."""

    def __init__(self, regions: int = 1, version: int = 2) -> None:
        self.clock = SimulatedClock(World(1))
        self.sent: list[Frame] = []
        self.reads: list[tuple[int, Mapping[int, bytes] | None, Read]] = []
        self.is_streaming = True
        self.sent_txid = 7
        self.ends = 0
        log: Any = self
        self.budget = CopyBudget(self.clock)
        self.counts = CopyCounts()
        self.copying = Copying(self.clock, log, self.budget, self, self.counts)
        self.copying.begin(range(regions), version)
        self.copying.more()
        self.run()

    def run(self) -> None:
        self.clock.run(0.1)

    # the log
    def read_region(self, region: int, known: Mapping[int, bytes] | None, done: Read) -> None:
        self.reads.append((region, known, done))

    # the link
    def send_ordered(self) -> None:
        pass

    def send(self, frame: Frame) -> None:
        self.sent.append(frame)

    def all_copied(self) -> None:
        self.ends += 1

    # what happens
    def compared(self, region: int) -> None:
        self.copying.compared(Compared(region, [9], digest(BLOCK)))

    def read(self, txid: int = 7, error: int = 0, kept: bytes = b"", part_bytes: int = 6) -> Copy:
        """The oldest read ends."""
        region, known, done = self.reads.pop(0)
        checksums = array("I", [crc32c(BLOCK)]).tobytes()
        parts = [] if known is None else [Part(1, bytes(part_bytes))]
        copy = Copy(region, txid, 5, b"", checksums, [BLOCK], kept, parts)
        done(error, None if error else copy)
        self.run()
        return copy

    def copied(self, region: int, error: int = 0) -> None:
        self.copying.copied(Copied(region, error))
        self.run()


def test_a_region_is_compared_read_sent_and_done() -> None:
    rig = Rig()
    assert rig.sent == [Compare(0)]
    rig.compared(0)
    assert [known for _, known, _ in rig.reads] == [{9: digest(BLOCK)}]
    assert rig.copying.region_bytes == REGION_BYTES
    copy = rig.read()
    assert rig.sent[1:] == [copy]
    assert rig.copying.region_bytes == 4096
    assert (rig.copying.sent_bytes, rig.copying.saved_bytes) == (6, 4096 - 6)
    assert rig.counts == CopyCounts(6, 4096 - 6)
    assert (rig.copying.regions_left, rig.ends) == (1, 0)
    rig.copied(0)
    assert (rig.copying.regions_left, rig.ends) == (0, 1)
    assert rig.copying.bytes_per_s > 0


def test_a_replica_of_version_1_is_not_asked_and_gets_all() -> None:
    rig = Rig(version=1)
    assert (rig.sent, [known for _, known, _ in rig.reads]) == ([], [None])
    rig.read()
    assert (rig.copying.sent_bytes, rig.copying.saved_bytes) == (4096, 0)


def test_so_many_are_under_way_and_the_others_follow() -> None:
    rig = Rig(WHOLE_AT_ONCE + 2)
    assert rig.sent == [Compare(region) for region in range(WHOLE_AT_ONCE)]
    rig.compared(1)
    rig.read(part_bytes=REGION_BYTES)
    assert not isinstance(rig.sent[-1], Compare)
    rig.copied(1)
    assert rig.sent[-1] == Compare(WHOLE_AT_ONCE)
    assert rig.copying.regions_left == WHOLE_AT_ONCE + 1


def test_of_those_that_hardly_differ_many_are_under_way() -> None:
    rig = Rig(2 * COPIES_AT_ONCE)
    for region in range(COPIES_AT_ONCE):
        rig.compared(region)
        rig.read()
    assert [frame for frame in rig.sent if isinstance(frame, Compare)] == list(map(Compare, range(COPIES_AT_ONCE)))
    rig.copied(7)
    assert rig.sent[-1] == Compare(COPIES_AT_ONCE)


def test_what_lacked_a_block_is_sent_whole_and_what_came_late_is_compared_again() -> None:
    rig = Rig()
    rig.compared(0)
    rig.read(kept=b"\x01")
    rig.copied(0, errno.ENOENT)
    assert [known for _, known, _ in rig.reads] == [{}]
    rig.read()
    rig.copied(0)
    assert rig.ends == 1
    late = Rig()
    late.compared(0)
    late.read()
    late.copied(0, errno.ESTALE)
    assert late.sent[-1] == Compare(0)


def test_a_copy_of_another_place_in_the_stream_is_not_sent() -> None:
    rig = Rig()
    rig.compared(0)
    rig.read(txid=6)
    assert rig.sent == [Compare(0)]
    rig.copying.more()  # the next beat
    rig.run()
    assert rig.sent == [Compare(0), Compare(0)]
    rig.compared(0)
    rig.read(error=errno.EIO)
    assert rig.copying.regions_left == 1


def test_an_answer_that_comes_twice_is_taken_once() -> None:
    rig = Rig()
    rig.compared(0)
    rig.compared(0)
    rig.compared(5)
    assert len(rig.reads) == 1


def test_what_was_begun_on_a_lost_stream_is_over_and_its_turns_are_given_back() -> None:
    rig = Rig(WHOLE_AT_ONCE + 1)
    rig.compared(0)
    rig.copying.end()
    assert rig.copying.regions_left == 0
    rig.read()
    rig.compared(1)
    assert not [frame for frame in rig.sent if isinstance(frame, Copy)]
    for _ in range(3):  # the budget has turns for all of them
        rig.sent.clear()
        rig.copying.begin(range(WHOLE_AT_ONCE), 2)
        rig.copying.more()
        rig.run()
        assert len(rig.sent) == WHOLE_AT_ONCE
    rig.copying.end()


def test_it_says_why_nothing_is_copied() -> None:
    rig = Rig(2)
    assert rig.copying.reason == ""
    rig.copying.end()
    rig.is_streaming = False
    rig.copying.begin([1, 2], 2)
    rig.copying.more()
    rig.run()
    assert rig.copying.reason == "it has to get what was written meanwhile first"
    turns = [rig.budget.ask(lambda: None) for _ in range(20)]
    rig.is_streaming = True
    rig.copying.more()
    rig.run()
    assert rig.copying.reason == "other resyncs of this node come before it"
    for turn in turns:
        turn.give_back()
    rig.run()
    assert (rig.copying.reason, rig.sent[-2:]) == ("", [Compare(1), Compare(2)])

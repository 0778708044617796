"""A replica as its owner meets it: whom it obeys, and what it says."""

from array import array
from collections.abc import Sequence

import pytest

from metadata.seams import Buffer
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.replication.replica import Replica
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, WRITE
from protocol.peer import (
    BEGINNING,
    Append,
    Appended,
    Cut,
    Frame,
    Modification,
    Open,
    Opened,
    Position,
    Refusal,
    Refused,
)
from protocol.peer_decoding import decode
from protocol.peer_frames import encode
from tests.simulation.replication.memory_log import MemoryDisk, MemoryLog
from tests.simulation.world import SimulatedClock, World
from tests.unit.session_rig import feed

FAMILY = bytes(16)


class Wire:
    """The Connection of a stream, from which frames are read."""

    peer_name = "owner"
    unsent_bytes = 0

    def __init__(self) -> None:
        self.sent: list[Frame] = []
        self.is_closed = False

    def send(self, buffers: Sequence[Buffer]) -> None:
        self.sent.append(decode(b"".join(buffers)))

    def close(self) -> None:
        self.is_closed = True

    abort = close


class Rig:
    def __init__(self, disk: MemoryDisk | None = None) -> None:
        self.world = World(1)
        self.clock = SimulatedClock(self.world)
        self.disk = disk or MemoryDisk(self.world.random)
        self.log = MemoryLog(self.disk, self.clock, self.world.random)
        self.higher: list[int] = []
        self.replica = Replica(self.clock, self.log, self.higher.append)

    def begin(self, frame: Open) -> tuple[PeerStream, Wire]:
        """A stream that begins with this frame; nothing has happened since."""
        wire = Wire()
        stream = PeerStream(wire, lambda stream, frame: None, lambda stream, reason: None)  # type: ignore[arg-type]
        self.replica.open(stream, frame)
        return stream, wire

    def open(self, epoch: int) -> tuple[PeerStream, Wire]:
        opened = self.begin(Open(FAMILY, epoch, "owner"))
        self.clock.run(0.1)
        return opened

    def say(self, stream: PeerStream, frame: Frame) -> None:
        if stream.is_open:
            stream.received_frame(stream, frame)
        self.clock.run(0.1)


def write(epoch: int, txid: int) -> Modification:
    return Modification(epoch, txid, 1, 1, 0, 0, b"", ())


def feed_together(stream: PeerStream, *frames: Frame) -> None:
    feed(stream, b"".join(b"".join(encode(frame)) for frame in frames))


def append(number: int, *modifications: Modification, epoch: int = 3) -> Append:
    return Append(epoch, number, 0, 0, 0, modifications)


def test_it_obeys_the_highest_epoch_and_says_where_it_stands() -> None:
    rig = Rig()
    _, wire = rig.open(3)
    (opened,) = wire.sent
    assert isinstance(opened, Opened)
    assert (opened.last, opened.incarnation) == (Position(0, 0), rig.log.incarnation)
    assert rig.higher == [3]
    assert rig.disk.promised_epoch == 3


@pytest.mark.parametrize("is_started_anew", [False, True])
def test_a_lower_epoch_is_refused_also_by_its_next_life(is_started_anew: bool) -> None:
    rig = Rig()
    rig.open(3)
    if is_started_anew:
        rig = Rig(rig.disk)
    _, wire = rig.open(2)
    assert wire.sent == [Refused(3, Refusal.EPOCH)]
    assert wire.is_closed


def test_the_epoch_is_persisted_before_it_answers() -> None:
    rig = Rig()
    _, wire = rig.begin(Open(FAMILY, 3, "owner"))
    while not wire.sent:
        assert rig.clock.step()
    assert rig.disk.promised_epoch == 3


def test_a_newer_stream_ends_the_older_one() -> None:
    rig = Rig()
    older, older_wire = rig.open(3)
    newer, _ = rig.open(3)
    assert older_wire.is_closed
    rig.say(older, append(1, write(3, 1)))
    assert rig.log.last == Position(0, 0)
    rig.say(newer, append(1, write(3, 1)))
    assert rig.log.last == Position(3, 1)


def test_what_follows_is_appended_and_what_does_not_ends_the_stream() -> None:
    rig = Rig()
    stream, wire = rig.open(3)
    rig.say(stream, append(1, write(3, 1), write(3, 2)))
    answer = wire.sent[-1]
    assert isinstance(answer, Appended)
    assert (answer.number, answer.last) == (1, Position(3, 2))
    rig.say(stream, append(2, write(3, 4)))
    assert wire.sent[-1] == Refused(3, Refusal.NOT_NEXT)
    assert rig.log.last == Position(3, 2)


def test_what_arrives_together_is_answered_once_and_before_anything_else_happens() -> None:
    rig = Rig()
    rig.log.at_once = 1.0
    stream, wire = rig.open(3)
    wire.sent.clear()
    feed_together(stream, *(append(number, write(3, number)) for number in (1, 2, 3)))
    rig.clock.run(0.1)
    (answer,) = wire.sent
    assert isinstance(answer, Appended)
    assert (answer.number, answer.last) == (3, Position(3, 3))


def test_blocks_that_have_to_wait_are_kept_though_their_place_is_used_again() -> None:
    rig = Rig()
    stream, _ = rig.open(3)
    rig.log.append((), lambda errno: None)  # it waits, and so does what follows
    extents = array("Q", [0, 1]).tobytes()
    for txid, content in ((1, b"a"), (2, b"b")):
        block = content * BLOCK_BYTES
        body = extents + bytes(8) + crc32c(block).to_bytes(4, "little")
        feed_together(stream, append(txid, Modification(3, txid, WRITE, 1, 1, 1, body, [block])))
    rig.clock.run(0.1)
    written = [b"".join(record.data)[:1] for record in rig.disk.records if isinstance(record, Modification)]
    assert written == [b"a", b"b"]


def test_frames_of_another_epoch_than_the_streams_are_refused() -> None:
    rig = Rig()
    stream, wire = rig.open(3)
    rig.say(stream, append(1, epoch=2))
    assert wire.sent[-1] == Refused(3, Refusal.EPOCH)


def test_each_answer_is_a_grant_and_a_life_begins_with_one() -> None:
    rig = Rig()
    now_s = rig.clock.now()
    assert 1.0 < rig.replica.granted_until_s - now_s < 1.1
    stream, _ = rig.open(3)
    rig.clock.run(5.0)
    before_s = rig.clock.now()
    rig.say(stream, append(1))
    assert rig.replica.granted_until_s > before_s + 1.0


def test_a_candidate_refuses_and_goes_on_when_it_gives_up() -> None:
    rig = Rig()
    _, wire = rig.open(3)
    rig.replica.withhold(3)
    assert wire.sent[-1] == Refused(3, Refusal.CANDIDATE)
    _, wire = rig.open(3)
    assert wire.sent == [Refused(3, Refusal.CANDIDATE)]
    _, wire = rig.open(4)
    assert isinstance(wire.sent[-1], Opened)
    rig.replica.withhold(4)
    rig.replica.give_again()
    _, wire = rig.open(4)
    assert isinstance(wire.sent[-1], Opened)


def test_a_log_that_is_cut_is_opened_anew() -> None:
    rig = Rig()
    stream, wire = rig.open(3)
    rig.say(stream, append(1, write(3, 1), write(3, 2)))
    incarnation = rig.log.incarnation
    rig.say(stream, Cut(Position(3, 1)))
    opened = wire.sent[-1]
    assert isinstance(opened, Opened)
    assert opened.last == Position(3, 1)
    assert list(opened.incarnations[-2:]) == [incarnation, rig.log.incarnation]
    rig.say(stream, append(1, write(3, 2)))
    assert rig.log.last == Position(3, 2)


def test_a_log_that_cannot_be_cut_says_where_it_still_ends_and_may_start_over() -> None:
    rig = Rig()
    stream, wire = rig.open(3)
    rig.say(stream, append(1, write(3, 1), write(3, 2)))
    rig.log.set_committed(2)
    rig.log.disk.sync_all()
    while rig.log.disk.records:
        rig.log.checkpoint()
    rig.say(stream, Cut(Position(3, 1)))
    opened = wire.sent[-1]
    assert isinstance(opened, Opened)
    assert opened.last == Position(3, 2)
    rig.say(stream, Cut(BEGINNING))
    empty = wire.sent[-1]
    assert isinstance(empty, Opened)
    assert empty.last == BEGINNING
    assert opened.incarnation not in empty.incarnations


def test_a_full_disk_ends_the_stream_with_a_reason() -> None:
    rig = Rig()
    stream, wire = rig.open(3)
    rig.log.is_full = True
    rig.say(stream, append(1, write(3, 1)))
    assert wire.sent[-1] == Refused(3, Refusal.NO_ROOM)


def test_an_owner_that_speaks_only_later_versions_is_refused() -> None:
    rig = Rig()
    _, wire = rig.begin(Open(FAMILY, 3, "owner", 200, 201))
    assert wire.sent == [Refused(0, Refusal.VERSION)]

"""A stream of the directory's frames: what it closes for."""

from typing import Any

from metadata.directory.streams import FRAME_S, FrameStream
from protocol.directory import Position, PositionReport
from protocol.sealed_frames import HEADER_BYTES, ClusterKeys, SealedStream
from tests.unit.session_rig import HandClock, ListConnection
from tests.unit.test_sealed_frames import OLD

KEYS = ClusterKeys("cluster", [OLD])
LENGTH_AT = 9
"""In a frame: a byte of the length of its body that makes it a quarter of a megabyte longer."""


class Ends:
    """Two ends of a stream that have said hello; what the first one sends is `taken` by hand."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.heard: list[Any] = []
        self.lost = ""
        self.connections = [ListConnection("peer"), ListConnection("peer")]
        self.streams = [
            FrameStream(
                self.clock,
                self.connections[number],
                SealedStream(KEYS, number + 1, 1, bytes([number]) * 16, is_connector=not number),
                lambda _stream, body: self.heard.append(body),
                lambda _stream, reason: setattr(self, "lost", reason),
            )
            for number in range(2)
        ]
        hellos = [bytes(connection.sent) for connection in self.connections]
        self.give(0, hellos[1])
        self.give(1, hellos[0])
        self.connections[0].sent.clear()

    def give(self, number: int, data: bytes) -> None:
        room = self.streams[number].buffer()
        room[: len(data)] = data
        self.streams[number].received(len(data))

    def say(self, sequence: int) -> bytes:
        """What the first end sends, on its way."""
        self.streams[0].send(PositionReport(1, Position(1, sequence)))
        sent = bytes(self.connections[0].sent)
        self.connections[0].sent.clear()
        return sent


def test_a_frame_may_come_in_pieces_as_slowly_as_its_end_comes_in_time() -> None:
    ends = Ends()
    for sequence in range(20):
        frame = ends.say(sequence)
        for cut in (frame[:3], frame[3:HEADER_BYTES], frame[HEADER_BYTES:]):
            ends.give(1, cut)
            ends.clock.advance(FRAME_S / 3)
    assert len(ends.heard) == 20
    assert not ends.lost


def test_a_damaged_length_does_not_hold_up_all_that_follows_for_ever() -> None:
    ends = Ends()
    damaged = bytearray(ends.say(1))
    damaged[LENGTH_AT] ^= 0x04
    ends.give(1, bytes(damaged))
    seconds = 0
    while not ends.lost:
        assert seconds <= FRAME_S
        ends.clock.advance(1.0)
        ends.give(1, ends.say(seconds))
        seconds += 1
    assert ends.lost == "refused: a frame does not come to its end"
    assert not ends.heard

"""Frames between nodes: members are heard once each, everybody else is refused and changes nothing."""

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.invariant import InvariantError
from protocol.sealed_frames import (
    BODY_LIMIT_BYTES,
    DATAGRAM_BODY_BYTES,
    DATAGRAM_BYTES,
    HEADER_BYTES,
    SENDERS_LIMIT,
    WINDOW,
    ClusterKeys,
    DatagramOpener,
    DatagramSealer,
    Frame,
    FrameRefusedError,
    SealedStream,
)

OLD, NEW, OTHER = (bytes([number]) * 32 for number in (1, 2, 3))
KEYS = ClusterKeys("cluster", [OLD])


def sealer(keys: ClusterKeys = KEYS, sender: int = 7, incarnation: int = 1) -> DatagramSealer:
    return DatagramSealer(keys, sender, incarnation)


def test_a_datagram_is_opened_with_its_sender_on_it() -> None:
    frame = DatagramOpener(KEYS).open(sealer().seal(5, b"body"))
    assert (frame.kind, frame.sender, frame.incarnation, bytes(frame.body)) == (5, 7, 1, b"body")


def test_the_largest_body_fits_and_a_larger_one_is_our_own_fault() -> None:
    assert len(sealer().seal(1, bytes(DATAGRAM_BODY_BYTES))) == DATAGRAM_BYTES
    with pytest.raises(InvariantError):
        sealer().seal(1, bytes(DATAGRAM_BODY_BYTES + 1))


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", "too short"),
        (sealer().seal(1, b"x")[:20], "too short"),
        (b"GET / HTTP/1.1\r\nHost: somewhere.else.entirely\r\n", "no frame of ours"),
        (b"nbdD\x02" + sealer().seal(1, b"x")[5:], "version 2, this program knows version 1"),
        (sealer(ClusterKeys("other", [OLD])).seal(1, b"x"), "another cluster"),
        (sealer(ClusterKeys("cluster", [OTHER])).seal(1, b"x"), "key that this cluster does not use"),
        (sealer().seal(1, b"x")[:-1], "length is wrong"),
        (sealer().seal(1, b"x") + b"\0", "length is wrong"),
    ],
)
def test_a_stranger_is_refused_with_the_reason_and_disturbs_nobody(datagram: bytes, reason: str) -> None:
    opener = DatagramOpener(KEYS)
    with pytest.raises(FrameRefusedError, match=reason):
        opener.open(datagram)
    assert opener.open(sealer().seal(1, b"next")).body == b"next"


@pytest.mark.fuzz
@given(st.binary(max_size=60), st.data())
def test_a_datagram_with_any_bit_changed_is_refused(body: bytes, data: st.DataObject) -> None:
    opener, sealing = DatagramOpener(KEYS), sealer()
    good = sealing.seal(3, body)
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FrameRefusedError):
        opener.open(bytes(bad))
    assert opener.open(good).body == body


@given(st.lists(st.integers(0, WINDOW - 1), max_size=60))
def test_each_datagram_is_taken_once_in_whatever_order_they_come(order: list[int]) -> None:
    sealing = sealer()
    sealed = [sealing.seal(1, bytes([index % 256])) for index in range(WINDOW)]
    opener = DatagramOpener(KEYS)
    taken: list[int] = []
    for index in order:
        with contextlib.suppress(FrameRefusedError):
            opener.open(sealed[index])
            taken.append(index)
    assert sorted(taken) == sorted(set(order))


def test_what_is_older_than_the_window_is_refused() -> None:
    opener, sealing = DatagramOpener(KEYS), sealer()
    first, second = sealing.seal(1, b"1"), sealing.seal(1, b"2")
    for _ in range(WINDOW - 1):
        latest = sealing.seal(1, b"")
    opener.open(latest)
    assert opener.open(second).body == b"2"
    with pytest.raises(FrameRefusedError, match="came before"):
        opener.open(first)


def test_a_jump_of_more_than_the_window_forgets_what_was_below_it() -> None:
    opener, sealing = DatagramOpener(KEYS), sealer()
    opener.open(sealing.seal(1, b""))
    for _ in range(3 * WINDOW):
        latest = sealing.seal(1, b"")
    opener.open(latest)
    with pytest.raises(FrameRefusedError):
        opener.open(latest)


def test_a_new_life_of_a_sender_begins_counting_anew_and_its_former_one_is_refused() -> None:
    opener = DatagramOpener(KEYS)
    before, after = sealer(incarnation=1), sealer(incarnation=2)
    opener.open(before.seal(1, b""))
    old = before.seal(1, b"")
    opener.open(after.seal(1, b""))
    with pytest.raises(FrameRefusedError, match="earlier life"):
        opener.open(old)


def test_senders_do_not_share_a_window() -> None:
    opener = DatagramOpener(KEYS)
    for sender in (1, 2):
        opener.open(sealer(sender=sender).seal(1, b""))


def test_the_number_of_windows_is_bounded_and_the_longest_silent_sender_goes() -> None:
    opener = DatagramOpener(KEYS)
    first = sealer(sender=1)
    recorded = first.seal(1, b"")
    opener.open(recorded)
    for sender in range(2, SENDERS_LIMIT + 2):
        opener.open(sealer(sender=sender).seal(1, b""))
    assert len(opener._windows) == SENDERS_LIMIT
    opener.open(recorded)  # its window is forgotten


def test_during_a_rotation_both_keys_are_heard_and_the_new_one_is_used() -> None:
    rotating, done = ClusterKeys("cluster", [NEW, OLD]), ClusterKeys("cluster", [NEW])
    opener = DatagramOpener(rotating)
    opener.open(sealer().seal(1, b""))
    DatagramOpener(done).open(sealer(rotating).seal(1, b""))
    with pytest.raises(FrameRefusedError):
        DatagramOpener(done).open(sealer().seal(1, b""))


# --- streams ----------------------------------------------------------------------------------------------------------


def streams(
    connector_keys: ClusterKeys = KEYS, acceptor_keys: ClusterKeys = KEYS, connector_nonce: bytes = b"c" * 16
) -> tuple[SealedStream, SealedStream]:
    return (
        SealedStream(connector_keys, 1, 1, connector_nonce, is_connector=True),
        SealedStream(acceptor_keys, 2, 1, b"a" * 16, is_connector=False),
    )


def opened(*arguments: ClusterKeys) -> tuple[SealedStream, SealedStream]:
    connector, acceptor = streams(*arguments)
    assert acceptor.receive(connector.hello()) == []
    assert connector.receive(acceptor.hello()) == []
    return connector, acceptor


def bodies(frames: list[Frame]) -> list[bytes]:
    return [bytes(frame.body) for frame in frames]


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_frames_come_out_whole_however_the_bytes_are_cut(piece: int) -> None:
    connector, acceptor = opened()
    assert (connector.peer, acceptor.peer) == (2, 1)
    data = b"".join(connector.seal(4, bytes([index]) * index) for index in range(20))
    frames = [frame for start in range(0, len(data), piece) for frame in acceptor.receive(data[start : start + piece])]
    assert bodies(frames) == [bytes([index]) * index for index in range(20)]
    assert acceptor.receive(b"") == []
    assert bodies(connector.receive(acceptor.seal(4, b"back"))) == [b"back"]


def test_nothing_is_sealed_before_the_other_side_said_hello() -> None:
    connector, _ = streams()
    with pytest.raises(InvariantError):
        connector.seal(1, b"")


def test_two_sides_in_the_middle_of_a_rotation_understand_each_other() -> None:
    connector, acceptor = opened(ClusterKeys("cluster", [NEW, OLD]), ClusterKeys("cluster", [OLD, NEW]))
    assert bodies(acceptor.receive(connector.seal(1, b"x"))) == [b"x"]
    assert bodies(connector.receive(acceptor.seal(1, b"y"))) == [b"y"]


Attack = Callable[[SealedStream, SealedStream], bytes]


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (lambda connector, acceptor: connector.seal(1, b"") and connector.seal(1, b""), "out of order"),
        (lambda connector, acceptor: connector.seal(1, b"x") * 2, "out of order"),
        (lambda connector, acceptor: acceptor.seal(1, b"x"), "keyed hash"),  # its own words
        (lambda connector, acceptor: sealer(sender=1).seal(1, b"x"), "keyed hash"),  # a datagram
        (lambda connector, acceptor: b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "no frame of ours"),
        (lambda connector, acceptor: connector.hello(), "keyed hash"),
    ],
)
def test_what_does_not_follow_on_a_stream_is_refused(attack: Attack, reason: str) -> None:
    connector, acceptor = opened()
    with pytest.raises(FrameRefusedError, match=reason):
        acceptor.receive(attack(connector, acceptor))


def test_a_recorded_stream_opens_nothing() -> None:
    connector, _ = opened()
    recorded = connector.hello() + connector.seal(1, b"x")
    again = SealedStream(KEYS, 2, 1, b"b" * 16, is_connector=False)
    with pytest.raises(FrameRefusedError, match="keyed hash"):
        again.receive(recorded)


def test_our_own_hello_is_not_taken_for_the_others() -> None:
    connector, _ = streams()
    with pytest.raises(FrameRefusedError, match="repeats our own"):
        connector.receive(connector.hello())


def test_a_stream_that_does_not_begin_with_a_hello_is_refused() -> None:
    _, acceptor = streams()
    with pytest.raises(FrameRefusedError, match="does not begin with a hello"):
        acceptor.receive(sealer().seal(1, b""))


@pytest.mark.parametrize("keys", [ClusterKeys("other", [OLD]), ClusterKeys("cluster", [OTHER])])
def test_a_stream_from_elsewhere_is_refused_at_its_hello(keys: ClusterKeys) -> None:
    connector, acceptor = streams(keys)
    with pytest.raises(FrameRefusedError):
        acceptor.receive(connector.hello())
    assert not acceptor.is_open


def test_a_frame_that_says_it_is_too_large_is_refused_at_its_header() -> None:
    connector, acceptor = opened()
    frame = bytearray(connector.seal(1, b"x"))
    frame[8:12] = (BODY_LIMIT_BYTES + 1).to_bytes(4, "big")
    with pytest.raises(FrameRefusedError, match="length is wrong"):
        acceptor.receive(bytes(frame[:HEADER_BYTES]))


@pytest.mark.fuzz
@given(st.binary(max_size=300), st.data())
def test_any_change_on_a_stream_is_refused_or_waits_for_more(body: bytes, data: st.DataObject) -> None:
    connector, acceptor = opened()
    bad = bytearray(connector.seal(1, body))
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        frames = acceptor.receive(bytes(bad))
    except FrameRefusedError:
        return
    assert frames == []

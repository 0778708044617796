"""Stubs and the buffer that answers for them: nobody stays stuck, order is kept, and nobody storms."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata.directory.buffer import HOLDS_LIMIT, MessageBuffer
from metadata.directory.stubs import (
    PATIENCE_LIMIT_S,
    PATIENCE_S,
    REORDER_S,
    SPREAD_S,
    STUBS_LIMIT,
    TRANSITIONS,
    WINDOW_MAX,
    WINDOW_MIN,
    WINDOW_START,
    Move,
    Source,
    Stub,
    StubQueue,
)
from protocol.directory import Message, Ranges
from protocol.invariant import InvariantError

LATER_S = REORDER_S + SPREAD_S


def message(sequence: int, part: int = 0, parts: int = 1, size_bytes: int = 1) -> Message:
    return Message(1, sequence, part, parts, bytes(size_bytes))


def sequences(requests: list[tuple[Source, Ranges]]) -> list[int]:
    return [
        sequence for _, ranges in requests for first, count in ranges for sequence in range(first, first + count)
    ]  # fmt: skip


def taken(queue: StubQueue, now_s: float = 0.0) -> list[int]:
    return [item.sequence for item in queue.take(now_s)]


def queue_missing(count: int, seed: int = 1) -> StubQueue:
    queue = StubQueue(0, random.Random(seed))
    queue.notice(count, 0.0)
    return queue


# --- stubs ------------------------------------------------------------------------------------------------------------


def test_every_state_of_a_stub_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(Stub)
    assert {move for moves in TRANSITIONS.values() for move in moves} == set(Move)


def test_messages_leave_in_order_each_once() -> None:
    queue = StubQueue(0, random.Random(1))
    for sequence in (2, 3, 1, 3, 2):
        queue.insert(message(sequence), 0.0)
    assert taken(queue) == [1, 2, 3]
    assert not queue.insert(message(2), 0.0)
    assert taken(queue) == []


def test_a_gap_is_not_asked_for_at_once_because_overtaking_is_no_loss() -> None:
    queue = StubQueue(0, random.Random(1))
    queue.insert(message(2), 10.0)
    assert queue.due(10.0 + REORDER_S * 0.99) == []
    assert queue.due(10.0 + LATER_S) == [(Source.MASTER, ((1, 1),))]


def test_agents_that_lost_the_same_do_not_ask_in_the_same_instant() -> None:
    moments = {queue_missing(1, seed).due_at_s for seed in range(20)}
    assert len(moments) == 20


def test_what_is_asked_is_not_asked_again_before_the_patience_ends() -> None:
    queue = queue_missing(1)
    assert sequences(queue.due(LATER_S)) == [1]
    assert queue.due(LATER_S + PATIENCE_S * 0.99) == []
    assert queue.due(LATER_S + PATIENCE_S) == [(Source.RELAY, ((1, 1),))]


def test_a_refusal_resets_the_flag_and_a_relay_is_asked_next() -> None:
    queue = queue_missing(2)
    assert queue.due(LATER_S) == [(Source.MASTER, ((1, 2),))]
    queue.refused(((1, 2),), LATER_S)
    assert queue.asked == 0
    assert queue.due(LATER_S + PATIENCE_S)[0][0] is Source.RELAY


def test_a_refusal_of_what_was_not_asked_or_has_come_changes_nothing() -> None:
    queue = queue_missing(3)
    queue.due(LATER_S)
    queue.insert(message(2), LATER_S)
    asked = queue.asked
    queue.refused(((2, 1), (40, 7)), LATER_S)
    assert queue.asked == asked
    queue.insert(message(1), LATER_S)
    queue.insert(message(3), LATER_S)
    assert taken(queue) == [1, 2, 3]
    queue.refused(((1, 3),), LATER_S)


def test_the_master_is_asked_again_in_turn_with_relays_less_and_less_often() -> None:
    queue = queue_missing(1)
    asked_at: list[tuple[float, Source]] = []
    while len(asked_at) < 9:
        now_s = queue.due_at_s
        asked_at += [(now_s, source) for source, _ in queue.due(now_s)]
    assert [source for _, source in asked_at] == [Source.MASTER, Source.RELAY] * 4 + [Source.MASTER]
    pauses = [round(b - a, 6) for (a, _), (b, _) in pairwise(asked_at)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(PATIENCE_LIMIT_S)


def test_a_burst_of_losses_is_asked_for_by_windows_and_losing_answers_narrows_them() -> None:
    queue = queue_missing(2000)
    sizes = []
    for _ in range(5):
        now_s = queue.due_at_s
        sizes.append(len(sequences(queue.due(now_s))))
    assert sizes[0] <= WINDOW_START
    assert max(sizes) <= WINDOW_START
    assert sizes[-1] <= max(WINDOW_MIN, WINDOW_START / 8)


def test_answers_widen_the_window_up_to_its_bound() -> None:
    queue = queue_missing(STUBS_LIMIT)
    now_s, largest = LATER_S, 0
    while queue.missing:
        asked = sequences(queue.due(now_s))
        largest = max(largest, len(asked))
        for sequence in asked:
            queue.insert(message(sequence), now_s)
        taken(queue, now_s)
        now_s += LATER_S
    assert largest == WINDOW_MAX


def test_the_queue_is_bounded_and_what_is_beyond_is_asked_for_when_it_has_moved_on() -> None:
    queue = queue_missing(3 * STUBS_LIMIT)
    assert not queue.insert(message(2 * STUBS_LIMIT), 0.0)
    now_s = 0.0
    while queue.missing:
        now_s = max(now_s, queue.due_at_s)
        for sequence in sequences(queue.due(now_s)):
            queue.insert(message(sequence), now_s)
        list(queue.take(now_s))
    assert queue.taken == 3 * STUBS_LIMIT


def test_with_nothing_missing_nothing_is_due() -> None:
    queue = StubQueue(5, random.Random(1))
    assert queue.due_at_s == float("inf")
    assert queue.due(1e9) == []


# --- the buffer -------------------------------------------------------------------------------------------------------


def filled(count: int, size_bytes: int = 82, **limits: int) -> MessageBuffer:
    buffer = MessageBuffer(**limits)
    for sequence in range(1, count + 1):
        buffer.append(message(sequence, size_bytes=size_bytes))  # 100 bytes each
    return buffer


def test_the_oldest_messages_go_when_there_is_too_much() -> None:
    buffer = filled(20, limit_bytes=1000)
    assert (buffer.floor, buffer.newest, buffer.size_bytes) == (11, 20, 1000)
    assert buffer.get(10) is None
    assert buffer.get(11) == message(11, size_bytes=82)
    assert buffer.get(21) is None
    assert [item.sequence for item in buffer.since(17)] == [18, 19, 20]


def test_only_whole_updates_go() -> None:
    buffer = MessageBuffer(limit_bytes=500)
    for sequence in range(1, 10):
        part = (sequence - 1) % 3
        buffer.append(message(sequence, part, 3, 82))
        first = buffer.get(buffer.floor)
        assert first is not None
        assert first.part == 0
    assert (buffer.floor, buffer.newest) == (7, 9)


def test_an_update_larger_than_the_buffer_stays_until_it_is_whole() -> None:
    buffer = MessageBuffer(limit_bytes=100)
    for part in range(5):
        buffer.append(message(part + 1, part, 5, 82))
    assert buffer.floor == 6
    buffer.append(message(6))
    assert buffer.newest == 6


def test_a_gap_is_our_own_fault() -> None:
    with pytest.raises(InvariantError):
        filled(1).append(message(3))


def test_a_hold_keeps_what_a_join_needs() -> None:
    buffer = filled(5, limit_bytes=500, held_limit_bytes=1000)
    assert buffer.hold(1, 3, until_s=10.0)
    for sequence in range(6, 14):
        buffer.append(message(sequence, size_bytes=82))
    assert (buffer.floor, buffer.size_bytes) == (4, 1000)
    assert buffer.extend(1, 20.0)


def test_a_hold_that_wants_too_much_is_broken() -> None:
    buffer = filled(5, limit_bytes=500, held_limit_bytes=1000)
    buffer.hold(1, 3, until_s=10.0)
    for sequence in range(6, 16):
        buffer.append(message(sequence, size_bytes=82))
    assert not buffer.extend(1, 20.0)
    assert buffer.size_bytes == 500


def test_a_hold_ends_with_its_time_or_its_join() -> None:
    buffer = filled(5, limit_bytes=500, held_limit_bytes=1000)
    buffer.hold(1, 3, until_s=10.0)
    buffer.hold(2, 4, until_s=20.0)
    buffer.expire(10.0)
    assert not buffer.extend(1, 30.0)
    buffer.release(2)
    buffer.append(message(6, size_bytes=482))
    assert buffer.floor == 6


def test_what_is_gone_or_not_there_yet_cannot_be_held() -> None:
    buffer = filled(20, limit_bytes=1000)
    assert not buffer.hold(1, 9, 1.0)
    assert buffer.hold(1, 10, 1.0)
    assert buffer.hold(2, 20, 1.0)
    assert not buffer.hold(3, 21, 1.0)


def test_the_number_of_holds_is_bounded() -> None:
    buffer = filled(1)
    assert all(buffer.hold(attempt, 0, 1.0) for attempt in range(HOLDS_LIMIT))
    assert not buffer.hold(HOLDS_LIMIT, 0, 1.0)
    assert buffer.hold(0, 1, 1.0)


def test_a_part_of_an_update_that_will_never_be_whole_can_be_cut_off() -> None:
    buffer = filled(3)
    buffer.append(message(4, 0, 2))
    buffer.cut_to(3)
    assert buffer.newest == 3
    buffer.append(message(4))


# --- both: nobody stays stuck -----------------------------------------------------------------------------------------


def answers(buffer: MessageBuffer, ranges: Ranges, budget: int) -> Iterator[Message | int]:
    """Messages that are resent, sequences that are refused."""
    for first, count in ranges:
        for sequence in range(first, first + count):
            budget -= 1
            found = buffer.get(sequence) if budget >= 0 else None
            yield sequence if found is None else found


@settings(max_examples=1000)
@given(st.integers(1, 120), st.floats(0, 0.6), st.integers(0, 2**32), st.integers(1, 40))
def test_no_agent_stays_stuck_whatever_is_lost_doubled_overtaken_or_refused(
    count: int, loss: float, seed: int, budget: int
) -> None:
    """Messages, requests, resends and refusals are each lost with that probability, doubled, and late at random."""
    rng = random.Random(seed)
    everything = filled(count, size_bytes=1)
    sources = {Source.MASTER: everything, Source.RELAY: filled(count // 2, size_bytes=1)}
    queue = StubQueue(0, rng)
    events: list[tuple[float, int, object]] = []

    def deliver(now_s: float, what: object) -> None:
        for _ in range(1 + (rng.random() < 0.1)):
            if rng.random() >= loss:
                events.append((now_s + rng.expovariate(200), rng.getrandbits(62), what))

    for item in everything.since(0):
        deliver(item.sequence / 1000, item)
    events.append((count / 1000 + 0.25, 0, "heartbeat"))
    seen: list[int] = []
    requests = 0
    while len(seen) < count:
        news_s = min(events)[0] if events else float("inf")
        now_s = min(news_s, queue.due_at_s)
        assert now_s < 600, f"stuck with {seen[-1:]} of {count}"
        if now_s == news_s:
            event = min(events)
            events.remove(event)
            match event[2]:
                case "heartbeat":
                    queue.notice(count, now_s)
                case Message() as arrived:
                    queue.insert(arrived, now_s)
                case int(refused):
                    queue.refused(((refused, 1),), now_s)
                case (Source() as source, ranges):
                    for answer in answers(sources[source], ranges, budget):
                        deliver(now_s, answer)
        for request in queue.due(now_s):
            requests += 1
            deliver(now_s, request)
        assert queue.asked <= WINDOW_MAX
        seen += taken(queue, now_s)
    assert seen == list(range(1, count + 1))
    assert requests < 40 * count + 400  # a few messages may be out of luck many times

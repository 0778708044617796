"""Questions about blocks: each is answered once, whatever becomes of the stream; an older version is not asked."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from metadata.seams import Buffer
from nbdserver.replication.block_requests import ASKED_LIMIT, WAIT_S, Answered, BlockRequests, ask_in_turn
from nbdserver.replication.replica_log import Found
from protocol.peer import Blocks, Open, Opened, ReadBlocks
from protocol.peer_frames import blocks_frame
from tests.simulation.world import SimulatedClock, World
from tests.unit.families import block
from tests.unit.test_replica import FAMILY, Rig


class Holder:
    """Another replica that has some blocks."""

    def __init__(self, clock: SimulatedClock, node: str, has: Mapping[int, bytes]) -> None:
        self.clock = clock
        self.node = node
        self.has = has
        self.asked: list[Sequence[int]] = []

    def read_blocks(self, mbas: Sequence[int], answered: Answered) -> None:
        self.asked.append(mbas)
        self.clock.call_soon(lambda: answered({mba: self.has[mba] for mba in mbas if mba in self.has}))


def found_in_turn(*holders: Mapping[int, bytes], mbas: Sequence[int]) -> tuple[Found, list[list[Sequence[int]]]]:
    clock = SimulatedClock(World(1))
    made = [Holder(clock, f"node-{number}", has) for number, has in enumerate(holders, 1)]
    answers: list[Found] = []
    ask_in_turn(clock, made, mbas, answers.append)
    assert answers == []
    clock.run(1.0)
    (found,) = answers
    return found, [holder.asked for holder in made]


def test_each_holder_is_asked_for_what_those_before_it_did_not_have() -> None:
    found, asked = found_in_turn({1: block(1)}, {}, {2: block(2)}, {3: block(3)}, mbas=[1, 2])
    assert found == {1: ("node-1", block(1)), 2: ("node-3", block(2))}
    assert asked == [[[1, 2]], [[2]], [[2]], []]


def test_with_nobody_to_ask_there_is_an_answer_too() -> None:
    assert found_in_turn(mbas=[1]) == ({}, [])


class Asking:
    """One end of a stream, and what it is told."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.stream, self.wire = self.rig.begin(Open(FAMILY, 3, "owner"))
        self.wire.sent.clear()
        self.requests = BlockRequests(self.rig.clock)
        self.told: list[tuple[int, Mapping[int, Buffer]]] = []

    def ask(self, mba: int) -> None:
        self.requests.ask([mba], lambda blocks: self.told.append((mba, blocks)))
        self.requests.send(self.stream)

    def after(self, act: Callable[[], None], duration_s: float = 0.0) -> list[tuple[int, Mapping[int, Buffer]]]:
        act()
        self.rig.clock.run(duration_s)
        told, self.told = self.told, []
        return told


def test_who_asks_is_answered_once() -> None:
    asking = Asking()
    asking.ask(7)
    assert [list(frame.mbas) for frame in asking.wire.sent if isinstance(frame, ReadBlocks)] == [[7]]
    answer = blocks_frame(1, {7: block(7)})
    assert asking.after(lambda: asking.requests.answered(answer)) == [(7, {7: block(7)})]
    assert asking.after(lambda: asking.requests.answered(answer), 2 * WAIT_S) == []


def test_who_asks_in_vain_is_told_so_within_a_bound() -> None:
    asking = Asking()
    assert asking.after(partial(asking.ask, 7), 2 * WAIT_S) == [(7, {})]
    asking.ask(8)
    asking.requests.ask_again()  # the stream is lost
    assert asking.after(lambda: asking.requests.send(asking.stream)) == []
    assert [frame.number for frame in asking.wire.sent if isinstance(frame, ReadBlocks)] == [1, 2, 2]
    assert asking.after(asking.requests.forget) == [(8, {})]


def test_so_many_may_be_asked_at_once() -> None:
    asking = Asking()

    def ask_all() -> None:
        for mba in range(1, ASKED_LIMIT + 2):
            asking.ask(mba)

    assert asking.after(ask_all) == [(ASKED_LIMIT + 1, {})]


def test_a_replica_answers_its_owner_and_asks_it() -> None:
    rig = Rig()
    stream, wire = rig.open(3)
    rig.say(stream, ReadBlocks(5, [1, 2]))
    answer = wire.sent[-1]
    assert isinstance(answer, Blocks)
    assert (answer.number, list(answer.mbas)) == (5, [])
    told: list[Mapping[int, Buffer]] = []
    rig.replica.read_blocks([9], told.append)
    asked = wire.sent[-1]
    assert isinstance(asked, ReadBlocks)
    rig.say(stream, blocks_frame(asked.number, {9: block(9)}))
    assert told == [{9: block(9)}]


def test_an_owner_of_the_version_before_is_obeyed_and_not_asked() -> None:
    rig = Rig()
    stream, wire = rig.begin(Open(FAMILY, 3, "owner", 1, 1))
    rig.clock.run(1.0)
    opened = wire.sent[-1]
    assert isinstance(opened, Opened)
    assert opened.version == 1
    told: list[Mapping[int, Buffer]] = []
    rig.replica.read_blocks([9], told.append)
    rig.clock.run(0.1)
    assert (told, wire.sent[-1]) == ([{}], opened)
    assert stream.is_open

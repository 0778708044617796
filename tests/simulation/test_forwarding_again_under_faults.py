"""Clients that stay, while the volume's owners die, hang, are cut off and give it up: nobody is disconnected, what was
answered stays, and what is read is what was written.

A change that is not acknowledged when its owner is lost is in the history of the next one, or never was. Rules of
docs/replication.md are taken away, and that is noticed.
"""

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from metadata.seams import Buffer, Done
from nbdserver.block import Later, Operation
from nbdserver.frontend.carrying import Carried, _ServerEnd
from nbdserver.frontend.outstanding import Outstanding
from nbdserver.volume.export import Export
from protocol import nbd
from protocol.nbd import Command, CommandFlag
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.forwarding_stage import BLOCK_BYTES, Client, Node, OwnedDevice, Stage
from tests.simulation.registers import ViolationError

BLOCKS = 8
DEPTH = 4
CLIENTS = ("node-2", "node-2", "node-3")
FOR_S = 20.0
SLOW_FLUSH_S = 0.3


class History:
    """What the owners have of the volume: changes that are not acknowledged yet can be undone, the newest first."""

    def __init__(self, stage: Stage) -> None:
        self.open: list[tuple[int, bytes]] = []  # (offset, what was there)
        self._data = stage.device.data

    def note(self, offset: int, length: int) -> None:
        self.open.append((offset, bytes(self._data[offset : offset + length])))

    def cut(self, keep: int) -> None:
        """The next owner has only the first so many of the open changes."""
        while len(self.open) > keep:
            offset, before = self.open.pop()
            self._data[offset : offset + len(before)] = before
        self.open.clear()


class HistoryDevice(OwnedDevice):
    """The volume at one node: what is not acknowledged is not shown, and a flush takes its time."""

    def __init__(self, stage: "LongStage", node: str, seams: Seams) -> None:
        super().__init__(stage, node, seams.clock.call_soon)
        self._long, self._seams = stage, seams

    def read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        return None if self._long.history.open else super().read(offset, length)

    def commit(self) -> int:
        if not self.is_fenced:
            for offset, _, length in self._open:
                self._long.history.note(offset, length)
        return super().commit()

    def later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int = 1
    ) -> None:
        if operation is Operation.READ and self._long.history.open and not self.is_fenced:
            self._seams.clock.call_later(0.0005, lambda: self.later(operation, offset, length, data, done, limit))
        else:
            super().later(operation, offset, length, data, done, limit)

    def flush(self, done: Done) -> None:
        delay_s = self._long.random.choice([0.0005, SLOW_FLUSH_S])
        self._seams.clock.call_later(delay_s, lambda: None if self.is_fenced else done(0))


class LongNode(Node):
    def __init__(self, stage: "LongStage", machine: Machine, seams: Seams) -> None:
        self._seams = seams
        super().__init__(stage, machine, seams)

    def serve(self) -> None:
        assert isinstance(self.stage, LongStage)
        self.device = HistoryDevice(self.stage, self.name, self._seams)
        self.exports.add(Export("disk", self.device, lineage=self.stage.lineage, shared=True))

    def deposed(self) -> None:
        """It hears of it after some time, if it can."""
        self._seams.clock.call_later(
            0.05,
            lambda: (
                self.exports.remove("disk", has_moved=True) if self.exports.lookup("disk") and not self.owns else None
            ),
        )

    @property
    def owns(self) -> bool:
        return self.stage.owner == self.name


class LongStage(Stage):
    """A volume whose owner changes, and troubles."""

    node_type = LongNode

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        super().__init__(seed=seed)
        self.history = History(self)
        self.device.in_flight = True
        self.moves = 0
        self._acknowledge()
        self._after(self._happen)

    def _after(self, what: Callable[[], object], least_s: float = 0.05, most_s: float = 1.0) -> None:
        self.cluster.scheduler.after(self.random.uniform(least_s, most_s), what)

    def _acknowledge(self) -> None:
        self.history.open.clear()
        self.device.acknowledge(0)
        slow = self.random.random() < 0.01
        self.cluster.scheduler.after(self.random.uniform(0.1, 0.4) if slow else 0.001, self._acknowledge)

    def move(self, to: str) -> None:
        before, self.owner = self.owner, to
        self.moves += 1
        self.device.unacknowledged.clear()  # nobody is told by the owner before
        self.history.cut(self.random.randint(0, len(self.history.open)))
        if self.cluster.machines[before].life is not None:
            node = self.node(before)
            assert isinstance(node, LongNode)
            node.deposed()
        if self.node(to).exports.lookup("disk") is None:
            self.node(to).serve()

    def content(self, offset: int, length: int) -> bytes:
        return bytes(self.device.data[offset : offset + length])

    def gone(self) -> list[object]:
        alive = [name for name in ("node-2", "node-3") if self.cluster.machines[name].life is not None]
        return [reason for name in alive for reason in self.node(name).gone()]

    def _take_over(self) -> None:
        choice = [name for name in ("node-1", "node-2", "node-3") if name != self.owner]
        alive = [name for name in choice if self.cluster.machines[name].life is not None]
        self.move(self.random.choice(alive))

    def _happen(self) -> None:
        cluster, rng = self.cluster, self.random
        machine = cluster.machines[self.owner]
        match rng.choice(["kill", "pause", "move", "move", "reset", "reset", "cut", "short pause"]):
            case "kill" if self.owner == "node-1":  # the others have clients of their own
                machine.end(power=rng.random() < 0.5)
                self._after(self._take_over, 0.5, 1.5)
                self._after(lambda: cluster.start(machine.name), 2.0, 4.0)
            case "pause" if self.owner == "node-1":
                machine.pause()
                self._after(self._take_over, 0.5, 1.5)
                self._after(machine.resume, 1.0, 5.0)
            case "short pause":
                machine.pause()
                self._after(machine.resume, 0.01, 0.4)
            case "move":
                self._take_over()
            case "cut":
                other = rng.choice([name for name in ("node-2", "node-3") if name != self.owner])
                self._after(cluster.wires.block([other], [self.owner], both=rng.random() < 0.5), 0.05, 0.6)
            case "reset":
                between = [each for each in cluster.wires.connections if each.peer_name.endswith(":10810")]
                if between:
                    mend = cluster.wires.block(["node-2", "node-3"], ["node-1", "node-2", "node-3"], both=True)
                    rng.choice(between).lose("reset")  # the other end does not hear of it
                    mend()
        self._after(self._happen, 0.3, 2.5)


class World(Protocol):
    """Where a client talks."""

    random: random.Random

    def attach(self, name: str) -> Client:
        """A client that has entered the volume at this node."""

    def content(self, offset: int, length: int) -> bytes:
        """What the volume holds."""

    def gone(self) -> list[object]:
        """Why clients were disconnected."""


class Talker:
    """A client with DEPTH requests under way over its own blocks: it reads and writes, one over the other."""

    block_bytes = BLOCK_BYTES

    def __init__(self, stage: "World", node: str, number: int) -> None:
        self.answers = 0
        self.client: Client = stage.attach(node)
        self._stage = stage
        self._first = number * BLOCKS
        self._issued = [0] * BLOCKS
        self._answered = [0] * BLOCKS
        self._under_way: dict[int, tuple[int, int, int]] = {}  # cookie: command, block, version or floor
        self._cookie = 0
        self._at = 0

    def step(self, asks: bool = True) -> None:
        if self.client.lost_because:
            raise ViolationError(f"a client was disconnected: {self._stage.gone()}")
        self._hear()
        while asks and len(self._under_way) < DEPTH:
            self._ask()

    def _ask(self) -> None:
        rng = self._stage.random
        self._cookie += 1
        block = rng.randrange(BLOCKS)
        command, flags, data = Command.READ, 0, b""
        what = self._answered[block]
        if rng.random() < 0.8:
            command, flags = Command.WRITE, CommandFlag.FUA if rng.random() < 0.3 else 0
            self._issued[block] += 1
            what = self._issued[block]
            data = what.to_bytes(8, "big") * (self.block_bytes // 8)
        fields = {
            "flags": flags, "command": command, "cookie": self._cookie,
            "offset": (self._first + block) * self.block_bytes, "length": self.block_bytes,
        }  # fmt: skip
        self._under_way[self._cookie] = (command, block, what)
        self.client.send(nbd.Request.build(fields) + data)

    def _hear(self) -> None:
        data = self.client.received_bytes
        while len(data) - self._at >= nbd.SIMPLE_REPLY.size:
            magic, error, cookie = nbd.SIMPLE_REPLY.unpack_from(data, self._at)
            if magic != nbd.SIMPLE_REPLY_MAGIC or error or cookie not in self._under_way:
                raise ViolationError(f"a reply that makes no sense: {magic:#x}, {error}, {cookie}")
            command, block, what = self._under_way[cookie]
            end = self._at + nbd.SIMPLE_REPLY.size + (self.block_bytes if command == Command.READ else 0)
            if len(data) < end:
                break
            del self._under_way[cookie]
            self.answers += 1
            if command == Command.WRITE:
                self._answered[block] = max(self._answered[block], what)
            else:
                self._look(block, bytes(data[end - self.block_bytes : end]), what)
            self._at = end

    def _look(self, block: int, content: bytes, floor: int) -> None:
        version = int.from_bytes(content[:8], "big")
        if content != content[:8] * (self.block_bytes // 8) or not floor <= version <= self._issued[block]:
            raise ViolationError(f"block {block} shows {version}, not {floor} to {self._issued[block]}")

    def check(self) -> None:
        """The volume holds what was answered."""
        for block in range(BLOCKS):
            content = self._stage.content((self._first + block) * self.block_bytes, self.block_bytes)
            self._look(block, content, self._answered[block])

    @property
    def is_idle(self) -> bool:
        return not self._under_way


def run(seed: int, for_s: float = FOR_S) -> LongStage:
    stage = LongStage(seed)
    talkers = [Talker(stage, node, number) for number, node in enumerate(CLIENTS)]
    until_s = stage.cluster.now_s + for_s
    while stage.cluster.now_s < until_s:
        stage.cluster.run(0.005)
        for talker in talkers:
            talker.step()
            talker.check()
    give_up_s = stage.cluster.now_s + 30.0
    while not all(talker.is_idle for talker in talkers):
        if stage.cluster.now_s > give_up_s:
            raise ViolationError("a client waits for ever")
        stage.cluster.run(0.005)
        for talker in talkers:
            talker.step(asks=False)
            talker.check()
    assert stage.moves, "nothing has happened"
    assert all(talker.answers > 50 for talker in talkers), "too little was done"
    return stage


@pytest.mark.parametrize("seed", range(3))
def test_clients_go_on_and_what_was_answered_stays_whatever_happens_to_the_owners(seed: int) -> None:
    run(seed)


def _overlaps(self: Outstanding, command: int, cookie: int, offset: int, length: int) -> bool:
    return cookie in self._kept


def _forget(self: Outstanding, cookie: int, request: bytes) -> None:
    del self._kept[cookie]
    self.answered += 1


def _never_heard_of(self: Carried, server: _ServerEnd, reason: str) -> None:
    if server is self._server:
        assert self.outstanding is not None
        self.outstanding._kept.clear()
        self.outstanding._starts.clear()
        self.outstanding._ends.clear()
        self._lose(reason)


@pytest.mark.parametrize(
    "patches",
    [
        pytest.param(
            {(Outstanding, "_has_to_wait"): _overlaps, (Outstanding, "_forget"): _forget}, id="overlaps go on"
        ),
        pytest.param({(Carried, "server_lost"): _never_heard_of}, id="what was not answered is not asked for again"),
    ],
)
def test_a_missing_rule_is_noticed(patches: dict[tuple[type, str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    for (owner, name), replacement in patches.items():
        monkeypatch.setattr(owner, name, replacement)
    for seed in range(40):
        try:
            run(seed)
        except ViolationError:
            return
    pytest.fail("nobody has noticed")

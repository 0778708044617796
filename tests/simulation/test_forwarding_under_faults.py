"""Clients that give up, come again by another node and ask again: what was answered is not undone by what was late.

Without the rules that drop what a client has left behind (frontend/forwarded.py, volume/export.py) some seeds show a
version that was written over; test_forwarding.py has a test for each of the rules.
"""

import random
from collections.abc import Callable
from functools import partial

import pytest

from tests.simulation.forwarding_stage import BLOCK_BYTES, GREETING_BYTES, NBD_PORT, Client, Hosts, Stage

WRITERS = 3
FOR_S = 30.0
SLOW = 0.002  # chance that the device takes its time
PATIENCE_S = 0.1
"""For an answer: less than a grant time, so that the old connection is still there when the client comes again."""


class Writer:
    """Writes version after version into its block, each until it is answered, by whichever node."""

    def __init__(self, stage: Stage, rng: random.Random, number: int) -> None:
        self.version = 0  # that is asked for
        self.answered = 0
        self.seen = 0
        self.tries = 0
        self._stage = stage
        self._random = rng
        self._offset = number * BLOCK_BYTES
        self._client: Client | None = None
        self._has_named = self._has_asked = False
        self._asked_s = 0.0
        self._wait()

    def _wait(self) -> None:
        self._stage.cluster.scheduler.after(self._random.uniform(0.001, 0.01), self._step)

    def _step(self) -> None:
        client, now_s = self._client, self._stage.cluster.now_s
        if client is None or client.lost_because or now_s - self._asked_s > PATIENCE_S * (1 if self._has_asked else 30):
            self._come_again()
        elif not self._has_asked:
            if self._is_entered(client):
                client.received_bytes.clear()
                self._ask(client)
        elif len(client.received_bytes) == 16:
            assert not any(client.received_bytes[4:8]), "it is answered with an error"
            client.received_bytes.clear()
            self.answered = self.version
            self.version += 1
            self._ask(client)
        self._wait()

    def _is_entered(self, client: Client) -> bool:
        if len(client.received_bytes) == GREETING_BYTES and not self._has_named:
            self._has_named = True
            client.go()
        return client.has_entered

    def _come_again(self) -> None:
        if self._client is not None and self._client.connection is not None:
            self._client.connection.abort()
        hosts = self._stage.cluster.machines["client"].node
        assert isinstance(hosts, Hosts)
        name = self._random.choice(["node-1", "node-2", "node-3"])
        self._client = Client(hosts.seams, f"{self._stage.cluster.machines[name].host}:{NBD_PORT}")
        self._has_named = self._has_asked = False
        self._asked_s = self._stage.cluster.now_s
        self.tries += 1

    def _ask(self, client: Client) -> None:
        self.version = max(self.version, 1)
        self._has_asked, self._asked_s = True, self._stage.cluster.now_s
        client.write(self._offset, self.version.to_bytes(8, "big"))

    def check(self) -> None:
        """It shows what was answered, or what was asked for after it, and never goes back."""
        shown = int.from_bytes(self._stage.device.data[self._offset : self._offset + 8], "big")
        assert self.answered <= shown <= self.version, f"{shown} is not {self.answered} to {self.version}"
        assert shown >= self.seen, f"{shown} lands on {self.seen}"
        self.seen = shown


class Trouble:
    """Nodes that die, stand still and do not hear each other; a device that takes its time."""

    def __init__(self, stage: Stage, rng: random.Random) -> None:
        self.happened = 0
        self._stage = stage
        self._random = rng
        self._after(self._happen)
        self._acknowledge()

    def _after(self, what: Callable[[], None]) -> None:
        self._stage.cluster.scheduler.after(self._random.uniform(0.05, 1.0), what)

    def _acknowledge(self) -> None:
        self._stage.device.acknowledge(0)
        pause_s = self._random.uniform(0.1, 0.6) if self._random.random() < SLOW else 0.0005
        self._stage.cluster.scheduler.after(pause_s, self._acknowledge)

    def _happen(self) -> None:
        cluster, rng = self._stage.cluster, self._random
        self.happened += 1
        name = rng.choice(["node-2", "node-3"])
        machine = cluster.machines[name]
        match rng.choice(["kill", "pause", "pause owner", "cut", "cut", "one way", "one way", "reset"]):
            case "kill" if machine.life is not None:
                machine.end(power=rng.random() < 0.5)
                self._after(partial(cluster.start, name))
            case "pause":
                machine.pause()
                self._after(machine.resume)
            case "pause owner":
                cluster.machines["node-1"].pause()
                self._after(cluster.machines["node-1"].resume)
            case "cut":
                self._after(cluster.wires.block([name], ["node-1"], both=True))
            case "one way":
                ways = [[name], ["node-1"]]
                rng.shuffle(ways)
                self._after(cluster.wires.block(*ways))
            case "reset" if cluster.wires.connections:
                rng.choice(list(cluster.wires.connections)).lose("reset")
        self._after(self._happen)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_answered_is_never_undone_by_what_was_late(seed: int) -> None:
    rng = random.Random(seed)
    stage = Stage(seed=seed)
    stage.device.in_flight = True
    writers = [Writer(stage, rng, number) for number in range(WRITERS)]
    trouble = Trouble(stage, rng)
    until_s = stage.cluster.now_s + FOR_S
    while stage.cluster.now_s < until_s:
        stage.cluster.run(0.002)
        for writer in writers:
            writer.check()
    assert trouble.happened > 20
    assert all(writer.answered > 50 and writer.tries > 10 for writer in writers), "too little was tried"

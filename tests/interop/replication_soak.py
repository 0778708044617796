"""What can happen to data processes with replicas, at random, for a while: `make soak-replicas MINUTES=10`.

    python -m tests.interop.replication_soak [--minutes 10] [--seed N]

A client writes at the owner, or by way of another node; in the middle of that something happens to a node, or is
wanted of it. As long as the node that it has come to lives, the client is not cut. Then it looks for what it was told,
wherever the volume is served by then (tests/durability.py judges), and so on, a line for each round. In the end every
replica becomes the owner and is read. A round that fails ends it all. The seed draws the rounds; their timing is the
machine's own.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from metadata.registry import FIRST_VOLUME, ExportSettings
from nbdserver.node.data_process import DataProcessError
from tests.conftest import PORTS
from tests.data_rig import VOLUME, DataNode, DataRig, data_nodes
from tests.durability import Judge
from tests.nbd_client import Client

NODES = 4
BLOCKS = 4000
WRITES_S = 2.0  # a round, unless it is to be short
AWAY_S = 2.5  # after 1 s of silence it is removed
ANSWER_S = 40.0  # a takeover may wait for members that do not answer
MOST_SNAPSHOTS = 5
CONTROL_S = 0.1


class Soak:
    """One rig, one client, and what happens to them."""

    def __init__(self, rig: DataRig, seed: int, writes_s: float) -> None:
        self.done: Counter[str] = Counter()
        self._rig = rig
        self._writes_s = writes_s
        self._random = random.Random(seed)
        self._judge = Judge(BLOCKS, random.Random(seed + 1))
        self._owner = rig.nodes[0]
        self._followed = {node.name for node in rig.nodes}
        self._down: set[str] = set()
        self._killed: set[str] = set()  # in this round
        self._snapshots: list[str] = []
        self._made = 0
        self._rounds: list[Callable[[], Awaitable[None]]] = [
            self.the_owner_dies,
            self.the_owner_sleeps,
            self.the_volume_moves,
            self.the_owners_program_is_replaced,
            self.a_replica_dies,
            self.a_replica_is_away,
            self.a_snapshot_comes_or_goes,
            self.replicas_are_placed_anew,
        ]

    async def run(self, duration_s: float) -> None:
        """Rounds until the time is over, and one of each kind at least; then a look at every replica."""
        control = asyncio.get_running_loop().create_task(self._control())
        try:
            until_s = time.monotonic() + duration_s
            rounds = self._random.sample(self._rounds, len(self._rounds))
            while rounds or time.monotonic() < until_s:
                await self._round(rounds.pop() if rounds else self._random.choice(self._rounds))
            await self._rig.until(self._is_settled, "all is in sync in the end")
            for node in await self._members():
                await self._own(node)
                await self._look()
        finally:
            control.cancel()

    async def _round(self, happens: Callable[[], Awaitable[None]]) -> None:
        name = happens.__name__
        await self._rig.until(self._is_settled, f"all is in sync before {name}")
        by = self._random.choice([self._owner, *await self._others()])
        self._killed.clear()
        client = await self._look(by)
        writing = asyncio.get_running_loop().create_task(asyncio.to_thread(self._write, client))
        await asyncio.sleep(self._writes_s * self._random.random())
        await happens()
        is_cut = await writing
        client.close()
        self.done[name] += 1
        if by.name not in self._killed:
            assert not is_cut, f"the client that came to {by.name} was dropped: {by.events[-5:]}"
        told = f"{self._judge.writes} writes by way of {by.name}; {self._owner.name} owns"
        print(f"{sum(self.done.values())} {name}: {told}", flush=True)

    async def _look(self, by: DataNode | None = None) -> Client:
        """Connect and find what there must be."""
        client = await asyncio.to_thread(Client, (by or self._owner).clients, VOLUME, ANSWER_S)
        await asyncio.to_thread(self._judge.check, client, True)
        return client

    def _write(self, client: Client) -> bool:
        """For a while; whether the connection was cut."""
        try:
            self._judge.write_until(client, time.monotonic() + self._writes_s, finish=True)
        except ConnectionError:
            return True
        return False

    # --- what happens ---

    async def the_owner_dies(self) -> None:
        owner, heir = self._owner, self._random.choice(await self._others())
        await self._kill(owner)
        await self._own(heir)
        await self._start(owner)

    async def the_owner_sleeps(self) -> None:
        owner, heir = self._owner, self._random.choice(await self._others())
        os.kill(owner.process.pid, signal.SIGSTOP)
        await asyncio.sleep(self._random.choice([0.0, 1.5]))
        await self._own(heir)
        os.kill(owner.process.pid, signal.SIGCONT)

    async def the_volume_moves(self) -> None:
        if self._random.random() < 0.5:
            await self._owner.call("disown", family=self._rig.family)
        await self._own(self._random.choice(await self._others()))

    async def the_owners_program_is_replaced(self) -> None:
        await self._owner.hand_over(is_late=self._random.random() < 0.5)

    async def a_replica_dies(self) -> None:
        node = self._random.choice(await self._others())
        await self._kill(node)
        await asyncio.sleep(self._random.choice([0.0, 0.5]))
        await self._start(node)

    async def a_replica_is_away(self) -> None:
        """So long that it is removed and the writers go on."""
        node = self._random.choice(await self._others())
        await self._kill(node)
        await asyncio.sleep(AWAY_S)
        await self._start(node)

    async def a_snapshot_comes_or_goes(self) -> None:
        volume = {"family": self._rig.family, "number": FIRST_VOLUME}
        if len(self._snapshots) < MOST_SNAPSHOTS:
            self._made += 1
            self._snapshots.append(f"snapshot-{self._made}")
            assert await self._owner.call("snapshot_create", **volume, snapshot=self._snapshots[-1]) == 0
        else:
            gone = self._snapshots.pop(self._random.randrange(MOST_SNAPSHOTS))
            assert await self._owner.call("snapshot_delete", **volume, snapshot=gone) == 0

    async def replicas_are_placed_anew(self) -> None:
        others = [node.name for node in self._rig.nodes if node is not self._owner]
        placement = [self._owner.name, *self._random.sample(others, self._random.choice([2, 2, 3]))]
        await self._owner.call("place", family=self._rig.family, placement=placement)

    # --- what a control process does ---

    async def _control(self) -> None:
        """Replicas are opened and deleted as the registry says."""
        while True:
            value = await self._rig.value()
            for node in self._rig.nodes:
                if node.name in self._down:
                    continue
                with contextlib.suppress(DataProcessError):  # it is being replaced
                    if node.name in value.placement and node.name not in self._followed:
                        await node.follow()
                        self._followed.add(node.name)
                    elif node.name not in value.placement and node.name in self._followed:
                        await node.call("close", family=self._rig.family)
                        self._followed.discard(node.name)
                        shutil.rmtree(node.directory)
            await asyncio.sleep(CONTROL_S)

    async def _own(self, node: DataNode) -> None:
        """Take over, as often as it takes."""
        while True:
            try:
                await node.call("own", family=self._rig.family)
                break
            except DataProcessError:
                await asyncio.sleep(CONTROL_S)
        await node.serve()
        self._owner = node

    async def _kill(self, node: DataNode) -> None:
        self._down.add(node.name)
        self._killed.add(node.name)
        self._followed.discard(node.name)
        await node.kill()

    async def _start(self, node: DataNode) -> None:
        await node.start()
        self._down.discard(node.name)

    async def _others(self) -> list[DataNode]:
        """Members beside the owner."""
        return [node for node in await self._members() if node is not self._owner]

    async def _members(self) -> list[DataNode]:
        in_sync = await self._rig.in_sync()
        return [node for node in self._rig.nodes if node.name in in_sync]

    async def _is_settled(self) -> bool:
        value = await self._rig.value()
        is_whole = {member.node for member in value.in_sync} == set(value.placement)
        return is_whole and set(value.leaving) <= {value.owner} and self._followed == set(value.placement)


async def soak(
    path: Path, free_port: Callable[[], int], duration_s: float, seed: int, writes_s: float = WRITES_S
) -> dict[str, object]:
    """What was done."""
    names = [f"node-{number}" for number in range(1, NODES + 1)]
    async with data_nodes(path, free_port, names, settings=ExportSettings(shared=True)) as rig:
        story = Soak(rig, seed, writes_s)
        await story.run(duration_s)
        reports = Counter(kind for node in rig.nodes for kind, _ in node.events)
        return {"seed": seed, "rounds": dict(story.done), "reports": dict(reports)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interop.replication_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    ports = iter(random.sample(PORTS, 1000))
    with tempfile.TemporaryDirectory(prefix="replication-soak-") as path:
        work = soak(Path(path), lambda: next(ports), arguments.minutes * 60, arguments.seed)
        print(json.dumps(asyncio.run(work)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

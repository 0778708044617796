"""How fast an update spreads and what it costs, at 3 to 1,000 nodes and 0 to 30 % loss: figures from the simulator.

    python -m tests.simulation.cluster.spread [--nodes 3 30 300 1000] [--loss 0 0.1 0.3] [--seed 1]

Theory: nodes join a new cluster, then UPDATES updates of VALUE_BYTES each are published one by one, PAUSE_S apart, and
the time until every node has each is taken. What is counted is the bytes of all datagrams of all nodes in that time,
less what an idle cluster of that size sends in as much time (heartbeats and positions). The minimum is the sealed
datagram with the update once to each agent, and one way through the network.

Known weakness: the network is the simulator's (a site's latency of 0.1 ms and some jitter, unlimited bandwidth), and a
processor costs nothing in virtual time: these are figures of the protocol, not of a machine.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass

from metadata.directory.node import DirectoryNode
from metadata.directory.settings import DirectorySettings
from protocol.directory import Action, Confirm, Message, NodeKind, Update
from protocol.directory import Updates as UpdatesBody
from protocol.sealed_frames import HEADER_BYTES, MAC_BYTES, ClusterKeys
from tests.simulation.cluster.cluster import SAME_SITE, Cluster
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Machine, Seams

UPDATES = 20
VALUE_BYTES = 100
PAUSE_S = 0.2
REST_S = 12.0  # after joining: what was asked for there is forgotten
JOIN_LIMIT_S = 300.0
SPREAD_LIMIT_S = 60.0
KEYS = ClusterKeys("spread", [bytes(range(32))])


@dataclass
class Figures:
    """Of one size and loss; bytes and datagrams are for each update and agent."""

    nodes: int
    loss: float
    join_s: float
    """Until all nodes were members, from nothing."""
    spread_median_s: float
    spread_worst_s: float
    minimum_s: float
    bytes_an_agent: float
    minimum_bytes: int
    confirmed_median_s: float
    """Until a majority had persisted it and the publisher knew."""
    events_a_second: float


def start(machine: Machine, seams: Seams) -> DirectoryNode:
    """A first-kind node."""
    settings = DirectorySettings(
        machine.name, NodeKind.FIRST, f"{machine.host}:700", f"{machine.host}:701", KEYS
    )  # fmt: skip
    return DirectoryNode(settings, seams.clock, seams.network, seams.store, seams.registry, seams.random)


def minimum_bytes() -> int:
    """One update of ours as a sealed datagram."""
    update = Update(Action.PUT, "spread/00", bytes(VALUE_BYTES), origin=1, number=1)
    body = UpdatesBody(1, False, (Message(1, 1, 0, 1, update.encode()),)).encode()
    return HEADER_BYTES + len(body) + MAC_BYTES


def measure(nodes: int, loss: float, seed: int) -> Figures:
    """Simulate one cluster. RuntimeError if it does not form, or an update does not reach everybody."""
    begun_s = time.monotonic()
    cluster = Cluster(seed, Mix(), start)
    for number in range(nodes):
        cluster.add(f"node-{number}")
        cluster.start(f"node-{number}")
    machines = list(cluster.machines.values())
    members = [machine.node for machine in machines if isinstance(machine.node, DirectoryNode)]
    waiting = list(members)

    def have_joined() -> bool:
        while waiting and waiting[-1].is_active:
            waiting.pop()
        return not waiting and all(len(node.members) == nodes for node in members)

    first_s = cluster.now_s
    if not cluster.run_until(have_joined, JOIN_LIMIT_S):
        raise RuntimeError(f"{len(waiting)} of {nodes} nodes have not joined within {JOIN_LIMIT_S:g} s")
    join_s = cluster.now_s - first_s
    cluster.wires.set_mix(Mix({"loss": loss}) if loss else Mix())
    cluster.run(REST_S)
    duration_s = UPDATES * PAUSE_S + 2.0
    idle_bytes = _sent(members)
    cluster.run(duration_s)
    idle_bytes = _sent(members) - idle_bytes
    before = _sent(members)
    until_s = cluster.now_s + duration_s
    spreads, confirmations = _publish(cluster, members)
    cluster.run(max(0.0, until_s - cluster.now_s))
    agents = max(1, nodes - 1)
    spent_s = time.monotonic() - begun_s
    return Figures(
        nodes,
        loss,
        round(join_s, 3),
        round(sorted(spreads)[len(spreads) // 2], 5),
        round(max(spreads), 5),
        SAME_SITE.base_s,
        round((_sent(members) - before - idle_bytes) / UPDATES / agents, 1),
        minimum_bytes(),
        round(sorted(confirmations)[len(confirmations) // 2], 5),
        round(cluster.scheduler.production_events / spent_s),
    )


def _publish(cluster: Cluster, members: list[DirectoryNode]) -> tuple[list[float], list[float]]:
    """Publish one by one; how long each took to be everywhere, and to be confirmed."""
    spreads: list[float] = []
    confirmations: list[float] = []
    for number in range(UPDATES):
        begun_s = cluster.now_s
        spreads.append(_spread(cluster, members, f"spread/{number:02}", confirmations if number % 2 else None))
        cluster.run(max(0.0, begun_s + PAUSE_S - cluster.now_s))
    if not cluster.run_until(lambda: len(confirmations) == UPDATES // 2, SPREAD_LIMIT_S):
        raise RuntimeError("an update was not confirmed")
    return spreads, confirmations


def _spread(
    cluster: Cluster, members: list[DirectoryNode], key: str, confirmations: list[float] | None
) -> float:  # fmt: skip
    """Publish one update; how long it took to be everywhere. With a list it is confirmed, and how late goes into it."""
    master = next(node for node in members if node.master is not None)
    begun_s = cluster.now_s
    left = set(range(len(members)))
    ends = [
        node.watch(key, lambda _key, _value, index=index: left.discard(index))  # type: ignore[misc]
        for index, node in enumerate(members)
    ]
    if confirmations is None:
        master.publish(key, bytes(VALUE_BYTES))
    else:
        master.publish(
            key, bytes(VALUE_BYTES), Confirm.SITE, lambda _answer: confirmations.append(cluster.now_s - begun_s)
        )
    if not cluster.run_until(lambda: not left, SPREAD_LIMIT_S):
        raise RuntimeError(f"{key} has not reached {len(left)} nodes within {SPREAD_LIMIT_S:g} s")
    for end in ends:
        end()
    return cluster.now_s - begun_s


def _sent(members: list[DirectoryNode]) -> int:
    return sum(node.routes.bytes_sent for node in members)


def main() -> None:
    """Command line: one line of JSON for each size and loss."""
    parser = argparse.ArgumentParser(description="simulate how updates spread")
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 30, 300, 1000])
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 0.01, 0.1, 0.3])
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for nodes in arguments.nodes:
        for loss in arguments.loss:
            print(json.dumps(asdict(measure(nodes, loss, arguments.seed))), flush=True)


if __name__ == "__main__":
    main()

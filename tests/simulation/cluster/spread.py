"""How fast an update spreads and what it costs, at 3 to 1,000 nodes and 0 to 30 % loss: figures from the simulator.

    python -m tests.simulation.cluster.spread [--nodes 3 30 300 1000] [--loss 0 0.1 0.3] [--seed 1] | tee lines
    python -m tests.simulation.cluster.spread --draw docs/spread.png < lines
    python -m tests.simulation.cluster.spread --both-kinds --nodes 300 --loss 0.3

Theory: nodes join a new cluster, then UPDATES updates of VALUE_BYTES each are published one by one, PAUSE_S apart, and
the time until every node has each is taken. What is counted is the bytes of all datagrams of all nodes in that time,
less what an idle cluster of that size sends in as much time without loss (heartbeats and positions), for each update
that the master has published: ours, and with much loss that nodes are suspected. The minimum (`least_s`,
`least_bytes`): each agent is sent the sealed datagram until it arrives, by somebody who knows at once what was lost.

With --both-kinds every tenth node is across a WAN and subscribes to a part of the keys, and datagrams are doubled and
overtaken too: what is measured is how long it takes until every node has exactly its keys.

Known weakness: the network is the simulator's (a site's latency of 0.1 ms and some jitter, unlimited bandwidth), and a
processor costs nothing in virtual time: these are figures of the protocol, not of a machine.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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
IDLE_S = 20.0  # looked at to know what an idle cluster sends: many heartbeats, so that one more is little
TAIL_S = 4.0  # after the last update: what is still asked for belongs to it
REST_S = 12.0  # after joining: what was asked for there is forgotten
JOIN_LIMIT_S = 300.0
SPREAD_LIMIT_S = 60.0
KEYS = ClusterKeys("spread", [bytes(range(32))])
FAR_PREFIX = "spread/0"
FAR_EVERY = 10
ROUGH = {"duplication": 0.3, "reordering": 0.3}


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
    minimum_bytes: float
    confirmed_median_s: float
    """Until a majority had persisted it and the publisher knew."""
    events_a_second: float


@dataclass
class Converged:
    """Of one size and loss, with nodes of both kinds."""

    nodes: int
    far: int
    loss: float
    join_s: float
    exact_s: float
    """From the last update until every node had exactly its keys."""


def start(machine: Machine, seams: Seams) -> DirectoryNode:
    """A node of the first kind in the first site, of the second kind elsewhere."""
    is_near = machine.site == "site-1"
    settings = DirectorySettings(
        machine.name,
        NodeKind.FIRST if is_near else NodeKind.SECOND,
        f"{machine.host}:700",
        f"{machine.host}:701",
        KEYS,
        () if is_near else (FAR_PREFIX,),
    )
    return DirectoryNode(settings, seams.clock, seams.network, seams.store, seams.registry, seams.random)


def minimum_bytes() -> int:
    """One update of ours as a sealed datagram."""
    update = Update(Action.PUT, "spread/00", bytes(VALUE_BYTES), origin=1, number=1)
    body = UpdatesBody(1, False, (Message(1, 1, 0, 1, update.encode()),)).encode()
    return HEADER_BYTES + len(body) + MAC_BYTES


def least_bytes(loss: float) -> float:
    """What an agent must be sent: the datagram as often as it takes until one arrives."""
    return minimum_bytes() / (1.0 - loss)


def least_s(nodes: int, loss: float) -> float:
    """Until fewer than one agent has lost every datagram: one way, and a round trip for each further one."""
    rounds = int(math.log(nodes) / -math.log(loss)) if loss else 0
    return SAME_SITE.base_s * (1 + 2 * rounds)


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
    cluster.run(REST_S)
    idle_bytes = _sent(members)
    cluster.run(IDLE_S)
    idle_bytes_a_second = (_sent(members) - idle_bytes) / IDLE_S
    cluster.wires.set_mix(Mix({"loss": loss}) if loss else Mix())
    master = next(node for node in members if node.master is not None)
    before, begun_at_s, first = _sent(members), cluster.now_s, master.replica.position.sequence
    spreads, confirmations = _publish(cluster, members)
    cluster.run(TAIL_S)
    sent_bytes = _sent(members) - before - idle_bytes_a_second * (cluster.now_s - begun_at_s)
    published = (
        master.replica.position.sequence - first
    )  # with a third lost, also that somebody was not heard for a while
    agents = max(1, nodes - 1)
    spent_s = time.monotonic() - begun_s
    return Figures(
        nodes,
        loss,
        round(join_s, 3),
        round(sorted(spreads)[len(spreads) // 2], 5),
        round(max(spreads), 5),
        least_s(nodes, loss),
        round(sent_bytes / published / agents, 1),
        round(least_bytes(loss), 1),
        round(sorted(confirmations)[len(confirmations) // 2], 5),
        round(cluster.scheduler.production_events / spent_s),
    )


def converge(nodes: int, loss: float, seed: int) -> Converged:
    """Simulate one cluster with nodes of both kinds. RuntimeError if one does not come to have exactly its keys."""
    cluster = Cluster(seed, Mix({"loss": loss, **ROUGH} if loss else ROUGH), start)
    for number in range(nodes):
        cluster.add(f"node-{number}", "site-2" if number % FAR_EVERY == FAR_EVERY - 1 else "site-1")
        cluster.start(f"node-{number}")
    members = [each.node for each in cluster.machines.values() if isinstance(each.node, DirectoryNode)]
    far = [node for node in members if node.far_link is not None]
    first_s = cluster.now_s
    if not cluster.run_until(lambda: all(node.is_active for node in members), JOIN_LIMIT_S):
        raise RuntimeError(f"some of {nodes} nodes have not joined within {JOIN_LIMIT_S:g} s")
    join_s = cluster.now_s - first_s
    cluster.run(REST_S)
    master = next(node for node in members if node.master is not None)
    for number in range(UPDATES):
        master.publish(f"spread/{number:02}", bytes(VALUE_BYTES))
        cluster.run(PAUSE_S)
    last_s = cluster.now_s
    wanted = {node.settings.name: FAR_PREFIX if node.far_link is not None else "spread/" for node in members}
    expected = {
        prefix: [pair for pair in master.range("spread/") if pair[0].startswith(prefix)] for prefix in wanted.values()
    }
    waiting = list(members)

    def are_exact() -> bool:
        while waiting and waiting[-1].range("spread/") == expected[wanted[waiting[-1].settings.name]]:
            waiting.pop()
        return not waiting

    if not cluster.run_until(are_exact, SPREAD_LIMIT_S):
        raise RuntimeError(f"{len(waiting)} nodes have not exactly their keys after {SPREAD_LIMIT_S:g} s")
    return Converged(nodes, len(far), loss, round(join_s, 3), round(cluster.now_s - last_s, 4))


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


def draw(lines: list[dict[str, float]], path: str) -> None:
    """Two pictures: time and bytes against loss, a curve for each size, the minimum beside it."""
    from tests.benchmark.drawing import pyplot, save

    figure, (times, sizes) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for nodes in sorted({line["nodes"] for line in lines}):
        of_size = sorted((line for line in lines if line["nodes"] == nodes), key=lambda line: line["loss"])
        losses = [100 * line["loss"] for line in of_size]
        (curve,) = times.plot(
            losses, [1000 * line["spread_median_s"] for line in of_size], "o-", label=f"{nodes:,} nodes"
        )
        worst = [1000 * line["spread_worst_s"] for line in of_size]
        times.plot(losses, worst, "o:", color=curve.get_color(), markersize=3)
        sizes.plot(losses, [line["bytes_an_agent"] for line in of_size], "o-", label=f"{nodes:,} nodes")
        least = [1000 * least_s(int(nodes), line["loss"]) for line in of_size]
        times.plot(losses, least, "--", color=curve.get_color(), linewidth=0.8)
    losses = sorted({line["loss"] for line in lines})
    sizes.plot([100 * loss for loss in losses], [least_bytes(loss) for loss in losses], "k--", label="minimum")
    times.set(
        xlabel="datagrams lost, %",
        ylabel="ms until the last agent has it",
        yscale="log",
        title="median, worst dotted, minimum dashed",
    )
    sizes.set(xlabel="datagrams lost, %", ylabel="bytes for each update and agent", title="cost", ylim=(0, None))
    for axes in (times, sizes):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, Path(path))


def main() -> None:
    """Command line: one line of JSON for each size and loss."""
    parser = argparse.ArgumentParser(description="simulate how updates spread")
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 30, 300, 1000])
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 0.01, 0.1, 0.3])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--both-kinds", action="store_true", help="until every node of both kinds has exactly its keys")
    parser.add_argument("--draw", metavar="FILE", help="draw the lines of former runs, from standard input")
    arguments = parser.parse_args()
    if arguments.draw:
        draw([json.loads(line) for line in sys.stdin if line.startswith("{")], arguments.draw)
        return
    for nodes in arguments.nodes:
        for loss in arguments.loss:
            figures = (converge if arguments.both_kinds else measure)(nodes, loss, arguments.seed)
            print(json.dumps(asdict(figures)), flush=True)


if __name__ == "__main__":
    main()

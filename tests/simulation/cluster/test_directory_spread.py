"""What it costs and how long it takes that everybody knows: bounds on the figures that are published."""

from metadata.directory.node import DirectoryNode
from tests.simulation.cluster.cluster import Cluster
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.spread import VALUE_BYTES, converge, measure, start

SEED = 3


def test_without_loss_an_update_costs_each_agent_little_more_than_its_datagram() -> None:
    figures = measure(10, 0.0, SEED)
    assert figures.minimum_bytes <= figures.bytes_an_agent < 1.5 * figures.minimum_bytes
    assert figures.spread_worst_s < 0.005
    assert figures.confirmed_median_s < 0.01


def test_with_a_third_of_all_datagrams_lost_everybody_knows_within_seconds() -> None:
    figures = measure(10, 0.3, SEED)
    assert figures.spread_worst_s < 5.0
    assert figures.bytes_an_agent < 6 * figures.minimum_bytes


def test_every_node_of_both_kinds_comes_to_have_exactly_its_keys() -> None:
    figures = converge(30, 0.3, SEED)
    assert figures.far == 3
    assert figures.exact_s < 10.0


def join_costs(keys: int) -> tuple[int, int, int]:
    """(messages, bytes) that one join costs the master, and the bytes that its delegate sends, with so many keys."""
    cluster = Cluster(SEED, Mix(), start)
    for number in range(4):
        cluster.add(f"node-{number}")
    for number in range(3):
        cluster.start(f"node-{number}")
    nodes = [cluster.machines[f"node-{number}"] for number in range(3)]
    running = [machine.node for machine in nodes if isinstance(machine.node, DirectoryNode)]
    assert cluster.run_until(lambda: all(node.is_active for node in running), 30.0)
    master = next(node for node in running if node.master is not None)
    for number in range(keys):
        master.publish(f"key/{number:05}", bytes(VALUE_BYTES))
    assert cluster.run_until(lambda: all(len(node.range("key/")) == keys for node in running), 30.0)
    cluster.run(5.0)
    assert master.master is not None
    messages, sent = master.master.admission.messages, master.routes.bytes_sent
    cluster.start("node-3")
    newcomer = cluster.machines["node-3"].node
    assert isinstance(newcomer, DirectoryNode)
    assert cluster.run_until(lambda: newcomer.is_active, 30.0)
    assert len(newcomer.range("key/")) == keys
    return (
        master.master.admission.messages - messages,
        master.routes.bytes_sent - sent,
        sum(node.delegate.bytes_sent for node in running if node is not master),
    )


def test_a_join_costs_the_master_the_same_whatever_the_map_holds_and_a_delegate_pays() -> None:
    small, large = join_costs(10), join_costs(3000)
    assert small[0] == large[0] == 6
    assert abs(large[1] - small[1]) < 500  # a heartbeat more or less
    assert large[1] < 3000
    assert large[2] > 3000 * VALUE_BYTES > 50 * small[2]

"""What it costs and how long it takes that everybody knows: bounds on the figures that are published."""

from tests.simulation.cluster.spread import measure

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

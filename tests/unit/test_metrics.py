"""Counters as Prometheus text, read back by Prometheus's own parser."""

from prometheus_client.parser import text_string_to_metric_families

from nbdserver.api.metrics import Figures, exposition
from nbdserver.volume.counters import Counters


def samples(text: bytes) -> dict[tuple[str, str, str], float]:
    return {
        (sample.name, sample.labels.get("volume", ""), sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_counters_gauges_and_histograms_arrive_as_what_they_are() -> None:
    counters = Counters()
    counters.reads = 7
    for value in (0, 1, 3, 4, 1000):
        counters.latency_us.add(value)
    node = Figures(gauges={"up": 1})
    found = samples(exposition(node, {"disk0": Figures(counters.as_dict(), {"clients": 2})}))
    assert found["nbdserver_up", "", ""] == 1
    assert found["nbdserver_clients", "disk0", ""] == 2
    assert found["nbdserver_reads_total", "disk0", ""] == 7
    latency = {le: value for (name, _, le), value in found.items() if name == "nbdserver_latency_us_bucket"}
    assert (latency["0.0"], latency["1.0"], latency["3.0"], latency["7.0"], latency["1023.0"]) == (1, 2, 3, 4, 5)
    assert latency["+Inf"] == 5
    assert found["nbdserver_latency_us_count", "disk0", ""] == 5
    assert found["nbdserver_latency_us_sum", "disk0", ""] == 1008


def test_volumes_with_different_figures_stand_side_by_side() -> None:
    volumes = {"a": Figures({"x": 1}), "b": Figures({"y": 2}), 'c"\n': Figures(gauges={"z": 3})}
    found = samples(exposition(Figures(), volumes, {}))
    assert found == {
        ("nbdserver_x_total", "a", ""): 1,
        ("nbdserver_y_total", "b", ""): 2,
        ("nbdserver_z", 'c"\n', ""): 3,
    }

"""The data process's counters as Prometheus text.

Theory: the data process counts in plain integers and bucket lists, which cost the hot path nothing; here, in the
other process, they become metric families when somebody scrapes. There are two kinds of figures: *counters* only
grow and get the suffix `_total`; *gauges* are what is now. A list among the counters is a histogram by powers of
two (bucket `i` counts values below 2**i), whose `<name>_count` and `<name>_total` stand beside it.

Each volume's figures carry the label `volume`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

PREFIX = "nbdserver_"

HELP = {
    "up": "1 while every data process answers",
    "start_time_seconds": "when the node was started, on the wall clock",
    "free_bytes": "room on the file system of the data directory",
    "filesystem_size_bytes": "room on the file system of the data directory, used and free",
    "filesystem_used_bytes": "of it in use, by whomever",
    "filesystem_alarm_percent": "the threshold above which it is filled: 80, 90, 95; 0: none",
    "max_data_bytes": "most that the segment files of all volumes may take; 0: the whole disk",
    "max_data_alarm_percent": "the threshold of max_data above which the live data is: 80, 90, 95; 0: none",
    "allocated_bytes": "room that the segment files of all volumes take",
    "room_bytes": "what is free and what segment files take, at most max_data",
    "provisioned_bytes": "sizes of all volumes together",
    "overcommit": "most that volumes may have together, as a multiple of room_bytes; 0: any",
    "tls_certificate_expires_seconds": "when the certificate expires, on the wall clock",
    "tls_handshakes": "TLS handshakes that ended well",
    "tls_failures": "TLS handshakes that did not: no certificate, a wrong one, or no TLS at all",
    "loop_held": "turns of the event loop longer than 5 ms: nobody else is served meanwhile",
    "loop_longest_turn_seconds": "the longest turn of the event loop since the start",
    "connections": "client connections, those in their handshake too",
    "volume_size_bytes": "size of the volume",
    "volume_failed": "1 while it is not served: it could not be opened, or a sync failed",
    "volume_full": "1 while writes that need room get ENOSPC",
    "volume_generation": "raised when acknowledged writes may have been lost",
    "volume_max_data_bytes": "most that the segment files of it, its snapshots and clones may take; 0: without limit",
    "volume_alarm_percent": "the threshold of it above which the live data is: 80, 90, 95; 0: none",
    "scrub_running": "1 while its data is being read to find what has rotted",
    "scrub_done_bytes": "read by the scrub that runs, or by the last one",
    "scrub_total_bytes": "that it has to read",
    "scrub_damaged_blocks": "that it found",
    "scrub_completed_time_seconds": "when the last whole scrub ended, on the wall clock; 0: never",
    "clients": "client connections of the volume",
    "batches": "wakes of the loop that brought requests",
    "batch_requests": "requests a batch",
    "deferred": "requests that had to wait for the device",
    "errors": "error replies",
    "throttled_us": "microseconds that clients waited for the limits of the volume",
    "disk_logical_map_updates": "entries of the logical map that were changed",
    "disk_middle_map_updates": "entries of the middle map that were changed",
    "disk_log_bytes_appended": "bytes appended to the log; over write_bytes: the write amplification of data",
    "disk_metadata_bytes_written": "bytes given to LevelDB; over write_bytes: the write amplification of metadata",
    "disk_map_page_loads": "map pages that were not in the cache",
    "disk_map_values_written": "map values that checkpoints wrote",
    "disk_batch_blocks": "blocks written by batches; over disk_batches: blocks a record",
    "disk_syncs": "fdatasyncs of the log",
    "disk_sync_requests": "flushes and forced writes that shared them",
    "disk_cold_reads": "reads that were not in the page cache",
    "disk_cleaner_blocks_moved": "blocks that the cleaner copied",
    "disk_damaged_blocks": "blocks known to be damaged: clients get EIO",
    "disk_live_bytes": "data that the volume holds",
    "disk_filled_bytes": "of allocated_bytes, what cannot be cleaned away: live data and the reserve",
    "disk_allocated_bytes": "room that its segment files take",
    "latency_us": "microseconds from a request's arrival to its reply",
}


@dataclass(frozen=True)
class Figures:
    """What one volume, or the node, reports."""

    counters: Mapping[str, Any] = field(default_factory=dict)
    gauges: Mapping[str, Any] = field(default_factory=dict)


class _Snapshot(Collector):
    def __init__(self, node: Figures, volumes: Mapping[str, Figures]) -> None:
        self._node = node
        self._volumes = volumes

    def collect(self) -> Iterator[Metric]:
        yield from _families([([], self._node)], [])
        yield from _families([([name], figures) for name, figures in self._volumes.items()], ["volume"])


def _families(sources: list[tuple[list[str], Figures]], labels: list[str]) -> Iterator[Metric]:
    for name in sorted({name for _, figures in sources for name in figures.gauges}):
        gauge = GaugeMetricFamily(PREFIX + name, _help(name), labels=labels)
        for values, figures in sources:
            if name in figures.gauges:
                gauge.add_metric(values, figures.gauges[name])
        yield gauge
    everything = {name: value for _, figures in sources for name, value in figures.counters.items()}
    histograms = {name for name, value in everything.items() if isinstance(value, list)}
    beside = {name + suffix for name in histograms for suffix in ("_count", "_total")}
    for name in sorted(set(everything) - beside):
        family: CounterMetricFamily | HistogramMetricFamily
        if name in histograms:
            family = HistogramMetricFamily(PREFIX + name, _help(name), labels=labels)
        else:
            family = CounterMetricFamily(PREFIX + name, _help(name), labels=labels)
        for values, figures in sources:
            if name not in figures.counters:
                continue
            if isinstance(family, HistogramMetricFamily):
                family.add_metric(values, _cumulative(figures.counters[name]), figures.counters[f"{name}_total"])
            else:
                family.add_metric(values, figures.counters[name])
        yield family


def _help(name: str) -> str:
    return HELP.get(name, name.replace("_", " "))


def _cumulative(buckets: list[int]) -> list[tuple[str, float]]:
    """Return Prometheus's buckets, each with all that is at or below its bound; the last one has none."""
    found: list[tuple[str, float]] = []
    total = 0
    for power, count in enumerate(buckets):
        total += count
        found.append((str(float((1 << power) - 1)) if power < len(buckets) - 1 else "+Inf", total))
    return found


def exposition(node: Figures, volumes: Mapping[str, Figures]) -> bytes:
    """Return the Prometheus text of the node's figures and of each volume's."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(node, volumes))
    return generate_latest(registry)

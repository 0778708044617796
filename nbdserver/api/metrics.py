"""The data process's counters as Prometheus text.

Theory: the data process counts in plain integers and bucket lists, which cost the hot path nothing; here, in the
other process, they become metric families when somebody scrapes. There are two kinds of figures: *counters* only
grow and get the suffix `_total`; *gauges* are what is now. A list among the counters is a histogram by powers of
two (bucket `i` counts values below 2**i), whose `<name>_count` and `<name>_total` stand beside it.

Each volume's figures carry the label `volume`, those of each data process the label `worker`.

The text (exposition format 0.0.4) is written here, and read back by the parser of Prometheus in the tests. Its library
makes objects, one a sample, and takes ten times as long: a thousand volumes are 80,000 samples a scrape.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

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
    "cluster_hears_master": "1 while the node is a member of its cluster and hears the master, or is it",
    "cluster_is_master": "1 while the node is the cluster's master",
    "cluster_nodes": "members of the cluster that the node knows",
    "cluster_silent_nodes": "of them those that the master does not hear",
    "cluster_registry_connected": "1 while etcd answers the node",
    "cluster_refused": "datagrams and streams that were refused since the start: another cluster, key or version",
    "tls_certificate_expires_seconds": "when the certificate expires, on the wall clock",
    "tls_handshakes": "TLS handshakes that ended well",
    "tls_failures": "TLS handshakes that did not: no certificate, a wrong one, or no TLS at all",
    "loop_held": "turns of the event loop longer than 5 ms: nobody else is served meanwhile",
    "loop_longest_turn_seconds": "the longest turn of the event loop since the start",
    "connections": "client connections, those in their handshake too",
    "forwarded_connections": "client connections that other nodes of the cluster serve",
    "worker_cpu_seconds": "CPU that one data process has used",
    "worker_connections": "client connections that one data process serves",
    "volume_size_bytes": "size of the volume",
    "volume_failed": "1 while it is not served: it could not be opened, or a sync failed",
    "volume_full": "1 while writes that need room get ENOSPC",
    "volume_generation": "raised when acknowledged writes may have been lost",
    "volume_max_data_bytes": "most that the segment files of it, its snapshots and clones may take; 0: without limit",
    "volume_alarm_percent": "the threshold of it above which the live data is: 80, 90, 95; 0: none",
    "replicas_wanted": "on how many nodes the volume shall be; told by the node that serves it",
    "replicas_in_sync": "how many of them have everything",
    "scrub_running": "1 while its data is being read to find what has rotted",
    "scrub_done_bytes": "read by the scrub that runs, or by the last one",
    "scrub_total_bytes": "that it has to read",
    "scrub_damaged_blocks": "that it found",
    "scrub_completed_time_seconds": "when the last whole scrub ended, on the wall clock; 0: never",
    "resync_bytes_sent": "of blocks that were sent to replicas that lacked them, as they travelled",
    "resync_bytes_saved": "of blocks in the same regions that did not have to travel: they were there, or packed",
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
    "disk_repaired_blocks": "blocks that had rotted and were written anew from another replica",
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


def of_worker(counters: Mapping[str, Any], gauges: Mapping[str, Any]) -> Figures:
    """Of a data process's own figures those that tell how busy it is beside the others."""
    return Figures(
        {"worker_cpu_seconds": counters["data_process_cpu_seconds"]}, {"worker_connections": gauges["connections"]}
    )


def exposition(
    node: Figures, volumes: Mapping[str, Figures], workers: Mapping[str, Figures] = MappingProxyType({})
) -> bytes:
    """Return the Prometheus text of the node's figures, of each volume's and of each data process's."""
    lines = [*_families([("", node)])]
    for label, sources in (("volume", volumes), ("worker", workers)):
        lines += _families([(f'{label}="{_escape(value)}"', figures) for value, figures in sources.items()])
    return "".join(f"{line}\n" for line in lines).encode()


def _families(sources: list[tuple[str, Figures]]) -> Iterator[str]:
    """Return the lines about all `sources`, each with its label (`name="value"`, or none), metric by metric."""
    for name in sorted({name for _, figures in sources for name in figures.gauges}):
        yield from _head(name, PREFIX + name, "gauge")
        for label, figures in sources:
            if name in figures.gauges:
                yield _sample(PREFIX + name, label, figures.gauges[name])
    everything = {name: value for _, figures in sources for name, value in figures.counters.items()}
    histograms = {name for name, value in everything.items() if isinstance(value, list)}
    beside = {name + suffix for name in histograms for suffix in ("_count", "_total")}
    for name in sorted(set(everything) - beside):
        told = [(label, figures.counters) for label, figures in sources if name in figures.counters]
        if name in histograms:
            yield from _head(name, PREFIX + name, "histogram")
            for label, counters in told:
                yield from _histogram(PREFIX + name, label, counters[name], counters[f"{name}_total"])
        else:
            metric = f"{PREFIX}{name}_total"
            yield from _head(name, metric, "counter")
            for label, counters in told:
                yield _sample(metric, label, counters[name])


def _head(name: str, metric: str, kind: str) -> tuple[str, str]:
    return f"# HELP {metric} {HELP.get(name, name.replace('_', ' '))}", f"# TYPE {metric} {kind}"


def _sample(metric: str, label: str, value: float) -> str:
    return f"{metric}{{{label}}} {float(value)!r}" if label else f"{metric} {float(value)!r}"


def _histogram(metric: str, label: str, buckets: list[int], sum_of_values: int) -> Iterator[str]:
    """Each bucket has all that is at or below its bound."""
    total = 0
    end = f",{label}}}" if label else "}"
    for bound, count in zip(_bounds(len(buckets)), buckets, strict=True):
        total += count
        yield f'{metric}_bucket{{le="{bound}"{end} {total}.0'
    yield _sample(f"{metric}_count", label, total)
    yield _sample(f"{metric}_sum", label, sum_of_values)


@cache
def _bounds(count: int) -> list[str]:
    """The highest value of each bucket; the last one has none."""
    return [*(str(float((1 << power) - 1)) for power in range(count - 1)), "+Inf"]


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

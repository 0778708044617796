"""Counters of a client, raised once a batch; those of an export are the sum over its clients, past ones included.

Rules: plain integers that only grow. A histogram has one bucket a power of two: bucket `i` counts values below 2**i
(and not below 2**(i-1)), so that counting is one `bit_length`.
"""

HISTOGRAM_BUCKETS = 32


class Histogram:
    """Counts of values by power of two."""

    __slots__ = ("buckets", "count", "total")

    def __init__(self) -> None:
        self.buckets = [0] * HISTOGRAM_BUCKETS
        self.count = 0
        self.total = 0

    def add(self, value: int, times: int = 1) -> None:
        """Count `value` (not negative) `times` times."""
        index = value.bit_length()
        self.buckets[index if index < HISTOGRAM_BUCKETS else HISTOGRAM_BUCKETS - 1] += times
        self.count += times
        self.total += value * times

    def include(self, other: "Histogram") -> None:
        """Count all that `other` counted too."""
        self.buckets = [mine + theirs for mine, theirs in zip(self.buckets, other.buckets, strict=True)]
        self.count += other.count
        self.total += other.total


class Counters:
    """What one client has done, or several."""

    __slots__ = (
        "batch_requests",
        "batches",
        "deferred",
        "errors",
        "flushes",
        "latency_us",
        "read_bytes",
        "reads",
        "requests",
        "throttled_us",
        "write_bytes",
        "writes",
    )

    def __init__(self) -> None:
        self.batches = 0
        self.requests = 0
        self.reads = 0
        self.read_bytes = 0
        self.writes = 0
        self.write_bytes = 0
        self.flushes = 0
        self.deferred = 0  # requests that went to BlockDevice.later
        self.errors = 0  # error replies
        self.throttled_us = 0  # how long it waited for the volume's limits
        self.batch_requests = Histogram()  # requests a batch
        self.latency_us = Histogram()  # from the bytes' arrival to the reply's sending, deferred ones included

    def add_batch(self, requests: int, took_s: float) -> None:
        """Count a batch of so many requests, answered in so long."""
        self.batches += 1
        self.requests += requests
        self.batch_requests.add(requests)
        self.latency_us.add(int(took_s * 1e6), requests)

    def include(self, other: "Counters") -> None:
        """Add all of `other`."""
        for name in self.__slots__:
            value = getattr(other, name)
            if isinstance(value, Histogram):
                getattr(self, name).include(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, int | list[int]]:
        """Names and values; histograms as their buckets, with `_count` and `_total` beside them."""
        values: dict[str, int | list[int]] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Histogram):
                values[name] = list(value.buckets)
                values[f"{name}_count"] = value.count
                values[f"{name}_total"] = value.total
            else:
                values[name] = value
        return values

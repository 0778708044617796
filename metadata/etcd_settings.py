"""Where etcd is, who we are there, and how long things take: checked without loading what speaks to it."""

import math
import random
import re
from dataclasses import dataclass, field

MAX_ENDPOINTS = 16

_ENDPOINT = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]+):([0-9]{1,5})")


@dataclass(frozen=True)
class EtcdTls:
    """PEM files, read at each connecting, so that renewed ones are taken up."""

    ca_file: str
    certificate_file: str | None = None
    """Who this client is; with its key."""
    key_file: str | None = None
    server_name: str | None = None
    """What the servers' certificates say, where that is not the endpoint's host."""


@dataclass(frozen=True)
class EtcdSettings:
    """Where etcd is, who we are there, and how long things take."""

    endpoints: tuple[str, ...]
    """HOST:PORT or [V6]:PORT of its members."""
    namespace: str
    """What all our keys begin with in etcd."""
    tls: EtcdTls | None = None
    """None: in plain text."""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    call_timeout_s: float = 5.0
    connect_timeout_s: float = 3.0
    probe_interval_s: float = 1.0
    probe_timeout_s: float = 1.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 5.0

    def __post_init__(self) -> None:
        """ValueError with one line that says what would be right."""
        if not 0 < len(self.endpoints) <= MAX_ENDPOINTS:
            raise ValueError(f"etcd has 1 to {MAX_ENDPOINTS} endpoints, not {len(self.endpoints)}")
        for endpoint in self.endpoints:
            parts = _ENDPOINT.fullmatch(endpoint)
            if not parts or not 0 < int(parts[1]) < 65536:
                raise ValueError(f"etcd's endpoint {endpoint!r} is not HOST:PORT or [V6]:PORT")
        if not self.namespace or "\0" in self.namespace:
            raise ValueError("etcd's namespace is a text of one character or more, without NUL")
        if (self.user is None) != (self.password is None):
            raise ValueError("etcd's user and password belong together: give both, or none")
        if self.tls and (self.tls.certificate_file is None) != (self.tls.key_file is None):
            raise ValueError("etcd's client certificate and its key belong together: give both, or none")
        for name in ("call_timeout_s", "connect_timeout_s", "probe_interval_s", "probe_timeout_s", "backoff_max_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"etcd's {name} is a time above 0, not {getattr(self, name)}")
        if not 0 < self.backoff_min_s <= self.backoff_max_s:
            raise ValueError(
                f"etcd's backoff_min_s is a time above 0 and up to backoff_max_s, not {self.backoff_min_s}"
            )

    def pause_s(self, failures: int, rng: random.Random) -> float:
        """Return how long to wait after so many failures in a row; other endpoints are tried at once."""
        doublings = min(failures - len(self.endpoints), 16)
        if doublings < 0:
            return self.backoff_min_s * rng.random()
        return min(self.backoff_max_s, self.backoff_min_s * (1 << doublings)) * rng.uniform(0.5, 1)

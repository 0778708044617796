"""Settings for etcd that cannot be right are refused with what would be."""

import random

import pytest

from metadata.etcd_settings import MAX_ENDPOINTS, EtcdSettings, EtcdTls


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"endpoints": ()}, "1 to 16 endpoints, not 0"),
        ({"endpoints": ("a:1",) * (MAX_ENDPOINTS + 1)}, "not 17"),
        ({"endpoints": ("https://etcd1:2379",)}, "is not HOST:PORT"),
        ({"endpoints": ("etcd1",)}, "is not HOST:PORT"),
        ({"endpoints": ("etcd1:",)}, "is not HOST:PORT"),
        ({"endpoints": (":2379",)}, "is not HOST:PORT"),
        ({"endpoints": ("etcd1:65536",)}, "is not HOST:PORT"),
        ({"endpoints": ("::1:2379",)}, "is not HOST:PORT"),
        ({"namespace": ""}, "namespace"),
        ({"namespace": "a\0"}, "namespace"),
        ({"user": "node"}, "user and password belong together"),
        ({"password": "secret"}, "user and password belong together"),
        ({"tls": EtcdTls("ca.pem", certificate_file="node.pem")}, "certificate and its key belong together"),
        ({"call_timeout_s": 0.0}, "call_timeout_s"),
        ({"probe_interval_s": -1.0}, "probe_interval_s"),
        ({"backoff_min_s": float("nan")}, "backoff_min_s"),
        ({"backoff_min_s": 6.0}, "backoff_min_s"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EtcdSettings(**{"endpoints": ("etcd1:2379",), "namespace": "nbd/", **values})  # type: ignore[arg-type]


def test_settings_that_can_be_right_are_taken() -> None:
    EtcdSettings(endpoints=("etcd1:2379", "10.0.0.1:1", "[::1]:65535"), namespace="nbd/")
    assert "secret" not in repr(EtcdSettings(("a:1",), "nbd/", user="node", password="secret"))


def test_pauses_grow_to_a_bound_once_every_endpoint_has_failed() -> None:
    settings = EtcdSettings(("a:1", "b:1", "c:1"), "nbd/")
    rng = random.Random(0)
    drawn = {failures: [settings.pause_s(failures, rng) for _ in range(200)] for failures in range(1, 40)}
    assert all(max(drawn[failures]) <= 0.1 for failures in (1, 2, 3))
    for failures in range(3, 39):
        longest = min(5.0, 0.1 * 2 ** (failures - 3))
        assert longest * 0.5 <= min(drawn[failures]) < max(drawn[failures]) <= longest

"""What the API streams of the directory."""

import asyncio
import json
from collections.abc import Callable
from typing import cast

import pytest

from nbdserver.api import cluster_routes
from nbdserver.node.cluster import Cluster

LIMIT = 3
THERE = [f"there{number}" for number in range(2 * LIMIT)]


class Directory:
    """Has THERE; what `watcher` is told has changed."""

    watcher: Callable[[str, bytes | None], None] | None = None

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        return [(key, b"") for key in THERE]

    def watch(self, prefix: str, watcher: Callable[[str, bytes | None], None]) -> Callable[[], None]:
        self.watcher = watcher
        return lambda: setattr(self, "watcher", None)


class WatchedCluster:
    def __init__(self) -> None:
        self.directory = Directory()


def test_who_watches_and_does_not_read_gets_all_that_was_there_and_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_routes, "WATCHED_LIMIT", LIMIT)
    cluster = WatchedCluster()

    async def watch() -> list[str]:
        lines = cluster_routes._changes(cast(Cluster, cluster), "")
        read = [await anext(lines)]
        assert cluster.directory.watcher is not None
        for number in range(3 * LIMIT):
            cluster.directory.watcher(f"changed{number}", None)
        read += [line async for line in lines]
        return [json.loads(line)["key"] for line in read]

    assert asyncio.run(watch()) == [*THERE, *(f"changed{number}" for number in range(LIMIT))]
    assert cluster.directory.watcher is None

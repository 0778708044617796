"""A process with one node's directory: production's code over real sockets, LevelDB and etcd.

`python -m tests.interop.directory_process JSON` takes name, kind, datagrams, streams, prefixes, path, etcd (endpoints),
cluster and key (hex). It reads commands from its standard input, a line of JSON each, and answers each with one.
"""

import asyncio
import json
import logging
import sys
from random import Random
from typing import Any

from metadata.directory.node import DirectoryNode
from metadata.directory.reports import Answer
from metadata.directory.settings import DirectorySettings
from metadata.etcd_registry import EtcdRegistry
from metadata.etcd_settings import EtcdSettings
from metadata.leveldb import LevelStore
from nbdserver.host.clock import HostClock
from nbdserver.host.completions import Completions, Workers
from nbdserver.host.network import SocketNetwork
from protocol.directory import Confirm, NodeKind
from protocol.sealed_frames import ClusterKeys

COUNT_S = 0.02  # between an answer and the next number


def say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


class Counting:
    """Publishes a number in one key, `confirm=SITE`, and the next one when it is answered."""

    def __init__(self, node: DirectoryNode, clock: HostClock) -> None:
        self.confirmed = 0
        self._node = node
        self._clock = clock
        self._key = ""
        self._number = 0

    def begin(self, key: str, first: int) -> None:
        self._key, self._number = key, first
        self._next()

    def _next(self) -> None:
        self._number += 1
        self._node.publish(self._key, b"%d" % self._number, Confirm.SITE, self._answered)

    def _answered(self, answer: Answer) -> None:
        if answer is Answer.CONFIRMED:
            self.confirmed = self._number
        self._clock.call_later(COUNT_S, self._next)


def obey(node: DirectoryNode, counting: Counting, command: dict[str, Any]) -> None:
    match command["do"]:
        case "publish":
            value = command["value"]
            node.publish(
                command["key"],
                None if value is None else value.encode(),
                Confirm[command["confirm"]],
                lambda answer: say(answer.value),
                command.get("expires_s", 0.0),
            )
        case "range":
            say({key: value.decode() for key, value in node.range(command["prefix"])})
        case "count":
            counting.begin(command["key"], command["first"])
            say("counting")
        case "status":
            say(
                {
                    "active": node.is_active,
                    "master": node.master is not None,
                    "epoch": node.epoch,
                    "members": sorted(member.name for member in node.members.values()),
                    "counted": counting.confirmed,
                    "position": list(node.replica.position),
                    "refused": node.routes.refused,
                    "snapshots": node.joiner.snapshots,
                    "failure": node.failure,
                }
            )


async def run(settings: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    clock = HostClock(loop)
    workers = Workers(Completions(loop), 1, "store")
    node = DirectoryNode(
        DirectorySettings(
            settings["name"],
            NodeKind[settings["kind"]],
            settings["datagrams"],
            settings["streams"],
            ClusterKeys(settings["cluster"], [bytes.fromhex(settings["key"])]),
            tuple(settings["prefixes"]),
        ),
        clock,
        SocketNetwork(loop),
        LevelStore(settings["path"], workers, workers),
        EtcdRegistry(EtcdSettings(endpoints=tuple(settings["etcd"]), namespace="test/"), clock, Random(), loop),
        Random(),
    )
    counting = Counting(node, clock)
    say("ready")
    lines = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        obey(node, counting, json.loads(line))
    node.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(run(json.loads(sys.argv[1])))

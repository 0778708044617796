"""A node's program is replaced while it owns a replicated volume: its clients see a pause."""

from protocol.nbd import Command
from tests.cluster_rig import ClusterRig, meet, wait
from tests.nbd_client import Client

BLOCK = 4096


def test_a_client_stays_attached_to_the_owner_that_is_upgraded(rig: ClusterRig) -> None:
    n1, n2 = rig.start("n1"), rig.start("n2")
    meet((n1, n2))
    n1.ask("volume", "create", "db", "--size", "64M", "--replicas", "2")
    client = Client(("127.0.0.1", n1.server.port), "db", timeout_s=40)
    assert client.request(Command.WRITE, 0, BLOCK, b"a" * BLOCK).error == 0
    n1.server.command("upgrade-in-place")
    assert client.request(Command.WRITE, BLOCK, BLOCK, b"b" * BLOCK).error == 0
    assert client.read(0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
    wait(lambda: n2.replicas("db")["in_sync"] == 2, "both are in sync")
    assert n2.replicas("db")["owner"] == "n1"
    client.close()

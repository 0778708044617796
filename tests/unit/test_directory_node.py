"""One node's directory as the program uses it: alone, over seams in memory."""

import errno
import random
from collections.abc import Callable

import pytest

from metadata.directory.node import DirectoryNode
from metadata.directory.reports import Answer
from metadata.directory.settings import OWN_PREFIXES_LIMIT, DirectorySettings, publication
from metadata.embedded_registry import EmbeddedRegistry
from metadata.registry_table import RegistryTable
from protocol.directory import KEY_LIMIT_BYTES, VALUE_LIMIT_BYTES, Confirm, Message, NodeKind, Updates
from protocol.sealed_frames import ClusterKeys, DatagramSealer
from tests.unit.directory_rig import MemoryStore, SetClock

KEYS = ClusterKeys("test", [bytes(32)])


class DeafNetwork:
    """Nobody is there; what is sent is kept."""

    def __init__(self) -> None:
        self.received: Callable[[str, bytes], None]
        self.sent: list[tuple[str, bytes]] = []
        self.address = "10.0.0.1:1"

    def listen(self, address: str, accept: object) -> Callable[[], None]:
        return lambda: None

    def open_datagrams(self, address: str, received: Callable[[str, bytes], None]) -> "DeafNetwork":
        self.received = received
        return self

    def send(self, peer: str, payload: bytes) -> None:
        self.sent.append((peer, payload))

    def close(self) -> None:
        return


class Alone:
    """The first node of a cluster."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.clock = SetClock()
        self.store = store or MemoryStore()
        self.network = DeafNetwork()
        registry_store = MemoryStore()
        settings = DirectorySettings("a", NodeKind.FIRST, "10.0.0.1:1", "10.0.0.1:2", KEYS)
        self.node = DirectoryNode(
            settings,
            self.clock,
            self.network,  # type: ignore[arg-type]
            self.store,
            EmbeddedRegistry(RegistryTable(registry_store), self.clock),
            random.Random(1),
        )

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            self.clock.advance(0.05)
            self.store.sync()


def test_alone_it_is_the_master_and_confirms_what_it_has_persisted() -> None:
    alone = Alone()
    alone.run(1.0)
    assert alone.node.is_active
    answers: list[Answer] = []
    for confirm in Confirm:
        alone.node.publish(f"key/{confirm.name}", b"v", confirm, answers.append)
    assert answers == [Answer.CONFIRMED]
    alone.run(1.0)
    assert answers == [Answer.CONFIRMED] * 3
    assert [key for key, _ in alone.node.range("key/")] == ["key/NONE", "key/REGISTRY", "key/SITE"]


def test_what_expires_goes_and_a_watch_hears_of_both() -> None:
    alone = Alone()
    alone.run(1.0)
    heard: list[bytes | None] = []
    alone.node.watch("passing", lambda key, value: heard.append(value))
    alone.node.publish("passing", b"v", expires_s=2.0)
    alone.run(1.9)
    assert heard == [b"v"]
    alone.run(0.3)
    assert heard == [b"v", None]
    assert alone.node.get("passing") is None


def test_a_kept_key_stays_kept_whatever_is_published_later() -> None:
    alone = Alone()
    alone.run(1.0)
    alone.node.publish("kept", b"1", Confirm.REGISTRY)
    alone.run(0.5)
    alone.node.publish("kept", b"2")
    alone.run(0.5)
    entry = alone.node.replica.map.entry("kept")
    assert entry is not None
    assert (entry.update.value, entry.update.is_kept) == (b"2", True)


def test_a_node_whose_store_fails_goes_silent_and_says_why() -> None:
    alone = Alone()
    alone.run(1.0)
    answers: list[Answer] = []
    alone.store.fails = errno.EIO
    alone.node.publish("lost", b"v", Confirm.SITE, answers.append)
    alone.run(0.5)
    assert "cannot be written" in alone.node.failure
    assert answers == [Answer.UNKNOWN]
    assert alone.node.master is None
    alone.network.sent.clear()
    alone.store.fails = 0
    alone.run(20.0)
    assert alone.network.sent == []
    assert alone.node.master is None
    alone.node.publish("later", b"v", Confirm.NONE, answers.append)
    assert answers[1:] == [Answer.NOT_DONE]
    assert alone.node.get("master") == b"a"  # reads go on


def test_a_node_that_does_not_understand_its_master_takes_no_part_any_more() -> None:
    alone = Alone()
    alone.run(1.0)
    node = alone.node
    node.election.give_up("for the test", 60.0)
    node.follower.epoch, node.follower.is_following = 1, True
    node.replica.follow(node.replica.history.starts)
    sealer = DatagramSealer(KEYS, 99, 1)
    body = Updates(1, False, (Message(1, node.replica.position.sequence + 1, 0, 1, b"?"),)).encode()
    alone.network.received("10.0.0.2:1", sealer.seal(Updates.kind, body))
    assert "does not understand" in node.failure
    alone.run(90.0)
    assert node.master is None


def test_it_leaves_cleanly_and_answers_what_waits() -> None:
    alone = Alone()
    alone.run(1.0)
    answers: list[Answer] = []
    alone.node.publish("key", b"v", Confirm.SITE, answers.append)
    alone.node.close()
    alone.node.close()
    assert answers == [Answer.UNKNOWN]
    alone.node.publish("key", b"v", Confirm.SITE, answers.append)
    assert answers[1:] == [Answer.NOT_DONE]


@pytest.mark.parametrize(
    ("key", "value", "expires_s", "message"),
    [
        ("", b"", 0.0, "1 to 480 bytes"),
        ("é" * KEY_LIMIT_BYTES, b"", 0.0, "has 960 bytes"),
        ("a\0b", b"", 0.0, "no NUL"),
        ("a", bytes(VALUE_LIMIT_BYTES + 1), 0.0, "at most 262144 bytes, not 262145"),
        ("a", b"", -1.0, "not -1"),
        ("a", b"", 5e6, "within 4000000 seconds"),
    ],
)
def test_what_no_directory_takes_is_refused_in_a_sentence(
    key: str, value: bytes, expires_s: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        publication(key, value, expires_s)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"streams": "x" * 300},
        {"prefixes": ("p",) * (OWN_PREFIXES_LIMIT + 1)},
        {"prefixes": ("p" * 481,)},
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    values: dict[str, object] = {
        "name": "a", "kind": NodeKind.SECOND, "datagrams": "x:1", "streams": "x:2", "keys": KEYS, **changes
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"at most|1 to 255"):
        DirectorySettings(**values)  # type: ignore[arg-type]

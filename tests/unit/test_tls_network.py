"""Streams between nodes: TLS with certificates on both sides, told apart by what they are for."""

import asyncio
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadata.seams import Connection, Receiver
from nbdserver.host import tls_network
from nbdserver.host.clock import HostClock
from nbdserver.host.tls import TlsConnection, TlsError
from nbdserver.host.tls_network import CALL_PROTOCOL, PeerContexts, TlsNetwork, make_peer_contexts
from nbdserver.node.authority import Authority
from nbdserver.node.cluster_calls import REQUEST_BYTES, CallServer, call
from nbdserver.node.errors import NodeError, WrongInputError
from tests.certificates import DAY
from tests.unit.test_network import Echo, Loop
from tests.unit.test_peer_network import Attempt


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PeerContexts]:
    """Of nodes `a` and `b` of one CA, and of `stranger`."""
    found = {}
    for ca, names in (("ours", ("a", "b")), ("theirs", ("stranger",))):
        for name in names:
            directory = tmp_path_factory.mktemp(name)
            authority = Authority(directory)
            source = tmp_path_factory.getbasetemp() / ca
            if not source.exists():
                Authority(source).make_ca(ca, DAY)
            for file in ("ca-cert.pem", "ca-key.pem"):
                (directory / file).write_bytes((source / file).read_bytes())
            certificate, key = authority.make_member(name, DAY).files
            found[name] = make_peer_contexts(authority.ca_certificate, certificate, key)
    return found


class Node:
    """A network over TLS, as Attempt wants a loop."""

    def __init__(self, loop: Loop, contexts: PeerContexts) -> None:
        self._loop = loop
        self.refused: list[tuple[str, str]] = []
        self.arrived: list[Echo] = []
        clock = loop.call(lambda: HostClock(asyncio.get_running_loop()))
        self.calls = CallServer(clock, self._answer)  # type: ignore[arg-type]  # `call` gives any object
        self.network = TlsNetwork(
            loop.network,
            clock,  # type: ignore[arg-type]
            lambda: contexts,
            lambda peer, reason: self.refused.append((peer, reason)),
            self.calls.accept,
        )

    def call(self, work: Callable[[], Any]) -> Any:
        return self._loop.call(work)

    def listen(self, address: str) -> None:
        self.call(lambda: self.network.listen(address, self._accept))

    def _accept(self, connection: Connection) -> Receiver:
        self.arrived.append(Echo(connection))
        return self.arrived[-1]

    @staticmethod
    async def _answer(certificate: str, peer: str, question: dict[str, Any]) -> dict[str, Any]:
        if question.get("do") == "fail":
            raise WrongInputError("the question is wrong")
        return {"certificate": certificate, "question": question}


@pytest.fixture
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.end()


@pytest.fixture
def address(free_port: Callable[[], int]) -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def node(loop: Loop, contexts: dict[str, PeerContexts], address: str) -> Node:
    made = Node(loop, contexts["a"])
    made.listen(address)
    return made


def test_nodes_of_one_ca_exchange_bytes_and_know_each_others_names(
    loop: Loop, node: Node, contexts: dict[str, PeerContexts], address: str
) -> None:
    other = Node(loop, contexts["b"])
    attempt = Attempt(other, address)  # type: ignore[arg-type]  # what it needs of a Loop
    loop.wait(lambda: attempt.echo)
    echo = attempt.echo
    assert echo is not None
    loop.call(lambda: echo.connection.send([b"x" * 300_000]))
    loop.wait(lambda: echo.received_bytes == 300_000)
    arrived = node.arrived[0].connection
    assert isinstance(arrived, TlsConnection)
    assert arrived.certificate == "b"
    assert arrived.cipher.startswith("TLSv1.3")
    loop.call(echo.connection.close)
    loop.wait(lambda: node.arrived[0].lost_reason)
    assert (attempt.answers, node.refused, other.refused) == (1, [], [])


def test_a_node_of_another_ca_gets_no_stream_and_both_sides_are_told(
    loop: Loop, node: Node, contexts: dict[str, PeerContexts], address: str
) -> None:
    stranger = Node(loop, contexts["stranger"])
    attempt = Attempt(stranger, address)  # type: ignore[arg-type]
    loop.wait(lambda: attempt.reason)
    assert "certificate verify failed" in attempt.reason
    loop.wait(lambda: node.refused)
    assert stranger.refused[0][0] == address
    assert attempt.echo is None
    assert not node.arrived


def test_who_shows_no_certificate_or_speaks_no_tls_gets_no_stream(
    loop: Loop, node: Node, contexts: dict[str, PeerContexts], address: str
) -> None:
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    nobody.set_alpn_protocols(["nbdserver-directory"])
    without = Node(loop, PeerContexts(contexts["a"].server, nobody))
    attempt = Attempt(without, address)  # type: ignore[arg-type]
    loop.wait(lambda: node.refused)
    assert "shows no certificate" in node.refused[0][1]
    loop.wait(lambda: attempt.echo is not None and attempt.echo.lost_reason)
    plain = Attempt(loop, address)
    loop.wait(lambda: plain.echo)
    echo = plain.echo
    assert echo is not None
    loop.call(lambda: echo.connection.send([b"GET / HTTP/1.0\r\n\r\n"]))
    loop.wait(lambda: len(node.refused) > 1)
    assert not node.arrived


def test_a_handshake_that_does_not_end_is_ended(
    loop: Loop, node: Node, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_network, "HANDSHAKE_S", 0.05)
    silent = Attempt(loop, address)
    loop.wait(lambda: node.refused)
    assert "no handshake in 0.05 s" in node.refused[0][1]
    loop.wait(lambda: silent.echo is not None and silent.echo.lost_reason)


def test_no_more_handshakes_than_that_are_served_at_a_time(
    loop: Loop, node: Node, contexts: dict[str, PeerContexts], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_network, "MOST_HANDSHAKES", 1)
    first = Attempt(loop, address)
    loop.wait(lambda: first.echo)
    second = Attempt(loop, address)
    loop.wait(lambda: second.echo is not None and second.echo.lost_reason)
    assert first.echo is not None
    loop.call(first.echo.connection.close)
    loop.wait(lambda: node.refused)
    third = Attempt(Node(loop, contexts["b"]), address)  # type: ignore[arg-type]
    loop.wait(lambda: third.echo)


def test_a_call_is_answered_refused_or_cut_off(
    loop: Loop, node: Node, contexts: dict[str, PeerContexts], address: str
) -> None:
    context = contexts["b"].client
    context.set_alpn_protocols([CALL_PROTOCOL])

    def ask(question: dict[str, Any]) -> dict[str, Any]:
        return asyncio.run(call(address, context, question))

    try:
        question = {"do": "echo", "text": "ü" * 1000}
        assert ask(question) == {"certificate": "b", "question": question}
        with pytest.raises(NodeError, match="refuses: the question is wrong"):
            ask({"do": "fail"})
        with pytest.raises(NodeError, match="cannot be asked"):
            ask({"do": "x" * REQUEST_BYTES})
        assert ask({"do": "again"})["certificate"] == "b"
    finally:
        context.set_alpn_protocols(["nbdserver-directory"])


def test_files_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.make_ca("ca", DAY)
    certificate, key = authority.make_member("a", DAY).files
    with pytest.raises(TlsError, match="missing cannot be read"):
        make_peer_contexts(tmp_path / "missing", certificate, key)
    with pytest.raises(TlsError, match="has no certificate in PEM"):
        make_peer_contexts(key, certificate, key)
    with pytest.raises(TlsError, match="are not a certificate and its key"):
        make_peer_contexts(authority.ca_certificate, authority.ca_certificate, key)

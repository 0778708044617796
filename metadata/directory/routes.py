"""How one node says something to another: datagrams in the site, streams for what is too large or far away.

Theory: a node is known by its id. Where it is reached is in the map (`member/NAME`), for a master that is not in it yet
in the registry's state, for a joining node in what it asked. Each body goes by datagram if it fits and both are in the
site; otherwise over a stream: the one that a second-kind node opened, or one that is opened for it.

Rules
- What cannot be sent is dropped; whoever needs an answer asks again.
- A refused datagram is counted, and told in the log once in LOG_S for each sender and reason; at most LOGGED_LIMIT of
  these are remembered.
- A stream opened for a large body is closed after IDLE_S; the next one opens another.
"""

import logging
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from metadata.directory.streams import FrameStream
from metadata.seams import Clock, Connection, Datagrams, Network
from protocol.directory import MalformedError
from protocol.directory_control import decode_body
from protocol.sealed_frames import (
    DATAGRAM_BODY_BYTES,
    NONCE_BYTES,
    ClusterKeys,
    DatagramOpener,
    DatagramSealer,
    FrameRefusedError,
    SealedStream,
)

LOG_S = 60.0
LOGGED_LIMIT = 256
IDLE_S = 10.0  # no need to be exact: who is cut off asks again

_log = logging.getLogger(__name__)


class Routes:
    """The Outbox of one node, and what it hears."""

    def __init__(
        self,
        clock: Clock,
        network: Network,
        random: Random,
        keys: ClusterKeys,
        node: int,
        incarnation: int,
        datagrams: str,
        heard: Callable[[int, Any, FrameStream | None], None],
        addresses: Callable[[int], tuple[str, str]],
    ) -> None:
        """`heard(node, body, stream)` gets all that comes, `addresses(node)` is where a node takes datagrams ("" if it
        is across a WAN) and streams. OSError if the address cannot be had."""
        self.node = node
        self.bytes_sent = 0
        self.datagrams_sent = 0
        self.refused = 0
        self.on_refused: Callable[[str, str], None] | None = None
        """`on_refused(peer, reason)` is told what the log is told."""
        self.streams: dict[int, FrameStream] = {}
        """By the node at their other end: those that replies to it go over."""
        self._clock = clock
        self._network = network
        self._random = random
        self._keys = keys
        self._incarnation = incarnation
        self._heard = heard
        self._addresses = addresses
        self._sealer = DatagramSealer(keys, node, incarnation)
        self._opener = DatagramOpener(keys)
        self._logged: dict[tuple[int, str], float] = {}
        self._large: dict[int, FrameStream] = {}
        self._opening: dict[int, Callable[[], None]] = {}
        self._is_closed = False
        self._datagrams: Datagrams = network.open_datagrams(datagrams, self._received)

    @property
    def address(self) -> str:
        """Where datagrams are received."""
        return self._datagrams.address

    # --- the Outbox ---

    def send(self, node: int, body: Any) -> None:
        if node == self.node:
            self._clock.call_soon(lambda: self._here(body))
            return
        stream = self.streams.get(node)
        if stream is not None:
            encoded = body.encode()
            self.bytes_sent += len(encoded)
            stream.send_encoded(body.kind, encoded)
            return
        self._send_encoded([node], body.kind, body.encode())

    def send_all(self, nodes: Sequence[int], body: Any) -> None:
        self._send_encoded(nodes, body.kind, body.encode())

    def _here(self, body: Any) -> None:
        if not self._is_closed:
            self._heard(self.node, body, None)

    def _send_encoded(self, nodes: Sequence[int], kind: int, body: bytes) -> None:
        sealed = b""
        for node in nodes:
            datagrams, streams = self._addresses(node)
            if len(body) > DATAGRAM_BODY_BYTES:
                self._send_large(node, streams, kind, body)
            elif datagrams:
                sealed = sealed or self._sealer.seal(kind, body)
                self.datagrams_sent += 1
                self.bytes_sent += len(sealed)
                self._datagrams.send(datagrams, sealed)

    def _send_large(self, node: int, address: str, kind: int, body: bytes) -> None:
        """Over a stream of its own, which stays open a while for the next one."""
        stream = self._large.get(node)
        if stream is not None:
            self.bytes_sent += len(body)
            stream.send_encoded(kind, body)
        elif address and node not in self._opening:

            def connected(opened: FrameStream) -> None:
                self._large[node] = opened
                self._clock.call_later(IDLE_S, lambda: self._close_large(node, opened))
                self._send_large(node, address, kind, body)

            def lost(reason: str) -> None:
                self._opening.pop(node, None)
                self._large.pop(node, None)

            self._opening[node] = self.open_stream(address, None, lambda answer: None, lost, connected)

    def _close_large(self, node: int, stream: FrameStream) -> None:
        if self._large.get(node) is stream:
            del self._large[node]
            self._opening.pop(node)()

    # --- datagrams ---

    def _received(self, peer: str, datagram: bytes) -> None:
        try:
            frame = self._opener.open(datagram)
            body = decode_body(frame.kind, bytes(frame.body))
        except FrameRefusedError as error:
            if error.reason != "it came before":  # the network doubles datagrams: nothing to tell
                self.refuse(peer, error.sender, error.reason)
            return
        except MalformedError as error:
            self.refuse(peer, frame.sender, f"it has kind {frame.kind} and its body is malformed: {error}")
            return
        if frame.sender != self.node and not self._is_closed:
            self._heard(frame.sender, body, None)

    def refuse(self, peer: str, sender: int, reason: str) -> None:
        """Say in the log, not too often, that something was refused."""
        self.refused += 1
        now_s = self._clock.now()
        key = (sender, reason)
        if now_s - self._logged.get(key, -LOG_S) < LOG_S:
            return
        if len(self._logged) >= LOGGED_LIMIT:
            self._logged.clear()
        self._logged[key] = now_s
        _log.warning("refused what %s sent (node %016x): %s", peer, sender, reason)
        if self.on_refused is not None:
            self.on_refused(peer, reason)

    # --- streams ---

    def _sealed(self, is_connector: bool) -> SealedStream:
        nonce = self._random.getrandbits(8 * NONCE_BYTES).to_bytes(NONCE_BYTES, "big")
        return SealedStream(self._keys, self.node, self._incarnation, nonce, is_connector=is_connector)

    def accept(self, connection: Connection, lost: Callable[[FrameStream], None]) -> FrameStream:
        """A node has opened a stream to this one."""

        def ended(stream: FrameStream, reason: str) -> None:
            if reason.startswith("refused"):
                self.refuse(connection.peer_name, stream.peer, reason)
            lost(stream)

        return FrameStream(
            self._clock,
            connection,
            self._sealed(False),
            lambda stream, body: None if self._is_closed else self._heard(stream.peer, body, stream),
            ended,
        )

    def open_stream(
        self,
        address: str,
        first: Any,
        heard: Callable[[Any], None],
        failed: Callable[[str], None],
        opened: Callable[[FrameStream], None] | None = None,
    ) -> Callable[[], None]:
        """Open a stream and send `first` over it; return what gives it up. `failed(reason)` is called once, if it ends
        before that."""
        streams: list[FrameStream] = []
        is_over = False

        def connected(connection: Connection) -> FrameStream | None:
            if is_over:
                return None
            stream = FrameStream(
                self._clock,
                connection,
                self._sealed(True),
                lambda stream, body: None if is_over else heard(body),
                lambda stream, reason: ended(reason),
                opened,
            )
            streams.append(stream)
            if first is not None:
                stream.send(first)
            return stream

        def ended(reason: str) -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                if reason.startswith("refused"):
                    self.refuse(address, streams[0].peer if streams else 0, reason)
                failed(reason)

        def give_up() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                stop_connecting()
                for stream in streams:
                    stream.close()

        stop_connecting = self._network.connect(address, connected, ended)
        return give_up

    def use_keys(self, keys: ClusterKeys) -> None:
        """Seal and open with these from now on; streams that are open keep what they agreed on."""
        self._keys = self._sealer.keys = self._opener.keys = keys

    def close(self) -> None:
        self._is_closed = True
        self._datagrams.close()
        for give_up in list(self._opening.values()):
            give_up()
        for stream in list(self.streams.values()):
            stream.close()
        self.streams.clear()

"""The frames that nodes send each other: authenticated, protected against replay, with the sender's id on them.

    FrameHeader (36 bytes)  body  keyed hash (16 bytes)

Theory: whoever has the cluster's key is a member of the cluster; nobody else is heard. The hash (keyed BLAKE2b) covers
the header and the body. A datagram may be lost, doubled or overtaken, so its counter is compared with a window of those
seen from that sender; on a stream counters rise by one, under a key made from two fresh random numbers, so that a
recorded stream opens nothing.

Rules
- The first five bytes (magic, version) mean the same in every version, so that another version is told by its number.
- Everything is checked before anything changes; what is refused is a `FrameRefusedError` with a sentence for people.
- During a rotation two keys are valid: frames are sealed with the first and opened with either.
- Bounds: SENDERS_LIMIT windows (the longest silent goes), WINDOW counters each, BODY_LIMIT_BYTES a frame.

Known weakness: windows live in memory. A receiver that restarts takes a recorded datagram once more.
"""

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Struct

from protocol.invariant import invariant
from protocol.layout import derive

MAGIC = b"nbdD"
VERSION = 1
MAC_BYTES = 16
DATAGRAM_BYTES = 1400  # with UDP's and IP's headers it fits into an Ethernet frame, with room for a tunnel's
BODY_LIMIT_BYTES = 1 << 19  # of a frame on a stream: the largest value and its key fit
WINDOW = 4096  # counters: more than a master of a thousand nodes has under way at once
SENDERS_LIMIT = 4096
CLUSTER_BYTES = 4
NONCE_BYTES = 16

FrameHeader = Struct(
    "magic" / Const(MAGIC),
    "version" / Int8ub,
    "kind" / Int8ub,
    "key_id" / Int16ub,
    "body_bytes" / Int32ub,
    "cluster" / Bytes(CLUSTER_BYTES),
    "incarnation" / Int32ub,
    "sender" / Int64ub,
    "counter" / Int64ub,
)
_PREFIX = MAGIC + bytes([VERSION])
FRAME_HEADER = derive(FrameHeader)
HEADER_BYTES = FRAME_HEADER.size
DATAGRAM_BODY_BYTES = DATAGRAM_BYTES - HEADER_BYTES - MAC_BYTES


class FrameRefusedError(Exception):
    """A frame that is not taken. `reason` is the same for all frames refused alike, `sender` their alleged sender."""

    def __init__(self, reason: str, sender: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sender = sender


@dataclass(frozen=True)
class Frame:
    """What was authenticated."""

    kind: int
    sender: int
    incarnation: int
    body: memoryview


class ClusterKeys:
    """A cluster's name and its valid keys (16 to 64 bytes each), the one to seal with first."""

    def __init__(self, cluster: str, keys: Sequence[bytes]) -> None:
        invariant(1 <= len(keys) <= 2, "a cluster has one key, two during a rotation")
        invariant(all(16 <= len(key) <= 64 for key in keys), "a cluster's key has 16 to 64 bytes")
        self.cluster = hashlib.blake2b(cluster.encode(), digest_size=CLUSTER_BYTES, person=b"nbd-cluster").digest()
        self.current = _key_id(keys[0])
        self.by_id = {_key_id(key): key for key in keys}


def _key_id(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=2, person=b"nbd-key-id").digest(), "big")


def _mac(key: bytes, covered: bytes | memoryview) -> bytes:
    return hashlib.blake2b(covered, key=key, digest_size=MAC_BYTES).digest()


def _header(keys: ClusterKeys, kind: int, body_bytes: int, incarnation: int, sender: int, counter: int) -> bytes:
    return FRAME_HEADER.pack(MAGIC, VERSION, kind, keys.current, body_bytes, keys.cluster, incarnation, sender, counter)


def _sealed(secret: bytes, frame: bytes) -> bytes:
    return frame + _mac(secret, frame)


class DatagramSealer:
    """Seals the datagrams of one process. `incarnation` must be higher than in every former life of this node."""

    def __init__(self, keys: ClusterKeys, sender: int, incarnation: int) -> None:
        self.keys = keys
        self._sender = sender
        self._incarnation = incarnation
        self._counter = 0

    def seal(self, kind: int, body: bytes) -> bytes:
        """The whole datagram. `body` has at most DATAGRAM_BODY_BYTES."""
        invariant(len(body) <= DATAGRAM_BODY_BYTES, f"{len(body)} bytes do not fit into a datagram")
        self._counter += 1
        keys = self.keys
        header = _header(keys, kind, len(body), self._incarnation, self._sender, self._counter)
        return _sealed(keys.by_id[keys.current], header + body)


class _Window:
    """The counters seen of one incarnation of one sender: the highest, and a bit for each of the WINDOW below it."""

    __slots__ = ("bits", "highest", "incarnation")

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.highest = 0
        self.bits = 0

    def takes(self, counter: int) -> bool:
        """True, once, for a counter that was not seen and is not too old to know."""
        ahead = counter - self.highest
        if ahead > 0:
            self.bits = ((self.bits << ahead) | 1) & _WINDOW_MASK if ahead < WINDOW else 1
            self.highest = counter
            return True
        bit = 1 << -ahead
        if -ahead >= WINDOW or self.bits & bit:
            return False
        self.bits |= bit
        return True


_WINDOW_MASK = (1 << WINDOW) - 1


class DatagramOpener:
    """Opens the datagrams of all senders, each once."""

    def __init__(self, keys: ClusterKeys) -> None:
        self.keys = keys
        self._windows: OrderedDict[int, _Window] = OrderedDict()

    def open(self, datagram: bytes) -> Frame:
        """Raises FrameRefusedError."""
        frame, counter = _open(self.keys, self.keys.by_id, datagram, DATAGRAM_BODY_BYTES)
        if len(datagram) != HEADER_BYTES + len(frame.body) + MAC_BYTES:
            raise FrameRefusedError("its length is wrong", frame.sender)
        window = self._windows.get(frame.sender)
        if window is None or frame.incarnation > window.incarnation:
            window = self._windows[frame.sender] = _Window(frame.incarnation)
            if len(self._windows) > SENDERS_LIMIT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(frame.sender)
        if frame.incarnation < window.incarnation:
            raise FrameRefusedError("it is from an earlier life of its sender", frame.sender)
        if not window.takes(counter):
            raise FrameRefusedError("it came before", frame.sender)
        return frame


def _open(
    keys: ClusterKeys, secrets: dict[int, bytes], data: bytes | memoryview, limit_bytes: int
) -> tuple[Frame, int]:
    """(frame, its counter) of what begins at `data`; the hash is right. Raises FrameRefusedError."""
    if len(data) < HEADER_BYTES:
        raise FrameRefusedError("it is too short for a frame")
    magic, version, kind, key_id, body_bytes, cluster, incarnation, sender, counter = FRAME_HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FrameRefusedError("it is no frame of ours")
    if version != VERSION:
        raise FrameRefusedError(f"it has version {version}, this program knows version {VERSION}")
    if cluster != keys.cluster:
        raise FrameRefusedError("it is from another cluster", sender)
    end = HEADER_BYTES + body_bytes
    if body_bytes > limit_bytes or len(data) < end + MAC_BYTES:
        raise FrameRefusedError("its length is wrong", sender)
    secret = secrets.get(key_id)
    if secret is None:
        raise FrameRefusedError("it is sealed with a key that this cluster does not use", sender)
    view = memoryview(data)
    if not hmac.compare_digest(_mac(secret, view[:end]), view[end : end + MAC_BYTES]):
        raise FrameRefusedError("its keyed hash is wrong: another key, or damaged on its way", sender)
    return Frame(kind, sender, incarnation, view[HEADER_BYTES:end]), counter


HELLO = 0
"""Kind of a stream's first frame; its body is the sender's random number."""


class SealedStream:
    """One end of a stream of frames: bytes in, frames out.

    Each side sends `hello()` first and seals with the cluster's key until it has the other's; then both use the hash of
    both numbers, the connecting side's first. `nonce` is NONCE_BYTES random bytes, never used before.
    """

    def __init__(self, keys: ClusterKeys, sender: int, incarnation: int, nonce: bytes, *, is_connector: bool) -> None:
        invariant(len(nonce) == NONCE_BYTES, "a nonce has 16 bytes")
        self._keys = keys
        self._sender = sender
        self._incarnation = incarnation
        self._nonce = nonce
        self._is_connector = is_connector
        self._sealing: bytes | None = None
        self._opening: dict[int, bytes] = {}
        self._sent = 0
        self._taken = 0
        self._received = bytearray()
        self.peer = 0
        """Id of the other node; 0 until its hello has come."""

    @property
    def is_open(self) -> bool:
        """True once both sides have said hello: frames can be sealed."""
        return self._sealing is not None

    @property
    def has_part(self) -> bool:
        """Whether a frame has come whose end has not."""
        return bool(self._received)

    def hello(self) -> bytes:
        """What this side sends first."""
        return self._seal(self._keys.by_id[self._keys.current], HELLO, self._nonce, 0)

    def seal(self, kind: int, body: bytes) -> bytes:
        """A frame to send, at most BODY_LIMIT_BYTES of body; only when `is_open`."""
        sealing = self._sealing
        invariant(sealing is not None, "nothing is sealed on a stream before both sides said hello")
        assert sealing is not None  # for the type checker; the invariant holds
        self._sent += 1
        return self._seal(sealing, kind, body, self._sent)

    def _seal(self, secret: bytes, kind: int, body: bytes, counter: int) -> bytes:
        invariant(len(body) <= BODY_LIMIT_BYTES, f"{len(body)} bytes do not fit into a frame")
        header = _header(self._keys, kind, len(body), self._incarnation, self._sender, counter)
        return _sealed(secret, header + body)

    def receive(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that are complete with `data`. FrameRefusedError: close the connection, nothing of it counts."""
        received = self._received
        received += data
        frames: list[Frame] = []
        taken = 0
        while len(received) - taken >= HEADER_BYTES:
            body_bytes = FRAME_HEADER.unpack_from(received, taken)[4]
            size_bytes = HEADER_BYTES + min(body_bytes, BODY_LIMIT_BYTES + 1) + MAC_BYTES
            is_bad = received[taken : taken + 5] != _PREFIX or body_bytes > BODY_LIMIT_BYTES
            if len(received) - taken < size_bytes and not is_bad:
                break
            frame = self._take(bytes(received[taken : taken + size_bytes]))
            taken += size_bytes
            if frame is not None:
                frames.append(frame)
        del received[:taken]
        return frames

    def _take(self, data: bytes) -> Frame | None:
        """One frame, or None for the hello."""
        if not self.is_open:
            hello, counter = _open(self._keys, self._keys.by_id, data, NONCE_BYTES)
            if hello.kind != HELLO or counter or len(hello.body) != NONCE_BYTES:
                raise FrameRefusedError("the stream does not begin with a hello", hello.sender)
            if bytes(hello.body) == self._nonce:
                raise FrameRefusedError("the stream repeats our own hello", hello.sender)
            self._agree(hello)
            return None
        frame, counter = _open(self._keys, self._opening, data, BODY_LIMIT_BYTES)
        if counter != self._taken + 1 or frame.sender != self.peer:
            raise FrameRefusedError("the frames of a stream are out of order", frame.sender)
        self._taken = counter
        return frame

    def _agree(self, hello: Frame) -> None:
        theirs = bytes(hello.body)
        both = self._nonce + theirs if self._is_connector else theirs + self._nonce
        # Each direction has a key of its own: what one side sent cannot be played back to it.
        to_acceptor, to_connector = (
            {key_id: _stream_key(key, both, way) for key_id, key in self._keys.by_id.items()}
            for way in (b"to-acceptor", b"to-connector")
        )
        sealing, self._opening = (to_acceptor, to_connector) if self._is_connector else (to_connector, to_acceptor)
        self._sealing = sealing[self._keys.current]
        self.peer = hello.sender


def _stream_key(key: bytes, nonces: bytes, way: bytes) -> bytes:
    return hashlib.blake2b(nonces, key=key, digest_size=32, person=way).digest()

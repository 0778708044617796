"""What one process tells the next about the clients it hands over: the state of each connection, as bytes.

Theory: the descriptors travel by another way; this says what each of them is. A connection in the transmission phase
is its socket, what its handshake agreed on, the bytes that were received and not used yet, those of a refused payload
that are still to be skipped, and the replies that the peer has not taken. The kernel keeps the rest.

    magic (8)  version (4)  size of the head (4)  CRC-32C of all that follows (4)  head (JSON)  received, unsent, ...

A client whose handshake names an export of another process of the same node goes there too, one by one and at once: the
message that carries its socket is a `HandshakingClient`, in the same frame under another magic.

Rules
- A socket is known by its SO_COOKIE, which the kernel gives to each socket once: descriptors may come in any order,
  and some may be missing.
- A program writes `VERSION` and reads every version in `READABLE`. What it cannot read is one sentence (HandoverError).
- Nothing is taken from half a message: the CRC covers all of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from construct import Bytes, ConstructError, Int32ub, Struct

from protocol.agreement import Agreement, Offer, ReplyStyle
from protocol.checksum import crc32c
from protocol.contexts import BASE_ALLOCATION, Context
from protocol.handshake import HandshakeState

MAGIC = b"nbdHAND\x00"
HANDSHAKING_MAGIC = b"nbdSHAK\x00"
VERSION = 2  # 1 knew only one context, and its identifier
READABLE = (1, 2)

Preamble = Struct("magic" / Bytes(8), "version" / Int32ub, "head_bytes" / Int32ub, "crc" / Int32ub)


class HandoverError(Exception):
    """Bytes that are no handover, or one of a version that this program does not know."""


@dataclass(frozen=True)
class ClientState:
    """A connection in the transmission phase, between two requests or in the middle of one."""

    cookie: int  # of its socket
    id: int
    since_s: float  # CLOCK_BOOTTIME: the same clock in every process until the machine boots
    agreement: Agreement
    skip_bytes: int  # of a refused request's payload, still to come
    received: bytes  # requests, the last one perhaps cut off
    unsent: bytes  # replies, the first one perhaps cut off


@dataclass(frozen=True)
class Listening:
    """A listening socket; a host name may stand for several at one address."""

    cookie: int
    address: str


@dataclass(frozen=True)
class Handover:
    """Everything that the next process is told."""

    id: str
    frozen_s: float  # CLOCK_BOOTTIME when the first client began to wait
    dropped: int  # clients that could not be handed over
    listening: Sequence[Listening]
    clients: Sequence[ClientState]


@dataclass(frozen=True)
class HandshakingClient:
    """A connection in the middle of its handshake, on its way to the process that has its export."""

    id: int
    since_s: float  # CLOCK_BOOTTIME
    peer_name: str
    tls: str  # version and cipher; the socket is then one to the process that has the TLS session
    certificate: str  # the verified name
    handshake: HandshakeState
    continues: int = 0
    """Of one that was in the transmission phase elsewhere and is told its handshake again: the number that it had for
    its forwarder then (peer_clients.py)."""


def encode(handover: Handover) -> list[bytes]:
    """The pieces of a handover; together they are what `decode` takes."""
    clients = [
        {
            "cookie": client.cookie,
            "id": client.id,
            "since_s": client.since_s,
            "export": client.agreement.offer.name,
            "size_bytes": client.agreement.offer.size_bytes,
            "read_only": client.agreement.offer.read_only,
            "description": client.agreement.offer.description,
            "style": client.agreement.style.value,
            "contexts": [[context.id, context.name, context.since] for context in client.agreement.contexts],
            "flags": client.agreement.flags,
            "skip_bytes": client.skip_bytes,
            "received_bytes": len(client.received),
            "unsent_bytes": len(client.unsent),
        }
        for client in handover.clients
    ]
    head = json.dumps(
        {
            "id": handover.id,
            "frozen_s": handover.frozen_s,
            "dropped": handover.dropped,
            "listening": [{"cookie": one.cookie, "address": one.address} for one in handover.listening],
            "clients": clients,
        }
    ).encode()
    body = [head, *(piece for client in handover.clients for piece in (client.received, client.unsent) if piece)]
    return [_preamble(MAGIC, body), *body]


def decode(data: bytes) -> Handover:
    """Raises HandoverError."""
    head, rest = _open(MAGIC, data)
    try:
        return _parse(json.loads(head), rest)
    except (KeyError, TypeError, ValueError) as error:
        raise HandoverError(f"the state of the clients makes no sense: {error!r}") from None


def encode_handshaking(client: HandshakingClient) -> bytes:
    """One message; `decode_handshaking` takes it."""
    state = client.handshake
    head = json.dumps(
        {
            "id": client.id,
            "since_s": client.since_s,
            "peer_name": client.peer_name,
            "tls": client.tls,
            "certificate": client.certificate,
            "no_zeroes": state.no_zeroes,
            "options": state.options,
            "style": state.style.value,
            "contexts": [[context.id, context.name, context.since] for context in state.contexts],
            "contexts_export": state.contexts_export,
            "continues": client.continues,
        }
    ).encode()
    body = [head, state.received]
    return b"".join([_preamble(HANDSHAKING_MAGIC, body), *body])


def decode_handshaking(data: bytes) -> HandshakingClient:
    """Raises HandoverError."""
    encoded, rest = _open(HANDSHAKING_MAGIC, data)
    try:
        head = json.loads(encoded)
        state = HandshakeState(
            no_zeroes=head["no_zeroes"],
            options=head["options"],
            style=ReplyStyle(head["style"]),
            contexts=tuple(Context(*context) for context in head["contexts"]),
            contexts_export=head["contexts_export"],
            received=bytes(rest),
        )
        return HandshakingClient(
            head["id"],
            head["since_s"],
            head["peer_name"],
            head["tls"],
            head["certificate"],
            state,
            head.get("continues", 0),  # versions before do not say it
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HandoverError(f"the state of a client makes no sense: {error!r}") from None


def _preamble(magic: bytes, body: Sequence[bytes]) -> bytes:
    fields = {"magic": magic, "version": VERSION, "head_bytes": len(body[0]), "crc": _crc(body)}
    built: bytes = Preamble.build(fields)
    return built


def _open(magic: bytes, data: bytes) -> tuple[bytes, memoryview]:
    """(the head, what follows it), of a message that is whole. HandoverError."""
    try:
        preamble = Preamble.parse(data)
    except ConstructError:
        raise HandoverError("the state of the clients is cut off") from None
    if preamble.magic != magic:
        raise HandoverError("this is no state of clients")
    if preamble.version not in READABLE:
        raise HandoverError(f"the state of the clients has version {preamble.version}, this program knows {READABLE}")
    body = data[Preamble.sizeof() :]
    if crc32c(body) != preamble.crc:
        raise HandoverError("the state of the clients is damaged")
    return body[: preamble.head_bytes], memoryview(body)[preamble.head_bytes :]


def _parse(head: dict[str, Any], rest: memoryview) -> Handover:
    clients = []
    position = 0
    for item in head["clients"]:
        middle = position + item["received_bytes"]
        end = middle + item["unsent_bytes"]
        offer = Offer(item["export"], item["size_bytes"], item["read_only"], item["description"])
        contexts = item["contexts"] if "contexts" in item else [[id_, BASE_ALLOCATION] for id_ in item["context_ids"]]
        selected = tuple(Context(*context) for context in contexts)
        agreement = Agreement(offer, ReplyStyle(item["style"]), selected, item["flags"])
        clients.append(
            ClientState(
                cookie=item["cookie"],
                id=item["id"],
                since_s=item["since_s"],
                agreement=agreement,
                skip_bytes=item["skip_bytes"],
                received=bytes(rest[position:middle]),
                unsent=bytes(rest[middle:end]),
            )
        )
        position = end
    if position != len(rest):
        raise ValueError(f"{len(rest)} bytes of clients, {position} announced")
    listening = [Listening(item["cookie"], item["address"]) for item in head["listening"]]
    return Handover(head["id"], head["frozen_s"], head["dropped"], listening, clients)


def _crc(pieces: Sequence[bytes]) -> int:
    return crc32c(b"".join(pieces))

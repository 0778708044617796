"""What a handshake is about: the exports that it offers, how an option is refused, and what it ends in.

The exports are whoever's `Offers` implements; transmission, hand-over and forwarding go on from an `Agreement`. How it
is come to: handshake.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from protocol.contexts import Context
from protocol.nbd import OptionReply, TransmissionFlag


class ReplyStyle(Enum):
    """How requests and replies look in the transmission phase."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


@dataclass(frozen=True)
class Offer:
    """What the handshake tells about an export."""

    name: str
    size_bytes: int
    read_only: bool
    description: str = ""


class OptionRefusedError(Exception):
    """An option that gets an error reply of this type, with a sentence for the user."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class ElsewhereError(Exception):
    """An export that the peer may use lives in another process of this node: its number is `worker`. Or, for None, on
    one of the cluster's nodes."""

    def __init__(self, worker: int | None, export: str) -> None:
        super().__init__(f"{export} lives elsewhere")
        self.worker = worker
        self.export = export


class Offers(Protocol):
    """The exports as one connection sees them. What is asked of one by its name may raise ElsewhereError."""

    def list(self) -> Iterable[tuple[str, str]]:
        """(name, description) of the exports that the peer may see."""

    def offer(self, name: str) -> Offer:
        """The export of this name ("" is the default export); OptionRefusedError if there is none for this peer."""

    def bitmaps(self, name: str) -> Mapping[str, int]:
        """The dirty bitmaps of an export that was offered, the oldest first: (name, number) for `Context.since`."""

    def enter(self, name: str) -> Offer:
        """As `offer`, and the connection now uses it; OptionRefusedError if it may not."""


@dataclass(frozen=True)
class Agreement:
    """What a finished handshake agreed on."""

    offer: Offer
    style: ReplyStyle
    contexts: tuple[Context, ...]
    flags: int

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Of the contexts that were selected."""
        return tuple(context.id for context in self.contexts)


def transmission_flags(offer: Offer, style: ReplyStyle, has_contexts: bool) -> int:
    """What an export can do, for a connection that negotiated `style`."""
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.CAN_MULTI_CONN
    )
    if offer.read_only:
        flags |= TransmissionFlag.READ_ONLY
    else:
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
    if style is not ReplyStyle.SIMPLE:
        flags |= TransmissionFlag.SEND_DF
    if style is ReplyStyle.EXTENDED and has_contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return int(flags)

"""Frames of modifications, made once for all replicas that are to have them.

Theory. What an owner orders goes to every replica in the same words: a frame is packed once, and its buffers are sent
on each stream. So frames are numbered by the owner and not on each stream: there the numbers rise, with gaps.

Rules
- A frame has at most FRAME_BYTES of modifications, unless one alone is larger, and MODIFICATIONS_LIMIT of them.
- The time at which it is sent is taken before it is packed: a grant counts from then (docs/replication.md, rule 2).
"""

from collections.abc import Sequence
from typing import NamedTuple

from protocol.peer import MODIFICATIONS_LIMIT, Append, Buffer, Modification
from protocol.peer_frames import encode

FRAME_BYTES = 4 << 20


class AppendFrame(NamedTuple):
    """One APPEND, packed; without modifications it is a beat."""

    append: Append
    size_bytes: int
    """Of its modifications."""
    at_s: float
    buffers: Sequence[Buffer]


def append_frames(
    epoch: int,
    number: int,
    committed_txid: int,
    durable_txid: int,
    sync_txid: int,
    modifications: Sequence[Modification],
    at_s: float,
) -> list[AppendFrame]:
    """Frames with these modifications, numbered from `number` on; one without if there are none."""
    frames: list[AppendFrame] = []
    for part, size_bytes in _parts(modifications):
        append = Append(epoch, number + len(frames), committed_txid, durable_txid, sync_txid, part)
        frames.append(AppendFrame(append, size_bytes, at_s, encode(append)))
    return frames


def _parts(modifications: Sequence[Modification]) -> list[tuple[Sequence[Modification], int]]:
    """What goes into one frame each, and its size in bytes."""
    parts: list[tuple[Sequence[Modification], int]] = []
    first = size_bytes = 0
    for index, each in enumerate(modifications):
        more_bytes = each.size_bytes
        if index > first and (size_bytes + more_bytes > FRAME_BYTES or index - first == MODIFICATIONS_LIMIT):
            parts.append((modifications[first:index], size_bytes))
            first, size_bytes = index, 0
        size_bytes += more_bytes
    parts.append((modifications[first:] if first else modifications, size_bytes))
    return parts

"""Frames of modifications, made once for all replicas that are to have them.

Theory. What an owner orders goes to every replica in the same words: a frame is packed once, and its buffers are sent
on each stream. So frames are numbered by the owner and not on each stream: there the numbers rise, with gaps.

Rules
- A frame has at most FRAME_BYTES of modifications, unless one alone is larger, and MODIFICATIONS_LIMIT of them.
- The time at which it is sent is taken before it is packed: a grant counts from then (docs/replication.md, rule 2).
"""

from collections.abc import Iterator, Sequence
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


def append_frames(append: Append, modifications: Sequence[Modification], at_s: float) -> Iterator[AppendFrame]:
    """Frames like `append`, numbered from its number on, that have these modifications; one that has none if there are
    none."""
    first = size_bytes = 0
    for index, each in enumerate(modifications):
        if index > first and (size_bytes + each.size_bytes > FRAME_BYTES or index - first == MODIFICATIONS_LIMIT):
            yield _packed(append, modifications[first:index], size_bytes, at_s)
            append = append._replace(number=append.number + 1)
            first, size_bytes = index, 0
        size_bytes += each.size_bytes
    yield _packed(append, modifications[first:] if first else modifications, size_bytes, at_s)


def _packed(append: Append, modifications: Sequence[Modification], size_bytes: int, at_s: float) -> AppendFrame:
    append = append._replace(modifications=modifications)
    return AppendFrame(append, size_bytes, at_s, encode(append))

"""Metadata contexts: what BLOCK_STATUS can tell of an export, and how a client asks for it by name.

Theory. Every export has `base:allocation`. `qemu:dirty-bitmap:NAME` tells which extents are not what they were in NAME;
the namespace is qemu's (its documentation: interop/nbd), which calls NAME a bitmap, and it is what backup tools copy
increments by. Which bitmaps an export has is asked of `Offers.bitmaps`: each has a number for what the export is
compared with. The number is fixed when the context is selected: a name that is given to something else later does not
change what was agreed.

Rules
- A wildcard (`base:`, `qemu:`, `qemu:dirty-bitmap:`) lists and never selects. What nothing matches is left out.
- Identifiers of contexts are given by position; a context that is asked for twice is selected once.
- A list is bounded: from LISTED_LIMIT bitmaps on it is the wildcard alone, which the protocol allows. Each can still be
  asked for by its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BASE_ALLOCATION = "base:allocation"
DIRTY_BITMAP = "qemu:dirty-bitmap:"
LISTED_LIMIT = 4096  # bitmaps in one answer

_BASE_WILDCARDS = ("base:",)
_BITMAP_WILDCARDS = ("qemu:", DIRTY_BITMAP)


@dataclass(frozen=True)
class Context:
    """A context that was selected."""

    id: int  # in replies on this connection
    name: str
    since: int = 0  # of a dirty bitmap: the number of what the export is compared with

    @property
    def is_bitmap(self) -> bool:
        """Whether it is told by what changed; else it is `base:allocation`."""
        return self.name.startswith(DIRTY_BITMAP)


def needs_bitmaps(queries: Sequence[str]) -> bool:
    """Whether an export's bitmaps have to be known to answer."""
    return not queries or any(query.startswith("qemu:") for query in queries)


def listed(queries: Sequence[str], bitmaps: Mapping[str, int]) -> list[str]:
    """The names that LIST_META_CONTEXT answers with."""
    names = []
    if not queries or BASE_ALLOCATION in queries or any(query in _BASE_WILDCARDS for query in queries):
        names.append(BASE_ALLOCATION)
    if not queries or any(query in _BITMAP_WILDCARDS for query in queries):
        if len(bitmaps) > LISTED_LIMIT:
            return [*names, DIRTY_BITMAP]
        return [*names, *(DIRTY_BITMAP + bitmap for bitmap in bitmaps)]
    asked = dict.fromkeys(query for query in queries if query.startswith(DIRTY_BITMAP))
    return [*names, *(query for query in asked if query.removeprefix(DIRTY_BITMAP) in bitmaps)]


def selected(queries: Sequence[str], bitmaps: Mapping[str, int]) -> tuple[Context, ...]:
    """What SET_META_CONTEXT selects."""
    contexts: list[Context] = []
    for query in dict.fromkeys(queries):
        since = bitmaps.get(query.removeprefix(DIRTY_BITMAP)) if query.startswith(DIRTY_BITMAP) else None
        if query == BASE_ALLOCATION or since is not None:
            contexts.append(Context(len(contexts) + 1, query, since or 0))
    return tuple(contexts)

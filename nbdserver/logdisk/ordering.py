"""The write-ordering rules of the log disk in words, and the crash points that stand at its steps.

Theory: a log-structured disk is right when certain things happen before certain others. Each such rule is a member of
`Rule`; the code that keeps it asks `holds(Rule.X)` where it would otherwise just do the right thing, so that a test can
take one rule out and show that the suite notices. Each step between two durable effects calls `crash_point("name")`;
the simulator stops the process there. A rule that no test misses, or a crash point that no test reaches, fails the
suite.

Rules of this file
- In production no hook is set and no rule is disabled: a crash point costs one call and one comparison, `holds` one
  call and one comparison.
- Every crash point is in `CRASH_POINTS` with the rule it stands for; an unknown one is an error once a hook is set.
- Only tests call `hooked` and `disabled`.

Known weakness: the hook and the disabled rules are per process, so two simulated disks in one thread share them; the
hook has to tell whose step it was from what it knows (the simulator runs one disk at a time).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum


class Rule(Enum):
    """An ordering rule: the value is the sentence that the durability contract and a failing test quote."""

    FLUSH_OLDEST_FIRST = "A flush syncs every segment with unsynced records, the oldest first, before it is answered."
    CHECKPOINT_BEHIND_SYNC = (
        "A checkpoint's txid is at or below the last fdatasync: it never names data that may be lost."
    )
    FREE_ONLY_IN_CHECKPOINT = "A segment becomes free only in a checkpoint that no longer names any block in it."
    REUSE_AFTER_BATCH_SYNCED = "A freed segment is written again only when the batch that no longer names it is synced."
    NAME_DURABLE_FIRST = "A segment file is written only when its name is durable."
    REUSE_AFTER_READERS_LEFT = (
        "A freed segment is written again only when no read that looked up an address in it is in flight."
    )
    MOVE_ONLY_IF_UNCHANGED = "A move takes effect, in memory and at replay, only if the MBA still has the old PBA."
    TAIL_SYNCED_BEFORE_SERVING = "The recovered tail is rewritten and synced before anything is served from it."
    ACK_AFTER_APPEND = "A write is acknowledged only after its record was appended to the log."
    FSYNC_FAILURE_IS_FATAL = "A failed fsync is fatal for the family: it is never retried and believed."
    SALT_DRAWN_PER_LIFE = "Each life of a segment draws a new salt, so that no record of a former life joins its chain."
    REPLAY_VERIFIES_DATA = "Replay verifies the CRC of a record's data too, so that a torn record does not count."
    LOG_ENDS_ONLY_ABOVE_DURABLE = (
        "The log may end only above the highest txid known durable; else it is corrupt, not short."
    )
    MERGE_FREES_WHAT_IS_HIDDEN = "A merge frees a block of a layer only if the layer's child does not show it."
    MERGED_ENTRIES_STAY = "The keys of a merged layer are deleted in the batch in which its child has their entries."
    TREE_SYNCED_BEFORE_REPORT = "A change of the tree of layers is durable before it is reported."
    CHECKPOINT_BEHIND_COMMIT = (
        "No checkpoint of a replica passes the committed txid, so that nothing is free that a cut may bring back."
    )
    CUT_IS_DURABLE_FIRST = "A log that was cut goes on elsewhere durably before anything is appended or told of it."
    APPEND_FOLLOWS_LAST = "A replica appends a modification only if it is the next one of its log."
    SKIP_NOTES_WHAT_IS_LACKING = (
        "The batch in which a replica's log skips to another's position notes the regions that differ."
    )
    STARTS_OVER_IN_ONE_BATCH = "A replica that starts over forgets all that it has in one batch."
    REPLACED_WHERE_IT_WAS_READ = "A copy of a region is applied only at the txid at which it was read."
    REPAIR_IS_WHAT_WAS_THERE = "A block is repaired only with content that has the checksum that its MBA has by then."


CRASH_POINTS: dict[str, Rule] = {
    "append-before": Rule.ACK_AFTER_APPEND,
    "append-after": Rule.ACK_AFTER_APPEND,
    "segment-before-open": Rule.SALT_DRAWN_PER_LIFE,
    "segment-before-seal": Rule.LOG_ENDS_ONLY_ABOVE_DURABLE,
    "segment-after-seal": Rule.LOG_ENDS_ONLY_ABOVE_DURABLE,
    "flush-before-sync": Rule.FLUSH_OLDEST_FIRST,
    "flush-after-sync": Rule.FSYNC_FAILURE_IS_FATAL,
    "checkpoint-frozen": Rule.CHECKPOINT_BEHIND_SYNC,
    "checkpoint-before-batch": Rule.FREE_ONLY_IN_CHECKPOINT,
    "checkpoint-after-batch": Rule.REUSE_AFTER_BATCH_SYNCED,
    "segment-before-name": Rule.NAME_DURABLE_FIRST,
    "segment-after-name": Rule.NAME_DURABLE_FIRST,
    "segment-before-reuse": Rule.REUSE_AFTER_READERS_LEFT,
    "clean-before-append": Rule.MOVE_ONLY_IF_UNCHANGED,
    "clean-after-append": Rule.MOVE_ONLY_IF_UNCHANGED,
    "merge-before-move": Rule.MERGED_ENTRIES_STAY,
    "merge-after-remove": Rule.MERGE_FREES_WHAT_IS_HIDDEN,
    "tree-before-append": Rule.TREE_SYNCED_BEFORE_REPORT,
    "tree-after-append": Rule.TREE_SYNCED_BEFORE_REPORT,
    "replay-before-tail": Rule.REPLAY_VERIFIES_DATA,
    "replay-after-tail": Rule.TAIL_SYNCED_BEFORE_SERVING,
    "checkpoint-before-commit": Rule.CHECKPOINT_BEHIND_COMMIT,
    "splice-before-store": Rule.CUT_IS_DURABLE_FIRST,
    "splice-after-store": Rule.CUT_IS_DURABLE_FIRST,
    "replica-before-append": Rule.APPEND_FOLLOWS_LAST,
    "replica-after-append": Rule.APPEND_FOLLOWS_LAST,
    "region-before-append": Rule.REPLACED_WHERE_IT_WAS_READ,
    "region-after-append": Rule.REPLACED_WHERE_IT_WAS_READ,
    "skip-after-batch": Rule.SKIP_NOTES_WHAT_IS_LACKING,
    "start-over-before-batch": Rule.STARTS_OVER_IN_ONE_BATCH,
    "start-over-after-batch": Rule.STARTS_OVER_IN_ONE_BATCH,
    "repair-before-append": Rule.REPAIR_IS_WHAT_WAS_THERE,
    "repair-after-append": Rule.REPAIR_IS_WHAT_WAS_THERE,
}
"""Name of each crash point and the rule whose two sides it stands between."""

OF_REPLICAS = frozenset(
    {
        Rule.CHECKPOINT_BEHIND_COMMIT,
        Rule.CUT_IS_DURABLE_FIRST,
        Rule.APPEND_FOLLOWS_LAST,
        Rule.SKIP_NOTES_WHAT_IS_LACKING,
        Rule.STARTS_OVER_IN_ONE_BATCH,
        Rule.REPLACED_WHERE_IT_WAS_READ,
        Rule.REPAIR_IS_WHAT_WAS_THERE,
    }
)
"""Rules whose moment comes in replicated families only."""

_hook: Callable[[str], None] | None = None
_disabled: set[Rule] = set()


def crash_point(name: str) -> None:
    """Stand at the named step. Does nothing unless a test set a hook, which may raise to end the simulated process."""
    if _hook is not None:
        if name not in CRASH_POINTS:
            raise KeyError(f"crash point {name!r} is not in CRASH_POINTS")
        _hook(name)


def holds(rule: Rule) -> bool:
    """Whether the rule is to be kept: always, unless a test disabled it."""
    return not _disabled or rule not in _disabled


@contextmanager
def hooked(hook: Callable[[str], None]) -> Iterator[None]:
    """Call `hook(name)` at every crash point inside the block. Tests only."""
    global _hook
    before, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = before


@contextmanager
def disabled(*rules: Rule) -> Iterator[None]:
    """Take the rules out inside the block, so that a test can show that something misses them. Tests only."""
    added = set(rules) - _disabled
    _disabled.update(added)
    try:
        yield
    finally:
        _disabled.difference_update(added)

"""A replica that cannot be made like its owner's by a cut forgets all that it has, and goes on as one on an empty disk.

Theory. A cut takes back nothing that is in a checkpoint, and no region that counts as fetched. When all nodes lose
their power what was committed may be gone, and a replica that had kept more than the owner has now can only be filled
anew. It counts its incarnations from somewhere else from then on, so that nobody takes it for the one that it was.

Rules
- All of LevelDB goes in one batch (Rule.STARTS_OVER_IN_ONE_BATCH): half a map would look like a whole one.
- The segment files stay, as spare ones. The log begins with a later sequence number than any of their lives has, so
  that none of them is looked at as a part of it.

Known weakness: it waits for the disk, of a large volume for seconds.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from metadata.family_state import Checkpoint, Family, put_checkpoint, put_open_state, read_checkpoint, read_open_state
from metadata.replica_state import first_state, put_replica_state, read_replica_state
from metadata.seams import Files, Store
from nbdserver.logdisk.maps import EPOCH_SHIFT
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.recovery import highest_sequence
from nbdserver.logdisk.segments import SegmentPool

_FIXED = b"FOCP"  # keys of one letter that every replica has
_KEYS = (b"A", b"[")


def start_over(
    files: Files, store: Store, family: Family, rng: random.Random, report: Callable[[str, dict[str, object]], None]
) -> None:
    """Make the family of a replica, which is not open, an empty one. Waits for the disk. Raises OSError, or
    DamagedValueError."""
    report("started-over", {"txid": read_checkpoint(store).txid})
    state = replace(first_state(rng), promised_epoch=read_replica_state(store).promised_epoch)
    pool = SegmentPool(files, family.segment_bytes, report)
    pool.adopt(set())
    sequence = highest_sequence(files, pool.handles, family.family) + 1
    pool.close()
    batch = store.batch()
    for key, _ in store.range(*_KEYS):
        if key not in _FIXED:
            batch.delete(key)
    if not holds(Rule.STARTS_OVER_IN_ONE_BATCH):
        store.write(batch)
        batch = store.batch()
    put_open_state(batch, replace(read_open_state(store), clean=True))
    put_checkpoint(batch, empty_checkpoint(sequence, rng))
    put_replica_state(batch, state)
    crash_point("start-over-before-batch")
    store.write(batch)
    crash_point("start-over-after-batch")


def empty_checkpoint(sequence: int, rng: random.Random) -> Checkpoint:
    """Of a family without anything. The first segment's life begins with the first write; its salt is drawn now, so
    that replay can tell it."""
    return Checkpoint(0, 0, 0, 1, 0, 0, sequence, rng.randbytes(8), 1 << EPOCH_SHIFT, 1, 0)

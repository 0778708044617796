"""What a replica keeps in LevelDB beside the checkpoint: where its log goes on after a cut, and who it is.

A *splice* says that behind one record the log goes on in a segment that no seal names: after a crash, or because the
log was cut there. A checkpoint that stands behind it makes it superfluous. An opening of a family on one node needs
none: it makes a checkpoint instead, which a replica may not (nbdserver/logdisk/committed.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from metadata.pages import KeyRange
from metadata.seams import Batch, Store
from protocol.disk import REPLICA_STATE, SPLICE, pack_value, unpack_value

REPLICA_KEY = b"P"
_SPLICE = b"J"
SPLICE_KEYS: KeyRange = (_SPLICE, b"K")


@dataclass(frozen=True)
class Splice:
    """Behind record `lsn` the log goes on in the life `sequence`, `salt` of a segment."""

    lsn: int
    segment: int
    sequence: int
    salt: bytes


@dataclass(frozen=True)
class ReplicaState:
    """Who a replica is, to those who have others of the same family."""

    incarnation: int = 0  # raised at each opening
    intact_since: int = 1  # incarnation since which nothing that was appended can have been lost
    promised_epoch: int = 0  # lower ones are refused
    fetched_txid: int = 0  # what was committed when a region was fetched last: the log is not cut below it


def first_state(rng: random.Random) -> ReplicaState:
    """Of an empty disk. It counts from anywhere, so that nobody takes it for the one that was there before."""
    incarnation = rng.randrange(1 << 40, 1 << 60)
    return ReplicaState(incarnation, intact_since=incarnation + 1)


def read_replica_state(store: Store) -> ReplicaState:
    """Raises DamagedValueError. A family that was never a replica has the state that replicas begin with."""
    value = store.get(REPLICA_KEY)
    if value is None:
        return ReplicaState()
    incarnation, intact_since, promised_epoch, _, fetched_txid = REPLICA_STATE.unpack(unpack_value(REPLICA_KEY, value))
    return ReplicaState(incarnation, intact_since, promised_epoch, fetched_txid)


def put_replica_state(batch: Batch, state: ReplicaState) -> None:
    payload = REPLICA_STATE.pack(state.incarnation, state.intact_since, state.promised_epoch, 0, state.fetched_txid)
    batch.put(REPLICA_KEY, pack_value(REPLICA_KEY, payload))


def read_splices(store: Store) -> dict[int, Splice]:
    """By lsn; raises DamagedValueError."""
    found: dict[int, Splice] = {}
    for key, value in store.range(*SPLICE_KEYS):
        lsn = int.from_bytes(key[1:], "big")
        segment, _, sequence, salt = SPLICE.unpack(unpack_value(key, value))
        found[lsn] = Splice(lsn, segment, sequence, salt)
    return found


def put_splice(batch: Batch, splice: Splice) -> None:
    key = _splice_key(splice.lsn)
    batch.put(key, pack_value(key, SPLICE.pack(splice.segment, 0, splice.sequence, splice.salt)))


def delete_splices(batch: Batch, lsns: Iterable[int]) -> None:
    for lsn in lsns:
        batch.delete(_splice_key(lsn))


def _splice_key(lsn: int) -> bytes:
    return _SPLICE + lsn.to_bytes(8, "big")

"""What a replica keeps in LevelDB beside the checkpoint: where its log goes on after a cut, and who it is.

A *splice* says that behind one record the log goes on in a segment that no seal names: after a crash, or because the
log was cut there. A checkpoint that stands behind it makes it superfluous. An opening of a family on one node needs
none: it makes a checkpoint instead, which a replica may not (nbdserver/logdisk/committed.py).

*Incarnations* are numbers that are drawn, one at each opening, each higher than the one before. A replica keeps those
since which it can have lost nothing. Whoever has noted one of them in the registry knows by it that this is the replica
that was meant: a disk that is put back as it was, from a copy, draws others than it did the first time.

Rule: at most INCARNATIONS_LIMIT are kept, the newest ones; a replica that was opened more often than that since it was
noted is not known any more, and is completed like one that has lost something.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

from metadata.pages import KeyRange
from metadata.seams import Batch, Store
from protocol.disk import REPLICA_STATE, SPLICE, DamagedValueError, pack_value, unpack_value
from protocol.peer import INCARNATIONS_LIMIT

REPLICA_KEY = b"P"
_INCARNATIONS = b"I"
_STEP = 1 << 32
"""At most, from one incarnation to the next: none comes twice, and the numbers last for a thousand million openings."""
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

    incarnation: int = 0  # drawn at each opening, and higher than the one before
    incarnations: tuple[int, ...] = ()  # since which nothing appended can have been lost, in order
    promised_epoch: int = 0  # lower ones are refused
    fetched_txid: int = 0  # what was committed when a region was fetched last: the log is not cut below it

    def opened(self, rng: random.Random, may_have_lost: bool) -> ReplicaState:
        """As it is after another opening; `may_have_lost`: of what it had, something may be gone."""
        incarnation = self.incarnation + 1 + rng.randrange(_STEP)
        before = () if may_have_lost else self.incarnations[1 - INCARNATIONS_LIMIT :]
        return replace(self, incarnation=incarnation, incarnations=(*before, incarnation))


def first_state(rng: random.Random) -> ReplicaState:
    """Of an empty disk. It counts from anywhere, so that nobody takes it for the one that was there before."""
    return ReplicaState(rng.randrange(1 << 40, 1 << 60))


def read_replica_state(store: Store) -> ReplicaState:
    """Raises DamagedValueError. A family that was never a replica has the state that replicas begin with."""
    value = store.get(REPLICA_KEY)
    if value is None:
        return ReplicaState()
    incarnation, intact_since, promised_epoch, _, fetched_txid = REPLICA_STATE.unpack(unpack_value(REPLICA_KEY, value))
    return ReplicaState(incarnation, _incarnations(store, incarnation, intact_since), promised_epoch, fetched_txid)


def _incarnations(store: Store, last: int, intact_since: int) -> tuple[int, ...]:
    """An older program counted them one by one, and kept none of them."""
    value = store.get(_INCARNATIONS)
    payload = b"" if value is None else unpack_value(_INCARNATIONS, value)
    if len(payload) % 8:
        raise DamagedValueError(_INCARNATIONS, "no list of incarnations")
    kept = tuple(array("Q", payload))
    if kept[-1:] == (last,):
        return kept
    return tuple(range(max(intact_since, last + 1 - INCARNATIONS_LIMIT), last + 1))


def put_replica_state(batch: Batch, state: ReplicaState) -> None:
    intact_since = (*state.incarnations, state.incarnation + 1)[0]
    payload = REPLICA_STATE.pack(state.incarnation, intact_since, state.promised_epoch, 0, state.fetched_txid)
    batch.put(REPLICA_KEY, pack_value(REPLICA_KEY, payload))
    batch.put(_INCARNATIONS, pack_value(_INCARNATIONS, array("Q", state.incarnations).tobytes()))


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

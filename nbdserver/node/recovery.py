"""The cluster's registry made whole from what the nodes know, when etcd was put back to an earlier state or has lost
what it had.

Theory: each node refuses such a registry (metadata/registry_guard.py), and goes on as while there is none. Somebody
asks one node to make it whole: that node asks all the others what they know (`answer`), decides (recovered.py), writes
what differs, and begins the registry's next life in the last swap, together with the state of the directory. The others
take a registry with a higher life at their next look. Until that swap nobody believes what is written, so it may be
broken off and begun again.

Rules
- A registry that is as far as this node has seen it is not touched.
- Nobody is asked who is not a member of the cluster, as this node knew it last.
"""

import asyncio
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from metadata.directory.made_whole import Known, MissingVotersError, known_to, state_from
from metadata.directory.registry_keys import LEASE_KEY, STATE_KEY, MasterState, StateError
from metadata.etcd_registry import EtcdRegistry
from metadata.families import Families, shared_entries
from metadata.registry import Family, RegistryError
from metadata.registry_calls import HOME_KEY, LIFE_KEY, Change, Outcome, Reading, Swap, Unavailable
from metadata.registry_guard import RegistryGuard
from metadata.replica_set import REPLICA_SETS, ReplicaSet, ReplicaSetError
from metadata.waiting import answer_of
from nbdserver.host.clock import HostClock
from nbdserver.node.cluster import Cluster
from nbdserver.node.cluster_calls import CALL_S
from nbdserver.node.cluster_files import read_etcd_settings
from nbdserver.node.errors import ConflictError, NodeError, NotJoinedError, WrongInputError, listed
from nbdserver.node.opening import Call
from nbdserver.node.recovered import Verdict, Word, verdict, with_free_names
from nbdserver.node.shared_registry import SharedRegistry
from protocol.invariant import invariant
from protocol.peer import Position

PAGE_BYTES = 512 << 10
"""Of families an answer, and one family more: as much as a call has room for."""
SWAP_BYTES, SWAP_CHANGES = 512 << 10, 32
"""A swap, unless one change alone is larger."""
OURS = ("family/", REPLICA_SETS, "volume/", "removed/")

Told = dict[str, dict[str, Any]]
"""By node: what it says of itself and of its families."""
Words = dict[str, dict[str, Word]]
"""By family and node."""


class Recovery:
    """See above."""

    def __init__(
        self, families: Families, shared: SharedRegistry, cluster: Callable[[], Cluster | None], call: Call
    ) -> None:
        self._families = families
        self._shared = shared
        self._cluster = cluster
        self._call = call
        self._running = asyncio.Lock()

    # --- telling ---

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What this node knows: of itself, and of its replicas from number `after` on."""
        cluster = self._demand_cluster()
        known, past = known_to(cluster.directory), self._shared.guard.past
        after = int(question.get("after", 0))
        described: dict[str, Any] = await self._call("replicas")
        replicas = sorted(self._families.replicas(), key=lambda family: family.id)[after:]
        self._shared.desk.has_told()
        words: list[dict[str, Any]] = []
        size_bytes = 0
        for family in replicas:
            words.append(self._word(family, described.get(family.id)))
            size_bytes += len(words[-1]["family"])
            if size_bytes > PAGE_BYTES:
                break
        return {
            "id": known.node,
            "is_first": known.is_first,
            "epoch": known.epoch,
            "state": known.state.encode().decode() if known.state is not None else "",
            "life": past.life if past is not None else 0,
            "deleted": self._families.deleted() if not after else [],
            "families": words,
            "more": len(replicas) > len(words),
        }

    def _word(self, family: Family, described: Mapping[str, Any] | None) -> dict[str, Any]:
        kept, asked = self._families.kept_set(family.id), self._families.asked_set(family.id)
        log = described["log"] if described is not None else {}
        return {
            "family": family.encode().decode(),
            "kept": kept.encode().decode() if kept is not None else "",
            "asked": asked.encode().decode() if asked is not None else "",
            "incarnation": log.get("incarnation", 0),
            "last": log.get("last", (0, 0)),
            "promised_epoch": log.get("promised_epoch", 0),
            "resync_regions": described["resync_regions"] if described is not None else 0,
        }

    # --- asking ---

    async def recover(self, without: Collection[str], is_trial: bool) -> dict[str, Any]:
        """Make the registry whole, not waiting for the word of the nodes `without`; `is_trial`: only say what would be
        done. Returns {nodes, silent, volumes: [{name, in_sync, loss}], left_out: [{name, problem}]}. ConflictError if
        there is no need, or if volumes would be left out; WrongInputError; NodeError."""
        if self._running.locked():
            raise ConflictError("the registry is being recovered already")
        async with self._running:
            cluster = self._demand_cluster()
            if not self._shared.guard.refused:
                raise ConflictError("etcd holds what this node has seen there: nothing is to be recovered")
            unknown = set(without) - set(cluster.names())
            if unknown:
                raise WrongInputError(
                    f"there is no node {listed(sorted(unknown))}; there are: {listed(cluster.names())}"
                )
            told, silent = await self._ask_all(cluster)
            heard = sorted(set(without) & told.keys())
            if heard:
                raise ConflictError(f"{listed(heard)} answers: its word counts, leave it out of --without")
            loop = asyncio.get_running_loop()
            guard = RegistryGuard(None, is_recovering=True)
            settings = read_etcd_settings(cluster.settings)
            registry = EtcdRegistry(settings, HostClock(loop), random.SystemRandom(), loop, guard)
            try:
                return await self._recover(registry, guard, told, silent, set(without), is_trial)
            finally:
                registry.close()
                await registry.wait_closed()

    def _demand_cluster(self) -> Cluster:
        cluster = self._cluster()
        if cluster is None:
            raise NotJoinedError
        return cluster

    async def _ask_all(self, cluster: Cluster) -> tuple[Told, list[str]]:
        """What each node says, and those that say nothing."""
        names = cluster.names()
        answers = await asyncio.gather(*(self._ask(cluster, name) for name in names))
        told = {name: answer for name, answer in zip(names, answers, strict=True) if answer is not None}
        return told, [name for name in names if name not in told]

    async def _ask(self, cluster: Cluster, name: str) -> dict[str, Any] | None:
        whole: dict[str, Any] | None = None
        while whole is None or whole["more"]:
            question = {"do": "known", "after": 0 if whole is None else len(whole["families"])}
            try:
                if name == cluster.settings.node:
                    answer = await self.answer(question)
                else:
                    answer = await cluster.ask(name, question, CALL_S)
            except NodeError:
                return None
            before = [] if whole is None else whole["families"]
            whole = {**(whole or answer), "families": before + answer["families"], "more": answer["more"]}
        return whole

    async def _recover(
        self,
        registry: EtcdRegistry,
        guard: RegistryGuard,
        told: Told,
        silent: list[str],
        without: set[str],
        is_trial: bool,
    ) -> dict[str, Any]:
        present = await self._read(lambda done: registry.range_later("", done))
        invariant(guard.past is not None, "etcd has answered and is not known")
        assert guard.past is not None  # for the type checker
        words = _words_of(told)
        deleted = {family_id for answer in told.values() for family_id in answer["deleted"]}
        verdicts = _verdicts(words, deleted, present, without, silent)
        left_out = [each for each in verdicts if each.value is None]
        kept = [each for each in verdicts if each.value is not None]
        report = {
            "nodes": sorted(told),
            "silent": silent,
            "volumes": [
                {
                    "name": each.family.name,
                    "in_sync": [member.node for member in each.value.in_sync] if each.value is not None else [],
                    "loss": each.loss,
                }
                for each in kept
            ],
            "left_out": [{"name": each.family.name, "problem": each.problem} for each in left_out],
        }
        if is_trial:
            return report
        waiting = [f"{each.family.name}: {each.problem}" for each in left_out if not each.is_final]
        if waiting:
            raise ConflictError(
                f"{listed(waiting, 10)}; start {listed(silent) or 'the nodes that are away'}, or give them up with "
                "--without, and with them what they alone have acknowledged"
            )
        state = self._state(told, present.get(STATE_KEY), without)
        target = _target(kept, words, deleted)
        ours = {key: value for key, value in present.items() if key.startswith(OURS)}
        keys = sorted(key for key in ours.keys() | target.keys() if ours.get(key) != target.get(key))
        for changes in _in_swaps([Change(key, ours.get(key), target.get(key)) for key in keys]):
            await self._swap(registry, changes)
        home = await self._read(lambda done: registry.get_later(HOME_KEY, done))
        life = max(int(present.get(LIFE_KEY, b"0")), *(answer["life"] for answer in told.values())) + 1
        await self._swap(
            registry,
            [
                Change(STATE_KEY, present.get(STATE_KEY), state.encode() if state is not None else None),
                Change(LIFE_KEY, present.get(LIFE_KEY), str(life).encode()),
                Change(HOME_KEY, home.get(HOME_KEY), str(guard.past.cluster_id).encode()),
            ],
        )
        return report

    def _state(self, told: Told, present: bytes | None, without: Collection[str]) -> MasterState | None:
        """Of the directory. ConflictError if too few of its voters have told."""
        known = [
            Known(
                int(answer["id"]),
                name,
                bool(answer["is_first"]),
                int(answer["epoch"]),
                MasterState.decode(text.encode()) if (text := answer["state"]) else None,
            )
            for name, answer in told.items()
        ]
        try:
            me = self._demand_cluster().directory.me
            return state_from(me, known, MasterState.decode(present) if present is not None else None, without)
        except MissingVotersError as error:
            silent = listed(error.silent)
            raise ConflictError(
                f"too few of the directory's voters answer; start {silent}, or give them up with --without"
            ) from None
        except StateError as error:
            raise NodeError(str(error)) from None

    async def _read(self, ask: Callable[[Callable[[Reading | Unavailable], None]], object]) -> dict[str, bytes]:
        answer: Reading | Unavailable = await answer_of(ask)
        if isinstance(answer, Unavailable):
            raise NodeError(f"etcd cannot be read: {answer.reason}")
        return {key: value for key, value in answer.items if key != LEASE_KEY}

    async def _swap(self, registry: EtcdRegistry, changes: list[Change]) -> None:
        answer: Swap = await answer_of(lambda done: registry.swap_later(changes, done))
        if answer.outcome is not Outcome.SWAPPED:
            raise NodeError(
                f"etcd was not changed ({answer.outcome.value} {answer.reason}): what was begun counts for nobody; "
                "try again"
            )


def _in_swaps(changes: Sequence[Change]) -> Iterator[list[Change]]:
    """As many in each as a swap takes."""
    some: list[Change] = []
    size_bytes = 0
    for change in changes:
        more_bytes = len(change.expected or b"") + len(change.new or b"")
        if some and (size_bytes + more_bytes > SWAP_BYTES or len(some) == SWAP_CHANGES):
            yield some
            some, size_bytes = [], 0
        some.append(change)
        size_bytes += more_bytes
    if some:
        yield some


def _verdicts(
    words: Words, deleted: set[str], present: Mapping[str, bytes], without: set[str], silent: list[str]
) -> list[Verdict]:
    """Of every family that anybody knows, and nobody knows to be deleted."""
    registered: dict[str, Family] = {}
    for key, value in present.items():
        if key.startswith("family/"):
            try:
                registered[key.removeprefix("family/")] = Family.decode(value)
            except (RegistryError, ValueError, KeyError, TypeError) as error:
                raise NodeError(f"{key} in the registry cannot be read: {error}") from None
    found = []
    for family_id in sorted((words.keys() | registered.keys()) - deleted):
        families = [word.family for word in words.get(family_id, {}).values()]
        families += [registered[family_id]] if family_id in registered else []
        there = _set_of(present.get(REPLICA_SETS + family_id))
        if not words.get(family_id) and there is not None and not set(there.placement) & set(silent):
            continue  # all of its nodes tell, and none has it: it is on no disk any more
        found.append(verdict(max(families, key=lambda each: each.number), words.get(family_id, {}), there, without))
    return found


def _words_of(told: Told) -> Words:
    words: Words = {}
    for node, answer in told.items():
        for each in answer["families"]:
            word = _word_of(each)
            words.setdefault(word.family.id, {})[node] = word
    return words


def _word_of(told: Mapping[str, Any]) -> Word:
    return Word(
        Family.decode(str(told["family"]).encode()),
        _set_of(str(told["kept"]).encode() or None),
        int(told["incarnation"]),
        Position(*told["last"]),
        int(told["promised_epoch"]),
        int(told["resync_regions"]),
        _set_of(str(told.get("asked", "")).encode() or None),  # the version before says nothing of it
    )


def _set_of(value: bytes | None) -> ReplicaSet | None:
    try:
        return None if value is None else ReplicaSet.decode(value)
    except ReplicaSetError:
        return None


def _target(verdicts: list[Verdict], words: Words, deleted: set[str]) -> dict[str, bytes]:
    """What the registry is to hold of families."""
    target: dict[str, bytes] = {}
    families = with_free_names([each.family for each in verdicts])
    for family, each in zip(families, verdicts, strict=True):
        assert each.value is not None
        # One more than anybody has seen of it: a swap that is still under way somewhere loses.
        target |= shared_entries(replace(family, number=family.number + 1), each.value)
    for family_id in deleted & words.keys():
        target[f"removed/{family_id}"] = json.dumps(list(words[family_id])).encode()
    return target

"""Where the replicas of the cluster's families are, changed: made, more or fewer, moved, away from a node.

Theory: what is wanted stands in what everybody sees: how many replicas a family shall have (Family), which nodes are
being drained or gone (the directory). The owner of a family looks at it now and then and makes the next step towards
it: a replica is made elsewhere first; when it is in sync, the one that shall go goes; an owner that shall go hands the
family on last. So whichever node makes the steps, and however often it is broken off, they lead to the same end.

Rules
- A step is a change of ReplicaSet.placement, made by the data process that owns the family (`place`), or a takeover.
- One family is looked at after the other; what fails is tried again at the next look.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from metadata.families import MOST_SHARED, Families
from metadata.registry import FAMILY_ID_BYTES, FIRST_VOLUME, Family, RegistryError, Volume
from metadata.replica_set import Member, ReplicaSet
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, NotJoinedError, WrongInputError, counted
from nbdserver.node.owning import Owning
from nbdserver.node.placing import next_step
from nbdserver.node.replicas import Replicas
from nbdserver.node.spread import FULL_PERCENT, Place, choose, for_family
from nbdserver.node.volume_settings import MOST_REPLICAS
from nbdserver.node.volumes import Volumes

if TYPE_CHECKING:
    from nbdserver.node.cluster import Cluster

LOOK_S = 2.0
PLACE_S = 15.0
SEEN_S = 3.0
"""So long the next step waits until the last one is seen in what is held of the registry."""
IN_SYNC_S = 60.0
"""So long the making of a volume waits until its replicas are in sync; they go on after that."""


class ReplicaChanges:
    """See above."""

    def __init__(
        self,
        families: Families,
        replicas: Replicas,
        owning: Owning,
        volumes: Volumes,
        cluster: Callable[[], "Cluster | None"],
        event: Callable[[str, dict[str, Any]], None],
        repair_delay_s: float,
    ) -> None:
        """`repair_delay_s`: after it a silent node's replicas are made elsewhere; 0.0: never."""
        self.problems: dict[str, str] = {}
        """By family: why its replicas cannot be where they shall be."""
        self._repair_delay_s = repair_delay_s
        self._wanted = asyncio.Event()
        self._stepping = asyncio.Lock()
        self._families = families
        self._replicas = replicas
        self._owning = owning
        self._volumes = volumes
        self._cluster = cluster
        self._event = event

    # --- where ---

    def places(self) -> list[Place]:
        """Every node, as far as it matters for replicas. NodeError."""
        cluster = self._cluster()
        if cluster is None:
            raise NotJoinedError
        return [_place(row) for row in cluster.describe()["nodes"]]

    def choose(self, replicas: int, on: Sequence[str], size_bytes: int) -> tuple[str, ...]:
        """The nodes for a new volume of this size with so many replicas: those of `on`, and the best of the others;
        this one first if it is among them. WrongInputError, NotFoundError, ConflictError."""
        if not 1 <= replicas <= MOST_REPLICAS:
            raise WrongInputError(f"replicas: {replicas} is not 1 to {MOST_REPLICAS}; write for example --replicas 3")
        places = for_family(self.places(), size_bytes)
        for node in on:
            self._demand_place(node, places)
        if len(set(on)) != len(on) or len(on) > replicas:
            raise WrongInputError(f"--on names {len(on)} nodes for {replicas} replicas; name each once, and no more")
        me = self._replicas.me
        chosen = choose(places, replicas, on, me)
        return tuple(sorted(chosen, key=lambda node: node != me))

    # --- making ---

    async def create(
        self, name: str, size_bytes: int, nodes: Sequence[str], wait_s: float = IN_SYNC_S
    ) -> dict[str, Any]:
        """Make an empty volume with a replica on each of these nodes, of which this is the first, and serve it; waits
        until all are in sync, at most `wait_s`."""
        volumes = self._volumes
        async with volumes.lock:
            await volumes.admit_new(name, size_bytes)
            family = Family(
                id=secrets.token_hex(FAMILY_ID_BYTES),
                segment_bytes=volumes.segment_bytes,
                owner="",
                volumes=(Volume(FIRST_VOLUME, name, size_bytes),),
                replicas=len(nodes),
            )
            await self._add(family, nodes)
        await self._replicas.own(family.id)
        self._event("volume-created", {"volume": name, "size_bytes": size_bytes, "nodes": list(nodes)})
        await self._wait_in_sync(family.id, len(nodes), wait_s)
        return await volumes.show(name)

    async def _add(self, family: Family, nodes: Sequence[str]) -> None:
        """Make the first replica here, and the family known to all."""
        await self._replicas.format(family)
        try:
            incarnation = (await self._replicas.follow(family))["incarnation"]
            me = self._replicas.me
            value = ReplicaSet(0, me, (Member(me, incarnation),), tuple(nodes))
            if not await self._families.add_shared(family, value):
                raise ConflictError(f"volume {family.name} has just been made by another node; choose another name")
        except (NodeError, RegistryError):
            await self._replicas.drop_unknown(family.id)
            raise
        await self._families.keep_replica(family)

    async def _wait_in_sync(self, family_id: str, count: int, wait_s: float) -> None:
        give_up_s = time.monotonic() + wait_s
        while time.monotonic() < give_up_s:
            value = self._families.replica_set(family_id)
            if value is None or len(value.in_sync) >= count:
                return
            await asyncio.sleep(0.1)

    # --- changing ---

    async def move(self, name: str, source: str, target: str = "") -> None:
        """Let the replica on `source` be on another node, on `target` or whichever is best. It is made there, and when
        it is in sync the one on `source` is deleted. At the owner. NotFoundError, ConflictError, NodeError."""
        async with self._stepping:
            found = self._families.find(name)
            if found is None or not found[0].replicas:
                raise ConflictError(f"{name} is one node's own; nbdserver volume set {name} replicas=3 changes that")
            family, _ = found
            value = self._families.replica_set(family.id)
            there = value.placement if value is not None else ()
            if source not in there:
                raise NotFoundError(f"{name} has no replica on {source!r:.60}; it is on {', '.join(there)}")
            places = for_family(self.places(), family.size_bytes, there)
            if target:
                if target in there:
                    raise ConflictError(f"{name} has a replica on {target} already")
                self._demand_place(target, places)
            else:
                staying = [node for node in there if node != source]
                choose([place for place in places if place.node != source], len(there), staying)
            await self._families.change(family, leave=tuple({*family.leave, source} - {target}))
            if value is not None and target:
                await self._place(family, [*value.staying, target])
        self._event("replica-moving", {"volume": name, "source": source, "target": target})
        self.stir()

    def _demand_place(self, node: str, places: Sequence[Place]) -> None:
        place = next((place for place in places if place.node == node), None)
        if place is None:
            raise NotFoundError(f"there is no node {node!r:.60}; there are: {', '.join(one.node for one in places)}")
        if place.obstacle:
            raise ConflictError(f"{node} gets no new replica: it {place.obstacle}")

    async def share(self, family: Family, replicas: int) -> None:
        """Make a family of this node's own the cluster's; the other replicas follow. Under the volumes' lock. Its
        clients have to be gone. ConflictError, NodeError, RegistryError."""
        choose(for_family(self.places(), family.size_bytes), replicas, [self._replicas.me])
        if len(family.volumes) > MOST_SHARED:
            raise ConflictError(
                f"{family.name} and what was cloned from it are {len(family.volumes)} volumes, of which at most "
                f"{MOST_SHARED} can become replicated together; delete some of them first"
            )
        clients = await self._owning.clients(family)
        if clients:
            raise ConflictError(f"volume {family.name} has {counted(clients, 'client connection')}; detach first")
        await self._volumes.call("close", family=family.id)
        shared = await self._families.begin_sharing(family, replicas)
        me = self._replicas.me
        try:
            incarnation = (await self._replicas.follow(shared))["incarnation"]
            value = ReplicaSet(family.epoch, me, (Member(me, incarnation),), (me,), family.generation)
            if not await self._families.add_shared(shared, value):
                raise ConflictError(f"the cluster has a volume that is called like one of {family.name}'s; rename it")
        except (NodeError, RegistryError):
            await self._replicas.give_back(shared)
            raise
        await self._families.end_sharing(shared)
        await self._replicas.own(family.id)
        self._event("volume-shared", {"volume": family.name, "replicas": replicas})
        self.stir()

    # --- from now to the end ---

    def stir(self) -> None:
        """Something is wanted."""
        self._wanted.set()

    async def watch(self) -> None:
        """Make the next steps for the families that this node owns, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), LOOK_S)
            self._wanted.clear()
            cluster = self._cluster()
            if cluster is not None and cluster.is_active:
                await self._look(cluster)

    async def _look(self, cluster: "Cluster") -> None:
        owned = [family for family in self._families.replicas() if self._replicas.owns(family.id)]
        self.problems = {family.id: self.problems[family.id] for family in owned if family.id in self.problems}
        places: list[Place] = []  # drawn anew after each step, which may have taken a while
        for family in owned:
            try:
                async with self._stepping:  # what is wanted may have changed while another step was made
                    places = places or self.places()
                    if await self._step(self._families.get(family.id) or family, cluster, places):
                        places = []
            except (NodeError, RegistryError, OSError) as error:
                self._note(family, str(error))
                places = []

    async def _step(self, family: Family, cluster: "Cluster", places: Sequence[Place]) -> bool:
        """Make the next one of a family; False if there is none."""
        value = self._families.replica_set(family.id)
        if value is None or not self._replicas.owns(family.id):
            self._note(family, "")
            return False
        leave = {*family.leave, *(place.node for place in places if place.is_draining)}
        known = {place.node for place in places}
        leave |= {node for node in value.staying if node not in known or self._is_lost(node, cluster)}
        places = for_family(places, family.size_bytes, value.placement)
        step = next_step(family.replicas, leave, value, self._replicas.me, places)
        is_made = True
        if step.placement:
            self._event("replicas-placed", {"volume": family.name, "nodes": list(step.placement)})
            await self._place(family, step.placement)
        elif step.owner:
            await self._owning.move(family, step.owner)
        elif family.leave and not set(family.leave) & set(value.placement):
            await self._families.change(family, leave=())
        else:
            is_made = False
        self._note(family, step.problem)
        return is_made

    async def _place(self, family: Family, nodes: Sequence[str]) -> None:
        """Have the replicas on these nodes, and wait until that is seen here: the next step is decided on it.
        NodeError."""
        try:
            async with asyncio.timeout(PLACE_S):
                await self._volumes.call("place", family=family.id, placement=list(nodes))
        except TimeoutError:
            raise NodeError("the cluster's registry has not taken the new places yet; it is tried again") from None
        give_up_s = time.monotonic() + SEEN_S
        while time.monotonic() < give_up_s:
            value = self._families.replica_set(family.id)
            if value is None or set(value.staying) == set(nodes):
                return
            await asyncio.sleep(0.05)

    def _is_lost(self, node: str, cluster: "Cluster") -> bool:
        """Whether a replica there is not waited for any more."""
        return 0.0 < self._repair_delay_s <= cluster.silent_s(node)

    def _note(self, family: Family, problem: str) -> None:
        """Say once what is in the way."""
        if problem and self.problems.get(family.id) != problem:
            self._event("replicas-not-placed", {"volume": family.name, "reason": problem})
        if problem:
            self.problems[family.id] = problem
        else:
            self.problems.pop(family.id, None)


def _place(row: dict[str, Any]) -> Place:
    free_bytes = int((row["size_bytes"] or 0) - (row["used_bytes"] or 0))
    obstacle = ""
    if row["state"] != "up":
        obstacle = "is silent"
    elif row["draining"]:
        obstacle = "is being drained"
    elif row["across_wan"]:
        obstacle = "is across a WAN"
    elif not row["data_addresses"]:
        obstacle = "has not said where its data processes are"
    elif (row["fill_percent"] or 0.0) >= FULL_PERCENT:
        obstacle = f"is {row['fill_percent']:.0f} % full"
    return Place(row["name"], row["fault_domain"], free_bytes, obstacle, row["draining"], row["promisable_bytes"])

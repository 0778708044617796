"""The world `directory`: nodes that form a cluster, elect masters, and spread what they know.

Theory: what runs is production's `DirectoryNode` on each machine; the clients here publish with every confirmation and
remember what they were told; the `Judge` looks at all copies. A value that is only ever written by one node, one after
the other, has numbers that rise, so what was confirmed can be told from what came later.

Rules of this file
- Some machines start at once, the others join while faults happen already.
- The core that is mended in the end holds more than a majority of the voters, so that one change of their list that is
  still under way decides nothing.
- One machine may lose its disk, when there are three voters: the two others have what was confirmed.
"""

import random
from collections import Counter
from collections.abc import Callable

from metadata.directory.made_whole import MissingVotersError, known_to, state_from
from metadata.directory.node import DirectoryNode
from metadata.directory.registry_keys import KEPT, KEPT_PREFIX, STATE_KEY, MasterState
from metadata.directory.reports import Answer
from metadata.directory.settings import DirectorySettings
from metadata.registry_calls import Change
from protocol.directory import Confirm, NodeKind
from protocol.sealed_frames import ClusterKeys
from tests.simulation.cluster.cluster import Cluster, ClusterRun
from tests.simulation.cluster.directory_judge import Judge, View
from tests.simulation.cluster.faults import Mix, draw_mix
from tests.simulation.cluster.machine import Machine, Seams

HOME = "site-1"
AWAY = "site-2"
DATAGRAM_PORT = 700
STREAM_PORT = 701
KEYS = ClusterKeys("simulated", [bytes(range(32))])
COUNTERS = 3  # keys of each node whose numbers rise
SUBSCRIPTIONS = (("once/",), ("count/", "load/"), ("load/node-1",), ())
SETTLING_S = 90.0
NEEDS_DISKS = 3  # voters, so that the disk of one is not one too few

NodeFactory = Callable[[DirectorySettings, Seams], DirectoryNode]


def production(settings: DirectorySettings, seams: Seams) -> DirectoryNode:
    """The node as it is."""
    return DirectoryNode(settings, seams.clock, seams.network, seams.store, seams.registry, seams.random)


class DirectoryScenario:
    """Who is there, what clients do, and what is expected."""

    converges_within_s = SETTLING_S

    def __init__(self, rng: random.Random, make: NodeFactory = production) -> None:
        self.judge = Judge()
        self.answers: Counter[str] = Counter()
        self.cluster: Cluster
        self._make = make
        self._random = rng
        self._near = rng.choice([1, 3, 3, 4, 5, 7])
        self._far = rng.choice([0, 0, 1, 3])
        self._at_once = rng.choice([1, 3, self._near])
        self._sizes = rng.choice([(0,), (0, 100), (0, 100, 2_000, 30_000)])
        self._quiet = rng.random() < 0.1
        self._number = 0
        self._busy: dict[str, int] = {}  # keys whose last publication was not answered, by the life of their writer
        self._said: dict[str, tuple[str, int, bytes]] = {}
        self._prefixes: dict[str, tuple[str, ...] | None] = {}

    # --- the machines ---

    def begin(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.may_lose_disk = self._may_lose_disk
        cluster.recover = self._recover
        for number in range(1, self._near + self._far + 1):
            name = f"node-{number}"
            is_near = number <= self._near
            cluster.add(name, HOME if is_near else AWAY)
            self._prefixes[name] = None if is_near else self._random.choice(SUBSCRIPTIONS)
            if number <= self._at_once:
                cluster.start(name)
            else:
                cluster.scheduler.after(self._random.choice([2.0, 40.0]) * self._random.random(), cluster.start, name)

    def start(self, machine: Machine, seams: Seams) -> DirectoryNode:
        """Begin a life of a node."""
        prefixes = self._prefixes[machine.name]
        settings = DirectorySettings(
            machine.name,
            NodeKind.FIRST if prefixes is None else NodeKind.SECOND,
            f"{machine.host}:{DATAGRAM_PORT}",
            f"{machine.host}:{STREAM_PORT}",
            KEYS,
            prefixes or (),
        )
        return self._make(settings, seams)

    def nodes(self) -> list[tuple[Machine, DirectoryNode]]:
        """The nodes that run, paused ones too."""
        found = []
        for machine in self.cluster.machines.values():
            if isinstance(machine.node, DirectoryNode):
                found.append((machine, machine.node))
        return found

    def _may_lose_disk(self, name: str) -> bool:
        return len(self._voters()) >= NEEDS_DISKS

    def _voters(self) -> set[str]:
        state = self._state()
        return set(state.voters.values()) if state else set()

    def _state(self) -> MasterState | None:
        """As the registry has it."""
        items = self.cluster.registry.get(STATE_KEY).items
        return MasterState.decode(items[0][1]) if items else None

    # --- operators ---

    def _recover(self) -> None:
        """They have one node make the registry whole from what all know that answer, if these are enough."""
        cluster, registry = self.cluster, self.cluster.registry
        there = [(machine, node) for machine, node in self.nodes() if machine.is_running and not node.failure]
        asked = [machine for machine, _ in there if registry.reaches(machine.name)]
        if not asked:
            return
        told = [(machine, node) for machine, node in there if cluster.hear_each_other(asked[0], machine)]
        try:
            state = state_from(told[0][1].me, [known_to(node) for _, node in told], self._state())
        except MissingVotersError:
            return
        cluster.tell(f"{asked[0].name} makes the registry whole, in epoch {state.epoch if state else 0}")
        gone = {key.removeprefix(KEPT_PREFIX) for key in cluster.put_back_keys if key.startswith(KEPT_PREFIX)}
        self.judge.forgive(gone, self._number)
        (before,) = [value for _, value in registry.get(STATE_KEY).items] or [None]
        change = Change(STATE_KEY, before, state.encode() if state else None)
        cluster.make_registry_whole([change], [machine for machine, _ in told])

    # --- clients ---

    def act(self) -> None:
        running = [(machine, node) for machine, node in self.nodes() if machine.is_running]
        if not running or self._quiet:
            return
        machine, node = self._random.choice(running)
        self._number += 1
        kind = self._random.random()
        if kind < 0.4:
            self._count(machine, node)
        elif kind < 0.6:
            self._once(machine, node, Confirm.SITE)
        elif kind < 0.7:
            self._once(machine, node, Confirm.REGISTRY)
        elif kind < 0.8:
            self._say(machine)
            self.cluster.scheduler.after(0.02 * self._random.random(), self._say, machine)
        elif kind < 0.9:
            key = f"passing/{machine.name}/{self._random.randrange(3)}"
            node.publish(key, b"%d" % self._number, expires_s=10.0 * self._random.random() + 0.1)
        else:
            key = f"come-and-go/{machine.name}/{self._random.randrange(3)}"
            node.publish(key, self._random.choice([None, b"%d" % self._number]), Confirm.SITE, self._counted)

    def _counted(self, answer: Answer) -> None:
        self.answers[answer.name] += 1

    def _count(self, machine: Machine, node: DirectoryNode) -> None:
        """One number after the other: a new one only when the last was answered, or its writer's life is over."""
        key = f"count/{machine.name}/{self._random.randrange(COUNTERS)}"
        if self._busy.get(key) == machine.lives:
            return
        self._busy[key] = machine.lives
        value = b"%d" % self._number

        def done(answer: Answer) -> None:
            self._counted(answer)
            del self._busy[key]
            if answer is Answer.CONFIRMED:
                self.judge.confirm(key, value)

        node.publish(key, value, self._random.choice([Confirm.SITE, Confirm.SITE, Confirm.REGISTRY]), done)

    def _say(self, machine: Machine) -> None:
        """What a node says of itself: the newest counts, and nobody waits for an answer."""
        node = machine.node
        if isinstance(node, DirectoryNode) and machine.is_running:
            self._number += 1
            key, value = f"load/{machine.name}", b"%d" % self._number
            self._said[key] = (machine.name, machine.lives, value)
            node.publish(key, value)

    def _once(self, machine: Machine, node: DirectoryNode, confirm: Confirm) -> None:
        key = f"once/{self._number}"
        value = b"%d " % self._number + bytes(self._random.choice(self._sizes))

        def done(answer: Answer) -> None:
            self._counted(answer)
            if answer is Answer.CONFIRMED:
                self.judge.confirm(key, value)
            elif answer is Answer.NOT_DONE:
                self.judge.refuse(key)

        node.publish(key, value, confirm, done)

    # --- what is expected ---

    def check(self) -> None:
        for machine, node in self.nodes():
            if node.failure:
                self.cluster.failed(machine, node.failure)
        state = self._state()
        self.judge.look(self._views(), state.epoch if state else 0)

    def core(self, rng: random.Random) -> set[str]:
        names = list(self.cluster.machines)
        voters = self._voters()
        spared = max(0, (len(voters) - 1) // 2 - 1)
        off: set[str] = set()
        if voters and rng.random() < 0.5:
            off |= set(rng.sample(sorted(voters), min(spared, rng.randrange(3))))
            off |= {name for name in names if self._prefixes[name] is not None and rng.random() < 0.3}
        return set(names) - off

    def missing(self) -> str:
        self.check()
        if self.cluster.needs_recovery:
            self._recover()
        views = self._views()
        for machine, node in self.nodes():
            if not node.is_active:
                return f"{machine.name} is not active"
        kept = dict(self.cluster.registry.range(KEPT).items)
        lives = {machine.name: machine.lives for machine, _ in self.nodes()}
        said = {key: value for key, (name, life, value) in self._said.items() if lives.get(name) == life}
        wrong = self.judge.missing(views, kept, said)
        for view in views:
            if not wrong and view.prefixes is None:
                self.judge.must_have_confirmed(view)
        return wrong

    def end(self) -> None:
        return

    def _views(self) -> list[View]:
        return [
            View(
                machine.name,
                machine.lives,
                node.replica,
                self._prefixes[machine.name],
                node.master.term.epoch if node.master is not None else 0,
            )
            for machine, node in self.nodes()
        ]


def directory_run(
    seed: int, mix: Mix | None = None, make: NodeFactory = production, story: Callable[[str], None] | None = None
) -> tuple[DirectoryScenario, ClusterRun]:
    """A run of one seed; `go` is still to be called."""
    rng = random.Random(f"{seed} directory")
    drawn = draw_mix(rng) if mix is None else mix
    scenario = DirectoryScenario(rng, make)
    cluster = Cluster(seed, drawn, scenario.start, story)
    return scenario, ClusterRun(
        cluster, scenario, safety_s=rng.choice([30.0, 120.0]), act_s=rng.choice([0.1, 0.5, 2.0])
    )

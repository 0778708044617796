"""Members come, go, lose their disks and are struck, in a calm network."""

import pytest

from metadata.directory.node import DirectoryNode
from metadata.directory.reports import Answer
from metadata.directory.settings import DirectorySettings
from protocol.directory import Confirm, NodeKind
from tests.simulation.cluster.cluster import Cluster
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.cluster.spread import KEYS, start

SEED = 5
LIMIT_S = 60.0


class Members:
    """A cluster of first-kind nodes."""

    def __init__(self, count: int) -> None:
        self.cluster = Cluster(SEED, Mix(), start)
        for number in range(count):
            self.cluster.add(f"node-{number}")
            self.cluster.start(f"node-{number}")
        self.settle()

    def nodes(self) -> list[DirectoryNode]:
        found = [machine.node for machine in self.cluster.machines.values()]
        return [node for node in found if isinstance(node, DirectoryNode)]

    def settle(self) -> None:
        """Until everybody who runs is active."""
        assert self.cluster.run_until(lambda: all(node.is_active for node in self.nodes()), LIMIT_S)

    def master(self) -> DirectoryNode:
        assert self.cluster.run_until(lambda: any(node.master is not None for node in self.nodes()), LIMIT_S)
        return next(node for node in self.nodes() if node.master is not None)

    def another(self) -> str:
        """The name of one that is not the master."""
        return next(node.settings.name for node in self.nodes() if node.master is None)

    def voters(self) -> list[str]:
        state = self.master().election.state
        assert state is not None
        return sorted(state.voters.values())

    def publish(self, key: str) -> list[Answer]:
        answers: list[Answer] = []
        self.master().publish(key, b"v", Confirm.SITE, answers.append)
        self.cluster.run(2.0)
        return answers

    def remove(self, name: str) -> list[Answer]:
        answers: list[Answer] = []
        self.master().remove(name, answers.append)
        self.cluster.run(2.0)
        return answers


def test_a_member_that_is_struck_is_no_voter_any_more_and_the_others_need_it_no_longer() -> None:
    members = Members(3)
    gone = members.another()
    members.cluster.machines[gone].end(power=True)
    assert members.remove(gone) == [Answer.CONFIRMED]
    assert gone not in members.voters()
    assert members.master().get(f"member/{gone}") is None
    assert members.publish("after") == [Answer.CONFIRMED]
    members.cluster.start(gone)  # it was not gone for good
    members.settle()
    assert gone in members.voters()


def test_a_node_whose_master_is_gone_knows_that_it_hears_none_until_there_is_another() -> None:
    members = Members(3)
    assert all(node.hears_master for node in members.nodes())
    gone = [members.master().settings.name]
    gone += [members.another()]
    for name in gone:
        members.cluster.machines[name].end(power=True)
    (left,) = members.nodes()
    assert members.cluster.run_until(lambda: not left.hears_master, LIMIT_S)
    members.cluster.run(10.0)
    assert not left.hears_master
    members.cluster.start(gone[1])
    assert members.cluster.run_until(lambda: left.hears_master, LIMIT_S)


def test_a_member_is_not_struck_while_too_few_others_have_everything() -> None:
    members = Members(3)
    first, second = (node.settings.name for node in members.nodes() if node.master is None)
    before = members.voters()
    members.cluster.machines[first].end(power=True)
    assert members.publish("confirmed by two") == [Answer.CONFIRMED]
    # Without the second one the first would be half of the voters, and it does not have what was confirmed.
    members.cluster.machines[second].end(power=True)
    assert members.remove(second) == [Answer.NOT_DONE]
    assert members.voters() == before


@pytest.mark.parametrize("name", ["nobody", ""])
def test_who_is_no_member_cannot_be_struck(name: str) -> None:
    assert Members(1).remove(name) == [Answer.NOT_DONE]


def test_the_master_does_not_strike_itself_and_others_strike_nobody() -> None:
    members = Members(2)
    assert members.remove(members.master().settings.name) == [Answer.NOT_DONE]
    answers: list[Answer] = []
    agent = next(node for node in members.nodes() if node.master is None)
    agent.remove(members.master().settings.name, answers.append)
    assert answers == [Answer.NOT_DONE]


def test_a_silent_member_is_suspected_and_loses_nothing_by_it() -> None:
    members = Members(3)
    name = members.another()
    members.cluster.machines[name].pause()
    assert members.cluster.run_until(lambda: members.master().get(f"state/{name}") == b"suspected", LIMIT_S)
    assert name in members.voters()
    members.cluster.machines[name].resume()
    assert members.cluster.run_until(lambda: members.master().get(f"state/{name}") is None, LIMIT_S)
    members.settle()


def test_a_node_without_its_disk_is_another_one_with_the_same_name() -> None:
    members = Members(3)
    name = members.another()
    machine = members.cluster.machines[name]
    before = members.voters()
    old_id = next(node.me.node for node in members.nodes() if node.settings.name == name)
    machine.end(power=True)
    machine.lose_disk()
    members.cluster.start(name)
    members.settle()
    members.cluster.run(2.0)
    state = members.master().election.state
    assert state is not None
    assert members.voters() == before
    assert old_id not in state.voters


FAR = "far"


def start_either(machine: Machine, seams: Seams) -> DirectoryNode:
    """A second-kind node if its name says so."""
    kind = NodeKind.SECOND if machine.name.startswith(FAR) else NodeKind.FIRST
    addresses = (f"{machine.host}:700", f"{machine.host}:701")
    settings = DirectorySettings(machine.name, kind, *addresses, KEYS, ("key/",) if kind is NodeKind.SECOND else ())
    return DirectoryNode(settings, seams.clock, seams.network, seams.store, seams.registry, seams.random)


def test_what_was_on_its_way_over_a_stream_that_broke_is_sent_over_the_next_one() -> None:
    cluster = Cluster(SEED, Mix(), start_either)
    for name, site in (("node-0", "site-1"), (FAR, "site-2")):
        cluster.add(name, site)
        cluster.start(name)
    near, far = (cluster.machines[name].node for name in ("node-0", FAR))
    assert isinstance(near, DirectoryNode)
    assert isinstance(far, DirectoryNode)
    assert cluster.run_until(lambda: near.is_active and far.is_active, LIMIT_S)
    for number in range(30):
        near.publish(f"key/{number:02}", b"v")
        cluster.run(0.01)
        if number % 10 == 5:
            assert far.far_link is not None
            far.far_link.again()  # with messages of the last 20 ms on their way
            cluster.run(0.5)
    begun_s = cluster.now_s
    assert cluster.run_until(lambda: len(far.range("key/")) == 30, LIMIT_S)
    assert cluster.now_s - begun_s < 0.3
    assert far.joiner.snapshots == 1

"""etcd members that are killed, stopped, cut from their majority or compacted, and what users of the registry see.

Someone counts in one key through all of it: no number may be skipped, counted twice or heard of out of order.
"""

from pathlib import Path

import pytest

from metadata.registry_calls import (
    MAX_PENDING_CALLS,
    READABLE_VERSIONS,
    REGISTRY_VERSION,
    Change,
    Outcome,
    Reading,
    Swap,
    Unavailable,
)
from tests.conftest import Processes
from tests.etcd_cluster import EtcdCluster
from tests.etcd_rig import Counter, EtcdRig, MakeCluster, MakeRig, quick
from tests.registry_conformance import Holder, Watcher, must_swap, read, swap, wait_until_gone
from tests.serving import eventually


def in_use(rig: EtcdRig, etcd: EtcdCluster) -> int:
    """Return the number of the member that the rig's first registry uses."""
    rig.run_until(lambda: rig.registry.health().is_connected)
    return etcd.endpoints.index(rig.registry.health().endpoint)


def test_etcd_may_be_gone_for_a_minute(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd()
    rig = make_rig(quick(etcd))
    counter = Counter(rig)
    counter.run()
    patient, hasty = Holder(rig, ttl_s=60), Holder(rig, ttl_s=2)
    assert swap(rig, Change("patient", None, b"", patient.lease.id)).outcome is Outcome.SWAPPED
    assert swap(rig, Change("hasty", None, b"", hasty.lease.id)).outcome is Outcome.SWAPPED
    watcher = Watcher(rig, "other")
    rig.run_until(lambda: bool(watcher.events))

    etcd.members[0].pause()
    sent = swap(rig, Change("sent", None, b"1"))
    assert (sent.outcome, bool(sent.reason)) == (Outcome.UNKNOWN, True)
    rig.run_until(lambda: not rig.registry.health().is_connected)
    counter.start()
    assert swap(rig, Change("unsent", None, b"1")).outcome is Outcome.NOT_DONE
    answers: list[Reading | Unavailable] = []
    rig.registry.get_later("counter", answers.append)
    rig.run_until(lambda: bool(answers))
    assert isinstance(answers[0], Unavailable)
    assert "no connection to etcd" in answers[0].reason
    assert etcd.endpoints[0] in rig.registry.health().last_error
    rig.run_until(lambda: hasty.losses == 1)
    assert (hasty.lease.valid_until_s, patient.losses) == (0, 0)

    etcd.members[0].resume()
    rig.run_until(lambda: rig.registry.health().is_connected)
    goal = counter.count + 20
    rig.run_until(lambda: counter.count > goal)
    counter.stop()
    assert patient.lease.valid_until_s > rig.clock.now()
    assert read(rig, "patient") == b""
    must_swap(rig, ("other", None, b"1"))
    rig.run_until(lambda: watcher.state == {"other": b"1"})
    assert not any(event.is_reset for event in watcher.events[1:])
    assert read(rig, "unsent") is None
    again = swap(rig, Change("sent", None, b"1"))
    assert again.outcome in (Outcome.SWAPPED, Outcome.LOST)
    assert read(rig, "sent") == b"1"
    wait_until_gone(rig, "hasty")


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_member_in_use_that_goes_is_replaced_by_another(
    make_etcd: MakeCluster, make_rig: MakeRig, fault: str
) -> None:
    etcd = make_etcd(3)
    rig = make_rig(quick(etcd))
    counter, holder = Counter(rig), Holder(rig, ttl_s=10)
    counter.start()
    rig.run_until(lambda: counter.count > 10)
    number = in_use(rig, etcd)
    member = etcd.members[number]
    if fault == "killed":
        member.kill()
    else:
        member.pause()
    rig.run_until(lambda: rig.registry.health().endpoint != member.endpoint and rig.registry.health().is_connected)
    goal = counter.count + 20
    rig.run_until(lambda: counter.count > goal)
    if fault == "killed":
        member.start()
    else:
        member.resume()
    counter.stop()
    assert holder.losses == 0
    assert Outcome.SWAPPED in counter.outcomes
    assert sum(event.is_reset for event in counter.watcher.events) == 1


def test_without_a_majority_nothing_is_promised_and_nothing_is_lost(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd(3)
    rig = make_rig(quick(etcd))
    counter = Counter(rig)
    counter.start()
    rig.run_until(lambda: counter.count > 10)
    lost = [member for member in etcd.members if member.endpoint != rig.registry.health().endpoint]
    for member in lost:
        member.kill()
    rig.run_until(lambda: not rig.registry.health().is_connected)
    rig.run_for(0.5)
    stuck_at = counter.count
    tried = len(counter.outcomes)
    rig.run_for(1.5)
    assert counter.count <= stuck_at + 1
    assert set(counter.outcomes[tried:]) <= {Outcome.UNKNOWN, Outcome.NOT_DONE}
    assert all(counter.reasons[tried:])
    answers: list[object] = []
    rig.registry.get_later("counter", answers.append)
    rig.run_until(lambda: bool(answers))
    assert isinstance(answers[0], Unavailable)
    for member in lost:
        member.start()
    goal = counter.count + 20
    rig.run_until(lambda: counter.count > goal)
    counter.stop()


def test_members_may_be_killed_one_after_the_other_again_and_again(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd(3)
    rig = make_rig(quick(etcd))
    counter = Counter(rig)
    counter.start()
    for _ in range(4):
        member = etcd.members[in_use(rig, etcd)]
        member.kill()
        goal = counter.count + 10
        rig.run_until(lambda goal=goal: counter.count > goal)
        member.start()
        etcd.wait_ready()
    counter.stop()


@pytest.mark.parametrize("is_compacted", [False, True])
def test_a_broken_watch_goes_on_or_reads_anew_after_a_compaction(
    make_etcd: MakeCluster, make_rig: MakeRig, is_compacted: bool
) -> None:
    etcd = make_etcd()
    rig = make_rig(quick(etcd))
    must_swap(rig, ("w/a", None, b"1"), ("w/b", None, b"1"))
    watcher = Watcher(rig, "w/")
    rig.run_until(lambda: bool(watcher.events))
    etcd.members[0].kill()
    etcd.members[0].start()
    etcd.wait_ready()
    for number in range(2, 5):
        etcd.control("put", "test/w/a", str(number))
    etcd.control("del", "test/w/b")
    if is_compacted:
        revision = etcd.control("get", "test/w/a", "--write-out=fields").split('"Revision" : ')[1].split()[0]
        etcd.control("compact", revision)
    rig.run_until(lambda: watcher.state == {"w/a": b"4"})
    changes = [event.changes for event in watcher.events[1:]]
    if is_compacted:
        assert (changes, watcher.events[1].is_reset) == ([(("w/a", b"4"),)], True)
    else:
        assert changes == [*((("w/a", str(number).encode()),) for number in range(2, 5)), (("w/b", None),)]
    must_swap(rig, ("w/c", None, b"1"))
    rig.run_until(lambda: "w/c" in watcher.state)
    assert not watcher.events[-1].is_reset


def test_a_watch_after_a_compacted_revision_begins_with_a_reset(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd()
    rig = make_rig(quick(etcd))
    first = must_swap(rig, ("w/a", None, b"1"))
    last = must_swap(rig, ("w/a", b"1", b"2"))
    etcd.control("compact", str(last))
    watcher = Watcher(rig, "w/", after=first - 1)
    rig.run_until(lambda: bool(watcher.events))
    assert (watcher.events[0].is_reset, watcher.state) == (True, {"w/a": b"2"})


def test_changes_that_etcd_sends_in_fragments_come_whole(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd()
    rig = make_rig(quick(etcd, call_timeout_s=5.0))
    first = must_swap(rig, ("w", None, b""))
    values = [bytes([number]) * 600_000 for number in range(6)]
    for number, value in enumerate(values):
        must_swap(rig, (f"w/{number}", None, value[: len(value) // 2]), (f"w/{number}/more", None, value))
    watcher = Watcher(rig, "w/", after=first)
    rig.run_until(lambda: len(watcher.events) == len(values))
    assert all(len(event.changes) == 2 for event in watcher.events)
    assert [watcher.state[f"w/{number}/more"] for number in range(6)] == values


def test_another_cluster_at_the_same_address_is_refused(
    make_etcd: MakeCluster, make_rig: MakeRig, processes: Processes, tmp_path: Path
) -> None:
    etcd = make_etcd()
    rig = make_rig(quick(etcd))
    must_swap(rig, ("a", None, b"1"))
    assert read(rig, "a", rig.other) == b"1"
    etcd.members[0].kill()
    (tmp_path / "etcd" / "m0").rename(tmp_path / "kept")
    etcd.members[0].start(["--initial-cluster-token=another"])
    rig.run_until(lambda: "another etcd cluster" in rig.registry.health().last_error)
    assert swap(rig, Change("a", None, b"2")).outcome is Outcome.NOT_DONE
    assert etcd.control("get", "--prefix", "--keys-only", "") == "", "nothing is written there"
    etcd.members[0].kill()
    (tmp_path / "etcd" / "m0").rename(tmp_path / "other")
    (tmp_path / "kept").rename(tmp_path / "etcd" / "m0")
    etcd.members[0].start()
    rig.run_until(lambda: rig.registry.health().is_connected)
    assert read(rig, "a") == b"1"


def test_a_backup_that_was_restored_is_refused_also_by_who_has_seen_nothing_and_its_leases_end(
    make_etcd: MakeCluster, make_rig: MakeRig, tmp_path: Path
) -> None:
    etcd = make_etcd()
    rig = make_rig(quick(etcd))
    holder = Holder(rig)
    assert swap(rig, Change("l/a", None, b"1", holder.lease.id)).outcome is Outcome.SWAPPED
    must_swap(rig, ("a", None, b"1"))
    etcd.control("snapshot", "save", str(tmp_path / "backup"))
    etcd.lose()
    etcd.restore(tmp_path / "backup")
    etcd.wait_ready()
    new = make_rig(quick(etcd))
    for registry in (rig.registry, new.registry):
        rig.run_until(lambda registry=registry: "restored from a backup" in registry.health().last_error)  # type: ignore[misc]
        assert not registry.health().is_connected
    eventually(lambda: etcd.control("get", "--keys-only", "--prefix", "test/l/") == "", "nobody renews it: it ends")
    assert "test/a" in etcd.control("get", "--keys-only", "--prefix", "test/")


def test_a_newer_registry_is_refused(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd()
    newer = int(REGISTRY_VERSION) + 1
    etcd.control("put", "test/registry-version", str(newer))
    rig = make_rig(quick(etcd))
    answers: list[object] = []
    rig.registry.get_later("a", answers.append)
    rig.run_until(lambda: bool(answers))
    assert isinstance(answers[0], Unavailable)
    assert f"version {newer}, this program knows {newer - 1}" in answers[0].reason
    assert not rig.registry.health().is_connected


def test_an_older_registry_is_marked_with_the_present_version(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd()
    etcd.control("put", "test/registry-version", READABLE_VERSIONS[0].decode())
    rig = make_rig(quick(etcd))
    must_swap(rig, ("a", None, b"1"))
    assert etcd.control("get", "--print-value-only", "test/registry-version").strip() == REGISTRY_VERSION.decode()


def test_an_etcd_that_is_full_says_so_and_still_answers_reads(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd(1, f"--quota-backend-bytes={4 << 20}")
    rig = make_rig(quick(etcd, call_timeout_s=10.0, probe_timeout_s=5.0))
    must_swap(rig, ("a", None, b"1"))
    answer = Swap(Outcome.SWAPPED)
    for number in range(20):
        answer = swap(rig, Change(f"big/{number}", None, bytes(900_000)))
        if answer.outcome is not Outcome.SWAPPED:
            break
    assert (answer.outcome, "space exceeded" in answer.reason) == (Outcome.UNKNOWN, True)
    assert read(rig, "a") == b"1"
    assert rig.registry.health().is_connected
    assert "space exceeded" in rig.registry.health().last_error


def test_more_calls_than_may_wait_are_refused_at_once(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd()
    rig = make_rig(quick(etcd))
    answers: list[object] = []
    for _ in range(MAX_PENDING_CALLS + 1):
        rig.registry.get_later("a", answers.append)
    rig.registry.swap_later([Change("a", None, b"1")], answers.append)
    assert rig.registry.health().pending_calls == MAX_PENDING_CALLS
    rig.run_until(lambda: len(answers) == MAX_PENDING_CALLS + 2)
    refused = [answer for answer in answers if not isinstance(answer, Reading)]
    assert all("waiting already" in str(answer) for answer in refused)
    assert len(refused) == 2
    assert read(rig, "a") is None

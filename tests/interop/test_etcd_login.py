"""Who we are to etcd, and whom we take for etcd: TLS, client certificates, passwords, and tokens that are refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from metadata.etcd_settings import EtcdSettings, EtcdTls
from metadata.registry_calls import Change, Outcome, Reading, Swap, Unavailable
from nbdserver.node.authority import Authority
from tests.etcd_cluster import DAY, EtcdCluster
from tests.etcd_rig import Counter, EtcdRig, MakeCluster, MakeRig, quick
from tests.registry_conformance import Holder, Watcher, must_swap, read, wait_until_gone

PASSWORD = "a password of the test"


def complaint(rig: EtcdRig) -> str:
    """Return why the registry cannot be used."""
    rig.run_until(lambda: rig.registry.health().last_error != "")
    answers: list[Reading | Unavailable] = []
    refusals: list[Swap] = []
    rig.registry.get_later("a", answers.append)
    rig.registry.swap_later([Change("a", None, b"1")], refusals.append)
    rig.run_until(lambda: bool(answers and refusals))
    assert isinstance(answers[0], Unavailable)
    assert refusals[0].outcome is Outcome.NOT_DONE
    return answers[0].reason


def make_authority(directory: Path) -> Authority:
    authority = Authority(directory, overwrite=True)
    authority.make_ca(directory.name, DAY)
    return authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "tls")


@pytest.fixture
def demanding(make_etcd: MakeCluster, authority: Authority) -> EtcdCluster:
    """Takes only clients with a certificate of our authority, and has users."""
    etcd = make_etcd(1, "--client-cert-auth", authority=authority)
    etcd.enable_auth(PASSWORD)
    return etcd


def with_certificate(etcd: EtcdCluster, authority: Authority, user: str = "node") -> EtcdSettings:
    ca, certificate, key = authority.make_client(user, DAY).files
    return quick(etcd, tls=EtcdTls(str(ca), str(certificate), str(key)))


def test_a_client_is_known_by_its_certificate(demanding: EtcdCluster, authority: Authority, make_rig: MakeRig) -> None:
    settings = with_certificate(demanding, authority)
    rig = make_rig(settings)
    Counter(rig).run()
    elsewhere = make_rig(replace(settings, namespace="not-ours/"))
    assert "permission denied" in complaint(elsewhere)
    stranger = make_rig(with_certificate(demanding, authority, user="stranger"))
    assert "permission denied" in complaint(stranger) or "user name" in complaint(stranger)


def test_certificates_are_read_anew_when_connecting(
    demanding: EtcdCluster, authority: Authority, make_rig: MakeRig
) -> None:
    settings = with_certificate(demanding, authority)
    rig = make_rig(settings)
    counter = Counter(rig)
    assert settings.tls
    assert settings.tls.certificate_file
    kept = Path(settings.tls.certificate_file).read_bytes()
    Path(settings.tls.certificate_file).unlink()
    counter.run()
    demanding.members[0].kill()
    demanding.members[0].start()
    rig.run_until(lambda: "client-cert.pem" in rig.registry.health().last_error)
    Path(settings.tls.certificate_file).write_bytes(kept)
    counter.run()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("wrong authority", "not of the authority in .*other/ca-cert.pem"),
        ("wrong name", "not for somebody.example"),
        ("no certificate", "client certificate that it trusts"),
        ("no such file", "TLS cannot use .*nowhere.pem: .*No such file"),
        ("no PEM file", "TLS cannot use .*rubbish.pem: .*PEM"),
        ("no TLS", "does it want TLS"),
    ],
)
def test_whoever_is_not_who_it_should_be_is_told_so(
    demanding: EtcdCluster, authority: Authority, make_rig: MakeRig, tmp_path: Path, fault: str, expected: str
) -> None:
    settings = with_certificate(demanding, authority)
    tls = settings.tls
    assert tls
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n")
    changed = {
        "wrong authority": replace(tls, ca_file=str(make_authority(tmp_path / "other").ca_certificate)),
        "wrong name": replace(tls, server_name="somebody.example"),
        "no certificate": replace(tls, certificate_file=None, key_file=None),
        "no such file": replace(tls, ca_file=str(tmp_path / "nowhere.pem")),
        "no PEM file": replace(tls, ca_file=str(rubbish)),
        "no TLS": None,
    }
    rig = make_rig(replace(settings, tls=changed[fault]))
    reason = complaint(rig)
    assert re.search(expected, reason), reason
    assert not rig.registry.health().is_connected


def test_a_server_may_be_known_by_another_name(make_etcd: MakeCluster, authority: Authority, make_rig: MakeRig) -> None:
    etcd = make_etcd(1, authority=authority, server_name="etcd.example")
    settings = quick(etcd, tls=EtcdTls(str(authority.ca_certificate), server_name="etcd.example"))
    Counter(make_rig(settings)).run()


def test_a_user_logs_in_with_a_password_and_again_when_the_token_is_refused(
    make_etcd: MakeCluster, make_rig: MakeRig
) -> None:
    etcd = make_etcd(1, "--auth-token=simple", "--auth-token-ttl=1")
    etcd.enable_auth(PASSWORD)
    # The question that keeps a connection alive would keep the token alive too.
    rig = make_rig(quick(etcd, user="node", password=PASSWORD, probe_interval_s=30.0))
    counter, holder = Counter(rig), Holder(rig)
    counter.run()
    bound = [Change("bound", None, b"", holder.lease.id)]
    rig.registry.swap_later(bound, lambda answer: None)
    endured = Watcher(rig, "counter")
    rig.run_until(lambda: bool(endured.events))
    rig.run_for(2.5)
    late = Watcher(rig, "counter")
    counter.run()
    rig.run_until(lambda: late.state == endured.state == counter.watcher.state)
    assert set(counter.outcomes) == {Outcome.SWAPPED}
    assert (read(rig, "bound"), holder.losses) == (b"", 0)
    holder.lease.release()
    wait_until_gone(rig, "bound")
    assert read(rig, "counter", rig.other) == str(counter.count).encode()


def test_a_member_that_forgot_its_tokens_gets_new_ones(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd(1, "--auth-token=simple")
    etcd.enable_auth(PASSWORD)
    rig = make_rig(quick(etcd, user="node", password=PASSWORD))
    counter = Counter(rig)
    counter.run()
    etcd.members[0].kill()
    etcd.members[0].start()
    counter.run()
    etcd.control("role", "add", "more", user=f"root:{PASSWORD}")  # makes the tokens of before too old
    counter.run()


def test_permissions_that_are_taken_away_are_missed_and_come_back(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd(1)
    etcd.enable_auth(PASSWORD)
    rig = make_rig(quick(etcd, user="node", password=PASSWORD))
    must_swap(rig, ("a", None, b"1"))
    root = f"root:{PASSWORD}"
    etcd.control("user", "revoke-role", "node", "node", user=root)
    rig.run_until(lambda: not rig.registry.health().is_connected)
    assert "permission denied" in complaint(rig)
    etcd.control("user", "grant-role", "node", "node", user=root)
    rig.run_until(lambda: rig.registry.health().is_connected)
    assert read(rig, "a") == b"1"


def test_a_wrong_password_is_told(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    etcd = make_etcd(1)
    without_users = make_rig(quick(etcd, user="node", password=PASSWORD))
    assert "authentication is not enabled" in complaint(without_users)
    etcd.enable_auth(PASSWORD)
    rig = make_rig(quick(etcd, user="node", password="another"))
    reason = complaint(rig)
    assert "invalid user ID or password" in reason
    assert "another" not in repr(rig.registry.health())
    nobody = make_rig(quick(etcd))
    assert "user name is empty" in complaint(nobody)
    rig.run_until(lambda: without_users.registry.health().is_connected)

"""Exports: names, who sees them, and the settings that are refused. What acts on sessions is in test_session.py."""

import pytest

from nbdserver.volume.admission import TlsMode
from nbdserver.volume.export import Elsewhere, Export, ExportError, Exports
from nbdserver.volume.peer import LOCAL_HOST, Peer
from tests.unit.memory_device import MemoryDevice


def export(name: str, **settings: object) -> Export:
    return Export(name, MemoryDevice(4096, lambda callback: None), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("peer_name", "host"),
    [
        ("192.0.2.1:4711", "192.0.2.1"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("[::ffff:192.0.2.1]:1", "192.0.2.1"),
        ("[fe80::1%eth0]:1", "fe80::1"),
        ("127.0.0.1:1", LOCAL_HOST),
        ("127.9.9.9:1", LOCAL_HOST),
        ("[::1]:1", LOCAL_HOST),
        ("[::ffff:127.0.0.1]:1", LOCAL_HOST),
        ("unix:pid=1,uid=0", LOCAL_HOST),
    ],
)
def test_hosts_are_told_apart_by_address(peer_name: str, host: str) -> None:
    assert Peer(peer_name).host == host


@pytest.mark.parametrize(
    ("name", "known", "host"),
    [
        ("web1", "web1", "192.0.2.1 (web1)"),
        ("Web Server 1", "Web Server 1", "192.0.2.1 (Web Server 1)"),
        ("", "", "192.0.2.1"),
        ("a\x1b[2J", "", "192.0.2.1"),
        ("a,cert:b", "", "192.0.2.1"),
        (" a", "", "192.0.2.1"),
        ("x" * 256, "", "192.0.2.1"),
    ],
)
def test_a_name_in_a_certificate_that_could_not_be_written_is_none(name: str, known: str, host: str) -> None:
    peer = Peer("192.0.2.1:4711").over_tls("TLSv1.3", name)
    assert (peer.certificate, peer.host, peer.tls) == (known, host, "TLSv1.3")
    assert Peer("127.0.0.1:1").over_tls("TLSv1.3", name).host == LOCAL_HOST


def test_the_default_export_is_the_only_one_that_a_peer_may_see() -> None:
    exports = Exports()
    assert exports.default(Peer("192.0.2.1:1")) is None
    exports.add(export("a"))
    exports.add(export("b", allowed=["192.0.2.0/24"]))
    seen = exports.default(Peer("198.51.100.1:1"))
    assert seen is not None
    assert seen.name == "a"
    assert exports.default(Peer("192.0.2.1:1")) is None
    assert [one.name for one in exports.visible(Peer("192.0.2.1:1"))] == ["a", "b"]
    assert [one.name for one in exports.visible(Peer("unix:pid=1,uid=0"))] == ["a", "b"]


def test_a_name_stands_for_one_export() -> None:
    exports = Exports()
    first = export("a")
    exports.add(first)
    with pytest.raises(ExportError, match="already"):
        exports.add(export("a"))
    assert exports.lookup("a") is first
    assert exports.remove("a") is first
    assert (exports.lookup("a"), len(exports), exports.names()) == (None, 0, [])
    with pytest.raises(ExportError, match="no export a"):
        exports.remove("a")


@pytest.mark.parametrize("name", ["", "n" * 4097, "a\0b"])
def test_a_name_that_the_protocol_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(ExportError):
        export(name)


def test_a_refused_change_changes_nothing() -> None:
    one = export("a", description="old")
    with pytest.raises(ExportError):
        one.change(description="new", shared=True, allowed=["192.0.2.300"])
    with pytest.raises(ExportError):
        one.change(description="n" * 5000, read_only=True)
    assert (one.description, one.shared, one.read_only, one.allowed.texts) == ("old", False, False, ())


def test_snapshots_of_a_volume_of_the_cluster_are_listed_and_where_it_is_served_those_that_are_there() -> None:
    exports, peer = Exports(), Peer("192.0.2.1:1")
    for name in ("db", "db@monday", "db@tuesday", "web@monday"):
        exports.note_in_cluster(Elsewhere(None, name, "", (), TlsMode.OFF))
    assert [one.name for one in exports.visible(peer)] == ["db", "db@monday", "db@tuesday", "web@monday"]
    exports.add(export("db"))
    exports.add(export("db@tuesday", created_s=1))
    assert [one.name for one in exports.visible(peer)] == ["db", "db@tuesday", "web@monday"]
    exports.remove("db@tuesday")
    exports.remove("db")
    exports.note_elsewhere(Elsewhere(1, "db", "", (), TlsMode.OFF))
    exports.forget_in_cluster("web@monday")
    assert [one.name for one in exports.visible(peer)] == ["db"]
    found = exports.default(peer)
    assert found is not None
    assert found.name == "db"

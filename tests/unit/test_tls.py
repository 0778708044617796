"""TLS over a connection in memory, against OpenSSL's own client: every record can be cut, changed and held back."""

import gc
import ssl
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata.seams import Connection
from nbdserver.frontend.session import Session
from nbdserver.host import tls as tls_module
from nbdserver.host.tls import HANDSHAKE_LIMIT_BYTES, Tls, TlsError, certificate_name, make_context
from nbdserver.volume.admission import TlsMode
from protocol import nbd
from protocol.nbd import Option, OptionReply
from tests.certificates import Certificates, make_certificates
from tests.unit.openssl_client import OpensslClient
from tests.unit.session_rig import HandClock, ListConnection, Rig, make_rig


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


class Collector:
    """A receiver that keeps what it gets."""

    def __init__(self, room_bytes: int = 512 << 10) -> None:
        self.data = bytearray()
        self.deliveries = 0
        self.drains = 0
        self.lost_reason = ""
        self._room = bytearray(room_bytes)

    def buffer(self) -> memoryview:
        return memoryview(self._room)

    def received(self, size_bytes: int) -> None:
        assert size_bytes
        self.deliveries += 1
        self.data += self._room[:size_bytes]

    def drained(self) -> None:
        self.drains += 1

    def lost(self, reason: str) -> None:
        assert not self.lost_reason
        self.lost_reason = reason


class Link:
    """A client and a server with TLS between them."""

    def __init__(
        self, certificates: Certificates, client: str = "web1", receiver: Collector | None = None, verify: bool = True
    ) -> None:
        self.clock = HandClock()
        self.tls = Tls(self.clock.call_soon)
        files = certificates.settings
        self.secure = self.tls.with_certificates(
            make_context(files["certificate"], files["key"], files["client_ca"], verify)
        )
        self.below = ListConnection("192.0.2.1:1000")
        self.receiver = receiver or Collector()
        self.established: list[tuple[str, str]] = []
        self.server = self.secure(
            self.below, self.receiver, lambda cipher, name: self.established.append((cipher, name))
        )
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = certificates.client_context(client).wrap_bio(
            self._incoming, self._outgoing, server_hostname="localhost"
        )

    def feed(self, data: bytes, piece_bytes: int = 1 << 20) -> None:
        """Let the server receive, as a connection does: not while it is not read."""
        view = memoryview(data)
        while view and not self.below.closed:
            for _ in range(10_000):
                if self.below.reading:
                    break
                assert self.clock.turn(), "nobody reads, and nothing is going on"
            assert self.below.receiver is not None
            room = self.below.receiver.buffer()
            size_bytes = min(len(room), len(view), piece_bytes)
            room[:size_bytes] = view[:size_bytes]
            view = view[size_bytes:]
            self.below.receiver.received(size_bytes)

    def answer(self) -> None:
        """What the server has sent reaches the client."""
        self._incoming.write(bytes(self.below.sent))
        self.below.sent.clear()

    def shake_hands(self, piece_bytes: int = 1 << 20) -> "Link":
        while True:
            try:
                self.client.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            self.feed(self._outgoing.read(), piece_bytes)
            self.answer()
            if done or self.below.closed:
                return self

    def encrypt(self, data: bytes) -> bytes:
        position = 0
        while position < len(data):
            position += self.client.write(data[position:])
        return self._outgoing.read()

    def decrypt(self) -> bytes:
        self.answer()
        data = b""
        while True:
            try:
                piece = self.client.read(1 << 20)
            except ssl.SSLWantReadError:
                return data
            if not piece:
                return data
            data += piece


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_bytes_go_there_and_back_however_they_are_cut(
    certificates: Certificates, piece_bytes: int, version: ssl.TLSVersion
) -> None:
    link = Link(certificates)
    link.client.context.maximum_version = link.client.context.minimum_version = version
    link.client = link.client.context.wrap_bio(link._incoming, link._outgoing, server_hostname="localhost")
    link.shake_hands(piece_bytes)
    ((cipher, name),) = link.established
    assert cipher.startswith({"TLSv1_2": "TLSv1.2 ", "TLSv1_3": "TLSv1.3 "}[version.name])
    assert name == "web1"
    data = bytes(range(256)) * (10 if piece_bytes < 100 else 10_000)
    link.feed(link.encrypt(data), piece_bytes)
    link.clock.run()
    assert bytes(link.receiver.data) == data
    link.server.send([data[:5], memoryview(data)[5:100_000], bytearray(data[100_000:])])
    assert link.decrypt() == data
    assert (link.tls.handshakes, link.tls.failures) == (1, 0)


def test_what_arrives_together_is_delivered_together_and_what_is_sent_together_leaves_together(
    certificates: Certificates,
) -> None:
    link = Link(certificates).shake_hands()
    requests = b"".join(link.encrypt(bytes([number]) * 28) for number in range(64))
    link.feed(requests)
    assert link.receiver.deliveries == 1
    assert len(link.receiver.data) == 64 * 28
    sends = link.below.sends
    link.server.send([b"x" * 4112] * 64)
    assert link.below.sends == sends + 1
    assert len(link.decrypt()) == 64 * 4112


def test_what_does_not_fit_comes_in_the_next_turns_and_nothing_more_is_read_meanwhile(
    certificates: Certificates,
) -> None:
    link = Link(certificates, receiver=Collector(room_bytes=5000)).shake_hands()
    link.feed(link.encrypt(b"y" * 40_000))
    assert len(link.receiver.data) == 5000
    assert not link.below.reading
    link.clock.run()
    assert bytes(link.receiver.data) == b"y" * 40_000
    assert link.below.reading


def test_a_receiver_that_pauses_gets_nothing_until_it_resumes(certificates: Certificates) -> None:
    link = Link(certificates, receiver=Collector(room_bytes=1000)).shake_hands()
    link.feed(link.encrypt(b"z" * 3000))
    link.server.pause_reading()
    link.clock.run()
    assert len(link.receiver.data) == 1000
    assert not link.below.reading
    link.server.resume_reading()
    link.clock.run()
    assert bytes(link.receiver.data) == b"z" * 3000
    assert link.below.reading


def test_much_input_is_worked_off_in_slices_between_which_others_have_their_turn(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "TURN_S", -1.0)
    link = Link(certificates, receiver=Collector(room_bytes=4 << 20)).shake_hands()
    data = link.encrypt(b"d" * 200_000)
    link.feed(data)
    turns = 0
    while link.clock.turn():
        turns += 1
    assert turns >= len(data) // tls_module.MOST_SLICE_BYTES
    assert bytes(link.receiver.data) == b"d" * 200_000
    assert link.below.reading


def test_slices_grow_for_who_sends_full_records_though_a_small_one_brings_nothing(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "TURN_S", -1.0)  # a slice a turn
    link = Link(certificates, receiver=Collector(room_bytes=4 << 20)).shake_hands()
    link.feed(link.encrypt(b"d" * 1_000_000))
    turns = 0
    while link.clock.turn():
        turns += 1
    growing = tls_module.RECORD_BYTES // tls_module.LEAST_SLICE_BYTES * 2  # until one brings a record
    assert turns <= growing + 1_100_000 // tls_module.MOST_SLICE_BYTES


@pytest.mark.parametrize("ask_us_too", [False, True])
def test_records_without_data_are_worked_off_a_little_at_a_time_and_then_end_the_connection(
    certificates: Certificates, ask_us_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "TURN_S", -1.0)
    link = Link(certificates, verify=False)
    try:
        client = OpensslClient()
    except OSError as error:
        pytest.skip(f"{error}: apt-get install libssl3")
    while not client.shake_hands():
        link.feed(client.sent())
        client.receive(bytes(link.below.sent))
        link.below.sent.clear()
    link.feed(client.sent())
    client.change_keys(100, ask_us_too)
    client.write(b"some are fine")
    link.feed(client.sent())
    link.clock.run()
    assert bytes(link.receiver.data) == b"some are fine"
    client.change_keys(4000, ask_us_too)
    flood = client.sent()
    link.feed(flood[: tls_module.INPUT_BYTES])
    turns = 0
    while not link.receiver.lost_reason:
        assert link.clock.turn()
        turns += 1
    assert link.receiver.lost_reason == "TLS: records without data"
    assert turns > 16, "much at once"
    assert link.below.closed
    client.close()


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        ("", "peer did not return a certificate"),
        ("stranger", "certificate verify failed"),
        ("expired", "certificate has expired"),
    ],
)
def test_a_client_that_cannot_show_who_it_is_is_refused(certificates: Certificates, client: str, reason: str) -> None:
    link = Link(certificates, client)
    link.shake_hands()
    assert reason in link.receiver.lost_reason
    assert link.below.closed
    assert not link.established
    assert (link.tls.handshakes, link.tls.failures) == (0, 1)
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        link.client.read(1)


@pytest.mark.parametrize(("client", "name"), [("", ""), ("web2", "web2")])
def test_where_certificates_are_not_demanded_a_name_is_known_if_there_is_one(
    certificates: Certificates, client: str, name: str
) -> None:
    link = Link(certificates, client, verify=False).shake_hands()
    assert link.established[0][1] == name


@pytest.mark.parametrize("client", ["stranger", "expired"])
def test_a_certificate_that_is_wrong_is_refused_where_none_is_demanded_too(
    certificates: Certificates, client: str
) -> None:
    link = Link(certificates, client, verify=False)
    link.shake_hands()
    assert not link.established
    assert "certificate" in link.receiver.lost_reason


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\x02\x00" + b"\xff" * 512])
def test_what_is_no_tls_ends_the_connection(certificates: Certificates, noise: bytes) -> None:
    link = Link(certificates)
    link.feed(noise)
    assert link.receiver.lost_reason.startswith("TLS: ")
    assert link.below.closed
    assert link.tls.failures == 1


def test_a_handshake_is_bounded(certificates: Certificates) -> None:
    link = Link(certificates)
    link.feed((b"\x16\x03\x01\x40\x00\x01\x7f\xff\xff" + bytes(16380)) * 64)
    assert link.receiver.lost_reason.startswith("TLS: ")
    link = Link(certificates)
    for _ in range(HANDSHAKE_LIMIT_BYTES // 1024 + 2):
        if not link.below.closed:
            link.feed(b"\x16\x03\x01\x40\x00" + bytes(1019))
    assert link.below.closed


def test_it_says_that_it_ends_and_sends_nothing_after(certificates: Certificates) -> None:
    link = Link(certificates).shake_hands()
    link.server.send([b"last"])
    link.server.close()
    assert link.below.closed
    assert not link.below.aborted
    assert link.decrypt() == b"last"
    assert link.client.read(10) == b"", "no close_notify"
    link.server.send([b"more"])
    assert not link.below.sent
    assert not link.receiver.lost_reason, "who closes is not told"


def test_the_end_of_the_client_is_told_after_what_it_sent(certificates: Certificates) -> None:
    link = Link(certificates).shake_hands()
    data = link.encrypt(b"bye")
    with pytest.raises(ssl.SSLWantReadError):
        link.client.unwrap()
    link.feed(data + link._outgoing.read())
    assert bytes(link.receiver.data) == b"bye"
    assert link.receiver.lost_reason == "the client closed the connection"
    assert link.below.closed


@pytest.mark.parametrize("ending", ["close", "abort", "lost", "refused"])
def test_it_leaves_no_cycle_for_a_collector_that_never_runs(certificates: Certificates, ending: str) -> None:
    gc.disable()
    try:
        link = Link(certificates, "stranger" if ending == "refused" else "web1").shake_hands()
        if ending == "lost":
            assert link.below.receiver is not None
            link.below.receiver.lost("reset")
        elif ending != "refused":
            getattr(link.server, ending)()
        link.below.receiver = None  # as a socket's connection does
        gone = weakref.ref(link.server)
        del link
        assert gone() is None
    finally:
        gc.enable()


def test_it_cannot_be_handed_over(certificates: Certificates) -> None:
    assert Link(certificates).shake_hands().server.detach() is None


def test_the_connection_below_is_told_of_in_both_directions(certificates: Certificates) -> None:
    link = Link(certificates).shake_hands()
    link.below.round_end = []
    link.server.at_round_end(print)
    assert link.below.round_end == [print]
    link.below.taking = False
    link.server.send([b"x" * 1000])
    assert link.server.unsent_bytes > 1000
    link.below.take()
    assert link.below.receiver is not None
    link.below.receiver.drained()
    assert link.receiver.drains == 1
    link.below.receiver.lost("reset")
    assert link.receiver.lost_reason == "reset"


@pytest.mark.fuzz
@settings(max_examples=50)
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=4),
    piece_bytes=st.integers(1, 3000),
    in_handshake=st.booleans(),
)
def test_changed_records_never_raise_and_never_become_data(
    certificates: Certificates, changes: list[tuple[int, int]], piece_bytes: int, in_handshake: bool
) -> None:
    link = Link(certificates)
    if in_handshake:
        with pytest.raises(ssl.SSLWantReadError):
            link.client.do_handshake()
        good = link._outgoing.read()
    else:
        link.shake_hands()
        good = link.encrypt(b"a" * 3000) + link.encrypt(b"b" * 100)
    data = bytearray(good)
    for position, value in changes:
        data[position % len(data)] ^= value
    link.feed(bytes(data), piece_bytes)
    link.clock.run()
    assert (b"a" * 3000 + b"b" * 100).startswith(bytes(link.receiver.data))
    if not in_handshake and bytes(data) != good:
        assert len(link.receiver.data) < 3100


# --- certificates -----------------------------------------------------------------------------------------------------


def test_certificates_that_cannot_be_used_say_what_is_wrong(certificates: Certificates, tmp_path: Path) -> None:
    good = certificates.settings
    text = tmp_path / "text"
    text.write_text("no certificate")
    secret = tmp_path / "secret"
    secret.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    other_key = certificates.client("web1") / "client-key.pem"
    for changed, message in [
        ({"certificate": tmp_path / "none"}, r"tls.certificate: .*none cannot be read: No such file"),
        ({"client_ca": tmp_path / "none"}, r"tls.client_ca: .*none cannot be read"),
        ({"key": other_key}, r"tls.key: .*client-key.pem is not the key of .*server-cert.pem"),
        ({"certificate": text}, r"are not a certificate and its key in PEM"),
        ({"key": secret}, r"are not a certificate and its key in PEM without a password"),
        ({"client_ca": text}, r"tls.client_ca: .*text has no certificate in PEM"),
    ]:
        files = {**good, **changed}
        with pytest.raises(TlsError, match=message) as caught:
            make_context(files["certificate"], files["key"], files["client_ca"], True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        ({}, ""),
        ({"subject": ((("organizationName", "o"),), (("commonName", "web1"),))}, "web1"),
        ({"subject": (), "subjectAltName": (("IP Address", "10.0.0.1"), ("DNS", "web2"), ("DNS", "x"))}, "web2"),
    ],
)
def test_a_certificate_has_one_name(certificate: dict[str, object], name: str) -> None:
    assert certificate_name(certificate) == name


# --- a session with TLS -----------------------------------------------------------------------------------------------


class Visit:
    """An NBD client that speaks to a session, in clear text or over TLS."""

    def __init__(self, rig: Rig, certificates: Certificates, peer_name: str = "192.0.2.1:1000") -> None:
        self.gone: list[str] = []
        self.link = Link(certificates)
        self.link.below = ListConnection(peer_name)
        self.session = Session(
            1, self.link.below, rig.clock, rig.exports, lambda _, reason: self.gone.append(reason),
            secure=self._secure,
        )  # fmt: skip
        self.link.below.receiver = self.session
        self.secured = False
        self._clear(bytes([0, 0, 0, 3]))
        assert len(self.link.below.sent) == 18
        self.link.below.sent.clear()

    def _secure(self, below: Connection, receiver: object, established: Callable[[str, str], None]) -> Connection:
        self.secured = True
        return self.link.secure(below, receiver, established)  # type: ignore[arg-type]

    def _clear(self, data: bytes) -> None:
        self.link.feed(data)

    def ask(self, kind: int, data: bytes = b"") -> list[int]:
        """Types of the replies to an option."""
        header: bytes = nbd.OptionHeader.build({"option": kind, "length": len(data)})
        self.link.feed(self.link.encrypt(header + data) if self.secured else header + data)
        if self.secured and kind != Option.STARTTLS:
            sent = self.link.decrypt()
        else:
            sent = bytes(self.link.below.sent)
            self.link.below.sent.clear()
        found = []
        while sent:
            reply = nbd.OptionReplyHeader.parse(sent)
            found.append(int(reply.type))
            sent = sent[nbd.OptionReplyHeader.sizeof() + reply.length :]
        return found

    def start_tls(self) -> "Visit":
        assert self.ask(Option.STARTTLS) == [OptionReply.ACK]
        self.link.shake_hands()
        return self

    def go(self, name: str = "disk") -> list[int]:
        return self.ask(Option.GO, nbd.InfoRequest.build({"name": name.encode(), "wanted": []}))


INFO, ACK, REQUIRED = int(OptionReply.INFO), int(OptionReply.ACK), int(OptionReply.ERR_TLS_REQD)
UNKNOWN, POLICY, SERVER = int(OptionReply.ERR_UNKNOWN), int(OptionReply.ERR_POLICY), int(OptionReply.SERVER)


@pytest.mark.parametrize(
    ("node", "volume", "in_clear", "over_tls"),
    [
        ("off", "inherit", [INFO, INFO, ACK], None),
        ("allowed", "inherit", [INFO, INFO, ACK], [INFO, INFO, ACK]),
        ("required", "inherit", [REQUIRED], [INFO, INFO, ACK]),
        ("off", "required", [REQUIRED], [INFO, INFO, ACK]),
        ("off", "allowed", [INFO, INFO, ACK], [INFO, INFO, ACK]),
        ("required", "allowed", [INFO, INFO, ACK], [INFO, INFO, ACK]),
        ("required", "off", [INFO, INFO, ACK], [POLICY]),
    ],
)
def test_the_volume_decides_and_the_node_for_those_that_do_not(
    certificates: Certificates, node: str, volume: str, in_clear: list[int], over_tls: list[int] | None
) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode(node))
    rig.export.change(tls=TlsMode(volume))
    assert Visit(rig, certificates).go() == in_clear
    rig.export.change(shared=True)
    if over_tls is None:
        assert Visit(rig, certificates).ask(Option.STARTTLS) == [POLICY]
    else:
        assert Visit(rig, certificates).start_tls().go() == over_tls


def test_what_requires_tls_is_not_listed_in_clear_text(certificates: Certificates) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.ALLOWED)
    assert Visit(rig, certificates).ask(Option.LIST) == [SERVER, ACK]
    rig.export.change(tls=TlsMode.REQUIRED)
    assert Visit(rig, certificates).ask(Option.LIST) == [ACK]
    assert Visit(rig, certificates).go("") == [UNKNOWN]
    assert Visit(rig, certificates).start_tls().ask(Option.LIST) == [SERVER, ACK]
    rig.exports.inherit_tls(TlsMode.REQUIRED)
    assert Visit(rig, certificates).ask(Option.LIST) == [REQUIRED]
    assert Visit(rig, certificates, "unix:pid=1,uid=0").ask(Option.LIST) == [SERVER, ACK]


def test_what_was_negotiated_in_clear_text_is_forgotten(certificates: Certificates) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.ALLOWED)
    visit = Visit(rig, certificates)
    assert visit.ask(Option.STRUCTURED_REPLY) == [ACK]
    visit.start_tls()
    context = nbd.MetaContextRequest.build({"name": b"disk", "queries": [b"base:allocation"]})
    assert visit.ask(Option.SET_META_CONTEXT, context) == [int(OptionReply.ERR_INVALID)]


@pytest.mark.parametrize("injected", [b"I", b"IHAVEOPT\0\0\0\7\0\0\0\0"])
def test_clear_text_behind_starttls_ends_the_connection(certificates: Certificates, injected: bytes) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.ALLOWED)
    visit = Visit(rig, certificates)
    visit.link.feed(nbd.OptionHeader.build({"option": Option.STARTTLS, "length": 0}) + injected)
    assert visit.gone == ["bytes in clear text behind STARTTLS"]
    assert not visit.link.below.sent


def test_clear_text_in_the_place_of_a_tls_handshake_is_never_an_option(certificates: Certificates) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.ALLOWED)
    visit = Visit(rig, certificates)
    visit.ask(Option.STARTTLS)
    visit.link.feed(nbd.OptionHeader.build({"option": Option.LIST, "length": 0}))
    assert len(visit.gone) == 1
    assert visit.gone[0].startswith("TLS: ")
    assert visit.session.export is None


def test_a_handshake_that_does_not_go_on_has_its_time(certificates: Certificates) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.REQUIRED)
    visit = Visit(rig, certificates)
    visit.ask(Option.STARTTLS)
    rig.clock.advance(11)
    assert visit.gone == ["no export was entered in 10 s"]
    assert visit.link.below.aborted
    assert visit.link.tls.failures == 1


def test_names_in_certificates_and_networks_are_needed_both(certificates: Certificates) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.ALLOWED)
    for allowed, answer in [
        (["cert:web1"], [INFO, INFO, ACK]),
        (["cert:web2", "cert:web1"], [INFO, INFO, ACK]),
        (["cert:web1", "192.0.2.0/24"], [INFO, INFO, ACK]),
        (["cert:web2"], [UNKNOWN]),
        (["cert:web1", "198.51.100.0/24"], [UNKNOWN]),
    ]:
        rig.export.change(allowed=allowed)
        assert Visit(rig, certificates).start_tls().go() == answer
    rig.export.change(allowed=["cert:web1"])
    assert Visit(rig, certificates).go() == [REQUIRED]
    assert Visit(rig, certificates, "unix:pid=1,uid=0").go() == [INFO, INFO, ACK]


def test_a_change_acts_on_clients_that_are_attached(certificates: Certificates) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.ALLOWED)
    rig.export.change(shared=True)
    plain, secure = Visit(rig, certificates), Visit(rig, certificates).start_tls()
    plain.go()
    secure.go()
    rig.exports.inherit_tls(TlsMode.REQUIRED)
    assert (len(plain.gone), len(secure.gone)) == (1, 0)
    rig.export.change(allowed=["cert:web2"])
    assert len(secure.gone) == 1
    assert secure.link.below.aborted


def test_a_host_is_an_address_with_its_certificate(certificates: Certificates) -> None:
    """Behind one address: the same certificate is the same host, clear text is another."""
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.ALLOWED)
    first = Visit(rig, certificates).start_tls()
    assert first.go() == [INFO, INFO, ACK]
    assert Visit(rig, certificates, "192.0.2.1:2").start_tls().go() == [INFO, INFO, ACK]
    assert Visit(rig, certificates, "192.0.2.1:3").go() == [POLICY]
    assert Visit(rig, certificates, "192.0.2.2:1").start_tls().go() == [POLICY]
    info = first.session.info()
    assert (info.peer.certificate, info.peer.tls.split()[0], info.peer.host) == ("web1", "TLSv1.3", "192.0.2.1 (web1)")


def test_requests_are_served_over_tls(certificates: Certificates) -> None:
    rig = make_rig()
    rig.exports.inherit_tls(TlsMode.REQUIRED)
    visit = Visit(rig, certificates).start_tls()
    visit.go()

    def request(command: int, offset: int, length: int, data: bytes = b"") -> None:
        fields = {"flags": 0, "command": command, "cookie": 5, "offset": offset, "length": length}
        visit.link.feed(visit.link.encrypt(nbd.Request.build(fields) + data))
        rig.clock.run()
        visit.link.clock.run()

    payload = bytes(range(256)) * 1024
    request(nbd.Command.WRITE, 4096, len(payload), payload)
    assert visit.link.decrypt() == nbd.SimpleReply.build({"error": 0, "cookie": 5})
    request(nbd.Command.READ, 4096, len(payload))
    assert visit.link.decrypt() == nbd.SimpleReply.build({"error": 0, "cookie": 5}) + payload
    request(nbd.Command.DISC, 0, 0)
    assert visit.gone == ["the client disconnected"]
    visit.link.answer()
    assert visit.link.client.read(1) == b"", "no close_notify"

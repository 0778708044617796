"""What a node answers the others of its cluster, and whom."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from metadata.directory.registry_keys import Member
from metadata.directory.reports import Answer
from nbdserver.cli.main import run
from nbdserver.node import membership
from nbdserver.node.cluster_files import Keys
from nbdserver.node.config import load_settings
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError
from nbdserver.node.invitations import Token
from nbdserver.node.membership import Membership
from protocol.directory import NodeKind


class Rig:
    """A node n1 with a member n2, which is silent if the test says so."""

    def __init__(self, directory: Path, token: str) -> None:
        settings = load_settings(directory / "node.yaml").cluster
        assert settings is not None
        self.secret = Token.decode(token).secret
        self.silent: set[str] = set()
        self.used: list[Keys] = []
        self.events: list[str] = []
        self.struck: list[str] = []
        self.answers = [Answer.CONFIRMED]
        members = {n: Member(n, NodeKind.FIRST, f"n{n}", "", f"127.0.0.{n}:9") for n in (1, 2)}
        self.directory = SimpleNamespace(
            members=members, master=object(), remove=self._remove, election=SimpleNamespace(state=None)
        )
        self.membership = Membership(
            settings,
            lambda: self.directory,  # type: ignore[arg-type, return-value]
            lambda: Keys(b"k" * 32),
            self.used.append,
            lambda: self.silent,
            lambda kind, fields: self.events.append(kind),
            {"owns": self.owns},
        )

    async def owns(self, question: dict[str, Any]) -> dict[str, Any]:
        return {"asked": question["family"]}

    def _remove(self, name: str, done: Callable[[Answer], None]) -> None:
        self.struck.append(name)
        done(self.answers.pop(0))

    def ask(self, certificate: str, **question: Any) -> dict[str, Any]:
        return asyncio.run(self.membership.answer(certificate, "10.0.0.9:1", question))

    def join(self, **changes: Any) -> dict[str, Any]:
        return self.ask("", **{"do": "join", "secret": self.secret, "node": "n3", "request": request(), **changes})


def request() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def rig(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Rig:
    words = ["--config", str(tmp_path / "node.yaml"), "--node", "n1", "--address", "127.0.0.1:9", "--etcd", "e1:2379"]
    assert run(["cluster", "init", "prod", *words, "--json"]) == 0
    return Rig(tmp_path, json.loads(capsys.readouterr().out)["token"])


def test_who_knows_a_valid_secret_is_let_in_under_the_name_that_was_asked_for(rig: Rig) -> None:
    ca = x509.load_pem_x509_certificate(rig.ask("", do="ca")["ca"].encode())
    given = rig.join()
    certificate = x509.load_pem_x509_certificate(given["certificate"].encode())
    certificate.verify_directly_issued_by(ca)
    assert certificate.subject.rfc4514_string() == "CN=n3"
    assert given["registry"]["endpoints"] == ["e1:2379"]
    assert Keys.decode(given["keys"], "")
    assert rig.events == ["cluster-joining"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"secret": "guessed"}, WrongInputError, "the token is not valid"),
        ({"secret": None}, WrongInputError, "the token is not valid"),
        ({"node": "n2"}, ConflictError, "there is a node n2 already"),
        ({"node": "../n3"}, WrongInputError, "has a name and a signing request"),
        ({"node": 3}, WrongInputError, "has a name and a signing request"),
        ({"request": "none"}, WrongInputError, "the signing request is none"),
        ({"request": None}, WrongInputError, "has a name and a signing request"),
    ],
)
def test_who_does_not_fit_is_not_let_in(
    changes: dict[str, Any], error: type[NodeError], message: str, rig: Rig
) -> None:
    with pytest.raises(error, match=message):
        rig.join(**changes)
    assert "cluster-joining" not in rig.events


def test_a_node_that_has_joined_before_gets_its_certificate_again(rig: Rig) -> None:
    assert rig.join(node="n2", again=True)["certificate"]


@pytest.mark.parametrize("certificate", ["", "n9"])
@pytest.mark.parametrize(
    "question", [{"do": "keys", "keys": "5a" * 32}, {"do": "remove", "node": "n2"}, {"do": "owns"}, {"do": "what"}]
)
def test_nothing_else_is_answered_to_who_is_no_member(certificate: str, question: dict[str, Any], rig: Rig) -> None:
    rig.silent = {"n2"}
    with pytest.raises(WrongInputError, match="is no node of this cluster"):
        rig.ask(certificate, **question)
    assert (rig.used, rig.struck) == ([], [])


def test_a_member_brings_keys_and_wrong_ones_are_refused(rig: Rig) -> None:
    rig.ask("n2", do="keys", keys=Keys(b"a" * 32, b"b" * 32).encode())
    assert rig.used == [Keys(b"a" * 32, b"b" * 32)]
    for wrong in ("", "5a", None, ["5a" * 32]):
        with pytest.raises(WrongInputError, match="n2's keys"):
            rig.ask("n2", do="keys", keys=wrong)
    assert rig.ask("n2", do="owns", family="f1") == {"asked": "f1"}
    with pytest.raises(WrongInputError, match="does not know the question 'what'"):
        rig.ask("n2", do="what")
    assert len(rig.used) == 1


def test_only_who_is_silent_is_struck_and_a_master_that_cannot_now_is_asked_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "REMOVE_RETRY_S", 0.001)
    with pytest.raises(ConflictError, match="n2 is up: stop nbdserver on it first"):
        asyncio.run(rig.membership.remove("n2"))
    with pytest.raises(NotFoundError, match="there is no node n9"):
        asyncio.run(rig.membership.remove("n9"))
    with pytest.raises(ConflictError, match="n2 is not silent for the master"):
        rig.ask("n2", do="remove", node="n2")
    rig.silent = {"n2"}
    rig.answers = [Answer.NOT_DONE, Answer.CONFIRMED]
    asyncio.run(rig.membership.remove("n2"))
    assert rig.struck == ["n2", "n2"]
    assert rig.events == ["node-removed"]
    rig.answers = [Answer.NOT_DONE] * membership.REMOVE_TRIES
    with pytest.raises(NodeError, match="n2 cannot be struck now"):
        asyncio.run(rig.membership.remove("n2"))


def test_no_key_is_changed_while_somebody_cannot_be_told(rig: Rig) -> None:
    rig.silent = {"n2"}
    with pytest.raises(ConflictError, match="n2 cannot be told of the key"):
        asyncio.run(rig.membership.rotate_key())
    rig.silent = set()
    with pytest.raises(NodeError, match=r"127\.0\.0\.2:9 cannot be asked"):
        asyncio.run(rig.membership.rotate_key())
    assert rig.used == []

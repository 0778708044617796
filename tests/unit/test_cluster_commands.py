"""`nbdserver cluster init`, `token` and `join` as far as they need no other node: files, their readers, refusals."""

import io
import json
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nbdserver.cli.main import run
from nbdserver.node import cluster_making
from nbdserver.node.cluster_files import check, read_etcd_settings, read_keys
from nbdserver.node.config import load_settings
from nbdserver.node.invitations import Token

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "node.yaml"
    path.write_text("# what was there stays\nlisten: 127.0.0.1:10999\n")
    return path


def init(config: Path, *more: str) -> int:
    address = ("--address", "10.0.0.5:10810", "--etcd", "10.0.0.5:2379")
    return run(["cluster", "init", "prod", "--config", str(config), "--node", "n1", *address, *more])


def test_init_makes_what_the_settings_name_adds_them_to_the_file_and_prints_a_token(
    config: Path, capsys: Capture
) -> None:
    assert init(config, "--site", "attic", "--etcd", "[fd00::5]:2379") == 0
    printed = capsys.readouterr().out
    assert config.read_text().startswith("# what was there stays\nlisten: 127.0.0.1:10999\n")
    settings = load_settings(config)
    assert settings.listen == ["127.0.0.1:10999"]
    cluster = settings.cluster
    assert cluster is not None
    check(cluster)
    assert (cluster.name, cluster.node, cluster.site, cluster.own_fault_domain) == ("prod", "n1", "attic", "n1")
    assert cluster.registry.endpoints == ["10.0.0.5:2379", "[fd00::5]:2379"]
    assert f"nbdserver serve --config {config}" in printed
    token = Token.decode(printed.partition("cluster join ")[2].split()[0])
    assert (token.cluster, token.address) == ("prod", "10.0.0.5:10810")
    assert token.secret not in (config.parent / "cluster" / "tokens.json").read_text()


def test_only_its_owner_can_read_what_is_secret(config: Path) -> None:
    init(config)
    files = {path.name: path for path in (config.parent / "cluster").iterdir()}
    names = {"ca-cert.pem", "ca-key.pem", "cluster.key", "node-cert.pem", "node-key.pem", "tokens.json"}
    assert set(files) == names
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in files.items()}
    assert modes == {name: 0o644 if "cert" in name else 0o600 for name in names}


def test_a_nodes_certificate_is_for_both_ends_of_a_stream_and_names_the_node(config: Path) -> None:
    init(config)
    ca, node = (
        x509.load_pem_x509_certificate((config.parent / "cluster" / name).read_bytes())
        for name in ("ca-cert.pem", "node-cert.pem")
    )
    node.verify_directly_issued_by(ca)
    assert node.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "n1"
    purposes = set(node.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def test_a_node_of_a_cluster_makes_no_other_one_and_changes_nothing(config: Path, capsys: Capture) -> None:
    init(config)
    before = {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()}
    assert init(config) == 2
    assert "belongs to cluster prod already, as n1; name another file with --config" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()} == before


WRONG = [
    (["init", "prod", "--etcd", "e1:2379"], "--address is missing"),
    (["init", "prod", "--address", "10.0.0.5:10810"], "--etcd is missing"),
    (["init", "a b", "--address", "10.0.0.5:10810", "--etcd", "e1:2379"], "cluster.name: 'a b' is not a name"),
    (["init", "prod", "--address", "storage1:10810", "--etcd", "e1:2379"], "'storage1:10810' has a host name"),
    (["init", "prod", "--address", "10.0.0.5:10810", "--etcd", "e1"], "'e1' is not HOST:PORT"),
    (
        ["init", "prod", "--address", "10.0.0.5:10810", "--etcd", "e1:2379", "--etcd-user", "u"],
        "user and password_file are needed both",
    ),
    (
        ["init", "prod", "--address", "10.0.0.5:10810", "--etcd", "e1:2379", "--etcd-ca", "/missing"],
        "cluster.registry.tls.ca: /missing cannot be read",
    ),
    (["token"], "names no cluster; make one with: nbdserver cluster init"),
    (["join", "nbdj1.x", "--address", "10.0.0.5:10810"], "this is no whole token"),
    (["join", Token("prod", "127.0.0.1:9", "ab", "x").encode()], "--address is missing"),
    (["join", Token("prod", "127.0.0.1:9", "ab", "x").encode(), "--again"], "join without --again"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments)[:60] for arguments, _ in WRONG])
def test_what_cannot_be_meant_is_refused_before_anything_is_made(
    arguments: list[str], message: str, config: Path, capsys: Capture
) -> None:
    assert run(["cluster", *arguments, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(config.parent.iterdir()) == [config]


def test_a_token_can_come_by_standard_input(config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    token = Token("prod", "127.0.0.1:9", "ab" * 32, "x").encode()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{token}\n"))
    assert run(["cluster", "join", "-", "--config", str(config), "--address", "10.0.0.6:10810"]) == 1
    assert "127.0.0.1:9 cannot be asked" in capsys.readouterr().err


def test_a_node_that_cannot_be_asked_is_told_and_nothing_is_made(config: Path, capsys: Capture) -> None:
    token = Token("prod", "127.0.0.1:9", "ab" * 32, "x").encode()
    assert run(["cluster", "join", token, "--config", str(config), "--address", "10.0.0.6:10810"]) == 1
    assert "127.0.0.1:9 cannot be asked" in capsys.readouterr().err
    assert list(config.parent.iterdir()) == [config]


def test_a_node_that_joins_gets_what_it_needs_for_etcd_in_files_of_its_own(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ca", "certificate", "key", "password"):
        (tmp_path / name).write_text(f"etcd's {name}\n")
    etcd = ("--etcd-ca", "ca", "--etcd-certificate", "certificate", "--etcd-key", "key", "--etcd-user", "node")
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "first" / "node.yaml", tmp_path / "second" / "node.yaml"
    assert init(first, *etcd, "--etcd-password-file", "password") == 0
    token = capsys.readouterr().out.partition("cluster join ")[2].split()[0]
    settings = load_settings(first).cluster
    assert settings is not None

    async def call(address: str, context: ssl.SSLContext, question: dict[str, Any]) -> dict[str, Any]:
        """The first node's answers, through JSON as on their way."""
        if question["do"] == "ca":
            return {"ca": settings.tls.ca.read_text()}
        return dict(json.loads(json.dumps(cluster_making.let_in(settings, question["node"], question["request"]))))

    monkeypatch.setattr(cluster_making, "call", call)
    words = ["--config", str(second), "--node", "n2", "--address", "10.0.0.6:10810", "--site", "attic"]
    assert run(["cluster", "join", token, *words]) == 0
    joined = load_settings(second).cluster
    assert joined is not None
    check(joined)
    assert (joined.name, joined.node, joined.site) == ("prod", "n2", "attic")
    assert read_keys(joined.key_file) == read_keys(settings.key_file)
    theirs, ours = read_etcd_settings(settings), read_etcd_settings(joined)
    assert (ours.endpoints, ours.user, ours.password) == (theirs.endpoints, "node", "etcd's password")
    assert ours.tls is not None
    for name, path in (
        ("ca", ours.tls.ca_file),
        ("certificate", ours.tls.certificate_file),
        ("key", ours.tls.key_file),
    ):
        assert path is not None
        assert Path(path).parent == second.parent / "cluster"
        assert Path(path).read_text() == f"etcd's {name}\n"
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_a_cluster_with_another_ca_than_the_token_says_is_told_no_secret(
    config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def call(address: str, context: ssl.SSLContext, question: dict[str, Any]) -> dict[str, Any]:
        asked.append(question)
        return {"ca": "of somebody else"}

    monkeypatch.setattr(cluster_making, "call", call)
    token = Token("prod", "127.0.0.1:9", "ab" * 32, "secret").encode()
    assert run(["cluster", "join", token, "--config", str(config), "--address", "10.0.0.6:10810"]) == 1
    assert "has another CA than the token says" in capsys.readouterr().err
    assert asked == [{"do": "ca"}]
    assert list(config.parent.iterdir()) == [config]


def test_a_token_is_made_again_for_so_long_as_is_said(config: Path, capsys: Capture) -> None:
    init(config)
    capsys.readouterr()
    assert run(["cluster", "token", "--config", str(config), "--minutes", "10", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["minutes"] == 10
    assert Token.decode(made["token"]).cluster == "prod"
    (config.parent / "cluster" / "ca-key.pem").unlink()
    assert run(["cluster", "token", "--config", str(config)]) == 2
    assert "tokens are made where `nbdserver cluster init` was run" in capsys.readouterr().err

"""`nbdserver cert`: the files, who may read them, how long they are valid, and what is refused."""

import asyncio
import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from metadata.registry import ExportSettings, Family, Volume
from nbdserver.cli.main import run
from nbdserver.node.certificates import Certificate, NodeTls, problems, read_certificate
from nbdserver.node.config import TlsSettings
from nbdserver.node.errors import WrongInputError
from tests.certificates import Certificates, make_certificates

DAY = timedelta(days=1)


@pytest.fixture
def directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Of a CA."""
    directory = tmp_path / "pki"
    assert run(["cert", "ca", "--dir", str(directory)]) == 0
    capsys.readouterr()
    return directory


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_files_have_the_names_that_clients_look_for_and_keys_are_secret(directory: Path) -> None:
    old_mask = os.umask(0)
    try:
        assert run(["cert", "node", "storage1.example.com", "10.0.0.5", "fd00::5", "--dir", str(directory)]) == 0
        assert run(["cert", "client", "web1", "--dir", str(directory)]) == 0
    finally:
        os.umask(old_mask)
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    client = ("ca-cert.pem", "client-cert.pem", "client-key.pem")
    assert set(files) == {
        "ca-cert.pem", "ca-key.pem", "server-cert.pem", "server-key.pem", *(f"clients/web1/{name}" for name in client),
    }  # fmt: skip
    for name, path in files.items():
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if "key" in name else 0o644)
    assert files["ca-cert.pem"].read_bytes() == files["clients/web1/ca-cert.pem"].read_bytes()


def test_certificates_say_who_may_use_them_for_what_and_how_long(directory: Path) -> None:
    run(["cert", "node", "storage1.example.com", "10.0.0.5", "--dir", str(directory), "--days", "90"])
    run(["cert", "client", "web1", "--dir", str(directory)])
    node, client = load(directory / "server-cert.pem"), load(directory / "clients/web1/client-cert.pem")
    ca = load(directory / "ca-cert.pem")
    assert read_certificate(directory / "server-cert.pem").names == ("storage1.example.com", "10.0.0.5")
    assert client.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "web1"
    for certificate, purpose, days in (
        (node, ExtendedKeyUsageOID.SERVER_AUTH, 90),
        (client, ExtendedKeyUsageOID.CLIENT_AUTH, 730),
    ):
        certificate.verify_directly_issued_by(ca)
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=days - 1) < left <= timedelta(days=days)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_no_certificate_outlives_its_ca(tmp_path: Path) -> None:
    run(["cert", "ca", "--dir", str(tmp_path), "--days", "5"])
    run(["cert", "client", "web1", "--dir", str(tmp_path)])
    assert (
        load(tmp_path / "clients/web1/client-cert.pem").not_valid_after_utc
        == load(tmp_path / "ca-cert.pem").not_valid_after_utc
    )


def test_nothing_is_overwritten_unless_that_is_asked_for(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["ca"], ["node", "localhost"], ["client", "web1"]):
        complete = ["cert", *command, "--dir", str(directory)]
        if command != ["ca"]:
            assert run(complete) == 0
        before = {path: path.read_bytes() for path in directory.rglob("*.pem")}
        capsys.readouterr()
        assert run(complete) != 0
        refused = capsys.readouterr().err
        assert "is there already; add --force to replace it" in refused
        assert refused.count("\n") == 1
        assert {path: path.read_bytes() for path in directory.rglob("*.pem")} == before
        if command != ["ca"]:
            assert run([*complete, "--force"]) == 0
            assert {path: path.read_bytes() for path in directory.rglob("*.pem")} != before


def test_it_prints_what_to_do_next(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["cert", "node", "localhost", "--dir", str(directory)])
    assert f"    client_ca: {directory}/ca-cert.pem\n" in capsys.readouterr().out
    run(["cert", "client", "web1", "--dir", str(directory)])
    printed = capsys.readouterr().out
    folder = directory / "clients/web1"
    for line in (
        f"-certfile {folder}/client-cert.pem -keyfile {folder}/client-key.pem -cacertfile {folder}/ca-cert.pem",
        f'nbdinfo "nbds://NODE:10809/VOLUME?tls-certificates={folder}"',
        f"tls-creds-x509,id=tls0,endpoint=client,dir={folder}",
        "nbdserver volume set VOLUME tls=required allowed-clients=cert:web1",
    ):
        assert line in printed
    run(["cert", "client", "web2", "--dir", str(directory), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [
        f"{directory}/clients/web2/{name}.pem" for name in ("ca-cert", "client-cert", "client-key")
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["node", "300.1.1.1"], "neither a host name nor an address; write for example storage1.example.com"),
        (["node", "a b"], "neither a host name nor an address"),
        (["node", "ok", "-"], "neither a host name nor an address"),
        (["client", "../x"], "cannot be a client's name; use 1 to 64 of"),
        (["client", "a,b"], "cannot be a client's name"),
        (["client", "x" * 65], "cannot be a client's name"),
        (["client", "web1", "--days", "0"], "Invalid value for '--days'"),
    ],
)
def test_a_wrong_name_changes_nothing(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    before = sorted(directory.rglob("*"))
    assert run(["cert", *arguments, "--dir", str(directory)]) == 2
    refused = capsys.readouterr().err
    assert says in refused
    assert refused.count("\n") == 1
    assert sorted(directory.rglob("*")) == before


def test_without_a_ca_it_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cert", "client", "web1", "--dir", str(tmp_path)]) == 2
    assert f"make a CA with: nbdserver cert ca --dir {tmp_path}" in capsys.readouterr().err


def test_a_key_that_is_not_that_of_the_ca_is_found_out(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["cert", "ca", "--dir", str(tmp_path / "other")])
    (tmp_path / "other/ca-key.pem").replace(directory / "ca-key.pem")
    assert run(["cert", "client", "web1", "--dir", str(directory)]) == 1
    assert "is not that of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("starts", "ends", "says"),
    [
        (-DAY, 40 * DAY, ""),
        (-DAY, 20 * DAY, "in 19 days; make a new one"),
        (-9 * DAY, -DAY, "has expired on"),
        (DAY, 90 * DAY, "is not valid before .*; is the clock right?"),
    ],
)
def test_what_expires_is_told_in_time(starts: timedelta, ends: timedelta, says: str) -> None:
    now = datetime.now(UTC)
    certificate = Certificate(Path("/c.pem"), (), now + starts, now + ends)
    told = "".join(problems([certificate]))
    assert bool(told) == bool(says)
    assert says.split(".*")[0] in told
    assert certificate.is_valid(now) == (starts < timedelta() < ends)


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(WrongInputError, match="x holds no certificate in PEM"):
        read_certificate(tmp_path / "x")
    with pytest.raises(WrongInputError, match="none cannot be read"):
        read_certificate(tmp_path / "none")


def test_volumes_that_nobody_can_attach_to_without_a_certificate_are_named() -> None:
    settings = {
        "plain": ExportSettings(),
        "secure": ExportSettings(tls="required"),
        "named": ExportSettings(allowed_clients=("10.0.0.0/8", "cert:web1")),
        "either": ExportSettings(tls="allowed"),
    }
    volumes = tuple(Volume(number, name, 4096, one) for number, (name, one) in enumerate(settings.items(), 1))
    family = Family(id="0" * 32, segment_bytes=1 << 20, owner="", volumes=volumes)
    (warning,) = NodeTls(TlsSettings()).warnings([family])
    assert warning.startswith("nobody can attach over the network to secure, named: TLS is required")
    assert NodeTls(TlsSettings()).warnings([]) == []


class Told:
    """A data process: what it was told about TLS, which it may refuse."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, name: str, **arguments: Any) -> None:
        assert name == "tls"
        self.requests.append(arguments)


def settings_of(certificates: Certificates, **changes: Path) -> TlsSettings:
    files = {**certificates.settings, **changes}
    return TlsSettings.model_validate({"mode": "required", **{key: str(path) for key, path in files.items()}})


def test_a_certificate_that_is_gone_at_a_start_closes_what_requires_tls_and_is_told(tmp_path: Path) -> None:
    told = Told()
    certificates = make_certificates(tmp_path)
    tls = NodeTls(settings_of(certificates))
    certificates.settings["key"].unlink()
    asyncio.run(tls.start(told))
    assert [(request["mode"], request["certificate"]) for request in told.requests] == [("required", None)]
    (warning,) = tls.warnings([])
    assert warning.startswith("there is no TLS: tls.key: ")
    assert tls.status() is None


def test_an_expired_certificate_is_taken_at_a_start_and_not_at_a_reload(tmp_path: Path) -> None:
    told = Told()
    certificates = make_certificates(tmp_path)
    good = settings_of(certificates)
    directory = certificates.client("expired")
    expired = settings_of(certificates, certificate=directory / "client-cert.pem", key=directory / "client-key.pem")
    tls = NodeTls(good)
    asyncio.run(tls.start(told))
    with pytest.raises(WrongInputError, match="has expired"):
        asyncio.run(tls.reload(expired, told))
    assert len(told.requests) == 1
    late = NodeTls(expired)
    asyncio.run(late.start(told))
    assert "has expired" in late.warnings([])[0]
    asyncio.run(late.reload(expired, told))  # other settings can be reloaded
    assert [request["mode"] for request in told.requests] == ["required"] * 3

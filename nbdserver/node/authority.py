"""A small certificate authority: makes a CA, certificates of nodes and of clients, as files.

Theory: the files have the names that qemu, nbdkit and libnbd look for in a directory. DIR holds `ca-cert.pem`,
`ca-key.pem`, `server-cert.pem`, `server-key.pem`; each client has `DIR/clients/NAME/` with `ca-cert.pem`,
`client-cert.pem`, `client-key.pem`, which is copied to it whole. A node of a cluster has `node-cert.pem` and
`node-key.pem`, for both ends of a stream; one that joins makes its key itself and has it signed. Keys are ECDSA P-256:
every client knows them, and a handshake costs a third of one with RSA.

Rules
- A key's file is never readable by others, not even while it is written. Where root makes them and there is a user
  `nbdserver`, the node's key belongs to it: the service runs as that user.
- Nothing is overwritten unless that is asked for; a file is replaced whole.
- No certificate lives longer than its CA.
"""

import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nbdserver.host.whole_files import replace_file
from nbdserver.node.errors import ConflictError, NodeError, WrongInputError

MEMBER_PURPOSES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
SERVICE_USER = "nbdserver"
CLOCK_SKEW = timedelta(hours=1)  # a client's clock may be late
COMMON_NAME_LIMIT = 64  # of X.509


Ca = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


@dataclass(frozen=True)
class Made:
    """What was made."""

    files: tuple[Path, ...]
    expires: datetime


class Authority:
    """The CA in a directory, and what it signs."""

    def __init__(self, directory: Path, overwrite: bool = False) -> None:
        self.directory = directory
        self._overwrite = overwrite

    @property
    def ca_certificate(self) -> Path:
        return self.directory / "ca-cert.pem"

    @property
    def ca_key(self) -> Path:
        return self.directory / "ca-key.pem"

    @property
    def member_files(self) -> tuple[Path, Path]:
        """Certificate and key of a cluster's node."""
        return self.directory / "node-cert.pem", self.directory / "node-key.pem"

    def client_directory(self, name: str) -> Path:
        return self.directory / "clients" / name

    def make_ca(self, name: str, lifetime: timedelta) -> Made:
        """A new CA that signs for itself. NodeError."""
        self._refuse_to_overwrite([self.ca_certificate, self.ca_key])
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_subject(name), _subject(name), key.public_key(), lifetime)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        replace_file(self.ca_key, private_bytes(key))
        replace_file(self.ca_certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        return Made((self.ca_certificate, self.ca_key), certificate.not_valid_after_utc)

    def make_node(self, names: Sequence[str], lifetime: timedelta) -> Made:
        """A node's certificate for these host names and addresses. NodeError."""
        files = (self.directory / "server-cert.pem", self.directory / "server-key.pem")
        made = self._make(names[0], _alternatives(names), [ExtendedKeyUsageOID.SERVER_AUTH], lifetime, files)
        give_to_service(files[1])
        return made

    def make_member(self, name: str, lifetime: timedelta) -> Made:
        """The certificate of a cluster's node. NodeError."""
        return self._make(name, _alternatives([name]), MEMBER_PURPOSES, lifetime, self.member_files)

    def sign_member(self, request: bytes, name: str, lifetime: timedelta) -> bytes:
        """The certificate, PEM, of a cluster's node that has made its key itself: `request` is its signing request,
        from which only the key is taken. NodeError."""
        try:
            asked = x509.load_pem_x509_csr(request)
            key = asked.public_key()
        except ValueError:
            raise WrongInputError("the signing request is none") from None
        if not asked.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
            raise WrongInputError("the signing request is not signed by an ECDSA key of its own")
        certificate = _sign(self._load_ca(), key, name, _alternatives([name]), MEMBER_PURPOSES, lifetime)
        return certificate.public_bytes(serialization.Encoding.PEM)

    def make_client(self, name: str, lifetime: timedelta) -> Made:
        """A client's certificate, in a directory of its own. NodeError."""
        directory = self.client_directory(name)
        files = (directory / "client-cert.pem", directory / "client-key.pem")
        made = self._make(name, None, [ExtendedKeyUsageOID.CLIENT_AUTH], lifetime, files)
        copied = directory / "ca-cert.pem"
        replace_file(copied, self.ca_certificate.read_bytes(), 0o644)
        return Made((copied, *made.files), made.expires)

    def _make(
        self,
        name: str,
        alternatives: x509.SubjectAlternativeName | None,
        purposes: Sequence[x509.ObjectIdentifier],
        lifetime: timedelta,
        files: tuple[Path, Path],
    ) -> Made:
        ca = self._load_ca()
        self._refuse_to_overwrite(files)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign(ca, key.public_key(), name, alternatives, purposes, lifetime)
        replace_file(files[1], private_bytes(key))
        replace_file(files[0], certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        return Made(files, certificate.not_valid_after_utc)

    def _load_ca(self) -> Ca:
        try:
            certificate = x509.load_pem_x509_certificate(self.ca_certificate.read_bytes())
            key = serialization.load_pem_private_key(self.ca_key.read_bytes(), None)
        except FileNotFoundError as error:
            raise WrongInputError(
                f"{error.filename} is missing; make a CA with: nbdserver cert ca --dir {self.directory}"
            ) from None
        except (ValueError, TypeError) as error:
            raise NodeError(f"the CA in {self.directory} cannot be used: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise NodeError(f"the key in {self.ca_key} is not that of {self.ca_certificate}")
        if certificate.not_valid_after_utc <= datetime.now(UTC):
            raise WrongInputError(f"{self.ca_certificate} has expired; make a new CA with: nbdserver cert ca --force")
        return certificate, key

    def _refuse_to_overwrite(self, files: Sequence[Path]) -> None:
        there = [file for file in files if file.exists()]
        if there and not self._overwrite:
            raise ConflictError(f"{there[0]} is there already; add --force to replace it")


def _sign(
    issuer: Ca,
    key: ec.EllipticCurvePublicKey,
    name: str,
    alternatives: x509.SubjectAlternativeName | None,
    purposes: Sequence[x509.ObjectIdentifier],
    lifetime: timedelta,
) -> x509.Certificate:
    ca, ca_key = issuer
    builder = _builder(_subject(name), ca.subject, key, lifetime, ca.not_valid_after_utc)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    if alternatives is not None:
        builder = builder.add_extension(alternatives, critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if len(name) <= COMMON_NAME_LIMIT else [])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    lifetime: timedelta,
    at_most: datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    end = now + lifetime
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(min(end, at_most) if at_most is not None else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(names: Sequence[str]) -> x509.SubjectAlternativeName:
    alternatives: list[x509.GeneralName] = []
    for name in names:
        try:
            alternatives.append(x509.IPAddress(ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    return x509.SubjectAlternativeName(alternatives)


def private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def give_to_service(path: Path) -> None:
    """Let the service read and write it, where root makes it and there is a service."""
    if os.geteuid() != 0:
        return
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return
    os.chown(path, user.pw_uid, user.pw_gid)

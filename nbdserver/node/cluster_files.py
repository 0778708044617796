"""What a node's cluster settings name: the cluster's key, certificates, etcd's password; read and checked here.

    DIR/cluster.key      the cluster's key: a line of 64 hexadecimal digits; two in a rotation, the first seals
    DIR/ca-cert.pem      the cluster's CA, which signs nodes only
    DIR/ca-key.pem       its key, on the node that lets others in, and nowhere else
    DIR/node-cert.pem    this node's certificate, with node-key.pem
    DIR/tokens.json      hashes of the join tokens that are valid, beside ca-key.pem

Rule: whoever has the key and a certificate is a node of the cluster, so only the owner can read what is secret.
"""

import os
import re
from pathlib import Path

from metadata.etcd_settings import EtcdSettings, EtcdTls
from nbdserver.host.tls import TlsError
from nbdserver.host.tls_network import PeerContexts, make_peer_contexts
from nbdserver.node.cluster_settings import ClusterSettings, RegistrySettings, RegistryTlsSettings
from nbdserver.node.errors import NodeError, WrongInputError

KEY_BYTES = 32
MAX_FILE_BYTES = 64 << 10

_KEY = re.compile(r"[0-9a-fA-F]{64}")


def read_keys(path: Path) -> list[bytes]:
    """The cluster's valid keys, the one to seal with first. WrongInputError."""
    lines = _read(path, "cluster.key_file").split()
    if not 1 <= len(lines) <= 2 or not all(_KEY.fullmatch(line) for line in lines):
        raise WrongInputError(
            f"cluster.key_file: {path} has not one or two lines of {2 * KEY_BYTES} hexadecimal digits; "
            "copy it from another node of the cluster"
        )
    return [bytes.fromhex(line) for line in lines]


def write_keys(path: Path, keys: list[bytes]) -> None:
    """Replace them. NodeError."""
    write_file(path, "".join(key.hex() + "\n" for key in keys).encode())


def write_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file whole, and make sure of it; nobody else can read it, not even while it is written. NodeError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        new.rename(path)
    except OSError as error:
        raise NodeError(f"{path} cannot be written: {error.strerror}") from None


def read_contexts(settings: ClusterSettings) -> PeerContexts:
    """The certificates of a node, ready for use. WrongInputError."""
    tls = settings.tls
    try:
        return make_peer_contexts(tls.ca, tls.certificate, tls.key)
    except TlsError as error:
        raise WrongInputError(f"cluster.tls: {error}") from None


def read_etcd_settings(settings: ClusterSettings) -> EtcdSettings:
    """Where etcd is and who we are there. WrongInputError."""
    registry = settings.registry
    try:
        return EtcdSettings(
            endpoints=tuple(registry.endpoints),
            namespace=settings.namespace,
            tls=_etcd_tls(registry.tls),
            user=registry.user,
            password=_password(registry),
        )
    except ValueError as error:
        raise WrongInputError(f"cluster.registry: {error}") from None


def _etcd_tls(tls: RegistryTlsSettings | None) -> EtcdTls | None:
    if tls is None:
        return None
    certificate, key = (str(path) if path is not None else None for path in (tls.certificate, tls.key))
    return EtcdTls(str(tls.ca), certificate, key, tls.server_name)


def _password(registry: RegistrySettings) -> str | None:
    if registry.password_file is None:
        return None
    lines = _read(registry.password_file, "cluster.registry.password_file").splitlines()
    if len(lines) != 1 or not lines[0]:
        raise WrongInputError(
            f"cluster.registry.password_file: {registry.password_file} has not one line: write the password into it"
        )
    return lines[0]


def check(settings: ClusterSettings | None) -> None:
    """Raise WrongInputError unless all that the settings name can be used. Nothing is connected to."""
    if settings is not None:
        read_keys(settings.key_file)
        read_contexts(settings)
        read_etcd_settings(settings)


def _read(path: Path, key: str) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        raise WrongInputError(f"{key}: {path} cannot be read: {error.strerror}") from None

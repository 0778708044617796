"""What a node's cluster settings name: the cluster's key, certificates, etcd's password; read and checked here.

    DIR/cluster.key      the cluster's key, 64 hexadecimal digits; in a rotation a second line: next KEY, or last KEY
    DIR/ca-cert.pem      the cluster's CA, which signs nodes only
    DIR/ca-key.pem       its key, on the node that lets others in, and nowhere else
    DIR/node-cert.pem    this node's certificate, with node-key.pem
    DIR/tokens.json      hashes of the join tokens that are valid, beside ca-key.pem

Rule: whoever has the key and a certificate is a node of the cluster, so only the owner can read what is secret.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from metadata.etcd_settings import EtcdSettings, EtcdTls
from nbdserver.host.tls import TlsError
from nbdserver.host.tls_network import PeerContexts, make_peer_contexts
from nbdserver.host.whole_files import replace_file
from nbdserver.node.cluster_settings import ClusterSettings, RegistrySettings, RegistryTlsSettings
from nbdserver.node.errors import WrongInputError

KEY_BYTES = 32
MAX_FILE_BYTES = 64 << 10

_KEYS = re.compile(r"([0-9a-fA-F]{64})\n?(?:(next|last) ([0-9a-fA-F]{64})\n?)?")


@dataclass(frozen=True)
class Keys:
    """The cluster's key, and in a rotation the one that seals next, or sealed before: what they seal is taken too."""

    sealing: bytes
    other: bytes | None = None
    is_other_next: bool = False

    @property
    def valid(self) -> list[bytes]:
        """The one to seal with first."""
        return [self.sealing] if self.other is None else [self.sealing, self.other]

    def encode(self) -> str:
        """A line, or two."""
        if self.other is None:
            return f"{self.sealing.hex()}\n"
        return f"{self.sealing.hex()}\n{'next' if self.is_other_next else 'last'} {self.other.hex()}\n"

    @staticmethod
    def decode(text: str, where: str) -> "Keys":
        """WrongInputError that says where it was."""
        match = _KEYS.fullmatch(text)
        if match is None:
            raise WrongInputError(
                f"{where}: not a line of {2 * KEY_BYTES} hexadecimal digits, nor that and a second one after "
                "`next` or `last`; copy it from another node of the cluster"
            )
        sealing, word, other = match.groups()
        return Keys(bytes.fromhex(sealing), bytes.fromhex(other) if other else None, word == "next")


def read_keys(path: Path) -> Keys:
    """The cluster's valid keys. WrongInputError."""
    return Keys.decode(_read(path, "cluster.key_file"), f"cluster.key_file: {path}")


def write_keys(path: Path, keys: Keys) -> None:
    """Replace them. OSError."""
    replace_file(path, keys.encode().encode())


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
    for key, path in (("ca", tls.ca), ("certificate", tls.certificate), ("key", tls.key)):
        if path is not None:
            _read(path, f"cluster.registry.tls.{key}")
    certificate, key_file = (str(path) if path is not None else None for path in (tls.certificate, tls.key))
    return EtcdTls(str(tls.ca), certificate, key_file, tls.server_name)


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

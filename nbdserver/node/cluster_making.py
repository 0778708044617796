"""Making a cluster, and joining one: the files of a node, and the `cluster:` part of its settings.

    CONFIG                    node.yaml; a file that is there keeps what it says, `cluster:` is added
    CONFIG's DIR/cluster/     the files of cluster_files.py

Rules
- Everything is checked, and everything that may fail elsewhere is done, before the first file is written; the settings
  are written last, so that a node whose settings name a cluster has all that they name.
- A node makes its key itself: it never travels.
"""

import hashlib
import os
import secrets
import ssl
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nbdserver.host.tls_network import CALL_PROTOCOL, make_nameless_context
from nbdserver.host.whole_files import replace_file
from nbdserver.node import cluster_files
from nbdserver.node.authority import Authority, give_to_service, private_bytes
from nbdserver.node.cluster_calls import call
from nbdserver.node.cluster_settings import ClusterSettings
from nbdserver.node.config import load_settings, parse_settings
from nbdserver.node.errors import ConflictError, NodeError, WrongInputError
from nbdserver.node.invitations import Invitations, Token

LIFETIME = timedelta(days=3650)
"""Of the CA and of nodes' certificates: a cluster that is forgotten for years still works."""

REGISTRY_FILES = {"ca": "etcd-ca.pem", "certificate": "etcd-cert.pem", "key": "etcd-key.pem"}
PASSWORD_FILE = "etcd-password"


@dataclass(frozen=True)
class Wishes:
    """Who a node shall be: keys of `cluster:` with their values, checked with the rest."""

    config: Path
    node: str
    address: str
    more: dict[str, Any] = field(default_factory=dict)
    """site, fault_domain, across_wan, subscribe: as far as they were given."""

    @property
    def directory(self) -> Path:
        return self.config.parent / "cluster"


def default_config() -> Path:
    """/etc/nbdserver/node.yaml for root, ~/.config/nbdserver/node.yaml for anybody else."""
    return Path("/etc/nbdserver/node.yaml") if os.geteuid() == 0 else Path("~/.config/nbdserver/node.yaml").expanduser()


def init(name: str, wishes: Wishes, registry: dict[str, Any]) -> ClusterSettings:
    """Make a cluster whose first node this is; `registry` is that part of the settings. NodeError."""
    directory = wishes.directory
    _refuse(_member_of(wishes.config), wishes.config)
    settings, text = _settings(wishes, name, registry)
    cluster_files.read_etcd_settings(settings)
    authority = Authority(directory, overwrite=True)  # what a broken-off init has left is worth nothing
    authority.make_ca(f"nbdserver cluster {name}", LIFETIME)
    authority.make_member(settings.node, LIFETIME)
    cluster_files.write_keys(settings.key_file, cluster_files.Keys(secrets.token_bytes(cluster_files.KEY_BYTES)))
    cluster_files.check(settings)
    _finish(wishes, text)
    return settings


def make_token(settings: ClusterSettings, valid_s: float, now_s: float) -> str:
    """A token for new nodes, valid from `now_s` on the wall clock. NodeError where the CA's key is not."""
    ca_key = Authority(settings.tls.ca.parent).ca_key
    if not ca_key.exists():
        raise WrongInputError(f"{ca_key} is not here: tokens are made where `nbdserver cluster init` was run")
    secret = Invitations(settings.tokens_file).add(valid_s, now_s)
    give_to_service(settings.tokens_file)
    return Token(settings.name, settings.address, _fingerprint(settings.tls.ca.read_text()), secret).encode()


async def join(token: Token, wishes: Wishes, again: bool) -> ClusterSettings:
    """Join the cluster that the token is for; `again`: this node belongs to it, and gets key and certificate anew.
    NodeError."""
    member = _member_of(wishes.config)
    if not again:
        _refuse(member, wishes.config)
    elif member is None:
        raise WrongInputError(f"{wishes.config} names no cluster yet: join without --again, with --address IP:PORT")
    elif member.name != token.cluster:
        raise ConflictError(f"{wishes.config} belongs to cluster {member.name}, and the token to {token.cluster}")
    else:
        wishes = Wishes(wishes.config, member.node, member.address)
    _settings(wishes, token.cluster, {"endpoints": ["127.0.0.1:1"]})  # refuses what cannot be before anybody is asked
    key = ec.generate_private_key(ec.SECP256R1())
    given = await _ask(token, wishes.node, key, again)
    directory = wishes.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    registry = _write_registry_files(directory, given["registry"])
    settings, text = _settings(wishes, token.cluster, registry) if member is None else (member, "")
    replace_file(settings.tls.ca, given["ca"].encode(), 0o644)
    replace_file(settings.tls.key, private_bytes(key))
    replace_file(settings.tls.certificate, given["certificate"].encode(), 0o644)
    replace_file(settings.key_file, given["keys"].encode())
    cluster_files.check(settings)
    _finish(wishes, text)
    return settings


async def _ask(token: Token, node: str, key: ec.EllipticCurvePrivateKey, again: bool) -> dict[str, Any]:
    """First for the CA, which the token knows; then, over TLS that the CA has vouched for, with the secret."""
    unknown = make_nameless_context(CALL_PROTOCOL)
    unknown.verify_mode = ssl.CERT_NONE
    ca = str((await call(token.address, unknown, {"do": "ca"})).get("ca", ""))
    if not token.ca_sha256 or _fingerprint(ca) != token.ca_sha256:
        raise NodeError(f"{token.address} has another CA than the token says: it is not the cluster that you mean")
    context = make_nameless_context(CALL_PROTOCOL)
    context.load_verify_locations(cadata=ca)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    question = {
        "do": "join",
        "secret": token.secret,
        "node": node,
        "again": again,
        "request": request.public_bytes(serialization.Encoding.PEM).decode(),
    }
    return await call(token.address, context, question) | {"ca": ca}


def let_in(settings: ClusterSettings, node: str, request: str) -> dict[str, Any]:
    """What a new node is given: its certificate, the cluster's keys, the registry's settings and files. NodeError."""
    registry = settings.registry
    tls = registry.tls
    files: dict[str, Path | None] = {"password": registry.password_file}
    if tls is not None:
        files |= {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key}
    return {
        "certificate": Authority(settings.tls.ca.parent).sign_member(request.encode(), node, LIFETIME).decode(),
        "keys": settings.key_file.read_text(),
        "registry": {
            "endpoints": registry.endpoints,
            "namespace": registry.namespace,
            "user": registry.user,
            "server_name": tls.server_name if tls is not None else None,
            "files": {name: path.read_text() for name, path in files.items() if path is not None},
        },
    }


def _write_registry_files(directory: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The registry part of the settings, its files written."""
    files = given["files"]
    registry = {name: given[name] for name in ("endpoints", "namespace", "user") if given[name]}
    tls = {"server_name": given["server_name"]} if given["server_name"] else {}
    for name, file in REGISTRY_FILES.items():
        if name in files:
            replace_file(directory / file, files[name].encode())
            tls[name] = str(directory / file)
    if tls:
        registry["tls"] = tls
    if "password" in files:
        replace_file(directory / PASSWORD_FILE, files["password"].encode())
        registry["password_file"] = str(directory / PASSWORD_FILE)
    return registry


def _fingerprint(ca: str) -> str:
    try:
        certificate = x509.load_pem_x509_certificate(ca.encode())
    except ValueError:
        return ""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def _member_of(config: Path) -> ClusterSettings | None:
    return load_settings(config).cluster if config.exists() else None


def _refuse(member: ClusterSettings | None, config: Path) -> None:
    if member is not None:
        raise ConflictError(
            f"{config} belongs to cluster {member.name} already, as {member.node}; name another file with --config"
        )


def _settings(wishes: Wishes, name: str, registry: dict[str, Any]) -> tuple[ClusterSettings, str]:
    """The settings, and the text to be added to the file. WrongInputError."""
    authority = Authority(wishes.directory)
    certificate, key = authority.member_files
    content = {
        "cluster": {
            "name": name,
            "node": wishes.node,
            "address": wishes.address,
            **wishes.more,
            "key_file": str(wishes.directory / "cluster.key"),
            "tls": {"ca": str(authority.ca_certificate), "certificate": str(certificate), "key": str(key)},
            "registry": registry,
        }
    }
    text = yaml.safe_dump(content, sort_keys=False)
    settings = parse_settings(text.encode(), "cluster settings").cluster
    assert settings is not None  # for the type checker: it was put in
    return settings, text


def _finish(wishes: Wishes, text: str) -> None:
    """Add the text to the settings file, and let the service read what it has to."""
    config = wishes.config
    before = config.read_text() if config.exists() else ""
    if text:
        whole = f"{before.rstrip()}\n\n{text}" if before.strip() else text
        parse_settings(whole.encode(), str(config))
        replace_file(config, whole.encode(), 0o644)
    give_to_service(wishes.directory)
    for path in wishes.directory.iterdir():
        give_to_service(path)

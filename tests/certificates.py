"""Certificates for tests, made by the program's own authority: good ones, and what must be refused."""

import ssl
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from nbdserver.node.authority import Authority

DAY = timedelta(days=1)
EXPIRED = timedelta(minutes=-1)


@dataclass(frozen=True)
class Certificates:
    """A node's certificate, and the directories of clients by name: web1 and web2 are good, `expired` was, and
    `stranger` has one of another CA."""

    node: Authority
    stranger: Authority

    @property
    def settings(self) -> dict[str, Path]:
        directory = self.node.directory
        return {
            "certificate": directory / "server-cert.pem",
            "key": directory / "server-key.pem",
            "client_ca": directory / "ca-cert.pem",
        }

    def client(self, name: str) -> Path:
        return (self.stranger if name == "stranger" else self.node).client_directory(name)

    def client_context(self, name: str = "") -> ssl.SSLContext:
        """Of a client that trusts the node, with the certificate of this name."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.node.ca_certificate)
        if name:
            context.load_cert_chain(self.client(name) / "client-cert.pem", self.client(name) / "client-key.pem")
        return context


def make_certificates(directory: Path) -> Certificates:
    node, stranger = Authority(directory / "pki"), Authority(directory / "stranger")
    for authority in (node, stranger):
        authority.make_ca("test CA", DAY)
    node.make_node(["localhost", "127.0.0.1"], DAY)
    for name in ("web1", "web2"):
        node.make_client(name, DAY)
    node.make_client("expired", EXPIRED)
    stranger.make_client("stranger", DAY)
    return Certificates(node, stranger)


def make_member_files(directory: Path) -> dict[str, str]:
    """A CA in that directory and the certificate of a cluster's node that it has signed: the paths of `ca`,
    `certificate` and `key`."""
    authority = Authority(directory)
    authority.make_ca(directory.name, DAY)
    certificate, key = authority.make_member("node", DAY).files
    return {"ca": str(authority.ca_certificate), "certificate": str(certificate), "key": str(key)}

"""The `cluster:` part of a node's settings: which cluster it belongs to, who it is there, where the registry is.

Rules: it needs no etcd and loads nothing that speaks to one. Files are named here and read by `cluster_files.py`.
"""

import reprlib
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from metadata.etcd_settings import MAX_ENDPOINTS
from nbdserver.node.addresses import join_address, split_address
from nbdserver.node.setting_values import Address, Model, NameValue, OwnAddress, PathValue, duration, one_or_more

DEFAULT_SITE = "main"

FACTS_PREFIX, LOAD_PREFIX, VOLUMES_PREFIX, DRAIN_PREFIX = SAID_PREFIXES = ("node/", "load/", "volumes/", "drain/")
"""What every node hears of every other one."""

SNAPSHOTS_PREFIX = "snapshots/"
"""What every node hears of the cluster's families."""


def _text(value: object) -> str:
    from protocol.directory import KEY_LIMIT_BYTES  # with construct: loaded by who has a cluster

    if not isinstance(value, str) or not value or "\0" in value or len(value.encode()) > KEY_LIMIT_BYTES:
        raise ValueError(f"{reprlib.repr(value)} is not a text of 1 to {KEY_LIMIT_BYTES} bytes; put it in quotes")
    return value


Text = Annotated[str, BeforeValidator(_text)]


class ClusterTlsSettings(Model):
    """By what the nodes of a cluster know each other."""

    ca: PathValue = Field(description="the cluster's CA, PEM; nbdserver cluster init makes it")
    certificate: PathValue = Field(description="this node's certificate of that CA, PEM")
    key: PathValue = Field(description="the key to it, PEM without a password")


class RegistryTlsSettings(Model):
    """TLS to etcd."""

    ca: PathValue = Field(description="certificates that etcd's one is verified by, PEM")
    certificate: PathValue | None = Field(default=None, description="who this node is for etcd, PEM")
    key: PathValue | None = Field(default=None, description="the key to it, PEM without a password")
    server_name: Text | None = Field(
        default=None, description="the name in etcd's certificates, where it is not the endpoint's host"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "RegistryTlsSettings":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key are needed both, or none of them")
        return self


class RegistrySettings(Model):
    """Where etcd is."""

    endpoints: Annotated[list[Address], BeforeValidator(one_or_more), Field(min_length=1, max_length=MAX_ENDPOINTS)] = (
        Field(description="HOST:PORT of etcd's members, all of them")
    )
    namespace: Text | None = Field(
        default=None, description="what the cluster's keys begin with in etcd; default nbdserver/NAME/"
    )
    tls: RegistryTlsSettings | None = Field(default=None, description="absent: etcd is spoken to in plain text")
    user: Text | None = Field(default=None, description="who this node logs in to etcd as")
    password_file: PathValue | None = Field(default=None, description="file with the password, one line")

    @model_validator(mode="after")
    def _goes_together(self) -> "RegistrySettings":
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password_file are needed both, or none of them")
        return self


class ClusterSettings(Model):
    """Who a node is in its cluster."""

    name: NameValue = Field(description="the cluster's name; nodes with another one are refused")
    node: NameValue = Field(description="this node's name, which no other node of the cluster has")
    address: OwnAddress = Field(
        description="IP:PORT that other nodes reach this one at, by UDP and by TCP, for example 10.0.0.5:10810"
    )
    data_address: OwnAddress | None = Field(
        default=None,
        description="IP:PORT that other nodes' replicas reach this one's at, by TCP; with workers: N also the N-1 ports"
        " above it; default: the IP of address, and the port above its one",
    )
    data_tls: StrictBool = Field(
        default=True, description="whether what replicas say to each other is encrypted; the same on all nodes"
    )
    repair_delay: Annotated[float, duration("smhd", "5s", "30d", "30m, 6h")] = Field(
        default=1800.0,
        description="after which a replica that is not back is made on another node (30m, 6h); none: never",
    )
    site: NameValue = Field(default=DEFAULT_SITE, description="where it stands")
    fault_domain: NameValue | None = Field(
        default=None, description="what fails together with it, as a rack; default: the node alone"
    )
    across_wan: StrictBool = Field(
        default=False, description="far from the site of the others: reached by TCP alone, never the master"
    )
    subscribe: Annotated[list[Text], BeforeValidator(one_or_more)] = Field(
        default=[], description="with across_wan: the beginnings of the directory's keys that it gets"
    )
    key_file: PathValue = Field(description="the cluster's key: one line of 64 hexadecimal digits, two in a rotation")
    tls: ClusterTlsSettings = Field(description="ca, certificate and key of the node")
    registry: RegistrySettings = Field(description="where etcd is: endpoints")

    @model_validator(mode="after")
    def _goes_together(self) -> "ClusterSettings":
        if self.subscribe and not self.across_wan:
            raise ValueError("subscribe is for nodes with across_wan: true; others get everything")
        from metadata.directory.settings import OWN_PREFIXES_LIMIT

        if len(self.subscribe) > OWN_PREFIXES_LIMIT - len(SAID_PREFIXES):
            most = OWN_PREFIXES_LIMIT - len(SAID_PREFIXES)
            raise ValueError(f"subscribe has {len(self.subscribe)} beginnings; name at most {most}, shorter ones")
        return self

    def data_addresses(self, workers: int) -> list[str]:
        """Where the data processes listen to their peers, one after the other."""
        address = self.data_address
        if address is None:
            host, port = split_address(self.address)
            address = join_address(host, port + 1)
        host, port = split_address(address)
        return [join_address(host, port + worker) for worker in range(workers)]

    @property
    def own_fault_domain(self) -> str:
        return self.fault_domain or self.node

    @property
    def namespace(self) -> str:
        return self.registry.namespace or f"nbdserver/{self.name}/"

    @property
    def tokens_file(self) -> Path:
        """Of the tokens that are valid: beside the CA's key, on the node that has it."""
        return self.tls.ca.parent / "tokens.json"

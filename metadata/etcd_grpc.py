"""grpc, loaded in one place; channels as we want them, and its errors told apart.

Rules
- grpc and aetcd are loaded by this module and by no other: a process that needs no etcd does not import it. Once it is
  loaded the process may start programs, but never fork: grpc's threads and locks do not survive that.
- What matters about an error is whether the request may have been carried out, and whether another try may do better.
- aetcd gives the messages and stubs. Its own client knows one endpoint, in plain text.
"""

import asyncio
import contextlib
import os
import ssl
from collections.abc import Iterator

# grpc writes to stderr, at each attempt, what it also raises.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc
from aetcd import rpc
from grpc.aio import AioRpcError, Channel, InternalError, UsageError

from metadata.etcd_settings import EtcdTls

__all__ = ["Channel", "EtcdError", "explain", "grpc", "make_channel", "rpc", "translated"]

MAX_MESSAGE_BYTES = 16 << 20

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

_REFUSALS = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""etcd gives these before it has carried out anything. Not so RESOURCE_EXHAUSTED: the write that finds the quota used
up is carried out, and refused."""
_NO_LEADER = "etcdserver: no leader"
_TLS_HINTS = {
    "CERTIFICATE_VERIFY_FAILED": "etcd's certificate is not of the authority in {ca_file}",
    "Hostname Verification": "etcd's certificate is not for {server_name}",
    "TSI_DATA_CORRUPTED": "etcd refused the TLS handshake: it may demand a client certificate that it trusts",
}
_NO_TLS_HINTS = {"Socket closed": "etcd hung up: does it want TLS?"}
_TOKEN_REFUSALS = ("invalid auth token", "revision of auth store is old")


class EtcdError(Exception):
    """No answer; one line."""

    def __init__(self, reason: str, may_have_happened: bool, code: grpc.StatusCode | None = None) -> None:
        super().__init__(reason)
        self.may_have_happened = may_have_happened
        """False: etcd has certainly changed nothing for this request, and never will."""
        self.is_passing = code not in _REFUSALS and code is not grpc.StatusCode.RESOURCE_EXHAUSTED
        """True: the same request may be answered later, or by another member."""
        self.is_token_refused = any(refusal in reason for refusal in _TOKEN_REFUSALS)
        """True: logging in again may help."""
        self.is_compacted = code is grpc.StatusCode.OUT_OF_RANGE
        """True: the revision that was asked for is not known any more."""
        self.is_too_large = code is grpc.StatusCode.RESOURCE_EXHAUSTED
        """True, for a read: the answer does not fit into a message."""


def make_channel(endpoint: str, tls: EtcdTls | None) -> Channel:
    """Return a channel to one endpoint, not yet connected. EtcdError for files that cannot be used."""
    if not tls:
        return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
    _check_files(tls)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file),
        private_key=_read(tls.key_file),
        certificate_chain=_read(tls.certificate_file),
    )
    name = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
    return grpc.aio.secure_channel(endpoint, credentials, options=(*_OPTIONS, *name))


def explain(reason: str, endpoint: str, tls: EtcdTls | None) -> str:
    """Say in words that help what grpc says about a connection that was not made."""
    reason = reason.rpartition("last error: ")[2]
    for sign, hint in (_TLS_HINTS if tls else _NO_TLS_HINTS).items():
        if sign in reason:
            if tls:
                server_name = tls.server_name or endpoint.rpartition(":")[0]
                hint = hint.format(ca_file=tls.ca_file, server_name=server_name)
            return f"{hint} ({reason})"
    return reason


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what grpc raises into EtcdError."""
    try:
        yield
    except AioRpcError as error:
        code, details = error.code(), error.details() or ""
        is_refused = code in _REFUSALS or details == _NO_LEADER
        raise EtcdError(details or code.name.lower(), not is_refused, code) from None
    except UsageError:
        raise EtcdError("the connection was given up", False) from None
    except InternalError as error:
        raise EtcdError(f"grpc has failed: {error}", True) from error
    except asyncio.CancelledError:
        # A closed channel cancels its calls; a cancelled task is another matter.
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise EtcdError("the connection was given up", True) from None


def _check_files(tls: EtcdTls) -> None:
    """EtcdError for files that cannot be used: grpc would say nothing but that there is no connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    path = tls.ca_file
    try:
        context.load_verify_locations(path)
        if tls.certificate_file:
            path = f"{tls.certificate_file} with {tls.key_file}"
            context.load_cert_chain(tls.certificate_file, tls.key_file, password=b"")
    except OSError as error:
        raise EtcdError(f"TLS cannot use {path}: {error}", False) from None


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return file.read()

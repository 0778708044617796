"""What is known about a request whose answer is an error: never less doubt than there is."""

import asyncio

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, InternalError, Metadata, UsageError

from metadata.etcd_grpc import EtcdError, explain, translated
from metadata.etcd_settings import EtcdTls


def translate(error: BaseException) -> EtcdError:
    with pytest.raises(EtcdError) as raised, translated():
        raise error
    return raised.value


def rpc_error(code: StatusCode, details: str) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), details)


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (StatusCode.UNAVAILABLE, "Socket closed"),
        (StatusCode.UNAVAILABLE, "etcdserver: request timed out"),
        (StatusCode.UNAVAILABLE, "etcdserver: leader changed"),
        (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"),
        (StatusCode.CANCELLED, "etcdserver: request cancelled"),
        (StatusCode.UNKNOWN, "raft proposal dropped"),
        (StatusCode.INTERNAL, "stream error"),
        (StatusCode.DATA_LOSS, "etcdserver: corrupt cluster"),
        (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded"),
        (StatusCode.ABORTED, "whatever comes in a later version"),
    ],
)
def test_what_does_not_say_that_nothing_was_done_leaves_it_unknown(code: StatusCode, details: str) -> None:
    error = translate(rpc_error(code, details))
    assert (error.may_have_happened, str(error)) == (True, details)


@pytest.mark.parametrize(
    ("code", "details", "is_passing"),
    [
        (StatusCode.UNAVAILABLE, "etcdserver: no leader", True),
        (StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", False),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: request is too large", False),
        (StatusCode.NOT_FOUND, "etcdserver: requested lease not found", False),
        (StatusCode.FAILED_PRECONDITION, "etcdserver: authentication is not enabled", False),
    ],
)
def test_what_etcd_refuses_was_not_done(code: StatusCode, details: str, is_passing: bool) -> None:
    error = translate(rpc_error(code, details))
    assert (error.may_have_happened, error.is_passing, error.is_token_refused) == (False, is_passing, False)


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token"),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: revision of auth store is old"),
    ],
)
def test_a_refused_token_is_told_from_other_refusals(code: StatusCode, details: str) -> None:
    error = translate(rpc_error(code, details))
    assert (error.may_have_happened, error.is_token_refused) == (False, True)


def test_reads_are_told_what_they_can_do_about_it() -> None:
    compacted = translate(rpc_error(StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted"))
    assert (compacted.is_compacted, compacted.is_too_large, compacted.is_passing) == (True, False, False)
    large = translate(rpc_error(StatusCode.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max"))
    assert (large.is_compacted, large.is_too_large, large.is_passing) == (False, True, False)


def test_an_error_without_words_has_its_code() -> None:
    assert str(translate(rpc_error(StatusCode.UNAVAILABLE, ""))) == "unavailable"


def test_a_channel_that_was_closed_before_sending_is_told_from_one_that_was_closed_after() -> None:
    assert not translate(UsageError("Channel is closed.")).may_have_happened
    assert translate(InternalError("Internal error from Core")).may_have_happened

    async def check() -> None:
        assert translate(asyncio.CancelledError()).may_have_happened

    asyncio.run(check())


def test_who_is_cancelled_is_cancelled() -> None:
    async def wait() -> None:
        with translated():
            await asyncio.sleep(60)

    async def check() -> None:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(check())


def test_a_hint_stands_before_the_words_of_grpc() -> None:
    tls = EtcdTls("/etc/etcd/ca.pem")
    long = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:2379: "
    assert explain(f"{long}Connection refused", "a:1", tls) == "UNKNOWN: ipv4:10.0.0.1:2379: Connection refused"
    assert explain(f"{long}CERTIFICATE_VERIFY_FAILED", "a:1", tls).startswith(
        "etcd's certificate is not of the authority in /etc/etcd/ca.pem (UNKNOWN: "
    )
    assert explain("Hostname Verification Check failed", "a:1", tls).startswith("etcd's certificate is not for a (")
    assert explain("Socket closed", "a:1", tls) == "Socket closed"
    assert explain("Socket closed", "a:1", None) == "etcd hung up: does it want TLS? (Socket closed)"

"""The channel between control and data process: frames, requests, refusals, the end."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node import channel
from nbdserver.node.channel import MAX_FRAME_BYTES, Channel, ChannelError, Codec, RemoteError, encode

MESSAGES = st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), max_size=5)


@given(MESSAGES, st.integers(1, 40))
def test_messages_arrive_whole_however_their_bytes_are_cut(messages: list[dict[str, Any]], piece: int) -> None:
    stream = b"".join(encode(message) for message in messages)
    codec = Codec()
    received = [m for at in range(0, len(stream), piece) for m in codec.receive(stream[at : at + piece])]
    assert received == messages


@pytest.mark.parametrize(
    "stream",
    [(MAX_FRAME_BYTES + 1).to_bytes(4, "big"), b"\0\0\0\2{]", b"\0\0\0\2[]", b"\0\0\0\0", b"\0\0\0\1\xff"],
)
def test_a_frame_that_breaks_the_rules_is_an_error(stream: bytes) -> None:
    with pytest.raises(ChannelError):
        Codec().receive(stream)


def test_a_message_too_large_is_refused_by_its_sender() -> None:
    with pytest.raises(ChannelError, match="too large"):
        encode({"text": "x" * MAX_FRAME_BYTES})


async def answer(name: str, arguments: dict[str, Any]) -> Any:
    if name == "add":
        return arguments["a"] + arguments["b"]
    if name == "slow":
        await asyncio.sleep(60)
    raise ValueError(f"no {name} here")


def with_channel(use: Callable[[Channel, Channel, list[str]], Awaitable[None]]) -> None:
    async def run() -> None:
        one, other = socket.socketpair()
        heard: list[str] = []
        asking = await Channel.connect(
            one, answer, lambda kind, fields: heard.append(kind), lambda: heard.append("lost")
        )
        answering = await Channel.connect(other, answer, lambda kind, fields: None, lambda: None)
        await use(asking, answering, heard)
        await asking.close()
        await answering.close()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_requests_are_answered_each_with_its_own_reply() -> None:
    async def use(asking: Channel, answering: Channel, heard: list[str]) -> None:
        replies = await asyncio.gather(*(asking.call("add", a=n, b=1) for n in range(100)))
        assert replies == [n + 1 for n in range(100)]

    with_channel(use)


def test_a_refusal_travels_back_with_its_kind_and_its_sentence() -> None:
    async def use(asking: Channel, answering: Channel, heard: list[str]) -> None:
        with pytest.raises(RemoteError, match="no such here") as caught:
            await asking.call("such")
        assert caught.value.kind == "ValueError"

    with_channel(use)


def test_a_request_ends_with_an_error_when_the_other_end_goes() -> None:
    async def use(asking: Channel, answering: Channel, heard: list[str]) -> None:
        waiting = asyncio.ensure_future(asking.call("slow"))
        await asyncio.sleep(0)
        await answering.close()
        with pytest.raises(ChannelError, match="ended"):
            await waiting
        with pytest.raises(ChannelError, match="not running"):
            await asking.call("add", a=1, b=1)
        assert heard == ["lost"]

    with_channel(use)


def test_the_last_reply_arrives_although_the_other_end_writes_while_the_channel_is_closed() -> None:
    async def run() -> None:
        one, other = socket.socketpair()
        one.setblocking(False)
        loop = asyncio.get_running_loop()
        answering = await Channel.connect(other, answer, lambda kind, fields: None, lambda: None)
        await loop.sock_sendall(one, encode({"call": "add", "id": 1, "arguments": {"a": 1, "b": 2}}))
        await asyncio.sleep(0.01)
        closing = loop.create_task(answering.close())
        await asyncio.sleep(0.01)
        await loop.sock_sendall(one, encode({"event": "late", "fields": {}}))
        assert Codec().receive(await loop.sock_recv(one, 1000)) == [{"id": 1, "result": 3}]
        assert await loop.sock_recv(one, 1000) == b""
        assert not closing.done()
        one.close()
        await closing

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_channel_whose_other_end_does_not_close_is_closed_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CLOSE_TIMEOUT_S", 0.01)

    async def run() -> None:
        one, other = socket.socketpair()
        answering = await Channel.connect(other, answer, lambda kind, fields: None, lambda: None)
        await answering.close()
        one.close()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_events_arrive_in_order_beside_replies() -> None:
    async def use(asking: Channel, answering: Channel, heard: list[str]) -> None:
        for kind in ("one", "two", "three"):
            answering.notify(kind, {})
        assert await asking.call("add", a=1, b=2) == 3
        assert heard == ["one", "two", "three"]

    with_channel(use)

"""The channel between the control process and the data process: requests, replies and events over a socketpair.

Theory: a frame is a 32-bit big-endian length and one JSON object. A request has `call`, `id` and `arguments`; its
reply has the same `id` and either `result` or `error`; an event has `event` and `fields`. Both ends of the
socketpair are ours, so a frame that breaks the rules is a bug: ChannelError, and the channel is closed.

Rules
- Nothing of a client's data passes here. `Codec` does no I/O; `Channel` is the thin shell around it.
- Who closes says so and waits until the other end has closed too: a socket that is closed at once breaks what the
  other end is just writing, and asyncio then drops what it has not read, the last reply with it.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

MAX_FRAME_BYTES = 16 << 20
"""Room for the status of some ten thousand clients; more is a bug."""

CLOSE_TIMEOUT_S = 10.0  # for the other end to have read the last that was written

_LENGTH_BYTES = 4

Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Answers a request of the other end with something JSON can hold, or raises: the message travels back."""


class ChannelError(Exception):
    """The channel broke or the other end broke its rules."""


class RemoteError(Exception):
    """The other end refused the request. `kind` is the name of its exception's class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def encode(message: dict[str, Any]) -> bytes:
    """Return the frame of one message. Raises ChannelError when it is too large."""
    body = json.dumps(message, separators=(",", ":"), default=str).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise ChannelError(f"a message of {len(body)} bytes is too large for the channel")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class Codec:
    """Bytes in, whole messages out."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def receive(self, data: bytes) -> list[dict[str, Any]]:
        """Take the next bytes and return the messages that are complete. Raises ChannelError."""
        self._pending += data
        messages: list[dict[str, Any]] = []
        while len(self._pending) >= _LENGTH_BYTES:
            length = int.from_bytes(self._pending[:_LENGTH_BYTES], "big")
            if length > MAX_FRAME_BYTES:
                raise ChannelError(f"a frame of {length} bytes is too large for the channel")
            end = _LENGTH_BYTES + length
            if len(self._pending) < end:
                break
            try:
                message = json.loads(self._pending[_LENGTH_BYTES:end])
            except ValueError as error:
                raise ChannelError(f"a frame is not JSON: {error}") from None
            if not isinstance(message, dict):
                raise ChannelError("a frame is not a JSON object")
            del self._pending[:end]
            messages.append(message)
        return messages


class Channel(asyncio.Protocol):
    """One end of the channel, on a running loop."""

    def __init__(
        self, handler: Handler, event: Callable[[str, dict[str, Any]], None], lost: Callable[[], None]
    ) -> None:
        self._handler = handler
        self._event = event
        self._lost = lost
        self._codec = Codec()
        self._transport: asyncio.WriteTransport | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._gone = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @staticmethod
    async def connect(
        sock: socket.socket,
        handler: Handler,
        event: Callable[[str, dict[str, Any]], None],
        lost: Callable[[], None],
    ) -> "Channel":
        """Take over a connected unix socket."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: Channel(handler, event, lost), sock=sock)
        return channel

    async def call(self, name: str, **arguments: Any) -> Any:
        """Ask the other end. Raises RemoteError when it refuses, ChannelError when it is gone."""
        if self._transport is None:
            raise ChannelError("the data process is not running")
        self._last_id += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[self._last_id] = future
        call_id = self._last_id
        try:
            self._transport.write(encode({"call": name, "id": call_id, "arguments": arguments}))
            return await future
        finally:
            self._calls.pop(call_id, None)

    def notify(self, kind: str, fields: dict[str, Any]) -> None:
        """Send an event; dropped when the other end is gone."""
        if self._transport is not None:
            self._transport.write(encode({"event": kind, "fields": fields}))

    async def close(self) -> None:
        """Close once the other end has read what was written and has closed, or after CLOSE_TIMEOUT_S."""
        if self._transport is not None:
            self._transport.write_eof()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), CLOSE_TIMEOUT_S)
        if self._transport is not None:
            self._transport.abort()
            await self._gone.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._codec.receive(data):
                self._dispatch(message)
        except ChannelError:
            if self._transport is not None:
                self._transport.abort()
            raise

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._gone.set()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(ChannelError("the data process ended"))
        self._lost()

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._event(message["event"], message["fields"])
        elif "call" in message:
            task = asyncio.get_running_loop().create_task(self._answer(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif message.get("id") in self._calls:
            future = self._calls[message["id"]]
            if future.done():
                return
            if "error" in message:
                future.set_exception(RemoteError(message["kind"], message["error"]))
            else:
                future.set_result(message["result"])

    async def _answer(self, message: dict[str, Any]) -> None:
        try:
            reply = {"id": message["id"], "result": await self._handler(message["call"], message["arguments"])}
        except Exception as error:  # whatever it was, the asking end has to hear of it
            reply = {"id": message["id"], "kind": type(error).__name__, "error": str(error) or repr(error)}
        if self._transport is not None:
            self._transport.write(encode(reply))

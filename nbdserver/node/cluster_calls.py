"""Calls between nodes: a question and an answer, each a line of JSON, over a TLS stream of their own.

Theory: few things need an answer of one certain node: letting a new node in, changing the cluster's key, striking a
member at the master. They are rare, so each has its own stream, which TLS tells from others (tls_network.py).

Rules
- REQUEST_BYTES of question in REQUEST_S, ANSWER_BYTES of answer, MOST_CALLS at a time; what is beyond is cut off.
- A refusal is the answer {"error": one line}. Whoever asked gets it as a NodeError.
- Who asked is the name in the verified certificate, "" for who has none; what that is worth, the answering side knows.
"""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from metadata.seams import Clock, Receiver, Timer
from nbdserver.host.tls import TlsConnection
from nbdserver.node.addresses import split_address
from nbdserver.node.errors import NodeError

REQUEST_BYTES = 64 << 10
REQUEST_S = 10.0
ANSWER_BYTES = 4 << 20
MOST_CALLS = 64
CALL_S = 15.0

Answering = Callable[[str, str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""(certificate's name, peer, question) → answer; raises NodeError."""


class CallServer:
    """Answers the calls that come in."""

    def __init__(self, clock: Clock, answering: Answering) -> None:
        self._clock = clock
        self._answering = answering
        self._calls: set[_Call] = set()

    def accept(self, stream: TlsConnection) -> Receiver | None:
        if len(self._calls) >= MOST_CALLS:
            return None
        call = _Call(self._clock, stream, self._answering, self._calls.discard)
        self._calls.add(call)
        return call

    def close(self) -> None:
        for call in list(self._calls):
            call.end()


class _Call:
    """One call; the Receiver of its stream."""

    def __init__(
        self, clock: Clock, stream: TlsConnection, answering: Answering, ended: Callable[["_Call"], None]
    ) -> None:
        self._stream = stream
        self._answering = answering
        self._ended = ended
        self._buffer = memoryview(bytearray(REQUEST_BYTES))
        self._filled_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._timer: Timer = clock.call_later(REQUEST_S, self._too_late)

    def end(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._stream.close()
        self._ended(self)

    def _too_late(self) -> None:
        if self._task is None:
            self.end()

    async def _answer(self, question: bytes) -> None:
        try:
            content = json.loads(question)
            if not isinstance(content, dict):
                raise ValueError("no object")
            answer = await self._answering(self._stream.certificate, self._stream.peer_name, content)
        except NodeError as error:
            answer = {"error": str(error)}
        except ValueError:
            answer = {"error": "the question is no line of JSON"}
        except OSError as error:
            answer = {"error": str(error)}
        self._stream.send([json.dumps(answer).encode() + b"\n"])
        self._task = None
        self.end()

    # --- the Receiver ---

    def buffer(self) -> memoryview:
        return self._buffer[self._filled_bytes :]

    def received(self, size_bytes: int) -> None:
        if self._task is not None:
            return
        self._filled_bytes += size_bytes
        question, newline, _ = bytes(self._buffer[: self._filled_bytes]).partition(b"\n")
        if newline:
            self._filled_bytes = 0
            self._task = asyncio.get_running_loop().create_task(self._answer(question))
        elif self._filled_bytes == REQUEST_BYTES:
            self.end()

    def drained(self) -> None:
        pass

    def lost(self, reason: str) -> None:
        self.end()


class NotReachedError(NodeError):
    """The node cannot be asked: nothing of the question has reached it."""


async def call(
    address: str, context: ssl.SSLContext, question: dict[str, Any], timeout_s: float = CALL_S
) -> dict[str, Any]:
    """Ask the node at IP:PORT. NotReachedError; NodeError: it refuses, or has not answered in time."""
    host, port = split_address(address)
    is_reached = False
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=context, limit=ANSWER_BYTES)
            is_reached = True
            try:
                writer.write(json.dumps(question).encode() + b"\n")
                await writer.drain()
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
    except ssl.SSLCertVerificationError as error:
        raise NotReachedError(f"{address} is not a node of this cluster: {error.verify_message}") from None
    except TimeoutError:
        kind = NodeError if is_reached else NotReachedError
        raise kind(f"{address} has not answered in {timeout_s:.0f} s") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it hung up"
        kind = NodeError if is_reached else NotReachedError
        raise kind(f"{address} cannot be asked: {reason}") from None
    if not isinstance(answer, dict):
        raise NodeError(f"{address} answers in a way that this program does not know")
    if "error" in answer:
        raise NodeError(f"{address} refuses: {answer['error']}")
    return answer

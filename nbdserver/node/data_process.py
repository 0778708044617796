"""The data process, seen from the control process: start it, talk to it, notice its end.

Rules
- It is a new program (`python -m nbdserver.node.data`), never a fork of this one: nothing of FastAPI, typer or a
  thread comes along.
- It dies with its parent: the kernel kills it (PR_SET_PDEATHSIG, set by the child itself right after its start,
  which then looks whether the parent is still there), and the end of the channel ends it where that signal cannot.
- It inherits exactly: its end of the channel, its end of a second socketpair over which descriptors go with requests
  (`send_descriptors` before the call) and come back, the lock of the data directory, which is held until both are gone,
  and what `Shared` has of all data processes.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdserver.node.channel import Channel, ChannelError, Handler, RemoteError
from nbdserver.node.descriptors import receive_descriptors, send_descriptors
from nbdserver.node.errors import ConflictError, NodeError

DESCRIPTORS_TIMEOUT_S = 5.0
"""They are sent before the reply that announces them."""


class DataProcessError(NodeError):
    """The data process could not do it, or is gone. `kind` is the class of its exception, or "" when it is gone."""

    http_status = 503

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Shared:
    """Descriptors that all data processes of a node have."""

    lock: int
    figures: int
    inboxes: Sequence[tuple[int, int]]  # (read end, write end) for each process; none for one alone

    def of(self, worker: int) -> tuple[int, ...]:
        """Those of one process: figures, lock, and if it is not alone its inbox and the write ends of all."""
        inbox = self.inboxes[worker][0:1] if self.inboxes else ()
        return (self.figures, self.lock, *inbox, *(writing for _, writing in self.inboxes))


class DataProcess:
    """One running data process."""

    def __init__(
        self,
        worker: int,
        process: subprocess.Popen[bytes],
        channel: Channel,
        descriptors: socket.socket,
        ended: asyncio.Event,
    ) -> None:
        self.worker = worker
        self.is_serving = False  # it accepts clients
        self._process = process
        self._channel = channel
        self._descriptors = descriptors
        self._ended = ended

    @property
    def pid(self) -> int:
        return self._process.pid

    @staticmethod
    async def start(
        worker: int,
        workers: int,
        shared: Shared,
        event: Callable[[str, dict[str, Any]], None],
        answer: Handler | None = None,
    ) -> "DataProcess":
        """Start the one with the number `worker` of `workers`. `event` gets what it reports, `answer` what it asks."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        receiving, sending = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        package_root = str(Path(__file__).resolve().parents[2])
        environment = dict(os.environ)
        search_path = [package_root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(search_path)
        # -P: the working directory is not searched, where a stranger's `protocol` could lie.
        passed = (theirs.fileno(), sending.fileno(), *shared.of(worker))
        arguments = (os.getpid(), worker, workers, *passed)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nbdserver.node.data", *map(str, arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=passed,
            process_group=0,  # Ctrl-C at a terminal goes to the control process alone
        )
        theirs.close()
        sending.close()
        receiving.settimeout(DESCRIPTORS_TIMEOUT_S)
        ended = asyncio.Event()
        channel = await Channel.connect(ours, answer or _refuse, event, ended.set)
        return DataProcess(worker, process, channel, receiving, ended)

    def notify(self, kind: str, fields: dict[str, Any]) -> None:
        """Tell it something; what is called afterwards comes after it."""
        self._channel.notify(kind, fields)

    async def call(self, name: str, **arguments: Any) -> Any:
        """Ask it. Raises DataProcessError with its sentence, ConflictError for what an export refuses."""
        try:
            return await self._channel.call(name, **arguments)
        except RemoteError as error:
            if error.kind == "ExportError":
                raise ConflictError(str(error)) from None
            raise DataProcessError(str(error), error.kind) from None
        except ChannelError as error:
            raise DataProcessError(str(error)) from None

    def send_descriptors(self, descriptors: Sequence[int]) -> None:
        """Send those that the next call is about; they stay ours. DataProcessError."""
        try:
            send_descriptors(self._descriptors, descriptors)
        except OSError as error:
            raise DataProcessError(f"the data process does not take what is handed to it: {error}") from None

    def receive_descriptors(self, count: int) -> list[int]:
        """Take the descriptors that it has sent. DataProcessError if they are not there."""
        try:
            return receive_descriptors(self._descriptors, count)
        except OSError as error:
            raise DataProcessError(f"the data process did not hand its clients over: {error}") from None

    async def wait(self) -> int:
        """Wait for its end and return its exit code (negative: the signal)."""
        await self._ended.wait()
        code = await asyncio.to_thread(self._process.wait)
        self._descriptors.close()
        return code

    def kill(self) -> None:
        self._process.kill()


async def _refuse(name: str, arguments: dict[str, Any]) -> Any:
    raise ChannelError(f"the control process does not answer {name}")

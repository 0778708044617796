"""The data process, seen from the control process: start it, talk to it, notice its end.

Rules
- It is a new program (`python -m nbdserver.node.data`), never a fork of this one: nothing of FastAPI, typer or a
  thread comes along.
- It dies with its parent: the kernel kills it (PR_SET_PDEATHSIG, set by the child itself right after its start,
  which then looks whether the parent is still there), and the end of the channel ends it where that signal cannot.
- It inherits exactly: its end of the channel, its end of a second socketpair over which descriptors come back when
  clients are handed over, the lock of the data directory, which is held until both are gone, and what it is to serve
  from the start.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nbdserver.node.channel import Channel, ChannelError, RemoteError
from nbdserver.node.descriptors import receive_descriptors
from nbdserver.node.errors import ConflictError, NodeError

DESCRIPTORS_TIMEOUT_S = 5.0
"""They are sent before the reply that announces them."""


class DataProcessError(NodeError):
    """The data process could not do it, or is gone. `kind` is the class of its exception, or "" when it is gone."""

    http_status = 503

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class DataProcess:
    """One running data process."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: Channel,
        descriptors: socket.socket,
        ended: asyncio.Event,
    ) -> None:
        self._process = process
        self._channel = channel
        self._descriptors = descriptors
        self._ended = ended

    @property
    def pid(self) -> int:
        return self._process.pid

    @staticmethod
    async def start(
        lock_descriptor: int, event: Callable[[str, dict[str, Any]], None], passed: Sequence[int] = ()
    ) -> "DataProcess":
        """Start one. `event` gets what it reports; it has the descriptors `passed`, under the same numbers."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        receiving, sending = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        package_root = str(Path(__file__).resolve().parents[2])
        environment = dict(os.environ)
        search_path = [package_root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(search_path)
        # -P: the working directory is not searched, where a stranger's `protocol` could lie.
        descriptors = (theirs.fileno(), sending.fileno())
        command = [sys.executable, "-P", "-m", "nbdserver.node.data", *map(str, descriptors), str(os.getpid())]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(*descriptors, lock_descriptor, *passed),
            process_group=0,  # Ctrl-C at a terminal goes to the control process alone
        )
        theirs.close()
        sending.close()
        receiving.settimeout(DESCRIPTORS_TIMEOUT_S)
        ended = asyncio.Event()
        channel = await Channel.connect(ours, _refuse, event, ended.set)
        return DataProcess(process, channel, receiving, ended)

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
    raise ChannelError(f"the control process answers no requests, not {name} either")

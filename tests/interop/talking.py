"""Clients that write and read back all the while, each over blocks of its own, and say in the end whether anything was
wrong: one of ours that judges what it is shown, and fio that verifies."""

import random
import signal
import subprocess
import threading
import time
from pathlib import Path

from protocol.agreement import ReplyStyle
from protocol.nbd import Command
from tests.conftest import Processes
from tests.durability import Judge
from tests.nbd_client import Client

BLOCK_BYTES = 4096
JUDGED_BLOCKS = 256
ANSWER_S = 60.0
BURST_S = 0.02
REST_S = 0.1  # the nodes are on this machine too
FIO_BYTES = 8 << 20
INTERRUPTED = 128
"""What fio adds to its exit code, which is otherwise 0 if nothing was wrong."""


class Talker:
    """A client of ours, in a thread."""

    def __init__(self, port: int, name: str, first_block: int, style: ReplyStyle = ReplyStyle.SIMPLE) -> None:
        self.judge = Judge(JUDGED_BLOCKS, random.Random(first_block))
        self._client = _Behind(("127.0.0.1", port), name, ANSWER_S, style)
        self._client.begins = first_block * BLOCK_BYTES
        self._failure: BaseException | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                self.judge.write_until(self._client, time.monotonic() + BURST_S, finish=True)
                time.sleep(REST_S)
            self.judge.check(self._client, acknowledged_too=True)
        except BaseException as error:
            self._failure = error
        finally:
            self._client.close()

    def end(self) -> None:
        """It reads everything, and goes. What was wrong is raised."""
        self._is_over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure


class _Behind(Client):
    """A client whose blocks begin somewhere."""

    begins = 0

    def pack(self, cookie: int, command: Command, offset: int, length: int, data: bytes, flags: int) -> bytes:
        return super().pack(cookie, command, offset + (self.begins if length or data else 0), length, data, flags)


class Verifying:
    """fio, which reads back what it has written some requests ago."""

    def __init__(self, processes: Processes, fio: str, uri: str, first_block: int, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = processes.start(
                [
                    fio, "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=16",
                    f"--offset={first_block * BLOCK_BYTES}", f"--size={FIO_BYTES}", "--time_based", "--runtime=600",
                    "--rate_iops=200", "--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1",
                    "--verify_state_save=0",
                ],
                stdout=output.fileno(),
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def end(self) -> None:
        """Let it say whether all was well."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        code = self._process.wait(ANSWER_S)
        told = self._log.read_text()
        assert code == INTERRUPTED, told
        assert "err= 0" in told, told

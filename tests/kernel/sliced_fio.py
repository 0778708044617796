"""fio beside the judge, while power is cut: other people's writer, and other people's eye for what is lost.

Theory: fio writes slices of a range of its own through one node, one after the other, every block of a slice once, in
random order, with a checksum in it. It flushes now and then and at a slice's end, and each slice has connections of its
own. The range is trimmed before, so that a write which is lost shows zeros. A slice that has ended leaves a file, its
verify state. When the round is over fio is held to its own words:

- A slice behind which another one has ended was flushed: it is there, whoever has lost their power.
- If its node has kept its power, and so has what it had an answer for, it was never told of an error, is ended now, and
  all of that is there. Only that a slice was refused while nobody served the volume can be.

Known weakness: fio 3.33 takes no notice of a flush that fails, so the last slice that has ended does not count as
flushed. When its connection is cut it may hang, and counts what was under way as written: it is killed then. Of a slice
with few writes its verify state tells too much, and it may leave out the last ones that it had an answer for.
"""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import Processes
from tests.durability import BLOCK_BYTES
from tests.kernel.powered import JUDGED_BLOCKS, VOLUME

SLICES = 8
SLICE_BLOCKS = 32
SLICE_BYTES = SLICE_BLOCKS * BLOCK_BYTES
FROM = JUDGED_BLOCKS * BLOCK_BYTES
SIZE_BYTES = SLICES * SLICE_BYTES
DEPTH = 4
FEW = 2 * DEPTH
RATE_IOPS = 40
PATIENCE_S = 300.0
LOOK_S = 0.1
WRITE = "do_verify=0\nfsync=16\nend_fsync=1\nexitall_on_error=1\n"
VERIFY = "verify_only=1\nverify_state_load=1\nverify_state_save=0\ncontinue_on_error=verify\n"


class SlicedFio:
    """One run of it."""

    def __init__(self, processes: Processes, fio: str, folder: Path, port: int, seed: int) -> None:
        """It writes through the node at that port of loopback; `folder` is made for it."""
        self._processes = processes
        self._program = fio
        self._folder = folder
        self._seed = seed
        self._answered: dict[int, int] = {}  # so many at least of the last slice, if it is known
        folder.mkdir()
        self._process = self._start("write", port, f"{WRITE}rate_iops={RATE_IOPS}\n", range(SLICES))

    def wait_until_flushed(self) -> None:
        """Wait until a slice has to be there whatever happens."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.flushed:
            assert self._process.poll() is None, f"fio has ended: {self._words('write')}"
            assert time.monotonic() < deadline_s, f"fio has not written two slices in {PATIENCE_S:.0f} s"
            time.sleep(LOOK_S)

    @property
    def flushed(self) -> list[int]:
        """The slices that must be there."""
        return self._ended()[:-1]

    def end(self, is_answered: bool) -> None:
        """End it, if it still writes; `is_answered`: it has to have had an answer for everything."""
        if not is_answered:
            self._process.kill()
            self._process.wait()
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        jobs = self._report("write", self._process)
        failed = [job["jobname"] for job in jobs if job["error"] and job["write"]["total_ios"]]
        assert not failed, f"fio was told of errors in {failed}: {self._words('write')}"
        answered = {number: int(jobs[number]["write"]["total_ios"]) for number in self._ended()[-1:]}
        self._answered = {number: writes - FEW for number, writes in answered.items() if writes > FEW}

    def verify(self, port: int) -> None:
        """Read what must be there, through the node at that port. AssertionError for what is not."""
        least = dict.fromkeys(self.flushed, SLICE_BLOCKS) | self._answered
        assert least, f"a run in which nothing was flushed shows nothing: {self._words('write')}"
        jobs = self._report("verify", self._start("verify", port, VERIFY, list(least)))
        read = {number: job["read"]["total_ios"] for number, job in zip(least, jobs, strict=True) if not job["error"]}
        assert read.keys() == least.keys(), f"{list(least - read.keys())} are not as written: {self._words('verify')}"
        assert all(read[number] >= least[number] for number in least), f"of {least} it has read {read}"
        shutil.rmtree(self._folder)

    def _ended(self) -> list[int]:
        """The slices that have a state, up to one that was refused."""
        states = [self._folder / f"local-s{number}-{number}-verify.state" for number in range(SLICES)]
        return list(range(next((number for number, state in enumerate(states) if not state.exists()), SLICES)))

    def _words(self, what: str) -> str:
        return (self._folder / f"{what}.words").read_text()[-2000:]

    def _start(self, what: str, port: int, settings: str, numbers: Sequence[int]) -> "subprocess.Popen[bytes]":
        uri = f"nbd://127.0.0.1:{port}/{VOLUME}"
        job = (
            f"[global]\nthread=1\nioengine=nbd\nuri={uri}\nrw=randwrite\nbs={BLOCK_BYTES}\nsize={SLICE_BYTES}\n"
            f"iodepth={DEPTH}\nrandrepeat=0\nrandseed={self._seed}\nverify=crc32c\nstonewall\n{settings}"
        )
        job += "".join(f"[s{number}]\noffset={FROM + number * SLICE_BYTES}\n" for number in numbers)
        (self._folder / f"{what}.fio").write_text(job)
        command = [self._program, "--output-format=json", f"--output={what}.json", f"{what}.fio"]
        with (self._folder / f"{what}.words").open("wb") as words:
            return self._processes.start(command, cwd=self._folder, stdout=words, stderr=words)

    def _report(self, what: str, process: "subprocess.Popen[bytes]") -> list[dict[str, Any]]:
        """What it says of each slice when it has ended."""
        process.wait(PATIENCE_S)
        report = (self._folder / f"{what}.json").read_text()  # what went wrong may stand before it
        begin = re.search(r"^\{", report, re.MULTILINE)
        assert begin is not None, f"{report[-2000:]} {self._words(what)}"
        jobs: list[dict[str, Any]] = json.loads(report[begin.start() :])["jobs"]
        return jobs

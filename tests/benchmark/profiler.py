"""`--profile ROW`: where our data process spends its time while fio does one row.

py-spy samples the Python stack from outside the process, without stopping it. *Self* is the time with the function on
top of the stack (built-ins and system calls count for the Python line that called them), *with callees* the time with
it anywhere on the stack. A second run under strace counts system calls.
"""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from .load import Sample, measure
from .processes import BenchmarkError, last_line
from .rows import Row
from .targets import Target

SAMPLES_PER_S = 500
TOP = 25


def py_spy() -> str:
    """Path of py-spy: beside the interpreter or on PATH."""
    found = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if found is None:
        raise BenchmarkError(f"py-spy is not installed: {sys.executable} -m pip install py-spy")
    return found


def serving_pid(target: Target, row: Row) -> int:
    """The process whose CPU grows while the row runs: of ours, the data process."""
    server = target.server
    if server is None:
        raise BenchmarkError(f"{target.name} is not running")
    before = server.cpu_ticks_by_pid()
    measure(target, row, 0.5, seed=3)
    after = server.cpu_ticks_by_pid()
    return max(after, key=lambda pid: after[pid] - before.get(pid, 0))


def profile(target: Target, row: Row, duration_s: float, output: Path) -> Sample:
    """Run the row with py-spy beside it; `output` gets stacks in the "folded" form that flame graphs are made from."""
    pid = serving_pid(target, row)
    command = [py_spy(), "record", "--pid", str(pid), "--duration", str(max(1, round(duration_s)))]
    command += ["--rate", str(SAMPLES_PER_S), "--format", "raw", "--nonblocking", "--output", str(output)]
    return measure_beside(command, output, target, row, duration_s, "it needs root or ptrace rights")


def measure_beside(command: list[str], output: Path, target: Target, row: Row, duration_s: float, hint: str) -> Sample:
    """Run the row while a profiler runs that ends by itself; BenchmarkError with its words if it leaves no output."""
    said: list[subprocess.CompletedProcess[str]] = []

    def record() -> None:
        said.append(subprocess.run(command, capture_output=True, text=True, check=False))

    recorder = threading.Thread(target=record)
    recorder.start()
    sample = measure(target, row, duration_s + 0.5, seed=1)
    recorder.join()
    if said[0].returncode or not output.exists():
        words = last_line(said[0].stderr + said[0].stdout)
        raise BenchmarkError(f"{Path(command[0]).name} failed: {words} ({hint})")
    return sample


def system_calls(target: Target, row: Row, duration_s: float, output: Path) -> list[tuple[str, float]]:
    """(system call, calls an operation) of the same process under `strace -c`, the most frequent first.

    [] without strace. It slows every call down, so batches are larger than without it: the figures are a lower bound.
    """
    if target.server is None or shutil.which("strace") is None:
        return []
    command = ["strace", "-f", "-c", "-p", str(serving_pid(target, row)), "-o", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as tracer:
        time.sleep(0.5)  # until it has attached
        sample = measure(target, row, duration_s, seed=2)
        tracer.send_signal(signal.SIGINT)  # on which it detaches and writes the table
    return calls_per_operation(output.read_text(), sample.operations)


def calls_per_operation(table: str, operations: int) -> list[tuple[str, float]]:
    """From the table that `strace -c` writes."""
    counted: list[tuple[str, float]] = []
    for line in table.splitlines():
        fields = line.split()
        if len(fields) >= 5 and fields[3].isdigit() and fields[-1] != "total":
            counted.append((fields[-1], int(fields[3]) / operations))
    return sorted(counted, key=lambda item: item[1], reverse=True)


def top_functions(folded: str) -> list[tuple[str, float, float]]:
    """(function, self %, with callees %) of a folded profile, the greatest self first."""
    alone: Counter[str] = Counter()
    anywhere: Counter[str] = Counter()
    total = 0
    for line in folded.splitlines():
        stack, _, count_text = line.rpartition(" ")
        if not stack:
            continue
        count = int(count_text)
        total += count
        frames = [frame.rsplit(":", 1)[0].rstrip(")") + ")" for frame in stack.split(";")]
        alone[frames[-1]] += count
        for frame in set(frames):
            anywhere[frame] += count
    return [
        (frame, count / total * 100, anywhere[frame] / total * 100) for frame, count in alone.most_common(TOP) if total
    ]


def top_lines(folded: str) -> list[tuple[str, float]]:
    """(function:line, self %): which line of a function it is."""
    alone: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, count_text = line.rpartition(" ")
        if stack:
            alone[stack.rsplit(";", 1)[-1]] += int(count_text)
    total = sum(alone.values())
    return [(frame, count / total * 100) for frame, count in alone.most_common(TOP)]

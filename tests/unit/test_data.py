"""The data process: what ends it."""

import subprocess
import sys

from nbdserver.node.data import EXIT_DEFECT
from tests.conftest import ROOT

PROGRAM = """
import asyncio, sys
from nbdserver.host.completions import Completions
from nbdserver.node.data import end_on_defect

async def fail():
    raise ZeroDivisionError

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(end_on_defect)
    {0}
    await asyncio.sleep(0.2)
    print("went on")

asyncio.run(main())
"""


def run(failing: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(failing)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_callback_that_fails_ends_the_process_with_its_traceback() -> None:
    result = run("loop.call_soon(lambda: 1 / 0)")
    assert (result.returncode, result.stdout) == (EXIT_DEFECT, "")
    assert "ZeroDivisionError" in result.stderr


def test_a_completion_that_fails_ends_the_process() -> None:
    result = run("Completions(loop).post(lambda: 1 / 0, ())")
    assert (result.returncode, result.stdout) == (EXIT_DEFECT, "")


def test_a_task_that_fails_is_its_owners_affair() -> None:
    result = run("asyncio.ensure_future(fail())")
    assert (result.returncode, result.stdout) == (0, "went on\n")
    assert "ZeroDivisionError" in result.stderr

"""The same run in other processes: what only looks repeatable is found where strings hash otherwise."""

import subprocess
import sys

from tests.conftest import ROOT

HASH_SEEDS = ("1", "2")


def printed_elsewhere(program: str) -> set[str]:
    """What a program prints in processes of its own, one for each of HASH_SEEDS."""
    return {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in HASH_SEEDS
    }

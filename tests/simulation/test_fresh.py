"""Seeds that nobody has tried before, by the command that people use: some seconds of them in every run of the tests,
two minutes on all cores in CI.

Which seeds is drawn from the sources: each change is tried with others, and a commit fails where it failed before.
`make simulate` takes new ones each time.
"""

import hashlib
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, product_sources
from tests.simulation import __main__ as command
from tests.simulation.seeds import WORLDS, Story, Tried

FRESH_S = float(os.environ.get("SIMULATION_FRESH_S") or (120 if os.environ.get("REQUIRE_ALL") == "1" else 3))


def first_seed() -> int:
    digest = hashlib.sha256()
    for path in (*product_sources(), *sorted((ROOT / "tests" / "simulation").rglob("*.py"))):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:5])


def test_fresh_seeds_break_no_promise() -> None:
    arguments = [sys.executable, "-m", "tests.simulation", "--first", str(first_seed()), "--minutes", str(FRESH_S / 60)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: 0;" in done.stdout.splitlines()[-1]


def _fragile(seed: int, story: Story | None) -> Tried:
    if story is not None:
        story("once upon a time")
    return Tried("fragile", seed, "it broke" if seed % 3 == 0 else "", f"{seed:08x}", "a summary", 0.01, 10, 5.0)


def test_a_seed_that_fails_is_printed_with_the_command_that_replays_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORLDS, "fragile", _fragile)
    assert command.explore(["fragile"], 1, 60.0) == 1
    said = capsys.readouterr().out
    assert "fragile, seed 3: it broke\n    make simulate WORLD=fragile SEED=3\n" in said
    assert "(1,000 events/s, 500 node-seconds/s a core)" in said.splitlines()[-1]
    assert command.tell("fragile", 3) == 1
    assert command.tell("fragile", 4) == 0
    said = capsys.readouterr().out
    assert said.count("once upon a time") == 2
    assert "fragile, seed 3: it broke; fingerprint 00000003\na summary\n" in said
    assert "fragile, seed 4: fine" in said

"""Runs the levels of tests in order and says how long each took: `make test`.

Each level is one pytest run, so that a level that crashes does not take the others with it. Counts come from
pytest's own JUnit report. A level with no tests is shown as such, and is a failure under REQUIRE_ALL=1.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS_COLLECTED = 5  # pytest's exit code
MINUTE_S = 60.0


@dataclass
class Level:
    """One pytest run: its name, folder, extra arguments and the time it is meant to stay under."""

    name: str
    folder: str
    arguments: tuple[str, ...]
    budget_s: float


LEVELS = (
    Level("units", "tests/unit", ("-n", "2"), 2 * MINUTE_S),
    Level("simulation", "tests/simulation", ("-n", "2"), 4 * MINUTE_S),
    # Four at once: they wait more than they work. In the order of their names: xdist would begin with the files of many
    # tests, and the longest have one or two.
    Level("real processes", "tests/interop", ("-n", "4", "--dist", "loadfile", "--no-loadscope-reorder"), 5 * MINUTE_S),
    Level("guests", "tests/kernel", ("-n", "2", "--dist", "loadfile"), 3 * MINUTE_S),
)


@dataclass
class Result:
    """What one level did."""

    level: Level
    duration_s: float
    passed: int
    failed: int
    skipped: int
    exit_code: int

    def is_failure(self, require_all: bool) -> bool:
        if self.exit_code == NO_TESTS_COLLECTED:
            return require_all
        return self.exit_code != 0 or self.failed > 0

    def words(self) -> str:
        if self.exit_code == NO_TESTS_COLLECTED:
            return "no tests"
        if self.exit_code and not self.failed:
            return f"pytest exit code {self.exit_code}"
        parts = [f"{self.passed} passed"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        return ", ".join(parts)


def count(report: Path) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a JUnit report; zeros if there is none."""
    if not report.exists():
        return 0, 0, 0
    total = failed = skipped = 0
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return max(0, total - failed - skipped), failed, skipped


def run(level: Level, scratch: Path) -> Result:
    print(f"\n=== {level.name}: {level.folder}", flush=True)
    report = scratch / f"{level.folder.replace('/', '-')}.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *level.arguments, level.folder]
    start = time.monotonic()
    exit_code = subprocess.run(command, cwd=ROOT, check=False).returncode
    duration_s = time.monotonic() - start
    passed, failed, skipped = count(report)
    result = Result(level, duration_s, passed, failed, skipped, exit_code)
    print(f"=== {level.name}: {result.words()} in {duration_s:.1f} s", flush=True)
    return result


def main() -> int:
    require_all = os.environ.get("REQUIRE_ALL") == "1"
    with tempfile.TemporaryDirectory(prefix="nbdserver-test-") as scratch:
        try:
            results = [run(level, Path(scratch)) for level in LEVELS]
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
    print("\nlevel            time       meant     result")
    for result in results:
        late = "  (over its time)" if result.duration_s > result.level.budget_s else ""
        time_columns = f"{result.duration_s:7.1f} s  < {result.level.budget_s:4.0f} s"
        print(f"{result.level.name:<16} {time_columns}  {result.words()}{late}")
    failures = [result for result in results if result.is_failure(require_all)]
    total = ", ".join(
        f"{number} {word}"
        for word, number in (
            ("passed", sum(result.passed for result in results)),
            ("failed", sum(result.failed for result in results)),
            ("skipped", sum(result.skipped for result in results)),
        )
        if number or word == "passed"
    )
    if failures:
        total += f"; not well: {', '.join(result.level.name for result in failures)}"
    print(f"==== {total} in {sum(result.duration_s for result in results):.1f} s ====")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

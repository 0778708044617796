"""The run: prefill, the search for the peers' best settings, then rows, rounds and targets.

Order: rows one after the other; in a row, rounds; in a round, every target once, the first one changing from round to
round. So what is compared was measured within seconds, and being first or last favours nobody.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .conditions import Conditions
from .load import START_UP_S, Sample, fio_version, measure, prefill, scatter, warm
from .processes import BenchmarkError
from .ratios import Ratio, ratio_to_best_peer
from .rows import Row
from .targets import SUBJECT, Setting, Target

SEARCH_S = 0.8
FINALISTS = 2
PREFILL_S = 5.0
SCATTER_S = 10.0
WRITE_BACK_S = 0.4

Advance = Callable[[float, str], None]
"""Called with the planned seconds that were just worked off, and what comes next."""
Say = Callable[[str], None]
Samples = dict[str, list[Sample]]
"""Of a row: target → one Sample for each round."""


def planned_s(rows: list[Row], targets: list[Target], rounds: int, duration_s: float) -> float:
    """Estimate of `measure_rows`."""
    layouts = sum(row.laid_out * PREFILL_S + row.scattered * SCATTER_S for row in rows)
    return sum(rounds * len(targets) * _planned_run_s(row, duration_s) for row in rows) + layouts * len(targets)


def planned_search_s(rows: list[Row], targets: list[Target]) -> float:
    """Estimate of `search_settings`."""
    runs = sum(len(target.settings) + FINALISTS for target in targets if len(target.settings) > 1)
    return sum(runs * _planned_run_s(row, SEARCH_S) for row in rows)


def _planned_run_s(row: Row, duration_s: float) -> float:
    return duration_s + START_UP_S + (WRITE_BACK_S if row.writes else 0)


def prepare(targets: list[Target], advance: Advance = lambda worked_off_s, what: None) -> None:
    """Make every disk and fill it through NBD."""
    for target in targets:
        advance(0, f"filling {target.title}")
        target.prepare()
        target.start(target.settings[0])
        prefill(target)
        advance(PREFILL_S, "")


class PeerSettings:
    """The best setting of each peer in each row, kept in one JSON file and used again by later runs.

    The file holds for one set of versions and conditions (size, limit of memory); anything else makes it void.
    """

    def __init__(self, path: Path, targets: list[Target], conditions: Conditions) -> None:
        self._path = path
        self._valid_for = {target.name: target.version() for target in targets if target.name != SUBJECT}
        self._conditions = {"fio": fio_version(), **asdict(conditions)}
        self.found: dict[str, dict[str, dict[str, Any]]] = {}
        try:
            stored = json.loads(path.read_text())
            same = all(stored["versions"].get(name) == version for name, version in self._valid_for.items())
            if same and stored["conditions"] == self._conditions:
                self.found = stored["best"]
        except (OSError, ValueError, KeyError, AttributeError):
            pass

    def missing_rows(self, rows: list[Row], targets: list[Target]) -> list[Row]:
        """The rows in which some target with a choice of settings has none yet."""
        return [
            row
            for row in rows
            if any(len(target.settings) > 1 and row.name not in self.found.get(target.name, {}) for target in targets)
        ]

    def best(self, target: Target, row: Row) -> Setting:
        name = self.found.get(target.name, {}).get(row.name, {}).get("setting")
        return next((setting for setting in target.settings if setting.name == name), target.settings[0])

    def save(self) -> None:
        content = {
            "versions": self._valid_for,
            "conditions": self._conditions,
            "searched": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "best": self.found,
        }
        self._path.write_text(json.dumps(content, indent=1) + "\n")


def search_settings(rows: list[Row], targets: list[Target], kept: PeerSettings, advance: Advance, say: Say) -> None:
    """Find each target's best setting in each row: every one once, the best FINALISTS again; the best run counts."""
    for target in targets:
        if len(target.settings) < 2:
            continue
        rates: dict[str, dict[str, float]] = {row.name: {} for row in rows}
        for setting in target.settings:
            _try_setting(target, setting, rows, rates, advance, say)
        for row in rows:
            finalists = sorted(rates[row.name], key=lambda name, row=row: rates[row.name][name])[-FINALISTS:]  # type: ignore[misc]
            for name in finalists:
                setting = next(setting for setting in target.settings if setting.name == name)
                _try_setting(target, setting, [row], rates, advance, say)
            best = max(rates[row.name], key=lambda name, row=row: rates[row.name][name])  # type: ignore[misc]
            tried = {name: round(rate) for name, rate in rates[row.name].items()}
            kept.found.setdefault(target.name, {})[row.name] = {"setting": best, "tried_operations_per_s": tried}
        target.stop()
        kept.save()


def _try_setting(
    target: Target,
    setting: Setting,
    rows: list[Row],
    rates: dict[str, dict[str, float]],
    advance: Advance,
    say: Say,
) -> None:
    try:
        advance(0, f"{target.title}: trying {setting.name}")
        target.start(setting)
        warm(target)
        for row in rows:
            rate = measure(target, row, SEARCH_S, seed=1).operations_per_s
            rates[row.name][setting.name] = max(rate, rates[row.name].get(setting.name, 0.0))
            advance(_planned_run_s(row, SEARCH_S), f"{target.title}: trying {setting.name}")
    except BenchmarkError as error:
        # A setting that this machine cannot run (say io_uring in a container) is no candidate; the default must run.
        if setting == target.settings[0]:
            raise
        target.stop()
        say(f"left out {target.title} with {setting.name}: {error}")


def measure_rows(
    rows: list[Row],
    targets: list[Target],
    rounds: int,
    duration_s: float,
    setting_of: Callable[[Target, Row], Setting],
    advance: Advance,
    is_laid_out: bool = True,
) -> dict[str, Samples]:
    """By the rows' names. `is_laid_out`: nothing was written since `prepare`."""
    samples: dict[str, Samples] = {}
    for row in rows:
        of_row: Samples = {target.name: [] for target in targets}
        for target in targets:
            target.start(setting_of(target, row))
            if row.laid_out and not is_laid_out:
                advance(0, f"writing {target.title} from end to end")
                prefill(target)
            if row.scattered:
                advance(0, f"overwriting {target.title} at random")
                scatter(target)
            warm(target)
        for number in range(rounds):
            first = number % len(targets)
            for target in targets[first:] + targets[:first]:
                advance(0, f"{row.title}: {target.title}")
                of_row[target.name].append(measure(target, row, duration_s, seed=number + 1))
                advance(_planned_run_s(row, duration_s), f"{row.title}: {target.title}")
        is_laid_out = row.laid_out or (is_laid_out and not row.writes and not row.scattered)
        samples[row.name] = of_row
    return samples


def ratio_of(samples: Samples, subject: str) -> Ratio | None:
    rates = {name: [sample.operations_per_s for sample in taken] for name, taken in samples.items()}
    return ratio_to_best_peer(rates, subject)


def ratio_between(samples: Samples, subject: str) -> Ratio:
    """The same where the subject and what it is compared with are known to be there."""
    ratio = ratio_of(samples, subject)
    if ratio is None:
        raise BenchmarkError("both servers are needed for a ratio")
    return ratio


def row_as_json(samples: Samples, ratio: Ratio | None) -> dict[str, Any]:
    """What the JSON file holds of a row that was compared."""
    return {
        "samples": {name: as_json(taken) for name, taken in samples.items()},
        "ratio": vars(ratio) if ratio else None,
    }


def as_json(samples: list[Sample]) -> dict[str, list[float]]:
    """Columns instead of records: what the JSON file holds."""
    columns: dict[str, list[float]] = {}
    for sample in samples:
        for key, value in asdict(sample).items():
            columns.setdefault(key, []).append(round(value, 5))
    return columns

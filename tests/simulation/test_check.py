"""The offline check finds nothing wrong before any opening of a simulated run: kill -9, power cuts, full disks."""

from typing import Any

import pytest

from nbdserver.logdisk.check import check_family
from nbdserver.logdisk.disk import LogDisk
from tests.simulation import run
from tests.simulation.faults import FaultMix
from tests.simulation.simulated_files import SimulatedFiles
from tests.simulation.simulated_store import SimulatedStore

CALM = FaultMix(cold_read=0.0)


@pytest.mark.parametrize("seed", [*range(12), 18, 20, 45, 54, 57])
def test_what_a_crash_leaves_is_clean(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[list[str]] = []
    real = LogDisk.open

    def checked(files: SimulatedFiles, store: SimulatedStore, clock: Any, *rest: Any) -> LogDisk:
        calm_files = SimulatedFiles(files._drive, clock, CALM)
        calm_store = SimulatedStore(store._table, clock, CALM, calm_files.world_ends)
        checks.append([finding.sentence for finding in check_family(calm_files, calm_store, quick=False).findings])
        return real(files, store, clock, *rest)

    monkeypatch.setattr(LogDisk, "open", checked)
    run.Run(seed).go()
    assert checks
    assert not any(checks), checks

"""Only what is behind the five seams differs from production.

Theory: a simulator proves something of production code only if that is what runs. So every module of the simulator is
listed here with what it is for; a running node is looked through, object by object, and may hold nothing of the
simulator but seams; and no class or module of production may have got anything from a test.
"""

import gc
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.cluster.directory import directory_run
from tests.simulation.cluster.faults import Mix
from tests.simulation.run import Run

ROOT = Path(__file__).resolve().parents[2]
PRODUCTION = ("nbdserver", "metadata", "protocol")

SEAM, DRIVES, JUDGES = "stands behind a seam", "makes things happen", "says what is right"
SIMULATOR_ONLY = {
    "__main__": DRIVES,
    "clones": JUDGES,
    "faults": DRIVES,
    "forwarding_stage": DRIVES,
    "registers": JUDGES,
    "replica_pair": DRIVES,
    "run": DRIVES,
    "seeds": DRIVES,
    "simulated_files": SEAM,
    "simulated_store": SEAM,
    "sizes": DRIVES,
    "snapshots": JUDGES,
    "world": SEAM,
    "cluster.cluster": DRIVES,
    "cluster.conftest": DRIVES,
    "cluster.directory": DRIVES,
    "cluster.directory_judge": JUDGES,
    "cluster.faults": DRIVES,
    "cluster.machine": SEAM,
    "cluster.nemesis": DRIVES,
    "cluster.paths": SEAM,
    "cluster.registry_twin": SEAM,
    "cluster.reruns": JUDGES,
    "cluster.scheduler": SEAM,
    "cluster.spread": DRIVES,
    "cluster.simulated_connecting": SEAM,
    "cluster.simulated_network": SEAM,
    "cluster.simulated_registry": SEAM,
    "cluster.simulated_streams": SEAM,
    "replication.in_memory": DRIVES,
    "replication.keeping": SEAM,
    "replication.log_stage": DRIVES,
    "replication.memory_log": SEAM,  # not one of the five: what the log disk is to a replica
    "replication.on_log_disks": DRIVES,
    "replication.plays": DRIVES,
    "replication.replicated": DRIVES,
    "replication.small_disks": DRIVES,
    "replication.stage": DRIVES,
    "replication.tree_steps": DRIVES,
    "replication.volumes": JUDGES,
}

SEAM_MODULES = {f"tests.simulation.{name}" for name, what in SIMULATOR_ONLY.items() if what == SEAM}


def kind_of(one: object) -> Any:
    """A function or a class itself, otherwise its class; of a method its owner's."""
    if isinstance(one, types.MethodType):
        return type(one.__self__)
    return one if isinstance(one, types.FunctionType | type) else type(one)


def held_by(root: object, outside: object) -> Iterable[object]:
    """Everything that can be reached from an object, but not through seams, classes, modules, globals or `outside`,
    which is what production code reports to."""
    seen = {id(root)}
    waiting = [root]
    while waiting:
        one = waiting.pop()
        owner = one.__self__ if isinstance(one, types.MethodType) else one
        if owner is outside or kind_of(one).__module__ in SEAM_MODULES:
            continue
        yield one
        inside: list[object] = gc.get_referents(one)
        if isinstance(one, type | types.ModuleType):
            inside = []
        elif isinstance(one, types.FunctionType):
            inside = [*(one.__defaults__ or ()), *(one.__closure__ or ())]
        for each in inside:
            if id(each) not in seen:
                seen.add(id(each))
                waiting.append(each)


def strangers(root: object, outside: object = None) -> set[str]:
    """Classes and functions of tests that an object holds and that are no seams."""
    kinds = [kind_of(one) for one in held_by(root, outside)]
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if kind.__module__.startswith("tests.")}


def test_every_module_of_the_simulator_is_listed() -> None:
    folder = ROOT / "tests" / "simulation"
    found = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if not path.name.startswith(("test_", "__init__"))
    }
    assert found == set(SIMULATOR_ONLY)


def test_a_running_disk_holds_nothing_of_the_simulator_but_seams() -> None:
    run = Run(3).go()
    assert strangers(run.disk, outside=run) == set()
    assert strangers(run.disk)  # what it reports to


def test_the_nodes_of_a_running_cluster_hold_nothing_of_the_simulator_but_seams() -> None:
    scenario, run = directory_run(3, Mix({"loss": 0.1, "stream reset": 0.05}))
    scenario.begin(run.cluster)
    run.cluster.run(20.0)  # no clients: their callbacks would be strangers
    nodes = [node for _, node in scenario.nodes()]
    assert len(nodes) > 2
    assert {name for node in nodes for name in strangers(node)} == set()


def test_production_has_got_nothing_from_a_test() -> None:
    changed = [
        f"{module.__name__}.{name}"
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType) and module.__name__.split(".")[0] in PRODUCTION
        for name, value in members(module)
        if str(getattr(value, "__module__", "")).startswith("tests.")
    ]
    assert not changed


def members(module: types.ModuleType) -> Iterable[tuple[str, object]]:
    """What a module defines, and what its classes do."""
    for name, value in list(vars(module).items()):
        yield name, value
        if isinstance(value, type) and value.__module__ == module.__name__:
            for inner, method in list(vars(value).items()):
                yield f"{name}.{inner}", method


def test_a_stranger_is_found() -> None:
    class Stranger:
        pass

    assert strangers({"deep": [lambda: Stranger]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protocol.checksum.crc32c", lambda data: 0)
        with pytest.raises(AssertionError):
            test_production_has_got_nothing_from_a_test()

"""The offline check of a data directory: takes its lock, then checks each volume's family.

Rules
- The lock is held from beginning to end: a node cannot start meanwhile, and a running one is a clear refusal.
- What the registry says of volumes is held against what their family has.
- Nothing below the data directory is written but the pid in its lock file.
"""

import asyncio
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from metadata.families import Families
from metadata.layers import Tree
from metadata.registry import Family, RegistryError, VolumeState
from metadata.registry_table import RegistryTable
from metadata.seams import Files, Store
from nbdserver.host.completions import Completions
from nbdserver.host.data_directory import DataDirectoryError, DataDirectoryLock
from nbdserver.host.files import HostFiles
from nbdserver.logdisk.check import CheckResult, Finding, check_family
from nbdserver.logdisk.contents import read_contents
from nbdserver.logdisk.recovery import RecoveryError
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError, NotFoundError, WrongInputError
from nbdserver.node.store_copy import opened_copy
from protocol.disk import DamagedValueError

Progress = Callable[[str, str, int, int], None]
"""Called with (volume, what is being looked at, units done, units in all)."""


def check_directory(
    path: Path, volume: str, quick: bool, wants_digests: bool, progress: Progress
) -> Iterator[tuple[str, CheckResult]]:
    """(oldest volume, result) of each family, or of the one with the volume named: a volume and its clones are one
    family and checked as one. With `wants_digests` what they hold too. Raises WrongInputError, or NodeError if a node
    runs."""
    directory = DataDirectory(path)
    directory.require()
    if not os.access(path, os.W_OK | os.X_OK):
        raise WrongInputError(f"{path} may not be locked by this user; run the check as the user of the server")
    try:
        lock = DataDirectoryLock(str(directory.path))
    except DataDirectoryError as error:
        holder, _, _ = str(error).partition(":")
        raise NodeError(f"a check needs a stopped node: {holder}; stop it first") from None
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the tail's walk opens every segment
        for family in _families(directory, volume):
            name = family.name
            yield name, _check(directory, family, quick, wants_digests, lambda *what, name=name: progress(name, *what))
    finally:
        lock.release()


def _families(directory: DataDirectory, volume: str) -> list[Family]:
    try:
        with opened_copy(directory.registry) as store:
            families = Families(RegistryTable(store), owner="").all()
    except (OSError, RegistryError) as error:
        raise NodeError(f"the registry in {directory.registry} is damaged: {error}") from None
    if volume:
        families = [family for family in families if volume in [each.name for each in family.volumes]]
        if not families:
            raise NotFoundError(f"there is no volume {volume!r:.60} in {directory.path}")
    return families


def _check_names(family: Family, store: Store, result: CheckResult) -> None:
    """Hold the registry's volumes against those of the family's log, if the next start has nothing to add to them."""
    if result.records_to_replay or not result.is_complete:
        return
    tree = Tree()
    tree.load(store, 0)
    numbers = {volume.number: volume for volume in family.volumes}
    for number, volume in numbers.items():
        if number not in tree.heads and volume.state == VolumeState.THERE:
            sentence = f"volume {volume.name} is number {number} of its family, whose log has none of that number"
            result.findings.append(Finding("registry", sentence, volume.name))
    for number in sorted(set(tree.heads) - set(numbers)):
        sentence = f"the log of family {family.id} has a volume of number {number}, which has no name in the registry"
        result.findings.append(Finding("registry", sentence, f"volume {number}"))


def _read_contents(
    family: Family, files: Files, store: Store, result: CheckResult, progress: Callable[..., None]
) -> None:
    """Add the digests of what the family's exports hold."""
    try:
        result.contents = read_contents(files, store, {each.number: each.name for each in family.volumes}, progress)
    except (RecoveryError, DamagedValueError, OSError) as error:
        result.findings.append(Finding("contents", f"what it holds cannot be read: {error}", family.name))
        return
    for export in result.contents.exports:
        if export.problem:
            result.findings.append(Finding("contents", f"{export.name} has no digest: {export.problem}", export.name))


def _check(
    directory: DataDirectory, family: Family, quick: bool, wants_digests: bool, progress: Callable[..., None]
) -> CheckResult:
    place = directory.family(family.id)
    loop = asyncio.new_event_loop()  # never run: the check waits for every read
    try:
        files = HostFiles(str(place), Completions(loop))
        try:
            with opened_copy(place / "maps") as store:
                result = check_family(files, store, quick, progress)
                _check_names(family, store, result)
                if wants_digests:
                    _read_contents(family, files, store, result, progress)
                return result
        finally:
            files.shut_down()
    except OSError as error:
        return CheckResult([Finding("store", f"{place} cannot be read: {error}", str(place))], is_complete=False)
    finally:
        loop.close()

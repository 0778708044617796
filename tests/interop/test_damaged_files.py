"""Every kind of file of a family, damaged one at a time: a clear refusal, EIO, or right data. Never wrong data.

A family is worked on until its segments have been recycled and its LevelDB has flushed several times; it is kept twice,
closed cleanly and as kill -9 leaves it. Then a file is flipped, zeroed in part, truncated or removed, the family is
opened, and every block is read. What may come back is what the block held at the last flush or since.

With `FUZZ_EXAMPLES=20000` (which `make fuzz` sets) each family is damaged a tenth as often, because each time is an
opening and a reading of everything. The seed of a failure is in its message.
"""

import asyncio
import errno
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdserver.logdisk.disk import DiskError, DiskSettings
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError, WrongInputError
from nbdserver.node.local_registry import open_registry
from tests.unit.families import BLOCK_BYTES, RealFamily

pytestmark = pytest.mark.fuzz

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0")) // 10
MOST_S = 13.0  # for each of the two families, unless FUZZ_EXAMPLES is given
FEWEST = 60  # however slow the machine
SEGMENT_BYTES = 64 << 10
SIZE_BYTES = 1 << 40
LBAS = 120
WRITES = 900
SETTINGS = DiskSettings(cache_bytes=0, checkpoint_bytes=256 << 10, checkpoint_interval_s=3600.0)
WRITE_BUFFER_BYTES = 64 << 10  # the least LevelDB takes, so that it flushes often


@dataclass
class Kept:
    """A family's directory and what each block may show."""

    directory: Path
    allowed: dict[int, set[int]]  # LBA → numbers (tests/unit/families.block)


def opened(directory: Path) -> RealFamily:
    family = RealFamily(directory, SIZE_BYTES, SEGMENT_BYTES, SETTINGS, 1, WRITE_BUFFER_BYTES)
    family.epoch = 100
    return family


@pytest.fixture(scope="module", params=["closed", "killed"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    directory = tmp_path_factory.mktemp(request.param)
    rng = random.Random(7)
    family = RealFamily(directory, SIZE_BYTES, SEGMENT_BYTES, SETTINGS, 7, WRITE_BUFFER_BYTES)
    family.open()
    lbas = [rng.randrange(SIZE_BYTES // BLOCK_BYTES) for _ in range(LBAS // 2)]
    lbas += [(1 << 20) + index for index in range(LBAS - len(lbas))]
    allowed: dict[int, set[int]] = {lba: {0} for lba in lbas}
    for number in range(1, WRITES):
        lba = rng.choice(lbas)
        if rng.random() < 0.1:
            assert family.discard(lba * BLOCK_BYTES, BLOCK_BYTES) == 0
            allowed[lba].add(0)
        else:
            family.put(lba, number)
            allowed[lba].add(number)
        if rng.random() < 0.02 and number < WRITES - 30:
            assert family.flush() == 0
        if rng.random() < 0.02:
            family.checkpoint()
        if number == WRITES - 30:
            assert family.flush() == 0
            allowed = {lba: {family.number_at(lba)} for lba in lbas}
            # The next header says that the flushed records are durable; it is the first that may be missing.
    if request.param == "closed":
        allowed = {lba: {family.number_at(lba)} for lba in lbas}
        family.close()
    else:
        family.crash()
    assert len(list((directory / "maps").glob("*.ldb"))) >= 1
    return Kept(directory, allowed)


def damage(path: Path, rng: random.Random) -> str:
    """Do one kind of damage to a file and say which."""
    content = bytearray(path.read_bytes())
    length = len(content.rstrip(b"\0"))  # what was never written says nothing
    kind = rng.choice(["bit", "bit", "bit", "byte", "sector", "truncated", "truncated", "emptied", "removed"])
    at = rng.randrange(max(1, length))
    if kind == "removed":
        path.unlink()
        return kind
    if kind == "emptied":
        content = bytearray()
    elif kind == "truncated":
        del content[at:]
    elif not content:
        return "nothing"
    elif kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[at] ^= rng.randrange(1, 256)
    else:
        start = at & ~511
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)
    return f"{kind} at byte {at} of {length}"


def judge(family: RealFamily, allowed: dict[int, set[int]], story: str) -> str:
    """Open it and read every block; says how it went."""
    try:
        family.open()
    except (DiskError, OSError) as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "\n" not in refusal, story
        assert len(refusal) > 20, f"{story}: {refusal!r} says too little"
        return "refused"
    outcome = "right"
    try:
        for lba, numbers in allowed.items():
            try:
                number = family.number_at(lba)
            except OSError as error:
                number, reason = -1, error.errno
            if number < 0:
                assert reason == errno.EIO, story
                outcome = "EIO"
            else:
                assert number in numbers, f"{story}: block {lba} shows {number}, allowed {numbers}"
        assert not family.unhandled, f"{story}: {family.unhandled}"
    finally:
        family.crash()
    return outcome


def attempts() -> Iterator[int]:
    """Seeds, as many as the mode wants."""
    began = time.monotonic()
    seed = 0
    while seed < EXAMPLES if EXAMPLES else seed < FEWEST or time.monotonic() - began < MOST_S:
        yield seed
        seed += 1


def test_a_damaged_file_is_refused_or_shows_right_data(kept: Kept, tmp_path: Path) -> None:
    names = [path.relative_to(kept.directory) for path in sorted(kept.directory.rglob("*")) if path.is_file()]
    names = [name for name in names if name.name not in ("LOCK", "LOG", "LOG.old")]  # LevelDB never reads these
    maps = [name for name in names if name.parts[0] == "maps"]
    assert {"CURRENT"} < {name.name for name in maps}
    outcomes: dict[str, int] = {}
    for seed in attempts():
        rng = random.Random(seed)
        name = rng.choice(maps if seed % 2 else names)
        directory = tmp_path / "family"
        shutil.copytree(kept.directory, directory)
        done = damage(directory / name, rng)
        outcome = judge(opened(directory), kept.allowed, f"seed {seed}: {name}: {done}")
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(directory)
    assert {"refused", "right"} <= set(outcomes), outcomes


def test_the_undamaged_family_shows_right_data(kept: Kept, tmp_path: Path) -> None:
    shutil.copytree(kept.directory, tmp_path / "family")
    assert judge(opened(tmp_path / "family"), kept.allowed, "undamaged") == "right"


def test_a_damaged_format_file_is_refused(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path / "data")
    directory.open()
    directory.release()
    path = directory.path / "format"
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            with pytest.raises(WrongInputError):
                directory.require()
        path.write_bytes(good[:at])
        with pytest.raises(WrongInputError):
            directory.require()


def test_a_damaged_registry_is_refused_or_complete(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path / "data")
    directory.open()
    changes = [(f"family/{number}", None, b"value %d" % number) for number in range(20)]
    for _ in range(2):  # the second opening makes a table of the first one's log
        registry = open_registry(directory)
        asyncio.run(registry.compare_and_swap(changes))
        registry.close()
    directory.release()
    names = [path.name for path in sorted(directory.registry.iterdir()) if path.name not in ("LOCK", "LOG", "LOG.old")]
    shutil.move(directory.registry, tmp_path / "kept")
    (directory.families / "one").mkdir()
    for seed in range(EXAMPLES or 120):
        rng = random.Random(seed)
        name = rng.choice(names)
        shutil.copytree(tmp_path / "kept", directory.registry)
        done = damage(directory.registry / name, rng)
        refusal, found = "", {}
        try:
            registry = open_registry(directory)
            try:
                found = dict(registry.range("family/"))
            finally:
                registry.close()
        except (NodeError, OSError) as error:
            refusal = str(error)
        assert "\n" not in refusal
        story = f"seed {seed}: {name}: {done}: {len(found)} of 20 are left, and nobody said so"
        assert refusal or found == {f"family/{number}": b"value %d" % number for number in range(20)}, story
        shutil.rmtree(directory.registry)

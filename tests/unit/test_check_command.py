"""`nbdserver check`: its exit codes, its one line for each finding, and what it refuses."""

import asyncio
import json
import re
import secrets
from pathlib import Path

import pytest

from metadata.families import Families
from metadata.leveldb import NO_THREADS, LevelStore
from metadata.registry import Family, Volume, VolumeState
from metadata.registry_table import RegistryTable
from nbdserver.cli.main import run
from nbdserver.host.data_directory import DataDirectoryLock
from nbdserver.logdisk.segments import segment_path
from nbdserver.node.directory import DataDirectory
from tests.unit.families import RealFamily

Place = tuple[Path, Path]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """(data directory, directory of its one family) with one volume `disk0` that was closed cleanly."""
    directory = DataDirectory(tmp_path / "data")
    directory.open()
    family = Family(secrets.token_hex(16), 1 << 20, "", (Volume(1, "disk0", 1 << 30),))
    store = LevelStore(str(directory.registry), NO_THREADS, NO_THREADS)
    families = Families(RegistryTable(store), owner="")
    asyncio.run(families.begin(family.id))
    asyncio.run(families.add(family))
    store.close()
    directory.family(family.id).mkdir()
    disk = RealFamily(directory.family(family.id))
    disk.open()
    disk.put(0, 1, 50)
    disk.close()
    directory.release()
    return directory.path, directory.family(family.id)


def test_a_good_directory_is_exit_0(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--data", str(place[0])]) == 0
    assert "disk0: good; 50 live blocks" in capfd.readouterr().out


def test_damage_is_exit_1_and_one_line(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    path = place[1] / segment_path(1)
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)
    assert run(["check", "--data", str(place[0])]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("disk0: data: the block of MBA")
    assert "1 problem;" in lines[1]
    assert len(lines) == 2
    assert run(["check", "--data", str(place[0]), "--quick"]) == 0


def test_digests_are_a_line_for_each_export_and_one_for_the_log(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", "--data", str(place[0]), "--quick", "--digest"]) == 0
    _, digest, log = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"disk0: digest [0-9a-f]{64} of 1073741824 bytes", digest)
    assert log == "disk0: its log ends at epoch 1, txid 1"
    assert run(["check", "--data", str(place[0]), "--digest", "--json"]) == 0
    contents = json.loads(capfd.readouterr().out)["volumes"]["disk0"]["contents"]
    assert (contents["epoch"], contents["txid"], contents["regions_to_fetch"]) == (1, 1, 0)
    (export,) = contents["exports"]
    assert (export["name"], export["size_bytes"], export["problem"]) == ("disk0", 1 << 30, "")
    assert export["digest"] == digest.split()[2]


def test_what_cannot_be_read_has_no_digest_and_is_exit_1(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    path = place[1] / segment_path(1)
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)
    assert run(["check", "--data", str(place[0]), "--quick", "--digest"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("disk0: contents: disk0 has no digest: it cannot be read in MiB 0: a block in segment 1")
    assert lines[2] == "disk0: digest none of 1073741824 bytes"


def test_json_is_one_document(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "disk0", "--data", str(place[0]), "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["volumes"]["disk0"]["blocks_verified"] == 50
    assert captured.err == ""


def test_an_unknown_volume_is_exit_2(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "disk1", "--data", str(place[0])]) == 2
    assert "there is no volume 'disk1'" in capfd.readouterr().err


def test_what_is_no_data_directory_is_exit_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--data", str(tmp_path)]) == 2
    assert "is not a data directory" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_running_node_is_refused_in_one_line(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    lock = DataDirectoryLock(str(place[0]))
    assert run(["check", "--data", str(place[0])]) == 1
    lock.release()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "is in use by process" in lines[0]


def test_a_store_that_is_gone_is_a_finding_and_is_not_made_anew(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    (place[1] / "maps" / "CURRENT").unlink()
    before = sorted((place[1] / "maps").iterdir())
    assert run(["check", "--data", str(place[0])]) == 1
    assert "CURRENT is missing" in capfd.readouterr().out
    assert sorted((place[1] / "maps").iterdir()) == before


def test_a_volume_that_its_family_does_not_have_is_found_and_one_without_a_name(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    store = LevelStore(str(DataDirectory(place[0]).registry), NO_THREADS, NO_THREADS)
    families = Families(RegistryTable(store), owner="")
    (family,) = families.all()
    family, clone = asyncio.run(families.add_volume(family, "web", 1 << 30, family.volumes[0].settings))
    asyncio.run(families.change_volume(family, clone, state=VolumeState.THERE))
    store.close()
    assert run(["check", "--data", str(place[0])]) == 1
    assert "volume web is number 2 of its family, whose log has none" in capfd.readouterr().out
    disk = RealFamily(place[1])
    disk.epoch = 1
    disk.open()
    assert disk.wait(lambda done: disk.disk.snapshot(1, "monday", 0, done)) == (0,)
    (row,) = disk.disk.snapshots()
    for number in (2, 5):
        assert disk.wait(lambda done, number=number: disk.disk.clone(row.layer, number, done)) == (0,)  # type: ignore[misc]
    disk.close()
    assert run(["check", "web", "--data", str(place[0])]) == 1
    printed = capfd.readouterr().out
    assert "has a volume of number 5, which has no name" in printed
    assert "volume web" not in printed

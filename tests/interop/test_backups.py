"""Full backups and increments by other people's tools, as docs/operations.md says it: what is restored is identical."""

import json
import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.cli.main import run as run_command
from protocol.nbd import Command
from tests.conftest import Processes
from tests.nbd_client import Client
from tests.recipes import recipe
from tests.serving import Server

MIB = 1 << 20
SIZE_BYTES = 64 * MIB
TIMEOUT_S = 60
Needs = Callable[[str, str], str]


class Operator:
    """Somebody who types what the page says, in a folder of their own."""

    def __init__(self, server: Server, folder: Path, needs: Needs) -> None:
        tools = {"qemu-img": "qemu-utils", "nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin", "nbdsh": "python3-libnbd"}
        for program, package in tools.items():
            needs(program, package)
        self.server = server
        self.folder = folder
        self.random = random.Random(5)
        folder.mkdir()
        (folder / "increment.py").write_text(recipe("increment.py"))

    def run(self, *command: str) -> str:
        environment = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}", "PYTHONPATH": ""}
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def command(self, *arguments: str) -> None:
        """A command of the program, in this process: each one started costs a second."""
        assert run_command(["--data", str(self.server.data), *arguments]) == 0

    def follow(self, mark: str, **names: str) -> None:
        """Do a block of the page with other names, sizes and port."""
        for line in recipe(mark).splitlines():
            changed = re.sub(r"\w+", lambda word: {**names, "10809": str(self.server.port)}.get(word[0], word[0]), line)
            words = changed.partition("#")[0].split()
            if words[0] == "nbdserver":
                self.command(*words[1:])
            else:
                self.run(*words)

    def write(self, *changes: tuple[Command, int, int]) -> None:
        """(command, offset, length) on disk1, the written data random."""
        client = Client(("127.0.0.1", self.server.port), "disk1")
        for command, offset, length in changes:
            data = self.random.randbytes(length) if command == Command.WRITE else b""
            assert client.request(command, offset, length, data).error == 0
        client.close()

    def content(self, export: str) -> bytes:
        """All of an export."""
        path = self.folder / "content"
        path.unlink(missing_ok=True)
        self.run("nbdcopy", self.server.uri(export), str(path))
        return path.read_bytes()

    def restored(self, name: str) -> bytes:
        """What a backup holds, taken through a new volume as the page says."""
        size = json.loads(self.run("qemu-img", "info", "--output=json", f"{name}.qcow2"))["virtual-size"]
        self.follow("restore", tuesday=name, **{"300G": f"{size // MIB}M"})
        content = self.content("disk2")
        self.command("volume", "delete", "disk2")
        return content


@pytest.fixture
def operator(processes: Processes, tmp_path: Path, free_port: Callable[[], int], needs: Needs) -> Operator:
    server = Server(processes, tmp_path / "data", free_port(), {"disk1": "64M"})
    return Operator(server, tmp_path / "backups", needs)


WRITE, TRIM, ZEROES = Command.WRITE, Command.TRIM, Command.WRITE_ZEROES


def test_a_full_backup_and_increments_are_restored_to_the_byte_across_resizes_and_rollbacks(operator: Operator) -> None:
    server = operator.server
    operator.write((WRITE, 0, 3 * MIB), (WRITE, 20 * MIB, MIB), (WRITE, 60 * MIB, 4 * MIB))
    operator.follow("full-backup")
    contents = {"monday": operator.content("disk1@monday")}

    def increment(base: str, name: str) -> None:
        operator.follow("increment", monday=base, tuesday=name)
        contents[name] = operator.content(f"disk1@{name}")

    operator.write((WRITE, 4096, 4096), (WRITE, 20 * MIB + 100, 5000), (TRIM, MIB, MIB), (ZEROES, 61 * MIB, 8192))
    increment("monday", "tuesday")
    operator.command("snapshot", "create", "disk1@aside")
    operator.command("volume", "resize", "disk1", "--size", "96M")
    operator.write((WRITE, 90 * MIB, MIB), (ZEROES, 2 * MIB, 300_000), (WRITE, 63 * MIB, 2 * MIB))
    increment("tuesday", "wednesday")
    # Back to what was before wednesday, and on from there: wednesday is older, and no ancestor.
    operator.command("snapshot", "rollback", "disk1@aside")
    operator.write((WRITE, 2 * MIB, 8192), (WRITE, 30 * MIB, 12_000))
    server.kill9()
    server.start()
    increment("wednesday", "thursday")
    operator.command("volume", "resize", "disk1", "--size", "16M", "--force")
    operator.command("volume", "resize", "disk1", "--size", "64M")
    increment("thursday", "friday")

    assert [len(content) // MIB for content in contents.values()] == [64, 64, 96, 64, 64]
    assert contents["tuesday"] != contents["thursday"] != contents["friday"]
    sizes = {name: (operator.folder / f"{name}.qcow2").stat().st_size // MIB for name in contents}
    assert sizes["monday"] >= 8
    assert max(sizes["tuesday"], sizes["wednesday"]) < 6, "an increment holds what changed, not everything"
    for name, content in contents.items():
        assert operator.restored(name) == content, f"{name} is not what it was"


def test_the_tools_list_and_map_the_bitmaps_of_live_exports_and_snapshots(operator: Operator) -> None:
    server = operator.server
    operator.write((WRITE, 0, MIB))
    operator.command("snapshot", "create", "disk1@monday")
    operator.write((WRITE, 8 * MIB, MIB), (TRIM, 0, 8192))
    operator.command("snapshot", "create", "disk1@tuesday")
    operator.write((WRITE, 9 * MIB, 4096))

    def mapped(export: str, since: str) -> list[tuple[int, int]]:
        uri, bitmap = server.uri(export), f"qemu:dirty-bitmap:{since}"
        extents = json.loads(operator.run("nbdinfo", f"--map={bitmap}", "--json", uri))
        told = [(extent["offset"], extent["length"]) for extent in extents if extent["type"] & 1]
        options = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={server.port},export={export}"
        found = operator.run("qemu-img", "map", "--output=json", "--image-opts", f"{options},x-dirty-bitmap={bitmap}")
        # With x-dirty-bitmap what is dirty is shown as a hole.
        assert [(extent["start"], extent["length"]) for extent in json.loads(found) if not extent["data"]] == told
        return told

    assert mapped("disk1", "monday") == [(0, 8192), (8 * MIB, MIB + 4096)]
    assert mapped("disk1", "tuesday") == [(9 * MIB, 4096)]
    assert mapped("disk1@tuesday", "monday") == [(0, 8192), (8 * MIB, MIB)]
    exports = {
        export["export-name"]: export["contexts"]
        for export in json.loads(operator.run("nbdinfo", "--list", "--json", server.uri()))["exports"]
    }
    monday, tuesday = "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"
    assert exports == {
        "disk1": ["base:allocation", monday, tuesday],
        "disk1@monday": ["base:allocation"],
        "disk1@tuesday": ["base:allocation", monday],
    }


DELETED_MEANWHILE = """
import errno, subprocess, sys
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:monday")
h.connect_uri("{uri}")
found = dict()
h.block_status(65536, 0, lambda name, offset, entries, error: found.update([(name, entries)]) or 0)
assert found == dict([("base:allocation", [65536, 3]), ("qemu:dirty-bitmap:monday", [65536, 0])]), found
print("selected", flush=True)
sys.stdin.readline()
try:
    h.block_status(65536, 0, lambda *answer: print("told", answer) or 0)
except nbd.Error as error:
    print(error.errnum == errno.EINVAL, error)
h.pwrite(b"goes on", 0)
h.shutdown()
"""


def test_a_client_whose_snapshot_is_deleted_is_told_and_goes_on_otherwise(
    operator: Operator, processes: Processes
) -> None:
    server = operator.server
    operator.command("snapshot", "create", "disk1@monday")
    script = DELETED_MEANWHILE.format(uri=server.uri("disk1"))
    backup = processes.start(
        ["/usr/bin/nbdsh", "-c", script],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert backup.stdin is not None
    assert backup.stdout is not None
    assert backup.stdout.readline() == b"selected\n"
    operator.command("snapshot", "delete", "disk1@monday")
    operator.command("snapshot", "create", "disk1@monday")
    printed, _ = backup.communicate(b"go on\n", timeout=TIMEOUT_S)
    assert backup.returncode == 0, printed
    assert printed.startswith(b"True"), printed
    client = Client(("127.0.0.1", server.port), "disk1")
    assert client.read(0, 7) == b"goes on"
    client.close()

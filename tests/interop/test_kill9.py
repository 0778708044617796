"""kill -9 of the whole server under writes: after the restart nothing acknowledged is missing, flushed or not."""

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Processes
from tests.durability import Judge
from tests.nbd_client import Client
from tests.serving import Server

ROUNDS = 4
SHORTEST_S, LONGEST_S = 0.2, 2.0
JUDGED_BLOCKS = 8192
SMALL_SEGMENTS = "segment: 4M\n"  # so that a second of writing fills, seals and recycles many
FIO_SIZE = "64M"


@pytest.fixture
def server(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> Server:
    settings = tmp_path / "node.yaml"
    settings.write_text(SMALL_SEGMENTS)
    return Server(
        processes, tmp_path / "data", free_port(), {"disk0": "1G", "disk1": "1G"}, ["--config", str(settings)]
    )


def write_until_killed(server: Server, judge: Judge, duration_s: float) -> None:
    client = Client(("127.0.0.1", server.port), "disk0")
    judge.write_until(client, time.monotonic() + duration_s)  # leaves requests in flight
    server.kill9()
    client.close()


def check(server: Server, judge: Judge) -> None:
    client = Client(("127.0.0.1", server.port), "disk0")
    judge.check(client, acknowledged_too=True)
    client.close()


def test_nothing_acknowledged_is_missing_after_kill_9(server: Server) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    judge = Judge(JUDGED_BLOCKS, generator)
    for _ in range(ROUNDS):
        writes = judge.writes
        write_until_killed(server, judge, generator.uniform(SHORTEST_S, LONGEST_S))
        assert judge.writes > writes
        server.start()
        check(server, judge)


def fio(needs: Callable[[str, str], str], server: Server, *arguments: str) -> list[str]:
    return [
        needs("fio", "fio"), "--name=job", "--ioengine=nbd", f"--uri={server.uri('disk1')}", f"--size={FIO_SIZE}",
        "--rw=randwrite", "--bs=4k", "--iodepth=16", "--randseed=7", "--output-format=json", *arguments,
    ]  # fmt: skip


def test_what_fio_wrote_verifies_after_kill_9_under_its_load(
    server: Server, processes: Processes, needs: Callable[[str, str], str]
) -> None:
    """fio writes a pattern without a flush, then other clients keep the log busy, then the kill, then fio verifies."""
    subprocess.run(
        fio(needs, server, "--verify=crc32c", "--do_verify=0"), check=True, capture_output=True, cwd=server.data.parent
    )
    load = processes.start(
        [*fio(needs, server, "--offset=128M", "--time_based", "--runtime=30"), "--end_fsync=0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=server.data.parent,
    )
    judge = Judge(JUDGED_BLOCKS, random.Random(7))
    write_until_killed(server, judge, LONGEST_S)
    load.wait(30)
    server.start()
    check(server, judge)
    verified = subprocess.run(
        fio(needs, server, "--verify=crc32c", "--verify_only"), capture_output=True, text=True, cwd=server.data.parent
    )
    assert verified.returncode == 0, verified.stderr + verified.stdout[-2000:]
    assert json.loads(verified.stdout[verified.stdout.index("{") :])["jobs"][0]["error"] == 0

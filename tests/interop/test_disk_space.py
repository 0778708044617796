"""What `df` shows, and what happens when it shows 100 %: on a file system of its own, which nobody else changes."""

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.nbd import Command, ReplyError
from tests.conftest import Processes
from tests.interop.disks import NoDiskError, mount_image, unmount
from tests.nbd_client import Client
from tests.serving import Server

MIB = 1 << 20
SEGMENT_BYTES = 4 * MIB
SETTINGS = "segment: 4M\ncache: 64M\n"
PIECE_BYTES = MIB
GIVEN_BACK_TIMEOUT_S = 60.0
# What may stay of an emptied node: 8 spare segments, the one being written, the ballast, LevelDB's files.
STAYING_BYTES = 8 * SEGMENT_BYTES + SEGMENT_BYTES + 64 * MIB
FileSystem = Callable[[int], Path]


@pytest.fixture
def file_system(tmp_path: Path, needs: Callable[[str, str], str]) -> Iterator[FileSystem]:
    """`file_system(size_bytes)`: the mount point of an empty ext4 of that size."""
    mounted: list[Path] = []

    def mount(size_bytes: int) -> Path:
        point = tmp_path / "mounted"
        point.mkdir()
        try:
            mount_image(tmp_path / "image", point, size_bytes, needs)
        except NoDiskError as error:
            pytest.skip(str(error))
        mounted.append(point)
        return point

    yield mount
    for point in mounted:
        unmount(point)


@pytest.fixture
def serve(
    file_system: FileSystem, tmp_path: Path, free_port: Callable[[], int]
) -> Iterator[Callable[[int, str], tuple[Server, Path]]]:
    """`serve(file_system_bytes, volume_size)`: a node alone on its file system, and where that is mounted."""
    with Processes() as processes:  # they end before the file system is unmounted

        def start(size_bytes: int, volume_size: str) -> tuple[Server, Path]:
            settings = tmp_path / "node.yaml"
            settings.write_text(SETTINGS)
            point = file_system(size_bytes)
            server = Server(processes, point / "node", free_port(), {"disk0": volume_size}, ["--config", str(settings)])
            return server, point

        yield start


def used_bytes(point: Path) -> int:
    return shutil.disk_usage(point).used


def connect(server: Server) -> Client:
    return Client(("127.0.0.1", server.port), "disk0", timeout_s=30.0)


def piece(number: int, version: int) -> bytes:
    return b"%015d %015d\n" % (number, version) * (PIECE_BYTES // 32)


def write_pieces(client: Client, count: int, version: int) -> None:
    for number in range(count):
        assert client.request(Command.WRITE, number * PIECE_BYTES, data=piece(number, version)).error == 0
    assert client.request(Command.FLUSH).error == 0


def wait_until_used_is_at_most(point: Path, limit_bytes: int) -> None:
    deadline = time.monotonic() + GIVEN_BACK_TIMEOUT_S
    while used_bytes(point) > limit_bytes:
        assert time.monotonic() < deadline, (
            f"{used_bytes(point) // MIB} MiB are still used; {limit_bytes // MIB} may be"
        )
        time.sleep(0.5)


def test_trimmed_data_is_given_back_to_df_within_a_minute(serve: Callable[[int, str], tuple[Server, Path]]) -> None:
    server, point = serve(1024 * MIB, "2G")
    client = connect(server)
    written = 300
    write_pieces(client, written, version=1)
    assert used_bytes(point) >= written * MIB
    assert client.request(Command.TRIM, 0, client.size_bytes).error == 0
    assert client.request(Command.FLUSH).error == 0
    wait_until_used_is_at_most(point, STAYING_BYTES)
    assert client.read(0, MIB) == bytes(MIB)


def test_overwriting_again_and_again_stays_within_the_disk(serve: Callable[[int, str], tuple[Server, Path]]) -> None:
    """Three times the file system's size is written to a volume that fills a third of it."""
    server, point = serve(512 * MIB, "1G")
    client = connect(server)
    written = 160
    for version in range(1, 11):
        write_pieces(client, written, version)
    assert all(client.read(number * MIB, MIB) == piece(number, 10) for number in range(written))
    assert used_bytes(point) < 512 * MIB


def test_a_deleted_volume_is_given_back_to_df_within_a_minute(
    serve: Callable[[int, str], tuple[Server, Path]],
) -> None:
    server, point = serve(1024 * MIB, "2G")
    before = used_bytes(point)
    client = connect(server)
    write_pieces(client, 200, version=1)
    client.close()
    server.command("volume", "delete", "disk0", "--force")
    wait_until_used_is_at_most(point, before)


def test_a_full_disk_refuses_writes_and_does_everything_else(
    serve: Callable[[int, str], tuple[Server, Path]],
) -> None:
    server, _ = serve(400 * MIB, "10G")
    client = connect(server)
    written = 0
    while (error := client.request(Command.WRITE, written * MIB, data=piece(written, 1)).error) == 0:
        written += 1
        assert written < 400
    assert error == ReplyError.ENOSPC == errno.ENOSPC
    assert written > 100
    assert client.request(Command.FLUSH).error == 0
    assert all(client.read(number * MIB, MIB) == piece(number, 1) for number in range(written))

    server.kill9()  # a full disk is no reason not to start
    client.close()
    server.start()
    client = connect(server)
    assert all(client.read(number * MIB, MIB) == piece(number, 1) for number in range(written))
    kept = written // 2
    assert client.request(Command.TRIM, kept * MIB, (written - kept) * MIB).error == 0
    assert client.request(Command.FLUSH).error == 0
    deadline = time.monotonic() + GIVEN_BACK_TIMEOUT_S
    while client.request(Command.WRITE, kept * MIB, data=piece(kept, 2)).error:
        assert time.monotonic() < deadline, "half of the data was trimmed, and still there is no room"
        time.sleep(0.5)
    assert client.read(kept * MIB, MIB) == piece(kept, 2)
    assert all(client.read(number * MIB, MIB) == piece(number, 1) for number in range(kept))

"""A mounted file system does not notice that its server becomes another program under it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Processes
from tests.kernel.build import Images
from tests.kernel.guest import HOST, Guest
from tests.kernel.mounted import DEVICE, MountedVolume
from tests.serving import Server

UPGRADES = 3
CONNECTIONS = 4
PATIENCE_S = 120  # of the kernel with a connection; it has 30 s else, and an emulated one may stand that long
FILES_BETWEEN = 3


@pytest.fixture
def guest(guest_images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with Guest(guest_images, tmp_path_factory.mktemp("guest")) as machine:
        machine.run("load_modules nbd")
        yield machine


def test_a_mounted_ext4_lives_through_upgrades_of_its_server(
    guest: Guest, processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    server = Server(processes, tmp_path / "node", free_port(), {"disk0": "512M"})
    attach = f"nbd-client -N disk0 -b 4096 -C {CONNECTIONS} -t {PATIENCE_S} {HOST} {server.port} {DEVICE}"
    mounted = MountedVolume(guest, attach)
    mounted.write(FILES_BETWEEN)
    for _ in range(UPGRADES):
        done = json.loads(server.command("upgrade-in-place", "--json"))
        assert (done["clients"], done["dropped"]) == (CONNECTIONS, 0), guest.run("dmesg | tail -20")
        mounted.write(FILES_BETWEEN)
    mounted.must_have_noticed_nothing()

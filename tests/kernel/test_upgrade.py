"""A mounted file system does not notice that its server becomes another program under it."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Processes
from tests.kernel.build import Images
from tests.kernel.guest import HOST, Guest
from tests.serving import Server

UPGRADES = 3
CONNECTIONS = 4
FILES_BETWEEN = 3
WRITER_TIMEOUT_S = 60.0

# Writes files until it is told to stop, notes the checksum of each that fsync has returned for, and ends by itself
# with the first error.
WRITER = """
cd /mnt
number=0
while [ ! -e /tmp/stop ]; do
  number=$((number + 1))
  dd if=/dev/urandom of=file$number bs=3000 count=$((number % 50 * 7 + 1)) conv=fsync 2>/dev/null || exit 1
  md5sum file$number >/tmp/sum || exit 1
  cat /tmp/sum >>/tmp/fsynced
done
touch /tmp/stopped
"""


@pytest.fixture
def guest(guest_images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with Guest(guest_images, tmp_path_factory.mktemp("guest")) as machine:
        machine.run("load_modules nbd")
        yield machine


def test_a_mounted_ext4_lives_through_upgrades_of_its_server(
    guest: Guest, processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    server = Server(processes, tmp_path / "node", free_port(), {"disk0": "512M"})
    guest.run(
        f"nbd-client -N disk0 -b 4096 -C {CONNECTIONS} {HOST} {server.port} /dev/nbd0 && "
        "mkfs.ext4 -q /dev/nbd0 && mkdir -p /mnt && mount -t ext4 /dev/nbd0 /mnt && dmesg -c >/dev/null"
    )
    guest.run(f"sh -c '{WRITER}' </dev/null >/dev/null 2>&1 &")

    def fsynced() -> int:
        return int(guest.run("cat /tmp/fsynced 2>/dev/null | wc -l"))

    def wait_for_files(count: int) -> None:
        deadline = time.monotonic() + WRITER_TIMEOUT_S
        while fsynced() < count:
            assert time.monotonic() < deadline, guest.run("dmesg | tail -20")
            time.sleep(0.2)

    wait_for_files(FILES_BETWEEN)
    for _ in range(UPGRADES):
        done = json.loads(server.command("upgrade-in-place", "--json"))
        assert (done["clients"], done["dropped"]) == (CONNECTIONS, 0)
        wait_for_files(fsynced() + FILES_BETWEEN)
    guest.run("touch /tmp/stop; for i in $(seq 300); do [ -e /tmp/stopped ] && break; sleep 0.1; done")
    guest.run("[ -e /tmp/stopped ]")
    messages = guest.run("dmesg")
    assert not [line for line in messages.splitlines() if "error" in line.lower() or "nbd0" in line], messages
    guest.run("umount /mnt && e2fsck -fn /dev/nbd0 && nbd-client -d /dev/nbd0")
    guest.run(f"nbd-client -N disk0 -b 4096 {HOST} {server.port} /dev/nbd0 && mount -t ext4 /dev/nbd0 /mnt")
    guest.run("cd /mnt && md5sum -c /tmp/fsynced")

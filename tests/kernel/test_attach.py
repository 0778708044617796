"""A Linux kernel attaches, formats and mounts our exports, and a killed server costs it nothing that it fsynced.

One guest boots for the whole module: booting is what takes the time.
"""

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.certificates import make_certificates
from tests.conftest import Processes
from tests.kernel.build import Images
from tests.kernel.guest import HOST, Guest
from tests.recipes import recipe
from tests.serving import Server

VOLUMES = {"ext4": "1G", "xfs": "1G"}
GROWN, GROWN_DEVICE = "grown", "/dev/nbd2"
TLS_DEVICE = "/dev/nbd3"
DEVICES = {"ext4": "/dev/nbd0", "xfs": "/dev/nbd1"}
CONNECTIONS = {"ext4": 1, "xfs": 4}
FORMAT = {"ext4": "mkfs.ext4 -q", "xfs": "mkfs.xfs -q"}
# What a journal is replayed with after a crash, then what must find nothing wrong.
REPLAY = {"ext4": "e2fsck -p {device} || [ $? = 1 ]", "xfs": "mount -t xfs {device} /mnt && umount /mnt"}
CHECK = {"ext4": "e2fsck -fn {device}", "xfs": "xfs_repair -n {device}"}
FSYNCED_BEFORE_KILL = 8
WRITER_TIMEOUT_S = 30.0

# Writes files of growing size until the disk is gone; notes the checksum of each that fsync has returned for.
WRITER = """
cd /mnt/{system}
number=0
while number=$((number + 1)); do
  dd if=/dev/urandom of=file$number bs=3000 count=$((number * 7)) conv=fsync 2>/dev/null || break
  md5sum file$number >/tmp/sum.{system} || break
  cat /tmp/sum.{system} >>/tmp/fsynced.{system}
done
"""


@pytest.fixture(scope="module")
def server(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Server:
    return Server(module_processes, tmp_path_factory.mktemp("data") / "node", free_port(), {**VOLUMES, GROWN: "256M"})


@pytest.fixture(scope="module")
def guest(guest_images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    files = {"code/grow.py": recipe("grow.py").encode()}
    with Guest(guest_images, tmp_path_factory.mktemp("guest"), files=files, disks=[guest_images.disk]) as machine:
        machine.run(
            "load_modules nbd; load_modules xfs; mount -t ext4 -o ro /dev/vda /python\n"
            "for folder in dev code; do mount --bind /$folder /python/$folder; done"
        )
        yield machine


def attach(guest: Guest, server: Server, system: str) -> None:
    guest.run(
        f"nbd-client -N {system} -b 4096 -C {CONNECTIONS[system]} {HOST} {server.port} {DEVICES[system]} && "
        f"mkdir -p /mnt/{system} && blockdev --getsize64 {DEVICES[system]}"
    )


def python(images: Images, arguments: str) -> str:
    """A command of the guest that runs Python, with nothing but its standard library."""
    return f"chroot /python {images.python} -I -S {arguments}"


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} in {timeout_s:.0f} s"
        time.sleep(0.2)


@pytest.mark.parametrize("system", ["ext4", "xfs"])
def test_a_file_system_is_made_mounted_written_trimmed_and_found_clean(
    guest: Guest, server: Server, system: str
) -> None:
    device, mount = DEVICES[system], f"/mnt/{system}"
    attach(guest, server, system)
    guest.run(f"{FORMAT[system]} {device} && mount -t {system} {device} {mount}")
    before = guest.run(
        f"dd if=/dev/urandom of={mount}/kept bs=1M count=8 conv=fsync 2>/dev/null\n"
        f"cp {mount}/kept {mount}/doomed; sync; md5sum {mount}/kept; rm {mount}/doomed; fstrim -v {mount}; df {mount}"
    )
    assert "trimmed" in before
    guest.run(f"umount {mount}")
    guest.run(CHECK[system].format(device=device))
    after = guest.run(
        f"nbd-client -d {device}\n"
        f"nbd-client -N {system} -b 4096 -C {CONNECTIONS[system]} {HOST} {server.port} {device} && "
        f"mount -t {system} {device} {mount} && md5sum {mount}/kept"
    )
    assert after.splitlines()[-1] == next(line for line in before.splitlines() if line.endswith(f"{mount}/kept"))


@pytest.mark.parametrize("interface", ["netlink", "ioctl"])
def test_a_mounted_file_system_grows_without_and_with_a_new_connection(
    guest: Guest, guest_images: Images, server: Server, interface: str
) -> None:
    """First live, by what the page says for the way in which the client attached, then after attaching again."""
    mebibytes, mount = {"netlink": (256, 384, 512), "ioctl": (512, 640, 768)}[interface], f"/mnt/{GROWN}"
    option = "" if interface == "netlink" else "-nonetlink"

    def attach_and_mount() -> None:
        guest.run(f"nbd-client {option} -N {GROWN} -b 4096 {HOST} {server.port} {GROWN_DEVICE}")
        guest.run(f"mkdir -p {mount}; mount -t ext4 {GROWN_DEVICE} {mount}")

    def grown(size: int) -> None:
        """The device has so many MiB; let the file system have them."""
        assert int(guest.run(f"blockdev --getsize64 {GROWN_DEVICE}")) == size << 20
        room = guest.run(
            f"resize2fs {GROWN_DEVICE} 2>&1; cd {mount}\n"
            f"dd if=/dev/urandom of={interface}{size} bs=256k count=4 2>/dev/null; sync\n"
            f"md5sum {interface}{size} >>/tmp/sums; md5sum -c /tmp/sums; df -m {mount} | tail -1"
        )
        assert int(room.splitlines()[-1].split()[1]) > 0.8 * size

    if interface == "netlink":
        guest.run(f"nbd-client -N {GROWN} -b 4096 {HOST} {server.port} {GROWN_DEVICE}")
        guest.run(f"mkfs.ext4 -q {GROWN_DEVICE} && nbd-client -d {GROWN_DEVICE}; rm -f /tmp/sums")
    attach_and_mount()
    before, live, again = mebibytes
    grown(before)
    server.command("volume", "resize", GROWN, "--size", f"{live}M")
    assert int(guest.run(f"blockdev --getsize64 {GROWN_DEVICE}")) == before << 20, "NBD tells nobody"
    if interface == "netlink":
        guest.run(python(guest_images, f"/code/grow.py {GROWN_DEVICE} {live << 20}"))
    else:
        (line,) = recipe("grow-nonetlink").splitlines()
        line = line.replace("/dev/nbd0", GROWN_DEVICE).replace(f"{300 << 30}", f"{live << 20}")
        guest.run(line.replace("python3", python(guest_images, "")))
    grown(live)
    server.command("volume", "resize", GROWN, "--size", f"{again}M")
    guest.run(f"umount {mount} && nbd-client -d {GROWN_DEVICE}")
    attach_and_mount()
    grown(again)
    guest.run(f"umount {mount} && e2fsck -fn {GROWN_DEVICE} && nbd-client -d {GROWN_DEVICE}")


def test_a_file_system_lives_on_a_device_that_nbd_client_has_put_behind_tls(
    guest: Guest, processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """nbd-client leaves a process of its own between the kernel and the server, which encrypts."""
    certificates = make_certificates(tmp_path)
    settings = tmp_path / "node.yaml"
    lines = [f"  {key}: {path}" for key, path in certificates.settings.items()]
    settings.write_text("\n".join(["tls:", "  mode: required", *lines]))
    server = Server(processes, tmp_path / "node", free_port(), {"disk0": "256M"}, ["--config", str(settings)])
    for file in certificates.client("web1").iterdir():
        encoded = base64.b64encode(file.read_bytes()).decode()
        guest.run(f"mkdir -p /certs; echo {encoded} | base64 -d >/certs/{file.name}")
    attach_over_tls = recipe("tls-attach").replace("localhost 10809 /dev/nbd0", f"{HOST} {server.port} {TLS_DEVICE}")
    assert attach_over_tls.endswith("-tlshostname localhost\n")
    without_certificate = f"nbd-client {HOST} {server.port} {TLS_DEVICE} -N disk0"
    assert "fails" in guest.run(f"{without_certificate} </dev/null >/dev/null 2>&1 || echo fails")
    attach_over_tls = f"CERTS=/certs\n{attach_over_tls}"
    guest.run(
        f"{attach_over_tls}\nmkfs.ext4 -q {TLS_DEVICE} && mkdir -p /mnt/tls && mount -t ext4 {TLS_DEVICE} /mnt/tls"
    )
    before = guest.run(
        "cd /mnt/tls; dd if=/dev/urandom of=kept bs=1M count=8 conv=fsync 2>/dev/null; md5sum kept; sync; fstrim -v ."
    )
    (client,) = json.loads(server.command("client", "list", "--json"))
    assert (client["volume"], client["certificate"]) == ("disk0", "web1")
    assert client["tls"].startswith("TLSv1.")
    guest.run(f"umount /mnt/tls && nbd-client -d {TLS_DEVICE}")
    after = guest.run(
        f"{attach_over_tls}\ne2fsck -fn {TLS_DEVICE} && mount -t ext4 {TLS_DEVICE} /mnt/tls && md5sum /mnt/tls/kept"
    )
    assert after.splitlines()[-1].split()[0] == before.splitlines()[0].split()[0]
    guest.run(f"umount /mnt/tls && nbd-client -d {TLS_DEVICE}")


def test_a_server_killed_in_the_middle_of_writes_costs_nothing_that_was_fsynced(guest: Guest, server: Server) -> None:
    """Both file systems are still mounted from the test before."""
    for system in VOLUMES:
        guest.run(f"sh -c '{WRITER.format(system=system)}' </dev/null >/dev/null 2>&1 &")

    def fsynced(system: str) -> int:
        return int(guest.run(f"cat /tmp/fsynced.{system} 2>/dev/null | wc -l"))

    wait_for(
        lambda: all(fsynced(system) >= FSYNCED_BEFORE_KILL for system in VOLUMES),
        WRITER_TIMEOUT_S,
        "too few files written",
    )
    server.kill9()
    for system, device in DEVICES.items():
        guest.run(f"wait; nbd-client -d {device}; umount /mnt/{system} || umount -l /mnt/{system}", check=False)
    server.start()
    for system, device in DEVICES.items():
        attach(guest, server, system)
        guest.run(REPLAY[system].format(device=device))
        guest.run(CHECK[system].format(device=device))
        assert fsynced(system) >= FSYNCED_BEFORE_KILL
        guest.run(f"mount -t {system} {device} /mnt/{system} && cd /mnt/{system} && md5sum -c /tmp/fsynced.{system}")
        guest.run(f"umount /mnt/{system} && nbd-client -d {device}")

"""Ceph: a monitor, a manager and three OSDs, each on a sparse file, with one image in a pool of three replicas.

The daemons put themselves into the background; their pid files are below our directory, and a pid counts only as long
as its command line names our configuration. Authentication and the client's cache are off. A disk that says that it
rotates makes Ceph take its settings for such ones, which throttle recovery and serve one operation at a time: here they
are those for SSDs, whatever the disk says.
"""

import json
import os
import signal
import time
import uuid
from pathlib import Path

from ..processes import free_ports
from .systems import System, end, run, wait_until

OSDS = 3
POOL, IMAGE = "replicated", "bench"
PLACEMENT_GROUPS = 32
PORTS_OF_DAEMONS = 60
BLOCK_FILE_BYTES = 12 << 30  # sparse
MEMORY_BYTES = 1 << 30  # that an OSD aims at

FOR_SSD = {
    "bluestore_debug_enforce_settings": "ssd",
    "osd_op_num_shards": 8,
    "osd_op_num_threads_per_shard": 2,
    "osd_recovery_sleep_hdd": 0,
    "osd_recovery_max_active": 10,
    "osd_snap_trim_sleep_hdd": 0,
    "osd_delete_sleep_hdd": 0,
}


class Ceph(System):
    """See above."""

    name = "ceph"
    title = "Ceph"
    programs = ("ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "rbd", "monmaptool", "ceph-authtool")

    @property
    def configuration(self) -> Path:
        return self.directory / "ceph.conf"

    def version(self) -> str:
        return run(["ceph", "--version"]).split("(")[0].strip()

    def start(self) -> None:
        self.directory.mkdir(parents=True)
        for name in ("mon", "mgr", "run", "log", *(f"osd{number}" for number in range(OSDS))):
            (self.directory / name).mkdir()
        monitor = self._configure()
        self._make_monitor(monitor)
        self._daemon("mon", "a")
        self._daemon("mgr", "x")
        for number in range(OSDS):
            identity = str(uuid.uuid4())
            self._ask("osd", "new", identity)
            run(["ceph-osd", *self._by_name(str(number)), "--mkfs", "--osd-uuid", identity])
            self._daemon("osd", str(number))
        wait_until(lambda: self._status()["osdmap"]["num_up_osds"] == OSDS, "not all OSDs are up")
        self._ask("osd", "pool", "create", POOL, str(PLACEMENT_GROUPS), str(PLACEMENT_GROUPS), "replicated")
        self._ask("osd", "pool", "set", POOL, "min_size", "2")
        self._ask("osd", "pool", "application", "enable", POOL, "rbd")
        self.wait_until_whole()
        run(["rbd", "-c", str(self.configuration), "create", f"{POOL}/{IMAGE}", "--size", f"{self.size_bytes}B"])

    def _configure(self) -> str:
        """Write ceph.conf; where the monitor listens."""
        port = free_ports(PORTS_OF_DAEMONS)
        monitor = f"[v2:127.0.0.1:{port},v1:127.0.0.1:{port + 1}]"
        place = self.directory
        sections: dict[str, dict[str, object]] = {
            "global": {
                "fsid": uuid.uuid4(),
                "mon_initial_members": "a",
                "mon_host": monitor,
                "public_network": "127.0.0.0/8",
                "ms_bind_ipv6": "false",
                "ms_bind_port_min": port + 2,
                "ms_bind_port_max": port + PORTS_OF_DAEMONS - 1,
                **{f"auth_{what}_required": "none" for what in ("cluster", "service", "client")},
                "run_dir": place / "run",
                "admin_socket": "",
                "pid_file": place / "run" / "$name.pid",
                "log_file": place / "log" / "$name.log",
                "mon_cluster_log_file": place / "log" / "cluster.log",
                "crash_dir": place / "log",
                "keyring": place / "keyring",
                "setuser": "root",
                "setgroup": "root",
                "osd_pool_default_size": OSDS,
                "osd_pool_default_pg_autoscale_mode": "off",
                "osd_crush_chooseleaf_type": 0,  # the replicas are on one host
                "mon_data_avail_warn": 2,
                "mon_data_avail_crit": 1,
                "osd_memory_target": MEMORY_BYTES,
                **FOR_SSD,
            },
            "mon": {"mon_data": place / "mon"},
            "mgr": {"mgr_data": place / "mgr"},
            "osd": {
                "osd_data": f"{place}/osd$id",
                "bluestore_block_size": BLOCK_FILE_BYTES,
                "bluestore_block_create": "true",
            },
            "client": {"rbd_cache": "false", "log_file": place / "log" / "client.log"},
        }
        text = "".join(
            f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
            for name, settings in sections.items()
        )
        self.configuration.write_text(text)
        return monitor

    def _make_monitor(self, monitor: str) -> None:
        keyring, monitors = str(self.directory / "keyring"), str(self.directory / "monmap")
        run(["ceph-authtool", "-C", keyring, "-n", "mon.", "-g", "--cap", "mon", "allow *"])
        capabilities = [word for what in ("mon", "osd", "mgr") for word in ("--cap", what, "allow *")]
        run(["ceph-authtool", keyring, "-n", "client.admin", "-g", *capabilities])
        fsid = next(line.split()[-1] for line in self.configuration.read_text().splitlines() if "fsid" in line)
        run(["monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", monitor, monitors])
        run(["ceph-mon", *self._by_name("a"), "--mkfs", "--monmap", monitors, "--keyring", keyring])

    def _by_name(self, name: str) -> list[str]:
        return ["-c", str(self.configuration), "-i", name]

    def _daemon(self, kind: str, name: str) -> None:
        run([f"ceph-{kind}", *self._by_name(name)])

    def _ask(self, *words: str) -> str:
        return run(["ceph", "-c", str(self.configuration), "--connect-timeout", "20", *words])

    def _status(self) -> dict[str, dict[str, int]]:
        return dict(json.loads(self._ask("status", "--format", "json")))

    def stop(self) -> None:
        end(self.pids())

    def fio_arguments(self) -> list[str]:
        os.environ["CEPH_CONF"] = str(self.configuration)  # fio has no argument for it
        return ["--ioengine=rbd", "--clientname=admin", f"--pool={POOL}", f"--rbdname={IMAGE}"]

    def pids(self) -> list[int]:
        found = [self._pid(path) for path in sorted((self.directory / "run").glob("*.pid"))]
        return [pid for pid in found if pid]

    def _pid(self, path: Path) -> int:
        """0 if it runs no more."""
        try:
            pid = int(path.read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return 0
        return pid if str(self.configuration).encode() in words else 0

    @property
    def _last(self) -> Path:
        return self.directory / "run" / f"osd.{OSDS - 1}.pid"

    def kill_replica(self) -> None:
        os.kill(self._pid(self._last), signal.SIGKILL)
        while self._pid(self._last):
            time.sleep(0.02)

    def start_replica(self) -> int:
        self._daemon("osd", str(OSDS - 1))
        return self._pid(self._last)

    def is_whole(self) -> bool:
        status = self._status()
        groups: list[dict[str, object]] = status["pgmap"].get("pgs_by_state", [])  # type: ignore[assignment]
        states = {group["state_name"] for group in groups}
        return states == {"active+clean"} and status["osdmap"]["num_up_osds"] == OSDS

"""The control process: takes the data directory, keeps data processes alive, answers the API, stops cleanly.

Order of a start: settings, data directory and lock, registry, data processes, every family opened, the clients of the
process before, then the NBD addresses, the cluster, the API; only then `ready`. Order of a stop: the cluster, NBD
clients, families (closed cleanly), API, lock. A second SIGINT or SIGTERM stops waiting: the log makes that safe, the
next start only has to replay it. Where systemd keeps descriptors for us, a stop gives it the clients instead of closing
them: it drops them if no start follows.

An upgrade in place: the program on disk is checked; changes of volumes are waited for, the API ends and the cluster is
left; checkpoints; the data processes hand their clients over and end; this process becomes the program on disk. Up to
the moment when clients stand still a failure changes nothing; between that and the end of the data processes it costs
the connections, and this program goes on; after it the new program answers for the rest. What was acknowledged is never
lost.

Rules: nothing of a client's data passes here. A data process that dies is started again (data_processes.py), with the
epochs of its families raised.
"""

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from metadata.families import Families
from metadata.registry import Family
from nbdserver.node import program, systemd_notify
from nbdserver.node.capacity import Capacity
from nbdserver.node.certificates import NodeTls
from nbdserver.node.config import LIVE_KEYS, NodeSettings, load_settings, put_over, too_many_workers
from nbdserver.node.data_process import DataProcess
from nbdserver.node.data_processes import DataProcesses
from nbdserver.node.descriptors import LOCK
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import ConflictError, NodeError
from nbdserver.node.events import EventLog
from nbdserver.node.findings import findings
from nbdserver.node.inherited import Inherited
from nbdserver.node.listeners import Listeners
from nbdserver.node.local_registry import open_registry
from nbdserver.node.overview import Overview
from nbdserver.node.process_name import CONTROL, name_process
from nbdserver.node.scrubs import Scrubs
from nbdserver.node.sizes import round_size
from nbdserver.node.snapshots import Snapshots
from nbdserver.node.succession import Succession
from nbdserver.node.volumes import Volumes
from nbdserver.node.volumes_told import Row
from nbdserver.volume.export import volume_of

if TYPE_CHECKING:
    from nbdserver.node.cluster import Cluster
    from nbdserver.node.cluster_part import ClusterPart

NO_LIMIT = 1 << 20
"""Of descriptors that the program on disk can take over, beyond the data process's own limit."""

SECOND_SIGNAL_S = 0.5
"""A terminal and a wrapper may both deliver one Ctrl-C: what comes sooner is the same wish."""


class Voice(Protocol):
    """Who is told what the node has to say to whoever started it."""

    def say(self, line: str) -> None: ...

    def ready(self, node: "Node") -> None:
        """Clients can attach."""


class Node:
    """A node, from the opened data directory to its clean stop."""

    def __init__(
        self,
        settings: NodeSettings,
        directory: DataDirectory,
        config_path: Path | None,
        overrides: dict[str, Any],
        voice: Voice,
        inherited: Inherited | None = None,
    ) -> None:
        """`settings` are those of `config_path` with `overrides` (from the command line) put over them; `inherited` is
        what the process was started with."""
        self.settings = settings
        self.directory = directory
        self.started_s = time.monotonic()
        self._config_path = config_path
        self._overrides = overrides
        self._voice = voice
        self._say = voice.say
        self.events = EventLog(directory.events, time.monotonic)
        self._registry = open_registry(directory)
        self._families = Families(self._registry, owner="local")
        self._data = DataProcesses(
            settings.workers,
            directory.lock_descriptor,
            self._families.here,
            self._begin_again,
            self._data_event,
            self._say,
            self._give_up,
        )
        ask, event = self._data.ask, self.events.add
        self.capacity = Capacity(directory.path, lambda: self.settings, self._families.here, ask, event)
        self.volumes = Volumes(directory, self._families, self.call, ask, event, settings.segment, self._admit)
        self.snapshots = Snapshots(self.volumes)
        self.tls = NodeTls(settings.tls)
        self.scrubs = Scrubs(directory.scrub, lambda: self.settings.scrub, self.families, self.call, self.events.add)
        self.overview = Overview(self.status, self.events, elsewhere=self._volumes_elsewhere)
        self.part: ClusterPart | None = None
        """Of a node that belongs to a cluster, while it runs."""
        self._hello: dict[str, Any] = {}
        self._stopping = asyncio.Event()
        self._stop_asked_s = 0.0
        self._exit_code = 0
        self.handover: dict[str, Any] | None = None
        self._inherited = inherited or Inherited()
        self._listeners = Listeners(directory.own_socket, self._inherited.activated)
        self._succession = Succession(self._inherited, self._say, self.events.add)
        self._upgrade = ""  # the id of the one that is wanted
        self._wanted = asyncio.Event()  # to stop, or to upgrade

    async def run(self, create: list[tuple[str, int]], serve_api: Callable[["Node"], Any]) -> int:
        """Serve until a signal; returns the exit code. `serve_api` starts the API and returns an awaitable stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop_signal)
        loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(self.reload()))
        program.unblock_signals()
        name_process(CONTROL)
        for problem in self._inherited.problems:
            self._say(f"WARNING: {problem}")
        await self.volumes.remove_scraps()
        self._open_part()
        try:
            await self._start_data()
            await self._take_over()
            for name, size_bytes in create:
                await self.volumes.create(name, size_bytes, exist_ok=True)
            await self._listen()
            self._join_cluster()
        except BaseException:
            await self._stop_data()
            await self._close_part()
            raise
        self._data.supervise()
        watching = [loop.create_task(each.watch()) for each in (self.capacity, self.scrubs, self.overview)]
        try:
            stop_api = await serve_api(self)
        except BaseException:
            _cancel(watching)
            await self._leave_cluster()
            await self._stop_data()
            await self._close_part()
            raise
        self.events.add("node-started", {"pid": os.getpid()})
        self._announce()
        while not self._stopping.is_set():
            await self._wanted.wait()
            self._wanted.clear()
            if self._upgrade and not self._stopping.is_set():
                await self._replace_program(stop_api)
                # It has failed: this program goes on.
                self._data.supervise()
                stop_api = await serve_api(self)
        systemd_notify.notify("STOPPING=1")
        self._data.unsupervise()
        _cancel(watching)
        self.events.add("node-stopping", {})
        await self.scrubs.note()
        await self._leave_cluster()
        if not await self._leave_clients_to_systemd():
            await self._stop_data()
        await self._close_part()
        await stop_api()
        self.close()
        return self._exit_code

    async def call(self, name: str, **arguments: Any) -> Any:
        """Ask the data processes. Raises DataProcessError, also while they are not running."""
        return await self._data.call(name, **arguments)

    @property
    def is_whole(self) -> bool:
        """Whether every data process runs."""
        return self._data.is_whole

    async def status(self) -> dict[str, Any]:
        """Return what `nbdserver status` shows, also while the data process does not answer."""
        await self.capacity.look()
        volumes = await self.volumes.list()
        cluster, of_cluster = self.cluster.status() if self.cluster else (None, [])
        resync: list[dict[str, Any]] = []
        if self.part is not None:
            resync, waits = await self.part.resync.look()
            of_cluster = [*of_cluster, *self.part.findings(volumes, waits, resync)]
        status = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "workers": self._data.describe(),
            "uptime_s": round(time.monotonic() - self.started_s, 1),
            "data": str(self.directory.path),
            "listen": self.addresses(),
            "free_bytes": self.free_bytes(),
            "checksum": self._hello.get("checksum", ""),
            "warnings": self._warnings(),
            "capacity": self.capacity.describe(),
            "fills": self.capacity.fills(),
            "tls": self.tls.status(),
            "scrubs": self.scrubs.status(),
            "handover": self.handover,
            "cluster": cluster,
            "resync": resync,
            "volumes": volumes,
        }
        found = findings(status, self.events.since(0), datetime.now(UTC), of_cluster)
        return status | {"findings": [asdict(finding) for finding in found]}

    def load(self) -> dict[str, Any]:
        """Return what the other nodes of the cluster are told about this one."""
        file_system = self.capacity.file_system()
        return {
            **self.overview.load(),
            "used_bytes": file_system.used_bytes,
            "size_bytes": file_system.size_bytes,
            "fill_percent": file_system.percent,
            "promisable_bytes": self.capacity.promisable_bytes(),
        }

    def _volumes_elsewhere(self) -> tuple[list[Row], int]:
        return self.cluster.volumes_elsewhere() if self.cluster else ([], 0)

    def free_bytes(self) -> int:
        """Return the room on the file system of the data directory."""
        statistics = os.statvfs(self.directory.path)
        return statistics.f_bavail * statistics.f_frsize

    def families(self) -> Sequence[Family]:
        """Return those whose volumes this node has to serve."""
        return self.volumes.owned_families()

    def addresses(self) -> list[str]:
        """Return what NBD clients can connect to, as `HOST:PORT` and `unix:PATH`."""
        sockets = [f"unix:{self.settings.socket}"] if self.settings.socket else []
        activated = [address for _, address in self._inherited.activated]
        return list(dict.fromkeys([*self.settings.listen, *sockets, *activated]))

    async def reload(self) -> None:
        """Take over what the settings file says now, as far as it can change without a restart (SIGHUP)."""
        try:
            fresh = put_over(load_settings(self._config_path), self._overrides) if self._config_path else self.settings
            live = {name: getattr(fresh, name) for name in LIVE_KEYS if "." not in name}
            http = {"public_read": fresh.http.public_read, "token_file": fresh.http.token_file}
            old = self.settings
            self.settings = old.model_copy(update=live | {"http": old.http.model_copy(update=http)})
            try:
                await self._listen()
                await self.tls.reload(fresh.tls, self.call)
                if self.part is not None:
                    await self.part.reload()
                await self.call("limit_data", max_data_bytes=self.settings.max_data)
            except NodeError:
                self.settings = old
                raise
            restart = [
                name for name in type(fresh).model_fields if getattr(fresh, name) != getattr(self.settings, name)
            ]
            self.events.add("settings-reloaded", {"needs_restart": restart})
            self._say("settings reloaded" + (f"; a restart is needed for: {', '.join(restart)}" if restart else ""))
        except NodeError as error:
            self.events.add("settings-not-reloaded", {"reason": str(error)})
            self._say(f"settings not reloaded, the old ones stay: {error}")

    def close(self) -> None:
        """Give back everything but the lock."""
        self.events.add("node-stopped", {})
        self.events.close()
        self._data.close()
        self._registry.close()

    # --- the cluster ---

    async def _admit(self, what: str, more_bytes: int) -> None:
        """Raise ConflictError if this node cannot promise so much more room."""
        if self.cluster is not None:
            self.cluster.refuse_if_draining()
        await self.capacity.admit(what, more_bytes)

    @property
    def cluster(self) -> "Cluster | None":
        """The cluster, while this node takes part in it."""
        return self.part.cluster if self.part is not None else None

    def _open_part(self) -> None:
        """Have what belongs to the cluster that the settings name, if they do. WrongInputError."""
        if self.settings.cluster is None:
            return
        from nbdserver.node.cluster_part import ClusterPart  # what speaks to etcd is loaded where there is a cluster

        self.part = ClusterPart(
            self.settings.cluster,
            self.directory,
            self._families,
            self.volumes,
            self._data,
            program.version(),
            self.load,
            self.overview.told,
            self.events.add,
        )

    def _join_cluster(self) -> None:
        """Take part in the cluster. NodeError."""
        if self.part is not None:
            self.part.join()

    async def _leave_cluster(self) -> None:
        if self.part is not None:
            await self.part.leave()

    async def _close_part(self) -> None:
        part, self.part = self.part, None
        if part is not None:
            await part.close()

    # --- handing over and taking over ---

    async def upgrade_in_place(self) -> dict[str, Any]:
        """Check that the program on disk can take over, and begin; returns {id, program: what it says of itself}.

        `handover` in the status of whichever program goes on has this id when it is over. Raises ConflictError.
        """
        if self._upgrade or self._stopping.is_set():
            raise ConflictError("the node is stopping or being upgraded already")
        wanted = self._upgrade = secrets.token_hex(8)
        try:
            answer = await asyncio.to_thread(program.check)
            if not self._data.is_whole:
                raise ConflictError("a data process is being started again; try again in a moment")
        except BaseException:
            self._upgrade = ""
            raise
        self._wanted.set()
        return {"id": wanted, "program": answer}

    async def _replace_program(self, stop_api: Callable[[], Any]) -> None:
        """Become the program on disk; returns if that failed before the data processes had ended."""
        self._say("upgrade: preparing")
        async with self._data.starting, self.volumes.changing:  # in this order: a start opens volumes
            await stop_api()
            await self._leave_cluster()
            self._data.unsupervise()
            is_prepared = False
            try:
                await self.scrubs.note()
                await self.call("prepare")
                is_prepared = True  # from here on a failure costs the data processes
                descriptors = await self._take_clients(self._upgrade, NO_LIMIT)
            except NodeError as error:
                reason = str(error)
            else:
                await self._become_program_on_disk(descriptors)
        self._say(f"upgrade failed, this program goes on: {reason}")
        self.handover = {"id": self._upgrade, "failure": reason, "clients": 0, "dropped": 0, "pause_s": 0.0}
        self.events.add("handover-failed", {"reason": reason})
        self._upgrade = ""
        if is_prepared:
            self._data.kill()  # they are started again
        try:
            self._join_cluster()
        except NodeError as error:
            self._say(f"the cluster cannot be joined again, restart the node: {error}")

    async def _become_program_on_disk(self, descriptors: list[tuple[str, int]]) -> NoReturn:
        self._say("upgrade: starting the program on disk")
        late: set[signal.Signals] = set()
        program.note_signals(late)
        await asyncio.sleep(0)  # what has arrived before is dealt with in a turn of the loop
        if self._stopping.is_set():
            late.add(signal.SIGTERM)
        await self._close_part()
        activated = [("socket-unit", descriptor) for descriptor, _ in self._inherited.activated]
        self.close()
        program.replace([(LOCK, self.directory.lock_descriptor), *activated, *descriptors], late)

    async def _take_clients(self, handover_id: str, limit: int) -> list[tuple[str, int]]:
        """Let the data processes hand their clients over and end; returns named descriptors. Raises NodeError."""
        descriptors = await self._succession.take_from(self._data.running(), self._listeners, handover_id, limit)
        await self._data.wait_for_end()
        return descriptors

    async def _leave_clients_to_systemd(self) -> bool:
        """Give the clients to systemd, which hands them to the next start; False if it keeps none."""
        room = systemd_notify.store_size() - 1
        if room <= 0 or self._exit_code or not self._data.is_whole:
            return False
        try:
            await self.call("prepare")
            descriptors = await self._take_clients(secrets.token_hex(8), room)
            self._succession.leave_to_systemd(descriptors)
        except (NodeError, OSError) as error:
            self._say(f"the clients cannot be left to systemd: {error}")
            return False
        return True

    async def _take_over(self) -> None:
        """Let the data processes go on with what this process was started with."""
        taken = await self._succession.give_to(self._process_of, self._listeners)
        self.handover = taken or self.handover

    def _process_of(self, export: str) -> DataProcess | None:
        """The one that has a volume, or that of a snapshot."""
        found = self._families.find(volume_of(export))
        return self._data.of(found[0].id) if found else None

    # --- the data processes ---

    async def _start_data(self) -> None:
        await self._data.start()
        processes = self._data.running()
        await asyncio.gather(*(self._begin(process) for process in processes))
        for warning in self._warnings():
            self._say(f"WARNING: {warning}")
        await self._open_families(processes)

    async def _begin(self, process: DataProcess) -> None:
        """Give one that was started its settings."""
        self._hello = await process.call(
            "start",
            cache_bytes=self.settings.cache // self._data.workers,
            max_connections=self.settings.max_connections,
            max_data_bytes=self.settings.max_data,
        )
        await self.tls.start(process.call)
        if self.part is not None:
            await self.part.begin(process)

    async def _begin_again(self, process: DataProcess) -> None:
        """Bring one that was started again to where it serves."""
        await self._begin(process)
        await self._open_families([process])
        self._listeners.listen(self.addresses())
        await self._listen_at(process)

    async def _open_families(self, processes: Sequence[DataProcess]) -> None:
        families = self._families.own()
        await self.volumes.open_all([self._data.placement.families(each.worker, families) for each in processes])
        for process in processes:
            if self.part is not None:
                await self.part.follow(process)
            await self._data.families_are_open(process)

    async def _listen(self) -> None:
        self._listeners.listen(self.addresses())
        for process in self._data.running():
            await self._listen_at(process)

    async def _listen_at(self, process: DataProcess) -> None:
        sockets = self._listeners.sockets()
        process.send_descriptors([descriptor for _, descriptor in sockets])
        await process.call("listen", addresses=[address for address, _ in sockets])
        process.is_serving = True

    async def _stop_data(self) -> None:
        self._listeners.close()
        await self._data.stop(kill=bool(self._exit_code))

    def _give_up(self) -> None:
        self._exit_code = 1
        self._stopping.set()
        self._wanted.set()

    def _data_event(self, kind: str, fields: dict[str, Any]) -> None:
        if self.part is not None:
            self.part.replicas.heard(kind, fields)
        if kind == "recovering":
            self._say(f"recovering {fields['volume']}: {round_size(fields['bytes'])} of log replayed")
            return
        self.events.add(kind, fields)

    def _stop_signal(self) -> None:
        now_s = time.monotonic()
        if self._stopping.is_set() and now_s - self._stop_asked_s > SECOND_SIGNAL_S:
            self._say("stopped without waiting; the next start replays the log")
            os._exit(1)
        if not self._stopping.is_set():
            self._stop_asked_s = now_s
            self._say("stopping")
            self._stopping.set()
            self._wanted.set()

    def _announce(self) -> None:
        self._voice.ready(self)
        systemd_notify.notify("READY=1")

    def _warnings(self) -> list[str]:
        warnings = [*too_many_workers(self.settings), *self.tls.warnings(self._families.all())]
        if self._hello and not self._hello.get("checksum_is_fast", True):
            library = self._hello.get("checksum", "")
            warnings.append(
                f"checksums are computed by {library}, far too slowly; install google-crc32c with its C extension"
            )
        return warnings


def _cancel(tasks: "list[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()

"""The data processes of a node, as one: started, asked, watched, started again, each by itself.

Theory: each family lives in one of them (placement.py). A request about a family goes to its process, any other to all
of them (worker_answers.py); whoever asks need not know how many there are. What each has to know of the others' exports
goes through here (export_table.py): a request is over when all that serve clients know what it has changed, so that who
is told of a new volume can attach to it wherever he connects.

Rules
- One that dies is started again alone, and the others go on. One that dies MAX_RESTARTS times within RESTART_WINDOW_S
  ends the node, so that whoever supervises it hears of it.
- One that is being started is told everything before it accepts the first client; nobody waits for it.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from metadata.registry import Family
from nbdserver.node.asking import Asking
from nbdserver.node.data_process import DataProcess, DataProcessError, Shared
from nbdserver.node.descriptors import close_all
from nbdserver.node.errors import NodeError
from nbdserver.node.export_table import ExportTable
from nbdserver.node.passing import make_inboxes
from nbdserver.node.placement import Placement
from nbdserver.node.shared_figures import SharedFigures
from nbdserver.node.worker_answers import PARTIAL, merged

MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0

Answer = Callable[[int, str, dict[str, Any]], Awaitable[Any]]
"""(worker, what it asks, arguments) → answer."""

_STARTING = "the data process is being started again; try again in a moment"


class DataProcesses:
    """The data processes of this node."""

    def __init__(
        self,
        workers: int,
        lock_descriptor: int,
        families: Callable[[], Sequence[Family]],
        begin_again: Callable[[DataProcess], Awaitable[None]],
        event: Callable[[str, dict[str, Any]], None],
        say: Callable[[str], None],
        give_up: Callable[[], None],
    ) -> None:
        """`begin_again` brings one that was started again to where it serves. `give_up` ends the node."""
        self.workers = workers
        self.placement = Placement(workers)
        self.starting = asyncio.Lock()
        """Held while one is started again."""
        self._families = families
        self._begin_again = begin_again
        self._event = event
        self._say = say
        self._give_up = give_up
        figures = SharedFigures.make(workers)
        self._figures = SharedFigures(figures, workers)
        self._inboxes = make_inboxes(workers)
        inboxes = [(reading.fileno(), writing.fileno()) for reading, writing in self._inboxes]
        self._shared = Shared(lock_descriptor, figures, inboxes)
        self._running: dict[int, DataProcess] = {}
        self._asked: dict[int, Asking] = {}
        self._table = ExportTable(workers)
        self._telling = asyncio.Lock()
        self.answer: Answer | None = None
        """Answers what a data process asks."""
        self.ended: Callable[[int], None] = lambda worker: None
        """Told of each that has ended."""
        self.exports_changed: Callable[[], None] = lambda: None
        """Called when what clients may be told of an export has changed."""
        self._supervisors: list[asyncio.Task[None]] = []

    def running(self) -> list[DataProcess]:
        """Those that run, in order."""
        return [self._running[worker] for worker in sorted(self._running)]

    @property
    def is_whole(self) -> bool:
        """Whether all of them run."""
        return len(self._running) == self.workers

    # -- asking

    async def call(self, name: str, **arguments: Any) -> Any:
        """Ask the process of `family`, or all. Raises DataProcessError, also while it is not running."""
        family = arguments.get("family")
        if not family and name in PARTIAL:
            return await self.ask(name, **arguments)
        try:
            if family:
                return await self._process_of(family).call(name, **arguments)
            return merged(name, await asyncio.gather(*(process.call(name, **arguments) for process in self._all())))
        finally:
            await self._tell()  # what was refused may have been half done

    async def ask(self, name: str, **arguments: Any) -> Any:
        """As `call`, for what is only looked at: answered soon or not at all (asking.py). What all are asked in
        PARTIAL is answered by those that do; `silent` are the families of the others."""
        family = arguments.get("family")
        if family:
            return await self._asking(self._process_of(family)).ask(name, **arguments)
        processes = self.running() if name in PARTIAL else self._all()
        asked = [self._asking(process).ask(name, **arguments) for process in processes]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if not processes or (failures and (len(failures) == len(answers) or name not in PARTIAL)):
            raise failures[0] if failures else DataProcessError(_STARTING)
        answer = merged(name, [answer for answer in answers if not isinstance(answer, BaseException)])
        if isinstance(answer, dict) and failures:
            answer["silent"] = self._silent_families()
        return answer

    def describe(self) -> list[dict[str, Any]]:
        """What `status` shows: each of them, and the volumes of its families."""
        families = self._families()
        return [
            {
                "worker": worker,
                "pid": self._running[worker].pid if worker in self._running else None,
                "silent_s": round(self._silent_s(worker), 1),
                "volumes": [
                    volume.name for family in self.placement.families(worker, families) for volume in family.volumes
                ],
            }
            for worker in range(self.workers)
        ]

    def _silent_s(self, worker: int) -> float:
        """For how long one has not answered; 0.0 while it does."""
        return self._asked[worker].silent_s if worker in self._asked else 0.0

    def _asking(self, process: DataProcess) -> Asking:
        return self._asked.setdefault(process.worker, Asking(process.call, time.monotonic))

    def _silent_families(self) -> list[str]:
        silent = [worker for worker in self._asked if self._silent_s(worker)]
        families = self._families()
        return [family.id for worker in silent for family in self.placement.families(worker, families)]

    def _process_of(self, family: str) -> DataProcess:
        process = self.of(family)
        if process is None:
            raise DataProcessError(_STARTING)
        return process

    def _all(self) -> list[DataProcess]:
        """Every process, for what all have to do."""
        if not self.is_whole:
            raise DataProcessError(_STARTING)
        return self.running()

    def of(self, family: str) -> DataProcess | None:
        """The process of a family, which gets one if it is new; None while it does not run."""
        worker = self.placement.worker(family)
        if worker is None:
            worker = self.placement.place(family, self._families())
        return self._running.get(worker)

    def notify(self, worker: int, kind: str, fields: dict[str, Any]) -> None:
        """Tell one something, if it runs."""
        if worker in self._running:
            self._running[worker].notify(kind, fields)

    def notify_all(self, kind: str, fields: dict[str, Any]) -> None:
        """Tell all that run."""
        for process in self.running():
            process.notify(kind, fields)

    # -- what they know of each other

    def snapshots(self) -> dict[str, dict[str, Any]]:
        """As ExportTable has them."""
        return self._table.snapshots()

    async def _tell(self) -> None:
        """Tell every process what has changed at the others, and wait until those that serve know it."""
        async with self._telling:
            changes = self._table.take_changes()
            if not changes or self.workers == 1:
                return
            for process in self.running():
                others = {worker: changed for worker, changed in changes.items() if worker != process.worker}
                if others:
                    process.notify("exports", {"workers": others})
            serving = [self._asking(process).ask("ping") for process in self.running() if process.is_serving]
            # One that has died is told when it is back, one that hangs when it goes on.
            await asyncio.gather(*serving, return_exceptions=True)

    def _heard(self, worker: int, kind: str, fields: dict[str, Any]) -> None:
        if kind == "export":
            self._table.note(worker, fields["name"], fields["listing"])
            self.exports_changed()
        else:
            self._event(kind, fields)

    # -- running

    async def start(self) -> None:
        """Start all, and place the families on them. Raises OSError."""
        self.placement.place_all(self._families())
        for worker in range(self.workers):
            await self._start(worker)

    async def _start(self, worker: int) -> DataProcess:
        self._table.begins(worker)
        process = self._running[worker] = await DataProcess.start(
            worker,
            self.workers,
            self._shared,
            lambda kind, fields: self._heard(worker, kind, fields),
            None if self.answer is None else partial(self.answer, worker),
        )
        process.notify("exports", {"workers": self._table.others(worker)})
        return process

    async def families_are_open(self, process: DataProcess) -> None:
        """One has opened all of its families."""
        self._table.has_begun(process.worker)
        self.exports_changed()
        await self._tell()

    def supervise(self) -> None:
        """Start again what ends, from now on."""
        loop = asyncio.get_running_loop()
        self._supervisors = [loop.create_task(self._supervise(worker)) for worker in range(self.workers)]

    def unsupervise(self) -> None:
        """Let them end."""
        for task in self._supervisors:
            task.cancel()
        self._supervisors = []

    async def _supervise(self, worker: int) -> None:
        name = "the data process" if self.workers == 1 else f"data process {worker}"
        ends: deque[float] = deque(maxlen=MAX_RESTARTS)
        while True:
            if worker in self._running:
                code = await self._running[worker].wait()
                self._ended(self._running[worker])
                self._event("data-process-ended", {"worker": worker, "exit_code": code})
                self._say(f"{name} ended with {code}; starting it again")
            ends.append(time.monotonic())
            if len(ends) == MAX_RESTARTS and ends[-1] - ends[0] < RESTART_WINDOW_S:
                self._say(f"{name} ended {MAX_RESTARTS} times within {RESTART_WINDOW_S:.0f} s; giving up")
                self._give_up()
                return
            try:
                async with self.starting:
                    await self._begin_again(await self._start(worker))
            except (NodeError, OSError) as error:
                self._say(f"{name} could not be started again: {error}")
                if worker not in self._running:
                    self._give_up()
                    return
                self._running[worker].kill()  # and once more, from the top

    def _ended(self, process: DataProcess) -> None:
        self._running.pop(process.worker, None)
        self._asked.pop(process.worker, None)
        self._figures.clear(process.worker)
        self.ended(process.worker)

    # -- ending

    async def stop(self, kill: bool = False) -> None:
        """End all: what clients have asked is finished and every family closed, or else (`kill`) at once."""
        self.unsupervise()
        asked = [process.call("stop") for process in self.running()]
        stopped = await asyncio.gather(*asked, return_exceptions=True)
        for reason in stopped:
            if isinstance(reason, DataProcessError):
                self._event("data-process-stopped-badly", {"reason": str(reason)})
            elif isinstance(reason, BaseException):
                raise reason
        if kill:
            self.kill()
        await self.wait_for_end()

    async def wait_for_end(self) -> None:
        """Wait until all have ended that were asked to."""
        for process in self.running():
            await process.wait()
            self._ended(process)

    def kill(self) -> None:
        """End all now."""
        for process in self.running():
            process.kill()

    def close(self) -> None:
        """Give back what they shared; none runs any more."""
        for pair in self._inboxes:
            for one in pair:
                one.close()
        with contextlib.suppress(OSError):
            close_all([self._shared.figures])

"""What is wrong with a node, and what to do about it: a status in, sentences out.

Theory. Everybody who looks (`nbdserver status`, the status page, a cron job) is told the same, in words that somebody
understands who was woken up by it: what is wrong, of what, and what to do next. So it is computed once, here, from
what `Node.status` has put together; nothing is asked and no clock is read.

Rules
- Urgency says when somebody has to act: NOW (clients notice it, or data is at stake), SOON (they will), NOTE (it is
  over; good to know).
- What many volumes have in common is one finding that names the first of them, and beyond MOST the rest is counted: the
  list can be read with a thousand volumes.
- A warning reads `what is wrong; what to do`.

Known weakness: what happened is known as long as its event is in the ring (events.py): a node with many events forgets
within a day.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from nbdserver.node.errors import counted, listed
from nbdserver.node.sizes import round_size

NOW, SOON, NOTE = "now", "soon", "note"
URGENCIES = (NOW, SOON, NOTE)

MOST = 20

TOLD_FOR = timedelta(hours=24)
"""How long something that happened is a finding."""

FULL = {
    "disk": (
        "the file system has no more room",
        "make room: delete what is not needed, or grow the file system; writes go on by themselves then",
    ),
    "max-data": (
        "its data takes all that its max-data allows",
        "raise it (nbdserver volume set NAME max-data=SIZE), or trim and delete what is not needed",
    ),
    "node-max-data": (
        "all volumes together take all that max_data in node.yaml allows",
        "raise it and reload (SIGHUP), or delete what is not needed",
    ),
}
"""{why a volume is full: (what is wrong, what to do)}."""


@dataclass(frozen=True)
class Finding:
    """Something that somebody should know of."""

    urgency: str
    """One of URGENCIES."""
    subject: str
    """What it is about: `disk0`, `file system`, `data process`; "" if the problem says it."""
    problem: str
    """What is wrong, to be read after the subject: `is 96.0 % full: ...`."""
    remedy: str
    """What to do about it; "" if there is nothing to do."""

    @property
    def sentence(self) -> str:
        """Subject and problem."""
        return f"{self.subject} {self.problem}".strip()


def findings(
    status: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    now: datetime,
    of_cluster: Iterable[Finding] = (),
) -> list[Finding]:
    """What `status` (as `Node.status` makes it) and the `events` up to `now` say, and what is wrong with the cluster:
    the most urgent first."""
    found = [
        *_of_data_processes(status),
        *of_cluster,
        *_of_warnings(status["warnings"]),
        *_of_fills(status["fills"], status["data"]),
        *_of_volumes(status["volumes"]),
        *_of_scrubs(status["scrubs"]),
        *_of_handover(status["handover"]),
        *_of_events([event for event in events if now - datetime.fromisoformat(event["time"]) < TOLD_FOR]),
    ]
    return in_order(found)


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """The most urgent first, what is as urgent stays as it is; at most MOST and how many there are more."""
    ordered = sorted(found, key=lambda finding: URGENCIES.index(finding.urgency))
    if len(ordered) <= MOST:
        return ordered
    more, urgency = len(ordered) - MOST, ordered[MOST].urgency
    return [*ordered[:MOST], Finding(urgency, "", f"and {more} more like these", "nbdserver volume list shows all")]


def need_attention(found: Iterable[Finding]) -> bool:
    """Whether somebody has to act."""
    return any(finding.urgency != NOTE for finding in found)


def _of_data_processes(status: Mapping[str, Any]) -> list[Finding]:
    found = []
    workers = status["workers"]
    for worker in workers:
        is_alone = len(workers) == 1
        subject = "data process" if is_alone else f"data process {worker['worker']}"
        pid, silent_s = worker["pid"], worker["silent_s"]
        if pid is None:
            missing = "no volume is served" if is_alone else f"{counted(len(worker['volumes']), 'volume')} not served"
            problem = f"is being started again: {missing} until it has replayed its log"
            found.append(Finding(NOW, subject, problem, "wait; if it lasts, the node's own output says why"))
        elif silent_s:
            remedy = (
                f"look what holds it (top, dmesg, a disk that hangs); the last resort is kill -9 {pid}: it is started "
                "again, clients connect again, and what was answered is not lost"
            )
            found.append(Finding(NOW, subject, f"has not answered for {silent_s:.0f} s: clients wait", remedy))
    return found


def _of_warnings(warnings: Sequence[str]) -> list[Finding]:
    found = []
    for warning in warnings:
        problem, _, remedy = warning.partition("; ")
        found.append(Finding(NOW, "", problem, remedy))
    return found


def _of_fills(fills: Sequence[Mapping[str, Any]], directory: str) -> list[Finding]:
    found = []
    for fill in fills:
        if not fill["alarm"]:
            continue
        subject = fill["subject"]
        used, size = round_size(fill["used_bytes"]), round_size(fill["size_bytes"])
        kind, _, name = subject.partition(" ")
        if kind == "volume":
            remedy = FULL["max-data"][1].replace("NAME", name)
        elif subject == "max_data":
            remedy = FULL["node-max-data"][1]
        else:
            remedy = f"delete volumes or snapshots, or what else lies beside {directory}, or grow the file system"
        problem = f"is {fill['percent']:.1f} % full: {used} of {size}"
        found.append(Finding(SOON if fill["alarm"] < 90 else NOW, subject, problem, remedy))
    return found


def _of_volumes(volumes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """One finding for all volumes of which the same can be said."""
    same: dict[tuple[str, str], list[str]] = {}
    for volume in volumes:
        if volume["reason"]:
            remedy = "stop the node and run nbdserver check: it says what is broken and what is whole"
            same.setdefault((f"not served: {volume['reason']}", remedy), []).append(volume["name"])
        elif volume["state"] == "full":
            why, remedy = FULL[volume["disk"]["full"]]
            same.setdefault((f"full: writes get ENOSPC ({why})", remedy), []).append(volume["name"])
    if damaged := _damaged(volumes):
        exports = listed(sorted({block["export"] for block in damaged}))
        problem = f"damaged: {counted(len(damaged), 'block')} in {exports} cannot be read, clients get EIO"
        remedy = "nbdserver volume show NAME lists them; write them again from a backup; dmesg may tell of the disk"
        same[problem, remedy] = sorted({block["volume"] for block in damaged})
    return [
        Finding(NOW, listed(names), f"{'is' if len(names) == 1 else 'are'} {problem}", remedy)
        for (problem, remedy), names in same.items()
    ]


def _damaged(volumes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each damaged block once: the volumes of a family share what is told of it."""
    blocks = {
        (block["export"], block["lba"]): block for volume in volumes for block in volume["disk"].get("damaged", ())
    }
    return list(blocks.values())


def _of_scrubs(scrubs: Sequence[Mapping[str, Any]]) -> list[Finding]:
    return [
        Finding(
            SOON,
            f"scrub of {scrub['volume']}",
            f"failed: {scrub['reason']}",
            f"when that is mended: nbdserver scrub start {scrub['volume']}",
        )
        for scrub in scrubs
        if scrub["state"] == "failed"
    ]


def _of_handover(handover: Mapping[str, Any] | None) -> list[Finding]:
    if handover is None or not handover["failure"]:
        return []
    remedy = "the program before goes on; when that is mended: nbdserver upgrade-in-place"
    return [Finding(SOON, "upgrade", f"failed: {handover['failure']}", remedy)]


def _of_events(recent: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found = []
    ended = [event for event in recent if event["kind"] == "data-process-ended"]
    if ended:
        times = "once" if len(ended) == 1 else f"{len(ended)} times"
        problem = f"ended unexpectedly {times} in 24 h, last at {_minute(ended[-1])} UTC, with {ended[-1]['exit_code']}"
        remedy = "nothing that was answered is lost; the node's output before that, and dmesg (memory?), say why"
        found.append(Finding(NOTE, "data process", problem, remedy))
    raised = {event["volume"]: event for event in recent if event["kind"] == "generation-raised"}
    if raised:
        seen = _minute(max(raised.values(), key=_time))
        problem = (
            f"may lack writes that were not flushed: the machine went down while they were open, seen at {seen} UTC"
        )
        remedy = "what was flushed is there; check the file systems on them if their hosts went on meanwhile"
        found.append(Finding(NOTE, listed(sorted(raised)), problem, remedy))
    return found


def _time(event: Mapping[str, Any]) -> str:
    return str(event["time"])


def _minute(event: Mapping[str, Any]) -> str:
    return datetime.fromisoformat(event["time"]).strftime("%H:%M")

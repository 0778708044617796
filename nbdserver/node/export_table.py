"""What each data process has to know of the exports of the others, kept by the control process.

Theory: a process says what a client may be told of each of its exports (name, description, who may see it, TLS)
whenever that changes; what it said goes on to all the others. Nothing else is needed there: for everything that names
one export a client is taken to the process that has it. Other nodes are told of the snapshots (snapshots_told.py).

Rules
- A process that is started again first hears of all exports of the others. What it had itself stays known to them
  while it opens its families, so that who asks for one of those waits; then what it does not have any more is
  forgotten.
"""

from collections.abc import Mapping
from typing import Any

Listing = dict[str, Any] | None
"""{description, allowed, tls} of an export, and created_s and size_bytes if it is a snapshot; None: there is none of
that name any more."""


class ExportTable:
    """The exports of `workers` processes."""

    def __init__(self, workers: int) -> None:
        self._exports: list[dict[str, dict[str, Any]]] = [{} for _ in range(workers)]
        self._unconfirmed: list[set[str]] = [set() for _ in range(workers)]
        self._changes: list[dict[str, Listing]] = [{} for _ in range(workers)]

    def note(self, worker: int, name: str, listing: Listing) -> None:
        """The process says this of one of its exports."""
        self._unconfirmed[worker].discard(name)
        if listing is None:
            self._exports[worker].pop(name, None)
        else:
            self._exports[worker][name] = listing
        self._changes[worker][name] = listing

    def snapshots(self) -> dict[str, dict[str, Any]]:
        """The listings of all snapshots, by name of the export; those of a volume in the order in which they came."""
        exports = {name: listing for worker in self._exports for name, listing in worker.items()}
        return {name: listing for name, listing in exports.items() if "created_s" in listing}

    def take_changes(self) -> dict[int, dict[str, Listing]]:
        """What has to be told to the others, by the process whose exports they are."""
        changes = {worker: changed for worker, changed in enumerate(self._changes) if changed}
        self._changes = [{} for _ in self._changes]
        return changes

    def others(self, worker: int) -> Mapping[int, Mapping[str, Listing]]:
        """Everything that a process has to know when it begins."""
        return {other: dict(exports) for other, exports in enumerate(self._exports) if other != worker and exports}

    def begins(self, worker: int) -> None:
        """The process was started again."""
        self._unconfirmed[worker] = set(self._exports[worker])

    def has_begun(self, worker: int) -> None:
        """It has said all that it has: what it did not speak of is gone."""
        for name in list(self._unconfirmed[worker]):
            self.note(worker, name, None)

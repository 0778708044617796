"""One replicated family on one node: its replica, and its owner when this node is that.

Theory. A node that has a replica follows the family's value in the registry and obeys whoever owns it. It becomes the
owner when it is asked to (a client attaches here, the owner's node is drained), never by itself. Replica, candidate and
owner share one log; at any time at most one of them moves it.

     following ─► candidate ─► owner ─► following (deposed)

Rules
- A stream with a higher epoch ends the candidate and the owner before it is obeyed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from metadata.registry_calls import Event, Reading, Unavailable
from metadata.replica_set import ReplicaSet, ReplicaSetError, ReplicaSets, replica_set_key
from metadata.seams import Clock, Network
from nbdserver.replication.block_requests import ask_in_turn
from nbdserver.replication.comparison import Comparison, Difference
from nbdserver.replication.copy_budget import CopyBudget
from nbdserver.replication.copying import CopyCounts
from nbdserver.replication.in_sync_set import Report
from nbdserver.replication.link import Link, LinkEvents
from nbdserver.replication.owner import Owner
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.replication.replica import Replica
from nbdserver.replication.replica_log import Found, ReplicaLog
from nbdserver.replication.takeover import Takeover
from protocol.peer import Open

Taken = Callable[[str], None]
"""Called with why it was not taken over, empty if it was."""


class ReplicatedFamily:
    """See above. `address_of(node)` is where a node listens to its peers; "" if that is not known yet."""

    def __init__(
        self,
        clock: Clock,
        network: Network,
        registry: ReplicaSets,
        log: ReplicaLog,
        family: bytes,
        node: str,
        address_of: Callable[[str], str],
        report: Report,
        budget: CopyBudget | None = None,
    ) -> None:
        """`budget`: what all families of a process share when regions are copied."""
        self.family = family
        self.log = log
        self.value: ReplicaSet | None = None
        """As it was heard of last."""
        self.owner: Owner | None = None
        self.replica = Replica(clock, log, self._higher_epoch)
        self.gave_up: Callable[[str], None] = lambda reason: None
        """Told, with a reason, when this node is not the owner any more, before anybody else is obeyed."""
        self.copied = CopyCounts()
        self.differences: list[Difference] = []
        """What the last comparison found."""
        self._clock = clock
        self._network = network
        self._registry = registry
        self._key = replica_set_key(family)
        self._node = node
        self._address_of = address_of
        self._report = report
        self._budget = CopyBudget(clock) if budget is None else budget
        self._takeover: Takeover | None = None
        self._taken: list[Taken] = []
        self._only_again = False  # all who wait want it for who was the owner last
        self._comparison: Comparison | None = None
        self._compared: Callable[[str], None] = lambda reason: None
        self._closed = False
        log.repair_from(self._fetch_blocks)
        self._watch = registry.watch(self._key, self._heard)

    def accept(self, stream: PeerStream, frame: Open) -> None:
        """A peer has opened a stream for this family."""
        self.replica.open(stream, frame)

    def close(self) -> None:
        """End everything; the log is the caller's."""
        self._closed = True
        self.log.repair_from(None)
        self.stop_comparing("the node stops")
        self._watch.cancel()
        self._end_takeover("the node stops")
        self._tell_taken("the node stops")
        if self.owner is not None:
            self.owner.depose("the node stops")
        self.replica.close()

    def _fetch_blocks(self, mbas: Sequence[int], done: Callable[[Found], None]) -> None:
        """Where blocks come from that have rotted here: from the members, or from the owner."""
        ask_in_turn(self._clock, self.owner.members if self.owner is not None else (self.replica,), mbas, done)

    # --- the registry ---

    def _heard(self, event: Event) -> None:
        for key, value in event.changes:
            if key != self._key or value is None:
                continue
            try:
                self.changed(ReplicaSet.decode(value))
            except ReplicaSetError as error:
                self._report("replica-set-unreadable", {"reason": str(error)})

    def changed(self, value: ReplicaSet) -> None:
        """The registry shows this value (OwnerEvents too)."""
        if self.value is None or value.number > self.value.number:
            self.value = value
            if self.owner is not None:
                self.owner.heard(value)

    # --- taking over ---

    def take_over(self, done: Taken, only_again: bool = False) -> None:
        """Become the owner; `only_again`: unless another node owns the family by now. `done` is never called from
        inside."""
        if self.owner is not None:
            self._clock.call_soon(lambda: done(""))
            return
        self._only_again = only_again and (self._only_again or not self._taken)
        self._taken.append(done)
        if len(self._taken) == 1:
            self._registry.get_later(self._key, self._read)

    def _read(self, answer: Reading | Unavailable) -> None:
        if self._closed or self._takeover is not None or not self._taken:
            return
        if isinstance(answer, Unavailable):
            self._tell_taken(f"the registry does not answer: {answer.reason}")
            return
        try:
            value = ReplicaSet.decode(answer.items[0][1]) if answer.items else None
        except ReplicaSetError as error:
            self._tell_taken(f"the registry's value cannot be used: {error}")
            return
        reason = self._why_not(value)
        if reason or value is None:
            self._tell_taken(reason)
            return
        self.changed(value)
        self._takeover = Takeover(self._clock, self._registry, self._key, self._node, self.replica, value, self)

    def _why_not(self, value: ReplicaSet | None) -> str:
        """Why this node cannot be a candidate."""
        if value is None:
            return "the registry does not know the family"
        if value.epoch < self.replica.epoch:  # what was read is old by now, and the owner's grants never end
            return f"epoch {self.replica.epoch} was opened here"
        if self._only_again and value.owner != self._node:
            return f"{value.owner} owns it by now"
        if value.member(self._node) is None:
            return f"{self._node} is not in sync"
        if self.log.resync_count:
            return f"{self._node} has regions to fetch"
        return ""

    def _tell_taken(self, reason: str) -> None:
        taken, self._taken = self._taken, []
        for done in taken:
            done(reason)

    @property
    def is_candidate(self) -> bool:
        """Whether it has been asked to become the owner, and neither is it nor knows that it cannot."""
        return bool(self._taken)

    def _end_takeover(self, reason: str) -> None:
        if self._takeover is not None:
            self._takeover.cancel()
            self.not_taken(reason)

    def links(self, value: ReplicaSet, events: Takeover) -> Mapping[str, Link]:
        """TakeoverEvents."""
        return {node: self.link(node, events) for node in value.placement if node != self._node}

    def link(self, node: str, events: LinkEvents) -> Link:
        """OwnerEvents."""
        return Link(
            self._clock, self._network, self.log, events, self.family, self._node, node, self._address_of, self._budget,
            self.copied,
        )  # fmt: skip

    def taken(self, value: ReplicaSet, links: Mapping[str, Link]) -> None:
        """TakeoverEvents."""
        self._takeover = None
        self._report("owner", {"epoch": value.epoch, "generation": value.generation})
        self.owner = Owner(
            self._clock, self._registry, self._key, self._node, self.log, value, links, self, self._report
        )
        self.changed(value)
        self._tell_taken("")

    def not_taken(self, reason: str) -> None:
        """TakeoverEvents."""
        self._takeover = None
        self.replica.give_again()
        self._report("not-taken-over", {"reason": reason})
        self._tell_taken(reason)

    def deposed(self, reason: str) -> None:
        """OwnerEvents."""
        self.owner = None
        self.stop_comparing(reason)
        self.gave_up(reason)
        self.replica.give_again()

    def _higher_epoch(self, epoch: int) -> None:
        """A stream with a higher epoch than any before was opened here."""
        reason = f"epoch {epoch} was opened here"
        self._end_takeover(reason)
        if self.owner is not None:
            self.owner.depose(reason)

    # --- comparing ---

    def compare(self, bytes_per_s: int, done: Callable[[str], None]) -> None:
        """Compare what all members hold; `done` at the end, with why it could not be done. Of the owner: others have
        nothing to compare with. One at a time: the last one goes on."""
        self.stop_comparing("another one was begun")
        owner = self.owner
        if owner is None:
            self._clock.call_soon(partial(done, ""))
            return
        self._compared = done
        self._comparison = Comparison(
            self._clock, self.log, self._node, lambda: owner.members, bytes_per_s, self._report, self._has_compared
        )

    def stop_comparing(self, reason: str) -> None:
        """End a comparison that is under way; idempotent."""
        if self._comparison is not None:
            self._comparison.stop()
            self._comparison = None
            self._clock.call_soon(partial(self._compared, f"the replicas were not all compared: {reason}"))

    def _has_compared(self, differences: list[Difference], not_compared: int) -> None:
        self._comparison = None
        self.differences = differences
        left = [each for each in differences if not each.is_repaired]
        if left:
            self._compared(
                f"the replicas differ in {len(left)} regions, first at {left[0].offset_bytes}: {left[0].to_do}"
            )
        else:
            self._compared(f"{not_compared} regions could not be compared with all members" if not_compared else "")

"""The master: everything that a node does for the others while an epoch is its own.

Theory: the term numbers and sends; confirmations count what voters have persisted; admission lets nodes in; what is
kept goes through the registry first; what expires is deleted. This module binds them, and judges by the nodes' signs of
life whether they are suspect and whether this master still has a majority.

Rules
- One change of the voters at a time. Until its answer is known a confirmation needs both lists; UNKNOWN is asked again,
  and LOST is settled by the watch: the state that it brings says whose it is.
- A master that has not heard a majority of the voters for QUORUM_S gives the epoch up, so that one that is heard can
  take over. It confirms nothing meanwhile.
- A suspicion is published and strikes nobody.
"""

import logging
from collections.abc import Callable
from random import Random

from metadata.directory.admission import Admission
from metadata.directory.confirmations import Confirmations
from metadata.directory.expiries import Expiries
from metadata.directory.follower import POSITION_S
from metadata.directory.kept import Kept
from metadata.directory.outbox import Outbox
from metadata.directory.registry_keys import (
    EVERYBODYS,
    MASTER_KEY,
    STATE_KEY,
    STATE_PREFIX,
    MasterState,
    Member,
)
from metadata.directory.replica import Replica
from metadata.directory.reports import Answer, Done
from metadata.directory.suspicion import Suspicion
from metadata.directory.term import Link, Term
from metadata.registry_calls import Change, Outcome, Reading, Swap
from metadata.seams import Clock, Registry
from protocol.directory import (
    Action,
    Confirm,
    MalformedError,
    NodeKind,
    Position,
    PositionReport,
    Reason,
    Report,
    Request,
    Update,
)
from protocol.directory_control import Hold, Join, Ready, Subscribe, Subscribed, SubscribeRefused, pack_starts

QUORUM_S = 5.0
SWAP_RETRY_S = 0.5
LOOK_S = 0.5  # between looks at who is silent

_log = logging.getLogger(__name__)


class Master:
    """One term of one node."""

    def __init__(
        self,
        clock: Clock,
        registry: Registry,
        random: Random,
        me: Member,
        replica: Replica,
        outbox: Outbox,
        members: Callable[[], dict[int, Member]],
        state: MasterState,
        kept: Reading,
        took: Callable[[MasterState], None],
        give_up: Callable[[str], None],
    ) -> None:
        """`took(state)`: the registry has this new state; `give_up(why)` ends the term."""
        now_s = clock.now()
        self.state = state
        self.me = me
        self._clock = clock
        self._registry = registry
        self._replica = replica
        self._outbox = outbox
        self._members = members
        self._took = took
        self._give_up = give_up
        self._has_ended = False
        self.confirmations = Confirmations(state.epoch, state.voters, replica.position.sequence + 1)
        self.term = Term(state.epoch, me.node, replica, self.confirmations, outbox, now_s)
        self.admission = Admission(
            self.term,
            self.confirmations,
            me,
            members,
            self._suspects,
            self._change_voters,
            outbox,
            random,
        )
        self.kept = Kept(clock, registry, state.epoch, lambda: self.state.encode(), lambda: give_up("another came"))
        self._pulses: dict[int, Suspicion] = {}
        self._heard_s: dict[int, float] = dict.fromkeys(state.voters, now_s)
        self._suspected: set[str] = set()
        self._look_at_s = now_s + LOOK_S
        self._waits = 0
        self._waiting: dict[int, Done] = {}
        self._wanted_state: MasterState | None = None
        self._state_taken: Callable[[], None] | None = None
        self._begin(kept, now_s)

    def _begin(self, kept: Reading, now_s: float) -> None:
        """Publish who is the master, and make the map say of kept keys what the registry says."""
        replica = self._replica
        self.term.publish(Update(Action.PUT, MASTER_KEY, self.me.name.encode()))
        self.term.publish(Update(Action.PUT, self.me.key, self.me.encode()))
        try:
            truth = self.kept.load(kept)
        except MalformedError as error:
            _log.error("what the registry keeps for the directory cannot be read: %s", error)
            truth = {}
        for key, update in truth.items():
            entry = replica.map.entry(key)
            if entry is None or entry.update != update:
                self.term.publish(update)
        for entry in list(replica.map.entries()):
            if entry.update.is_kept and entry.update.key not in truth:
                self.term.publish(Update(Action.DELETE, entry.update.key, is_kept=True))
        self._suspected = {key.removeprefix(STATE_PREFIX) for key, _ in replica.map.range(STATE_PREFIX)}
        self.expiries = Expiries(replica.map, now_s)
        self.refresh_audience()
        self.persisted(replica.store.persisted)

    def refresh_audience(self) -> None:
        """Members or joins have changed."""
        nodes = {member.node for member in self._members().values() if member.kind is NodeKind.FIRST}
        nodes |= self.admission.joining().keys()
        nodes |= self.state.voters.keys()
        self.term.audience = tuple(sorted(nodes - {self.me.node}))

    # --- publishing ---

    def publish(self, update: Update, confirm: Confirm, done: Done | None) -> None:
        """Publish one update; `done` gets the answer. The caller flushes."""
        if self._has_ended or (confirm is Confirm.SITE and self.confirmations.is_full):
            if done is not None:
                done(Answer.NOT_DONE)
            return
        if confirm is Confirm.REGISTRY or self.kept.has(update.key):
            if not self.kept.takes(update.key):
                if done is not None:
                    done(Answer.NOT_DONE)
                return
            self.kept.change(
                update,
                lambda: self._kept(update, done),
                lambda is_unknown: done(Answer.UNKNOWN if is_unknown else Answer.NOT_DONE) if done else None,
            )
            self.term.saw(update)  # the same report comes again while the registry is asked
            return
        sequence = self._publish(update)
        if confirm is Confirm.SITE:
            self.wait(sequence, done)
        elif done is not None:
            done(Answer.CONFIRMED)

    def wait(self, sequence: int, done: Done | None) -> None:
        """Answer when that sequence is confirmed."""
        self._waits += 1
        number = self._waits
        if done is not None:
            self._waiting[number] = done

        def confirmed() -> None:
            if (waiting := self._waiting.pop(number, None)) is not None:
                waiting(Answer.CONFIRMED)

        self.confirmations.wait(sequence, confirmed)

    def _kept(self, update: Update, done: Done | None) -> None:
        self._publish(update._replace(is_kept=True))
        self.term.flush(self._clock.now())
        if done is not None:
            done(Answer.CONFIRMED)

    def _publish(self, update: Update) -> int:
        sequence = self.term.publish(update)
        self.expiries.taken(Position(self.term.epoch, sequence), update, self._clock.now())
        return sequence

    # --- what nodes say ---

    def heard(self, node: int, now_s: float) -> None:
        """A frame of that node has come."""
        self._heard_s[node] = now_s

    def position(self, node: int, report: PositionReport, now_s: float) -> None:
        """An agent says how far it is."""
        pulse = self._pulses.get(node)
        if pulse is None:
            pulse = self._pulses[node] = Suspicion(POSITION_S, now_s)
        pulse.heard(now_s)
        self.admission.alive(node, now_s)
        if report.epoch == self.term.epoch and self._replica.history.has(report.position):
            self._persisted_by(node, report.position, now_s)

    def persisted(self, position: Position) -> None:
        """This node's own store has synced that."""
        self._persisted_by(self.me.node, position, self._clock.now())

    def _persisted_by(self, node: int, position: Position, now_s: float) -> None:
        before = self.confirmations.confirmed
        self.confirmations.persisted(node, position)
        if self.confirmations.confirmed > before:
            self.term.beat_soon(now_s)

    def requested(self, node: int, request: Request, now_s: float) -> None:
        if request.epoch == self.term.epoch:
            self.term.requested(node, request.ranges, now_s)
            self.admission.alive(node, now_s)

    def reported(self, node: int, report: Report) -> None:
        """A node asks for an update. MalformedError."""
        update = Update.decode(report.update)
        if report.epoch != self.term.epoch or update.origin != node or self.term.is_old(update):
            return
        self.publish(update, Confirm(report.confirm) if report.confirm in _CONFIRMS else Confirm.NONE, None)

    def join(self, node: int, body: Join, now_s: float) -> None:
        if self.admission.join(node, body, now_s):
            self.refresh_audience()

    def hold(self, node: int, body: Hold, now_s: float) -> None:
        self.admission.hold(node, body, now_s)

    def ready(self, node: int, body: Ready, now_s: float) -> None:
        self.admission.ready(node, body, now_s)

    def subscribe(self, node: int, body: Subscribe, now_s: float) -> None:
        """A second-kind node wants what follows its position."""
        if body.epoch != self.term.epoch:
            self._outbox.send(node, SubscribeRefused(self.term.epoch, Reason.OTHER_EPOCH))
        elif not self.term.reaches(body.position):
            self._outbox.send(node, SubscribeRefused(self.term.epoch, Reason.GONE))
        else:
            self.term.flush(now_s)
            self._outbox.send(node, Subscribed(self.term.epoch, pack_starts(self._replica.history.starts)))
            self.term.link(Link(node, (*EVERYBODYS, *body.prefixes)), body.position)

    def unlink(self, node: int) -> None:
        """Its stream is gone."""
        self.term.links.pop(node, None)

    # --- the voters ---

    def _change_voters(self, changes: dict[int, str | None], taken: Callable[[], None]) -> bool:
        """Ask the registry for another list; False if that is not possible now."""
        voters = dict(self.state.voters)
        for node, name in changes.items():
            if name is None:
                voters.pop(node, None)
            else:
                voters[node] = name
        if self._wanted_state is not None or not voters:
            return False
        if not self.confirmations.change_voters(voters):
            # Somebody in the new list has not said yet that it has everything.
            self.term.beat_soon(self._clock.now())
            return False
        self._wanted_state = self.state.changed(voters=voters)
        self._state_taken = taken
        self._swap_state()
        return True

    def remove(self, name: str, done: Done) -> None:
        """Strike a member that will not come back, for an operator; one that is alive joins again.

        *Not done* for this node itself, for a name that is no member's, and while the voters cannot be changed: another
        change is under way, or too few of the others have everything.
        """
        member = next((one for one in self._members().values() if one.name == name), None)
        if member is None or member.node == self.me.node or self._has_ended:
            done(Answer.NOT_DONE)
            return

        def taken() -> None:
            for key in (member.key, STATE_PREFIX + member.name):
                if self._replica.map.entry(key) is not None:
                    self.term.publish(Update(Action.DELETE, key))
            self.term.flush(self._clock.now())
            done(Answer.CONFIRMED)

        if member.node not in self.state.voters:
            taken()
        elif not self._change_voters({member.node: None}, taken):
            done(Answer.NOT_DONE)

    def _swap_state(self) -> None:
        wanted = self._wanted_state
        if self._has_ended or wanted is None:
            return
        change = Change(STATE_KEY, self.state.encode(), wanted.encode())
        self._registry.swap_later([change], lambda swap: self._state_swapped(wanted, swap))

    def _state_swapped(self, wanted: MasterState, swap: Swap) -> None:
        if self._has_ended or self._wanted_state is not wanted:
            return
        if swap.outcome is Outcome.SWAPPED:
            self.state_heard(wanted)
        else:
            # LOST: an earlier attempt was made, or another master has come; the watch brings the state.
            self._clock.call_later(SWAP_RETRY_S, self._swap_state)

    def state_heard(self, state: MasterState) -> None:
        """The registry has this state, of this term."""
        if state.number <= self.state.number or state.epoch != self.term.epoch:
            return
        self.state = state
        wanted, taken = self._wanted_state, self._state_taken
        if wanted is not None:
            self._wanted_state = self._state_taken = None
            self.confirmations.voters_changed(state == wanted)
            for node in state.voters:
                self._heard_s.setdefault(node, self._clock.now())
            self._took(state)
            if taken is not None:
                taken()
            self.admission.voters_settled()
        self.refresh_audience()
        self.term.flush(self._clock.now())

    # --- time ---

    def _suspects(self, node: int) -> bool:
        pulse = self._pulses.get(node)
        return pulse is not None and pulse.suspects(self._clock.now())

    @property
    def due_at_s(self) -> float:
        return min(self.term.due_at_s, self.expiries.due_at_s, self._look_at_s)

    def tick(self, now_s: float) -> None:
        for key in self.expiries.over(now_s):
            self.publish(Update(Action.DELETE, key), Confirm.NONE, None)
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_S
            self._look(now_s)
        if not self._has_ended:
            self.term.flush(now_s)
            self.term.beat(now_s)

    def _look(self, now_s: float) -> None:
        """Who is silent?"""
        heard = sum(
            node == self.me.node or now_s - self._heard_s.get(node, 0.0) < QUORUM_S for node in self.state.voters
        )  # fmt: skip
        if 2 * heard <= len(self.state.voters):
            self._give_up(f"{len(self.state.voters) - heard} of {len(self.state.voters)} voters are silent")
            return
        if self.admission.tick(now_s):
            self.refresh_audience()
        for member in self._members().values():
            if member.node == self.me.node:
                is_suspect = False  # though it was to the master before
            else:
                if member.node not in self._pulses:
                    self._pulses[member.node] = Suspicion(POSITION_S, now_s)
                is_suspect = self._pulses[member.node].suspects(now_s)
            if is_suspect != (member.name in self._suspected):
                key = STATE_PREFIX + member.name
                if is_suspect:
                    self._suspected.add(member.name)
                    self._publish(Update(Action.PUT, key, b"suspected"))
                else:
                    self._suspected.discard(member.name)
                    self._publish(Update(Action.DELETE, key))

    def end(self) -> None:
        """The term is over: what waits is not known."""
        self._has_ended = True
        self.kept.end()
        waiting, self._waiting = self._waiting, {}
        for done in waiting.values():
            done(Answer.UNKNOWN)


_CONFIRMS = frozenset(int(confirm) for confirm in Confirm)

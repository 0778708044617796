"""The directory of one node: the parts bound to the seams, and what the rest of the program asks of it.

Theory: everything that happens (a frame, a timer, an answer of the store or the registry) is given to the part that it
is for, and then the node *settles*: it looks what it is now, who is its master, whether it is a member with an exact
copy, and when it must wake next. No part calls another one except through here.

Rules
- One node is follower, candidate or master of one epoch at a time; `Election` says which.
- A store that fails ends the node's part in the directory: it goes silent (`failure` says why), so that nothing counts
  on what it could not write. Reads go on from memory.
- Published by this node in one turn is sent in one turn.
"""

import logging
from collections.abc import Callable
from random import Random
from typing import Any

from metadata.directory.address_book import AddressBook
from metadata.directory.delegate import Delegate
from metadata.directory.election import Election
from metadata.directory.far_link import FarLink
from metadata.directory.follower import Follower
from metadata.directory.hearing import Hearing
from metadata.directory.joiner import Joiner, Joining
from metadata.directory.map import Watcher
from metadata.directory.master import Master
from metadata.directory.registry_keys import MEMBER_PREFIX, MasterState, Member
from metadata.directory.replica import Replica
from metadata.directory.replica_store import ReplicaStore
from metadata.directory.reports import Answer, Done, Reports
from metadata.directory.routes import Routes
from metadata.directory.settings import DirectorySettings, publication
from metadata.directory.streams import FrameStream
from metadata.registry_calls import Reading
from metadata.seams import Clock, Connection, Network, Receiver, Registry, Store, Timer
from protocol.directory import (
    NOWHERE,
    Confirm,
    MalformedError,
    NodeKind,
    Position,
    Update,
)
from protocol.directory_control import Subscribe

HEARD_S = 4.0  # without a heartbeat: what this node knows may be old; a master of 1,000 nodes beats every 0.5 s
SILENCE_S = 2.0  # without a heartbeat of the registry's master: it may not know this node
MIN_WAKE_S = 0.001
LOOK_S = 1.0  # a node that is no master looks at its place at least so often

_log = logging.getLogger(__name__)


class DirectoryNode:
    """One node's directory. OSError or DamagedValueError if its store cannot be read or its addresses cannot be had."""

    def __init__(
        self,
        settings: DirectorySettings,
        clock: Clock,
        network: Network,
        store: Store,
        registry: Registry,
        random: Random,
    ) -> None:
        is_first = settings.kind is NodeKind.FIRST
        self.failure = ""
        """Why this node has no part in the directory any more."""
        self.settings = settings
        self.master: Master | None = None
        self._clock = clock
        self._registry = registry
        self._random = random
        self._prefixes = settings.subscription
        replica_store = ReplicaStore(
            store, random, self._persisted, self._store_failed, self._prefixes, settings.least_incarnation
        )
        node, incarnation = replica_store.node, replica_store.incarnation
        self.routes = Routes(
            clock, network, random, settings.keys, node, incarnation, settings.datagrams, self._heard,
            lambda to: self.book.addresses(to),
        )  # fmt: skip
        self._stop_listening = network.listen(settings.streams, self._accept)
        self.me = Member(node, settings.kind, settings.name, settings.datagrams, settings.streams)
        self.replica = Replica(replica_store, random)
        self.reports = Reports(node, incarnation)
        self.replica.on_applied = self._applied
        self.book = AddressBook(self.replica.map, settings.kind, lambda: self.election.state)
        self.replica.watchers.add(MEMBER_PREFIX, self._member_changed)
        now_s = clock.now()
        self.follower = Follower(
            node, settings.kind, self.replica, self.routes, random, lambda: self.book.relays, now_s
        )  # fmt: skip
        self.delegate = Delegate(self.replica, self.routes, self._master_and_epoch)
        self.joiner = Joiner(
            self.me, self._prefixes, self.replica, self.routes, random, clock.now, self._open_stream
        )  # fmt: skip
        self.far_link = None if is_first else FarLink(clock, random, self.routes, self._heard_far, self._far_opened)
        self._hearing = Hearing(self)
        self._timer: Timer | None = None
        self._wake_at_s = float("inf")
        self._heard_master_s = now_s
        self._is_flushing = False
        self._is_settling = False
        self._is_closed = False
        self._followed, self._installs = 0, 0  # the epoch followed, and the copies installed, as of the last look
        self.election = Election(
            clock, registry, random, self.me, self.replica, self.routes, self.book.streams, self._open_stream,
            self._begin_term, self._end_term, self._state_changed,
        )  # fmt: skip
        if replica_store.has_failed:
            self.fail("its store cannot be written")
        self._settle()

    # --- what the program asks ---

    def get(self, key: str) -> bytes | None:
        """What this node's copy has; it may be old."""
        return self.replica.map.get(key)

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        return self.replica.map.range(prefix)

    def watch(self, prefix: str, watcher: Watcher) -> Callable[[], None]:
        """Hear of each change below a prefix from now on; return what ends that."""
        return self.replica.watchers.add(prefix, watcher)

    def publish(
        self,
        key: str,
        value: bytes | None,
        confirm: Confirm = Confirm.NONE,
        done: Done | None = None,
        expires_s: float = 0.0,
    ) -> None:
        """Put (or delete: None) a key for everybody; `done` gets the answer, perhaps from inside this call.

        Without `done` it is what this node knows and wants to be known: said until it is published, again if it has
        vanished with its master, until this node publishes something else for that key.

        ValueError for what no directory takes.
        """
        update = publication(key, value, expires_s)
        if self._is_closed or self.failure:
            if done is not None:
                done(Answer.NOT_DONE)
        elif self.master is not None:
            mine = self._mine(update)
            self.master.publish(mine, confirm, done)
            if done is None:
                self.reports.said(mine, self.replica.position)
            self._flush_soon()
        else:
            self.reports.add(update, confirm, done, self._clock.now())
            self._settle()

    def _mine(self, update: Update) -> Update:
        return update._replace(origin=self.me.node, number=self.reports.next_number())

    def remove(self, name: str, done: Done) -> None:
        """Strike a member that will not come back (`Master.remove`); *not done* where this node is not the master."""
        if self.master is None:
            done(Answer.NOT_DONE)
        else:
            self.master.remove(name, done)

    @property
    def members(self) -> dict[int, Member]:
        """By id, as this node's copy has them."""
        return self.book.members

    @property
    def epoch(self) -> int:
        """That this node leads or follows; 0 for none."""
        return self.master.term.epoch if self.master is not None else self.follower.epoch

    @property
    def hears_master(self) -> bool:
        """True while this node is the master, or has had a sign of life of the one that it follows."""
        if self.master is not None:
            return True
        return self.follower.is_following and self._clock.now() - self._heard_master_s <= HEARD_S

    @property
    def is_active(self) -> bool:
        """True while this node is a member and its copy is one of the master's."""
        is_current = self.master is not None or self.follower.is_following
        return is_current and self.book.members.get(self.me.node) == self.me

    # --- events ---

    def _heard(self, node: int, body: Any, stream: FrameStream | None) -> None:
        if self._is_closed or self.failure:
            return
        now_s = self._clock.now()
        try:
            if self.master is not None:
                self.master.heard(node, now_s)
            self._hearing.take(node, body, stream, now_s)
        except MalformedError as error:
            self.routes.refuse(f"node {node:016x}", node, f"it does not make sense: {error}")
        self._settle()

    def _accept(self, connection: Connection) -> Receiver | None:
        return None if self._is_closed or self.failure else self.routes.accept(connection, self._stream_lost)

    def _stream_lost(self, stream: FrameStream) -> None:
        self.delegate.ended(stream)
        if self.routes.streams.get(stream.peer) is stream:
            del self.routes.streams[stream.peer]
            if self.master is not None:
                self.master.unlink(stream.peer)

    def _open_stream(
        self, address: str, first: Any, heard: Callable[[Any], None], failed: Callable[[str], None]
    ) -> Callable[[], None]:
        def settled(call: Callable[[Any], None]) -> Callable[[Any], None]:
            def wrapped(argument: Any) -> None:
                if not self._is_closed:
                    call(argument)
                    self.follower.installed()
                    self._settle()

            return wrapped

        return self.routes.open_stream(address, first, settled(heard), settled(failed))

    def _persisted(self, position: Position, promised: int) -> None:
        if self._is_closed:
            return
        if self.master is not None:
            self.master.persisted(position)
        self.follower.persisted(position, promised)
        self.joiner.persisted()
        self._settle()

    def _store_failed(self, error: int) -> None:
        self.fail(f"its store cannot be written (errno {error})")

    def fail(self, why: str) -> None:
        """Take no part any more."""
        if not self.failure:
            self.failure = why
            _log.error("%s leaves the directory: %s", self.settings.name, why)
            self.replica.store.has_failed = True
            self.election.give_up(why, SILENCE_S)
            self.joiner.cancel()
            if self.far_link is not None:
                self.far_link.close()

    def _applied(self, position: Position, update: Update) -> None:
        """The copy has taken an update."""
        if self.master is None:
            self.reports.seen(position, update, self._clock.now())
            self.confirm_reports()

    def heard_master(self, now_s: float) -> None:
        """A sign of life of the master that this node follows."""
        self._heard_master_s = now_s

    def confirm_reports(self) -> None:
        """What this copy shows counts only while it is one of its master's: the master may have another history."""
        if self.follower.is_following:
            self.reports.confirm(self.replica.history, self.follower.confirmed)

    def _member_changed(self, key: str, value: bytes | None) -> None:
        self.book.changed(key, value)
        if self.master is not None:
            self.master.refresh_audience()

    # --- terms ---

    def _begin_term(self, state: MasterState, kept: Reading) -> None:
        self.joiner.cancel()
        self.delegate.epoch_changed()
        self.follower.is_following = self.follower.needs_snapshot = False
        self.follower.epoch = 0
        self.reports.replaced(self.replica.map, self.replica.history)
        waiting = self.reports.take_all()
        self.master = Master(
            self._clock, self._registry, self._random, self.me, self.replica, self.routes, lambda: self.book.members,
            state, kept, self.election.took, lambda why: self.election.give_up(why, SILENCE_S),
        )  # fmt: skip
        for one in waiting:
            if self.replica.history.has(one.seen):
                self.master.wait(self.replica.position.sequence, one.answer)
            else:
                mine = self._mine(one.update)
                self.master.publish(mine, one.confirm, one.answer)
                if one.done is None:
                    self.reports.said(mine, self.replica.position)
        self._flush_soon()

    def _end_term(self, why: str) -> None:
        master, self.master = self.master, None
        if master is not None:
            master.end()
        self.delegate.epoch_changed()
        for stream in list(self.routes.streams.values()):
            stream.close()
        self.routes.streams.clear()
        self.book.forget_joining()
        self._heard_master_s = self._clock.now()

    def _state_changed(self) -> None:
        """The registry's state was heard."""
        state = self.election.state
        if state is not None and self.master is not None:
            self.master.state_heard(state)
        if state is not None and self.far_link is not None and not self.failure:
            self.far_link.aim(state.master, state.streams)
        self._settle()

    def _master_and_epoch(self) -> tuple[int, int]:
        if self.master is not None:
            return (self.me.node, self.master.term.epoch)
        follower = self.follower
        return (follower.master, follower.epoch) if follower.is_following else (0, 0)

    # --- across a WAN ---

    def _far_opened(self) -> None:
        """Another stream: what was on its way over the last one is lost, so it has to be asked for what follows."""
        self.follower.is_following = False
        self._settle()

    def _heard_far(self, node: int, body: Any) -> None:
        if not self._is_closed:
            self._heard(node, body, None)

    def _tend_far_link(self, link: FarLink, now_s: float) -> None:
        """A second-kind node asks its master for what follows, and looks for another stream when nothing comes."""
        state, follower = self.election.state, self.follower
        if state is None:
            return
        if link.is_silent(now_s):
            follower.is_following = False
            link.again()
        elif follower.is_following and follower.epoch == state.epoch:
            if follower.suspects(now_s) and now_s - self._heard_master_s > SILENCE_S:
                follower.is_following = False
                link.again()
        elif self.joiner.state is Joining.IDLE:
            link.ask(Subscribe(state.epoch, self.replica.position, self._prefixes), now_s)

    # --- settling ---

    def _flush_soon(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            self._clock.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        if not self._is_closed:
            self._settle()

    def _settle(self) -> None:
        """Do what is due, look what this node is, and be woken when there is something to do next."""
        if self._is_closed or self._is_settling:
            return
        self._is_settling = True
        now_s = self._clock.now()
        if not self.failure:
            self._follow_up(now_s)
            if self.far_link is not None:
                self._tend_far_link(self.far_link, now_s)
            self._look_for_master(now_s)
            self.follower.tick(now_s)
            self.joiner.tick()
            self.delegate.tick(now_s)
            if self.reports:
                epoch = self.follower.epoch if self.follower.is_following else 0
                for report in self.reports.due(epoch, now_s):
                    self.routes.send(self.follower.master, report)
            if self.master is not None:
                self.master.tick(now_s)
        self._is_settling = False
        if not self.failure:
            self._arm(now_s)

    def _follow_up(self, now_s: float) -> None:
        """Another history or another copy: what is there of ours?"""
        epoch, installs = self.follower.epoch, self.replica.installs
        if epoch != self._followed or installs != self._installs:
            if epoch != self._followed:
                self.delegate.epoch_changed()
            self._followed, self._installs = epoch, installs
            self.reports.replaced(self.replica.map, self.replica.history)
            self.confirm_reports()

    def _look_for_master(self, now_s: float) -> None:
        """Join, or get a snapshot, if this node is not what it should be."""
        follower, state = self.follower, self.election.state
        if self.master is not None or self.election.epoch:
            return
        if state is not None and state.epoch > follower.epoch and state.epoch >= self.replica.store.promised:
            # A master that is not heard: it may not know this node, or not publish yet.
            needs_snapshot = follower.needs_snapshot or self.replica.position == NOWHERE
            is_silent = now_s - self._heard_master_s > SILENCE_S
            if state.master != self.me.node and (needs_snapshot or is_silent or self.joiner.state is not Joining.IDLE):
                self.joiner.need(state.master, state.epoch, needs_snapshot)
        elif follower.epoch and follower.needs_snapshot:
            self.joiner.need(follower.master, follower.epoch, True)
        elif follower.is_following and self.book.members.get(self.me.node) != self.me:
            self.joiner.need(follower.master, follower.epoch, False)
        elif follower.is_following:
            self.joiner.is_member()

    def _arm(self, now_s: float) -> None:
        due_at_s = min(
            self.follower.due_at_s,
            self.joiner.due_at_s,
            self.delegate.due_at_s,
            self.reports.due_at_s,
            self.master.due_at_s if self.master is not None else now_s + LOOK_S,
        )
        due_at_s = max(due_at_s, now_s + MIN_WAKE_S)
        if self._timer is not None:
            if self._wake_at_s <= due_at_s:
                return
            self._timer.cancel()
        self._wake_at_s = due_at_s
        self._timer = self._clock.call_later(due_at_s - now_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._settle()

    def close(self) -> None:
        """Leave, cleanly: the lease is given back, what waits is answered."""
        if self._is_closed:
            return
        self.election.give_up("this node ends", 0.0)
        self._is_closed = True
        self.election.close()
        self.joiner.cancel()
        self.reports.end()
        if self.far_link is not None:
            self.far_link.close()
        if self._timer is not None:
            self._timer.cancel()
        self._stop_listening()
        self.routes.close()

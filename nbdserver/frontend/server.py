"""The NBD server: accepts connections and keeps their sessions.

Rules: at most `client_limit` connections; one more is closed at once. `drain` stops listening, lets every session
finish what it took, and drops those that are not finished in time. `freeze` does the same but for the closing: who
has finished stands still, and `hand_over` gives the connections to another process, whose `resume` goes on with them.

A node may have several processes with a server each. A client whose handshake names an export of another one is passed
on there (`pass_on`, to that one's `arrive`): with its socket, or, if that cannot be handed over, by a `Forwarding`. It
is counted where its session is. Who wants a volume of the cluster that is not served here is `away` from then on: it is
taken to another node (`attach`, see attaching.py), or comes back (`arrive`). It counts here all the time, and at the
other node too (`arrive_from_node`). So is, with what it has asked for, who has entered a volume that this node loses.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from metadata.seams import Clock, Connection, Network, Receiver, Timer
from nbdserver.frontend.census import Census
from nbdserver.frontend.forwarding import Forwarding
from nbdserver.frontend.session import ClientInfo, Secure, Session, Unsettled
from nbdserver.frontend.unanswered import Entered
from nbdserver.volume.export import Export, Exports, volume_of
from protocol.agreement import OptionRefusedError
from protocol.handover import ClientState, HandshakingClient
from protocol.handshake import GoElsewhere

CLIENT_LIMIT = 1024  # half a MiB of receive buffer each, once they have entered an export


ForwardingOver = Callable[[Forwarding], None]

PassOn = Callable[[Connection, HandshakingClient, int, ForwardingOver], Forwarding | None]
"""Takes a client to the process of this number: its socket, or a Forwarding, which says when it is over. OSError."""


class Away(Protocol):
    """A client that is taken to another node, or has been."""

    def info(self) -> ClientInfo:
        """For those who list clients."""

    def shut_down(self) -> None:
        """End it soon; the answers that are under way still reach it."""

    def disconnect(self, reason: str) -> None:
        """End it now."""


Attach = Callable[[Connection, HandshakingClient, str, Callable[[str], None], Entered | None], Away]
"""Takes a client to the node that serves this volume, or back here, unless it has Entered. The last but one argument is
called once, and not from inside: with why the client is gone, or with "" when it is about to `arrive` here again."""


class Server:
    """NBD over a Network, serving the exports of a directory."""

    def __init__(
        self,
        network: Network,
        clock: Clock,
        exports: Exports,
        report: Callable[[str, dict[str, object]], None],
        client_limit: int = CLIENT_LIMIT,
        census: Census | None = None,
    ) -> None:
        """`report(kind, fields)` takes events: "client-connected", "client-gone", "client-refused"; of one that is away
        "client-waits", "client-goes-on"."""
        self._network = network
        self._clock = clock
        self._exports = exports
        self.report = report
        self._client_limit = client_limit
        self.secure: Secure | None = None  # for connections from now on
        self._sessions: dict[int, Session] = {}
        self._census = census or Census()
        self.pass_on: PassOn | None = None
        self._forwardings: set[Forwarding] = set()
        self.attach: Attach | None = None
        self.leaving: Callable[[], None] | None = None
        """Called before clients are handed over, or dropped because they cannot be."""
        self.unsettled: Unsettled | None = None
        self._away: dict[int, Away] = {}  # by the client's number
        self._stop_listening: dict[str, Callable[[], None]] = {}
        self._drained: Callable[[], None] | None = None
        self._is_closing = False
        self._drain_timer: Timer | None = None

    def addresses(self) -> list[str]:
        """Where clients are accepted."""
        return list(self._stop_listening)

    def listen(self, address: str) -> None:
        """Accept clients at `HOST:PORT`, `[V6]:PORT` or `unix:PATH` too. OSError or ValueError if it cannot."""
        if address not in self._stop_listening:
            self._stop_listening[address] = self._network.listen(address, self._accept)

    def stop_listening(self, address: str) -> None:
        """Accept no more clients at `address`; those that are there stay."""
        self._stop_listening.pop(address)()

    def clients(self) -> list[ClientInfo]:
        """Every connection that is served here, the oldest first."""
        return [session.info() for session in self._sessions.values()]

    def away(self) -> list[ClientInfo]:
        """Those that are forwarded to other nodes, or wait for that."""
        return [away.info() for away in self._away.values()]

    def disconnect(self, client_id: int) -> bool:
        """Drop a client; False if there is none of this id."""
        client = self._sessions.get(client_id) or self._away.get(client_id)
        if client is None:
            return False
        if isinstance(client, Session):
            client.is_dismissed = True
        client.disconnect("disconnected by the operator")
        return True

    def drain(self, timeout_s: float, done: Callable[[], None]) -> None:
        """Stop listening, finish and close every session; `done()` when none is left, nor a Forwarding, nor
        anybody away, or `timeout_s` is over."""
        self._is_closing = True
        self._accept_nobody(timeout_s, done)
        for client in (*self._sessions.values(), *self._away.values()):
            client.shut_down()
        self._check_drained()

    def freeze(self, timeout_s: float, done: Callable[[], None]) -> None:
        """Stop listening, let every session finish and stand still; `done()` when all do or `timeout_s` is over."""
        self._accept_nobody(timeout_s, done)
        for session in list(self._sessions.values()):
            session.freeze(self._check_drained)
        self._check_drained()

    def hand_over(self, limit: int, fit: Callable[[Export], bool]) -> list[tuple[int, ClientState]]:
        """Give away the frozen sessions, at most `limit`, whose export is `fit`; the others are dropped."""
        if self.leaving is not None:
            self.leaving()
        given: list[tuple[int, ClientState]] = []
        for session in list(self._sessions.values()):
            export = session.export
            one = session.hand_over() if len(given) < limit and export is not None and fit(export) else None
            if one is None:
                session.disconnect("could not be handed over")
            else:
                self._remove(session)
                given.append(one)
        return given

    def resume(self, connection: Connection, state: ClientState) -> Session | None:
        """Go on with a client of another process: its Receiver, whose `resume` is called when it is connected."""
        try:
            session = Session(
                state.id, connection, self._clock, self._exports, self._gone, state, goes_on=self._goes_on
            )
        except OptionRefusedError as error:
            self.report("client-not-taken-over", {"peer": connection.peer_name, "reason": str(error)})
            return None
        self._census.used(state.id)
        self._add(session)
        return session

    def arrive(self, connection: Connection, client: HandshakingClient, refusal: str = "") -> Session | None:
        """Go on with a client that another process has passed on, or that was `away`: its Receiver, whose `go_on` is
        called when it is connected. A `refusal` is what it is told of volumes of other nodes. None while nobody is
        accepted."""
        return None if self._drained is not None else self._begin(client.id, connection, client, self.secure, refusal)

    def arrive_from_node(self, connection: Connection, client: HandshakingClient, node: str) -> Session | None:
        """Go on with a client of another node, as `arrive` does. None if it cannot be taken."""
        if self._is_full or self._drained is not None:
            return None
        client = replace(client, id=self._census.next_id(), since_s=self._clock.now())
        # It is over TLS already, or will never be; and it is not sent on to a third node.
        moved = "it has just moved to another node: connect again"
        session = self._begin(client.id, connection, client, None, moved, node)
        self.report("client-connected", {"client": session.id, "peer": session.peer.name, "via": node})
        return session

    def _accept_nobody(self, timeout_s: float, done: Callable[[], None]) -> None:
        for address in self.addresses():
            self.stop_listening(address)
        self._drained = done
        self._drain_timer = self._clock.call_later(timeout_s, self._give_up)

    def _give_up(self) -> None:
        for session in list(self._sessions.values()):
            if not session.frozen:
                session.disconnect("not finished when the server stopped")
        for forwarding in list(self._forwardings):
            forwarding.close()
        for away in list(self._away.values()):
            away.disconnect("not finished when the server stopped")
        self._finish_drain()

    def _check_drained(self) -> None:
        frozen = all(session.frozen for session in self._sessions.values())
        is_busy = self._is_closing and bool(self._forwardings or self._away)
        if self._drained is not None and frozen and not is_busy:
            self._clock.call_soon(self._finish_drain)

    def _finish_drain(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        done, self._drained = self._drained, None
        if done is not None:
            done()

    @property
    def _is_full(self) -> bool:
        return len(self._sessions) + len(self._away) + self._census.others() >= self._client_limit

    def _accept(self, connection: Connection) -> Receiver | None:
        if self._is_full or self._drained is not None:
            self.report("client-refused", {"peer": connection.peer_name, "limit": self._client_limit})
            return None
        session = self._begin(self._census.next_id(), connection, None, self.secure)
        self.report("client-connected", {"client": session.id, "peer": session.peer.name})
        return session

    def _begin(
        self,
        client_id: int,
        connection: Connection,
        arrived: HandshakingClient | None,
        secure: Secure | None,
        refusal: str = "",
        via: str = "",
    ) -> Session:
        session = Session(
            client_id,
            connection,
            self._clock,
            self._exports,
            self._gone,
            secure=secure,
            arrived=arrived,
            leaves=self._leaves,
            refusal=refusal,
            via=via,
            unsettled=None if via else self.unsettled,
            goes_on=None if via else self._goes_on,  # one that was brought here is brought to the next node too
        )
        self._add(session)
        return session

    def _add(self, session: Session) -> None:
        self._sessions[session.id] = session
        self._count()

    def _remove(self, session: Session) -> None:
        self._sessions.pop(session.id, None)
        self._count()

    def _count(self) -> None:
        self._census.note(len(self._sessions) + len(self._away))

    def _leaves(self, session: Session, connection: Connection, client: HandshakingClient, going: GoElsewhere) -> None:
        if going.worker is None:
            self._go_away(session, connection, client, going.export)
            return
        assert self.pass_on is not None
        try:
            forwarding = self.pass_on(connection, client, going.worker, self._forwarding_over)
        except OSError as error:
            connection.abort()
            self._gone(session, f"its export's process does not take it: {error.strerror or error}")
            return
        if forwarding is not None:
            self._forwardings.add(forwarding)
        self._remove(session)
        self._check_drained()

    def _goes_on(self, session: Session) -> bool:
        """Take a session's client to where its volume is served from now on; False if that cannot be."""
        if self.attach is None or self._drained is not None:
            return False
        left = session.leave()
        if left is None:
            return False
        connection, client, entered = left
        self._go_away(session, connection, client, volume_of(entered.agreement.offer.name), entered)
        return True

    def _go_away(
        self,
        session: Session,
        connection: Connection,
        client: HandshakingClient,
        export: str,
        entered: Entered | None = None,
    ) -> None:
        def ended(reason: str) -> None:
            del self._away[client.id]
            self._count()
            if reason:
                self._report_gone(session, export, reason)
            self._check_drained()

        assert self.attach is not None
        self._away[client.id] = self.attach(connection, client, export, ended, entered)
        self._remove(session)

    def _forwarding_over(self, forwarding: Forwarding) -> None:
        self._forwardings.discard(forwarding)
        self._check_drained()

    def _gone(self, session: Session, reason: str) -> None:
        self._remove(session)
        self._report_gone(session, session.export.name if session.export is not None else "", reason)
        self._check_drained()

    def _report_gone(self, session: Session, export: str, reason: str) -> None:
        self.report(
            "client-gone", {"client": session.id, "peer": session.peer.name, "export": export, "reason": reason}
        )

"""Clients that want a volume of the cluster which is not served here: who takes them to the node that serves it.

Theory: who serves a volume, and whether that shall be this node from now on, is not known here but asked for
(`Ask`). Each client is an `AwayClient` (away_client.py) until its session goes on here, or it is gone.

Rules
- Clients of one export that ask the same at the same time ask once.
- A client that was served in this process and is not any more (`entered`) has been so under a number of its own, as if
  it had been brought here by this process.
- A client gets a new number each time that it goes to a node; those of one address share one `Keeping`.
"""

from collections.abc import Callable
from functools import partial

from metadata.seams import Clock, Connection, Network
from nbdserver.frontend.away_client import Answer, AwayClient
from nbdserver.frontend.keeping import Keeping
from nbdserver.frontend.server import Server
from nbdserver.frontend.unanswered import Entered
from nbdserver.volume.peer import Peer
from nbdserver.volume.wanted import Wanted
from protocol.handover import HandshakingClient

Question = tuple[str, tuple[str, ...], Wanted]
"""The first arguments of `Ask`."""
Settle = Callable[[Peer, str, float, Callable[[], None]], None]
"""`settle` of forwarded.py."""
Ask = Callable[[str, tuple[str, ...], Wanted, Callable[[Answer], None]], None]
"""Ask who serves a volume. The second argument names the nodes that were tried and do not. The last is called with the
answer, once, and not from inside."""


class Attaching:
    """The clients of this process that are away."""

    def __init__(self, clock: Clock, server: Server, forwarder: bytes, ask: Ask, settle: Settle) -> None:
        """`forwarder`: what this process is told by from all others, also from those before it."""
        self.clock = clock
        self.server = server
        self.forwarder = forwarder
        self.node = ""
        self.network: Network | None = None
        self.settle = settle
        self._ask = ask
        self._asked: dict[Question, list[Callable[[Answer], None]]] = {}
        self._keeping: dict[str, Keeping] = {}
        self._return_s: dict[str, float] = {}  # until when those processes may take to be there again
        self._last = 0
        server.attach = self.attach

    def connect_by(self, node: str, network: Network) -> None:
        """This node's name, and how it reaches the others."""
        self.node, self.network = node, network

    def attach(
        self,
        connection: Connection,
        client: HandshakingClient,
        export: str,
        ended: Callable[[str], None],
        entered: Entered | None,
    ) -> AwayClient:
        """As Attach of the server says."""
        return AwayClient(self, connection, client, export, ended, entered)

    def ask(self, export: str, failed: tuple[str, ...], wanted: Wanted, done: Callable[[Answer], None]) -> None:
        """As `Ask`, once for all who want to know the same."""
        question = (export, failed, wanted)
        waiting = self._asked.setdefault(question, [])
        waiting.append(done)
        if len(waiting) == 1:
            self._ask(*question, lambda answer: self._answered(question, answer))

    def _answered(self, question: Question, answer: Answer) -> None:
        for done in self._asked.pop(question):
            done(answer)

    def returns(self, address: str) -> bool:
        """Whether the process there has said that the next one will serve what it did, and has time left for that."""
        return self.clock.now() < self._return_s.get(address, 0.0)

    def has_returned(self, address: str) -> None:
        """It serves clients."""
        self._return_s.pop(address, None)

    def _returns(self, address: str, within_s: float) -> None:
        self._return_s[address] = self.clock.now() + within_s

    def next_number(self) -> int:
        """Of a client."""
        self._last += 1
        return self._last

    def keep(self, client: AwayClient, address: str, network: Network) -> tuple[int, Keeping]:
        """A number for a client that goes to this address, and who looks whether that lives."""
        number = self.next_number()
        keeping = self._keeping.get(address)
        if keeping is None:
            keeping = self._keeping[address] = Keeping(
                self.clock,
                network,
                address,
                self.forwarder,
                lambda: self._last,
                lambda: self._keeping.pop(address),
                partial(self._returns, address),
            )
        keeping.add(number, client)
        return number, keeping

"""Who belongs to the cluster: joining, the cluster's key, removing; what a node asks of the others and answers them.

Rules
- Anybody may ask for the CA's certificate; a new node is let in for a valid secret. All else is answered to members
  only: a certificate whose name is no member's is that of a node that was removed.
- A member is struck by the master alone, and only when it is silent: a living one would join again.
- A new key becomes the cluster's in three steps, each of which every member has made before the next begins: all know
  it; all seal with it; nobody knows the old one. What was broken off goes on from where it is, from whichever node.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from metadata.directory.node import DirectoryNode
from metadata.directory.reports import Answer
from metadata.waiting import answer_of
from nbdserver.host.tls_network import CALL_PROTOCOL, make_client_context
from nbdserver.node import cluster_making
from nbdserver.node.cluster_calls import CALL_S, call
from nbdserver.node.cluster_files import KEY_BYTES, Keys
from nbdserver.node.cluster_settings import ClusterSettings
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError, listed
from nbdserver.node.invitations import Invitations
from nbdserver.node.setting_values import NAME_PATTERN

SETTLE_S = 0.5
"""Between the steps of a rotation: what was sealed in the step before is under way no longer."""
REMOVE_TRIES = 20
REMOVE_RETRY_S = 0.5

Answering = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""A question of a member → its answer; raises NodeError."""


class Membership:
    """Of the cluster's nodes, as one of them asks the others and answers them."""

    def __init__(
        self,
        settings: ClusterSettings,
        directory: Callable[[], DirectoryNode],
        keys: Callable[[], Keys],
        use_keys: Callable[[Keys], None],
        silent: Callable[[], set[str]],
        event: Callable[[str, dict[str, Any]], None],
        more: Mapping[str, Answering],
    ) -> None:
        """`use_keys` makes keys this node's own, on its disk first; `silent()` are the names that are not heard; `more`
        are the answers to what else members may ask, by the question's `do`."""
        self._settings = settings
        self._directory = directory
        self._keys = keys
        self._use_keys = use_keys
        self._silent = silent
        self._event = event
        self._more = more
        self._rotating = asyncio.Lock()

    # --- answering ---

    async def answer(self, certificate: str, peer: str, question: dict[str, Any]) -> dict[str, Any]:
        """What CallServer wants. NodeError."""
        match question.get("do"):
            case "ca":
                return {"ca": self._settings.tls.ca.read_text()}
            case "join":
                return self._let_in(peer, question)
        if certificate not in self._members():
            raise WrongInputError(f"{certificate or 'who shows no certificate'} is no node of this cluster")
        match question.get("do"):
            case "keys":
                self._use_keys(Keys.decode(str(question.get("keys")), f"{certificate}'s keys"))
                self._event("cluster-key-changed", {"by": certificate})
                return {}
            case "remove":
                await self._remove_as_master(str(question.get("node")))
                return {}
        answer = self._more.get(str(question.get("do")))
        if answer is not None:
            return await answer(question)
        raise WrongInputError(f"this program does not know the question {question.get('do')!r:.40}")

    def _let_in(self, peer: str, question: dict[str, Any]) -> dict[str, Any]:
        node, request = question.get("node"), question.get("request")
        invitations = Invitations(self._settings.tokens_file)
        if not invitations.has(str(question.get("secret")), time.time()):
            self._event("cluster-join-refused", {"peer": peer, "node": str(node)[:64], "reason": "no valid token"})
            raise WrongInputError("the token is not valid, or not any more; make another: nbdserver cluster token")
        if not isinstance(node, str) or not NAME_PATTERN.fullmatch(node) or not isinstance(request, str):
            raise WrongInputError("a node that joins has a name and a signing request")
        if node in self._members() and question.get("again") is not True:
            raise ConflictError(
                f"there is a node {node} already; choose another name with --node, or remove it: nbdserver node remove "
                f"{node}"
            )
        answer = cluster_making.let_in(self._settings, node, request)
        self._event("cluster-joining", {"peer": peer, "node": node})
        return answer

    # --- asking ---

    def _members(self) -> dict[str, str]:
        """Where each is reached, by name."""
        return {member.name: member.streams for member in self._directory().members.values()}

    async def ask(self, node: str, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """A question to another member and its answer. NotFoundError, NodeError."""
        members = self._members()
        if node not in members:
            raise NotFoundError(f"there is no node {node}; there are: {listed(sorted(members), 10)}")
        return await self._call(members[node], question, timeout_s)

    async def _call(self, address: str, question: dict[str, Any], timeout_s: float = CALL_S) -> dict[str, Any]:
        tls = self._settings.tls
        context = make_client_context(tls.ca, tls.certificate, tls.key, CALL_PROTOCOL)
        return await call(address, context, question, timeout_s)

    async def rotate_key(self) -> None:
        """Give the cluster another key, or go on with that. NodeError: as far as it has come both keys are valid."""
        if self._rotating.locked():
            raise ConflictError("the key is being changed already")
        async with self._rotating:
            for keys in steps(self._keys(), secrets.token_bytes(KEY_BYTES)):
                silent = self._silent() & self._members().keys()
                if silent:
                    raise ConflictError(
                        f"{listed(sorted(silent))} cannot be told of the key; bring it back or remove it, and try again"
                    )
                for name, address in sorted(self._members().items()):
                    if name != self._settings.node:
                        await self._call(address, {"do": "keys", "keys": keys.encode()})
                self._use_keys(keys)
                await asyncio.sleep(SETTLE_S)
            self._event("cluster-key-changed", {"by": self._settings.node})

    async def remove(self, name: str) -> None:
        """Strike a member that will not come back. NotFoundError, ConflictError, NodeError."""
        members = self._members()
        if name not in members:
            raise NotFoundError(f"there is no node {name}; nbdserver node list shows those there are")
        if name not in self._silent():
            raise ConflictError(f"{name} is up: stop nbdserver on it first, or it joins again")
        state = self._directory().election.state
        if self._directory().master is not None:
            await self._remove_as_master(name)
        elif state is None:
            raise NodeError("there is no master that could do it; see nbdserver status")
        else:
            await self._call(state.streams, {"do": "remove", "node": name})

    async def _remove_as_master(self, name: str) -> None:
        if name not in self._silent():
            raise ConflictError(f"{name} is not silent for the master")
        for _ in range(REMOVE_TRIES):
            answer: Answer = await answer_of(lambda done: self._directory().remove(name, done))
            if answer is Answer.CONFIRMED:
                self._event("node-removed", {"node": name})
                return
            await asyncio.sleep(REMOVE_RETRY_S)
        raise NodeError(
            f"{name} cannot be struck now: the voters are being changed, or too few of the others have everything; "
            "try again in a moment"
        )


def steps(own: Keys, fresh: bytes) -> list[Keys]:
    """What each member has to know, one step after the other, from what this node knows."""
    if own.other is not None and not own.is_other_next:
        return [own, Keys(own.sealing)]
    new = own.other or fresh
    return [Keys(own.sealing, new, is_other_next=True), Keys(new, own.sealing), Keys(new)]

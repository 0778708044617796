"""What is asked of any node about a volume of the cluster is done at its owner.

Theory: whoever asks the API of a node, or uses its commands, need not know where a volume is. A request about a volume
that another node owns is sent there as it is (a call between nodes), is answered there by the same code, and the answer
comes back as it is: one code path, one wording, wherever it was asked.

Rules
- Looking at a volume moves nothing: if its owner cannot be asked, this node tells what it knows.
- A change whose node could not be reached was not begun, so another one may be asked. One whose answer got lost is not
  made again: it may have been made.
- A request is sent on once. Who gets it owns the volume, or takes it over, or refuses.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from metadata.families import Families
from metadata.registry import Family
from nbdserver.node.cluster_calls import NotReachedError
from nbdserver.node.errors import ConflictError, NodeError, WrongInputError
from nbdserver.node.owning import Owning
from nbdserver.node.replicas import Replicas

ABOUT_VOLUMES = ("/v1/volumes", "/v1/snapshots", "/v1/clones", "/v1/scrubs")
"""What the requests that are sent on begin with; a node answers no others for another one."""

DO_S = 600.0
"""As long as a command waits for its node: deleting unlinks segments first."""
LOOK_S = 5.0


@dataclass(frozen=True)
class ApiRequest:
    """A request of the HTTP API."""

    method: str
    path: str
    query: str
    body: str

    @property
    def is_look(self) -> bool:
        return self.method == "GET"


@dataclass(frozen=True)
class ApiAnswer:
    """What the API answers."""

    status: int
    body: str


AnswerHere = Callable[[ApiRequest], Awaitable[ApiAnswer]]


class AtOwner:
    """Sends requests on, and does those that were sent here."""

    def __init__(self, families: Families, replicas: Replicas, owning: Owning) -> None:
        self.answer_here: AnswerHere | None = None
        """The API of this node; set when it is there."""
        self._families = families
        self._replicas = replicas
        self._owning = owning

    async def send_on(self, volume: str, request: ApiRequest) -> ApiAnswer | None:
        """Let the owner of this volume answer; None if it is to be answered here. NodeError."""
        found = self._families.find(volume)
        if found is None or not found[0].replicas:
            return None
        return await (self._look if request.is_look else self._change)(found[0], request)

    async def _look(self, family: Family, request: ApiRequest) -> ApiAnswer | None:
        node = self._owning.for_look(family)
        if node == self._replicas.me:
            return None
        try:
            return await self.ask(node, request, LOOK_S)
        except NodeError:
            return None

    async def _change(self, family: Family, request: ApiRequest) -> ApiAnswer | None:
        failed: list[str] = []
        while True:
            node = await self._owning.for_command(family, failed)
            if node == self._replicas.me:
                return None
            try:
                return await self.ask(node, request, DO_S)
            except NotReachedError:
                failed.append(node)

    async def ask(self, node: str, request: ApiRequest, timeout_s: float = DO_S) -> ApiAnswer:
        """Let the API of another node answer. NodeError."""
        question = {
            "do": "api",
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "body": request.body,
        }
        answer = await self._owning.ask(node, question, timeout_s)
        return ApiAnswer(int(answer["status"]), str(answer["body"]))

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answer a request that another node has sent on."""
        if self.answer_here is None:
            raise ConflictError("the node is starting; try again in a moment")
        request = ApiRequest(*(str(question.get(key, "")) for key in ("method", "path", "query", "body")))
        if not request.path.startswith(ABOUT_VOLUMES):
            raise WrongInputError(f"{request.path!r:.60} is not about a volume: it is answered by each node itself")
        answer = await self.answer_here(request)
        return {"status": answer.status, "body": answer.body}

    async def take(self, volume: str) -> None:
        """Own the volume that a request was sent here for. NodeError."""
        found = self._families.find(volume)
        if found is not None and found[0].replicas and not self._replicas.owns(found[0].id):
            await self._replicas.own(found[0].id)

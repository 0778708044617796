"""What is asked of any node about a volume of the cluster is answered by its owner, in its words."""

import asyncio
import json
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from metadata.registry import Family
from nbdserver.api import sent_on
from nbdserver.node.at_owner import ApiRequest, AtOwner
from nbdserver.node.cluster_calls import NotReachedError
from nbdserver.node.errors import ConflictError, NodeError
from tests.unit.test_families import family, with_both

GET = ApiRequest("GET", "/v1/volumes/db", "", "")
PATCH = ApiRequest("PATCH", "/v1/volumes/db", "", '{"description":"x"}')


class Cluster:
    """n1, which is asked, and others; `owner` owns db."""

    me = "n1"

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.asked: list[tuple[str, str]] = []
        self.fails: dict[str, NodeError] = {}
        self.taken: list[str] = []
        families = with_both()
        self.at_owner = AtOwner(families, self, self)  # type: ignore[arg-type]

    # Replicas

    def owns(self, family_id: str) -> bool:
        return self.owner == self.me

    async def own(self, family_id: str) -> None:
        self.taken.append(family_id)

    # Owning

    def for_look(self, found: Family) -> str:
        return self.owner

    async def for_command(self, found: Family, failed: Collection[str] = ()) -> str:
        left = [node for node in (self.owner, "n2", "n3") if node not in failed]
        if not left:
            raise ConflictError("no node can serve db now")
        return left[0]

    async def ask(self, node: str, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.asked.append((node, question["do"]))
        if node in self.fails:
            raise self.fails[node]
        return {"status": 200, "body": json.dumps({"by": node, "body": question["body"]})}

    def send_on(self, request: ApiRequest, volume: str = "db") -> Any:
        answer = asyncio.run(self.at_owner.send_on(volume, request))
        return None if answer is None else json.loads(answer.body)


def test_what_this_node_owns_or_has_alone_or_nobody_has_is_answered_here() -> None:
    assert Cluster("n1").send_on(PATCH) is None
    for volume in ("disk0", "nobody"):
        assert Cluster("n2").send_on(PATCH, volume) is None


def test_what_another_owns_is_answered_by_that() -> None:
    for request in (GET, PATCH):
        assert Cluster("n2").send_on(request) == {"by": "n2", "body": request.body}


def test_a_look_is_answered_here_if_the_owner_cannot_be_asked_and_a_change_by_another() -> None:
    cluster = Cluster("n2")
    cluster.fails = {"n2": NotReachedError("refused")}
    assert cluster.send_on(GET) is None
    assert cluster.send_on(PATCH)["by"] == "n3"
    cluster.fails["n3"] = NotReachedError("refused")
    with pytest.raises(ConflictError, match="no node can serve db"):
        cluster.send_on(PATCH)


def test_a_change_whose_answer_got_lost_is_not_made_by_another() -> None:
    cluster = Cluster("n2")
    cluster.fails = {"n2": NodeError("n2 has not answered in 600 s")}
    with pytest.raises(NodeError, match="has not answered"):
        cluster.send_on(PATCH)
    assert cluster.asked == [("n2", "api")]


def test_only_what_is_about_volumes_is_answered_for_other_nodes() -> None:
    cluster = Cluster("n1")
    with pytest.raises(ConflictError, match="starting"):
        asyncio.run(cluster.at_owner.answer({"path": "/v1/volumes/db"}))

    async def answer(request: ApiRequest) -> Any:
        return SimpleNamespace(status=204, body=request.method)

    cluster.at_owner.answer_here = answer
    told = asyncio.run(cluster.at_owner.answer({"method": "DELETE", "path": "/v1/volumes/db"}))
    assert told == {"status": 204, "body": "DELETE"}
    with pytest.raises(NodeError, match="is not about a volume"):
        asyncio.run(cluster.at_owner.answer({"method": "POST", "path": "/v1/upgrade-in-place"}))


def test_who_gets_a_change_for_a_volume_takes_it_over_first() -> None:
    cluster = Cluster("n2")
    asyncio.run(cluster.at_owner.take("db"))
    asyncio.run(cluster.at_owner.take("disk0"))
    assert cluster.taken == [family().id]


class Api:
    """Asks an application in this process."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def __call__(self, method: str, path: str, **content: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://n1") as client:
                return await client.request(method, path, **content)

        return asyncio.run(ask())


@pytest.fixture
def api() -> Callable[[str], Api]:
    """The routes of a node for which `owner` owns db: each says which volume it was asked about."""

    def make(owner: str) -> Api:
        cluster = Cluster(owner)
        node: Any = SimpleNamespace(part=SimpleNamespace(at_owner=cluster.at_owner))
        router, app = APIRouter(route_class=sent_on.route_class(node)), FastAPI()

        @router.patch("/v1/volumes/{name:path}")
        async def change(name: str) -> dict[str, Any]:
            return {"by": "n1"}

        @router.get("/v1/snapshots")
        async def snapshots(volume: str = "") -> dict[str, Any]:
            return {"by": "n1"}

        @router.post("/v1/clones")
        async def clone(content: dict[str, str]) -> dict[str, Any]:
            return {"by": "n1"}

        app.include_router(router)
        cluster.at_owner.answer_here = sent_on.answer_in(app)
        return Api(app)

    return make


def test_the_volume_is_found_in_path_query_and_body(api: Callable[[str], Api]) -> None:
    for owner in ("n1", "n2"):
        ask = api(owner)
        assert ask("PATCH", "/v1/volumes/db", json={"shared": "true"}).json()["by"] == owner
        assert ask("GET", "/v1/snapshots?volume=db").json()["by"] == owner
        assert ask("POST", "/v1/clones", json={"volume": "db", "name": "x"}).json()["by"] == owner
        assert ask("GET", "/v1/snapshots").json()["by"] == "n1"
        assert ask("POST", "/v1/clones", content=b"{").status_code == 422, "the handler refuses it"
        assert ask("PATCH", "/v1/volumes/disk0", json={}).json()["by"] == "n1"


def test_what_was_sent_on_is_answered_here_by_the_same_routes(api: Callable[[str], Api]) -> None:
    app = api("n2").app
    answer = asyncio.run(sent_on.answer_in(app)(ApiRequest("GET", "/v1/snapshots", "volume=db", "")))
    assert (answer.status, json.loads(answer.body)) == (200, {"by": "n1"})

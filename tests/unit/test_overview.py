"""What the status page gets: one look for all who look, and the rows that were asked for."""

import asyncio
from pathlib import Path
from typing import Any, get_args

import pytest

from nbdserver.api.page import Sort
from nbdserver.node.activity import NO_TRAFFIC, SLOT_S
from nbdserver.node.errors import NodeError
from nbdserver.node.events import EventLog
from nbdserver.node.overview import LOOKS_COST, MOST_EVENTS, MOST_SHOWN, SORTS, Overview, select, together
from nbdserver.node.replica_view import NO_REPLICAS
from nbdserver.node.volumes_told import NOT_TOLD, Row, volumes_of


def volume(number: int, **more: Any) -> dict[str, Any]:
    shown = {
        "name": f"v{number}",
        "number": 1,
        "family": f"f{number}",
        "state": "serving",
        "reason": "",
        "size_bytes": 1 << 30,
        "base": "",
        "snapshots": 0,
        "clients": 1,
        "traffic": NO_TRAFFIC,
        "settings": {"description": "", "read_only": False},
        "disk": {"live_bytes": number, "volumes": 1, "damaged": []},
        "replicas": NO_REPLICAS,
    }
    return shown | more


class Rig:
    """An overview of a node that is as slow as is wanted."""

    def __init__(self, path: Path, volumes: int = 3, elsewhere: tuple[list[Row], int] = ([], 0)) -> None:
        self.looks = 0
        self.took_s = 0.0
        self.now_s = 1000.0
        self.fails = False
        self.volumes = [volume(number) for number in range(volumes)]
        self.scrubs: list[dict[str, Any]] = []
        self.resync: list[dict[str, Any]] = []
        self.fills: list[dict[str, Any]] = []
        self.events = EventLog(path / "events.jsonl", lambda: self.now_s)
        self.overview = Overview(self.status, self.events, lambda: self.now_s, lambda: elsewhere)

    async def status(self) -> dict[str, Any]:
        self.looks += 1
        await asyncio.sleep(0)
        self.now_s += self.took_s
        if self.fails:
            raise NodeError("no")
        return {
            "workers": [{"worker": 0, "pid": 1, "silent_s": 0.0, "volumes": []}],
            "host": "one",
            "volumes": self.volumes,
            "scrubs": self.scrubs,
            "resync": self.resync,
            "fills": self.fills,
        }

    async def slot(self, requests: int | None) -> None:
        """A slot of the history at whose end the first volume has done so much."""
        self.now_s += 5
        done = None if requests is None else NO_TRAFFIC | {"requests": requests, "answers": requests}
        self.volumes[0]["traffic"] = done
        watching = asyncio.create_task(self.overview.watch())
        for _ in range(5):
            await asyncio.sleep(0)
        watching.cancel()


def test_who_looks_at_the_same_time_is_shown_one_look(tmp_path: Path) -> None:
    rig = Rig(tmp_path)

    async def look() -> None:
        shown = await asyncio.gather(*(rig.overview.show() for _ in range(100)))
        assert {one["host"] for one in shown} == {"one"}
        await rig.overview.show()
        assert rig.looks == 1
        rig.now_s += 1
        await rig.overview.show()
        assert rig.looks == 2

    asyncio.run(look())


def test_a_node_that_is_slow_to_look_at_is_looked_at_less_often(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.took_s = 0.2

    async def look() -> None:
        for took_s, rests_s in ((0.2, LOOKS_COST * 0.2), (2.0, SLOT_S)):
            rig.took_s, looks = took_s, rig.looks
            await rig.overview.show()
            rig.now_s += rests_s - took_s - 0.1
            assert (await rig.overview.show())["seen_s"] == pytest.approx(rests_s - took_s - 0.1)
            assert rig.looks == looks + 1
            rig.now_s += 0.2

    asyncio.run(look())


def test_a_look_that_fails_is_told_and_done_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)

    async def look() -> None:
        rig.fails = True
        for _ in range(2):
            with pytest.raises(NodeError):
                await rig.overview.show()
        rig.fails, rig.now_s = False, rig.now_s + 1
        assert (await rig.overview.show())["volumes"]["total"] == 3

    asyncio.run(look())


def test_the_history_is_there_for_who_comes_late(tmp_path: Path) -> None:
    rig = Rig(tmp_path)

    async def look() -> None:
        for requests in (0, 50, 60):
            await rig.slot(requests)
        shown = await rig.overview.show(sort="requests")
        first, second, _ = shown["volumes"]["rows"]
        assert (first["name"], first["requests_per_s"], first["requests_history"]) == ("v0", 2.0, [10, 2])
        assert (second["requests_per_s"], second["requests_history"]) == (0, [])
        assert shown["traffic"]["requests_history"] == [10, 2]
        rig.volumes[0] |= {"traffic": None, "state": "unknown"}
        await rig.slot(None)
        assert (await rig.overview.show())["traffic"]["requests_history"] == [10, 2, 0]
        await rig.slot(70)
        assert (await rig.overview.show())["traffic"]["requests_history"] == [10, 2, 0, 2]

    asyncio.run(look())


def test_so_many_rows_as_are_asked_for(tmp_path: Path) -> None:
    rig = Rig(tmp_path, volumes=1000)
    shown = asyncio.run(rig.overview.show(match="V99", limit=5))
    assert (shown["volumes"]["total"], shown["volumes"]["matching"]) == (1000, 11)
    assert [row["name"] for row in shown["volumes"]["rows"]] == ["v99", "v990", "v991", "v992", "v993"]
    assert shown["states"] == {"serving": 1000}
    assert shown["clients"] == 1000


def test_of_many_replicas_that_are_not_in_sync_the_first_are_shown_and_all_counted(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.resync = [{"volume": f"db{number:02}", "node": "n2"} for number in range(12)]
    shown = asyncio.run(rig.overview.show())
    assert ([row["volume"] for row in shown["resync"]][-1], shown["resync_count"]) == ("db09", 12)


def test_of_a_thousand_scrubs_and_limits_the_ones_that_matter_are_shown(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.scrubs = [
        {"volume": f"v{number}", "state": "done", "next": f"2026-04-{1 + number % 9:02}"} for number in range(999)
    ]
    rig.scrubs.append({"volume": "last", "state": "running", "next": ""})
    rig.fills = [{"subject": f"volume v{number}", "percent": number / 10} for number in range(999)]
    rig.fills += [{"subject": "file system", "percent": 1.0}, {"subject": "max_data", "percent": 0.0}]
    shown = asyncio.run(rig.overview.show())
    assert [scrub["volume"] for scrub in shown["scrubs"]] == ["last"]
    assert (shown["scrub_states"], shown["scrub_next"]) == ({"done": 999, "running": 1}, "2026-04-01")
    subjects = [fill["subject"] for fill in shown["fills"]]
    assert subjects[:4] == ["file system", "max_data", "volume v998", "volume v997"]
    assert len(subjects) == 2 + MOST_SHOWN


def test_what_happens_again_and_again_does_not_hide_the_rest() -> None:
    def event(sequence: int, kind: str, volume: str) -> dict[str, Any]:
        return {"sequence": sequence, "time": f"t{sequence}", "kind": kind, "volume": volume, "free_bytes": sequence}

    events = [event(1, "volume-created", "a")]
    for sequence in range(2, 2000, 2):
        events += [event(sequence, "disk-full", "a"), event(sequence + 1, "disk-has-room", "a")]
    room, full, created = together(events)
    assert (room["kind"], room["sequence"], room["times"], room["since"]) == ("disk-has-room", 1999, 999, "t3")
    assert (full["kind"], full["sequence"], full["times"]) == ("disk-full", 1998, 999)
    assert (created["kind"], created["times"], created["since"]) == ("volume-created", 1, "t1")
    many = [event(number, "volume-created", f"v{number}") for number in range(100)]
    assert [line["sequence"] for line in together(many)] == list(range(99, 99 - MOST_EVENTS, -1))


ROWS = [
    {"name": "b", "description": "Mail of the office", "state": "serving", "damaged_blocks": 0, "node": "n1"},
    {"name": "a", "description": "", "state": "serving", "damaged_blocks": 0, "node": "n1"},
    {"name": "z", "description": "mail, old", "state": "full", "damaged_blocks": 0, "node": "n1"},
    {"name": "y", "description": "", "state": "failed", "damaged_blocks": 0, "node": "n1"},
    {"name": "x", "description": "", "state": "serving", "damaged_blocks": 3, "node": "n0"},
]


@pytest.mark.parametrize(
    ("match", "names"),
    [
        ("", "yzxab"),
        ("mail", "zb"),
        ("OFFICE mail", "b"),
        ("a", "zab"),
        ("nobody", ""),
        ("N0", "x"),
        ("   ", "yzxab"),
    ],
)
def test_what_is_troubled_comes_first_of_what_matches(match: str, names: str) -> None:
    assert "".join(row["name"] for row in select(ROWS, match, "trouble")) == names


def test_the_api_offers_every_order_there_is() -> None:
    assert set(get_args(Sort)) == set(SORTS)
    numbers = dict.fromkeys(("size_bytes", "live_bytes", "clients", "requests_per_s", "bytes_per_s", "latency_us"), 1)
    rows = [row | {key: value * place for key, value in numbers.items()} for place, row in enumerate(ROWS)]
    for sort in set(SORTS) - {"trouble", "name", "node"}:
        assert select(rows, "", sort) == rows[::-1]
    assert [row["name"] for row in select(rows, "", "name")] == ["a", "b", "x", "y", "z"]
    assert [row["name"] for row in select(rows, "", "node")] == ["x", "a", "b", "y", "z"]


def test_volumes_of_other_nodes_are_shown_among_the_own_ones(tmp_path: Path) -> None:
    elsewhere = {**NOT_TOLD, "key": "node n2/there", "name": "there", "node": "n2", "reason": "n2 is silent"}
    rig = Rig(tmp_path, elsewhere=([elsewhere], 5))
    assert rig.overview.told() == b"", "nothing is told before it is known"
    shown = asyncio.run(rig.overview.show())
    assert [row["name"] for row in shown["volumes"]["rows"]] == ["there", "v0", "v1", "v2"]
    assert (shown["volumes"]["total"], shown["states"], shown["clients"]) == (3 + 5, {"serving": 3}, 3)
    for sort in SORTS:
        assert len(asyncio.run(rig.overview.show(sort=sort))["volumes"]["rows"]) == 4
    assert list(volumes_of(rig.overview.told())) == ["v0", "v1", "v2"]
    assert list(rig.overview.load()["busiest"]) == ["v0", "v1", "v2"]

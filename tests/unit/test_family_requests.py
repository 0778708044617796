"""What is told of many families comes in pages, and the loop serves clients between two families."""

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from metadata.leveldb import LevelStore
from metadata.seams import Batch
from nbdserver.host.clock import HostClock
from nbdserver.logdisk.budget import Budget
from nbdserver.node import open_family
from nbdserver.node.family_requests import FAMILIES_A_PAGE, FamilyRequests
from nbdserver.node.open_family import FamilyError, OpenFamily, StoreThreads, open_room
from nbdserver.node.served_family import VOLUMES_A_TURN, ServedFamily, ServedVolume
from nbdserver.volume.export import Exports

FAMILIES = 2 * FAMILIES_A_PAGE + 3


class TurnsBetween:
    """Stands for a family; notes in which turn of the loop it was asked."""

    turn = 0
    asked: list[int]

    def __init__(self, name: str) -> None:
        self.name = name

    def status(self) -> dict[str, Any]:
        self.asked.append(TurnsBetween.turn)
        return {"name": self.name}

    async def whole_status(self) -> dict[str, Any]:
        return self.status()

    def figures(self) -> dict[str, Any]:
        return {self.name: self.status()}


def test_families_are_told_in_pages_and_one_a_turn() -> None:
    async def ask() -> None:
        loop = asyncio.get_running_loop()
        requests = FamilyRequests(Exports(), StoreThreads(loop), HostClock(loop), lambda kind, fields: None, Budget())
        families: Any = {f"family{number:03}": TurnsBetween(f"disk{number}") for number in range(FAMILIES)}
        requests._families = families

        def turn() -> None:
            TurnsBetween.turn += 1
            loop.call_soon(turn)

        turn()
        TurnsBetween.asked = []
        found, after, pages = {}, "", 0
        while True:
            page = await requests.do_volumes(after)
            assert len(page["families"]) <= FAMILIES_A_PAGE
            found |= page["families"]
            after, pages = page["last"], pages + 1
            if not after:
                break
        assert (found.keys(), pages) == (families.keys(), 3)
        assert len(set(TurnsBetween.asked)) == FAMILIES
        told, after = {}, ""
        for _ in range(pages):
            figures, after = await requests.figures(after)
            told |= figures
        assert (len(told), after) == (FAMILIES, "")

    asyncio.run(ask())


def test_a_thousand_clones_are_told_over_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = range(1, 1001)
    told: list[int] = []
    monkeypatch.setattr(ServedFamily, "_disk_status", lambda self: {})

    def statuses(_: ServedFamily, some: list[int]) -> dict[int, None]:
        told.append(len(some))
        return dict.fromkeys(some)

    monkeypatch.setattr(ServedFamily, "_volume_statuses", statuses)

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        family = ServedFamily(cast(OpenFamily, None), Exports(), HostClock(loop), None)
        family._volumes = cast(dict[int, ServedVolume], dict.fromkeys(numbers))
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            loop.call_soon(turn)

        turn()
        assert (await family.whole_status())["volumes"].keys() == set(numbers)
        assert turns >= len(told)
        assert max(told) == VOLUMES_A_TURN

    asyncio.run(ask())


def test_a_family_is_made_and_opened_in_turns_in_which_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []

    def wait_for_the_loop(what: str) -> None:
        went_on = threading.Event()
        loop.call_soon_threadsafe(went_on.set)
        assert went_on.wait(20.0), f"nobody is served during the {what}"
        waits.append(what)

    class WaitingStore(LevelStore):
        """Opens, and writes what is waited for, when the loop has gone on."""

        def __init__(self, path: str, *arguments: Any) -> None:
            wait_for_the_loop("opening")
            super().__init__(path, *arguments)

        def write(self, batch: Batch) -> None:
            wait_for_the_loop("write")
            super().write(batch)

    async def ask() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        threads = StoreThreads(loop)
        requests = FamilyRequests(Exports(), threads, HostClock(loop), lambda kind, fields: None, Budget())
        family, directory = "00" * 16, str(tmp_path / "family")
        await requests.do_format(directory, family, 1 << 20, 1 << 20)
        opening = {"directory": directory, "family": family, "volume": "disk0", "epoch": 1, "max_data_bytes": 0}
        waits.clear()
        assert (await requests.do_open(**opening))["sizes_bytes"] == {"1": 1 << 20}
        assert waits == ["opening", "write", "write"]
        monkeypatch.setattr(open_family, "LevelStore", LevelStore)
        monkeypatch.setattr(WaitingStore, "write", LevelStore.write)  # a clean end is noted on the loop
        assert await requests.close() == {}
        with pytest.raises(FamilyError, match="the node is stopping"):
            await requests.do_open(**{**opening, "epoch": 2})
        monkeypatch.undo()
        open_room(directory, threads).close()  # nobody has it open any more
        threads.close()

    loop: asyncio.AbstractEventLoop
    monkeypatch.setattr(open_family, "LevelStore", WaitingStore)
    asyncio.run(ask())

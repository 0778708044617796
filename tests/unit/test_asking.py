"""Requests that are answered soon or not at all."""

import asyncio
from typing import Any

import pytest

from nbdserver.node import asking
from nbdserver.node.asking import SILENT, Asking
from nbdserver.node.data_process import DataProcessError


def test_no_answer_is_noted_until_there_is_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ANSWER_S", 0.02)
    monkeypatch.setattr(asking, "QUICK_S", 0.01)
    hangs = True
    now_s = 50.0

    async def call(name: str, **arguments: Any) -> Any:
        if hangs:
            await asyncio.sleep(60)
        if name == "refused":
            raise DataProcessError("no", "FamilyError")
        return name, arguments

    async def look() -> None:
        nonlocal hangs, now_s
        asked = Asking(call, lambda: now_s)
        assert asked.silent_s == 0.0
        for _ in range(2):
            with pytest.raises(DataProcessError, match="has not answered") as caught:
                await asked.ask("volumes")
            assert caught.value.kind == SILENT
            now_s += 7
        assert asked.silent_s == 14.0
        hangs = False
        assert await asked.ask("volumes", after="x") == ("volumes", {"after": "x"})
        assert asked.silent_s == 0.0
        hangs = True
        with pytest.raises(DataProcessError):
            await asked.ask("volumes")
        hangs, now_s = False, now_s + 1
        with pytest.raises(DataProcessError, match="no"):
            await asked.ask("refused")
        assert asked.silent_s == 0.0, "who refuses is there"

    asyncio.run(look())

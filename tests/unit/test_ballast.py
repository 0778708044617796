"""The registry's ballast: there while there is plenty, gone when room is short."""

import os
from pathlib import Path

import pytest

from nbdserver.node.ballast import BALLAST_BYTES, PLENTY_BYTES, Ballast


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the file system says are free."""
    bytes_free = [PLENTY_BYTES]

    class Statistics:
        f_frsize = 1

        @property
        def f_bavail(self) -> int:
            return bytes_free[0]

    monkeypatch.setattr(os, "statvfs", lambda path: Statistics())
    return bytes_free


def test_the_file_holds_its_room_until_it_is_short(tmp_path: Path, free: list[int]) -> None:
    path = tmp_path / "ballast"
    ballast = Ballast(path)
    ballast.keep()
    assert path.stat().st_blocks * 512 >= BALLAST_BYTES
    free[0] = BALLAST_BYTES
    ballast.give_way()
    assert path.exists()
    free[0] = BALLAST_BYTES - 1
    ballast.give_way()
    assert not path.exists()
    ballast.keep()
    assert not path.exists()
    free[0] = PLENTY_BYTES
    ballast.keep()
    assert path.exists()

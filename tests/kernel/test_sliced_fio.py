"""What fio wrote beside the judge of power cuts is missed when it is lost: that judge's canary."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from protocol.nbd import Command
from tests.conftest import Processes
from tests.durability import BLOCK_BYTES
from tests.kernel.powered import VOLUME
from tests.kernel.sliced_fio import FROM, SIZE_BYTES, SLICE_BLOCKS, SlicedFio
from tests.nbd_client import Client
from tests.serving import Server


def test_fio_misses_one_block_of_what_it_had_flushed(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], needs: Callable[[str, str], str]
) -> None:
    server = Server(processes, tmp_path / "data", free_port(), {VOLUME: f"{FROM + SIZE_BYTES}"})
    fio = SlicedFio(processes, needs("fio", "fio"), tmp_path / "fio", server.port, seed=1)
    fio.wait_until_flushed()
    server.kill9()
    fio.end(is_answered=False)
    server.start()
    with closing(Client(("127.0.0.1", server.port), VOLUME)) as client:
        assert client.request(Command.TRIM, FROM + SLICE_BLOCKS // 2 * BLOCK_BYTES, BLOCK_BYTES).error == 0
    with pytest.raises(AssertionError, match=r"\[0\] are not as written"):
        fio.verify(server.port)

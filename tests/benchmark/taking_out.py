"""The complications of the hot path, and how each is taken out of a process: the plain thing happens then instead.

Theory. A complication is something that the server would be right without, and that is there to make it faster. What it
brings is what is lost without it. Each is taken out by replacing one name of the program before that begins.

Known weakness: what cannot be replaced by a name (the order of the walk, what a record looks like) is not here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nbdserver.frontend import inline_reads, transmission
from nbdserver.host import connection, network, syncing
from nbdserver.logdisk import log

from .rows import ROWS_BY_NAME, Row

VARIABLE = "NBDSERVER_WITHOUT"
NEVER = 1 << 60

FSYNC_4K_J1 = ROWS_BY_NAME["fsync-4k-j1"]
FSYNC_4K_J16 = ROWS_BY_NAME["fsync-4k-j16"]
RANDREAD_4K_D1 = ROWS_BY_NAME["randread-4k-d1"]
RANDREAD_4K_D16 = ROWS_BY_NAME["randread-4k-d16"]
RANDREAD_4K_J16 = ROWS_BY_NAME["randread-4k-j16"]
RANDWRITE_4K_D1 = ROWS_BY_NAME["randwrite-4k-d1"]
READ_128K_D8 = ROWS_BY_NAME["read-128k-d8"]
WRITE_128K_D8 = ROWS_BY_NAME["write-128k-d8"]
RANDREAD_4K_D4 = replace(RANDREAD_4K_D16, name="randread-4k-d4", title="4k random read, depth 4", depth=4)


@dataclass(frozen=True)
class Complication:
    """`instead` says what happens without it; `rows` are those that it is for."""

    name: str
    what: str
    instead: str
    rows: tuple[Row, ...]
    take_out: Callable[[], None]


def _no(*_arguments: Any) -> bool:
    return False


def _nothing(*_arguments: Any) -> None:
    pass


def _spin() -> None:
    network.CREDIT_LIMIT = 0


def _whole_batch() -> None:
    transmission.Transmission._serve_reads = _no


def _lone_read() -> None:
    inline_reads.InlineReads._lone_read = _nothing


def _rooms() -> None:
    transmission.Transmission._serve_reads = _no

    def take(_self: Any, _view: memoryview, position: int, *_bounds: int) -> tuple[int, int]:
        return position, 0

    inline_reads.InlineReads.take = take


def _four_replies() -> None:
    inline_reads.RUN_BLOCKS = 33
    inline_reads.RUN_LIMIT_BYTES = 32 * inline_reads.BLOCK_BYTES


def _rounds_end() -> None:
    def at_once(_self: Any, callback: Callable[[], None]) -> None:
        callback()

    connection.SocketConnection.at_round_end = at_once


def _stay_outside() -> None:
    network.WAKE_S = 0.0


def _send_buffer() -> None:
    connection._enlarge_send_buffer = _nothing


def _receive_more() -> None:
    connection.MORE_BYTES = NEVER


def _anticipation() -> None:
    log.HABIT_RECORDS = NEVER


def _sync_on_the_loop() -> None:
    syncing.QUICK_SYNCS = NEVER


def _data_early() -> None:
    syncing._sync_file_range = _nothing


COMPLICATIONS = {
    complication.name: complication
    for complication in (
        Complication(
            "spinning",
            "asks for the next request for 60 µs before it sleeps",
            "sleeps at once",
            (RANDREAD_4K_D1, RANDWRITE_4K_D1, FSYNC_4K_J1),
            _spin,
        ),
        Complication(
            "whole-batch",
            "a batch that is nothing but reads of a block is unpacked and answered as a whole",
            "is walked over",
            (RANDREAD_4K_D16, RANDREAD_4K_D4),
            _whole_batch,
        ),
        Complication(
            "lone-read",
            "a batch of one read has a shorter way still",
            "is walked over",
            (RANDREAD_4K_D1, RANDREAD_4K_J16),
            _lone_read,
        ),
        Complication(
            "rooms",
            "reads go to where they leave from",
            "each is a buffer of its own, joined with its header by sendmsg",
            (RANDREAD_4K_D16, READ_128K_D8),
            _rooms,
        ),
        Complication(
            "four-replies",
            "four replies of 128k leave with one call",
            "each with its own",
            (READ_128K_D8,),
            _four_replies,
        ),
        Complication(
            "end-of-round",
            "what all connections wrote in a round is one record",
            "a record a connection",
            (FSYNC_4K_J16,),
            _rounds_end,
        ),
        Complication(
            "outside-the-loop",
            "serves its sockets for up to 400 µs before asyncio has its turn",
            "asyncio has it after each batch",
            (RANDREAD_4K_D16, RANDREAD_4K_D1, RANDWRITE_4K_D1, RANDREAD_4K_J16),
            _stay_outside,
        ),
        Complication(
            "send-buffer",
            "the kernel may hold 2 MiB of replies a connection",
            "as much as it is used to",
            (RANDREAD_4K_D16, READ_128K_D8),
            _send_buffer,
        ),
        Complication(
            "receive-more",
            "where much has come it looks for more before it begins",
            "begins",
            (WRITE_128K_D8,),
            _receive_more,
        ),
        Complication(
            "sync-with-the-write",
            "for who flushes after each write the sync begins with the write",
            "with the flush",
            (FSYNC_4K_J1, FSYNC_4K_J16),
            _anticipation,
        ),
        Complication(
            "sync-on-the-loop",
            "for a client that is alone a quick device is synced on the loop",
            "by the thread",
            (FSYNC_4K_J1,),
            _sync_on_the_loop,
        ),
        Complication(
            "data-early",
            "before such a sync the device is given the data at once",
            "by the sync",
            (FSYNC_4K_J1,),
            _data_early,
        ),
    )
}

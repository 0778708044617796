"""The complications of the hot path, and how each is taken out of a process: the plain thing happens then instead.

Theory. A complication is something that the server would be right without, and that is there to make it faster. What it
brings is what is lost without it. Each is taken out by replacing one name of the program before that begins.

Known weakness: what cannot be replaced by a name (the order of the walk, what a record looks like) is not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdserver.frontend import inline_reads, transmission
from nbdserver.host import connection, network, spinning, syncing
from nbdserver.logdisk import log, reader, runs, writer

VARIABLE = "NBDSERVER_WITHOUT"
NEVER = 1 << 60


@dataclass(frozen=True)
class Complication:
    """`instead` says what happens without it; `rows` are those that it is for."""

    name: str
    what: str
    instead: str
    rows: tuple[str, ...]
    take_out: Callable[[], None]


def _no(*_arguments: Any) -> bool:
    return False


def _nothing(*_arguments: Any) -> None:
    pass


def _one_by_one(values: Any, at: int, step: int) -> int:
    """`run_length`, value by value."""
    expected = values[at]
    for index in range(at, len(values)):
        if values[index] != expected:
            return index - at
        expected += step
    return len(values) - at


def _rising(typecode: str, first: int, step: int, count: int) -> Any:
    return runs.array(typecode, range(first, first + step * count, step))


def _spin() -> None:
    spinning.CREDIT_LIMIT = 0


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


def _long_integers() -> None:
    for module in (reader, writer):
        module.run_length = _one_by_one
    writer.rising = _rising


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
            ("randread-4k-d1", "randwrite-4k-d1", "fsync-4k-j1"),
            _spin,
        ),
        Complication(
            "whole-batch",
            "a batch that is nothing but reads of a block is unpacked and answered as a whole",
            "is walked over",
            ("randread-4k-d16",),
            _whole_batch,
        ),
        Complication(
            "lone-read",
            "a batch of one read has a shorter way still",
            "is walked over",
            ("randread-4k-d1", "randread-4k-j16"),
            _lone_read,
        ),
        Complication(
            "rooms",
            "reads go to where they leave from",
            "each is a buffer of its own, joined with its header by sendmsg",
            ("randread-4k-d16", "read-128k-d8"),
            _rooms,
        ),
        Complication(
            "four-replies",
            "four replies of 128k leave with one call",
            "each with its own",
            ("read-128k-d8",),
            _four_replies,
        ),
        Complication(
            "long-integers",
            "runs are compared and made as one long integer",
            "entry by entry",
            ("read-128k-d8", "write-128k-d8"),
            _long_integers,
        ),
        Complication(
            "end-of-round",
            "what all connections wrote in a round is one record",
            "a record a connection",
            ("fsync-4k-j16",),
            _rounds_end,
        ),
        Complication(
            "outside-the-loop",
            "serves its sockets for up to 400 µs before asyncio has its turn",
            "asyncio has it after each batch",
            ("randread-4k-d16", "randread-4k-d1", "randwrite-4k-d1", "randread-4k-j16"),
            _stay_outside,
        ),
        Complication(
            "send-buffer",
            "the kernel may hold 2 MiB of replies a connection",
            "as much as it is used to",
            ("randread-4k-d16", "read-128k-d8"),
            _send_buffer,
        ),
        Complication(
            "receive-more",
            "where much has come it looks for more before it begins",
            "begins",
            ("write-128k-d8",),
            _receive_more,
        ),
        Complication(
            "sync-with-the-write",
            "for who flushes after each write the sync begins with the write",
            "with the flush",
            ("fsync-4k-j1", "fsync-4k-j16"),
            _anticipation,
        ),
        Complication(
            "sync-on-the-loop",
            "for a client that is alone a quick device is synced on the loop",
            "by the thread",
            ("fsync-4k-j1",),
            _sync_on_the_loop,
        ),
        Complication(
            "data-early",
            "before such a sync the device is given the data at once",
            "by the sync",
            ("fsync-4k-j1",),
            _data_early,
        ),
    )
}

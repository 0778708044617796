"""A client that writes and knows afterwards what must be there, and what may: the judge of kill -9 and of power cuts.

Every 4 KiB block holds its number and a version, repeated, so that one read tells which write it shows, a mix of two,
or a stranger's data. For each block the judge keeps the oldest version that may still be seen (*floor*) and the
newest sent. A flush raises the floor of a block to its newest version acknowledged before the flush was sent; FUA
raises it with its own reply. After a power cut each block must show a version between the two; after kill -9 nothing
acknowledged may be missing either. A version that a crash undid is never sent again, so that it is known when it
comes back from a former life of a segment.

Rule: a block has at most one write in flight, so that its versions arrive in order. Version 0 is zeros: never
written. A trim is a version like any other, which shows zeros.
"""

import errno
import random
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from protocol.nbd import Command, CommandFlag
from tests.nbd_client import Client

BLOCK_BYTES = 4096
READ_BYTES = 1 << 20
FLUSH_SHARE, FUA_SHARE, TRIM_SHARE = 0.04, 0.03, 0.05
LONGEST_BLOCKS = 8
DEPTH = 16


class LostError(AssertionError):
    """The disk shows what it must not."""


@dataclass
class Request:
    """What is in flight. For a flush, `versions` is what was acknowledged when it was sent."""

    blocks: range = range(0)
    versions: dict[int, int] = field(default_factory=dict)
    sent_s: float = field(default_factory=time.monotonic)
    is_flush: bool = False
    is_fua: bool = False


class Judge:
    """One export's first `blocks` blocks: writes them at random, and checks them after a crash."""

    def __init__(self, blocks: int, generator: random.Random) -> None:
        self.blocks = blocks
        self.random = generator
        self.floor = [0] * blocks
        self.acknowledged = [0] * blocks
        self.newest = [0] * blocks
        self.trimmed: set[tuple[int, int]] = set()  # (block, version): versions that show zeros
        self.dead: set[tuple[int, int]] = set()  # (block, version) that a crash undid: never to be seen again
        self.flushes = self.writes = 0
        self.longest_s = 0.0
        """From any request to its reply."""
        self.may_refuse = 0
        """An errno that a write may get; it has happened then, or not."""
        self.refused = 0
        self._dirty: set[int] = set()  # blocks with acknowledged versions above their floor
        self._late: set[tuple[int, int]] = set()  # (block, version) that may be seen below the floor

    def write_until(self, client: Client, deadline: float, finish: bool = False) -> list[Request]:
        """Write, trim and flush until `deadline` (monotonic), leaving requests in flight unless they are to `finish`;
        returns these. ConnectionError if cut."""
        in_flight: dict[int, Request] = {}
        busy: set[int] = set()
        while (more := time.monotonic() < deadline) or (finish and in_flight):
            while more and len(in_flight) < DEPTH:
                cookie, request = self._send(client, busy)
                in_flight[cookie] = request
            reply = client.receive()
            request = in_flight.pop(reply.cookie)
            busy.difference_update(request.blocks)
            self.longest_s = max(self.longest_s, time.monotonic() - request.sent_s)
            if not reply.error:
                self._answered(request)
            elif reply.error == self.may_refuse and not request.is_flush:
                self.refused += 1
            else:
                raise AssertionError(f"the server answered errno {reply.error}")
        return list(in_flight.values())

    def may_come_late(self, requests: Iterable[Request]) -> None:
        """These were not answered, and their connection is open: until the next check they may happen, also after what
        others write."""
        self._late.update(item for request in requests if not request.is_flush for item in request.versions.items())

    def _send(self, client: Client, busy: set[int]) -> tuple[int, Request]:
        lot = self.random.random()
        if lot < FLUSH_SHARE:
            versions = {block: self.acknowledged[block] for block in self._dirty}
            return client.send(Command.FLUSH), Request(versions=versions, is_flush=True)
        while True:
            first = self.random.randrange(self.blocks)
            blocks = range(first, min(self.blocks, first + self.random.randint(1, LONGEST_BLOCKS)))
            if busy.isdisjoint(blocks):
                break
        busy.update(blocks)
        for block in blocks:
            self.newest[block] += 1
        is_fua = lot < FLUSH_SHARE + FUA_SHARE
        request = Request(blocks, {block: self.newest[block] for block in blocks}, is_fua=is_fua)
        flags = CommandFlag.FUA if is_fua else 0
        offset = first * BLOCK_BYTES
        if lot > 1 - TRIM_SHARE:
            self.trimmed |= set(request.versions.items())
            return client.send(Command.WRITE_ZEROES, offset, len(blocks) * BLOCK_BYTES, flags=flags), request
        data = b"".join(content(block, self.newest[block]) for block in blocks)
        return client.send(Command.WRITE, offset, data=data, flags=flags), request

    def _answered(self, request: Request) -> None:
        if request.is_flush:
            self.flushes += 1
        else:
            self.writes += 1
            for block, version in request.versions.items():
                self.acknowledged[block] = version
                self._dirty.add(block)
        if request.is_flush or request.is_fua:
            for block, version in request.versions.items():
                self.floor[block] = max(self.floor[block], version)
                if self.floor[block] == self.acknowledged[block]:
                    self._dirty.discard(block)

    def check(self, client: Client, acknowledged_too: bool) -> None:
        """Read everything; LostError if a block shows what it must not. What was read is the floor from here on.

        `acknowledged_too`: nothing acknowledged may be missing, flushed or not (the machine has kept its page cache).
        """
        faults = []
        for first in range(0, self.blocks, READ_BYTES // BLOCK_BYTES):
            count = min(READ_BYTES // BLOCK_BYTES, self.blocks - first)
            try:
                data = client.read(first * BLOCK_BYTES, count * BLOCK_BYTES)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                faults.append(f"one of the {count} blocks from {first} on cannot be read")
                continue
            for number in range(count):
                block = first + number
                floor = self.acknowledged[block] if acknowledged_too else self.floor[block]
                shown = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                version = self._version_shown(block, floor, shown)
                if version is None:
                    faults.append(f"block {block} shows {describe(shown)}; allowed: {floor} to {self.newest[block]}")
                else:
                    self.floor[block] = self.acknowledged[block] = version
                    self.dead.update((block, undone) for undone in range(version + 1, self.newest[block] + 1))
        self._dirty.clear()
        self._late.clear()
        if faults:
            raise LostError(f"{len(faults)} faults in {self.blocks} blocks; the first: {'; '.join(faults[:5])}")

    def _version_shown(self, block: int, floor: int, shown: bytes) -> int | None:
        for version in range(self.newest[block], -1, -1):
            if (block, version) in self.dead or (version < floor and (block, version) not in self._late):
                continue
            zeros = version == 0 or (block, version) in self.trimmed
            if shown == (bytes(BLOCK_BYTES) if zeros else content(block, version)):
                return version
        return None


def content(block: int, version: int) -> bytes:
    return struct.pack("<QQ", block, version) * (BLOCK_BYTES // 16)


def describe(shown: bytes) -> str:
    """What a wrong block holds, for the message."""
    parts = {shown[offset : offset + 16] for offset in range(0, BLOCK_BYTES, 16)}
    names = [
        "zeros" if part == bytes(16) else "block {} version {}".format(*struct.unpack("<QQ", part)) for part in parts
    ]
    return " mixed with ".join(sorted(names)[:3])

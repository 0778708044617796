"""The segment files in the offline check: each one's chain of records, the blocks in it, and how one leads to the next.

Theory. What the chain names is taken out of what the middle map has in the segment, so that what is left over lies
where no record put a block. The data is read by itself, because that is what takes long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from metadata.family_state import Checkpoint
from metadata.seams import Files
from metadata.segment_table import SegmentTable
from nbdserver.logdisk.check_layers import Find
from nbdserver.logdisk.read_ahead import ReadAhead, read_record
from nbdserver.logdisk.records import Record, parse_segment_header
from nbdserver.logdisk.segments import segment_path
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, SEAL, SEGMENT_HEADER_BYTES, chain_key

if TYPE_CHECKING:
    from nbdserver.logdisk.check import CheckResult

_READ_BLOCKS = 256  # of neighbouring live blocks in one read

Placed = tuple[int, int, int]
"""A live block: offset, MBA, checksum."""


@dataclass
class _Chain:
    """How the chain of one segment begins and ends."""

    previous_crc: int  # in the segment's header
    crc: int
    last: Record | None


class SegmentCheck:
    """Checks segment after segment, then their order; `quick` leaves out reading the data."""

    def __init__(
        self, files: Files, table: SegmentTable, family: bytes, quick: bool, result: CheckResult, find: Find
    ) -> None:
        self._files = files
        self._table = table
        self._family = family
        self._quick = quick
        self._result = result  # what is verified is counted there
        self._find = find
        self._chains: dict[int, _Chain] = {}  # of the segments whose chain is whole

    def check(self, segment: int, blocks: list[Placed]) -> bool:
        """Check one that has these blocks, in order; False if its file cannot be opened."""
        try:
            handle = self._files.open(segment_path(segment))
        except OSError as error:
            self._find("chain", f"segment {segment}", f"the file of segment {segment} cannot be opened: {error}")
            return False
        try:
            chain = self._check_chain(segment, handle, blocks)
            if chain is not None:
                self._chains[segment] = chain
            if not self._quick:
                self._check_data(segment, handle, blocks)
        finally:
            self._files.close(handle)
        return True

    def check_links(self, position: Checkpoint) -> None:
        """The chain goes on from segment to segment, and the checkpoint stands at its end."""
        table, chains = self._table, self._chains
        by_sequence = {table.sequence[segment]: segment for segment in table.in_use}
        for segment, chain in chains.items():
            follower = by_sequence.get(table.sequence[segment] + 1, 0)
            if follower not in chains:
                continue
            seal = chain.last if chain.last is not None and chain.last.kind == SEAL else None
            is_named = seal is None or (seal.successor, seal.successor_salt) == (follower, table.salt[follower])
            if chains[follower].previous_crc != chain.crc or not is_named:
                sentence = f"segment {follower} does not go on where segment {segment} ends"
                self._find("chain", f"segment {follower}", sentence)
        opened = chains.get(position.segment)
        end = (table.end[position.segment], opened.crc) if opened is not None else None
        if position.offset and end is not None and end != (position.offset, position.previous_crc):
            sentence = f"the checkpoint does not stand at the end of segment {position.segment}"
            self._find("log", f"segment {position.segment}", sentence)

    def _check_chain(self, segment: int, handle: int, blocks: list[Placed]) -> _Chain | None:
        for (offset, mba, _), (following, other, _) in pairwise(blocks):
            if following < offset + BLOCK_BYTES:
                self._find(
                    "middle-map", f"segment {segment} byte {following}",
                    f"MBA {mba:#x} and MBA {other:#x} lie in the same place of segment {segment}",
                )  # fmt: skip
        wanted = {offset: (mba, checksum) for offset, mba, checksum in blocks}
        try:
            chain = self._walk(segment, handle, wanted)
        except OSError as error:
            self._find("chain", f"segment {segment}", f"segment {segment} cannot be read: {error}")
            return None
        if chain is not None:
            for offset, (mba, _) in wanted.items():
                self._find(
                    "middle-map", f"segment {segment} byte {offset}",
                    f"MBA {mba:#x} lies at byte {offset} of segment {segment}, where no record put a block",
                )  # fmt: skip
        return chain

    def _walk(self, segment: int, handle: int, wanted: dict[int, tuple[int, int]]) -> _Chain | None:
        """Follow the chain up to `end`, taking what it names out of `wanted`; None if it breaks."""
        table = self._table
        where = f"segment {segment}"
        start = parse_segment_header(self._files.read(handle, SEGMENT_HEADER_BYTES, 0))
        sequence, salt, end = table.sequence[segment], table.salt[segment], table.end[segment]
        life = (self._family, segment, sequence, salt)
        if start is None or (start.family, start.segment, start.sequence, start.salt) != life:
            # A header that nothing follows yet may be lost with the power: recovery goes on without it.
            if end > SEGMENT_HEADER_BYTES:
                self._find("chain", where, f"the header of segment {segment} is not that of its present life")
            return None
        key, offset, crc = chain_key(sequence, salt), SEGMENT_HEADER_BYTES, start.previous_crc
        last: Record | None = None
        ahead = ReadAhead(self._files, handle)
        while offset < end:
            record = read_record(ahead, key, offset)
            if record is None or record.previous_crc != crc or (last is not None and record.lsn != last.lsn + 1):
                follows = f"and {end - offset} bytes should follow"
                sentence = f"segment {segment} has no valid record at byte {offset}, {follows}"
                self._find("chain", f"{where} byte {offset}", sentence)
                return None
            self._match(segment, record, wanted)
            self._result.records_verified += 1
            offset, crc, last = record.end, record.crc, record
        if offset != end or (last is not None and (last.lsn, last.txid) != (table.lsn[segment], table.txid[segment])):
            self._find(
                "segment-table",
                where,
                f"the records of segment {segment} end at byte {offset}, the usage table says {end}",
            )
            return None
        return _Chain(start.previous_crc, crc, last)

    def _match(self, segment: int, record: Record, wanted: dict[int, tuple[int, int]]) -> None:
        offset = record.data_offset
        for mba, checksum in zip(record.mbas, record.checksums, strict=True):
            found = wanted.pop(offset, None)
            if found is not None and found != (mba, checksum):
                self._find(
                    "middle-map", f"segment {segment} byte {offset}",
                    f"the middle map has MBA {found[0]:#x} with checksum {found[1]:08x} at byte {offset} of segment "
                    f"{segment}; the record there has MBA {mba:#x} with {checksum:08x}",
                )  # fmt: skip
            offset += BLOCK_BYTES

    def _check_data(self, segment: int, handle: int, blocks: list[Placed]) -> None:
        for first, count in _runs(blocks):
            begin = blocks[first][0]
            try:
                data = self._files.read(handle, count * BLOCK_BYTES, begin)
            except OSError:
                data = b""
            for index, (offset, mba, checksum) in enumerate(blocks[first : first + count]):
                block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                if not block and count > 1:
                    block = self._read_block(handle, offset)
                if len(block) == BLOCK_BYTES and crc32c(block) == checksum:
                    self._result.blocks_verified += 1
                    continue
                what = "has the wrong checksum" if len(block) == BLOCK_BYTES else "cannot be read"
                self._find(
                    "data", f"segment {segment} byte {offset}",
                    f"the block of MBA {mba:#x} at byte {offset} of segment {segment} {what}",
                )  # fmt: skip

    def _read_block(self, handle: int, offset: int) -> bytes:
        try:
            return self._files.read(handle, BLOCK_BYTES, offset)
        except OSError:
            return b""


def _runs(blocks: list[Placed]) -> Iterator[tuple[int, int]]:
    """(first, count) of the blocks that lie one after the other, at most _READ_BLOCKS in a run."""
    first = 0
    while first < len(blocks):
        count = 1
        while (
            count < _READ_BLOCKS
            and first + count < len(blocks)
            and blocks[first + count][0] == blocks[first][0] + count * BLOCK_BYTES
        ):
            count += 1
        yield first, count
        first += count

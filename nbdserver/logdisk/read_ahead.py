"""Reading a segment forward, record by record, where waiting for the disk is right: recovery and the offline check."""

from __future__ import annotations

from metadata.seams import Files
from nbdserver.logdisk.records import Record, body_length, parse_record
from protocol.disk import RECORD_HEADER_BYTES

_AHEAD_BYTES = 1 << 20


class ReadAhead:
    """A segment's bytes, read in long pieces because most records are short; waits for the disk."""

    def __init__(self, files: Files, handle: int) -> None:
        self._files = files
        self._handle = handle
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """Less at the end of the file."""
        at = offset - self._start
        if not 0 <= at <= len(self._data) - length:
            if length > _AHEAD_BYTES:
                return self._files.read(self._handle, length, offset)
            self._data = self._files.read(self._handle, _AHEAD_BYTES, offset)
            self._start = offset
            at = 0
        return self._data[at : at + length]


def read_record(ahead: ReadAhead, key: bytes, offset: int) -> Record | None:
    """The record at `offset` of a segment in the life that `key` names, or None."""
    header = ahead.read(offset, RECORD_HEADER_BYTES)
    length = body_length(key, header)
    if length is None:
        return None
    return parse_record(key, header, ahead.read(offset + RECORD_HEADER_BYTES, length), offset)

"""Saving a volume or snapshot as an image.

Theory: a volume is saved through a snapshot that lives as long as the command, so that the image is of one moment
although clients go on. A file appears under its name when it is whole: until then it is NAME.part.

Rules: a snapshot of ours that is left by a command that was killed is deleted by the next save of the volume, when it
is older than LEFT_AFTER_S and nobody reads it. A NAME.part that is left is overwritten by the next save to it.
"""

import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbdserver.cli.client import NodeClient
from nbdserver.images import qemu
from nbdserver.images.client import PIECE_BYTES, Client
from nbdserver.images.raw import Sink
from nbdserver.node.addresses import uri
from nbdserver.node.errors import ConflictError, NodeError, WrongInputError

TEMPORARY = "image-save-"
LEFT_AFTER_S = 60.0

Progress = Callable[[str, int, int | None], Any]


def save(
    node: NodeClient, socket: Path, source: str, file: str, image_format: str, live: bool, progress: Progress
) -> int:
    """Save `source`, VOLUME or VOLUME@SNAPSHOT, to a file or "-"; returns the image's size in bytes. NodeError."""
    volume, _, snapshot = source.partition("@")
    if image_format == "qcow2":
        qemu.program()
    with _target(file) as descriptor:
        if snapshot or live:
            return _save_export(socket, source, file, descriptor, image_format, progress)
        with _momentary_snapshot(node, volume) as export:
            return _save_export(socket, export, file, descriptor, image_format, progress)


def _save_export(socket: Path, export: str, file: str, descriptor: int, image_format: str, progress: Progress) -> int:
    with Client(str(socket), export) as reading, Client(str(socket), export) as telling:
        size_bytes = reading.size_bytes

        def show(done_bytes: float) -> None:
            progress(f"saving {export.partition('@')[0]}", int(done_bytes), size_bytes)

        if image_format == "raw":
            sink = Sink(descriptor, size_bytes)
            for offset, data in reading.read(telling.data()):
                sink.put(offset, data)
                show(offset + len(data))
            sink.finish()
        else:
            _convert(uri(f"unix:{socket}", export), file, descriptor, lambda percent: show(percent / 100 * size_bytes))
        show(size_bytes)
    return size_bytes


def _convert(source: str, file: str, descriptor: int, progress: Callable[[float], None]) -> None:
    """qemu-img needs a file in which it can go back: for a pipe one without a name."""
    if file != "-":
        path = f"/dev/fd/{descriptor}"
        qemu.convert(["-f", "raw", "-O", "qcow2", source, path], progress, [descriptor])
        return
    with tempfile.TemporaryFile() as whole:
        path = f"/dev/fd/{whole.fileno()}"
        qemu.convert(["-f", "raw", "-O", "qcow2", source, path], progress, [whole.fileno()])
        size_bytes = whole.seek(0, os.SEEK_END)
        whole.seek(0)
        sink = Sink(descriptor, size_bytes)
        for offset in range(0, size_bytes, PIECE_BYTES):
            sink.put(offset, whole.read(PIECE_BYTES))
        sink.finish()


@contextmanager
def _target(file: str) -> Iterator[int]:
    """A descriptor to write the image to; a regular file gets its name at the end."""
    if file == "-":
        if sys.stdout.isatty():
            raise WrongInputError("an image is not for a terminal; name a file, or redirect standard output")
        yield sys.stdout.fileno()
        return
    path = Path(file)
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise WrongInputError(f"{file} is a directory; name a file")
        descriptor = os.open(path, os.O_RDWR)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return
    part = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    except OSError as error:
        raise WrongInputError(f"{part} cannot be written: {error.strerror}") from None
    try:
        yield descriptor
        os.fsync(descriptor)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def _momentary_snapshot(node: NodeClient, volume: str) -> Iterator[str]:
    """The export of a snapshot that is deleted afterwards."""
    for found in node.get("/v1/snapshots", volume=volume):
        age = datetime.now(UTC) - datetime.fromisoformat(found["created"])
        if found["name"].startswith(TEMPORARY) and not found["clients"] and age > timedelta(seconds=LEFT_AFTER_S):
            node.delete(f"/v1/snapshots/{quote(volume, safe='')}/{found['name']}", force="false")
    name = TEMPORARY + secrets.token_hex(4)
    try:
        node.post("/v1/snapshots", {"volume": volume, "name": name})
    except ConflictError as error:
        raise ConflictError(f"{error}. Without a snapshot: --live, while nobody writes to {volume}") from None
    try:
        yield f"{volume}@{name}"
    finally:
        try:
            # The node may not have noticed yet that our connection is closed.
            node.delete(f"/v1/snapshots/{quote(volume, safe='')}/{name}", force="true")
        except NodeError as error:
            print(f"nbdserver: the snapshot {volume}@{name} is left, delete it: {error}", file=sys.stderr)

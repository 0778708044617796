"""Loading an image into a volume.

Theory: first everything is looked at that can be wrong, then the volume is made one hole, and the image's data is
written into it. At the end it is flushed. What goes wrong in between leaves the volume with a part of the image, and
the error says so; a volume that was made for the image is deleted again.

Rules: nobody else may be attached to the volume when it begins. Hosts elsewhere cannot attach while it is loaded ("one
host writes"); other programs on this machine could.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nbdserver.block import BLOCK_BYTES
from nbdserver.cli.client import NodeClient, volume_path
from nbdserver.images import qemu
from nbdserver.images.client import PIECE_BYTES, Client
from nbdserver.images.errors import ImageError
from nbdserver.images.raw import SECTOR_BYTES, Source
from nbdserver.node.addresses import uri
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError
from nbdserver.node.sizes import format_size

Progress = Callable[[str, int, int | None], Any]


@dataclass(frozen=True)
class Image:
    """An image that was opened and looked at."""

    shown: str  # its name, for people
    size_bytes: int | None  # of the disk in it; None: a pipe, which is told at its end
    source: Source | None  # of a raw one
    path: str  # of a qcow2 one, for qemu-img
    descriptors: tuple[int, ...]  # which qemu-img needs for that


@contextmanager
def opened(file: str, image_format: str, size_bytes: int | None, backing_files: bool) -> Iterator[Image]:
    """Open an image, "-" for standard input. `image_format` "" takes raw, unless it looks like qcow2. WrongInputError
    for what cannot be loaded."""
    shown = "standard input" if file == "-" else file
    with ExitStack() as stack:
        if file == "-":
            if sys.stdin.isatty():
                raise WrongInputError("an image does not come from a terminal; name a file, or redirect standard input")
            stream: IO[bytes] = sys.stdin.buffer
        else:
            try:
                stream = stack.enter_context(open(file, "rb", buffering=0))
            except OSError as error:
                raise WrongInputError(f"{file} cannot be read: {error.strerror}") from None
        if image_format == "qcow2":
            qemu.program()
            if file == "-":
                stream = stack.enter_context(_spooled(stream))
            yield _qcow2(shown, file, stream.fileno(), size_bytes, backing_files)
        else:
            yield _raw(shown, stream.fileno(), size_bytes, image_format)


def _raw(shown: str, descriptor: int, size_bytes: int | None, image_format: str) -> Image:
    source = Source(descriptor)
    known = source.size_bytes
    beginning = source.beginning()
    if not beginning:
        raise WrongInputError(f"{shown} is empty")
    if not image_format and beginning.startswith(qemu.QCOW2_MAGIC):
        raise WrongInputError(f"{shown} looks like qcow2; add --format qcow2 (or raw, to load it as it is)")
    if known is not None and known % SECTOR_BYTES:
        raise WrongInputError(
            f"{shown} has {known} bytes, no whole number of {SECTOR_BYTES}: it is cut off, or no image of a disk"
        )
    if None not in (known, size_bytes) and known != size_bytes:
        raise WrongInputError(f"{shown} has {known} bytes, not {size_bytes}")
    return Image(shown, size_bytes if known is None else known, source, "", ())


def _qcow2(shown: str, file: str, descriptor: int, size_bytes: int | None, backing_files: bool) -> Image:
    path = f"/dev/fd/{descriptor}" if file == "-" else file
    descriptors = (descriptor,) if file == "-" else ()
    info = qemu.inspect(path, shown, descriptors)
    if info.backing_file and not backing_files:
        raise WrongInputError(
            f"{shown} is read over another file, {info.backing_file}; if you trust who made it, add --backing-files"
        )
    qemu.check(path, shown, descriptors)
    if size_bytes is not None and size_bytes != info.size_bytes:
        raise WrongInputError(f"{shown} is of a disk of {info.size_bytes} bytes, not {size_bytes}")
    return Image(shown, info.size_bytes, None, path, descriptors)


@contextmanager
def _spooled(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """qemu-img needs a file in which it can go back: one without a name."""
    with tempfile.TemporaryFile() as whole:
        while piece := stream.read(PIECE_BYTES):
            whole.write(piece)
        whole.flush()
        yield whole


def load(node: NodeClient, socket: Path, image: Image, volume: str, create: bool, progress: Progress) -> dict[str, Any]:
    """Load an image; returns {image_bytes, size_bytes}. NodeError."""
    if "@" in volume:
        raise WrongInputError(f"{volume} is a snapshot, which never changes; name a volume")
    _prepare(node, image, volume, create)
    begun = False
    try:
        with Client(str(socket), volume) as client:
            _check_alone(node, client, volume)
            begun = True
            client.zero()
            if image.source is not None:
                image_bytes = _write(client, image.source, image, progress)
            else:
                image_bytes = image.size_bytes or 0
                _convert(uri(f"unix:{socket}", volume), image, progress)
            client.flush()
            return {"image_bytes": image_bytes, "size_bytes": client.size_bytes}
    except (NodeError, OSError, KeyboardInterrupt) as error:
        left = _undo(node, volume) if create else f"{volume} holds a part of it now" if begun else ""
        if isinstance(error, KeyboardInterrupt):
            print(f"nbdserver: interrupted; {left or 'nothing was changed'}", file=sys.stderr)
            raise
        reason = str(error) if isinstance(error, NodeError) else f"{image.shown} cannot be read: {error.strerror}"
        kind = type(error) if isinstance(error, NodeError) else ImageError
        raise kind(f"{reason}; {left}" if left else reason) from None


def _prepare(node: NodeClient, image: Image, volume: str, create: bool) -> None:
    """Find the volume fit for the image, or make it."""
    size_bytes = -(-(image.size_bytes or 0) // BLOCK_BYTES) * BLOCK_BYTES
    if create:
        if not size_bytes:
            raise WrongInputError(
                "the size of what comes from a pipe is not known: add --size SIZE to make a volume for it"
            )
        node.post("/v1/volumes", {"name": volume, "size_bytes": size_bytes})
        return
    try:
        found = node.get(volume_path(volume))
    except NotFoundError as error:
        raise NotFoundError(f"{error}; add --create to make it, of the image's size") from None
    if found["clients"]:
        plural = "s" if found["clients"] > 1 else ""
        raise ConflictError(f"volume {volume} has {found['clients']} client connection{plural}; detach first")
    if found["settings"]["read_only"]:
        raise ConflictError(f"volume {volume} is read-only; nbdserver volume set {volume} read-only=false")
    if size_bytes > found["size_bytes"]:
        raise ConflictError(
            f"volume {volume} has {format_size(found['size_bytes'])}, the image {format_size(image.size_bytes or 0)}; "
            f"nbdserver volume resize {volume} --size {format_size(size_bytes)}"
        )


def _check_alone(node: NodeClient, client: Client, volume: str) -> None:
    """Somebody may have come between the first look and our own connection."""
    if node.get(volume_path(volume))["clients"] > 1:
        raise ConflictError(f"volume {volume} was attached by somebody else just now; detach first")
    if client.read_only:
        raise ConflictError(f"volume {volume} is read-only; nbdserver volume set {volume} read-only=false")


def _write(client: Client, source: Source, image: Image, progress: Progress) -> int:
    def fitting() -> Iterator[tuple[int, memoryview]]:
        for offset, data in source.data():
            if offset + len(data) > client.size_bytes:
                raise ImageError(f"{image.shown} is larger than {client.export}, {format_size(client.size_bytes)}")
            yield offset, data

    for _ in client.write(fitting()):
        progress(f"loading {client.export}", source.read_bytes, image.size_bytes)
    read_bytes = source.read_bytes
    if image.size_bytes is not None and read_bytes != image.size_bytes:
        raise ImageError(f"{image.shown} had {read_bytes} bytes instead of {image.size_bytes}")
    if read_bytes % SECTOR_BYTES:
        raise ImageError(f"{image.shown} ended in the middle of a sector, after {read_bytes} bytes: it is cut off")
    return read_bytes


def _convert(target: str, image: Image, progress: Progress) -> None:
    size_bytes = image.size_bytes or 0

    def show(percent: float) -> None:
        progress("loading", int(percent / 100 * size_bytes), size_bytes)

    arguments = ["-n", "--target-is-zero", "-f", "qcow2", "-O", "raw", image.path, target]
    qemu.convert(arguments, show, image.descriptors)


def _undo(node: NodeClient, volume: str) -> str:
    try:
        node.delete(volume_path(volume), force="true")
    except NodeError as error:
        return f"volume {volume}, made for it, is left and holds a part of it ({error})"
    return f"volume {volume}, made for it, was deleted again"

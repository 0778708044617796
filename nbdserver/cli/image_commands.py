"""`nbdserver image ...`: volumes and snapshots as files, through the running node."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, wants_json
from nbdserver.cli.progress import progress_bar
from nbdserver.node.directory import OWN_SOCKET
from nbdserver.node.errors import WrongInputError
from nbdserver.node.sizes import SizeError, format_size, parse_size

app = typer.Typer(no_args_is_help=True, help="Save volumes and snapshots as files, load files into volumes.")

FORMATS = ("raw", "qcow2")
Format = Annotated[str, typer.Option("--format", metavar="raw|qcow2", help="Else qcow2 if the file's name ends so.")]


def _format(given: str, file: str, otherwise: str) -> str:
    if given and given not in FORMATS:
        raise WrongInputError(f"--format {given!s:.40} is not known; use {' or '.join(FORMATS)}")
    return given or ("qcow2" if file.endswith(".qcow2") else otherwise)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: what is half done is cleaned up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command("save")
def save(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="VOLUME[@SNAPSHOT]", help="What to save.", show_default=False)],
    file: Annotated[str, typer.Argument(help="Where to; - is standard output.", show_default=False)],
    image_format: Format = "",
    live: Annotated[
        bool, typer.Option("--live", help="Read the volume itself, without a snapshot: nobody may write meanwhile.")
    ] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Save a volume or a snapshot as an image.

    A volume is saved through a snapshot that is made now and deleted afterwards: the image is of one moment, also
    while clients write. (If the command is killed, the next save deletes what it left: image-save-*.) Holes stay
    holes. The file appears when it is whole; until then it is FILE.part. qcow2 needs qemu-img, and to standard output
    as much room in TMPDIR as the image takes.

    Examples:

      nbdserver image save disk0 disk0.raw

      nbdserver image save disk0@monday monday.qcow2

      nbdserver image save disk0 - | zstd > disk0.raw.zst
    """
    from nbdserver.cli import image_save

    as_json = wants_json(context, json_output)
    if as_json and file == "-":
        raise WrongInputError("--json and an image to - both need standard output; name a file")
    directory = data_path(context, data)
    chosen = _format(image_format, file, "raw")
    with _interrupted_by_sigterm(), progress_bar(not as_json, in_bytes=True) as progress:
        socket = directory.absolute() / OWN_SOCKET
        size_bytes = image_save.save(NodeClient(directory), socket, source, file, chosen, live, progress)
    if as_json:
        print_json({"source": source, "file": file, "format": chosen, "size_bytes": size_bytes})
    elif file != "-":
        print(f"saved {source}, {format_size(size_bytes)}, to {file}")


@app.command("load")
def load(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="The image; - is standard input.", show_default=False)],
    volume: Annotated[str, typer.Argument(help="Where to.", show_default=False)],
    image_format: Format = "",
    create: Annotated[bool, typer.Option("--create", help="Make the volume, of the image's size.")] = False,
    size: Annotated[
        str, typer.Option("--size", help="The image's size: one that has another is refused.", show_default=False)
    ] = "",
    backing_files: Annotated[
        bool, typer.Option("--backing-files", help="Read the files too that a qcow2 image names. Only if you trust it.")
    ] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Load an image into a volume. What the volume held is lost; its snapshots stay.

    No client may be attached. The volume is at least as large as the image; behind the image it reads as zeros, and
    what is zeros in the image takes no room. When the command says that it is done, all is durable; if it fails in the
    middle, it says that the volume holds a part of the image. A raw image from a pipe ends where the pipe ends: with
    --size one that is cut off is found out. qcow2 needs qemu-img, and from standard input room in TMPDIR.

    Examples:

      nbdserver image load disk0.raw disk1 --create

      nbdserver image load monday.qcow2 disk0

      zstd -dc disk0.raw.zst | nbdserver image load - disk0 --size 10G
    """
    from nbdserver.cli import image_load

    as_json = wants_json(context, json_output)
    try:
        size_bytes = parse_size(size) if size else None
    except SizeError as error:
        raise WrongInputError(f"--size: {error}") from None
    directory = data_path(context, data)
    chosen = _format(image_format, file, "")
    with (
        _interrupted_by_sigterm(),
        image_load.opened(file, chosen, size_bytes, backing_files) as image,
        progress_bar(not as_json, in_bytes=True) as progress,
    ):
        socket = directory.absolute() / OWN_SOCKET
        done = image_load.load(NodeClient(directory), socket, image, volume, create, progress)
    if as_json:
        print_json({"file": file, "volume": volume, "format": chosen or "raw", **done})
    else:
        print(f"loaded {image.shown}, {format_size(done['image_bytes'])}, into {volume}")

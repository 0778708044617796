"""Images of qemu's formats, by qemu-img.

Rules
- An image is checked before it is read: what a truncated qcow2 file has lost would read as zeros.
- An image may name other files that it is read over. They are read only if the caller trusts it: whoever made it could
  have named any file of this machine.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbdserver.images.errors import ImageError
from nbdserver.node.errors import WrongInputError

QCOW2_MAGIC = b"QFI\xfb"
MISSING = (
    "qcow2 needs qemu-img, which is not installed: apt-get install qemu-utils (Debian, Ubuntu), dnf install qemu-img "
    "(Fedora); raw images need nothing"
)
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")
_LEAKED = 3  # `qemu-img check`: room is lost in the file, nothing is wrong
_COROUTINES = "16"


@dataclass(frozen=True)
class ImageInfo:
    """What an image says of itself."""

    size_bytes: int
    backing_file: str  # or an external data file; "" without


def program() -> str:
    """Where qemu-img is. ImageError that says what is missing."""
    found = shutil.which("qemu-img")
    if found is None:
        raise ImageError(MISSING)
    return found


def inspect(path: str, shown: str, descriptors: Sequence[int] = ()) -> ImageInfo:
    """Look at a qcow2 image; `shown` is its name for people. WrongInputError if it is none."""
    try:
        told = json.loads(_run(["info", "--output=json", "-f", "qcow2", path], descriptors).stdout)
    except subprocess.CalledProcessError as error:
        raise WrongInputError(f"{shown} is no qcow2 image, or cut off: {_reason(error.stderr)}") from None
    special = told.get("format-specific", {}).get("data", {})
    return ImageInfo(told["virtual-size"], told.get("backing-filename", "") or special.get("data-file", ""))


def check(path: str, shown: str, descriptors: Sequence[int] = ()) -> None:
    """WrongInputError if the image's own maps do not add up, or name what is not there."""
    try:
        _run(["check", "-q", "-f", "qcow2", path], descriptors)
    except subprocess.CalledProcessError as error:
        if error.returncode != _LEAKED:
            raise WrongInputError(f"{shown} is damaged or cut off: {_reason(error.stderr)}") from None


def convert(arguments: Sequence[str], progress: Callable[[float], None], descriptors: Sequence[int] = ()) -> None:
    """Run `qemu-img convert`; `progress(percent)`. ImageError."""
    command = [program(), "convert", "-p", "-W", "-m", _COROUTINES, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=descriptors
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            while said := process.stdout.read1(4096):  # type: ignore[attr-defined]
                for percent in _PERCENT.findall(said):
                    progress(float(percent))
            complaint = process.stderr.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ImageError(_reason(complaint) or f"qemu-img ended with {process.returncode}")


def _run(arguments: Sequence[str], descriptors: Sequence[int]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [program(), *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=True, pass_fds=descriptors
    )


def _reason(complaint: bytes) -> str:
    lines = complaint.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("qemu-img: ") if lines else "qemu-img does not say why"

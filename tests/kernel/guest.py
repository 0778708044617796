"""A virtual machine whose shell the tests drive: `guest.run("mkfs.ext4 /dev/nbd0")`.

QEMU emulates the processor in software, so that it runs where there is no /dev/kvm; a guest boots in some seconds and
is some ten times slower than its host. The kernel's messages go to a file, commands and answers over the second serial
port (build.py has the other end). The host is 10.0.2.2 to the guest. A guest that is killed loses its memory, page
cache included, and keeps what it had written to its disks: this is what a power cut does.
"""

import base64
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.kernel.build import Images, overlay

HOST = "10.0.2.2"
BOOT_TIMEOUT_S = 90.0
COMMAND_TIMEOUT_S = 60.0
MEMORY_MIB = 768
# no_timer_check: the kernel gives up when a busy host lets the emulated timer come late.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"


class GuestError(Exception):
    """A command failed or did not end in time, or the guest died."""


class Guest:
    """One virtual machine, running from construction to `kill`."""

    def __init__(
        self,
        images: Images,
        folder: Path,
        *,
        files: Mapping[str, bytes] | None = None,
        disks: Sequence[Path] = (),
        forward: Mapping[int, int] | None = None,
        memory_mib: int = MEMORY_MIB,
    ) -> None:
        """Boot. `files` are put into the guest; `disks` are raw images (vda, vdb, ...), attached read-only if the file
        is; `forward` maps ports of the host's loopback to the guest's.
        """
        initramfs = folder / "initramfs.gz"
        initramfs.write_bytes(images.initramfs.read_bytes() + overlay(dict(files or {})))
        self.console = folder / "console.log"
        network = "user,id=network" + "".join(
            f",hostfwd=tcp:127.0.0.1:{outside}-:{inside}" for outside, inside in (forward or {}).items()
        )
        command: list[str | os.PathLike[str]] = [
            "setpriv", "--pdeathsig", "KILL",  # a test that is killed leaves no machine behind
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(memory_mib),
            "-nodefaults", "-display", "none", "-no-reboot", "-kernel", images.kernel, "-initrd", initramfs,
            "-append", KERNEL_ARGUMENTS,
            "-serial", f"file:{self.console}", "-serial", "stdio",
            "-netdev", network, "-device", "virtio-net-pci,netdev=network,romfile=",
        ]  # fmt: skip
        for number, disk in enumerate(disks):
            # cache=unsafe drops the guest's flushes: the host's page cache outlives QEMU, so nothing is lost by it.
            read_only = "" if os.stat(disk).st_mode & 0o200 else ",readonly=on"
            command += ["-drive", f"if=none,id=disk{number},format=raw,cache=unsafe,file={disk}{read_only}"]
            command += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._received = b""
        self._number = 0
        try:
            while self._line(time.monotonic() + BOOT_TIMEOUT_S).strip() != "guest-ready":
                pass
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Cut the power; idempotent."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S, check: bool = True) -> str:
        """Run shell commands (the first that fails ends them) and return what they print. GuestError if one fails."""
        self.send(command)
        return self.answer(timeout_s, check)

    def send(self, command: str) -> None:
        """Begin a command; `answer` must follow. What happens meanwhile is the test's affair."""
        self._number += 1
        self._command = command
        assert self.process.stdin is not None
        encoded = base64.b64encode(f"set -e\n{command}\n".encode()).decode()
        self.process.stdin.write(f"{self._number} {encoded}\n".encode())
        self.process.stdin.flush()

    def answer(self, timeout_s: float = COMMAND_TIMEOUT_S, check: bool = True) -> str:
        deadline = time.monotonic() + timeout_s
        while True:
            fields = self._line(deadline).split()
            if len(fields) >= 2 and fields[0] == str(self._number):
                break
        output = base64.b64decode(fields[2]).decode(errors="replace") if len(fields) > 2 else ""
        if check and fields[1] != "0":
            raise GuestError(
                f"exit code {fields[1]} of:\n{self._command}\nwhich printed:\n{output}\n{self._last_words()}"
            )
        return output

    def _line(self, deadline: float) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._received:
            left_s = deadline - time.monotonic()
            ready = left_s > 0 and select.select([self.process.stdout], [], [], left_s)[0]
            if not ready:
                raise GuestError(f"the guest did not answer in time; {self._last_words()}")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise GuestError(f"the guest died: {self._received.decode(errors='replace')}; {self._last_words()}")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return line.decode(errors="replace")

    def _last_words(self) -> str:
        words = self.console.read_text(errors="replace")[-2000:] if self.console.exists() else ""
        return f"its console's last words:\n{words}"

"""A virtual machine whose shell the tests drive: `guest.run("mkfs.ext4 /dev/nbd0")`.

QEMU emulates the processor in software, so that it runs where there is no /dev/kvm; a guest boots in some seconds and
is some ten times slower than its host. The kernel's messages go to a file, commands and answers over the second serial
port (build.py has the other end). The host is 10.0.2.2 to the guest. A guest that is killed loses its memory, page
cache included, and keeps what it had written to its disks: this is what a power cut does. Guests are linked in pairs,
by frames in UDP datagrams on loopback (`Link`).

A guest can be *frozen*: its state is a file then, from which others of the same shape go on. What they have alike by
that (clock, random numbers) is for them to change.
"""

import base64
import json
import os
import select
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernel.build import Images, overlay

HOST = "10.0.2.2"
BOOT_TIMEOUT_S = 90.0
COMMAND_TIMEOUT_S = 60.0
MEMORY_MIB = 768
THAW_LOOK_S = 0.2
# no_timer_check: the kernel gives up when a busy host lets the emulated timer come late.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"


class GuestError(Exception):
    """A command failed or did not end in time, or the guest died."""


@dataclass(frozen=True)
class Link:
    """One end of a wire to another guest, which is eth1 and so on: this end's UDP port on loopback, and the other's."""

    port: int
    other_port: int


@dataclass(frozen=True)
class Shape:
    """What a guest that was frozen and those that go on from there have alike, besides their disks."""

    memory_mib: int = MEMORY_MIB
    processors: int = 2
    links: int = 0


class Guest:
    """One virtual machine, running from construction to `kill`. Its first command waits until it has booted."""

    def __init__(
        self,
        images: Images,
        folder: Path,
        *,
        shape: Shape = Shape(),
        files: Mapping[str, bytes] | None = None,
        disks: Sequence[Path] = (),
        forward: Mapping[int, int] | None = None,
        links: Sequence[Link] = (),
        state: Path | None = None,
    ) -> None:
        """Start it. `files` are put into the guest; `disks` are raw images (vda, vdb, ...), attached read-only if the
        file is; `forward` maps ports of the host's loopback to the guest's; `links` lead to other guests, as many as
        the shape has or none. With a `state` it does not boot but goes on from there."""
        initramfs = folder / "initramfs.gz"
        initramfs.write_bytes(images.initramfs.read_bytes() + overlay(dict(files or {})))
        self.console = folder / "console.log"
        network = "user,id=network" + "".join(
            f",hostfwd=tcp:127.0.0.1:{outside}-:{inside}" for outside, inside in (forward or {}).items()
        )
        self._monitor, monitor = socket.socketpair()
        command: list[str | os.PathLike[str]] = [
            "setpriv", "--pdeathsig", "KILL",  # a test that is killed leaves no machine behind
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max",
            "-smp", str(shape.processors), "-m", str(shape.memory_mib),
            "-nodefaults", "-display", "none", "-no-reboot", "-kernel", images.kernel, "-initrd", initramfs,
            "-append", KERNEL_ARGUMENTS,
            "-serial", f"file:{self.console}", "-serial", "stdio",
            "-chardev", f"socket,id=monitor,fd={monitor.fileno()}", "-mon", "chardev=monitor,mode=control",
            "-netdev", network, "-device", "virtio-net-pci,netdev=network,romfile=",
        ]  # fmt: skip
        for number in range(1, shape.links + 1):
            wire = f"hubport,hubid={number}"  # to nobody
            if links:
                link = links[number - 1]
                wire = f"socket,udp=127.0.0.1:{link.other_port},localaddr=127.0.0.1:{link.port}"
            command += ["-netdev", f"{wire},id=link{number}"]
            command += ["-device", f"virtio-net-pci,netdev=link{number},romfile="]
        for number, disk in enumerate(disks):
            # cache=unsafe drops the guest's flushes: the host's page cache outlives QEMU, so nothing is lost by it.
            read_only = "" if os.stat(disk).st_mode & 0o200 else ",readonly=on"
            command += ["-drive", f"if=none,id=disk{number},format=raw,cache=unsafe,file={disk}{read_only}"]
            command += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        if state is not None:
            command += ["-incoming", f"exec:cat {shlex.quote(str(state))}"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[monitor.fileno()],
        )
        monitor.close()
        self._received = b""
        self._number = 0
        self._is_thawed = state is not None
        self._is_up = False

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Cut the power; idempotent."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._monitor):
            assert stream is not None
            stream.close()

    def wait_until_up(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until it takes commands. GuestError."""
        deadline = time.monotonic() + timeout_s
        if self._is_thawed:
            # What is sent before it goes on may be lost: so there is nothing in it but an empty command, which it
            # answers like any other.
            self._write(b"\n")
            while True:
                if self._is_readable(min(deadline, time.monotonic() + THAW_LOOK_S)):
                    if self._line(deadline).split() == ["0"]:
                        break
                elif time.monotonic() > deadline:
                    raise GuestError(f"the guest does not go on; {self._last_words()}")
                else:
                    self._write(b"\n")
        else:
            while self._line(deadline).strip() != "guest-ready":
                pass
        self._is_up = True

    def freeze(self, state: Path) -> None:
        """Write its state to a file; it is dead then. GuestError."""
        with self._monitor.makefile("rw") as monitor:

            def ask(name: str, **arguments: str) -> dict[str, Any]:
                monitor.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                monitor.flush()
                for line in monitor:
                    answer: dict[str, Any] = json.loads(line)
                    if "return" in answer:
                        return dict(answer["return"])
                    if "error" in answer:
                        raise GuestError(f"{name}: {answer['error']['desc']}")
                raise GuestError(f"{name}: the guest died; {self._last_words()}")

            ask("qmp_capabilities")
            ask("migrate", uri=f"exec:cat >{shlex.quote(str(state))}")
            while (status := ask("query-migrate").get("status")) != "completed":
                if status in ("failed", "cancelled"):
                    raise GuestError(f"its state cannot be written: {status}")
                time.sleep(THAW_LOOK_S)
        self.kill()

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S, check: bool = True) -> str:
        """Run shell commands (the first that fails ends them) and return what they print. GuestError if one fails."""
        self.send(command)
        return self.answer(timeout_s, check)

    def send(self, command: str) -> None:
        """Begin a command; `answer` must follow. What happens meanwhile is the test's affair."""
        if not self._is_up:
            self.wait_until_up()
        self._number += 1
        self._command = command
        encoded = base64.b64encode(f"set -e\n{command}\n".encode()).decode()
        self._write(f"{self._number} {encoded}\n".encode())

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise GuestError(f"the guest died; {self._last_words()}") from None

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
            if not self._is_readable(deadline):
                raise GuestError(f"the guest did not answer in time; {self._last_words()}")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise GuestError(f"the guest died: {self._received.decode(errors='replace')}; {self._last_words()}")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return line.decode(errors="replace")

    def _is_readable(self, deadline: float) -> bool:
        assert self.process.stdout is not None
        left_s = deadline - time.monotonic()
        return left_s > 0 and bool(select.select([self.process.stdout], [], [], left_s)[0])

    def _last_words(self) -> str:
        words = self.console.read_text(errors="replace")[-2000:] if self.console.exists() else ""
        return f"its console's last words:\n{words}"

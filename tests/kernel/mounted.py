"""A file system in a guest, on a device of nbd-client's, that is written while something happens to its server."""

import time

from tests.kernel.guest import Guest

DEVICE = "/dev/nbd0"
FILES_TIMEOUT_S = 180.0

# Writes files until it is told to stop, notes the checksum of each that fsync has returned for, and ends by itself
# with the first error.
WRITER = """
cd /mnt
number=0
while [ ! -e /tmp/stop ]; do
  number=$((number + 1))
  dd if=/dev/urandom of=file$number bs=3000 count=$((number % 50 * 7 + 1)) conv=fsync 2>/dev/null || exit 1
  md5sum file$number >/tmp/sum || exit 1
  cat /tmp/sum >>/tmp/fsynced
done
touch /tmp/stopped
"""


class MountedVolume:
    """An ext4 that is made on a volume and mounted, with a writer on it."""

    def __init__(self, guest: Guest, attach: str) -> None:
        """`attach` is what attaches it as DEVICE."""
        self._guest = guest
        self._attach = attach
        guest.run(
            f"{attach} && mkfs.ext4 -q {DEVICE} && mkdir -p /mnt && mount -t ext4 {DEVICE} /mnt && dmesg -c >/dev/null",
            FILES_TIMEOUT_S,
        )
        guest.run(f"sh -c '{WRITER}' </dev/null >/dev/null 2>&1 &")

    def fsynced(self) -> int:
        """How many files are."""
        return int(self._guest.run("cat /tmp/fsynced 2>/dev/null | wc -l"))

    def write(self, files: int) -> None:
        """Wait until so many more files are fsynced."""
        wanted = self.fsynced() + files
        deadline = time.monotonic() + FILES_TIMEOUT_S
        while self.fsynced() < wanted:
            assert time.monotonic() < deadline, self._guest.run("dmesg | tail -20")
            time.sleep(0.2)

    def must_have_noticed_nothing(self) -> None:
        """End the writer; there was no error, the file system is clean, and all that was fsynced is there when it is
        attached again."""
        guest = self._guest
        guest.run(
            "touch /tmp/stop; for i in $(seq 1000); do [ -e /tmp/stopped ] && break; sleep 0.1; done", FILES_TIMEOUT_S
        )
        guest.run("[ -e /tmp/stopped ]")
        messages = guest.run("dmesg")
        assert not [line for line in messages.splitlines() if "error" in line.lower() or "nbd0" in line], messages
        guest.run(f"umount /mnt && e2fsck -fn {DEVICE} && nbd-client -d {DEVICE}", FILES_TIMEOUT_S)
        guest.run(
            f"{self._attach} && mount -t ext4 {DEVICE} /mnt && cd /mnt && md5sum -c /tmp/fsynced", FILES_TIMEOUT_S
        )

"""A network of its own with several machines on it, on this machine: what real processes can be cut off from.

Theory: a process holds a network namespace with a bridge; each machine is another namespace on that bridge. Every frame
between two machines passes the bridge, where nftables drops what is to be lost: all from one machine to another, or a
share of all datagrams. A mount namespace keeps the machines' names from this host, so that all of it is gone when the
last process in it is. Where users may make namespaces nobody has to be root.

The hub, where the bridge is, is a machine too.
"""

import os
import subprocess
from collections.abc import Sequence

from tests.conftest import Processes

NETWORK = "10.77.0"
HUB = "hub"
HUB_ADDRESS = f"{NETWORK}.254"
HOLDER = "mount -t tmpfs tmpfs /run && echo ready && exec sleep infinity"
RULES = """
add table bridge site
flush table bridge site
table bridge site {
  set cut { type ipv4_addr . ipv4_addr; }
  chain lossy { }
  chain forward {
    type filter hook forward priority 0
    ip saddr . ip daddr @cut drop
    ip protocol udp jump lossy
  }
  chain input { type filter hook input priority 0; ip saddr . ip daddr @cut drop; }
  chain output { type filter hook output priority 0; ip saddr . ip daddr @cut drop; }
}
"""


class NoNamespacesError(Exception):
    """This machine does not let us make a network; the text says what it answered."""


class Site:
    """The network; it is there while `processes` are."""

    def __init__(self, processes: Processes) -> None:
        """NoNamespacesError if that is not allowed here."""
        as_user = os.geteuid() != 0
        unshare = ["unshare", "--net", "--mount", *(("--user", "--map-root-user") if as_user else ())]
        holder = processes.start(
            [*unshare, "sh", "-c", HOLDER], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )  # fmt: skip
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            raise NoNamespacesError(holder.stderr.read().decode())
        users = ["--user", "--preserve-credentials"] if as_user else []
        self.within = ["nsenter", f"--target={holder.pid}", "--net", "--mount", "--wd=.", *users, "--"]
        """Before a command: it runs at the hub."""
        self._addresses = {HUB: HUB_ADDRESS}
        self._run("ip link set lo up; ip link add site type bridge; ip link set site up")
        self._run(f"ip address add {HUB_ADDRESS}/24 dev site")
        self._rule(RULES)

    def add(self, name: str) -> str:
        """Plug a machine in; its address."""
        number = len(self._addresses)
        address = self._addresses[name] = f"{NETWORK}.{number}"
        self._run(
            f"ip netns add {name}; ip link add port{number} type veth peer name eth0 netns {name};"
            f" ip link set port{number} master site up; ip -n {name} link set lo up;"
            f" ip -n {name} address add {address}/24 dev eth0; ip -n {name} link set eth0 up"
        )
        return address

    def on(self, name: str) -> list[str]:
        """Before a command: it runs on that machine."""
        return [*self.within, "ip", "netns", "exec", name]

    def cut(self, sources: Sequence[str], targets: Sequence[str]) -> None:
        """From now on nothing that one of `sources` sends reaches one of `targets`."""
        ways = [f"{self._addresses[source]} . {self._addresses[target]}" for source in sources for target in targets]
        self._rule(f"add element bridge site cut {{ {', '.join(ways)} }}")

    def part(self, some: Sequence[str], others: Sequence[str]) -> None:
        """From now on neither side reaches the other."""
        self.cut(some, others)
        self.cut(others, some)

    def mend(self) -> None:
        """Everybody is reached again."""
        self._rule("flush set bridge site cut")

    def lose(self, per_cent: int) -> None:
        """So many of all datagrams between machines are lost."""
        self._rule("flush chain bridge site lossy")
        if per_cent:
            self._rule(f"add rule bridge site lossy numgen random mod 100 < {per_cent} drop")

    def _run(self, script: str) -> None:
        done = subprocess.run([*self.within, "sh", "-ec", script], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoNamespacesError(done.stderr)

    def _rule(self, text: str) -> None:
        subprocess.run([*self.within, "nft", "-f", "-"], input=text, text=True, check=True)

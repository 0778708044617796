"""How long clients wait while the server upgrades itself: `python -m tests.benchmark.handover`.

Each round runs `upgrade-in-place` under clients that each write one block after the other. Two figures come out, of all
rounds: what the server says (from the first client that stands still to the last that goes on), and the longest time
that a client waited for one reply. Nothing is asserted: the machine decides.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from protocol.nbd import Command
from tests.conftest import Processes
from tests.nbd_client import Client
from tests.serving import Server

from .processes import free_ports

BLOCK = bytes(4096)


def main() -> None:
    parser = argparse.ArgumentParser(description="the pause of an upgrade in place")
    parser.add_argument("--volumes", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4, help="spread over the volumes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--filled-mib", type=int, default=256, help="written to the first volume before")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder, Processes() as processes:
        print(json.dumps(measure(processes, Path(folder).absolute(), chosen), indent=2))


def measure(processes: Processes, folder: Path, chosen: argparse.Namespace) -> dict[str, object]:
    names = [f"disk{number}" for number in range(chosen.volumes)]
    server = Server(processes, folder / "data", free_ports(1), dict.fromkeys(names, "4G"))
    clients = [Client(("127.0.0.1", server.port), names[number % len(names)], 60.0) for number in range(chosen.clients)]
    for offset in range(0, chosen.filled_mib << 20, 1 << 20):
        clients[0].request(Command.WRITE, offset, data=bytes([offset >> 20 & 0xFF]) * (1 << 20))
    longest_s = [0.0] * len(clients)
    over = threading.Event()

    def write(number: int) -> None:
        client, offset = clients[number], 0
        while not over.is_set():
            asked_s = time.monotonic()
            assert not client.request(Command.WRITE, offset, data=BLOCK).error
            longest_s[number] = max(longest_s[number], time.monotonic() - asked_s)
            offset = (offset + 4096 * 7919) % (chosen.filled_mib << 20)
            time.sleep(0.001)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    told_s, seen_s = [], []
    try:
        for _ in range(chosen.rounds):
            longest_s[:] = [0.0] * len(clients)
            done = json.loads(server.command("upgrade-in-place", "--json"))
            assert (done["clients"], done["dropped"]) == (len(clients), 0)
            time.sleep(0.2)
            told_s.append(done["pause_s"])
            seen_s.append(round(max(longest_s), 3))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return {
        "command": "python -m tests.benchmark.handover " + subprocess.list2cmdline(sys.argv[1:]),
        "volumes": chosen.volumes,
        "clients": chosen.clients,
        "pause_s": {"of each round": told_s, "median": statistics.median(told_s)},
        "longest_wait_of_a_client_s": {"of each round": seen_s, "median": statistics.median(seen_s)},
    }


if __name__ == "__main__":
    main()

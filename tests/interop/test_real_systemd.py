"""systemd itself restarts the server, and a client stays connected.

A user instance of systemd runs in namespaces and a control group of its own, as root: nothing of the machine's own
systemd, if it has one, is touched. What a machine does not allow of this is a skip.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

SYSTEMD = Path("/lib/systemd/systemd")
TIMEOUT_S = 120
GROUP = f"nbdserver-test-{os.getpid()}"

UNIT = """
[Service]
Type=notify
KillMode=mixed
Environment=PYTHONPATH={path}
{store}
ExecStart={python} -m nbdserver serve --data {data} --listen 127.0.0.1:{port} --create disk0=64M
"""

# Begins in the control groups, then in the namespaces that the manager lives in. It only starts for a machine that
# was booted with systemd: one directory says so.
INSIDE = """
set -e
mount -t tmpfs none /run
mkdir -p /run/systemd/system "$XDG_RUNTIME_DIR" && chmod 700 "$XDG_RUNTIME_DIR"
{systemd} --user --unit=basic.target >/dev/null 2>&1 &
for attempt in $(seq 100); do systemctl --user show-environment >/dev/null 2>&1 && break; sleep 0.1; done
systemctl --user show-environment >/dev/null 2>&1 || exit 77
{python} -c "$SCRIPT" {port}
"""

SCRIPT = """
import json, subprocess, sys
from protocol.nbd import Command
from tests.nbd_client import Client

def systemctl(*words):
    command = ["systemctl", "--user", *words, "nbd.service"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

def shown(name):
    return systemctl("show", "--value", "-p", name).strip()

systemctl("start")
client = Client(("127.0.0.1", int(sys.argv[1])), "disk0", 30)
assert client.request(Command.WRITE, 0, data=b"kept" * 1024).error == 0
pids = [shown("MainPID")]
for _ in range(3):
    systemctl("restart")
    pids.append(shown("MainPID"))
    assert shown("NFileDescriptorStore") == "0", "the clients are still in the store"
    assert client.read(0, 4096) == b"kept" * 1024
systemctl("stop")
closed = False
try:
    client.read(0, 512)
except ConnectionError:
    closed = True
print(json.dumps({"pids": pids, "closed": closed, "state": shown("ActiveState"), "result": shown("Result")}))
"""


@pytest.fixture
def groups() -> Iterator[list[Path]]:
    """Control groups of our own, in each hierarchy that systemd may use."""
    top = Path("/sys/fs/cgroup")
    tops = [top] if (top / "cgroup.procs").exists() else [top / "systemd", top / "unified"]
    made = []
    for one in tops:
        try:
            (one / GROUP).mkdir()
        except OSError:
            continue
        made.append(one / GROUP)
    yield made
    for one in made:
        for folder, _, _ in os.walk(one, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:
                pass  # the machine's affair from here on: an empty group costs nothing


def test_a_client_stays_connected_when_systemd_restarts_the_service_and_is_closed_by_a_stop(
    groups: list[Path], tmp_path: Path, needs: Callable[[str, str], str], free_port: Callable[[], int]
) -> None:
    if os.geteuid() or not groups or not SYSTEMD.exists():
        pytest.skip("needs root, control groups that can be made, and systemd (apt-get install systemd)")
    port = free_port()
    shipped = (ROOT / "nbdserver" / "node" / "systemd" / "nbdserver.service").read_text()
    store = [line for line in shipped.splitlines() if "FDSTORE=" in line or line.startswith("FileDescriptorStoreMax=")]
    assert len(store) == 2
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    units = tmp_path / "home" / ".config" / "systemd" / "user"
    units.mkdir(parents=True)
    (units / "nbd.service").write_text(
        UNIT.format(path=search_path, store="\n".join(store), python=sys.executable, data=tmp_path / "data", port=port)
    )
    inside = INSIDE.format(systemd=SYSTEMD, python=sys.executable, port=port)
    enter = "".join(f"echo $$ > {group}/cgroup.procs\n" for group in groups)
    namespaces = [needs("unshare", "util-linux"), "--cgroup", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        ["bash", "-ec", enter + 'exec "$@"', "enter", *namespaces, "bash", "-c", inside],
        env={
            **{name: value for name, value in os.environ.items() if name != "DBUS_SESSION_BUS_ADDRESS"},
            "HOME": str(tmp_path / "home"),
            "XDG_RUNTIME_DIR": str(tmp_path / "run"),
            "PYTHONPATH": search_path,
            "SCRIPT": textwrap.dedent(SCRIPT),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"systemd does not start here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(set(told["pids"])) == 4
    assert (told["closed"], told["state"], told["result"]) == (True, "inactive", "success")

"""A node as its operator meets it: the real program, its commands, its HTTP API, its signals, its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from metadata.family_state import put_open_state, read_open_state
from metadata.leveldb import NO_THREADS, LevelStore
from nbdserver.cli.client import NodeClient
from nbdserver.cli.main import run as run_command
from nbdserver.node.directory import DataDirectory
from protocol.nbd import Command, CommandFlag
from tests.conftest import ROOT, Processes
from tests.nbd_client import Client, RefusedError
from tests.serving import PROGRAM, Server, descendants, eventually, is_alive, resident_bytes

EPERM, EROFS = 1, 30
PATIENCE_S = 60.0

StartServer = Callable[..., Server]


@pytest.fixture
def start_server(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> StartServer:
    def start(*arguments: str, settings: str = "", volumes: dict[str, str] | None = None) -> Server:
        file = tmp_path / "node.yaml"
        file.write_text("segment: 4M\n" + settings)
        wanted = {"disk0": "64M"} if volumes is None else volumes
        return Server(processes, tmp_path / "data", free_port(), wanted, ["--config", str(file), *arguments])

    return start


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search_path}, capture_output=True, text=True, timeout=60, check=False
    )


def ask(server: Server, path: str, **query: Any) -> Any:
    """What the node's API answers, asked in this process: a command costs half a second."""
    return NodeClient(server.data).get(path, **query)


def show(server: Server, name: str = "disk0") -> Any:
    return ask(server, f"/v1/volumes/{name}")


def attach(server: Server, name: str = "disk0") -> Client:
    return Client(("127.0.0.1", server.port), name)


def write(client: Client, offset: int, data: bytes) -> int:
    return client.request(Command.WRITE, offset, data=data).error


def data_process(server: Server) -> int:
    return int(ask(server, "/v1/status")["workers"][0]["pid"])


# --- starting and stopping ------------------------------------------------------------------------------------------


def test_a_volume_is_attached_and_its_data_is_there_after_a_restart(
    start_server: StartServer, needs: Callable[[str, str], str]
) -> None:
    server = start_server()
    assert f"ready: nbd://127.0.0.1:{server.port}/\n" in server.printed
    size = subprocess.run(
        [needs("nbdinfo", "libnbd-bin"), "--size", server.uri("disk0")], capture_output=True, text=True, check=True
    )
    assert int(size.stdout) == 64 << 20
    client = attach(server)
    assert write(client, 4096, b"kept" * 1024) == 0
    client.close()
    assert server.stop() == 0
    server.start()
    assert attach(server).read(4096, 4096) == b"kept" * 1024
    assert show(server, "disk0")["epoch"] == 2


def test_with_json_it_says_that_it_is_ready_in_one_object(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [*PROGRAM, "serve", "--json", "--data", str(tmp_path / "data"), "--listen", address]
    process = processes.start(command, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    assert told == {"ready": f"nbd://{address}/", "listen": [address], "data": str(tmp_path / "data")}


def test_it_prints_how_to_attach(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("--socket", str(tmp_path / "nbd.sock"))
    for command in ("nbd-client 127.0.0.1", "nbd-client -unix", "nbdinfo nbd://", "qemu-img info", "qemu-io -f raw"):
        assert command in server.printed


def test_a_volume_that_is_wanted_at_the_start_and_there_keeps_its_size(start_server: StartServer) -> None:
    server = start_server()
    server.command("volume", "resize", "disk0", "--size", "128M")
    assert server.stop() == 0
    server.start()  # with --create disk0=64M
    assert show(server)["size_bytes"] == 128 << 20


def test_a_taken_port_is_one_line_that_names_the_holder_and_another_port(
    start_server: StartServer, free_port: Callable[[], int], tmp_path: Path
) -> None:
    with socket.socket() as holder:
        port = free_port()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
        holder.listen()
        result = run("serve", "--data", tmp_path / "other", "--listen", f"127.0.0.1:{port}")
    assert result.returncode == 2
    program = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
    assert result.stderr == (
        f"nbdserver: port {port} is taken by {program} (pid {os.getpid()}); "
        f"choose another, for example --listen 127.0.0.1:{port + 1}\n"
    )
    server = start_server()
    result = run("serve", "--data", tmp_path / "other", "--listen", f"127.0.0.1:{server.port}")
    assert server.process is not None
    holders = {f"nbdserver (pid {server.process.pid})", f"nbdserver-data (pid {data_process(server)})"}
    assert any(f"port {server.port} is taken by {holder}; " in result.stderr for holder in holders)


def test_a_second_node_on_the_same_data_is_refused_and_told_who_has_it(
    start_server: StartServer, free_port: Callable[[], int]
) -> None:
    server = start_server()
    assert server.process is not None
    result = run("serve", "--data", server.data, "--listen", f"127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert f"is in use by process {server.process.pid}:" in result.stderr
    assert result.stderr.count("\n") == 1
    assert attach(server).read(0, 4096) == bytes(4096)


def test_kill_9_of_the_program_ends_its_data_process_and_the_next_one_starts(start_server: StartServer) -> None:
    server = start_server()
    client = attach(server)
    assert write(client, 0, b"x" * 4096) == 0
    server.kill9()  # waits until the data process is gone too
    server.start()
    assert attach(server).read(0, 4096) == b"x" * 4096


def test_kill_9_of_the_data_process_is_survived(start_server: StartServer) -> None:
    server = start_server()
    assert write(attach(server), 0, b"x" * 4096) == 0
    os.kill(data_process(server), signal.SIGKILL)

    def serves() -> bool:
        try:
            return attach(server).read(0, 4096) == b"x" * 4096
        except (OSError, AssertionError, RefusedError):
            return False

    eventually(serves, "the volume is served again", PATIENCE_S)
    kinds = [event["kind"] for event in ask(server, "/v1/events")]
    assert "data-process-ended" in kinds
    assert show(server, "disk0")["epoch"] == 2


def test_a_data_process_that_keeps_dying_ends_the_node(start_server: StartServer) -> None:
    server = start_server()
    assert server.process is not None
    deadline_s = time.monotonic() + PATIENCE_S
    while server.process.poll() is None:
        assert time.monotonic() < deadline_s
        for child in descendants(server.process.pid):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert server.process.returncode == 1
    assert server.process.stdout is not None
    assert b"the data process ended 5 times within 60 s; giving up\n" in server.process.stdout.read()


def test_the_data_process_ignores_ctrl_c_and_the_program_stops_cleanly(start_server: StartServer) -> None:
    server = start_server()
    assert server.process is not None
    child = data_process(server)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGTERM)
    assert attach(server).read(0, 512) == bytes(512)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE_S) == 0
    assert not is_alive(child)


@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
def test_sigterm_is_obeyed_after_the_replies_to_what_was_asked(start_server: StartServer, flags: int) -> None:
    server = start_server()
    client = attach(server)
    cookies = [client.send(Command.WRITE, 4096 * at, data=bytes([at + 1]) * 4096, flags=flags) for at in range(16)]
    cookies.append(client.send(Command.FLUSH))
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    replies = [client.receive() for _ in cookies]
    assert sorted(reply.cookie for reply in replies) == cookies
    assert not any(reply.error for reply in replies)
    with pytest.raises(ConnectionError):
        client.receive()
    assert server.process.wait(PATIENCE_S) == 0
    server.start()
    assert attach(server).read(0, 65536) == b"".join(bytes([at + 1]) * 4096 for at in range(16))


def test_a_client_that_is_slow_gets_all_its_replies_before_a_stop_ends(start_server: StartServer) -> None:
    server = start_server()
    client = attach(server)
    cookies = client.send_reads(24, 1 << 20)
    eventually(partial(replies_wait, server), "replies wait", PATIENCE_S)
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # everything else is closed by then
    replies = [client.receive() for _ in cookies]
    assert [(reply.error, len(reply.data)) for reply in replies] == [(0, 1 << 20)] * len(cookies)
    assert server.process.wait(PATIENCE_S) == 0


def replies_wait(server: Server) -> bool:
    return any(client["unsent_bytes"] for client in ask(server, "/v1/clients"))


def test_a_client_that_takes_no_replies_holds_up_a_stop_for_a_bounded_time_and_a_second_sigterm_not_at_all(
    start_server: StartServer,
) -> None:
    for signals in (1, 2):
        server = start_server()
        client = attach(server)
        client.send_reads(24, 1 << 20)
        eventually(partial(replies_wait, server), "replies wait", PATIENCE_S)
        assert server.process is not None
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.7)
        server.process.wait(PATIENCE_S)
        client.close()


def test_systemd_is_told_when_clients_can_attach(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(path))
        notified.settimeout(PATIENCE_S)
        port = free_port()
        command = [*PROGRAM, "serve", "--data", str(tmp_path / "data"), "--listen", f"127.0.0.1:{port}"]
        process = processes.start(
            command, env={"PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(path)}, stdout=subprocess.DEVNULL
        )
        assert notified.recv(100) == b"READY=1"
        socket.create_connection(("127.0.0.1", port)).close()
        process.send_signal(signal.SIGTERM)
        assert notified.recv(100) == b"STOPPING=1"


def test_ipv6_and_a_unix_socket_are_served_and_a_stale_socket_is_replaced(
    start_server: StartServer, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port, path = free_port(), tmp_path / "nbd.sock"
    server = start_server("--listen", f"[::1]:{port}", "--socket", str(path))
    assert Client(("::1", port), "disk0").size_bytes == 64 << 20
    server.kill9()
    assert path.exists()
    server.start()
    assert Client(str(path), "disk0").size_bytes == 64 << 20
    assert server.stop() == 0
    assert not path.exists()


def test_a_settings_file_is_reloaded_and_a_wrong_one_changes_nothing(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    first, second, settings = free_port(), free_port(), tmp_path / "node.yaml"
    settings.write_text(f"listen: 127.0.0.1:{first}\n")
    command = [*PROGRAM, "serve", "--data", str(tmp_path / "data"), "--config", str(settings), "--create", "disk0=4M"]
    process = processes.start(command, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, b"")
    assert any(line.startswith(b"ready: ") for line in lines)
    staying = Client(("127.0.0.1", first), "disk0")
    settings.write_text(f"listen: 127.0.0.1:{second}\nsegmnt: 4M\n")
    process.send_signal(signal.SIGHUP)
    assert b"settings not reloaded, the old ones stay: " in next(lines)
    settings.write_text(f"listen: 127.0.0.1:{second}\ncache: 64M\n")
    process.send_signal(signal.SIGHUP)
    assert next(lines) == b"settings reloaded; a restart is needed for: cache\n"
    assert Client(("127.0.0.1", second), "disk0").size_bytes == 4 << 20
    with pytest.raises(ConnectionRefusedError):
        Client(("127.0.0.1", first), "disk0")
    assert staying.read(0, 512) == bytes(512)


def test_what_a_crash_left_of_a_volume_in_the_making_is_removed(start_server: StartServer) -> None:
    server = start_server()
    assert server.stop() == 0
    scrap = "ab" * 16
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from metadata.families import Families\n"
        "from nbdserver.node.local_registry import open_registry\n"
        "from nbdserver.node.directory import DataDirectory\n"
        "registry = open_registry(DataDirectory(Path(sys.argv[1])))\n"
        "asyncio.run(Families(registry, 'local').begin(sys.argv[2]))\n"
        "registry.close()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(server.data), scrap], cwd=ROOT, check=True)
    (server.data / "families" / scrap / "segments").mkdir(parents=True)
    server.start()
    assert not (server.data / "families" / scrap).exists()
    assert attach(server).size_bytes == 64 << 20


def test_a_damaged_volume_is_reported_and_the_others_are_served(start_server: StartServer) -> None:
    server = start_server(volumes={"disk0": "64M", "disk1": "64M"})
    family = show(server, "disk0")["family"]
    assert server.stop() == 0
    (server.data / "families" / family / "maps" / "CURRENT").write_bytes(b"")
    server.start()
    volumes = {volume["name"]: volume for volume in ask(server, "/v1/status")["volumes"]}
    assert volumes["disk0"]["state"] == "failed"
    assert volumes["disk0"]["reason"]
    assert volumes["disk1"]["state"] == "serving"
    assert attach(server, "disk1").size_bytes == 64 << 20
    with pytest.raises((RefusedError, ConnectionError, AssertionError)):
        attach(server, "disk0")
    server.command("volume", "delete", "disk0")
    assert not (server.data / "families" / family).exists()


def test_a_reboot_while_a_volume_was_open_raises_its_generation(start_server: StartServer) -> None:
    server = start_server()
    assert write(attach(server), 0, b"x" * 4096) == 0
    assert show(server)["generation"] == 1
    server.kill9()
    server.start()
    assert show(server)["generation"] == 1  # kill -9 loses nothing acknowledged
    family = show(server)["family"]
    server.kill9()
    pretend_another_boot(server.data, family)
    server.start()
    assert show(server)["generation"] == 2
    raised = [event for event in ask(server, "/v1/events") if event["kind"] == "generation-raised"]
    assert [(event["volume"], event["generation"]) for event in raised] == [("disk0", 2)]
    assert server.stop() == 0
    server.start()
    assert show(server)["generation"] == 2


def pretend_another_boot(data: Path, family: str) -> None:
    """Write into a volume's state that it was opened under another boot id."""
    directory = DataDirectory(data)
    directory.open()  # waits until the killed node's data process has let go
    store = LevelStore(str(directory.family(family) / "maps"), NO_THREADS, NO_THREADS)
    batch = store.batch()
    put_open_state(batch, replace(read_open_state(store), boot_id="11111111-2222-3333-4444-555555555555"))
    store.write(batch)
    store.close()
    directory.release()


def test_checksums_in_pure_python_are_warned_about_at_start_and_in_status(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    without = "import sys\nsys.modules['google_crc32c'] = sys.modules['crcmod._crcfunext'] = None\n"
    (site / "sitecustomize.py").write_text(without)
    monkeypatch.setenv("PYTHONPATH", str(site))
    server = start_server()
    warning = "checksums are computed by crcmod (pure Python)"
    assert f"WARNING: {warning}" in server.printed
    assert warning in ask(server, "/v1/status")["warnings"][0]
    assert f"WARNING: {warning}" in server.command("status")


# --- volumes and clients --------------------------------------------------------------------------------------------


def test_volumes_are_made_listed_and_deleted_while_others_are_served(start_server: StartServer) -> None:
    server = start_server()
    client = attach(server)
    server.command("volume", "create", "disk1", "--size", "1T")
    listed = json.loads(server.command("volume", "list", "--json"))
    assert [volume["name"] for volume in listed] == ["disk0", "disk1"]
    assert attach(server, "disk1").size_bytes == 1 << 40
    family = show(server, "disk1")["family"]
    assert (server.data / "families" / family).is_dir()
    eventually(lambda: show(server, "disk1")["clients"] == 0, "the client is gone", PATIENCE_S)
    server.command("volume", "delete", "disk1")
    assert not (server.data / "families" / family).exists()
    with pytest.raises((RefusedError, ConnectionError)):
        attach(server, "disk1")
    assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["volume", "create", "disk0", "--size", "1G"],
            "volume disk0 exists already, with size 64M; choose another name",
        ),
        (["volume", "create", "-", "--size", "1G"], "'-' cannot be a volume's name"),
        (["volume", "create", "a/b", "--size", "1G"], "'a/b' cannot be a volume's name"),
        (["volume", "show", "nosuch"], "there is no volume 'nosuch'; this node has: disk0"),
        (["volume", "delete", "no/such"], "there is no volume 'no/such'; this node has: disk0"),
        (["volume", "set", "disk0", "colour=red"], "'colour' is not a setting of a volume; known are read-only"),
        (["volume", "set", "disk0", "read-only=maybe"], "read-only=maybe is not true or false; write read-only=true"),
        (["volume", "set", "disk0", "allowed-clients=10.1.1.1/8"], "write for example 10.0.0.0/8"),
        (["volume", "set", "disk0", "tls=required"], "this node has no certificate"),
        (["volume", "set", "disk0", "read-only=true", "shared=2"], "shared=2 is not true or false"),
        (["client", "disconnect", "99"], "there is no client 99; `nbdserver client list` shows them"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_requests_are_refused_in_one_line_and_change_nothing(
    shared_server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = ask(shared_server, "/v1/volumes")
    assert run_command(["--data", str(shared_server.data), *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert message in printed.err
    assert ask(shared_server, "/v1/volumes") == before


@pytest.fixture(scope="module")
def shared_server(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Server:
    return Server(module_processes, tmp_path_factory.mktemp("node") / "data", free_port(), {"disk0": "64M"})


def test_a_volume_made_read_only_refuses_the_next_write_and_stays_so(start_server: StartServer) -> None:
    server = start_server()
    client = attach(server)
    assert write(client, 0, b"x" * 512) == 0
    server.command("volume", "set", "disk0", "read-only=true", "description=frozen for the audit")
    assert write(client, 0, b"y" * 512) in (EPERM, EROFS)
    assert client.read(0, 512) == b"x" * 512
    server.kill9()
    server.start()
    assert show(server, "disk0")["settings"]["description"] == "frozen for the audit"
    assert write(attach(server), 0, b"y" * 512) in (EPERM, EROFS)
    server.command("volume", "set", "disk0", "read-only=false")
    assert write(attach(server), 0, b"y" * 512) == 0


def test_clients_that_are_no_longer_allowed_are_disconnected_and_kept_out(start_server: StartServer) -> None:
    server = start_server()
    client = attach(server)
    server.command("volume", "set", "disk0", "allowed-clients=192.0.2.0/24,2001:db8::/32")
    with pytest.raises((OSError, AssertionError)):
        client.read(0, 512)
    with pytest.raises((RefusedError, ConnectionError)):
        attach(server)
    server.command("volume", "set", "disk0", "allowed-clients=")
    assert attach(server).read(0, 512) == bytes(512)


def test_a_volume_with_clients_is_deleted_only_by_force(start_server: StartServer) -> None:
    server = start_server()
    client = attach(server)
    refused = run("--data", server.data, "volume", "delete", "disk0")
    assert refused.returncode == 2
    assert "volume disk0 has 1 client connection; detach first, or add --force" in refused.stderr
    assert client.read(0, 512) == bytes(512)
    server.command("volume", "delete", "disk0", "--force")
    with pytest.raises((OSError, AssertionError)):
        client.read(0, 512)
    assert ask(server, "/v1/volumes") == []
    assert list((server.data / "families").iterdir()) == []


def test_clients_are_listed_and_disconnected(start_server: StartServer) -> None:
    server = start_server()
    client = attach(server)
    client.read(0, 512)
    (shown,) = ask(server, "/v1/clients")
    assert (shown["volume"], shown["peer"].rpartition(":")[0]) == ("disk0", "127.0.0.1")
    server.command("client", "disconnect", str(shown["id"]))
    with pytest.raises((OSError, AssertionError)):
        client.read(0, 512)
    assert ask(server, "/v1/clients") == []


def test_events_are_kept_over_a_restart_and_followed(start_server: StartServer, processes: Processes) -> None:
    server = start_server()
    server.command("volume", "create", "disk1", "--size", "4M")
    assert server.stop() == 0
    server.start()
    events = [json.loads(line) for line in server.command("events", "--json").splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds.count("node-started") == 2
    assert "node-stopped" in kinds
    assert [event["volume"] for event in events if event["kind"] == "volume-created"] == ["disk0", "disk1"]
    sequences = [event["sequence"] for event in events]
    assert sequences == sorted(set(sequences))
    following = processes.start(
        [*PROGRAM, "--data", str(server.data), "events", "--follow", "--limit", "1", "--json"],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert following.stdout is not None
    following.stdout.readline()
    server.command("volume", "delete", "disk1")
    followed = next(event for event in map(json.loads, following.stdout) if event["kind"] == "volume-deleted")
    assert followed["volume"] == "disk1"


# --- HTTP -----------------------------------------------------------------------------------------------------------


def http(method: str, url: str, token: str = "", body: Any = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_and_health_are_open_on_loopback_and_the_rest_needs_the_token(
    start_server: StartServer, free_port: Callable[[], int]
) -> None:
    base = f"http://127.0.0.1:{free_port()}"
    server = start_server(settings=f"http: {{listen: '{base.removeprefix('http://')}'}}\n")
    client = attach(server)
    for block in range(8):
        assert write(client, block * 4096, b"m" * 4096) == 0
    assert http("GET", f"{base}/healthz") == (200, "ok\n")
    status, text = http("GET", f"{base}/metrics")
    assert status == 200
    assert "nbdserver_up 1.0" in text
    assert 'nbdserver_writes_total{volume="disk0"} 8.0' in text
    assert 'nbdserver_clients{volume="disk0"} 1.0' in text
    assert 'nbdserver_latency_us_bucket{le="+Inf",volume="disk0"}' in text
    documented = (ROOT / "docs" / "operations.md").read_text()
    for name in re.findall(
        r"`(nbdserver_(?!tls_|cluster_|replicas_|resync_)[a-z_]+)`", documented
    ):  # this one has neither TLS nor a cluster
        assert re.search(rf"^{name}(_bucket)?[ {{]", text, re.MULTILINE), name
    assert http("GET", f"{base}/v1/status")[0] == 401
    assert http("POST", f"{base}/v1/volumes", body={"name": "x", "size_bytes": 4096})[0] == 401
    assert http("DELETE", f"{base}/v1/volumes/disk0?force=true", "wrong")[0] == 401
    token_file = server.data / "api.token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_text().strip()
    assert http("GET", f"{base}/v1/status", token)[0] == 200
    assert http("POST", f"{base}/v1/volumes", token, {"name": "x", "size_bytes": 4096})[0] == 201
    assert http("POST", f"{base}/v1/volumes", token, {"name": "y", "size": 4096})[0] == 400
    assert http("GET", f"{base}/docs", token)[0] == 404


def test_public_read_opens_reading_only(start_server: StartServer, free_port: Callable[[], int]) -> None:
    base = f"http://127.0.0.1:{free_port()}"
    start_server(settings=f"http: {{listen: '{base.removeprefix('http://')}', public_read: true}}\n")
    assert http("GET", f"{base}/v1/volumes")[0] == 200
    assert "paths" in json.loads(http("GET", f"{base}/openapi.json")[1])
    assert http("PATCH", f"{base}/v1/volumes/disk0", body={"read-only": "true"})[0] == 401


def test_only_its_user_may_open_the_api_socket(start_server: StartServer) -> None:
    server = start_server()
    assert (server.data / "api.sock").stat().st_mode & 0o777 == 0o600


def test_the_data_process_stays_small(start_server: StartServer) -> None:
    server = start_server()
    (child,) = descendants(server.process.pid if server.process else 0)
    assert resident_bytes(child) < 80 << 20


def test_clients_that_come_and_go_cost_no_memory(start_server: StartServer) -> None:
    server = start_server()
    (child,) = descendants(server.process.pid if server.process else 0)

    def resident_bytes_after(connections: int) -> int:
        for _ in range(connections):
            Client(("127.0.0.1", server.port), "disk0").close()
        eventually(lambda: ask(server, "/v1/clients") == [], "all clients are gone", PATIENCE_S)
        return resident_bytes(child)

    settled_bytes = resident_bytes_after(600)
    assert resident_bytes_after(600) - settled_bytes < 1 << 20


def test_a_limited_volume_is_served_at_its_rate_and_no_other_one_waits(start_server: StartServer) -> None:
    server = start_server()
    server.command("volume", "create", "slow", "--size", "64M")
    server.command("volume", "set", "slow", "iops=100", "iops-burst=10")

    def ask_for(client: Client, requests: int) -> None:
        for _ in range(requests):
            client.send(Command.READ, 0, 4096)

    def take(client: Client, replies: int) -> None:
        assert [client.receive().error for _ in range(replies)] == [0] * replies

    slow, other = attach(server, "slow"), attach(server)
    started_s = time.monotonic()
    ask_for(slow, 110)
    take(slow, 110)
    assert time.monotonic() - started_s >= 0.9
    assert show(server, "slow")["settings"]["iops"] == 100
    server.command("volume", "set", "slow", "iops=1", "iops-burst=10")
    ask_for(slow, 60)  # the rest of a minute
    ask_for(other, 110)
    take(other, 110)
    taken = {client["volume"]: client["requests"] for client in ask(server, "/v1/clients")}
    assert (taken["slow"] < 110 + 60, taken["disk0"]) == (True, 110)
    server.command("volume", "set", "slow", "iops=none")
    take(slow, 60)

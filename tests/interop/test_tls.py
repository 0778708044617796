"""TLS as users have it: certificates, a node, and other people's clients: libnbd's tools, QEMU's tools, nbd-client."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdserver.cli.client import NodeClient
from nbdserver.cli.main import run as run_command
from protocol import nbd
from protocol.nbd import Command, Option
from tests.certificates import make_certificates
from tests.conftest import ROOT, Processes
from tests.nbd_client import Client, RefusedError
from tests.recipes import recipe
from tests.serving import Server

TIMEOUT_S = 60
PATIENCE_S = 15.0
IMAGE_BYTES = 24 << 20

Needs = Callable[[str, str], str]


class Node:
    """A node with TLS that serves `open` (as the node says: allowed) and `closed` (TLS required)."""

    def __init__(self, processes: Processes, directory: Path, port: int) -> None:
        self.certificates = make_certificates(directory)
        self.file = directory / "node.yaml"
        self.write_settings()
        self.socket = directory / "nbd.sock"
        self.server = Server(
            processes, directory / "data", port, {"open": "64M", "closed": "64M"},
            ["--config", str(self.file), "--socket", str(self.socket)],
        )  # fmt: skip
        self.set("closed", tls="required")

    def write_settings(self, mode: str = "allowed", **changes: Path) -> None:
        files = {**self.certificates.settings, **changes}
        lines = [f"  {key}: {path}" for key, path in files.items()]
        self.file.write_text("\n".join(["segment: 4M", "tls:", f"  mode: {mode}", *lines, ""]))

    def reload(self) -> dict[str, Any]:
        """SIGHUP; the event that says how it went."""
        api = NodeClient(self.server.data)
        last = api.get("/v1/events", limit=1)[-1]["sequence"]
        assert self.server.process is not None
        os.kill(self.server.process.pid, signal.SIGHUP)
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            for event in api.get("/v1/events", after=last, wait_s=1):
                if event["kind"] in ("settings-reloaded", "settings-not-reloaded"):
                    return dict(event)
        raise AssertionError("no reload")

    def set(self, name: str, **settings: str) -> None:
        NodeClient(self.server.data).patch(f"/v1/volumes/{name}", {k.replace("_", "-"): v for k, v in settings.items()})

    def ask(self, path: str) -> Any:
        return NodeClient(self.server.data).get(path)

    def uri(self, name: str, client: str = "web1") -> str:
        where = f"?tls-certificates={self.certificates.client(client)}" if client else ""
        return f"nbds://localhost:{self.server.port}/{name}{where}"

    def qemu(self, name: str, client: str = "web1") -> list[str]:
        """Arguments for qemu-img and qemu-io."""
        directory = self.certificates.client(client)
        return [
            "--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={directory}", "--image-opts",
            f"driver=nbd,host=localhost,port={self.server.port},export={name},tls-creds=tls0",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def node(module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Node:
    return Node(module_processes, tmp_path_factory.mktemp("tls"), free_port())


def run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    # nbdsh is a script of the system's Python, not of the one that runs the tests.
    environment = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}", "PYTHONPATH": ""}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
    )


def succeed(*command: str | Path) -> str:
    done = run(*command)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_libnbd_copies_an_image_in_and_out_over_tls(node: Node, needs: Needs, tmp_path: Path) -> None:
    nbdcopy, nbdinfo = needs("nbdcopy", "libnbd-bin"), needs("nbdinfo", "libnbd-bin")
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(random.Random(5).randbytes(IMAGE_BYTES) + bytes((64 << 20) - IMAGE_BYTES))
    succeed(nbdcopy, image, node.uri("closed"))
    succeed(nbdcopy, node.uri("closed", "web2"), copy)
    assert copy.read_bytes() == image.read_bytes()
    told = json.loads(succeed(nbdinfo, "--json", node.uri("closed")))
    assert told["TLS"] is True


def test_libnbd_sees_more_over_tls_than_without(node: Node, needs: Needs) -> None:
    nbdsh, uri = needs("nbdsh", "libnbd-bin"), node.uri("closed")
    script = f"""
names = []
h.set_opt_mode(True)
h.set_tls(nbd.TLS_ALLOW); h.set_tls_certificates({uri.partition("=")[2]!r})
h.connect_tcp("localhost", "{node.server.port}")
assert h.get_tls_negotiated()
h.opt_list(lambda name, description: names.append(name))
assert names == ["closed", "open"], names
h.set_export_name("closed"); h.opt_go()
h.pwrite(b"secret" * 100, 0); assert h.pread(600, 0) == b"secret" * 100
h.flush(); h.shutdown()
"""
    succeed(nbdsh, "-c", script)


def test_qemu_writes_and_reads_over_tls(node: Node, needs: Needs) -> None:
    info = json.loads(succeed(needs("qemu-img", "qemu-utils"), "info", "--output=json", *node.qemu("closed")))
    assert info["virtual-size"] == 64 << 20
    printed = succeed(
        needs("qemu-io", "qemu-utils"), *node.qemu("closed"),
        "-c", "write -P 9 1M 8M", "-c", "flush", "-c", "discard 2M 1M",
        "-c", "read -P 9 3M 6M", "-c", "read -P 0 2M 1M",
    )  # fmt: skip
    assert "verification failed" not in printed


def test_nbd_client_lists_over_tls(node: Node, needs: Needs) -> None:
    nbd_client = needs("nbd-client", "nbd-client")
    directory = node.certificates.client("web1")
    printed = succeed(
        nbd_client, "-l", "127.0.0.1", str(node.server.port), "-certfile", directory / "client-cert.pem",
        "-keyfile", directory / "client-key.pem", "-cacertfile", directory / "ca-cert.pem", "-tlshostname", "localhost",
    )  # fmt: skip
    assert {"open", "closed"} <= set(printed.split())


@pytest.mark.parametrize("client", ["stranger", "expired", ""])
def test_clients_with_wrong_certificates_are_refused(node: Node, needs: Needs, client: str, tmp_path: Path) -> None:
    failures = failed_handshakes(node)
    assert run(needs("nbdinfo", "libnbd-bin"), node.uri("closed", client)).returncode != 0
    if client:
        assert run(needs("qemu-img", "qemu-utils"), "info", *node.qemu("closed", client)).returncode != 0
    else:
        with pytest.raises(OSError):
            Client(("127.0.0.1", node.server.port), "closed", tls=node.certificates.client_context())
    assert failed_handshakes(node) > failures or client == "stranger"  # a stranger does not trust us either


def failed_handshakes(node: Node) -> int:
    return int(node.ask("/v1/status") and _metric(node, "nbdserver_tls_failures_total"))


def _metric(node: Node, name: str) -> float:
    with node.server.api(timeout_s=5) as api:
        text = api.get("/metrics").text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_a_node_certificate_for_another_name_is_refused_by_the_client(node: Node, needs: Needs) -> None:
    uri = node.uri("closed").replace("localhost", "127.0.0.2")
    assert run(needs("nbdinfo", "libnbd-bin"), uri).returncode != 0


def test_in_clear_text_only_what_does_not_require_tls_is_there(node: Node, needs: Needs) -> None:
    plain = f"nbd://localhost:{node.server.port}/"
    listed = json.loads(succeed(needs("nbdinfo", "libnbd-bin"), "--json", "--list", plain))
    assert [export["export-name"] for export in listed["exports"]] == ["open"]
    with pytest.raises(RefusedError, match="closed is used over TLS only"):
        Client(("127.0.0.1", node.server.port), "closed")
    Client(str(node.socket), "closed").close()  # a unix socket is guarded by its file


def test_clear_text_behind_starttls_gets_no_answer(node: Node) -> None:
    def option(kind: int, data: bytes = b"") -> bytes:
        header: bytes = nbd.OptionHeader.build({"option": kind, "length": len(data)})
        return header + data

    go = option(Option.GO, nbd.InfoRequest.build({"name": b"open", "wanted": []}))
    with socket.create_connection(("127.0.0.1", node.server.port), 10) as attacker:
        attacker.sendall(bytes([0, 0, 0, 3]) + option(Option.STARTTLS) + go)
        received = b""
        while piece := attacker.recv(4096):
            received += piece
    assert len(received) == 18, "more than the greeting"


def test_a_volume_is_for_the_certificates_that_it_names_and_who_is_there_is_shown(node: Node) -> None:
    address = ("127.0.0.1", node.server.port)
    plain = Client(address, "open")
    web1, web2 = (Client(address, "open", tls=node.certificates.client_context(name)) for name in ("web1", "web2"))
    shown = {client["certificate"]: client for client in node.ask("/v1/clients") if client["volume"] == "open"}
    assert shown["web1"]["tls"].startswith("TLSv1.3 TLS_")
    assert shown[""]["tls"] == ""
    assert {"web1", "web2", ""} == set(shown)
    node.set("open", allowed_clients="cert:web1")
    for gone in (plain, web2):
        with pytest.raises(OSError):
            gone.read(0, 4096)
    assert web1.read(0, 4096) is not None
    with pytest.raises(RefusedError, match="no export"):
        Client(address, "open", tls=node.certificates.client_context("web2"))
    with pytest.raises(RefusedError, match="TLS only"):
        Client(address, "open")
    node.set("open", allowed_clients="all")
    web1.close()


def test_sighup_takes_new_certificates_for_new_connections_and_keeps_the_old_if_they_are_broken(node: Node) -> None:
    address = ("127.0.0.1", node.server.port)
    stranger = node.certificates.stranger
    attached = Client(address, "closed", tls=node.certificates.client_context("web1"))
    broken = stranger.directory / "broken.pem"
    broken.write_text("nothing")
    node.write_settings(certificate=broken)
    assert "broken.pem" in node.reload()["reason"]
    Client(address, "closed", tls=node.certificates.client_context("web1")).close()
    node.write_settings(client_ca=stranger.ca_certificate)
    assert node.reload()["needs_restart"] == []
    assert attached.read(0, 4096) is not None
    with pytest.raises(OSError):
        Client(address, "closed", tls=node.certificates.client_context("web1"))
    Client(address, "closed", tls=node.certificates.client_context("stranger")).close()
    plain = Client(address, "open")
    node.write_settings("required")
    assert node.reload()["needs_restart"] == []
    with pytest.raises(OSError):
        plain.read(0, 4096)
    node.write_settings()
    node.reload()
    assert attached.request(Command.WRITE, 0, data=b"x" * 512).error == 0
    attached.close()


def test_status_shows_when_the_certificate_expires_and_warns_before(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    status = node.ask("/v1/status")
    assert status["tls"]["names"] == ["localhost", "127.0.0.1"]
    assert status["tls"]["mode"] == "allowed"
    assert any("server-cert.pem expires on" in warning for warning in status["warnings"]), "it is valid for a day"
    assert _metric(node, "nbdserver_tls_certificate_expires_seconds") > time.time()
    assert run_command(["status", "--data", str(node.server.data)]) == 0
    assert "tls allowed, certificate expires on" in capsys.readouterr().out


def test_clients_over_tls_attach_again_after_an_upgrade_in_place(node: Node) -> None:
    address, context = ("127.0.0.1", node.server.port), node.certificates.client_context("web1")
    attached = Client(address, "closed", tls=context)
    plain = Client(address, "open")
    done = json.loads(node.server.command("upgrade-in-place", "--json"))
    assert (done["clients"], done["dropped"]) == (1, 1)
    with pytest.raises(OSError):
        attached.read(0, 4096)
    assert len(plain.read(0, 4096)) == 4096
    with pytest.raises(RefusedError, match="TLS only"):
        Client(address, "closed")
    Client(address, "closed", tls=context).close()


def test_tls_is_not_promised_by_a_node_that_has_no_certificate(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(processes, tmp_path / "data", free_port(), {"disk0": "64M"})
    for setting in ("tls=required", "allowed-clients=cert:web1"):
        assert run_command(["volume", "set", "disk0", setting, "--data", str(server.data)]) == 2
        assert "this node has no certificate: set tls.certificate" in capsys.readouterr().err


def test_what_the_operations_page_says_to_type_about_tls_works(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], needs: Needs
) -> None:
    for program, package in (("nbdinfo", "libnbd-bin"), ("qemu-img", "qemu-utils")):
        needs(program, package)
    pki, file, port = tmp_path / "pki", tmp_path / "node.yaml", free_port()
    programs = tmp_path / "bin"
    programs.mkdir()
    wrapper = programs / "nbdserver"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m nbdserver "$@"\n')
    wrapper.chmod(0o755)

    def type_in(mark: str) -> str:
        script = recipe(mark).replace("10809", str(port))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "NBDSERVER_TLS": str(pki),
                 "CERTS": str(pki / "clients/web1"), "NBDSERVER_DATA": str(tmp_path / "data")},
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    type_in("tls-certificates")
    file.write_text(recipe("tls-settings").replace("/etc/nbdserver/tls", str(pki)))
    Server(processes, tmp_path / "data", port, {"disk0": "64M"}, ["--config", str(file)])
    for mark in ("tls-clients", "tls-policy", "tls-clients"):
        type_in(mark)
    with pytest.raises(RefusedError, match="TLS only"):
        Client(("127.0.0.1", port), "disk0")


# --- what a start and `config check` say ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"key": "web1"}, "is not the key of"),
        ({"certificate": "none"}, "cannot be read: No such file or directory"),
    ],
)
def test_certificates_that_cannot_be_used_stop_a_start_with_one_line(
    node: Node, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], says: str
) -> None:
    places = {"web1": node.certificates.client("web1") / "client-key.pem", "none": tmp_path / "none"}
    files = {**node.certificates.settings, **{key: places[name] for key, name in changes.items()}}
    file = tmp_path / "node.yaml"
    file.write_text("\n".join(["tls:", "  mode: required", *(f"  {key}: {path}" for key, path in files.items())]))
    for command in (["config", "check", str(file)], ["serve", "--config", str(file), "--data", str(tmp_path / "data")]):
        assert run_command(command) == 2
        printed = capsys.readouterr().err
        assert says in printed
        assert printed.count("\n") == 1
    assert not (tmp_path / "data").exists()

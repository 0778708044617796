"""A real etcd of one member or several, as tests start, stop, cut off and kill it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from nbdserver.node.authority import Authority
from tests.conftest import Processes

READY_TIMEOUT_S = 30.0
DAY = timedelta(days=1)
QUICK = ("--heartbeat-interval=50", "--election-timeout=500", "--bcrypt-cost=4")
"""Arguments of members that are quick to elect, and to check a password."""


class EtcdMember:
    """One etcd process; it can be started again with what it has on its disk."""

    def __init__(
        self,
        processes: Processes,
        command: Sequence[str],
        log: Path,
        endpoint: str,
        data: Path,
        identity: Sequence[str],
    ) -> None:
        self._processes = processes
        self._command = command
        self._log = log
        self.endpoint = endpoint
        self.data = data
        self.identity = identity
        """The arguments that say which member it is: who restores a backup says the same."""
        self.process: subprocess.Popen[bytes]

    def start(self, more: Sequence[str] = ()) -> None:
        """Start it; what follows later in `more` overrides what it is told always."""
        with self._log.open("ab") as log:
            self.process = self._processes.start([*self._command, *more], stdout=log.fileno(), stderr=log.fileno())

    def kill(self) -> None:
        self._processes.kill(self.process)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class EtcdCluster:
    """Members on ports of one address, below one directory."""

    def __init__(
        self,
        processes: Processes,
        directory: Path,
        free_port: Callable[[], int],
        members: int = 1,
        arguments: Sequence[str] = (),
        authority: Authority | None = None,
        server_name: str = "localhost",
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> None:
        """Start it, and wait until it answers. An `authority` makes a certificate for `server_name` and loopback.
        `within` comes before each command: it leads to where `host` is an address."""
        self._within = within
        self._control_tls: list[str] = []
        scheme = "https" if authority else "http"
        peers = [f"http://{host}:{free_port()}" for _ in range(members)]
        self.members = []
        tls: list[str] = []
        if authority:
            certificate, key = authority.make_node([server_name, "127.0.0.1"], DAY).files
            tls = [f"--cert-file={certificate}", f"--key-file={key}"]
            if "--client-cert-auth" in arguments:
                tls.append(f"--trusted-ca-file={authority.ca_certificate}")
            self._control_tls = [f"--cacert={authority.ca_certificate}", *_as_client(authority, "root")]
        for number, peer in enumerate(peers):
            endpoint, data = f"{host}:{free_port()}", directory / f"m{number}"
            identity = [
                f"--name=m{number}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster={','.join(f'm{other}={url}' for other, url in enumerate(peers))}",
            ]
            command = [
                *within,
                "etcd",
                *identity,
                f"--data-dir={data}",
                f"--listen-client-urls={scheme}://{endpoint}",
                f"--advertise-client-urls={scheme}://{endpoint}",
                f"--listen-peer-urls={peer}",
                *tls,
                *arguments,
            ]
            log = directory / f"m{number}.log"
            self.members.append(EtcdMember(processes, command, log, endpoint, data, identity))
        directory.mkdir(parents=True, exist_ok=True)
        for member in self.members:
            member.start()
        self.wait_ready()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    def control(self, *arguments: str, user: str = "", member: int = 0, check: bool = True) -> str:
        """Run etcdctl against one member and return what it prints; CalledProcessError."""
        login = [f"--user={user}"] if user else []
        endpoint = f"--endpoints={self.members[member].endpoint}"
        command = [*self._within, "etcdctl", *login, endpoint, *self._control_tls, *arguments]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
        if check and answer.returncode:
            raise AssertionError(f"etcdctl {' '.join(arguments)}: {answer.stderr}")
        return answer.stdout

    def lose(self) -> None:
        """Its one member is killed, and all that it had is gone."""
        (member,) = self.members
        member.kill()
        shutil.rmtree(member.data)

    def restore(self, backup: Path) -> None:
        """One that was lost holds what the backup has, as another etcd cluster under the same addresses."""
        (member,) = self.members
        as_member = [f"--data-dir={member.data}", *member.identity, "--initial-cluster-token=restored"]
        self.control("snapshot", "restore", str(backup), *as_member)
        member.start()

    def wait_ready(self) -> None:
        """Wait until the first member answers with a leader."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                self.control("get", "ready")
                return
            except AssertionError:
                assert time.monotonic() < deadline, "etcd is not ready"
                time.sleep(0.05)

    def enable_auth(self, password: str, prefix: str = "test/") -> None:
        """Make root, with a password, and a user `node` with the same one who has all keys below the prefix; then
        demand logins."""
        for arguments in (
            ["user", "add", f"root:{password}"],
            ["user", "grant-role", "root", "root"],
            ["role", "add", "node"],
            ["role", "grant-permission", "node", "--prefix=true", "readwrite", prefix],
            ["user", "add", f"node:{password}"],
            ["user", "grant-role", "node", "node"],
            ["auth", "enable"],
        ):
            self.control(*arguments)

    def leader(self) -> int:
        """Return the number of the member that leads."""
        for number in range(len(self.members)):
            fields = self.control("endpoint", "status", member=number, check=False).split(", ")
            if len(fields) > 4 and fields[4] == "true":
                return number
        raise AssertionError("no member leads")


def _as_client(authority: Authority, user: str) -> list[str]:
    """Return etcdctl's arguments for a client whose certificate names `user`."""
    _, certificate, key = authority.make_client(user, DAY).files
    return [f"--cert={certificate}", f"--key={key}"]

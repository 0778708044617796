"""A real etcd of one member or several, as tests start, stop, cut off and kill it."""

import ipaddress
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.conftest import Processes

READY_TIMEOUT_S = 30.0


class Authority:
    """A certificate authority and what it has signed, as PEM files in a directory."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._build(self._name, self._key.public_key(), is_authority=True)
        self.ca_file = self._write("ca.pem", certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, common_name: str, host_name: str = "localhost") -> tuple[Path, Path]:
        """Return the files of a certificate for loopback, `host_name` and a user `common_name`, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        certificate = self._build(subject, key.public_key(), host_name=host_name)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return (
            self._write(f"{common_name}.pem", certificate.public_bytes(serialization.Encoding.PEM)),
            self._write(f"{common_name}.key", pem),
        )

    def _build(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        is_authority: bool = False,
        host_name: str = "localhost",
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        names = [x509.DNSName(host_name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name: str, content: bytes) -> Path:
        path = self._directory / name
        path.write_bytes(content)
        return path


class EtcdMember:
    """One etcd process; it can be started again with what it has on its disk."""

    def __init__(self, processes: Processes, command: Sequence[str], log: Path, endpoint: str) -> None:
        self._processes = processes
        self._command = command
        self._log = log
        self.endpoint = endpoint
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
    """Members on ports of loopback, below one directory."""

    def __init__(
        self,
        processes: Processes,
        directory: Path,
        free_port: Callable[[], int],
        members: int = 1,
        arguments: Sequence[str] = (),
        authority: Authority | None = None,
        server_name: str = "localhost",
    ) -> None:
        self._authority = authority
        scheme = "https" if authority else "http"
        peers = [f"http://127.0.0.1:{free_port()}" for _ in range(members)]
        self.members = []
        tls: list[str] = []
        if authority:
            certificate, key = authority.issue("server", server_name)
            tls = [f"--cert-file={certificate}", f"--key-file={key}"]
            if "--client-cert-auth" in arguments:
                tls.append(f"--trusted-ca-file={authority.ca_file}")
        for number, peer in enumerate(peers):
            endpoint = f"127.0.0.1:{free_port()}"
            command = [
                "etcd",
                f"--name=m{number}",
                f"--data-dir={directory / f'm{number}'}",
                f"--listen-client-urls={scheme}://{endpoint}",
                f"--advertise-client-urls={scheme}://{endpoint}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster={','.join(f'm{other}={url}' for other, url in enumerate(peers))}",
                *tls,
                *arguments,
            ]
            self.members.append(EtcdMember(processes, command, directory / f"m{number}.log", endpoint))
        directory.mkdir(parents=True, exist_ok=True)
        for member in self.members:
            member.start()
        self.wait_ready()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    def control(self, *arguments: str, user: str = "", member: int = 0, check: bool = True) -> str:
        """Run etcdctl against one member and return what it prints; CalledProcessError."""
        tls = [f"--cacert={self._authority.ca_file}"] if self._authority else []
        if self._authority:
            certificate, key = self._authority.issue("root")
            tls += [f"--cert={certificate}", f"--key={key}"]
        command = ["etcdctl", f"--endpoints={self.members[member].endpoint}", *tls, *arguments]
        if user:
            command.insert(1, f"--user={user}")
        environment = {**os.environ, "ETCDCTL_API": "3"}
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
        if check and answer.returncode:
            raise AssertionError(f"etcdctl {' '.join(arguments)}: {answer.stderr}")
        return answer.stdout

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

    def enable_auth(self, password: str) -> None:
        """Make root, with a password, and a user `node` with the same one who has everything; then demand logins."""
        for arguments in (
            ["user", "add", f"root:{password}"],
            ["user", "grant-role", "root", "root"],
            ["role", "add", "node"],
            ["role", "grant-permission", "node", "--prefix=true", "readwrite", "test/"],
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

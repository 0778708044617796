"""The node's certificate, from the control process: checked here, used by the data process.

Rules
- What cannot be used (unreadable, not a certificate and its key, an unusable CA) is refused in one line before anything
  is changed, at a start, at a reload and by `config check`.
- An expired certificate is refused at a reload, where the old one stays, unless it is the one in force. At a start it
  is a warning: those who do not look at it, and those on the unix socket, are served, and a clock may be wrong after a
  boot.
- A data process that is started again and cannot read what its predecessor could goes on without TLS, but with the same
  mode: what requires TLS is closed, not served in clear text. That is a warning too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadata.registry import ExportSettings, Family
from nbdserver.host.tls import TlsError, make_context
from nbdserver.node.config import TlsSettings
from nbdserver.node.errors import NodeError, WrongInputError, listed
from nbdserver.volume.admission import TlsMode, is_name_of_certificate

if TYPE_CHECKING:
    from cryptography import x509

WARNING_TIME = timedelta(days=30)


@dataclass(frozen=True)
class Certificate:
    """What is to be known of a certificate file."""

    path: Path
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime

    def problem(self, now: datetime) -> str:
        """A sentence if it cannot be used now, or soon; "" if all is well."""
        if now < self.not_before:
            return f"{self.path} is not valid before {self.not_before:%Y-%m-%d %H:%M} UTC; is the clock right?"
        if now >= self.not_after:
            return f"{self.path} has expired on {self.not_after:%Y-%m-%d}; {self._remedy}"
        if self.not_after - now < WARNING_TIME:
            days = (self.not_after - now).days
            return f"{self.path} expires on {self.not_after:%Y-%m-%d}, in {days} days; {self._remedy}"
        return ""

    def is_valid(self, now: datetime) -> bool:
        return self.not_before <= now < self.not_after

    @property
    def _remedy(self) -> str:
        return "make a new one (nbdserver cert), then reload the node (SIGHUP)"


def read_certificate(path: Path) -> Certificate:
    """The first certificate in a PEM file. WrongInputError."""
    from cryptography import x509

    try:
        content = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise WrongInputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise WrongInputError(f"{path} holds no certificate in PEM") from None
    return Certificate(path, _names(content), content.not_valid_before_utc, content.not_valid_after_utc)


def _names(content: "x509.Certificate") -> tuple[str, ...]:
    from cryptography import x509

    try:
        alternatives = content.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return tuple(str(name.value) for name in alternatives if isinstance(name, (x509.DNSName, x509.IPAddress)))


def check(settings: TlsSettings) -> list[Certificate]:
    """The node's certificate and its clients' CA, as far as the settings name them. WrongInputError."""
    if settings.certificate is None or settings.key is None:
        return []
    try:
        make_context(settings.certificate, settings.key, settings.client_ca, settings.verify_clients)
    except TlsError as error:
        raise WrongInputError(str(error)) from None
    return [read_certificate(path) for path in (settings.certificate, settings.client_ca) if path is not None]


def requires_tls(settings: ExportSettings) -> bool:
    """Whether a volume itself wants TLS, whatever the node says."""
    named = any(map(is_name_of_certificate, settings.allowed_clients))
    return named or settings.tls == TlsMode.REQUIRED.value


def problems(certificates: list[Certificate]) -> list[str]:
    """What is to be said of these certificates now."""
    now = datetime.now(UTC)
    return [problem for certificate in certificates if (problem := certificate.problem(now))]


class NodeTls:
    """What the data process is told about TLS."""

    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        self._certificates: list[Certificate] = []
        self._failure = ""

    async def start(self, call: Callable[..., Any]) -> None:
        """A data process (asked by `call`) was started: let it use what the settings say. It goes on without TLS if it
        cannot."""
        try:
            await self._use(self._settings, check(self._settings), call)
        except NodeError as error:
            self._certificates, self._failure = [], f"there is no TLS: {error}"
            await call("tls", **TlsSettings().model_dump(mode="json") | {"mode": self._settings.mode})

    async def reload(self, settings: TlsSettings, call: Callable[..., Any]) -> None:
        """Let the data processes use what the settings say and the files hold, for new connections. NodeError: the old
        stays."""
        certificates = check(settings)
        now = datetime.now(UTC)
        for certificate in certificates:
            if not certificate.is_valid(now) and certificate not in self._certificates:
                raise WrongInputError(certificate.problem(now))
        await self._use(settings, certificates, call)

    async def _use(self, settings: TlsSettings, certificates: list[Certificate], call: Callable[..., Any]) -> None:
        await call("tls", **settings.model_dump(mode="json"))
        self._settings, self._certificates, self._failure = settings, certificates, ""

    def warnings(self, families: Sequence[Family]) -> list[str]:
        """What an operator should know: of certificates, and of volumes that need one."""
        found = ([self._failure] if self._failure else []) + problems(self._certificates)
        if not self._certificates:
            volumes = [volume for family in families for volume in family.volumes]
            closed = [volume.name for volume in volumes if requires_tls(volume.settings)]
            if closed:
                found.append(
                    f"nobody can attach over the network to {listed(closed)}: TLS is required, and this node has no"
                    " certificate; set tls.certificate and tls.key"
                )
        return found

    def status(self) -> dict[str, Any] | None:
        """What `status` shows; None without a certificate."""
        if not self._certificates:
            return None
        certificate = self._certificates[0]
        return {
            "mode": self._settings.mode,
            "verify_clients": self._settings.verify_clients,
            "certificate": str(certificate.path),
            "names": list(certificate.names),
            "expires": certificate.not_after.isoformat(),
        }

    def expires_s(self) -> float | None:
        """When the certificate expires, on the wall clock."""
        return self._certificates[0].not_after.timestamp() if self._certificates else None

"""Names and settings of volumes, as people write them.

Rules: what cannot be meant is refused in one line that says what would be right (WrongInputError).
"""

import ipaddress
import re
from dataclasses import replace

from metadata.registry import ExportSettings
from nbdserver.logdisk.budget import LEAST_SEGMENTS
from nbdserver.node.errors import WrongInputError
from nbdserver.node.sizes import SizeError, format_size, parse_size
from nbdserver.volume.admission import CERTIFICATE_PREFIX, TlsMode, is_name_of_certificate
from nbdserver.volume.peer import is_certificate_name

MAX_NAME_LENGTH = 128
MAX_DESCRIPTION_BYTES = 4096  # NBD's longest string
MAX_ALLOWED_CLIENTS = 256

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

LIMIT_KEYS = ("iops", "iops-burst", "bandwidth", "bandwidth-burst")
SETTING_KEYS = ("read-only", "description", "shared", "allowed-clients", "tls", *LIMIT_KEYS, "max-data", "replicas")
MAX_DATA = "max-data"
"""Of a family: of a volume, its snapshots and its clones together."""

REPLICAS = "replicas"
MOST_REPLICAS = 5

MAX_DATA_BYTES = 1 << 50

MAX_RATE = 1 << 40
"""Operations or bytes a second; more is no limit to anything."""


def check_name(name: str) -> str:
    """Return `name` if a volume may have it. Raises WrongInputError."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise WrongInputError(
            f"{name!r:.60} cannot be a volume's name; use 1 to {MAX_NAME_LENGTH} of A-Z a-z 0-9 _ . - "
            "and begin with a letter or digit"
        )
    return name


def is_snapshot_name(name: str) -> bool:
    """Whether a snapshot may have this name, which stands behind its volume's."""
    return NAME.fullmatch(name) is not None and len(name) <= MAX_NAME_LENGTH


def change_settings(settings: ExportSettings, key: str, value: str) -> ExportSettings:
    """Return `settings` with one `key=value` as written on the command line. Raises WrongInputError."""
    match key.replace("_", "-"):
        case "read-only":
            return replace(settings, read_only=_parse_bool(key, value))
        case "shared":
            return replace(settings, shared=_parse_bool(key, value))
        case "description":
            if len(value.encode()) > MAX_DESCRIPTION_BYTES or "\0" in value:
                raise WrongInputError(f"the description is longer than {MAX_DESCRIPTION_BYTES} bytes; shorten it")
            return replace(settings, description=value)
        case "allowed-clients":
            return replace(settings, allowed_clients=_parse_clients(value))
        case "iops" | "iops-burst" | "bandwidth" | "bandwidth-burst" as limit:
            return _change_limit(settings, limit, value)
        case "tls":
            modes = [mode.value for mode in TlsMode]
            if value not in modes:
                raise WrongInputError(f"tls={value!s:.40} is not one of {', '.join(modes)}; write tls=required")
            return replace(settings, tls=value)
        case "size":
            raise WrongInputError("a size is not a setting: nbdserver volume resize NAME --size SIZE")
    raise WrongInputError(f"{key!r:.60} is not a setting of a volume; known are {', '.join(SETTING_KEYS)}")


def parse_max_data(value: str, segment_bytes: int) -> int:
    """Return the bytes of `max-data=VALUE`, 0 for none, for a volume with such segments. Raises WrongInputError."""
    if value.lower() in ("none", "0", ""):
        return 0
    try:
        size_bytes = parse_size(value)
    except SizeError as error:
        raise WrongInputError(f"{MAX_DATA}: {error}; write {MAX_DATA}=100G or none") from None
    least_bytes = LEAST_SEGMENTS * segment_bytes
    if size_bytes < least_bytes:
        raise WrongInputError(
            f"{MAX_DATA}={value!s:.40} is less than {format_size(least_bytes)}, which is {LEAST_SEGMENTS} segments of "
            f"{format_size(segment_bytes)}; write {MAX_DATA}={format_size(least_bytes)} or more"
        )
    if size_bytes > MAX_DATA_BYTES:
        raise WrongInputError(f"{MAX_DATA}={value!s:.40} is no limit to anything; write {MAX_DATA}=none")
    return size_bytes


def parse_replicas(value: str) -> int:
    """Return N of `replicas=N`. Raises WrongInputError."""
    if not value.isdecimal() or not 1 <= int(value) <= MOST_REPLICAS:
        raise WrongInputError(f"replicas={value!s:.40} is not 1 to {MOST_REPLICAS}; write for example replicas=3")
    return int(value)


def _change_limit(settings: ExportSettings, key: str, value: str) -> ExportSettings:
    example = "100M or none" if key.startswith("bandwidth") else "1000 or none"
    field = key.replace("-", "_")
    if value.lower() in ("none", "0", ""):
        rate = 0
    elif key.startswith("iops") and not value.isdecimal():
        raise WrongInputError(f"{key}={value!s:.40} is not a number of operations; write {key}={example}")
    else:
        try:
            rate = parse_size(value)
        except SizeError as error:
            raise WrongInputError(f"{key}: {error}; write {key}={example}") from None
    if rate > MAX_RATE:
        raise WrongInputError(f"{key}={value!s:.40} is more than {MAX_RATE}; write {key}=none for no limit")
    changed = replace(settings, **{field: rate})  # type: ignore[arg-type]
    for limit in ("iops", "bandwidth"):
        if getattr(changed, f"{limit}_burst") and not getattr(changed, limit):
            if field != limit or rate:
                raise WrongInputError(f"{limit}-burst needs a limit that it is the burst of; set {limit} too")
            changed = replace(changed, **{f"{limit}_burst": 0})  # type: ignore[arg-type]
    return changed


def _parse_bool(key: str, value: str) -> bool:
    lowered = value.lower()
    if lowered in ("true", "yes", "on", "1"):
        return True
    if lowered in ("false", "no", "off", "0"):
        return False
    raise WrongInputError(f"{key}={value!s:.40} is not true or false; write {key}=true or {key}=false")


def _parse_clients(value: str) -> tuple[str, ...]:
    words = [word.strip() for word in value.split(",") if word.strip()]
    if words == ["all"]:
        return ()
    if len(words) > MAX_ALLOWED_CLIENTS:
        raise WrongInputError(
            f"allowed-clients has {len(words)} entries, at most {MAX_ALLOWED_CLIENTS}; write larger networks"
        )
    clients: list[str] = []
    for word in words:
        if is_name_of_certificate(word):
            if not is_certificate_name(word.removeprefix(CERTIFICATE_PREFIX)):
                raise WrongInputError(
                    f"allowed-clients: {word!r:.60} names no certificate; write for example cert:web1"
                )
            clients.append(word)
            continue
        try:
            clients.append(str(ipaddress.ip_network(word)))
        except ValueError as error:
            try:
                hint = str(ipaddress.ip_network(word, strict=False))
            except ValueError:
                hint = "10.0.0.0/8,fd00::/8"
            raise WrongInputError(
                f"allowed-clients: {word!r:.60} is not a network ({error}); write for example {hint} (or cert:NAME)"
            ) from None
    return tuple(clients)

"""Node settings: one YAML file, checked whole before anything is opened.

Rules: unknown and repeated keys are errors; every message is one line that names the file, the line, the key, what
is wrong and what would be right. Sizes are as in `sizes.py`. Settings of a volume are not here: they belong to the
volume and are set live. What the command line gives replaces what the file gives. `LIVE_KEYS` are taken over by
SIGHUP; the rest needs a restart.
"""

import difflib
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, ValidationError, model_validator

from nbdserver.node.cluster_settings import ClusterSettings
from nbdserver.node.errors import WrongInputError
from nbdserver.node.setting_values import (
    Address,
    Model,
    PathValue,
    SocketPath,
    duration,
    one_or_more,
    ratio,
    size,
    size_or_none,
)

LIVE_KEYS = ("listen", "socket", "tls", "http.public_read", "http.token_file", "max_data", "overcommit", "scrub")

MAX_FILE_BYTES = 1 << 20
"""A settings file is a page of text: what is larger is the wrong file."""

_MIB = 1 << 20


class HttpSettings(Model):
    """The API on TCP; off unless `listen` is given."""

    listen: Address | None = Field(
        default=None, description="HOST:PORT for /metrics, /healthz and the API; off when absent"
    )
    public_read: StrictBool = Field(default=False, description="let anybody read without a token")
    token_file: PathValue | None = Field(
        default=None, description="file with the token; default DATA/api.token, made at start"
    )


def _tls_mode(value: object) -> object:
    if value is False:
        return "off"  # what YAML makes of the word
    if value not in ("off", "allowed", "required"):
        raise ValueError(f"{reprlib.repr(value)} is not off, allowed or required")
    return value


class TlsSettings(Model):
    """TLS for NBD clients. There is none without a certificate."""

    mode: Annotated[Literal["off", "allowed", "required"], BeforeValidator(_tls_mode)] = Field(
        default="off", description="whether volumes that say nothing themselves are used over TLS"
    )
    certificate: PathValue | None = Field(default=None, description="this node's certificate, PEM")
    key: PathValue | None = Field(default=None, description="the key to it, PEM without a password")
    client_ca: PathValue | None = Field(
        default=None, description="certificates that clients' ones are verified by, PEM"
    )
    verify_clients: StrictBool = Field(default=True, description="refuse clients without a certificate of client_ca")

    @model_validator(mode="after")
    def _goes_together(self) -> "TlsSettings":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key are needed both")
        if self.certificate is None and (self.mode != "off" or self.client_ca is not None):
            raise ValueError("certificate and key are missing; nbdserver cert node makes them")
        if self.certificate is not None and "mode" not in self.model_fields_set:
            raise ValueError(
                "mode is missing; write allowed or required (or off: only volumes with a tls of their own)"
            )
        if self.certificate is not None and self.client_ca is None and self.verify_clients:
            raise ValueError(
                "client_ca is missing; name it, or write verify_clients: false to let in clients without one"
            )
        return self


class ScrubSettings(Model):
    """How data is read again to find what has rotted."""

    interval: Annotated[float, duration("hdw", "1h", "3650d", "30d, 12h")] = Field(
        default=30 * 86400.0, description="after which a volume is scrubbed again (30d, 12h); none: only on demand"
    )
    rate: Annotated[int, size(_MIB, 1 << 40)] = Field(
        default=32 * _MIB, description="bytes a second that a scrub reads; an eighth of it while clients are busy"
    )


class NodeSettings(Model):
    """A node's settings file."""

    data: PathValue | None = Field(default=None, description="data directory")
    listen: Annotated[list[Address], BeforeValidator(one_or_more), Field(max_length=64)] = Field(
        default=["127.0.0.1:10809"], description="HOST:PORT, or a list of them, for NBD clients"
    )
    socket: SocketPath | None = Field(default=None, description="unix socket for NBD clients")
    cache: Annotated[int, size(16 * _MIB, 1 << 40)] = Field(default=512 * _MIB, description="memory for the maps")
    segment: Annotated[int, size(_MIB, 1 << 30, power_of_two=True)] = Field(
        default=64 * _MIB, description="segment file size of new volumes"
    )
    workers: Annotated[StrictInt, Field(ge=1, le=64)] = Field(
        default=1, description="data processes, on which volumes are spread; clients need cores of their own"
    )
    max_connections: Annotated[StrictInt, Field(ge=1, le=65536)] = Field(
        default=1024, description="NBD connections at a time"
    )
    max_data: Annotated[int, size_or_none(64 * _MIB, 1 << 50)] = Field(
        default=0, description="most that the segment files of all volumes may take together; none: the whole disk"
    )
    overcommit: Annotated[float, BeforeValidator(ratio)] = Field(
        default=0.0, description="most that volumes may have together, as a multiple of the room there is; none: any"
    )
    tls: TlsSettings = TlsSettings()
    scrub: ScrubSettings = ScrubSettings()
    http: HttpSettings = HttpSettings()
    cluster: ClusterSettings | None = Field(
        default=None, description="the cluster that this node belongs to; absent: it stands alone"
    )


def too_many_workers(settings: NodeSettings) -> list[str]:
    """What is to be said of more data processes than this machine has cores for."""
    cores = len(os.sched_getaffinity(0))
    if settings.workers <= max(1, cores):
        return []
    return [f"workers: {settings.workers} on a machine with {cores} cores is slower than workers: {cores}"]


class ConfigError(WrongInputError):
    """A settings file that cannot be used. `problems` holds every line; the message is the first of them."""

    def __init__(self, problems: list[str]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = problems


def put_over(settings: NodeSettings, overrides: Mapping[str, Any]) -> NodeSettings:
    """`settings` with other values, which are checked already, by key: `listen`, or `http.listen`."""
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        group, _, name = key.rpartition(".")
        if group:
            changes[group] = changes.get(group, getattr(settings, group)).model_copy(update={name: value})
        else:
            changes[name] = value
    return settings.model_copy(update=changes)


def load_settings(path: Path) -> NodeSettings:
    """Read and check a settings file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}; name a YAML file of node settings"]) from None
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: is larger than 1 MiB; name a YAML file of node settings"])
    return parse_settings(text, str(path))


def parse_settings(text: bytes, name: str) -> NodeSettings:
    """Check the text of a settings file called `name`. Raises ConfigError."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        repeated = _repeated_keys(tree, name, set())
        content = yaml.safe_load(text) if not repeated else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([f"{name}{where}: is not YAML: {problem}; write lines of `key: value`"]) from None
    if repeated:
        raise ConfigError(repeated)
    if content is None:
        return NodeSettings()
    if not isinstance(content, dict):
        raise ConfigError([f"{name}: holds {reprlib.repr(content)}, not settings; write lines of `key: value`"])
    try:
        return NodeSettings.model_validate(content)
    except ValidationError as error:
        problems = [(_line(tree, problem["loc"]), problem) for problem in error.errors()]
        # A key that is not known explains another one that is missing.
        problems.sort(key=lambda item: (item[0], item[1]["type"] != "extra_forbidden"))
        raise ConfigError([_sentence(name, line, problem) for line, problem in problems]) from None


def _sentence(name: str, line: int, problem: Any) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    prefix = f"{name}:{line}: {key}"
    given = reprlib.repr(problem["input"])
    kind, message = problem["type"], str(problem["msg"])
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else "known here: " + ", ".join(known)
        return f"{prefix}: unknown key; {hint}"
    if kind == "missing":
        return f"{prefix}: is missing: {_model(location[:-1]).model_fields[str(location[-1])].description}"
    if kind == "value_error":
        return f"{prefix}: {problem['ctx']['error']}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{prefix}: needs keys of its own below it: {', '.join(_known_keys(location))}"
    if kind == "bool_type":
        return f"{prefix}: {given} is not true or false; write true or false, without quotes"
    return f"{prefix}: {given} is wrong: {message[:1].lower()}{message[1:]}"


def _model(location: tuple[str | int, ...]) -> type[Model]:
    """The settings that the keys at `location` belong to, or the innermost there are."""
    model: type[Model] = NodeSettings
    for part in location:
        field = model.model_fields.get(str(part))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Model)), model)
    return model


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    return list(_model(location).model_fields)


def _line(tree: yaml.Node | None, location: tuple[str | int, ...]) -> int:
    """Return the line of the key at `location`, or of the innermost one that the file has."""
    line = 1
    node = tree
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _repeated_keys(tree: yaml.Node | None, name: str, visited: set[int]) -> list[str]:
    """Return a line for each key that a mapping has twice. With aliases the tree is a graph: each node is seen once."""
    if not isinstance(tree, yaml.MappingNode) or id(tree) in visited:
        return []
    visited.add(id(tree))
    problems: list[str] = []
    seen: dict[str, int] = {}
    for key, value in tree.value:
        line = key.start_mark.line + 1
        if str(key.value) in seen:
            problems.append(
                f"{name}:{line}: {key.value}: is given twice (first in line {seen[str(key.value)]}); keep one"
            )
        seen.setdefault(str(key.value), line)
        problems += _repeated_keys(value, name, visited)
    return problems

"""The kinds of values that settings have: sizes, durations, addresses, names, paths.

Rules: a check raises ValueError with the end of a sentence that begins with the key (`cache: 1M is outside 16M to 1T`)
and says what would be right.
"""

import ipaddress
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from nbdserver.node.addresses import check_address, check_socket_path, split_address
from nbdserver.node.errors import WrongInputError
from nbdserver.node.sizes import format_size, parse_size

NAME_PATTERN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""Of a cluster, a node, a site, a fault domain."""

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Model(BaseModel):
    """Settings that know their keys and do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def size(least_bytes: int, most_bytes: int, power_of_two: bool = False) -> Any:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError("is not a size; write for example 512M")
        size_bytes = parse_size(str(value))
        if not least_bytes <= size_bytes <= most_bytes:
            raise ValueError(f"{value!s:.60} is outside {format_size(least_bytes)} to {format_size(most_bytes)}")
        if power_of_two and size_bytes & (size_bytes - 1):
            raise ValueError(
                f"{value} is not a power of two; write for example {format_size(1 << size_bytes.bit_length() - 1)}"
            )
        return size_bytes

    return BeforeValidator(check)


def size_or_none(least_bytes: int, most_bytes: int) -> Any:
    """`none` is 0: without limit."""
    checked_size = size(least_bytes, most_bytes)

    def check(value: object) -> int:
        checked: int = 0 if value in (None, "none", "0", 0) else checked_size.func(value)
        return checked

    return BeforeValidator(check)


def duration(units: str, least: str, most: str, examples: str) -> Any:
    """Seconds, as a number with one of `units`; `none` is 0."""

    def seconds(text: str) -> int:
        match = re.fullmatch(rf"([0-9]+)([{units}])", text)
        return int(match[1]) * _UNITS_S[match[2]] if match else 0

    def check(value: object) -> float:
        if value in (None, "none", "off", False):
            return 0.0
        checked = seconds(str(value).strip())
        if not seconds(least) <= checked <= seconds(most):
            raise ValueError(f"{reprlib.repr(value)} is not {least} to {most}; write for example {examples} or none")
        return float(checked)

    return BeforeValidator(check)


def ratio(value: object) -> float:
    """`none` is 0: without limit."""
    if value in (None, "none"):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.1 <= value <= 1000:
        raise ValueError(f"{reprlib.repr(value)} is not a ratio from 0.1 to 1000; write for example 2.5, or none")
    return float(value)


def one_or_more(value: object) -> object:
    """A list, also where one is written without brackets."""
    return [value] if isinstance(value, (str, int)) else value


def _address(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{reprlib.repr(value)} is not HOST:PORT; write for example 127.0.0.1:10809")
    address: str = _checked(check_address, value)
    return address


def _own_address(value: object) -> str:
    """What others reach this node by: a number, so that nobody has to wait for a name server."""
    address = _address(value)
    host, port = _checked(split_address, address)
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        raise ValueError(
            f"{value!r} has a host name; write the number that it stands for, as 10.0.0.5:{port}"
        ) from None
    if number.is_unspecified or number.is_multicast:
        raise ValueError(f"{value!r} is nothing that other nodes can reach; write this node's own, as 10.0.0.5:{port}")
    return address


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{reprlib.repr(value)} is not a path; write for example /var/lib/nbdserver")
    return Path(value)


def _socket_path(value: object) -> Path:
    path: Path = _checked(check_socket_path, _path(value))
    return path


def _name(value: object) -> str:
    if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value):
        raise ValueError(
            f"{reprlib.repr(value)} is not a name; use 1 to 63 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
        )
    return value


def _checked(check: Any, value: Any) -> Any:
    try:
        return check(value)
    except WrongInputError as error:
        raise ValueError(str(error)) from None


Address = Annotated[str, BeforeValidator(_address)]
OwnAddress = Annotated[str, BeforeValidator(_own_address)]
NameValue = Annotated[str, BeforeValidator(_name)]
PathValue = Annotated[Path, BeforeValidator(_path)]
SocketPath = Annotated[Path, BeforeValidator(_socket_path)]

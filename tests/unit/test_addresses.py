"""Addresses to listen on, URIs, and who holds a port."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node.addresses import check_address, check_socket_path, is_loopback, port_holder, split_address, uri
from nbdserver.node.errors import WrongInputError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:10809", "127.0.0.1", 10809),
        ("[::1]:1", "::1", 1),
        ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
        ("node-1.example:10809", "node-1.example", 10809),
    ],
)
def test_a_host_and_a_port_are_told_apart(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)
    assert check_address(text) == text


@given(st.text())
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    refusal = ""
    try:
        host, port = split_address(text)
        assert host
        assert 1 <= port <= 65535
    except WrongInputError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_a_socket_path_may_have_107_bytes_and_no_more(tmp_path: Path) -> None:
    assert check_socket_path(Path("/" + "s" * 106))
    with pytest.raises(WrongInputError, match="has 108 bytes; Linux takes at most 107"):
        check_socket_path(Path("/" + "s" * 107))
    with pytest.raises(WrongInputError, match="has 109 bytes"):
        check_socket_path(Path("/" + "ü" * 54))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True)]
    + [(host, False) for host in ("10.0.0.1", "::", "::ffff:10.0.0.1", "", "localhost.example")],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_uri_names_the_export_and_the_way() -> None:
    assert uri("127.0.0.1:10809", "disk0") == "nbd://127.0.0.1:10809/disk0"
    assert uri("[::1]:10809") == "nbd://[::1]:10809/"
    assert uri("unix:/my disks/nbd.sock") == "nbd+unix:///?socket=/my%20disks/nbd.sock"
    assert uri("unix:/run/nbd.sock", "disk0") == "nbd+unix:///disk0?socket=/run/nbd.sock"


def test_the_holder_of_a_port_is_found_by_its_listening_socket(free_port: Callable[[], int]) -> None:
    port = free_port()
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        assert port_holder(port).endswith(f"(pid {os.getpid()})")
    assert port_holder(port).startswith("another program")

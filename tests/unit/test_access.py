"""Who may ask what over TCP: the whole table."""

import itertools

import pytest

from nbdserver.api.access import PAGE_FILES, allowed

TOKEN = "s3cret"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE"])
def test_changing_needs_the_token_whatever_the_settings(method: str) -> None:
    for path, loopback, public in itertools.product(("/metrics", "/v1/volumes"), (True, False), (True, False)):
        assert not allowed(method, path, loopback, "", TOKEN, public)
        assert allowed(method, path, loopback, f"Bearer {TOKEN}", TOKEN, public)


@pytest.mark.parametrize(
    ("path", "loopback", "public", "expected"),
    [
        ("/metrics", True, False, True),
        ("/healthz", True, False, True),
        ("/metrics", False, False, False),
        ("/metrics", False, True, True),
        ("/v1/status", True, False, False),
        ("/v1/status", False, True, True),
        ("/metrics/../v1/status", True, False, False),
    ],
)
def test_reading_is_open_as_the_settings_say(path: str, loopback: bool, public: bool, expected: bool) -> None:
    assert allowed("GET", path, loopback, "", TOKEN, public) is expected


@pytest.mark.parametrize("path", PAGE_FILES)
def test_the_files_of_the_page_are_for_everybody(path: str) -> None:
    assert allowed("GET", path, False, "", TOKEN, False)
    assert not allowed("POST", path, False, "", TOKEN, False)


@pytest.mark.parametrize(
    ("host", "loopback", "public", "expected"),
    [
        ("localhost:9809", True, False, True),
        ("LOCALHOST", True, False, True),
        ("127.0.0.1:9809", True, False, True),
        ("[::1]:9809", True, False, True),
        ("node1:9809", True, False, False),
        ("127.0.0.1.example.com", True, False, False),
        ("example.com:9809", True, False, False),
        ("", True, False, False),
        ("[", True, False, False),
        ("localhost:9809", False, False, False),
        ("node1:9809", False, True, True),
    ],
)
def test_what_the_page_shows_is_open_on_loopback_by_its_own_name(
    host: str, loopback: bool, public: bool, expected: bool
) -> None:
    assert allowed("GET", "/v1/overview", loopback, "", TOKEN, public, host) is expected
    assert allowed("GET", "/v1/overview", loopback, f"Bearer {TOKEN}", TOKEN, public, host)


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic s3cret", "s3cret", "Bearer s3cretx", "Bearer é"]
)
def test_a_wrong_token_opens_nothing(given: str) -> None:
    assert not allowed("GET", "/v1/status", True, given, TOKEN, False)


@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer"])
def test_no_token_on_the_server_lets_nobody_in(given: str) -> None:
    assert not allowed("GET", "/v1/status", False, given, "", False)

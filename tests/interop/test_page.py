"""The status page in a real browser: it shows the node, live, and says when something is wrong or nobody answers."""

import asyncio
import json
import os
import re
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from nbdserver.api import page
from nbdserver.api.access import PAGE_FILES
from nbdserver.node.volumes_told import NOT_TOLD
from tests.browser import Browser
from tests.conftest import Processes
from tests.nbd_client import Client
from tests.serving import Server, eventually

NASTY = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser(
    module_processes: Processes, needs: Callable[[str, str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    started = Browser(module_processes, needs("chromium", "chromium"), tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


class Site:
    """A node with the page on a TCP port."""

    def __init__(self, processes: Processes, path: Path, free_port: Callable[[], int]) -> None:
        self.port = free_port()
        config = path / "node.yaml"
        config.write_text(f"http: {{listen: '127.0.0.1:{self.port}'}}\n")
        self.server = Server(
            processes, path / "data", free_port(), {"disk0": "64M", "web": "128M"}, ["--config", str(config)]
        )
        self.url = f"http://127.0.0.1:{self.port}/"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.loads(response.read())


@pytest.fixture(scope="module")
def site(module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Site:
    return Site(module_processes, tmp_path_factory.mktemp("site"), free_port)


def is_live(browser: Browser) -> None:
    browser.wait("document.querySelector('#live').innerText === 'live'")


def test_the_page_shows_the_node_and_what_changes_and_asks_nobody_else(browser: Browser, site: Site) -> None:
    site.server.command("volume", "set", "web", f"description={NASTY}")
    browser.open(site.url)
    is_live(browser)
    assert browser.text("#verdict") == "All is well: 2 volumes served to 0 client connections."
    assert browser.run("getComputedStyle(document.querySelector('#volume-rows th:nth-child(2)')).display") == "none"
    browser.wait(f"document.querySelector('#volume-rows').innerText.includes({json.dumps(NASTY)})")
    client = Client(("127.0.0.1", site.server.port), "disk0")
    site.server.command("volume", "create", "late", "--size", "1G")
    browser.wait("document.querySelector('#volume-rows').innerText.includes('late')")
    browser.wait("document.querySelector('#verdict').innerText.includes('3 volumes served to 1 client')")
    client.close()
    assert "volume created" in browser.text("#events")
    assert socket.gethostname() in browser.run("document.title")
    assert browser.complaints() == []
    assert {address[: len(site.url)] for address in browser.requested()} == {site.url}
    assert {address[len(site.url) - 1 :] for address in browser.requested()} >= set(PAGE_FILES)


def test_volumes_are_filtered_and_ordered_and_by_keyboard_too(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    is_live(browser)
    names = "[...document.querySelectorAll('#volume-rows tbody b')].map((one) => one.innerText).join()"
    browser.type("#volumes-match", "WEB")
    browser.wait(f"{names} === 'web'")
    assert "1 that match" in browser.text("#volumes-more")
    browser.type("#volumes-match", "nothing of this kind")
    browser.wait("document.querySelector('#volumes-more').innerText.startsWith('None of')")
    browser.type("#volumes-match", "")
    browser.wait(f"{names}.includes('disk0')")
    browser.run("document.querySelector('#volume-rows th:nth-child(4) button').focus()")
    browser.press("Enter", 13)
    browser.wait("document.querySelector('#volume-rows th:nth-child(4)').getAttribute('aria-sort') === 'descending'")
    browser.wait(f"{names}.endsWith('web,disk0')")
    assert browser.run("document.activeElement.innerText") == "Size", "the focus stays where it was"


def test_a_data_process_that_hangs_is_named_and_nobody_hangs_with_it(browser: Browser, site: Site) -> None:
    data_pid = site.get("v1/overview")["workers"][0]["pid"]
    browser.open(site.url)
    is_live(browser)
    os.kill(data_pid, signal.SIGSTOP)
    try:
        browser.wait("document.querySelector('#findings').innerText.includes('data process has not answered for')")
        assert f"kill -9 {data_pid}" in browser.text("#findings")
        browser.wait("document.querySelector('#volume-rows').innerText.includes('unknown')")
        assert browser.run("document.title").startswith("(1)")
        shown = site.server.command("status")
        assert "WARNING: data process has not answered for" in shown
        assert f"kill -9 {data_pid}" in shown.partition("to do: ")[2].partition("\n")[0]
    finally:
        os.kill(data_pid, signal.SIGCONT)
    browser.wait("document.querySelector('#verdict').innerText.startsWith('All is well')")


def test_who_does_not_come_by_loopback_needs_the_token(browser: Browser, site: Site) -> None:
    browser.open(f"http://elsewhere:{site.port}/")
    browser.wait("!document.querySelector('#token-form').hidden")
    assert not browser.run("document.querySelector('#volume-rows tbody').innerText")
    right = (site.server.data / "api.token").read_text().strip()
    for token, selector in (("wrong", "#token-wrong"), (right, "#content")):
        browser.type("#token", token)
        browser.press("Enter", 13)
        browser.wait(f"!document.querySelector('{selector}').hidden")
    is_live(browser)
    assert "disk0" in browser.text("#volume-rows")


def test_a_node_that_died_is_missed_and_found_again(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    is_live(browser)
    site.server.kill9()
    browser.wait("/No answer from .* for [2-9] s/.test(document.querySelector('#lost').innerText)")
    assert "What you see below is from" in browser.text("#lost")
    assert browser.run("document.title").startswith("no answer")
    assert "disk0" in browser.text("#volume-rows"), "what was known is still there"
    site.server.start()
    is_live(browser)
    assert browser.run("document.querySelector('#lost').hidden")


def test_looking_costs_one_look_and_a_page_of_rows(site: Site) -> None:
    shown = site.get("v1/overview?match=disk&limit=1")
    assert [row["name"] for row in shown["volumes"]["rows"]] == ["disk0"]
    with urllib.request.urlopen(site.url, timeout=30) as response:
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        request = urllib.request.Request(site.url, headers={"If-None-Match": response.headers["ETag"]})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 304


# --- a large cluster, made up ---------------------------------------------------------------------------------------


def member(number: int, **more: Any) -> dict[str, Any]:
    """A node as the cluster's part of the status has it."""
    return {
        "name": f"node{number}",
        "state": "up",
        "silent_s": None,
        "is_master": number == 1,
        "is_voter": number <= 3,
        "across_wan": False,
        "draining": False,
        "address": f"192.0.2.{number % 250}:10811",
        "data_addresses": [f"192.0.2.{number % 250}:10812"],
        "replicas": 3,
        "owned": 1,
        "site": "east" if number % 3 else "west",
        "fault_domain": f"rack{number % 10}",
        "version": "0.1.0",
        "started": "2026-01-01T00:00:00+00:00",
        "id": f"{number:016x}",
        "volumes": number,
        "clients": number,
        "requests_per_s": 1000.0,
        "latency_us": 90,
        "read_bytes_per_s": 1 << 20,
        "write_bytes_per_s": 0,
        "used_bytes": 85,
        "size_bytes": 100,
        "fill_percent": 85.0,
        "promisable_bytes": None,
    } | more


def large() -> dict[str, Any]:
    """What a node of a large cluster with many volumes says, and one other node does not."""
    nodes = [member(number) for number in range(1, 301)]
    nodes[6] |= {"state": "silent", "silent_s": 75.0, "volumes": None, "requests_per_s": None, "read_bytes_per_s": None}
    nodes[6] |= {"fill_percent": None, "started": ""}
    registry = {"kind": "etcd", "is_connected": True, "for_s": 5.0, "endpoint": "etcd1:2379", "endpoints": []}
    registry["last_error"] = ""
    cluster = {"name": "production", "node": "node1", "is_active": True, "master": "node1", "epoch": 3, "voters": []}
    traffic = {
        "requests_per_s": 12345.6,
        "bytes_per_s": 50 << 20,
        "read_bytes_per_s": 40 << 20,
        "write_bytes_per_s": 10 << 20,
        "latency_us": 180,
        "requests_history": [10 * second for second in range(60)],
        "bytes_history": [second % 7 for second in range(60)],
    }
    rows = [
        traffic
        | {
            "key": f"f{number}/1",
            "node": "node1",
            "name": f"volume-with-a-rather-long-name-{number:04}",
            "description": NASTY if number == 0 else "",
            "state": "full" if number == 0 else "serving",
            "reason": "",
            "size_bytes": 1 << 40,
            "live_bytes": 1 << 38,
            "shares_data": True,
            "damaged_blocks": 0,
            "base": "",
            "snapshots": 3,
            "clients": 4,
            "read_only": False,
            "replicas": 3 if number == 0 else 0,
            "in_sync": 2 if number == 0 else 0,
        }
        for number in range(49)
    ]
    elsewhere = {
        "key": "node node7/lost",
        "name": "lost",
        "node": "node7",
        "state": "unknown",
        "reason": "node7 is silent",
    }
    rows.insert(
        1, {**rows[1], **NOT_TOLD, "requests_history": [], "bytes_history": [], "size_bytes": 1 << 40} | elsewhere
    )
    finding = {"urgency": "now", "subject": NASTY, "problem": "is silent", "remedy": "look at it"}
    event = {"sequence": 1, "time": "2026-01-01T00:00:00.000+00:00", "kind": "checksum-error", "volume": NASTY}
    event |= {"times": 2, "since": "2026-01-01T00:00:00.000+00:00"}
    capacity = {"size_bytes": 4 << 40, "free_bytes": 1 << 40, "allocated_bytes": 3 << 40, "max_data_bytes": 0}
    return {
        "host": "node1",
        "pid": 100,
        "workers": [{"worker": 0, "pid": 101, "silent_s": 0.0, "volumes": []}],
        "findings": [finding],
        "uptime_s": 90061.0,
        "data": "/var/lib/nbdserver",
        "listen": ["192.0.2.1:10809"],
        "free_bytes": 1 << 40,
        "checksum": "google-crc32c",
        "warnings": [],
        "capacity": capacity | {"room_bytes": 4 << 40, "provisioned_bytes": 9 << 40, "overcommit": 3.0},
        "fills": [{"subject": "file system", "used_bytes": 3, "size_bytes": 4, "percent": 75.0, "alarm": 0}],
        "tls": None,
        "scrubs": [],
        "resync": [
            {
                "volume": NASTY,
                "node": "node2",
                "owner": "node1",
                "state": "waiting",
                "reason": NASTY,
                "left_bytes": 1 << 30,
                "total_bytes": 4 << 30,
                "bytes_per_s": 1 << 20,
                "left_s": 1024,
                "disk": "",
            }
        ],
        "resync_count": 2,
        "scrub_states": {"done": 1000},
        "scrub_next": "2026-12-25T00:00:00+00:00",
        "handover": None,
        "cluster": {**cluster, "registry": registry, "nodes": nodes},
        "seen_s": 0.1,
        "slot_s": 5.0,
        "states": {"serving": 999, "full": 1},
        "clients": 4000,
        "traffic": traffic,
        "volumes": {"total": 1000, "matching": 1000, "rows": rows},
        "events": [event],
    }


class Shown:
    """Stands for a node: it shows what it is told to."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content
        self.overview = self

    async def show(self, match: str, sort: str, limit: int) -> dict[str, Any]:
        return self._content


@contextmanager
def served(content: dict[str, Any], port: int) -> Iterator[str]:
    app = FastAPI(version="0.1.0")
    page.add_to(app, Shown(content))  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        eventually(lambda: server.started, "the page is served")
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


def test_a_large_cluster_is_shown_wide_and_narrow_light_and_dark(
    browser: Browser, free_port: Callable[[], int]
) -> None:
    with served(large(), free_port()) as url:
        browser.open(url, width=360, height=740, dark=True)
        is_live(browser)
        dark = browser.run("getComputedStyle(document.body).backgroundColor")
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.run(overflow) <= 0, "on a phone nothing is pushed out at the side"
        browser.resize(1280, 900)
        browser.prefer("light")
        assert browser.run("getComputedStyle(document.body).backgroundColor") != dark
        assert browser.run(overflow) <= 0
        first = "document.querySelector('#nodes tbody tr').innerText"
        assert "node7" in browser.run(first), "who is silent comes first"
        assert "silent" in browser.run(first)
        rows = "document.querySelectorAll('#nodes tbody tr').length"
        assert browser.run(rows) == 12
        browser.run("document.querySelector('#nodes-all').click()")
        assert browser.run(rows) == 300
        assert browser.text("#cluster-facts").startswith("Cluster production: 299 of 300 nodes up, master node1")
        browser.type("#nodes-match", "west rack3")
        browser.wait(f"{rows} === 10")
        assert "Showing 10 of 300 nodes" in browser.text("#nodes-more")
        assert "the first 50 of 1,000" in browser.text("#volumes-more")
        shown = browser.run("document.querySelector('#volume-rows tbody tr:nth-child(2)').innerText")
        assert re.split(r"\s*[\t\n]\s*", shown)[:4] == ["lost", "node7", "unknown", "node7 is silent"]
        assert "2 of 3 replicas in sync" in browser.run("document.querySelector('#volume-rows tbody tr').innerText")
        assert "999 volumes served here" in browser.text("#verdict")
        assert "Together 1,000 volumes" in browser.text("#cluster-facts")
        assert browser.text("#tiles-title") == "On node1, this node"
        for place in ("#findings", "#volume-rows", "#events"):
            assert NASTY in browser.text(place)
        assert "(2 times since 202" in browser.text("#events")
        assert browser.run("document.title") == "(1) node1 · nbdserver"
        assert browser.complaints() == []


def test_everything_has_a_name_for_who_does_not_see_it(browser: Browser, free_port: Callable[[], int]) -> None:
    with served(large(), free_port()) as url:
        browser.open(url)
        is_live(browser)
        tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in tree:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "searchbox", "columnheader", "image", "heading", "link"):
        assert named[role], role
        assert all(named[role]), role
    assert "Volumes" in named["heading"]
    assert any("now, at most" in name for name in named["image"])

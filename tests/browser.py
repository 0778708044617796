"""Headless Chromium, driven by its own DevTools protocol over a pipe: no driver, no further library.

A message is one JSON object that ends with a zero byte; Chromium reads from descriptor 3 and writes to descriptor 4.
What it reports (requests, console, exceptions) is kept as it comes.
"""

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.conftest import Processes

PATIENCE_S = 30.0

OPTIONS = (
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP elsewhere 127.0.0.1",
    "--password-store=basic",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Browser:
    """One Chromium, and one tab at a time."""

    def __init__(self, processes: Processes, program: str, profile: Path) -> None:
        # Chromium's own output would be in the way of the pipe, which is where its output was.
        place = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        command = ["sh", "-c", place, program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = processes.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        self._out, self._in = process.stdin.fileno(), process.stdout.fileno()
        self._process = process
        self._processes = processes
        self._last_id = 0
        self._pending = b""
        self._session = ""
        self.reports: list[dict[str, Any]] = []

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a page in a new tab; what was reported before is forgotten."""
        if self._session:
            self.call("Page.close")
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.reports = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.prefer("dark" if dark else "light")
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def prefer(self, scheme: str) -> None:
        """Like pages light, or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask Chromium; AssertionError with what it says if it refuses."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true in the page, and return it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} is not true of:\n{self.text()}"
            time.sleep(0.05)
        return value

    def text(self, selector: str = "body") -> str:
        """What can be read there."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def type(self, selector: str, text: str) -> None:
        """Write into a field as a person does."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key="Backspace", windowsVirtualKeyCode=8)

    def press(self, key: str, code: int) -> None:
        """Press a key, by its name and number."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def requested(self) -> list[str]:
        """The addresses that the page has asked for."""
        return [report["request"]["url"] for report in self._reported("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, what the content policy refused."""
        found = [json.dumps(report["exceptionDetails"]) for report in self._reported("Runtime.exceptionThrown")]
        for report in self._reported("Log.entryAdded"):
            if report["entry"]["level"] in ("error", "warning"):
                found.append(json.dumps(report["entry"]))
        for report in self._reported("Runtime.consoleAPICalled"):
            if report["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(report["args"]))
        return found

    def _reported(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # what was on its way has come
        return [report["params"] for report in self.reports if report["method"] == method]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._pending:
            left_s = deadline - time.monotonic()
            assert left_s > 0, "Chromium does not answer"
            assert select.select([self._in], [], [], left_s)[0], "Chromium does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "Chromium has ended"
            self._pending += data
        first, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        if "method" in message:
            self.reports.append(message)
        return message

    def close(self) -> None:
        """End it."""
        self._processes.kill(self._process, signal.SIGTERM)

"""Headless Chromium for tests of pages: what a page says on its console, whom it asks, how wide it gets.

    with Browser(folder) as browser:
        seen = browser.visit("file:///.../page.html", width=390)
        assert seen.complaints == [] and seen.outside == [] and seen.overflow == 0

Speaks the DevTools protocol; needs `chromium` on the PATH and nothing else.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from websockets.sync.client import connect

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH")
INSIDE = ("file:", "data:", "blob:", "about:")


@dataclass(frozen=True)
class Seen:
    """A visited page.

    complaints: errors and warnings of its console, and what failed to load.
    outside: addresses it asked for beyond files and data in itself.
    overflow: by how many CSS pixels it is wider than the window.
    """

    complaints: list[str]
    outside: list[str]
    overflow: int


class Browser:
    """One Chromium with one tab."""

    def __init__(self, folder: Path) -> None:
        self.profile = folder / "chromium"
        self.profile.mkdir(parents=True, exist_ok=True)
        self.number = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        self.process = subprocess.Popen(
            [
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                "--remote-debugging-port=0", f"--user-data-dir={self.profile}", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port_file = self.profile / "DevToolsActivePort"
        started = time.monotonic()
        while not (port_file.is_file() and len(port_file.read_text().splitlines()) == 2):
            assert self.process.poll() is None, "chromium ended"
            assert time.monotonic() - started < 60, "chromium does not answer"
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        self.socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=2**26, proxy=None)
        self.session: str | None = None
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    def visit(self, url: str, *, width: int, height: int = 900, scheme: str = "light") -> Seen:
        """Load a page in a window of `width` CSS pixels and wait until it is loaded and at rest for a moment."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url="about:blank")
        self._until("Page.loadEventFired")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self._until("Page.loadEventFired")
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        widest = self.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        return Seen(self._complaints(), self._outside(), max(0, widest - width))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it settles to."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def type(self, selector: str, text: str) -> None:
        """Type into the element of a CSS selector, key by key."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        for letter in text:
            self.call("Input.dispatchKeyEvent", type="keyDown", text=letter, key=letter)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def wait_for(self, expression: str, seconds: float = 30) -> Any:
        """The value of a JavaScript expression as soon as it is truthy."""
        started = time.monotonic()
        while not (value := self.evaluate(expression)):
            assert time.monotonic() - started < seconds, f"{expression} stays {value!r}"
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        png = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(png))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.socket.recv(timeout=60))
        if "method" in message:
            self.events.append(message)
        return message

    def _until(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self._receive()
        self.events = [event for event in self.events if event["method"] != method]

    def _complaints(self) -> list[str]:
        found = []
        for event in self.events:
            told = event["params"]
            match event["method"]:
                case "Runtime.exceptionThrown":
                    found.append(json.dumps(told["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                    found.append(json.dumps(told["args"]))
                case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                    found.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
                case "Network.loadingFailed":
                    found.append(f"not loaded: {told['errorText']}")
        return found

    def _outside(self) -> list[str]:
        asked = (
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        )
        return [url for url in asked if not url.startswith(INSIDE)]

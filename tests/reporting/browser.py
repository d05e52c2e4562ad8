"""A headless Chromium, spoken to by WebDriver (W3C), which needs no package."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

THERE = all(map(shutil.which, ("chromium", "chromedriver")))
# As WebDriver codes them.
ENTER, TAB, RIGHT = "\ue007", "\ue004", "\ue014"


class Browser:
    """A window."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = Request(self.address + path, data, {"Content-Type": "application/json"})
        request.method = method
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self.call("/url", {"url": url})

    def script(self, text: str) -> Any:
        return self.call("/execute/sync", {"script": text, "args": []})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def logs(self, kind: str) -> list[Any]:
        found: list[Any] = self.call("/se/log", {"type": kind})
        return found

    def command(self, name: str, **arguments: Any) -> Any:
        """A command of the Chrome DevTools Protocol."""
        return self.call("/goog/cdp/execute", {"cmd": name, "params": arguments})

    def show(self, width: int, scheme: str) -> None:
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=media)

    def picture(self) -> bytes:
        """The whole page, as PNG."""
        whole = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(whole["data"])


@contextmanager
def browser() -> Iterator[Browser]:
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        port = _port(driver)
        driving = Browser(f"http://127.0.0.1:{port}")
        options = {
            "args": ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            "perfLoggingPrefs": {"enableNetwork": True},
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = driving.call("/session", {"capabilities": {"alwaysMatch": wanted}})
        session = Browser(f"{driving.address}/session/{made['sessionId']}")
        try:
            yield session
        finally:
            session.call("", method="DELETE")
    finally:
        driver.terminate()
        driver.wait(10)


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    until = time.monotonic() + 60
    while time.monotonic() < until:
        line = driver.stdout.readline()
        if "started successfully on port" in line:
            return int(line.rstrip(".\n").split()[-1])
    raise RuntimeError("chromedriver has not started.")

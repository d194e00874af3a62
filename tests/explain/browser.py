"""A headless browser, driven through the DevTools protocol over a pipe: nothing to install for it.

The protocol is JSON messages, each ended by a zero byte, on descriptors 3 and 4 of the browser.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

__all__ = ["NAMES", "VARIABLE", "Browser", "find_browser"]

VARIABLE = "SHARDFLAX_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_DEADLINE = 300.0  # seconds for one answer, on a loaded machine

# Puts two descriptors where the browser looks for them, and becomes the browser.
_CODE = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_TRAMPOLINE = (sys.executable, "-ISc", _CODE)


def find_browser() -> str | None:
    """The browser that the environment names, or else the first that is installed."""
    named = os.environ.get(VARIABLE)
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser; a context manager that ends the process and removes its profile."""

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="shardflax-browser-")
        ours, theirs = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={self._profile}"]
        self._process = subprocess.Popen(
            [*_TRAMPOLINE, str(ours[0]), str(theirs[1]), executable, *options, "about:blank"],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = ours[1], theirs[0]
        self._numbers, self._pending, self._session = itertools.count(1), b"", ""
        self.faults: list[str] = []

    def __enter__(self) -> Self:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, page: Path, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        """Loads a page in a window of a size, on a system that prefers light or dark."""
        self.resize(width, height)
        self.prefer(theme)
        self._call("Page.navigate", url=page.as_uri())
        there = f"location.href.startsWith({json.dumps(page.as_uri())})"
        self.wait_for(f"{there} && document.readyState === 'complete'")

    def resize(self, width: int, height: int) -> None:
        """Changes the size of the window."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)

    def prefer(self, theme: str) -> None:
        """Says what the system prefers, light or dark."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def __call__(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        found = self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Presses and releases a key where the focus is."""
        same = {"key": key, "windowsVirtualKeyCode": code, "code": key}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **same)
        self._call("Input.dispatchKeyEvent", type="keyUp", **same)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self._call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Clicks with the mouse at the middle of an element, brought into view."""
        x, y = self(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f"e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f"return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def wait_for(self, expression: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + _DEADLINE
        while not self(expression):
            assert time.monotonic() < end, f"{expression}: never true"
            self("new Promise((r) => setTimeout(r, 20))")

    def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _next(self) -> Any:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], _DEADLINE)
            data = os.read(self._read, 1 << 16) if ready else b""
            assert data, "the browser does not answer"
            self._pending += data
        one, self._pending = self._pending.split(b"\0", 1)
        return json.loads(one)

    def _note(self, event: Any) -> None:
        """Keeps errors of scripts, and everything that was asked of the network."""
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.faults.append(str(params["exceptionDetails"]))
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "about:", "data:")):
                self.faults.append(f"asked the network for {url}")

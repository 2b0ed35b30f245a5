"""Headless Chromium for tests of pages: real keys and clicks, and what is on the screen.

Driven by its DevTools protocol over a pipe (--remote-debugging-pipe): messages of JSON, each ended by a null byte, on
the child's descriptors 3 and 4. That needs no package, no driver of the browser's version, and opens no port. Selenium
wants a chromedriver and a dozen packages, Playwright a Node.js, for what are two functions here.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
"""The browser, where there is one: `apt-get install chromium`."""
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
PATIENCE = 60.0
"""Seconds after which what does not happen is a failure."""
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8, " ": 32}


class Browser:
    """One tab of a browser of its own, whose profile is in `folder`."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 800) -> None:
        assert CHROMIUM is not None
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (theirs_in, theirs_out)]
        self._log = folder / "chromium.log"
        actions = [
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(self._log), os.O_WRONLY | os.O_CREAT, 0o600),
        ]
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        # A group of its own, so that its helpers end with it.
        self._process = os.posix_spawn(CHROMIUM, [*words, "about:blank"], os.environ, file_actions=actions, setpgroup=0)
        for end in (*high, theirs_in, theirs_out):
            os.close(end)
        self._in, self._out, self._buffer, self._number = ours_in, ours_out, b"", 0
        self.errors: list[str] = []
        """What pages' scripts threw, and what their content policy refused."""
        targets = self._send("Target.getTargets", session=None)["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = None
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._in)
        os.close(self._out)

    # --- what a person does ---

    def open(self, address: str) -> None:
        self._send("Page.navigate", {"url": address})
        self.until(f"location.href == {json.dumps(address)} && document.readyState == 'complete'")

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        self.down(key)
        self._send("Input.dispatchKeyEvent", _about(key) | {"type": "keyUp"})

    def down(self, key: str, *, repeat: bool = False) -> None:
        """Press a key, or let it repeat, as one does that is held."""
        text = {"text": key} if len(key) == 1 else {}
        self._send("Input.dispatchKeyEvent", _about(key) | text | {"type": "keyDown", "autoRepeat": repeat})

    def click(self, selector: str) -> None:
        """Click into the middle of an element, where a person could: what covers it is clicked instead."""
        box = self.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({_found(selector)}.getBoundingClientRect())")
        for kind, buttons in (("mouseMoved", 0), ("mousePressed", 1), ("mouseReleased", 0)):
            point = {"x": box[0], "y": box[1], "button": "none" if kind == "mouseMoved" else "left"}
            self._send("Input.dispatchMouseEvent", point | {"type": kind, "buttons": buttons, "clickCount": 1})

    # --- what is there to be seen ---

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", {"features": [scheme]})

    def text(self, selector: str) -> str:
        """The text that is visible in an element."""
        return str(self.value(f"{_found(selector)}.innerText"))

    def value(self, expression: str) -> Any:
        """The value of JavaScript on the page."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self._send("Runtime.evaluate", asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until JavaScript on the page is true."""
        wait_until(lambda: self.value(expression), expression)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", {"format": "png"})["data"]))

    # --- messages ---

    def _send(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = "") -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if session == "" and getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"])[:500])
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.errors.append(str(answer["params"]["entry"]["text"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], PATIENCE)
            part = os.read(self._in, 2**20) if ready else b""
            assert part, f"Chromium says nothing: {self._log.read_text()[-2000:]}"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


def _about(key: str) -> dict[str, Any]:
    return {"key": key, "windowsVirtualKeyCode": KEYS.get(key) or ord(key.upper())}


def _found(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"


def wait_until(holds: Callable[[], Any], what: str) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)

"""A headless browser for tests, driven over a pipe by its DevTools protocol.

    with Browser() as browser:
        browser.open(path)

No driver is needed, only Debian's chromium.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """A page in a browser of its own.

    Attributes:
        errors: messages of errors and warnings on the console, and uncaught exceptions.
        requests: every address that was asked for.
    """

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.size = {"width": width, "height": height}
        self.scheme = "dark" if dark else "light"

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # The browser reads from file descriptor 3 and writes to 4.
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"',
                "bash",
                EXECUTABLE,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-pipe",
                f"--user-data-dir={self.profile.name}",
                "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.output, self.input = ours_out, os.fdopen(ours_in, "rb")
        self.count, self.session, self.buffer = 0, None, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, mobile=False, **self.size
        )
        scheme = {"name": "prefers-color-scheme", "value": self.scheme}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.output)
        self.input.close()
        self.profile.cleanup()

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"]["value"]

    def cut_off(self) -> None:
        """Switch the network off."""
        self.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def wait_until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true, at most some hundred frames."""
        for _ in range(300):
            if self.evaluate(expression):
                return
            time.sleep(0.02)
        raise AssertionError(expression[:200])

    def box(self, selector: str) -> list[float]:
        """Left, top, right and bottom of the first element that a selector finds."""
        name = json.dumps(selector)
        return self.evaluate(
            f"(b => [b.left, b.top, b.right, b.bottom])"
            f"(document.querySelector({name}).getBoundingClientRect())"
        )

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        """Send mouseMoved, mousePressed or mouseReleased, at a place in the window."""
        held = {"button": "left", "buttons": 1, "clickCount": clicks} if clicks else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def click(self, x: float, y: float, clicks: int = 1) -> None:
        """Click at a place in the window."""
        for count in range(1, clicks + 1):
            self.mouse("mousePressed", x, y, count)
            self.mouse("mouseReleased", x, y, count)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        got = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a DevTools command and wait for its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            read = self.input.read1(1 << 16)
            assert read, "the browser has ended"
            self.buffer += read
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.errors.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])
        return message

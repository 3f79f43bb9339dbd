"""A headless Chromium over its debugging pipe: enough to open a page, run a line of script, and hear what went wrong."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path


def find() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """`problems` collects console errors and exceptions, `requests` every address that the page asked for."""

    def __init__(self, width: int = 1280, height: int = 1000, dark: bool = False):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The browser speaks on descriptors 3 and 4; high numbers here cannot collide with them.
        to_read, to_write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_read, to_write))
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-dev-shm-usage"
        self._process = subprocess.Popen(
            [find(), *flags.split(), "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(to_read, 3), os.dup2(to_write, 4)),
            pass_fds=(3, 4),
        )
        os.close(to_read), os.close(to_write)
        self._buffer, self._count = b"", 0
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self._count:
                assert "error" not in reply, reply["error"]
                return reply["result"]

    def _next(self) -> dict:
        while b"\0" not in self._buffer:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser went away"
            self._buffer += data
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(raw)
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif kind == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(json.dumps(params["args"])[:500])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def open(self, path: Path, ready: str = "document.documentElement?.dataset.ready === 'yes'") -> None:
        self.requests.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 60
        while not self.run(ready):
            assert time.monotonic() < deadline, f"the page never became ready: {self.problems}"
            time.sleep(0.1)

    def run(self, script: str):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, path: str, full: bool = True) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        os.close(self._read), os.close(self._write)
        self._profile.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

"""The HTML report in a real browser: it fits a phone, asks for nothing, and has no errors."""

import base64
import io
import json
import os
import shutil
import subprocess
from itertools import count

import numpy as np
import pytest
from PIL import Image

from compressor.html_report import GalleryImage, write_html
from compressor.report import ValidityRow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS_PIXELS = (320, 390, 820, 1400)

pytestmark = [
    pytest.mark.workflow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
]


class Browser:
    """Headless Chromium, spoken to through pipes in its DevTools protocol."""

    def __init__(self, profile):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND"]
        flags += [f"--user-data-dir={profile}", "--no-first-run", "about:blank"]
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, *flags],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._numbers, self._session, self.events = b"", count(1), None, []
        page = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        message = {"id": next(self._numbers), "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path, *, width_pixels, scheme="light"):
        """Load a page as a window of that width and that taste would; forget events before."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width_pixels, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Emulation.setEmulatedMedia", features=features)
        self.events = []
        self("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, script):
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"]["value"]

    def screenshot(self):
        height = self.evaluate("document.documentElement.scrollHeight")
        width = self.evaluate("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def close(self):
        self._session = None
        self("Browser.close")
        self._process.wait(timeout=10)
        os.close(self._to)
        os.close(self._from)

    def _receive(self):
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser went away"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(line)
        if "method" in answer:
            self.events.append(answer)
        return answer

"""The HTML report in a real browser: it fits a phone, asks for nothing, and has no errors."""

import base64
import io
import json
import os
import select
import shutil
import subprocess
from itertools import count

import numpy as np
import pytest
from PIL import Image

from compressor.reports.html import GalleryImage, write_html
from compressor.reports.report import RobustnessReport, ValidityRow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS_PIXELS = (320, 390, 820, 1400)
TIMEOUT_SECONDS = 20

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
            is_there, _, _ = select.select([self._from], [], [], TIMEOUT_SECONDS)
            part = os.read(self._from, 1 << 20) if is_there else b""
            assert part, "the browser went away, or says nothing"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(line)
        if "method" in answer:
            self.events.append(answer)
        return answer


POISON = '"><script>hacked=1</script><img src=x onerror=hacked=1>'
TROUBLE = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
STATUSES = ("verified", "incomplete", "unverified", "invalid")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, make_report):
    """One page for each status, with a gallery, curves and a name that is long."""
    folder = tmp_path_factory.mktemp("pages")
    levels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    image = GalleryImage(
        group="closest",
        index=1,
        label=1,
        attack="pgd_sat",
        clean_HWC=levels,
        adv_HWC=levels + 8,
        clean_confidence_fraction=0.9,
        adv_confidence_fraction=0.8,
        adv_prediction=2,
        distance_pixels=8 / 255,
        margin=-1.0,
    )
    lines = [{"kind": "step", "step": step, "loss_nats": 1 / step} for step in (1, 2, 3)]
    alarm = ValidityRow(
        name="zero_gradient",
        status="alarm",
        found="9 of 10",
        threshold="alarm above 1 %",
        p_value=None,
        advice="a very long advice " * 20,
    )
    changes = {"invalid": {"validity": (alarm,)}, "unverified": {"worst_case": None}}
    for status in STATUSES:
        report = make_report(
            status=status, name="a_long_name_without_spaces_" * 6, **changes.get(status, {})
        )
        write_html(folder / f"{status}.html", report, gallery=[image], curves=lines)
    return folder


@pytest.mark.parametrize("width_pixels", WIDTHS_PIXELS)
@pytest.mark.parametrize("status", STATUSES)
def test_page_fits_and_is_quiet(status, width_pixels, browser, pages):
    page = pages / f"{status}.html"
    browser.open(page, width_pixels=width_pixels)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width_pixels
    word = "document.querySelector('.verdict .word')"
    assert browser.evaluate(f"{word}.textContent") == status.capitalize()
    assert browser.evaluate(f"{word}.getBoundingClientRect().bottom") < 800
    assert [event for event in browser.events if event["method"] in TROUBLE] == []
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth == 8)")


def test_page_follows_the_taste_of_its_reader(browser, pages):
    """The page, and the figures in it."""
    found = {}
    for scheme in ("light", "dark"):
        browser.open(pages / "verified.html", width_pixels=390, scheme=scheme)
        shot = Image.open(io.BytesIO(browser.screenshot())).convert("L")
        text = "getComputedStyle(document.querySelector('svg text')).fill"
        found[scheme] = (shot.getpixel((2, 2)), browser.evaluate(text))
        assert shot.width == 390
    assert found["light"][0] > 240
    assert found["dark"][0] < 40
    assert found["light"][1] != found["dark"][1]


def test_tables_scroll_in_their_own_box(browser, pages):
    browser.open(pages / "verified.html", width_pixels=320)
    boxes = "[...document.querySelectorAll('.scroll')]"
    assert browser.evaluate(f"{boxes}.some(box => box.scrollWidth > box.clientWidth)")
    assert browser.evaluate(f"{boxes}.every(box => getComputedStyle(box).overflowX == 'auto')")


def test_nothing_of_strangers_runs(browser, make_report, tmp_path):
    table = make_report().model_dump(mode="json")
    table |= {"name": POISON, "status_reason": POISON, "protocol": POISON, "caveat": POISON}
    table["data"]["class_names"] = [f"{POISON}{place}" for place in range(4)]
    table["environment"][POISON] = POISON
    report = RobustnessReport.model_validate(table)
    write_html(tmp_path / "report.html", report, gallery=[], curves=[])
    without_policy = (tmp_path / "report.html").read_text().replace("Content-Security-Policy", "")
    (tmp_path / "open.html").write_text(without_policy)
    for name in ("report.html", "open.html"):
        browser.open(tmp_path / name, width_pixels=390)
        assert browser.evaluate("typeof hacked") == "undefined"
        assert browser.evaluate("document.scripts.length + document.images.length") == 0
        assert browser.evaluate("document.querySelector('h1').textContent") == POISON
        assert [event for event in browser.events if event["method"] in TROUBLE] == []

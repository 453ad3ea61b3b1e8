"""The HTML page: complete, self-contained, the numbers of Markdown, and safe from strangers."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

import compressor.reports.html
from compressor.reports.figures import report_figures
from compressor.reports.html import GalleryImage, to_html, write_html
from compressor.reports.markdown import to_markdown
from compressor.reports.report import RobustnessReport, ValidityRow
from compressor.reports.training_figures import training_figures

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What is in a page: (tag, attributes), texts, and text by tag; it must be well nested."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style" and data.strip():
            self.texts.append((self._open[-1], " ".join(data.split())))

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]

    def headings(self):
        return [(int(tag[1]), text) for tag, text in self.texts if re.fullmatch("h[1-6]", tag)]

    def values(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def picture(*, num_channels=3, offset=0, height=3, width=4):
    size = height * width * num_channels
    levels = (np.arange(size) + offset) % 200 + 20
    return levels.reshape(height, width, num_channels).astype(np.uint8)


def shown(**changes):
    values = {
        "group": "clearest",
        "index": 7,
        "label": 1,
        "attack": "pgd_sat",
        "clean_HWC": picture(),
        "adv_HWC": picture(offset=2),
        "clean_confidence_fraction": 0.9,
        "adv_confidence_fraction": 0.8,
        "adv_prediction": 2,
        "distance_pixels": 7.5 / 255,
        "margin": -3.25,
    }
    return GalleryImage(**(values | changes))


ALARM = ValidityRow(
    name="zero_gradient",
    status="alarm",
    found="9 of 10 images have a zero gradient",
    threshold="alarm above 1 %",
    p_value=1e-9,
    advice="Attack through a differentiable stand-in.",
)
STEPS = [
    {
        "kind": "step",
        "step": step,
        "loss_nats": 2 / step,
        "clean_loss_nats": 1 / step,
        "robust_loss_nats": 3 / step,
        "clean_temperature_ratio": 1 + step / 100,
        "robust_temperature_ratio": 1.0,
        "clean_weight_fraction": 0.5,
        "robust_weight_fraction": 0.5,
    }
    for step in range(1, 30)
]
VALIDATIONS = [
    {
        "kind": "validation",
        "epoch": epoch,
        "candidate": candidate,
        "clean_correct": 10 + epoch,
        "robust_correct": 5 + epoch,
        "num_validation": 20,
        "is_best": epoch == 2,
    }
    for epoch in (1, 2, 3)
    for candidate in ("weights", "average")
]


@pytest.fixture(scope="module")
def text(make_report):
    return to_html(make_report(), gallery=[shown()], curves=STEPS + VALIDATIONS)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture
def without_figures(make_report):
    """A report whose page takes no time to draw."""
    names = tuple(f"kind {place}" for place in range(31))
    data = make_report().data.model_copy(update={"class_names": names})
    return make_report(curve=(), data=data).model_copy(update={"attacks": ()})


def decoded(uri):
    kind, _, content = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def cells(markdown):
    """Of all rows of tables under a heading, as they are shown."""
    under_headings = markdown.partition("\n## ")[2]
    rows = [line.strip("| ").split("|") for line in under_headings.splitlines() if line[:1] == "|"]
    return {cell.replace("\\", "").strip() for row in rows for cell in row if "---" not in cell}


def test_verdict_is_the_first_thing(page):
    order = [text for _, text in page.texts]
    assert order[:5] == ["Verified: tiny", "Robustness report", "tiny", "Verified", order[4]]
    assert order[4].startswith("Every planned image went through every attack")
    at = order.index("50.00 %")
    assert order[at + 1] == "Accuracy, worst case under AutoAttack-style, Linf, epsilon = 8/255"
    assert order[at + 2].startswith("5 of 10, 95 % interval 18.71 to 81.29 %; mean of both (W-Rob")
    assert at < order.index("Accuracy against epsilon")


def test_sections_come_in_order(page):
    assert page.headings() == [
        (1, "tiny"),
        (2, "Accuracy against epsilon"),
        (2, "Which attack broke how many"),
        (2, "Accuracy per class"),
        (2, "Confusion under attack"),
        (2, "Adversarial images"),
        (3, "The clearest: the highest confidence in a wrong answer"),
        (2, "Training"),
        (2, "Validity checks"),
        (2, "Rounding to 8 bits"),
        (2, "What the model costs"),
        (2, "Provenance"),
    ]


def test_has_every_cell_of_the_markdown(make_report, page):
    have = {text for tag, text in page.texts if tag in ("td", "th")}
    want = cells(to_markdown(make_report())) - {""}
    assert len(want) > 60
    assert want <= have


def test_stands_alone(text, page):
    loaded = page.values("src") + page.values("href") + page.values("xlink:href")
    assert loaded
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in loaded)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {t for t, _ in page.tags}
    policy = next(meta for meta in page.all("meta") if "http-equiv" in meta)["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_is_accessible(page):
    assert page.all("html") == [{"lang": "en"}]
    levels = [level for level, _ in page.headings()]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    figures = [attrs for attrs in page.all("div") if attrs.get("role") == "img"]
    assert len(figures) == len(page.all("svg")) == 8
    assert all(len(attrs["aria-label"]) > 20 for attrs in figures)
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert all(attrs["scope"] in ("col", "row") for attrs in page.all("th"))


def test_ids_are_unique_and_found(text, page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = [value[1:] for value in page.values("href")] + re.findall(r"url\(#([^)]+)\)", text)
    assert used
    assert set(used) <= set(ids)


def test_figures_take_the_colours_of_the_page(page):
    styles = " ".join(page.values("style"))
    assert set(re.findall(r"(?:fill|stroke): ([^;\s]+)", styles)) <= {
        "none",
        "currentColor",
        "var(--accent)",
        "var(--muted)",
        "var(--line)",
    }
    assert "font-family" not in styles


def test_colours_can_be_read():
    """WCAG 2.1, 1.4.3: text has a contrast of 4.5 to what is behind it, in every scheme."""
    source = Path(compressor.reports.html.__file__).with_name("report.html.j2").read_text()
    schemes = re.findall(r":root \{(.*?)\}", source, flags=re.DOTALL)
    assert len(schemes) == 3
    pairs = [
        (ink, page) for ink in ("ink", "muted", "accent", "alarm") for page in ("page", "wash")
    ]
    pairs += [("on-strong", "accent"), ("on-strong", "alarm")]
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): #(\w{6})", scheme))
        for ink, behind in pairs:
            bright, dark = sorted((luminance(colours[ink]), luminance(colours[behind])))[::-1]
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (ink, behind)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_same_input_gives_same_bytes_whatever_the_style_of_the_user(make_report, text):
    with mpl.rc_context({"font.size": 30, "xtick.major.size": 20}):
        again = to_html(make_report(), gallery=[shown()], curves=STEPS + VALIDATIONS)
        assert mpl.rcParams["font.size"] == 30
    assert again == text


def test_is_written_as_it_is(without_figures, tmp_path):
    write_html(tmp_path / "report.html", without_figures, gallery=[], curves=[])
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert written == to_html(without_figures, gallery=[], curves=[])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert Page(written).all("img") == []


def test_invalid_page_has_its_alarms_before_its_numbers(make_report):
    report = make_report(status="invalid", validity=(ALARM,))
    page = Page(to_html(report, gallery=[shown()], curves=STEPS[:2]))
    assert page.headings()[:4] == [
        (1, "tiny"),
        (2, "Alarms"),
        (2, "Numbers that are not to be believed"),
        (3, "Accuracy against epsilon"),
    ]
    levels = {text: level for level, text in page.headings()}
    assert levels["Adversarial images"] == levels["Accuracy per class"] == 3
    order = [text for _, text in page.texts]
    distrusted = order.index("Numbers that are not to be believed")
    assert not any("80.00 %" in text or "50.00 %" in text for text in order[:distrusted])
    assert any(ALARM.advice in text for text in order[:distrusted])
    captions = [text for tag, text in page.texts if tag == "figcaption"]
    assert [c.startswith("Not to be believed.") for c in captions] == [True] * 4 + [False] * 3


def test_unverified_page_shows_no_accuracy_under_attack(make_report):
    """Nor one that a stranger put there against the status."""
    report = make_report().model_copy(update={"status": "unverified"})
    page = Page(to_html(report, gallery=[], curves=[]))
    said = " ".join(text for _, text in page.texts) + " ".join(page.values("aria-label"))
    assert "80.00 %" in said
    assert "50.00 %" not in said
    assert "under attack, 95" not in said
    assert len(page.all("svg")) == 2


@pytest.mark.parametrize(("num_classes", "is_drawn"), [(30, True), (31, False)])
def test_figures_by_class_are_drawn_while_there_is_room(num_classes, is_drawn, make_report):
    names = tuple(f"kind {place}" for place in range(num_classes))
    data = make_report().data.model_copy(update={"class_names": names})
    report = make_report(data=data, curve=()).model_copy(update={"attacks": ()})
    assert set(report_figures(report)) == ({"classes", "confusion"} if is_drawn else set())


def test_figures_say_what_they_show(make_report):
    pictures = report_figures(make_report())
    assert "80.00 % at 0/255, 60.00 % at 4/255" in pictures["curve"].alt
    assert "chance is 25.00 %" in pictures["curve"].alt
    assert "10 images at each point" in pictures["curve"].caption
    assert "pgd_sat broke 3 of 8, 5 stand" in pictures["attacks"].alt
    assert "3 of 8 broken" in pictures["attacks"].svg
    assert "2 to 3 images of each" in pictures["classes"].caption
    assert "one taken for two, 2 images" in pictures["confusion"].alt


def test_training_figures_are_those_that_the_run_has():
    assert len(training_figures(STEPS + VALIDATIONS)) == 4
    assert len(training_figures([{"kind": "step", "step": 1, "loss_nats": 1.0}])) == 1
    assert training_figures([]) == ()
    losses, accuracy, *_ = training_figures(STEPS + VALIDATIONS)
    assert "loss_nats from 2 to 0.069" in losses.alt
    assert "13 clean and 8 robust of 20; selected: epoch 2" in accuracy.alt


def test_loss_that_is_no_number_is_left_out():
    broken = [{"kind": "step", "step": 3, "loss_nats": float("nan")}]
    (losses,) = training_figures([{"kind": "step", "step": 1, "loss_nats": 1.0}, *broken])
    assert losses.alt == "Over the steps: loss_nats from 1 to 1."
    assert training_figures(broken) == ()


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_gallery_shows_the_pixels(num_channels, nested, without_figures):
    clean = picture(num_channels=num_channels)
    adv = clean.copy()
    adv[0, 0], adv[1, 1] = clean[0, 0] + 8, clean[1, 1] - 4
    given = [[[bytes(p) for p in row] for row in x] if nested else x for x in (clean, adv)]
    image = shown(clean_HWC=given[0], adv_HWC=given[1])
    page = Page(to_html(without_figures, gallery=[image], curves=[]))
    original, adversarial, change = (decoded(attrs["src"]) for attrs in page.all("img"))
    np.testing.assert_array_equal(original.reshape(clean.shape), clean)
    np.testing.assert_array_equal(adversarial.reshape(adv.shape), adv)
    change = change.reshape(clean.shape)
    scale = 127 // 8
    assert set(change[0, 0]) == {128 + 8 * scale}
    assert set(change[1, 1]) == {128 - 4 * scale}
    assert set(change[2, 3]) == {128}
    assert page.all("img")[0]["width"] == "4"
    said = " ".join(text for _, text in page.texts)
    assert f"change × {scale}" in said
    assert "kind 1 → kind 2" in said
    assert "90.00 % → 80.00 % confident" in said
    assert "distance 7.50/255, pgd_sat, image 7, logit margin -3.25" in said


def test_a_change_of_more_than_half_the_scale_is_shown(without_figures):
    """It is possible in L2; it may not fit, but it is not nothing, and does not wrap around."""
    clean = np.full((4, 4, 1), 10, dtype=np.uint8)
    adv = clean.copy()
    adv[0, 0], adv[1, 1] = 250, 110
    image = shown(clean_HWC=clean, adv_HWC=adv)
    page = Page(to_html(without_figures, gallery=[image], curves=[]))
    change = decoded(page.all("img")[2]["src"]).reshape(4, 4)
    assert (change[0, 0], change[1, 1], change[2, 2]) == (255, 228, 128)
    assert "change × 1" in " ".join(text for _, text in page.texts)


def test_groups_of_the_gallery_keep_their_order(without_figures):
    l2 = without_figures.model_copy(update={"norm": "l2"})
    images = [shown(group="closest", index=1), shown(index=2), shown(group="closest", index=3)]
    page = Page(to_html(l2, gallery=images, curves=[]))
    said = [text for _, text in page.texts]
    facts = [re.search(r"image (\d)", text)[1] for text in said if text.startswith("L2 distance")]
    assert facts == ["2", "1", "3"]


def test_image_that_stands_is_said_to_stand(without_figures):
    text = to_html(without_figures, gallery=[shown(attack=None)], curves=[])
    assert "distance 7.50/255, stands, image 7" in text


def test_image_without_any_change_is_grey(without_figures):
    page = Page(to_html(without_figures, gallery=[shown(adv_HWC=picture())], curves=[]))
    assert set(decoded(page.all("img")[2]["src"]).ravel()) == {128}


@pytest.mark.parametrize(
    "wrong",
    [
        picture(num_channels=3)[:, :, :2],
        picture().astype(np.float32),
        picture()[:, :, 0],
        np.zeros((0, 4, 3), dtype=np.uint8),
        [[[300, 0, 0]]],
    ],
)
def test_what_is_no_image_is_refused(wrong, without_figures):
    with pytest.raises(ValueError, match="rows x columns x 1 or 3 channels of uint8"):
        to_html(without_figures, gallery=[shown(clean_HWC=wrong)], curves=[])


def test_images_of_two_shapes_are_refused(without_figures):
    with pytest.raises(ValueError, match="image 7: shapes"):
        to_html(without_figures, gallery=[shown(adv_HWC=picture(height=2))], curves=[])


def test_page_stays_small_with_large_images(without_figures):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    images = [shown(clean_HWC=noise[0], adv_HWC=noise[1])] * 24
    text = to_html(without_figures, gallery=images, curves=STEPS)
    assert len(text.encode()) < 1_500_000
    assert "every 5th row and column" in text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'></title></style><svg onload=alert(1)>",
    "]]> --> </text></svg><iframe>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "$\\frac{ $ 漢字 \u202e",
    "a\x00\x07\n\tb",
]


def poisoned(value, poison):
    """Every free text of a report with `poison` before it."""
    if isinstance(value, dict):
        fixed = ("status", "kind", "role", "norm", "looks")
        return {key: v if key in fixed else poisoned(v, poison) for key, v in value.items()}
    if isinstance(value, list):
        return [poisoned(item, poison) for item in value]
    return poison + value if isinstance(value, str) and value != "clean" else value


@pytest.mark.parametrize("poison", HOSTILE)
def test_text_of_strangers_stays_text(poison, make_report, page):
    table = poisoned(make_report().model_dump(mode="json"), poison)
    table["environment"][poison] = {poison: [poison]}
    table["attacks"][0]["parameters"][poison] = poison
    report = RobustnessReport.model_validate(table)
    image = shown(attack=poison)
    found = Page(to_html(report, gallery=[image], curves=[]))
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in page.tags}
    names = {name for _, attrs in found.tags for name in attrs}
    assert names == {name for _, attrs in page.tags for name in attrs}
    sources = found.values("src") + found.values("href")
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    said = [text for _, text in found.texts]
    visible = " ".join(poison.split())
    assert sum(visible in text for text in said) > 30


def test_half_a_surrogate_pair_can_be_written(without_figures, tmp_path):
    report = without_figures.model_copy(update={"name": "a\ud800b"})
    write_html(tmp_path / "report.html", report, gallery=[], curves=[])
    assert "a?b" in (tmp_path / "report.html").read_text(encoding="utf-8")

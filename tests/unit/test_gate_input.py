"""Reports from strangers: whatever is in the file, the gate says what is wrong with it."""

import hashlib
import json
import re

import pytest

from compressor.errors import ArtefactMismatchError, RunError
from compressor.gate.input import read_baseline, read_gated_report
from compressor.gate.policy import GatePolicy, with_baseline
from compressor.proportions import Proportion
from compressor.reports.report import Count, write_report


@pytest.fixture
def written(make_report, tmp_path):
    """A good report on disk, and its tables."""
    path = tmp_path / "report.json"
    write_report(make_report(), path)
    return path, json.loads(path.read_text())


def spoilt(written, change):
    path, table = written
    change(table)
    path.write_text(json.dumps(table))
    return path


def put(*place, value):
    """Sets one value deep in the report."""

    def change(table):
        for key in place[:-1]:
            table = table[key]
        table[place[-1]] = value

    return change


def count(*place, num_correct, num_total=10):
    """Puts a count that is right but for what it counts."""
    proportion = Proportion(num_correct=num_correct, num_total=num_total)
    return put(*place, value=Count.of(proportion).model_dump())


NAN, HUGE = float("nan"), 10**400
REFUSED = {
    "nan epsilon": (put("epsilon_pixels", value=NAN), "epsilon_pixels.* finite number"),
    "infinite epsilon": (put("epsilon_pixels", value=float("inf")), "epsilon_pixels.* finite"),
    "huge epsilon": (put("epsilon_pixels", value=1e308), r"epsilon_pixels is 1e\+308"),
    "negative epsilon": (put("epsilon_pixels", value=-0.1), "epsilon_pixels is -0.1"),
    "zero epsilon": (put("epsilon_pixels", value=0), "epsilon_pixels is 0"),
    "nan latency": (put("cost", 0, "latency_ms", value=NAN), r"cost\.0\.latency_ms.* finite"),
    "huge count": (put("clean", "num_total", value=HUGE), "is not a report"),
    "large count": (put("clean", "num_total", value=10**15), "is not a report"),
    "counts against samples": (count("clean", num_correct=9), "clean is 9 of 10, samples say 8"),
    "attack above clean": (
        count("attacks", 0, "accuracy", num_correct=9),
        "accuracy under pgd_sat alone",
    ),
    "attack that broke nothing": (
        count("attacks", 0, "accuracy", num_correct=6),
        "accuracy under pgd_sat alone",
    ),
    "attack on fewer images": (
        count("attacks", 0, "accuracy", num_correct=5, num_total=5),
        "accuracy under pgd_sat alone",
    ),
    "negative count": (
        put("attacks", 0, "accuracy", "num_correct", value=-1),
        "-1 of 10 is not a proportion",
    ),
    "broken against samples": (put("attacks", 0, "num_broken", value=0), "pgd_sat broke 0"),
    "label out of range": (put("samples", "label", 0, value=7), "a label in samples"),
    "negative label": (put("samples", "label", 0, value=-1), "a label in samples"),
    "class twice": (put("data", "class_names", 1, value="zero"), "two classes have the same name"),
    "attack twice": (put("attacks", 2, "name", value="apgd_t"), "two attacks"),
    "more than planned": (put("data", "num_planned", value=5), "5 were planned"),
    "another schema": (put("schema_version", value=1), "is not a report of schema 2"),
    "unknown key": (put("trust", value="me"), "trust: Extra inputs"),
    "text for a number": (put("clean", "num_correct", value="many"), r"clean\.num_correct"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(written, change, says):
    path = spoilt(written, change)
    with pytest.raises(RunError, match=says) as caught:
        read_gated_report(path)
    assert "robust-compress verify RUN" in str(caught.value)


def test_no_images_at_all(written):
    def change(table):
        table["status"], table["worst_case"], table["attacks"] = "unverified", None, []
        table["samples"] = {key: [] for key in table["samples"]}
        table["clean"] |= {"num_correct": 0, "num_total": 0}

    with pytest.raises(RunError, match="0 of 0 is not a proportion"):
        read_gated_report(spoilt(written, change))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "is not a report"),
        (b"null", "is not a report"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b'{"name": ' + b"1" * 5_000 + b"}", "cannot be read"),
    ],
)
def test_not_even_json(tmp_path, content, says):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=says):
        read_gated_report(path)


@pytest.mark.parametrize("depth", [300, 900, 3_000])
def test_deep_nesting_is_refused_or_read_but_never_a_traceback(written, depth):
    path, table = written
    text = json.dumps(table)
    deep = "[" * depth + "]" * depth
    path.write_text(text.replace('"num_threads": 2', f'"num_threads": {deep}'))
    try:
        assert read_gated_report(path).name == "tiny"
    except RunError as error:
        assert re.search("is not a report|cannot be read", str(error))  # noqa: PT017 (either end is right)


def test_missing(tmp_path):
    with pytest.raises(RunError, match="nowhere does not exist; make it with"):
        read_gated_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"report\.json does not exist"):
        read_gated_report(tmp_path)


def test_good_ones_are_read_from_a_file_and_from_a_run(written, make_report):
    path, _ = written
    assert read_gated_report(path) == read_gated_report(path.parent) == make_report()


def test_baseline_is_read_where_the_policy_names_one(written, make_report):
    policy = GatePolicy.model_validate({"schema": 1, "clean": {"min_accuracy": 0.5}})
    assert read_baseline(policy) is None
    assert read_baseline(with_baseline(policy, written[0])) == make_report()


def test_a_run_is_not_judged_by_the_report_of_other_weights(make_report, tmp_path):
    """They may have been put there after the verification."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    facts = make_report().target.model_copy(update={"sha256": sha256})
    write_report(make_report(target=facts), tmp_path / "report.json")
    assert read_gated_report(tmp_path).target.sha256 == sha256
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ArtefactMismatchError, match=f"is about weights with SHA-256 {sha256[:12]}"):
        read_gated_report(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # a report travels without its weights
    assert read_gated_report(tmp_path).target.sha256 == sha256


@pytest.mark.parametrize("kind", ["weights", "onnx"])
def test_a_run_is_not_judged_by_the_report_of_a_file(make_report, tmp_path, kind):
    """`verify FILE --out RUN` puts one there."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    facts = make_report().target.model_copy(update={"kind": kind})
    write_report(make_report(target=facts), tmp_path / "report.json")
    with pytest.raises(ArtefactMismatchError, match=f"not about this run but about .*'{kind}'"):
        read_gated_report(tmp_path)
    assert read_gated_report(tmp_path / "report.json").target.kind == kind

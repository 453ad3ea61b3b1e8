"""A manifest that could mislead is refused: other schemas, odd names, tables that disagree."""

import json

import pytest

from compressor.errors import ArtefactMismatchError
from exporters.bundle.manifest import Drop, HopFacts, parse_manifest, printable
from tests.unit.bundle_models import ENGINE, hop, make_bundle


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, make_report):
    return make_bundle(
        tmp_path_factory.mktemp("bundle"), tmp_path_factory.mktemp("models"), make_report
    )


@pytest.fixture
def table(manifest):
    return json.loads(manifest.to_json())


def refusal(table):
    with pytest.raises(ArtefactMismatchError) as caught:
        parse_manifest(json.dumps(table).encode() if isinstance(table, dict) else table)
    assert caught.value.exit_code == 5
    assert "nothing was run" in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_manifest_reads_back_as_it_was_written(manifest):
    content = manifest.to_json()
    assert parse_manifest(content) == manifest
    assert parse_manifest(content).to_json() == content
    assert content.endswith(b"}\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"schema_version": "1"}, "schema_version"),
        ({"kind": "something else"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"recipe_id": 7}, "recipe_id"),
        ({"class_names": "cat"}, "class_names"),
        ({"class_names": ["cat\x1b[2J"]}, "class_names.0"),
        ({"class_names": ["cat\u0085"]}, "class_names.0"),
        ({"source_sha256": "B" * 64}, "source_sha256"),
        ({"source_sha256": "b" * 63}, "source_sha256"),
        ({"threat": {"norm": "linf", "epsilon_pixels": 0}}, "threat.epsilon_pixels"),
        ({"threat": {"norm": "linf", "epsilon_pixels": 1e300}}, "threat.epsilon_pixels"),
        ({"threat": {"norm": "l7", "epsilon_pixels": 0.1}}, "threat.norm"),
        ({"models": []}, "no ONNX file"),
        ({"files": {}}, "no build kit"),
    ],
)
def test_a_wrong_table_is_refused_and_its_place_is_named(table, change, named):
    assert named in refusal(table | change)


def test_what_is_left_out_is_named(table):
    for key in set(table) - {"schema_version", "kind"}:
        assert key in refusal({k: v for k, v in table.items() if k != key})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"schema_version": 1' + b"0" * 10_000 + b"}",
        b"\xff\xfe",
        b"NaN",
    ],
)
def test_what_is_no_json_is_refused(content):
    refusal(content)


def test_numbers_of_a_thousand_digits_are_refused(table):
    text = json.dumps(table).replace('"num_total": 100', f'"num_total": 1{"0" * 1000}', 1)
    refusal(text.encode())


def test_a_file_may_not_be_a_folder_too(table):
    facts = {"sha256": "0" * 64, "num_bytes": 0}
    for name in ("kit", "kit/device", "kit/kit.json/x"):
        changed = table | {"files": table["files"] | {name: facts}}
        assert "cannot be the name of a file" in refusal(changed)


@pytest.mark.parametrize("size", [-1, "9", 9.5, True, None])
def test_a_size_that_is_no_count_is_refused(table, size):
    table["files"]["README.md"]["num_bytes"] = size
    assert "files.README.md.num_bytes" in refusal(table)


def test_a_file_has_one_hash(table):
    table["models"][0]["sha256"] = "0" * 64
    assert "two hashes, or none, of 'kit/model.fp32.onnx'" in refusal(table)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("onnx_file", "kit/model.other.onnx", "is not the engine of an ONNX file of the bundle"),
        ("onnx_file", "kit/model.fp32.onnx", "is not the engine of an ONNX file of the bundle"),
        ("sidecar", "README.md", "has no sidecar"),
        ("file", "kit/model.fp16.onnx", "two hashes, or none"),
        ("status", "PASS", "engines.0.status"),
    ],
)
def test_an_engine_is_that_of_its_onnx_file(table, key, value, says):
    table["engines"][0][key] = value
    assert says in refusal(table)


def test_an_engine_without_its_sidecar_is_refused(table):
    del table["files"][f"{ENGINE}.json"]
    assert "has no sidecar" in refusal(table)


def test_reports_and_gates_are_about_what_is_in_the_bundle(table):
    for part, key in (("reports", "target_sha256"), ("gate", "model_sha256")):
        row = table[part][0]
        for change in ({key: "0" * 64}, {"file": "reports/absent.json"}):
            changed = table | {part: [row | change]}
            assert "is missing, or is about nothing in the bundle" in refusal(changed)


def test_none_means_not_gated(table):
    assert parse_manifest(json.dumps(table | {"gate": None}).encode()).gate is None


def test_proportions_and_drops_have_exact_intervals(table):
    """Or a stranger could write a narrower one."""
    shown = table["models"][0]["hop"]
    shown["robust"]["low_95"] += 0.01
    assert "models.0.hop.robust" in refusal(table)
    shown["robust"]["low_95"] -= 0.01
    for key in ("fraction", "low_95", "high_95"):
        kept = shown["robust_drop"][key]
        shown["robust_drop"][key] = kept - 0.01
        assert "models.0.hop.robust_drop" in refusal(table)
        shown["robust_drop"][key] = kept
    shown["robust_drop"]["num_newly_broken"] = 101
    assert "is not a paired difference" in refusal(table)


def test_a_drop_is_that_of_its_counts():
    drop = Drop(**hop()["clean_drop"])
    assert (drop.fraction, drop.num_total) == (0.02, 100)
    with pytest.raises(ValueError, match="is not the drop 2.00 points"):
        Drop(**hop()["clean_drop"] | {"fraction": 0.0})


def test_reasons_are_one_line():
    shown = HopFacts.of(hop(reason="one\ntwo \x1b[2J"))
    assert shown.reason == "one\\ntwo \\x1b[2J"


def test_plain_text_stays_as_it_is():
    assert printable("größer als ½, 8/255") == "größer als ½, 8/255"
    assert printable("a\x00b") == "a\\x00b"

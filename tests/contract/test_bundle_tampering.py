"""Whatever is changed in a bundle is named, ends with exit code 5, and nothing of it is run."""

import json
import os
import shutil
import subprocess

import pytest

import exporters.bundle.engines
import exporters.bundle.verification
from compressor.device.kit_files import sha256_of
from tests.unit.bundle_models import ENGINE, copied, make_bundle, resign, rewrite, verify

FILES = [
    "README.md",
    "engines/model.fp16.engine",
    "engines/model.fp16.engine.json",
    "kit/README.md",
    "kit/build_engine.py",
    *(
        f"kit/device/{name}.py"
        for name in (
            *("__init__", "build_engine", "build_network", "build_options", "build_progress"),
            *("builder", "cuda", "engine", "kit_files", "onnx_session", "replay"),
            "tensorrt_runtime",
        )
    ),
    "kit/golden.npz",
    "kit/kit.json",
    *(f"kit/model.{precision}.onnx" for precision in ("fp16", "fp32", "int8")),
    "kit/replay.py",
    "reports/gate.student.json",
    "reports/report.student.json",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_report):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    manifest = make_bundle(folder, tmp_path_factory.mktemp("models"), make_report)
    assert sorted(manifest.files) == FILES  # so that none is forgotten below
    return folder


@pytest.fixture
def bundle(original, tmp_path):
    return copied(original, tmp_path / "bundle")


@pytest.fixture
def refused(bundle, monkeypatch, capsys):
    """Verifies the bundle, which must fail and name `names`, with nothing opened and no process."""
    opened = []

    def spy(*arguments, **_options):
        opened.append(arguments)
        raise AssertionError("something was run")

    monkeypatch.setattr("compressor.device.replay.OnnxSession", spy)
    monkeypatch.setattr(exporters.bundle.engines, "_run", spy)
    monkeypatch.setattr(subprocess, "Popen", spy)
    monkeypatch.setattr(exporters.bundle.verification, "why_no_engine_runs_here", lambda: None)

    def check(*names, options=()):
        shown = verify(bundle, monkeypatch, capsys, *options)
        assert shown.code == 5, shown
        assert opened == []
        for name in names:
            assert name in shown.out + shown.err
        assert "Traceback" not in shown.err
        assert "PASS" not in shown.out
        return shown

    return check


def test_the_bundle_passes_as_it_is(bundle, monkeypatch, capsys):
    """Or all that follows would show nothing."""
    shown = verify(bundle, monkeypatch, capsys)
    assert shown.code == 0, shown
    assert shown.out.count("PASS  kit/model.") == 3
    assert "a hash beside a file is no trust anchor" in shown.out


def flip(path, *, place):
    content = bytearray(path.read_bytes())
    content[place * (len(content) - 1) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_named(bundle, refused, name):
    """The first, the middle and the last one; of some, a parser would not notice any."""
    good = (bundle / name).read_bytes()
    for place in range(3):
        flip(bundle / name, place=place)
        shown = refused(f"{name}: was changed: its sha256 is")
        assert shown.out.count("was changed") == 1
        (bundle / name).write_bytes(good)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle, refused, name):
    (bundle / name).unlink()
    refused(f"{name}: is missing")


@pytest.mark.parametrize("name", FILES)
def test_a_shorter_and_a_longer_file_are_named(bundle, refused, name):
    good = (bundle / name).read_bytes()
    for content in (good[:-1], good + b"\n", b""):
        (bundle / name).write_bytes(content)
        refused(f"{name}: was changed: it has {len(content):,} bytes, not {len(good):,}")


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_named(bundle, refused, name, tmp_path):
    """To the very same content, which could be changed later."""
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    refused(f"{name}: is a link")


@pytest.mark.parametrize("one", [0, 5, 20])
def test_two_swapped_files_are_both_named(bundle, refused, one):
    first, second = bundle / FILES[one], bundle / FILES[one + 1]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    refused(FILES[one], FILES[one + 1])


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "kit/sitecustomize.py",
        "kit/device/numpy.py",
        "engines/.hidden",
        "kit/model.fp32.engine",
    ],
)
def test_an_extra_file_is_named(bundle, refused, name):
    (bundle / name).write_bytes(b"")
    refused(f"{name}: is not in the manifest")


def test_an_extra_folder_is_named(bundle, refused):
    """What Python would load from `__pycache__` in place of a module has another name each time."""
    (bundle / "kit/device/__pycache__").mkdir()
    (bundle / "kit/device/__pycache__/replay.cpython-312.pyc").write_bytes(b"")
    refused("kit/device/__pycache__: is a folder that the manifest does not name", "in a copy")


@pytest.mark.parametrize("target", ["inside", "outside", "nowhere"])
def test_an_extra_link_and_a_linked_folder_are_named(bundle, refused, target, tmp_path):
    shutil.copytree(bundle / "kit/device", tmp_path / "outside")
    shutil.rmtree(bundle / "kit/device")
    paths = {"inside": bundle / "kit", "outside": tmp_path / "outside", "nowhere": "/nowhere"}
    (bundle / "kit/device").symlink_to(paths[target])
    refused("kit/device: is a link", "kit/device/__init__.py: is missing")


def test_what_is_no_file_is_named_and_not_waited_for(bundle, refused):
    (bundle / "kit/replay.py").unlink()
    os.mkfifo(bundle / "kit/replay.py")
    refused("kit/replay.py: is no plain file")


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(bundle, refused):
    (bundle / "README.md").unlink()
    (bundle / "README.md").mkdir()
    shutil.rmtree(bundle / "reports")
    (bundle / "reports").write_bytes(b"")
    refused("README.md: is a folder", "reports: is not in", "reports/gate.student.json: is missing")


def test_all_are_in_the_json_and_the_first_are_listed(bundle, refused):
    for name in FILES:
        flip(bundle / name, place=1)
    shown = refused(*FILES[:10], f"and {len(FILES) - 10} more")
    assert FILES[10] not in shown.out
    table = json.loads(refused(options=["--json"]).out)
    assert [row["file"] for row in table["problems"]] == FILES
    assert (table["verdict"], table["exit_code"], table["files"]) == ("FAIL", 5, [])


def test_names_that_steer_a_terminal_are_escaped(bundle, refused):
    (bundle / "\x1b[2J\nwell").write_bytes(b"")
    (bundle / os.fsdecode(b"\xff")).write_bytes(b"")
    shown = refused("\\x1b[2J\\nwell: is not in the manifest", "\\udcff: is not")
    assert "\x1b" not in shown.out


def test_a_changed_manifest_needs_a_trust_anchor(bundle, refused, monkeypatch, capsys):
    """Nothing in the bundle can vouch for the manifest: this change is only seen from outside."""
    trusted = sha256_of((bundle / "manifest.json").read_bytes())
    rewrite(bundle, lambda table: table.update(recipe_id="another"))
    refused(f"not {trusted}", "Nothing was run", options=["--manifest-sha256", trusted])


def test_every_byte_of_the_manifest_counts_under_its_hash(bundle, refused):
    path = bundle / "manifest.json"
    good = path.read_bytes()
    trusted = sha256_of(good)
    for place in range(0, len(good), len(good) // 40):
        changed = bytearray(good)
        changed[place] ^= 1
        path.write_bytes(changed)
        refused("manifest.json has the sha256", options=["--manifest-sha256", trusted.upper()])


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x00\xff", b"[" * 100_000, b"null", None])
def test_a_damaged_manifest_is_refused(bundle, refused, content):
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    refused("manifest.json")


def test_a_missing_manifest_is_refused(bundle, refused, monkeypatch):
    (bundle / "manifest.json").unlink()
    refused("manifest.json is missing, so nothing says what this bundle must be")


def test_a_linked_manifest_is_refused(bundle, refused, tmp_path):
    (bundle / "manifest.json").rename(tmp_path / "manifest.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "manifest.json")
    refused("manifest.json is no plain file")


NAMES = ["../x", "/etc/passwd", "kit/../x", "kit//x", "./x", ".x", "kit\\x", "", "a/b/c/d/e", "a b"]


@pytest.mark.parametrize("name", [*NAMES, "manifest.json", "manifest.sig", "kit", "x\n", "\u202e"])
def test_odd_names_in_the_manifest_are_refused(bundle, refused, name):
    facts = {"sha256": sha256_of(b""), "num_bytes": 0}
    rewrite(bundle, lambda table: table["files"].update({name: facts}))
    refused("cannot be the name of a file in a bundle")


def kit_table(bundle, **changes):
    path = bundle / "kit/kit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    resign(bundle, "kit/kit.json")


def test_a_kit_that_disagrees_with_the_manifest_is_refused(bundle, refused):
    table = json.loads((bundle / "kit/kit.json").read_text())
    kit_table(bundle, class_names=["dog", "cat", "fox", "owl"])
    refused("kit/kit.json: names other classes than the manifest")
    kit_table(bundle, **table | {"threat": "linf 1/255"})
    refused("kit/kit.json: names another threat model")
    kit_table(bundle, **table | {"models": table["models"][:2]})
    refused("kit/kit.json: names other models than the manifest")
    kit_table(bundle, **table | {"files": table["files"] | {"golden.npz": "0" * 64}})
    refused("kit/kit.json: gives another hash of golden.npz")
    kit_table(bundle, **table | {"schema_version": 2})
    refused("kit/kit.json: ", "schema_version 2")


def test_a_report_that_says_something_else_is_refused(bundle, refused, make_report):
    rewrite(bundle, lambda table: table["reports"][0].update(status="incomplete"))
    refused("reports/report.student.json: says something else than the manifest says")


def test_a_gate_that_says_something_else_is_refused(bundle, refused):
    rewrite(bundle, lambda table: table["gate"][0].update(verdict="pass"))
    refused("reports/gate.student.json: says something else than the manifest says")


def test_a_report_that_contradicts_itself_is_refused(bundle, refused):
    path = bundle / "reports/report.student.json"
    table = json.loads(path.read_text())
    table["samples"]["broken_by"] = [None] * len(table["samples"]["broken_by"])
    path.write_text(json.dumps(table))
    resign(bundle, "reports/report.student.json")
    refused("reports/report.student.json: it is no report of this version")


def test_a_hash_that_the_manifest_gives_twice_must_be_the_same(bundle, refused):
    (bundle / ENGINE).write_bytes(b"another engine")
    resign(bundle, ENGINE)
    refused("it gives two hashes, or none, of 'engines/model.fp16.engine'")


def test_nothing_is_written(bundle, original, refused):
    (bundle / "kit/model.int8.onnx").unlink()
    refused("kit/model.int8.onnx")
    before = {path.relative_to(original) for path in original.rglob("*")}
    after = {path.relative_to(bundle) for path in bundle.rglob("*")}
    assert before - after == {(original / "kit/model.int8.onnx").relative_to(original)}
    assert after <= before

"""`robust-compress bench`: what it prints and writes, and how it refuses bad input."""

import errno
import json
import re
import shlex
import sys
from pathlib import Path

import onnx  # noqa: TID253 (makes the files)
import pytest
from onnx import TensorProto, helper  # noqa: TID253

import cli.main
import exporters.benchmark.peak_memory
import exporters.benchmark.report
from compressor.errors import ExitCode
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.reports.benchmark import read_benchmark
from compressor.reports.report import TargetFacts, write_report
from compressor.weights import sha256_of_file
from tests.unit.benchmark_models import RECIPE
from tests.unit.pretended_providers import Pretended

QUICK = "--threads 1 --rounds 2 --seconds 0.002"
FACTS = """class_names teachers training_content_sha256 num_training num_validation
    validation_index_sha256 image_shape selection_attack"""


def save_onnx(path, *, batch="batch", size=(3, 8, 8), source_sha256="", quantised=False):
    """The mean of each channel, by way of int8 if asked."""
    nodes = [helper.make_node("GlobalAveragePool", ["pixels"], ["mean"])]
    constants = []
    if quantised:
        constants.append(helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]))
        constants.append(helper.make_tensor("zero", TensorProto.INT8, [], [0]))
        nodes.append(helper.make_node("QuantizeLinear", ["mean", "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["wide"]))
    nodes.append(helper.make_node("Flatten", ["wide" if quantised else "mean"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, *size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    padding = "" if quantised else 1000 * "x"  # or the whole file would be smaller
    helper.set_model_props(model, {"robust_compress.source_sha256": source_sha256, "_": padding})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, make_report):
    """A run with two exports, verified but for one; files of other kinds. No process is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        exporters.benchmark.peak_memory,
        "_peak_kib",
        lambda source, *_, **__: 2048 if source else 1024,
    )
    run = Path("mine")
    run.mkdir()
    spec = NetworkSpec(architecture="tiny", width=0.5, num_classes=4, image_shape=(3, 8, 8))
    save_classifier(run / "model.safetensors", build_classifier(spec, seed=0), spec, {})
    sha256 = sha256_of_file(run / "model.safetensors")
    Path("mine/recipe.resolved.json").write_text(json.dumps(RECIPE))
    facts = dict.fromkeys(FACTS.split(), 0) | {"model_sha256": sha256}
    Path("mine/run.json").write_text(json.dumps(facts))
    whole = save_onnx(run / "exports/model.fp32.onnx", source_sha256=sha256)
    save_onnx(run / "exports/model.int8.onnx", source_sha256=sha256, quantised=True)
    for place, path in ((run, run / "model.safetensors"), (Path("runs/verify-fp32"), whole)):
        place.mkdir(parents=True, exist_ok=True)
        target = TargetFacts(
            kind="onnx", architecture="x", sha256=sha256_of_file(path), source_sha256=None
        )
        write_report(make_report(target=target), place / "report.json")
    save_onnx(Path("fixed.onnx"), batch=4)
    save_onnx(Path("open.onnx"), size=(3, "height", "width"))
    Path("not.onnx").write_bytes(b"PK\x03\x04 some other kind of file")
    Path("empty.onnx").write_bytes(b"")
    Path("x.engine").write_bytes(b"a program")
    Path("folder").mkdir()
    return tmp_path


@pytest.fixture
def engine(folder):
    """An engine in the run, with a sidecar for which somebody may vouch; its hash."""
    exports = Path("mine/exports")
    (exports / "model.int8.engine").write_bytes(b"a program")
    table = {
        "engine": {"sha256": sha256_of_file(exports / "model.int8.engine")},
        "onnx": {"file": "model.int8.onnx", "sha256": sha256_of_file(exports / "model.int8.onnx")},
        "tensorrt": {"flavour": "no such flavour"},
    }
    (exports / "model.int8.engine.json").write_text(json.dumps(table))
    return sha256_of_file(exports / "model.int8.engine.json")


def call(line):
    """The exit code of a command line that runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-compress", *shlex.split(line)])
        try:
            cli.main.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def words(text):
    return " ".join(re.sub("[─-╿]", " ", text).split())


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_run_and_all_its_exports(folder, capsys):
    assert call(f"bench mine --batch-sizes 1,2 {QUICK}") == 0
    out, err = capsys.readouterr()
    assert err == ""
    names = ["model.safetensors", "model.fp32.onnx", "model.int8.onnx"]
    benchmark = read_benchmark(Path("mine/bench.json"))
    assert [row.name for row in benchmark.targets] == names
    assert [len(row.timings) for row in benchmark.targets] == [2, 2, 2]
    assert [row.accuracy is not None for row in benchmark.targets] == [True, True, False]
    assert all(name in out for name in names)
    assert "batch 2, 1 thread" in out
    assert re.search(
        r"model\.fp32\.onnx +80\.00 % +44\.4 to 97\.5 +50\.00 % +18\.7 to 81\.3 +10", out
    )
    assert re.search(r"model\.int8\.onnx +not verified", out)
    assert re.search(r"^int8 \(model\.int8\.onnx\) is ", out, flags=re.MULTILINE)
    assert "Written: mine/bench.json, bench.md, bench.svg" in out
    last = "Next: robust-compress verify mine/exports/model.int8.onnx --source mine"
    assert out.rstrip().endswith(last)
    assert Path("mine/bench.svg").read_text().startswith("<svg xmlns=")
    assert Path("mine/bench.md").read_text().startswith("# Benchmark\n")


def test_lines_fit_a_narrow_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert call(f"bench mine {QUICK} --batch-sizes 1") == 0
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    tables = out.partition("Latency in milliseconds")[2].partition("What follows")[0]
    assert tables.count("model.safetensors") == 3
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 80


@pytest.mark.parametrize(
    ("targets", "place", "num_targets"),
    [
        ("mine/exports/model.fp32.onnx", "runs/bench-model.fp32", 1),
        ("fixed.onnx mine", "mine", 4),
        ("mine mine/exports/model.fp32.onnx --out there", "there", 3),
    ],
)
def test_where_the_result_goes(targets, place, num_targets, folder, capsys):
    """What is named twice is measured once."""
    assert call(f"bench {targets} {QUICK} --batch-sizes 1,4") == 0
    names = [row.name for row in read_benchmark(Path(place) / "bench.json").targets]
    assert len(set(names)) == len(names) == num_targets


def test_json_is_one_object_and_the_file(folder, capfd):
    assert call(f"bench mine {QUICK} --batch-sizes 1 --json") == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result.pop("files") == [f"mine/bench.{kind}" for kind in ("json", "md", "svg")]
    assert result.pop("left_out") == []
    assert result == json.loads(Path("mine/bench.json").read_text())
    assert err == ""


def test_a_fixed_batch_leaves_out_the_others(folder, capsys):
    assert call(f"bench fixed.onnx {QUICK} --batch-sizes 1,4") == 0
    out = capsys.readouterr().out
    assert "Not measured: fixed.onnx, batch 1, threads 1: it takes batches of 4 only." in out
    (row,) = read_benchmark(Path("runs/bench-fixed/bench.json")).targets
    assert [timing.batch_size for timing in row.timings] == [4]


def test_a_size_that_a_file_leaves_open_can_be_given(folder, capsys):
    assert call(f"bench open.onnx {QUICK} --batch-sizes 1 --image-shape 3x9x7") == 0
    (row,) = read_benchmark(Path("runs/bench-open/bench.json")).targets
    assert row.image_shape == (3, 9, 7)


def test_a_report_can_be_given(folder, capsys, make_report):
    sha256 = sha256_of_file(Path("mine/exports/model.int8.onnx"))
    target = TargetFacts(kind="onnx", architecture="x", sha256=sha256, source_sha256=None)
    write_report(make_report(target=target), Path("folder/mine.json"))
    assert call(f"bench mine {QUICK} --batch-sizes 1 --report folder/mine.json") == 0
    benchmark = read_benchmark(Path("mine/bench.json"))
    assert benchmark.targets[2].accuracy.report == "folder/mine.json"
    assert "Next: xdg-open mine/bench.svg" in capsys.readouterr().out


@pytest.mark.parametrize("is_trusted", [False, True])
def test_an_engine_that_cannot_be_run_is_a_row_with_the_reason(is_trusted, engine, capsys):
    given = f"--manifest-sha256 {engine.upper()}" if is_trusted else ""
    assert call(f"bench mine {QUICK} --batch-sizes 1,2 {given}") == 0
    out = words(capsys.readouterr().out)
    assert "6 measurements of 0.002 s, then memory of 3 targets" in out
    assert out.count("model.int8.engine not measured - - - -") == 1
    said = "flavour 'no such flavour' is not known" if is_trusted else "not trusted; give the SHA-"
    assert f"Not measured: model.int8.engine, {said}" in out
    assert "Next: robust-compress verify mine/exports/model.int8.onnx --source mine" in out
    assert "| model.int8.engine | 9 | - | not measured |" in Path("mine/bench.md").read_text()
    row = read_benchmark(Path("mine/bench.json")).targets[-1]
    assert (row.kind, row.timings, row.peak_memory_mib) == ("engine", (), None)


def test_an_engine_that_cannot_be_run_is_not_to_be_verified(engine, capsys, make_report):
    for name in ("model.int8.onnx", "model.fp32.onnx"):
        sha256 = sha256_of_file(Path("mine/exports", name))
        target = TargetFacts(kind="onnx", architecture="x", sha256=sha256, source_sha256=None)
        write_report(make_report(target=target), Path(f"mine/report-{name}.json"))
    assert call(f"bench mine {QUICK} --batch-sizes 1") == 0
    assert "Next: xdg-open mine/bench.svg" in capsys.readouterr().out


def test_the_next_command_for_a_network_names_its_run(folder, capsys):
    Path("mine/report.json").unlink()
    assert call(f"bench mine {QUICK} --batch-sizes 1") == 0
    assert capsys.readouterr().out.rstrip().endswith("Next: robust-compress verify mine")


def test_the_next_command_names_the_provider(folder, capsys, monkeypatch):
    Pretended(monkeypatch)
    assert call(f"bench mine {QUICK} --batch-sizes 1 --provider cuda") == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("--source mine --provider cuda")
    assert "ONNX Runtime, CUDA, CPU: model.fp32.onnx, model.int8.onnx" in words(out)


# Files of a run that was distilled again


@pytest.fixture
def stale(folder, make_report):
    """The int8 file is of other weights; there is a report on it in the run."""
    path = save_onnx(Path("mine/exports/model.int8.onnx"), source_sha256="0" * 64, quantised=True)
    target = TargetFacts(
        kind="onnx", architecture="x", sha256=sha256_of_file(path), source_sha256=None
    )
    write_report(make_report(target=target), Path("mine/report-int8.json"))
    return path


def test_a_stale_file_of_a_run_is_left_out_and_named(stale, capsys):
    assert call(f"bench mine {QUICK} --batch-sizes 1") == 0
    said = f"Left out: {stale}, made from other weights than mine holds now; export it again."
    out = capsys.readouterr().out
    assert words(out).count(said) == 1
    assert "model.int8.onnx" not in words(out).replace(said, "")
    names = [row.name for row in read_benchmark(Path("mine/bench.json")).targets]
    assert names == ["model.safetensors", "model.fp32.onnx"]
    assert said in Path("mine/bench.md").read_text().replace("\\", "")


def test_a_stale_file_of_a_run_in_json(stale, capfd):
    assert call(f"bench mine {QUICK} --batch-sizes 1 --json") == 0
    (line,) = json.loads(capfd.readouterr().out)["left_out"]
    assert line.startswith(f"Left out: {stale}")


@pytest.mark.parametrize("targets", ["mine/exports/model.int8.onnx mine", "mine {0} --out mine"])
def test_a_stale_file_that_is_asked_for_is_measured_and_not_believed(targets, stale, capsys):
    line = f"bench {targets.format(stale)} {QUICK} --batch-sizes 1"
    assert call(line) == 0
    out = words(capsys.readouterr().out)
    assert "Left out" not in out
    said = f"{stale} was made from other weights than its run holds now, so reports on it are taken"
    assert said in out
    rows = {row.name: row for row in read_benchmark(Path("mine/bench.json")).targets}
    assert rows[stale.name].timings
    assert rows[stale.name].accuracy is None
    assert f"verify {stale}" not in out
    assert call(f"{line} --report mine/report-int8.json") == 0
    rows = {row.name: row for row in read_benchmark(Path("mine/bench.json")).targets}
    assert rows[stale.name].accuracy.report == "mine/report-int8.json"


def test_engines_built_from_other_files_are_left_out(engine, capsys):
    """Of a file that is stale, and of one that has been exported again since."""
    for source_sha256 in ("0" * 64, sha256_of_file(Path("mine/model.safetensors"))):
        path = Path("mine/exports/model.int8.onnx")
        save_onnx(path, source_sha256=source_sha256, size=(3, 8, 8), batch=4, quantised=True)
        assert call(f"bench mine {QUICK} --batch-sizes 4") == 0
        said = "model.int8.engine, built from another model.int8.onnx than that of the run; build"
        assert said in words(capsys.readouterr().out)


def test_nothing_is_written_into_a_bundle(folder, capsys):
    kit = Path("bundle/kit")
    path = save_onnx(kit / "model.fp32.onnx")
    row = {"file": path.name, "sha256": sha256_of_file(path), "precision": "fp32"}
    row |= {"tolerance": 0.1, "min_agreement": 0.9}
    table = {"schema_version": 1, "models": [row], "build": {}, "files": {}}
    (kit / "kit.json").write_text(json.dumps(table))
    Path("bundle/manifest.json").write_text("{}")
    before = files_below(Path("bundle"))
    assert call(f"bench bundle {QUICK} --batch-sizes 1") == 0
    assert call(f"bench bundle/kit {QUICK} --batch-sizes 1") == 0
    assert files_below(Path("bundle")) == before
    for name in ("bundle", "kit"):
        (target,) = read_benchmark(Path(f"runs/bench-{name}/bench.json")).targets
        assert target.sha256 == row["sha256"]


HASH = "0123456789abcdef" * 4
BAD = {
    "no target": ("", 2, "Missing argument 'TARGET...'"),
    "a file that is not there": ("nowhere.onnx", 4, "nowhere.onnx does not exist; check the path"),
    "weights that are not there": ("nowhere.pt", 4, "nowhere.pt does not exist"),
    "no architecture": ("tinny:mine/model.safetensors", 4, "'tinny' is not known; did you mean"),
    "no image shape": ("tiny:mine/model.safetensors", 2, "give --image-shape 3x32x32"),
    "no ONNX": ("not.onnx", 4, "not.onnx is damaged, or not an ONNX file"),
    "an empty file": ("empty.onnx", 4, "empty.onnx is empty"),
    "not a run": ("folder", 4, "folder is not a run"),
    "another kind": ("mine/run.json", 4, "'.json' is not a kind of weights"),
    "one good, one bad": ("mine not.onnx", 4, "not.onnx is damaged"),
    "an open size": ("open.onnx", 2, "open.onnx takes images of any size"),
    "no batch fits": ("fixed.onnx --batch-sizes 2", 2, "takes batches of 4 only; choose other"),
    "batch of none": ("mine --batch-sizes 0", 2, "--batch-sizes '0' is not a list of whole"),
    "no batch": ("mine --batch-sizes ,", 2, "--batch-sizes ','"),
    "half a batch": ("mine --batch-sizes 1,2.5", 2, "--batch-sizes '1,2.5'"),
    "a batch too large": ("mine --batch-sizes 1000000", 2, "from 1 to 65,536"),
    "no thread": ("mine --threads 0", 2, "--threads '0' is not a list of whole numbers"),
    "a negative thread": ("mine --threads=-1", 2, "--threads '-1'"),
    "one round": ("mine --rounds 1", 2, "--rounds"),
    "no time": ("mine --seconds 0", 2, "--seconds 0 is not between 0 and 3600"),
    "not a time": ("mine --seconds nan", 2, "--seconds nan is not"),
    "a flat shape": ("mine --image-shape 32x32", 2, "--image-shape '32x32' is not channels x"),
    "an empty shape": ("mine --image-shape 3x0x32", 2, "--image-shape '3x0x32'"),
    "no report": ("mine --report nowhere.json", 2, "nowhere.json does not exist"),
    "not a report": ("mine --report mine/run.json", 4, "run.json is not a report of schema"),
    "of another": ("fixed.onnx --report mine/report.json", 2, "which none of the targets has"),
    "an engine alone": ("x.engine", 4, "x.engine is a program"),
    "an engine without a sidecar": (
        f"x.engine --manifest-sha256 {HASH}",
        4,
        "x.engine.json cannot",
    ),
    "a hash of nothing": (f"fixed.onnx --manifest-sha256 {HASH}", 2, "is that of no engine here"),
    "not a hash": ("mine --manifest-sha256 abc", 2, "--manifest-sha256 'abc' is not a SHA-256"),
    "no such provider": ("mine --provider gpu", 2, "'gpu' is not one of cpu, cuda, tensorrt"),
    "a provider that is not here": ("mine --provider cuda", 4, "pip install onnxruntime-gpu"),
    "a provider for weights": ("mine/model.safetensors --provider cuda", 2, "no target is one"),
    "out is a file": ("mine --out not.onnx", 4, "not.onnx cannot be written to"),
    "out below a file": ("mine --out not.onnx/x", 4, "not.onnx cannot be written to"),
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_bad_input_is_explained_and_nothing_is_written(row, folder, capsys):
    line, code, says = row
    before = files_below(folder)
    assert call(f"bench {line}") == code
    out, err = capsys.readouterr()
    assert says in words(err)
    assert "Traceback" not in out + err
    assert files_below(folder) == before


def test_a_full_disk_is_explained_and_names_the_file(folder, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compressor.device.kit_files.os.fsync", full)
    before = files_below(folder)
    assert call(f"bench mine {QUICK} --batch-sizes 1") == ExitCode.KNOWN_ERROR
    err = words(capsys.readouterr().err)
    assert err.startswith("Error: mine/bench.json: No space left on device")
    assert files_below(folder) == before


def test_a_changed_network_is_a_mismatch(folder, capsys):
    with Path("mine/model.safetensors").open("ab") as file:
        file.write(b" ")
    assert call(f"bench mine {QUICK}") == ExitCode.MISMATCH
    assert "training wrote" in capsys.readouterr().err


def test_an_interruption_writes_nothing(folder, monkeypatch):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporters.benchmark.report, "measure", stop)
    before = files_below(folder)
    assert call(f"bench mine {QUICK}") == ExitCode.INTERRUPTED
    assert files_below(folder) == before


def test_help_has_examples(capsys):
    assert call("bench --help") == 0
    text = words(capsys.readouterr().out)
    assert "robust-compress bench runs/mine" in text.partition("xample")[2]

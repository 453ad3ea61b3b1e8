"""From a run to files of every precision, end to end: verdicts, records, exit codes."""

import json
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import cli.main
import compressor.onnx_model
import exporters.workflow
from compressor.errors import ArtefactMismatchError, DataError, RunError
from compressor.onnx_graph import read_graph
from compressor.onnx_model import load_onnx_model
from compressor.performance_settings import PerformanceSettings
from compressor.quantization_workflow import float_weights
from compressor.run_directory import RunDirectory
from compressor.verification.artefact import Twin
from compressor.weights import sha256_of_file
from exporters.budget import Budget
from exporters.request import ExportRequest, Int8Request
from exporters.to_onnx import OnnxForm
from exporters.workflow import export_run

pytestmark = pytest.mark.workflow

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
BUDGET = Budget(max_clean_drop=0.03, max_robust_drop=0.03)
LAYERS = ["conv1", "conv2", "conv3", "fc"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_on_digits):
    """Half of the held-out images judge, half choose."""
    data = {
        "source": "digits",
        "validation_size": 200,
        "crop_padding_pixels": 0,
        "horizontal_flip": False,
    }
    return train_on_digits(tmp_path_factory.mktemp("runs") / "plain", epochs=3, data=data)


@pytest.fixture
def copy(run, tmp_path):
    """A run of one's own."""
    return RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))


@pytest.fixture
def with_outlier(copy):
    """The same function, but one channel of activations is a thousand times the others."""

    def plant(norm, following, *, factor=1000):
        with safe_open(copy.model, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        for name in ("weight", "bias"):
            tensors[f"{norm}.{name}"][0] *= factor
        tensors[f"{following}.weight"][:, 0] /= factor
        save_file(tensors, copy.model, metadata=metadata)
        facts = json.loads(copy.facts.read_text())
        copy.facts.write_text(json.dumps(facts | {"model_sha256": sha256_of_file(copy.model)}))
        return copy

    return plant


def request_for(run, *precisions, **changes):
    values = {
        "run": run,
        "settings": SETTINGS,
        "precisions": precisions,
        "int8": Int8Request(kind="clean", num_images=100),
        "budget": BUDGET,
        "num_images": 100,
    }
    return ExportRequest(**(values | changes))


def contents(run):
    """Every file of the exports, to the byte."""
    return {path.name: path.read_bytes() for path in run.exports.iterdir()}


@pytest.fixture(scope="module")
def made(run):
    """All precisions, in a run that nobody changes."""
    return export_run(request_for(run, "fp32", "fp16", "int8"))[1]


def test_every_precision_is_verified_and_in_its_place(run, made):
    assert [exported.variant for exported in made] == ["fp32", "fp16", "int8"]
    assert all(exported.path == run.onnx(exported.variant) for exported in made)
    assert contents(run).keys() == {
        f"model.{variant}.onnx{extension}"
        for variant in ("fp32", "fp16", "int8")
        for extension in ("", ".json")
    }
    sizes = [exported.num_bytes for exported in made]
    assert sizes == sorted(sizes, reverse=True)
    for exported in made:
        shown = exported.verification
        assert (shown.status, shown.clean.num_total, shown.robust.num_total) == (
            "verified",
            100,
            100,
        )
        assert shown.clean.num_correct > 85
        assert exported.num_bytes == exported.path.stat().st_size
        assert exported.sha256 == sha256_of_file(exported.path)
        assert exported.source_sha256 == sha256_of_file(run.model)


def test_records_lie_beside_the_files(run, made):
    for exported in made:
        record = json.loads(run.onnx_verification(exported.variant).read_text())
        assert record["sha256"] == exported.sha256
        assert record["path"] == exported.path.name
        assert record["verification"]["status"] == "verified"
        drop = record["verification"]["robust_drop"]
        assert drop["low_95"] <= drop["fraction"] <= drop["high_95"]
        assert drop["num_total"] == 100


def test_how_int8_was_made_is_recorded(run, made):
    details = made[-1].details
    assert details["calibration_method"] == "minmax"
    assert (details["calibration_kind"], details["num_calibration_images"]) == ("clean", 100)
    assert len(details["calibration_index_sha256"]) == 64
    assert details["kept_in_float"] == details["layers"] == details["trials"] == []


def test_every_file_has_the_model_card(run, made):
    cards = [load_onnx_model(exported.path).metadata for exported in made]
    assert cards[0] == cards[1] == cards[2]
    assert cards[0]["robust_compress.source_sha256"] == sha256_of_file(run.model)


def test_the_same_run_gives_the_same_bytes(run, made, copy):
    """In every precision, and beside files from before."""
    before = contents(run)
    export_run(request_for(copy, "fp32", "fp16", "int8"))
    assert contents(copy) == before


@pytest.fixture
def fast(monkeypatch, run, made):
    """The float32 file of the same network is copied, as it would be the same to the byte."""
    known, weights = run.onnx("fp32").read_bytes(), sha256_of_file(run.model)
    original = exporters.workflow.write_onnx

    def write_onnx(network, path, *, form, metadata):
        is_same = metadata["robust_compress.source_sha256"] == weights
        if is_same and form == OnnxForm(image_shape=(1, 8, 8)):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(known)
        else:
            original(network, path, form=form, metadata=metadata)

    monkeypatch.setattr("exporters.workflow.write_onnx", write_onnx)


def test_calibration_images_are_chosen_by_measuring(copy, fast):
    told = []
    request = request_for(copy, "int8", int8=Int8Request(num_images=100))
    _, (_, exported) = export_run(request, tell=told.append)
    tried = exported.details["calibrations"]
    assert [row["kind"] for row in tried] == ["clean", "adversarial", "mixed"]
    best = max(row["robust"]["num_correct"] for row in tried)
    chosen = next(r for r in tried if r["kind"] == exported.details["calibration_kind"])
    assert chosen["robust"]["num_correct"] == best
    assert [row["robust"]["num_total"] for row in tried] == [100] * 3
    shown = exported.verification.robust
    assert shown.num_total == 100
    assert abs(shown.num_correct - best) < 20  # other images than those that chose
    assert sum("calibrating on 100" in text for text in told) == 3


def test_another_method_of_calibration(copy, fast):
    asked = Int8Request(kind="adversarial", num_images=64, method="percentile")
    _, (_, exported) = export_run(request_for(copy, "int8", int8=asked))
    assert exported.details["calibration_method"] == "percentile"
    assert exported.verification.status == "verified"


def test_files_of_one_batch_size_that_take_bytes(copy):
    _, made = export_run(request_for(copy, "fp16", "int8", static_batch=3, takes_bytes=True))
    assert len(made) == 3
    for exported in made:
        model = load_onnx_model(exported.path)
        assert (model.batch_size, model.takes_bytes) == (3, True)
        assert exported.verification.status == "verified"
        assert exported.input_contract.startswith("uint8 [3, 1, 8, 8], pixels 0 to 255")


# Mixed precision


def test_the_layer_that_does_not_bear_8_bits_stays_in_float(with_outlier):
    told = []
    run = with_outlier("bn1", "conv2")
    _, (float32, exported) = export_run(request_for(run, "int8"), tell=told.append)
    assert float32.verification.status == "verified"
    assert (exported.variant, exported.precision) == ("int8-mixed", "int8")
    assert exported.path == run.onnx("int8-mixed")
    assert exported.verification.status == "verified"
    (kept,) = exported.details["kept_in_float"]
    assert kept.endswith("conv2")
    layers = exported.details["layers"]
    assert layers[0]["name"] == kept
    assert layers[0]["is_kept"]
    assert layers[0]["robust_drop"] > 0.1
    assert {layer["name"].rpartition(".")[2] for layer in layers} == {*LAYERS}
    assert [trial["num_kept"] for trial in exported.details["trials"]] == [1]
    assert any("ranking 4 layers" in text for text in told)
    graph = read_graph(exported.path.read_bytes(), exported.path)
    weights = {node.name: node.inputs[1] for node in graph.nodes if node.op in {"Conv", "Gemm"}}
    in_float = [name for name, weight in weights.items() if weight in graph.constants]
    assert in_float == [kept]


def test_more_layers_stay_in_float_if_that_is_asked(copy, fast):
    asked = Int8Request(kind="clean", num_images=100, min_kept=1)
    _, (_, exported) = export_run(request_for(copy, "int8", int8=asked))
    assert (exported.variant, exported.verification.status) == ("int8-mixed", "verified")
    assert len(exported.details["kept_in_float"]) >= 1


def test_too_lossy_ends_with_exit_code_3_and_changes_nothing(with_outlier, capsys):
    """Where the layer holds most of the weights, keeping it in float would not be int8."""
    run = with_outlier("bn2", "conv3", factor=50)
    export_run(request_for(run, "fp16"))
    before = contents(run)
    assert call(f"export {run.path} {QUICK_INT8}") == 3
    captured = capsys.readouterr()
    words = " ".join(captured.err.split())
    assert words.startswith("Error: the hop fp32 -> int8 costs too much, so int8 is not worth it")
    assert "allowed are 1 points" in words
    assert "allow more with --max-robust-drop" in words
    assert "Traceback" not in captured.out + captured.err
    after = contents(run)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"model.fp32.onnx.json"}  # float32 was verified again
    assert after.keys() - before.keys() <= {"unverified.int8.onnx"}


def test_fp16_that_would_overflow_on_the_device_is_refused(with_outlier):
    """Though every weight fits, and ONNX Runtime computes in float32 on a CPU."""
    run = with_outlier("bn1", "conv2", factor=30_000)
    shutil.rmtree(run.exports, ignore_errors=True)
    with pytest.raises(ArtefactMismatchError, match="the hop fp32 -> fp16 is the first") as caught:
        export_run(request_for(run, "fp16"))
    assert "reaches " in str(caught.value)
    assert "and float16 ends at 65504" in str(caught.value)
    assert not run.onnx("fp16").exists()
    assert run.onnx("fp32").exists()


# Not attacked, and fine-tuned


def test_what_is_put_in_place_is_what_was_verified(copy, fast, monkeypatch):
    """Whatever somebody writes over it meanwhile."""
    original = exporters.workflow.prove_hop

    def overwritten(file, *arguments, **options):
        found = original(file, *arguments, **options)
        file.path.write_bytes(b"something else")
        return found

    monkeypatch.setattr(exporters.workflow, "prove_hop", overwritten)
    _, made = export_run(request_for(copy, "fp16"))
    for exported in made:
        assert sha256_of_file(exported.path) == exported.sha256
        assert load_onnx_model(exported.path).num_classes == 10
    assert not list(copy.exports.glob("unverified*"))


def image_folder(path, *, num_classes, num=40, seed=0):
    """Noise, in as many classes."""
    generator = np.random.default_rng(seed)
    for part in ("train", "test"):
        for label in range(num_classes):
            (path / part / str(label)).mkdir(parents=True)
            for place in range(num):
                pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(path / part / str(label) / f"{place}.png")
    return f"imagefolder:{path}"


@pytest.mark.parametrize("num_classes", [6, 10, 12])
def test_other_images_than_those_of_the_run_are_refused(copy, tmp_path, num_classes):
    """They might be images that it was trained on, or mean other classes."""
    source = image_folder(tmp_path / "images", num_classes=num_classes)
    with pytest.raises(DataError, match="the training images are others than those of"):
        export_run(request_for(copy, "fp32", data_source=source))


def test_one_process_exports_at_a_time(copy):
    before = contents(copy) if copy.exports.exists() else {}
    with copy.locked(), pytest.raises(RunError, match="another process is training or exporting"):
        export_run(request_for(copy, "fp32"))
    assert (contents(copy) if copy.exports.exists() else {}) == before


def test_the_budget_is_part_of_the_record(copy, fast):
    export_run(request_for(copy, "fp16"))
    for variant in ("fp32", "fp16"):
        record = json.loads(copy.onnx_verification(variant).read_text())
        assert record["verification"]["budget"] == {
            "max_clean_drop": BUDGET.max_clean_drop,
            "max_robust_drop": BUDGET.max_robust_drop,
        }


def test_a_file_that_cannot_be_attacked_is_written_as_unverified(copy, monkeypatch, fast):
    nothing = Twin(module=None, agreement=None, reason="planted")
    monkeypatch.setattr("exporters.request.checked_twin", lambda *_, **__: nothing)
    _, (_, exported) = export_run(request_for(copy, "fp16"))
    assert exported.verification.status == "unverified"
    record = json.loads(copy.onnx_verification("fp16").read_text())
    assert record["verification"]["status"] == "unverified"


def test_fine_tuned_weights_are_put_into_the_file_and_proven(copy, fast):
    """Here by nobody: the weights before rounding, with one bias moved a little."""
    seen = []

    def fine_tune(float32, int8, judging_N):
        seen.append((float32.name, int8.name))
        graph = read_graph(int8.read_bytes(), int8)
        found = float_weights(graph, read_graph(float32.read_bytes(), float32))
        (last,) = [node for node in graph.nodes if node.op == "Gemm"]
        bias = graph.constants[last.inputs[2]]
        return {**found, last.inputs[2]: bias + 0.01}, 1

    _, (_, exported) = export_run(request_for(copy, "int8"), fine_tune=fine_tune)
    assert seen == [("model.fp32.onnx", "unverified.int8.onnx")]
    assert (exported.variant, exported.path) == ("int8-qat", copy.onnx("int8-qat"))
    assert exported.details["fine_tuned_epochs"] == 1
    assert exported.verification.status == "verified"
    plain = load_onnx_model(copy.onnx("fp32"))
    x_NCHW = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = load_onnx_model(exported.path)(x_NCHW)
    assert 0 < (found - plain(x_NCHW)).abs().max() < 1


# The command


def call(line):
    """The exit code of a command line that runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-compress", *shlex.split(line)])
        try:
            cli.main.main()
        except SystemExit as end:
            return end.code or 0
    return 0


QUICK = "--samples 100 --threads 1"
QUICK_INT8 = f"--int8 {QUICK} --calibration-samples 64 --calibration-images clean"


def test_the_command_says_what_was_written_and_what_to_do_next(copy, capsys, fast):
    generous = "--max-clean-drop 0.1 --max-robust-drop 0.1"
    assert call(f"export {copy.path} --half {QUICK_INT8} {generous}") == 0
    out = capsys.readouterr().out
    for words in ("model.fp32.onnx", "model.fp16.onnx", "model.int8.onnx", "verified"):
        assert words in out
    assert "compared with the network on 100 held-out images" in " ".join(out.split())
    assert f"Next: robust-compress verify {copy.onnx('int8')}" in " ".join(out.split())


def test_json_of_the_command_has_every_file(copy, capsys, fast):
    assert call(f"export {copy.path} --half {QUICK} --json") == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [file["variant"] for file in files] == ["fp32", "fp16"]
    for file in files:
        assert file["path"] == str(copy.onnx(file["variant"]))
        assert file["sha256"] == sha256_of_file(copy.onnx(file["variant"]))
        assert file["verification"]["clean"]["num_total"] == 100


def test_files_are_run_by_as_many_threads_as_were_asked_for(copy, monkeypatch, fast):
    seen, usual = [], compressor.onnx_model.session_options

    def watched(num_threads, **more):
        seen.append(num_threads)
        return usual(num_threads, **more)

    monkeypatch.setattr(compressor.onnx_model, "session_options", watched)
    assert call(f"export {copy.path} --half {QUICK} --threads 1") == 0
    assert set(seen) == {1}


def test_a_dry_run_writes_nothing(copy, capsys):
    shutil.rmtree(copy.exports, ignore_errors=True)
    assert call(f"export {copy.path} --int8 --dry-run --json") == 0
    planned = json.loads(capsys.readouterr().out)["would_write"]
    assert str(copy.onnx("fp32")) in planned
    assert str(copy.onnx_verification("fp32")) in planned
    assert any("int8" in path for path in planned)
    assert not copy.exports.exists()

"""Golden images are replayed and judged: PASS, FAIL or UNVERIFIED, and never a pass by default."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from compressor.device.build_options import BuildOptions
from compressor.device.cuda import Cuda
from compressor.device.kit_files import read_kit, sha256_of
from compressor.device.onnx_session import OnnxSession
from compressor.device.replay import Replay, compare, main, replay
from tests.unit.device_models import make_kit, make_models
from tests.unit.pretended_gpu import VERSION, Cudart, Gpu, layers_json


def test_compare_counts_labels_and_clear_flips():
    expected = np.array([[3.0, 0.0], [0.0, 3.0], [0.1, 0.0], [0.0, 3.0]])
    answer = np.array([[3.0, 0.0], [0.0, 3.0], [0.0, 0.1], [3.0, 0.0]])
    size = np.sqrt(np.mean([2.25, 2.25, 0.0025, 2.25]))
    shown = compare(expected, answer, tolerance=0.1)
    assert (shown.num_same, shown.num_total, shown.num_clear_flips) == (2, 4, 1)
    assert shown.relative_error == pytest.approx(np.sqrt((2 * 9 + 2 * 0.01) / 8) / size)
    assert str(shown).startswith("same label on 2 of 4, relative error of the logits 1.2e+00, 1 cl")


def test_the_size_of_logits_does_not_count_what_all_have_in_common():
    """Or a constant of a million would hide any error."""
    expected = np.array([[3.0, 0.0], [0.0, 3.0]])
    error = np.array([[0.3, 0.0], [0.0, 0.3]])
    for constant in (0.0, 1e6):
        shown = compare(expected + constant, expected + constant + error, tolerance=0.01)
        assert shown.relative_error == pytest.approx(np.sqrt(0.045) / 1.5)


def test_logits_that_are_all_the_same_match_nothing():
    assert compare(np.ones((2, 3)), np.ones((2, 3)), tolerance=0.1).relative_error == np.inf


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def original_kit(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits") / "kit"
    make_kit(folder, paths)
    return folder


@pytest.fixture
def kit(original_kit, tmp_path):
    return read_kit(shutil.copytree(original_kit, tmp_path / "kit"))


def put_engine(kit, name, **changes):
    """An engine of the pretended GPU in a kit, with a sidecar that vouches for it."""
    entry = kit.entry(name)
    sidecar = {
        "engine": {"sha256": sha256_of(b"plan")},
        "onnx": {"sha256": entry.sha256},
        "tensorrt": {"flavour": "tensorrt", "version": VERSION},
        "options": BuildOptions().to_table(),
    }
    (kit.folder / entry.engine_file).write_bytes(b"plan")
    (kit.folder / f"{entry.engine_file}.json").write_text(json.dumps(sidecar | changes))
    return entry.engine_file


@pytest.fixture
def with_gpu(monkeypatch, paths):
    """A machine with TensorRT and a GPU whose engines answer as the ONNX files do."""

    def equip(precision="fp16", *, layers=("FP16",), change=lambda logits: logits, **options):
        session = OnnxSession(paths[precision].read_bytes(), num_threads=1)
        gpu = Gpu(
            cudart=Cudart(),
            answer=lambda images_NCHW: change(session(images_NCHW)),
            layers=layers_json(*layers),
            **options,
        )
        monkeypatch.setattr("compressor.device.replay.Cuda", lambda: Cuda(gpu.cudart))
        monkeypatch.setattr("compressor.device.replay.import_tensorrt", lambda _: gpu.tensorrt())

    return equip


def test_an_engine_that_answers_as_its_onnx_file_passes(kit, with_gpu):
    with_gpu("fp16", layers=("FP16", "FP16", "FP32"))
    shown = replay(kit, put_engine(kit, "model.fp16.onnx"))
    assert (shown.status, shown.exit_code, shown.reason) == ("PASS", 0, "")
    assert shown.layers == {"fp16": 2, "fp32": 1}
    assert [one.num_same for one in shown.agreements.values()] == [21, 21]
    assert shown.lines() == [
        "PASS  model.fp16.engine by TensorRT 10.3.0",
        "  clean images: same label on 21 of 21, relative error of the logits 0.0e+00",
        "  adversarial images: same label on 21 of 21, relative error of the logits 0.0e+00",
        "  layers: 2 in fp16, 1 in fp32",
    ]


def only_noise(logits):
    return logits + 0.2 * logits.std() * np.random.default_rng(0).normal(size=logits.shape)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda logits: logits[:, ::-1],
            "clean logits are off .* clean labels",
        ),
        (lambda logits: logits + logits.std(), "clean logits are off"),
        (only_noise, "adversarial logits are off"),
        (lambda logits: logits * np.nan, "not finite"),
        (lambda logits: np.zeros_like(logits), "fewer adversarial labels agree than 95 %"),
    ],
)
def test_an_engine_that_answers_otherwise_fails(kit, with_gpu, change, reason):
    with_gpu("fp16", change=change)
    shown = replay(kit, put_engine(kit, "model.fp16.onnx"))
    assert (shown.status, shown.exit_code) == ("FAIL", 5)
    assert re.search(reason, shown.reason)


def test_one_clear_flip_fails_where_all_else_is_within_limits(kit, with_gpu):
    """As one class that is wrong would do; 20 of 21 labels are enough, and the error is small."""
    expected_NK = np.load(kit.folder / "golden.npz")["fp16_clean_NK"]
    top_N2 = np.sort(expected_NK, axis=1)[:, -2:]
    margins_N = top_N2[:, 1] - top_N2[:, 0]
    surest = int(np.argmax(margins_N))
    size = np.std(expected_NK - expected_NK.mean(axis=1, keepdims=True))
    tolerance = 0.3 * margins_N[surest] / size  # the error is half of that

    def swap_two(logits_NK):
        changed_NK = logits_NK.copy()
        for place in np.flatnonzero(np.isclose(logits_NK, expected_NK[surest]).all(axis=1)):
            best_two = np.argsort(logits_NK[place])[-2:]
            changed_NK[place, best_two] = logits_NK[place, best_two[::-1]]
        return changed_NK

    with_gpu("fp16", change=swap_two)
    entry = kit.entry("model.fp16.onnx")
    entry = dataclasses.replace(entry, tolerance=tolerance, min_agreement=0.9)
    shown = replay(dataclasses.replace(kit, entries=(entry,)), put_engine(kit, "model.fp16.onnx"))
    assert shown.agreements["clean"].num_same == 20
    assert shown.agreements["clean"].relative_error < tolerance
    assert (shown.status, shown.reason) == ("FAIL", "1 clean labels differ beyond rounding")


def test_a_float32_engine_passed_off_as_float16_fails(kit, with_gpu):
    """TensorRT 11 did that to those who set the flag of old."""
    with_gpu("fp16", layers=("FP32", "FP32"))
    shown = replay(kit, put_engine(kit, "model.fp16.onnx"))
    assert shown.status == "FAIL"
    assert shown.reason == "fp16 was asked for, and no layer runs in it: 2 in fp32"


def test_an_engine_that_cannot_be_audited_is_unverified(kit, with_gpu):
    with_gpu("fp16", layers=())
    shown = replay(kit, put_engine(kit, "model.fp16.onnx"))
    assert (shown.status, shown.exit_code) == ("UNVERIFIED", 4)
    assert "precision is not known" in shown.reason


UNFIT = {
    "changed engine": ({"engine": {"sha256": "0" * 64}}, "FAIL", "is not the file that"),
    "of another model": ({"onnx": {"sha256": "0" * 64}}, "FAIL", "was not made of the model.fp16"),
    "of another version": (
        {"tensorrt": {"flavour": "tensorrt", "version": "11.4"}},
        "UNVERIFIED",
        "was built with tensorrt 11.4, and this is TensorRT 10.3.0",
    ),
    "damaged sidecar": ({"onnx": []}, "UNVERIFIED", "engine.json is damaged"),
}


@pytest.mark.parametrize(("changes", "status", "reason"), UNFIT.values(), ids=UNFIT)
def test_only_a_vouched_engine_is_run(kit, with_gpu, monkeypatch, changes, status, reason):
    with_gpu("fp16")
    name = put_engine(kit, "model.fp16.onnx", **changes)
    monkeypatch.setattr("compressor.device.replay.Engine", None)  # it must not come so far
    shown = replay(kit, name)
    assert shown.status == status
    assert reason in shown.reason


def test_an_engine_without_sidecar_or_none_at_all_is_unverified(kit):
    assert "python3 build_engine.py" in replay(kit, "model.fp16.engine").reason
    (kit.folder / "model.fp16.engine").write_bytes(b"plan")
    shown = replay(kit, "model.fp16.engine")
    assert shown.status == "UNVERIFIED"
    assert "model.fp16.engine.json cannot be read" in shown.reason


def test_a_file_that_is_not_in_the_kit_is_unverified(kit):
    assert "other.onnx is not in" in replay(kit, "other.onnx").reason


def test_golden_arrays_that_do_not_fit_are_refused(kit, monkeypatch):
    """As a crafted kit could hold them, with hashes that agree."""
    content = b"PK\x05\x06" + b"\x00" * 18
    (kit.folder / "golden.npz").write_bytes(content)
    hashes = dict(kit.sha256_of_file) | {"golden.npz": sha256_of(content)}
    shown = replay(dataclasses.replace(kit, sha256_of_file=hashes), "model.fp32.onnx")
    assert shown.status == "UNVERIFIED"
    assert "golden.npz is damaged" in shown.reason


def test_without_a_file_engines_are_replayed_if_there_are_any(kit, with_gpu, capsys):
    assert main(["--kit", str(kit.folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("PASS") == 3
    assert "No engine is here yet: python3 build_engine.py" in said
    put_engine(kit, "model.fp16.onnx")
    with_gpu("fp16")
    assert main(["--kit", str(kit.folder)]) == 0
    assert capsys.readouterr().out.startswith("PASS  model.fp16.engine by TensorRT 10.3.0\n")


def test_the_worst_verdict_is_the_exit_code(kit, with_gpu, capsys):
    with_gpu("fp16", layers=("FP32",))
    engine = put_engine(kit, "model.fp16.onnx")
    assert main(["--kit", str(kit.folder), "model.fp32.onnx", "missing.onnx", engine]) == 5
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == ["PASS", "UNVERIFIED", "FAIL"]


def test_there_is_an_exit_code_for_every_verdict():
    codes = {"PASS": 0, "UNVERIFIED": 4, "FAIL": 5}
    for status, code in codes.items():
        assert Replay(file="a", status=status, reason="").exit_code == code

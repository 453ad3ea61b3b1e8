"""`verify --provider`: what cannot be had is an error that says what to install, never the CPU."""

import re
import shlex
import sys

import pytest

import cli.main
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from tests.unit.benchmark_models import save_onnx
from tests.unit.pretended_providers import CPU, Pretended


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_onnx(tmp_path / "m.onnx", size=(1, 8, 8), num_classes=10)
    (tmp_path / "x.engine").write_bytes(b"a program")
    spec = NetworkSpec(architecture="tiny", width=0.5, num_classes=10, image_shape=(1, 8, 8))
    save_classifier(tmp_path / "w.safetensors", build_classifier(spec, seed=0), spec, {})
    return tmp_path


def call(line, monkeypatch):
    """The exit code of a command line that runs in this process."""
    monkeypatch.setattr(sys, "argv", ["robust-compress", *shlex.split(line)])
    try:
        cli.main.main()
    except SystemExit as end:
        return end.code or 0
    return 0


BAD = {
    "not here": ("m.onnx --provider cuda", 4, "pip install onnxruntime-gpu, which replaces it"),
    "not here either": ("m.onnx --provider tensorrt", 4, "has no TensorrtExecutionProvider"),
    "unknown": ("m.onnx --provider gpu", 2, "--provider 'gpu' is not one of cpu, cuda, tensorrt"),
    "for a network": ("w.safetensors --provider cuda", 2, "--provider is for exported files"),
    "for an engine": ("x.engine --provider cuda", 2, "x.engine is run by TensorRT itself"),
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_what_cannot_be_had_is_explained(row, folder, capsys, monkeypatch):
    line, code, says = row
    before = set(folder.iterdir())
    assert call(f"verify {line} --data digits", monkeypatch) == code
    out, err = capsys.readouterr()
    assert says in " ".join(re.sub("[─-╿]", " ", err).split())
    assert "Traceback" not in out + err
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("command", ["verify m.onnx --data digits", "bench m.onnx"])
def test_a_session_that_fell_back_gives_no_number(command, folder, capsys, monkeypatch):
    Pretended(monkeypatch, runs_on=[CPU])
    before = set(folder.iterdir())
    assert call(f"{command} --provider cuda", monkeypatch) == 4
    assert "would run on CPUExecutionProvider" in capsys.readouterr().err
    assert set(folder.iterdir()) == before

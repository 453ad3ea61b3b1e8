"""Memory that ends is no bug: it is told apart, and the settings to change are named."""

import json
import sys

import pytest
import torch

import cli.main
import compressor.forecast
import compressor.forecast_workflow
from compressor.errors import DeviceError, ExitCode
from compressor.forecast import NoForecast
from compressor.forecast_workflow import forecast_run
from compressor.out_of_memory import device_error, is_out_of_memory
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import parse_recipe

OF_A_GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.70 GiB of "
    "which 1.25 GiB is free. Including non-PyTorch memory, this process has 14 GiB in use. See "
    "documentation for Memory Management\nand more"
)
SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
TABLE = {
    "name": "planned",
    "data": {"source": "digits", "validation_size": 300},
    "student": {"architecture": "tiny"},
    "method": {"name": "cross_entropy"},
    "training": {"epochs": 2, "batch_size": 100},
}


def of_main_memory():
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has much memory")


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (OF_A_GPU, True),
        (of_main_memory(), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_memory_that_ended_is_told_from_bugs(error, is_it):
    assert is_out_of_memory(error) is is_it


def test_the_message_has_what_was_asked_for_and_what_to_change():
    text = str(device_error(OF_A_GPU))
    assert isinstance(device_error(OF_A_GPU), DeviceError)
    for words in ("2.50 GiB", "1.25 GiB is free)", "training.batch_size", "--batch-size,", "plan"):
        assert words in text
    assert "documentation" not in text


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("module", "name"),
    [(compressor.forecast, "take_step"), (compressor.forecast_workflow, "prepare_training")],
)
def test_plan_returns_it_as_the_problem(monkeypatch, tmp_path, module, name):
    monkeypatch.setattr(module, name, raising(OF_A_GPU))
    found = forecast_run(parse_recipe(TABLE, origin="test"), SETTINGS, out=tmp_path / "run")
    assert isinstance(found, NoForecast)
    (problem,) = found.problems
    assert "2.50 GiB" in problem
    assert "lower training.batch_size" in problem
    assert "\n" not in problem


def test_plan_hides_no_bug(monkeypatch, tmp_path):
    monkeypatch.setattr(compressor.forecast, "take_step", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        forecast_run(parse_recipe(TABLE, origin="test"), SETTINGS, out=tmp_path / "run")


def call(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["robust-compress", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main.main()
    return end.value.code, *capfd.readouterr()


def test_the_command_plan_ends_as_where_it_does_not_fit(monkeypatch, capfd, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(TABLE))
    monkeypatch.setattr(compressor.forecast, "take_step", raising(OF_A_GPU))
    plan = ("plan", str(recipe), "--threads", "1", "--device", "cpu")
    code, out, err = call(monkeypatch, capfd, *plan, "--json")
    assert code == ExitCode.KNOWN_ERROR
    assert list(json.loads(out)) == ["problems"]
    code, out, err = call(monkeypatch, capfd, *plan)
    assert code == ExitCode.KNOWN_ERROR
    assert "It will not fit. memory: it ended (CUDA out of memory" in out
    assert "Next:" not in out
    assert "bug" not in out + err


def test_other_commands_end_with_a_known_error(monkeypatch, capfd):
    monkeypatch.setattr(cli.main, "_run_app", raising(OF_A_GPU))
    code, out, err = call(monkeypatch, capfd, "verify", "run", "--json")
    found = json.loads(out)
    assert (code, found["error"], found["exit_code"]) == (4, "DeviceError", 4)
    code, out, err = call(monkeypatch, capfd, "verify", "run")
    assert code == ExitCode.KNOWN_ERROR
    assert out == ""
    assert "memory ended" in err
    assert "Traceback" not in err


def test_of_several_processes_the_one_that_meets_it_says_so(monkeypatch, capfd):
    """The others only know that it has gone; the one JSON object is that of the first."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli.main, "_run_app", raising(OF_A_GPU))
    _, out, err = call(monkeypatch, capfd, "distill", "--json")
    assert out == ""
    assert "memory ended" in err

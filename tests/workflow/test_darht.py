"""A student with a teacher map, from training to its file: the map ends with training."""

import sys

import pytest
import torch

import cli.main
from compressor.checkpoint import load_candidate, selected_candidate
from compressor.data import load_training_data
from compressor.errors import RecipeError
from compressor.networks import build_classifier, load_trained
from compressor.onnx_graph import read_graph
from compressor.onnx_model import load_onnx_model
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.quantization_workflow import FineTuningRequest
from compressor.recipe_file import load_recipe
from compressor.selection import measure_on_validation
from compressor.training_preparation import student_network

pytestmark = pytest.mark.workflow

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_on_digits):
    """A student of two teachers that know the digits, here the same one twice."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = train_on_digits(folder / "teacher", epochs=3)
    teachers = [{"role": role, "source": str(teacher.model)} for role in ("clean", "robust")]
    method = {"name": "darht", "attack": {"num_steps": 2, "step_size_pixels": "8/255"}}
    training = {"epochs": 4, "batch_size": 64, "ema_decay": 0.9}
    return train_on_digits(folder / "student", method=method, teachers=teachers, training=training)


@pytest.fixture(scope="module")
def both(run):
    """The student as it was selected, with its map, and as it was saved."""
    saved, spec = load_trained(run)
    selected = student_network(load_recipe(run.resolved_recipe), spec).eval()
    selected.load_state_dict(load_candidate(run, selected_candidate(run)))
    return selected, saved, spec


def test_the_saved_student_is_a_plain_network(both):
    selected, saved, spec = both
    plain = build_classifier(spec, seed=0)
    assert {n: t.shape for n, t in saved.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    assert "backbone.fc.to_map.weight" in selected.state_dict()


def test_it_is_the_function_that_was_selected(both):
    selected, saved, _ = both
    x_NCHW = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(saved(x_NCHW), selected(x_NCHW), rtol=0, atol=1e-5)


def test_it_has_the_validation_accuracy_that_it_was_selected_for(run, both):
    recipe, performance = load_recipe(run.resolved_recipe), resolve_performance(SETTINGS)
    data = load_training_data(
        recipe.data, seed=recipe.seed, settings=SETTINGS, device=performance.device
    )
    clean, robust = measure_on_validation(
        both[1], data.validation, recipe=recipe, performance=performance
    )
    best = selected_candidate(run)
    assert (clean.num_correct, robust.num_correct) == (best.clean_correct, best.robust_correct)


def test_its_file_ends_in_one_layer(run, both, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["robust-compress", "export", str(run.path)])
    with pytest.raises(SystemExit) as ended:
        cli.main.main()
    assert ended.value.code == 0
    path = run.onnx("fp32")
    ops = [node.op for node in read_graph(path.read_bytes(), path).nodes]
    assert ops.count("Gemm") + ops.count("MatMul") == 1
    assert ops[-1] == "Gemm"
    x_NCHW = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = both[0](x_NCHW)
    assert torch.allclose(load_onnx_model(path)(x_NCHW), expected, rtol=0, atol=1e-4)


def test_fine_tuning_its_file_is_refused_before_any_work(run):
    with pytest.raises(RecipeError, match="method.name = 'darht', whose losses need .*--qat"):
        FineTuningRequest(run=run, epochs=1, settings=SETTINGS, resume_command="again")

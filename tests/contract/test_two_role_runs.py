"""Whole runs with several teachers of both roles, and one that is refused."""

import signal

import onnx  # noqa: TID253 (makes the files)
import pytest

from compressor.errors import ExitCode, InterruptedRunError, NonFiniteLossError, TeacherError
from compressor.interruption import StopWish
from compressor.metrics import StepDone, read_metrics
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import parse_recipe
from compressor.run_directory import RunDirectory
from compressor.training_workflow import TrainingRequest, train
from tests.onnx_files import constant, linear_model, node

SPEC = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8), width=0.5)
FIVE = [("robust", 1), ("clean", 2), ("robust", 3), ("clean", 4), ("robust", 5)]


@pytest.fixture
def five_files(tmp_path):
    files = []
    for role, seed in FIVE:
        files.append((role, tmp_path / f"{seed}.safetensors"))
        save_classifier(files[-1][1], build_classifier(SPEC, seed=seed), SPEC, {})
    return [*files, files[0]]


def table_of(method, teachers):
    return {
        "name": "contract",
        "data": {"source": "digits", "validation_size": 100, "crop_padding_pixels": 1},
        "student": {"architecture": "tiny"},
        "teachers": [{"role": role, "source": str(path)} for role, path in teachers],
        "method": {"name": method, "attack": {"num_steps": 2, "step_size_pixels": "4/255"}},
        "training": {"epochs": 1, "batch_size": 400, "learning_rate": 0.05},
        "selection": {"num_steps": 1},
    }


def test_six_teachers_resume_equals_not_resuming_and_are_drawn(five_files, tmp_path):
    """Five, one of them twice."""
    recipe = parse_recipe(table_of("bmtard", five_files), origin="the test")
    settings = PerformanceSettings(device="cpu", training_dtype="float32", log_every_steps=1)

    def run(out, *, resume=False, stop=None):
        def observe(event):
            if stop is not None and isinstance(event, StepDone) and event.step == 2:
                stop.signal_number = signal.SIGINT

        request = TrainingRequest(
            out=tmp_path / out, settings=settings, resume=resume, accept_teachers=True
        )
        return train(recipe, request, observe=observe, stop=stop)

    undisturbed = run("undisturbed")
    with pytest.raises(InterruptedRunError):
        run("stopped", stop=StopWish())
    resumed = run("stopped", resume=True)
    assert resumed.model.read_bytes() == undisturbed.model.read_bytes()
    last = [line for line in read_metrics(resumed) if line["kind"] == "step"][-1]
    assert last["robust_loss_1_nats"] == last["robust_loss_4_nats"] != last["robust_loss_2_nats"]
    assert resumed.curves.stat().st_size > 10_000


def test_an_onnx_robust_teacher_of_ciard_is_refused_before_anything_is_written(
    five_files, tmp_path
):
    onnx_file = tmp_path / "teacher.onnx"
    onnx.save(linear_model(), onnx_file)
    teachers = [("robust", onnx_file), ("clean", five_files[1][1])]
    recipe = parse_recipe(table_of("ciard", teachers), origin="the test")
    with pytest.raises(TeacherError) as caught:
        train(recipe, TrainingRequest(out=tmp_path / "run", accept_teachers=True))
    message = str(caught.value)
    for part in ("robust teacher teacher.onnx", "'ciard' retrains a copy", "ARCH:FILE"):
        assert part in message
    assert caught.value.exit_code == ExitCode.KNOWN_ERROR
    assert not (tmp_path / "run").exists()


@pytest.fixture
def afraid_of_attacks(tmp_path):
    """A file that answers grey levels, and everything else with no number."""
    nodes = [
        node("Mul", "images levels", "scaled"),
        node("Round", "scaled", "rounded"),
        node("Sub", "scaled rounded", "away"),
        node("Abs", "away", "distance"),
        node("ReduceMax", "distance axes", "largest", keepdims=0),
        node("Sub", "limit largest", "room"),
        node("Sqrt", "room", "root"),
        node("Mul", "root zero", "nothing"),
        node("Unsqueeze", "nothing one", "column"),
        node("Add", "linear column"),
    ]
    constants = [
        constant("levels", 255.0),
        constant("limit", 0.01),
        constant("zero", 0.0),
        constant("axes", [1, 2, 3]),
        constant("one", [1]),
    ]
    model = linear_model(*nodes, constants=constants, name="linear")
    onnx.save(model, tmp_path / "afraid.onnx")
    return tmp_path / "afraid.onnx"


@pytest.mark.parametrize("method", ["bmtard", "darht", "mtard"])
def test_a_teacher_that_fails_while_it_teaches_is_named(
    method, five_files, afraid_of_attacks, tmp_path
):
    teachers = [("robust", afraid_of_attacks), ("clean", five_files[1][1])]
    table = table_of(method, teachers)
    if method == "darht":
        table["method"] |= {"distil_from": 0.0, "adversarial_share": 1.0}
    recipe = parse_recipe(table, origin="the test")
    with pytest.raises(TeacherError) as caught:
        train(recipe, TrainingRequest(out=tmp_path / "run", accept_teachers=True))
    message = str(caught.value)
    for part in (
        "the loss of step 1 is not finite",
        "the robust teacher afraid.onnx answered 400 images",
        "Last good checkpoint",
        "mean and std",
    ):
        assert part in message


def test_a_diverged_copy_is_not_saved_and_named(five_files, tmp_path):
    teachers = [("robust", five_files[0][1]), ("clean", five_files[1][1])]
    table = table_of("ciard", teachers)
    table["method"] |= {"teacher_learning_rate": 1e300, "teacher_from_fraction": 0.0}
    recipe = parse_recipe(table, origin="the test")
    with pytest.raises(NonFiniteLossError, match="teacher_learning_rate") as caught:
        train(recipe, TrainingRequest(out=tmp_path / "run", accept_teachers=True))
    assert "besides the student" in str(caught.value)
    assert RunDirectory(tmp_path / "run").checkpoint_steps() == [0]

"""Fine-tuning of an int8 file: from the images and teachers of its run, chosen on other images
than those that judge the file."""

import json
import shutil

import pytest

import compressor.trainer
from compressor.errors import DataError, InterruptedRunError, TeacherError
from compressor.interruption import StopWish
from compressor.methods.bmtard import BMTARD
from compressor.metrics import StepDone
from compressor.performance_settings import PerformanceSettings
from compressor.quantization_workflow import FineTuningRequest, fine_tune
from compressor.run_directory import RunDirectory
from exporters.budget import Budget
from exporters.held_out import judging_places
from exporters.request import ExportRequest, Int8Request
from exporters.workflow import export_run

pytestmark = pytest.mark.workflow

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
WIDE = Budget(max_clean_drop=0.3, max_robust_drop=0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_on_digits):
    """A student of a teacher that knows the digits."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = train_on_digits(folder / "teacher", epochs=4)
    teachers = [
        {"role": "clean", "source": str(teacher.model)},
        {"role": "robust", "source": str(teacher.model)},
    ]
    return train_on_digits(
        folder / "student", epochs=3, method={"name": "bmtard"}, teachers=teachers
    )


@pytest.fixture
def copy(run, tmp_path):
    return RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))


@pytest.fixture
def tuned(copy):
    """Exports with one epoch of fine-tuning; what was exported, and what was observed."""

    def export(*, epochs=1, stop=None):
        events = []

        def tune(float32, int8, judging_N):
            return fine_tune(
                FineTuningRequest(
                    run=copy, epochs=epochs, settings=SETTINGS, resume_command="again"
                ),
                float32=float32,
                int8=int8,
                judging_N=judging_N,
                observe=lambda event: (events.append(event), stop and stop(event)),
                stop=stop.wish if stop else None,
            )

        request = ExportRequest(
            run=copy,
            settings=SETTINGS,
            precisions=("int8",),
            int8=Int8Request(kind="clean", num_images=64),
            budget=WIDE,
            num_images=30,
        )
        _, (_, exported) = export_run(request, fine_tune=tune)
        return exported, events

    return export


def fine_tuning_of(run):
    (folder,) = run.path.glob("fine-tuning-*")
    return RunDirectory(folder)


def state_of(run, step):
    return json.loads((run.checkpoint(step) / "train_state.json").read_text())


def test_the_file_is_written_with_trained_weights(copy, tuned):
    exported, _ = tuned(epochs=2)
    assert (exported.variant, exported.verification.status) == ("int8-qat", "verified")
    again = fine_tuning_of(copy)
    first, last = again.checkpoint_steps()[0], again.checkpoint_steps()[-1]
    assert state_of(again, last)["epoch"] == 2
    assert state_of(again, last)["best"]["num_validation"] == 100 - 30
    assert state_of(again, first)["sha256"] != state_of(again, last)["sha256"]


def test_temperatures_and_weights_go_on_from_the_run(copy, tuned):
    tuned()
    end = state_of(copy, copy.checkpoint_steps()[-1])["method_state"]
    start = state_of(fine_tuning_of(copy), 0)["method_state"]
    assert start == end
    assert start["temperatures"][1] != 1


def test_a_method_with_phases_stays_in_its_last(copy, tuned, monkeypatch):
    step, moments = BMTARD.step, []

    def noted(self, student, batch, state, moment):
        moments.append(moment)
        return step(self, student, batch, state, moment)

    monkeypatch.setattr(BMTARD, "step", noted)
    tuned()
    assert len(moments) > 1
    assert all(0.999 < moment.fraction < 1 for moment in moments)
    assert moments[0].rate_factor > moments[-1].rate_factor  # the rate has a schedule of its own


def test_without_checkpoints_of_the_run_it_starts_as_any_run_does(copy, tuned):
    shutil.rmtree(copy.checkpoints)
    exported, _ = tuned()
    assert exported.verification.status == "verified"
    assert state_of(fine_tuning_of(copy), 0)["method_state"]["temperatures"] == [1, 1]


def test_weights_before_it_are_kept_where_it_does_harm(copy, tuned, monkeypatch):
    """The candidate of step 0 is the file with all layers in 8 bits."""
    measured, original = [], compressor.trainer.measure_on_validation

    def worse_and_worse(network, validation, **options):
        clean, robust = original(network, validation, **options)
        measured.append(set(validation.index_N.tolist()))
        if len(measured) > 1:
            clean = type(clean)(num_correct=0, num_total=clean.num_total)
        return clean, robust

    monkeypatch.setattr(compressor.trainer, "measure_on_validation", worse_and_worse)
    exported, _ = tuned()
    assert len(measured) == 2
    assert (exported.variant, exported.details["fine_tuned_epochs"]) == ("int8", 0)
    assert (
        state_of(fine_tuning_of(copy), fine_tuning_of(copy).checkpoint_steps()[-1])["best"]["step"]
        == 0
    )
    request = ExportRequest(
        run=copy,
        settings=SETTINGS,
        precisions=("int8",),
        int8=Int8Request(kind="clean", num_images=64),
        budget=WIDE,
        num_images=30,
    )
    prepared, (_, plain) = export_run(request)
    assert plain.path == exported.path
    assert plain.sha256 == exported.sha256  # byte for byte what is written without fine-tuning
    validation = prepared.data.validation
    judging = set(validation.index_N[judging_places(validation, num_images=30)].tolist())
    assert len(judging) == 30
    assert not judging & measured[0]


class StopAtFirstStep:
    """Wishes for a stop as soon as a step is done."""

    def __init__(self):
        self.wish = StopWish()

    def __call__(self, event):
        if isinstance(event, StepDone):
            self.wish.signal_number = 2


def test_it_goes_on_after_an_interruption_and_is_not_repeated(copy, tuned):
    with pytest.raises(InterruptedRunError, match="again"):
        tuned(stop=StopAtFirstStep())
    assert not copy.onnx("int8-qat").exists()
    steps = fine_tuning_of(copy).checkpoint_steps()
    assert 0 < steps[-1] < 10
    interrupted, events = tuned()
    assert any(isinstance(event, StepDone) for event in events)
    again, events = tuned()
    assert not any(isinstance(event, StepDone) for event in events)
    assert again.sha256 == interrupted.sha256
    for folder in copy.path.glob("fine-tuning-*"):
        shutil.rmtree(folder)
    whole, _ = tuned()
    assert whole.sha256 == again.sha256


def test_other_images_are_refused(copy, tuned):
    facts = json.loads(copy.facts.read_text())
    copy.facts.write_text(json.dumps(facts | {"training_content_sha256": "0" * 64}))
    with pytest.raises(DataError, match="the training images are others than those of"):
        tuned()


def test_a_teacher_that_has_changed_is_refused(copy, tuned):
    facts = json.loads(copy.facts.read_text())
    for row in facts["teachers"]:
        row["sha256"] = "0" * 64
    copy.facts.write_text(json.dumps(facts))
    with pytest.raises(TeacherError, match="has changed since"):
        tuned()

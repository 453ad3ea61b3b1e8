"""What every method with one teacher keeps: the teacher as it was, a mean over any batch."""

import onnx  # noqa: TID253 (makes the files)
import pytest
import torch
from torch.testing import assert_close

from compressor.data import Batch
from compressor.errors import ExitCode, TeacherError
from compressor.method_recipes import (
    AdaADRecipe,
    ARDRecipe,
    DistillationRecipe,
    IADRecipe,
    RSLADRecipe,
)
from compressor.method_table import InnerAttackRecipe
from compressor.methods.build import build_method
from compressor.methods.protocol import Moment, StepResult
from compressor.methods.terms import weighted_sum
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.recipe import TeacherRecipe
from compressor.recipe_file import parse_recipe
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.teachers import load_teacher
from compressor.threat import ThreatModel
from compressor.training_workflow import TrainingRequest, train
from tests.onnx_files import linear_model

ATTACK = InnerAttackRecipe(num_steps=2, step_size_pixels=4 / 255)
TABLES = {
    "adaad": AdaADRecipe(attack=ATTACK),
    "adaad with clean": AdaADRecipe(attack=ATTACK, robust_weight=0.5),
    "ard": ARDRecipe(attack=ATTACK),
    "ard with labels": ARDRecipe(attack=ATTACK, teacher_weight=0.5),
    "distillation": DistillationRecipe(),
    "iad": IADRecipe(attack=ATTACK, begin_fraction=0.0),
    "iad, detached": IADRecipe(attack=ATTACK, begin_fraction=0.0, self_target="detached"),
    "iad before it begins": IADRecipe(attack=ATTACK),
    "rslad": RSLADRecipe(attack=ATTACK),
}
SPEC = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
CLASSES = tuple("0123456789")
CPU = torch.device("cpu")

every_method = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def make_teacher(seed=1):
    network = build_classifier(SPEC, seed=seed)
    with torch.no_grad():
        network.backbone.fc.weight.mul_(20)  # surer of itself than a network at random
    facts = {"spec": SPEC, "num_parameters": 1, "num_classes": 10, "sha256": "", "num_bytes": 0}
    return Teacher(name="t", role="robust", answer=network, network=network, **facts)


def make_method(table, teacher):
    threat = ThreatModel(epsilon_pixels=8 / 255)
    return build_method(table, threat=threat, teachers=[teacher], num_steps=10)


def make_student(dtype=torch.float32):
    performance = Performance(device=CPU, training_dtype=dtype)
    return Student(build_classifier(SPEC, seed=0), performance)


def make_batch(num_images=8, *, repeats=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(num_images, 1, 8, 8, generator=generator).repeat(repeats, 1, 1, 1)
    ids = torch.arange(num_images).repeat(repeats)
    return Batch(x_NCHW=x, y_N=ids % 10, index_N=ids, keys_N=ids)


def take_step(table, *, batch=None, student=None, teacher=None, fraction=0.0) -> StepResult:
    """One step, and its gradients in the student."""
    student = student or make_student()
    method = make_method(table, teacher or make_teacher())
    batch = batch or make_batch()
    result, state = method.step(student, batch, method.initial_state(), Moment(fraction=fraction))
    assert state == method.initial_state()
    assert method.tensors() == {}
    result.loss.backward()
    return result


def slopes(student):
    return torch.cat([p.grad.flatten() for p in student.network.parameters()])


@every_method
def test_the_teacher_stays_as_it_is(table):
    teacher = make_teacher()
    before = {name: t.clone() for name, t in teacher.network.state_dict().items()}
    take_step(table, teacher=teacher)
    assert all(p.grad is None for p in teacher.network.parameters())
    assert not any(m.training for m in teacher.network.modules())
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name


@every_method
def test_the_images_stay_as_they_are(table):
    batch = make_batch()
    take_step(table, batch=batch)
    assert torch.equal(batch.x_NCHW, make_batch().x_NCHW)
    assert batch.x_NCHW.grad is None
    assert not batch.x_NCHW.requires_grad


@every_method
@pytest.mark.parametrize("num_images", [1, 2])
def test_small_batches(table, num_images):
    student = make_student()
    result = take_step(table, batch=make_batch(num_images), student=student)
    assert result.loss.shape == ()
    assert torch.isfinite(slopes(student)).all()


@every_method
def test_the_loss_is_a_mean_over_images(table):
    """A batch twice over has the same loss and the same gradient."""
    once, twice = make_student(), make_student()
    first = take_step(table, student=once)
    second = take_step(table, student=twice, batch=make_batch(repeats=2))
    assert_close(first.loss, second.loss, rtol=1e-4, atol=0)  # T squared magnifies rounding
    assert_close(slopes(once), slopes(twice), rtol=1e-3, atol=1e-5)


@every_method
def test_bfloat16_is_close_to_float32(table):
    exact, rough = make_student(), make_student(torch.bfloat16)
    first, second = take_step(table, student=exact), take_step(table, student=rough)
    assert second.loss.dtype == torch.float32
    assert_close(second.loss, first.loss, rtol=0.03, atol=0)
    assert torch.cosine_similarity(slopes(exact), slopes(rough), dim=0) > 0.97


@every_method
def test_the_logged_loss_is_the_minimised_one(table):
    result = take_step(table)
    assert result.logged["loss_nats"] == pytest.approx(result.loss.item(), rel=1e-6)
    names = set(result.logged) - {"loss_nats", "teacher_trust_fraction"}
    assert all(name.endswith("_loss_nats") and result.logged[name] > 0 for name in names)


@every_method
def test_loss_scale_is_a_factor_on_the_divergences_alone(table):
    logged = take_step(table).logged
    doubled = take_step(table.model_copy(update={"loss_scale": 2 * table.loss_scale})).logged
    of_labels = {"label_loss_nats", "loss_nats"} if table.name == "distillation" else {"loss_nats"}
    if table.name in {"ard", "iad"}:
        of_labels.add("clean_loss_nats")
    for name, value in logged.items():
        if name.endswith("_loss_nats"):
            factor = 1 if name in of_labels else 2
            assert doubled[name] == pytest.approx(factor * value, rel=1e-6), name


NUM_PASSES = {
    "adaad": ["adversarial"],
    "adaad with clean": ["clean", "adversarial"],
    "ard": ["adversarial"],
    "ard with labels": ["adversarial", "clean"],
    "distillation": ["clean"],
    "iad": ["adversarial", "clean"],
    "iad, detached": ["adversarial", "clean"],
    "iad before it begins": ["adversarial"],
    "rslad": ["adversarial", "clean"],
}


@pytest.mark.parametrize("name", TABLES)
def test_passes_in_train_mode_and_their_order(name, monkeypatch):
    """The order decides the BatchNorm statistics; a pass without a loss would only cost."""
    student, batch, seen = make_student(), make_batch(), []
    answer = student.logits

    def logits(x_NCHW):
        seen.append("clean" if torch.equal(x_NCHW, batch.x_NCHW) else "adversarial")
        return answer(x_NCHW)

    monkeypatch.setattr(student, "logits", logits)
    take_step(TABLES[name], student=student, batch=batch)
    assert seen == NUM_PASSES[name]
    tracked = student.network.backbone.bn1.num_batches_tracked
    assert tracked.item() == len(seen)  # none of them by the attack


@pytest.mark.parametrize("num_steps", [200, 391 * 200])
def test_iad_begins_at_the_epoch_of_the_authors(num_steps):
    first = 60 * num_steps // 200
    for step, has_begun in ((first - 1, False), (first, True)):
        logged = take_step(IADRecipe(attack=ATTACK), fraction=step / num_steps).logged
        assert ("introspection_loss_nats" in logged) == has_begun


def test_before_it_begins_iad_is_ard():
    early = take_step(IADRecipe(attack=ATTACK, temperature=3.0)).loss
    ard = take_step(ARDRecipe(attack=ATTACK, temperature=3.0, loss_scale=1.0)).loss
    assert torch.equal(early, ard)


def test_a_sum_needs_a_term():
    with pytest.raises(ValueError, match="at least one term"):
        weighted_sum({})


@pytest.fixture
def onnx_file(tmp_path):
    onnx.save(linear_model(), tmp_path / "teacher.onnx")
    return tmp_path / "teacher.onnx"


@pytest.mark.parametrize("name", ["adaad", "ard", "distillation", "iad", "rslad"])
def test_only_adaad_refuses_a_teacher_that_only_answers(name, onnx_file):
    recipe = TeacherRecipe(role="robust", source=str(onnx_file))
    teacher = load_teacher(recipe, class_names=CLASSES, image_shape=(1, 8, 8))
    if TABLES[name].needs_teacher_networks:
        assert name == "adaad"
        with pytest.raises(TeacherError, match=r"teacher\.onnx: method 'adaad' takes gradients"):
            make_method(TABLES[name], teacher)
    else:
        assert take_step(TABLES[name], teacher=teacher).loss > 0


def test_an_onnx_teacher_of_adaad_is_refused_before_anything_is_written(onnx_file, tmp_path):
    table = {
        "name": "contract",
        "data": {"source": "digits", "validation_size": 100, "crop_padding_pixels": 1},
        "student": {"architecture": "tiny"},
        "teachers": [{"role": "robust", "source": str(onnx_file)}],
        "method": {"name": "adaad"},
        "training": {"epochs": 1, "batch_size": 400},
    }
    recipe = parse_recipe(table, origin="the test")
    with pytest.raises(TeacherError) as caught:
        train(recipe, TrainingRequest(out=tmp_path / "run", accept_teachers=True))
    message = str(caught.value)
    for part in ("robust teacher", "teacher.onnx", "'adaad'", "ARCH:FILE", "rslad"):
        assert part in message
    assert caught.value.exit_code == ExitCode.KNOWN_ERROR
    assert not (tmp_path / "run").exists()

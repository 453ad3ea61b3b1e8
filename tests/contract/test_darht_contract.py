"""DARHT: the coin, what each phase moves, and teachers of every number and mode."""

import json

import pytest
import torch
from torch import nn

from compressor.architectures.teacher_map import add_teacher_map
from compressor.data import Batch
from compressor.errors import TeacherError
from compressor.method_recipes import DARHTAttackRecipe, DARHTRecipe
from compressor.methods.build import build_method
from compressor.methods.darht import DARHTState
from compressor.methods.protocol import Moment
from compressor.methods.teacher_modes import drawing_from, drawing_teachers
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.randomness import sample_keys
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.threat import ThreatModel

ATTACK = DARHTAttackRecipe(num_steps=2, step_size_pixels=4 / 255)
SPEC = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
LABELS, BOTH, TEACHERS = Moment(fraction=0.0), Moment(fraction=0.2), Moment(fraction=0.5)
PHASES = pytest.mark.parametrize("moment", [LABELS, BOTH, TEACHERS], ids=["1", "2", "3"])
ADVERSARIAL = DARHTState(draw=0.0)


def make_teacher(seed=1, *, dropout=0.0):
    network = build_classifier(SPEC, seed=seed)
    with torch.no_grad():
        network.backbone.fc.weight.mul_(20)  # surer of itself than a network at random
    network.backbone.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout))
    facts = {"spec": SPEC, "num_parameters": 1, "num_classes": 10, "sha256": "", "num_bytes": 0}
    return Teacher(name=f"t{seed}", role="robust", answer=network, network=network, **facts)


def make_method(teachers, **settings):
    recipe = DARHTRecipe(attack=ATTACK, **settings)
    return build_method(
        recipe, threat=ThreatModel(epsilon_pixels=8 / 255), teachers=teachers, num_steps=10
    )


def make_student(num_teachers=2, *, dtype=torch.float32):
    network = build_classifier(SPEC, seed=0)
    add_teacher_map(network, num_classes=10, num_teachers=num_teachers, seed=0)
    return Student(network, Performance(device=torch.device("cpu"), training_dtype=dtype))


def make_batch(num_images=8, *, epoch=0):
    x = torch.rand(num_images, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(num_images)
    return Batch(x_NCHW=x, y_N=ids % 10, index_N=ids, keys_N=sample_keys(ids, seed=0, epoch=epoch))


def take_step(method, student, *, moment=BOTH, state=ADVERSARIAL, batch=None, rate=0.1):
    """One step of the optimiser; what the method gave."""
    optimizer = torch.optim.SGD(student.network.parameters(), lr=rate, weight_decay=0.1)
    result, state = method.step(student, batch or make_batch(), state, moment)
    result.loss.backward()
    optimizer.step()
    return result, state


def slopes(student):
    return {name: p.grad for name, p in student.network.named_parameters()}


def weights(student):
    return {name: p.detach().clone() for name, p in student.network.named_parameters()}


# the coin


def next_draws(num=2_000):
    method, student = make_method([make_teacher()]), make_student(1)
    draws = []
    for epoch in range(num):
        batch = make_batch(2, epoch=epoch)
        _, state = method.step(student, batch, DARHTState(draw=0.5), LABELS)
        draws.append(state.draw)
    return draws


def test_the_coin_is_fair_and_comes_from_the_keys():
    draws = next_draws(400)
    assert len(set(draws)) == 400
    heads = sum(draw < 0.5 for draw in draws)
    assert abs(heads - 200) < 4 * 10  # four standard deviations
    assert draws[:5] == next_draws(5)


@pytest.mark.parametrize(
    ("share", "draw", "is_adversarial"),
    [(0.5, 0.49, 1), (0.5, 0.5, 0), (0.0, 0.0, 0), (1.0, 0.999, 1)],
)
def test_the_draw_decides_whether_the_batch_is_attacked(share, draw, is_adversarial):
    method = make_method([make_teacher()], adversarial_share=share)
    seen = []

    def attack(model, x_NCHW, targets, *, keys_N):
        seen.append(model)
        return x_NCHW

    object.__setattr__(method, "attack", attack)
    result, _ = method.step(make_student(1), make_batch(), DARHTState(draw=draw), LABELS)
    assert result.logged["adversarial_fraction"] == is_adversarial == len(seen)


def test_the_state_survives_json():
    method = make_method([make_teacher()])
    _, state = method.step(make_student(1), make_batch(), method.initial_state(), LABELS)
    assert method.restore_state(json.loads(json.dumps({"draw": state.draw}))) == state
    assert method.initial_state().draw == 0.5


# what each phase moves


def test_teachers_are_not_asked_before_they_teach():
    result, _ = take_step(make_method([make_teacher()]), make_student(1), moment=LABELS)
    assert set(result.logged) == {"loss_nats", "label_loss_nats", "adversarial_fraction"}


def moved_by(last_layer):
    student = make_student()
    before = weights(student)
    teachers = [make_teacher(1), make_teacher(2)]
    take_step(make_method(teachers, last_layer=last_layer), student, moment=TEACHERS)
    return student, before


def test_in_the_last_phase_labels_move_the_last_layer_alone():
    with_labels, _ = moved_by("labels")
    frozen, _ = moved_by("frozen")
    for name, slope in slopes(with_labels).items():
        if name.endswith(("to_logits.weight", "to_logits.bias")):
            assert slope.abs().sum() > 0
            assert slopes(frozen)[name] is None
        else:
            assert torch.equal(slope, slopes(frozen)[name]), name


def test_a_frozen_last_layer_does_not_move_and_a_decaying_one_decays():
    frozen, before = moved_by("frozen")
    decaying, _ = moved_by("decaying")
    name = "backbone.fc.to_logits.weight"
    assert torch.equal(weights(frozen)[name], before[name])
    assert torch.allclose(weights(decaying)[name], before[name] * (1 - 0.1 * 0.1), rtol=1e-6)
    other = "backbone.fc.to_map.weight"
    assert torch.equal(weights(frozen)[other], weights(decaying)[other])


@PHASES
def test_a_skipped_batch_moves_nothing(moment):
    student = make_student(1)
    before = weights(student)
    method = make_method([make_teacher()], skip_above_nats=0.5)
    result, _ = take_step(method, student, moment=moment)
    assert result.logged["skipped_fraction"] == 1
    assert result.logged["loss_nats"] > 0.5
    for name, value in weights(student).items():
        assert torch.equal(value, before[name]), name
    result, _ = take_step(make_method([make_teacher()], skip_above_nats=50), student, moment=moment)
    assert result.logged["skipped_fraction"] == 0
    assert not torch.equal(
        weights(student)["backbone.conv1.weight"], before["backbone.conv1.weight"]
    )


# teachers


@PHASES
@pytest.mark.parametrize("mode", ["eval", "dropout", "train"])
def test_given_teachers_stay_as_they_are(mode, moment):
    teachers = [make_teacher(1, dropout=0.3), make_teacher(2)]
    before = [{n: t.clone() for n, t in t.network.state_dict().items()} for t in teachers]
    state = torch.random.get_rng_state()
    take_step(make_method(teachers, teacher_mode=mode), make_student(), moment=moment)
    assert torch.equal(torch.random.get_rng_state(), state)
    for teacher, tensors in zip(teachers, before, strict=True):
        assert all(p.grad is None for p in teacher.network.parameters())
        assert not any(m.training for m in teacher.network.modules())
        for name, value in teacher.network.state_dict().items():
            assert torch.equal(value, tensors[name]), name


def loss_of(method, *, draw=0.0):
    result, _ = take_step(method, make_student(1), state=DARHTState(draw=draw))
    return result.logged["loss_nats"]


def test_dropout_draws_from_the_state_of_the_run():
    teacher = make_teacher(dropout=0.3)
    method = make_method([teacher], teacher_mode="dropout")
    assert method.tensors() == {}
    assert loss_of(method) == loss_of(method)
    assert loss_of(method) != loss_of(method, draw=0.1)
    assert loss_of(method) != loss_of(make_method([teacher]))


def test_without_dropout_nothing_is_drawn():
    method = make_method([make_teacher()], teacher_mode="dropout")
    assert loss_of(method) == loss_of(make_method([make_teacher()]))


def test_train_mode_collects_statistics_that_checkpoints_hold():
    method = make_method([make_teacher(1), make_teacher(2)], teacher_mode="train")
    before = {name: value.clone() for name, value in method.tensors().items()}
    assert "teacher_1.backbone.bn1.running_mean" in before
    assert not any("weight" in name for name in before)
    take_step(method, make_student(), moment=BOTH)
    changed = {n for n, value in method.tensors().items() if not torch.equal(value, before[n])}
    assert changed == set(before)


def test_modes_of_the_copies():
    network = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    teacher = make_teacher()
    teacher.network.backbone.extra = network.eval()
    copy = drawing_teachers([teacher], mode="dropout")[0].network
    drawing = {type(m).__name__ for m in copy.modules() if m.training}
    assert drawing == {"Dropout", "MultiheadAttention"}
    assert all(m.training for m in drawing_teachers([teacher], mode="train")[0].network.modules())


def test_dropout_of_teachers_without_any_is_refused():
    teacher = make_teacher()
    teacher.network.backbone.avgpool = nn.AdaptiveAvgPool2d(1)
    with pytest.raises(TeacherError, match=r'no teacher has a layer that draws \(t1\).*"eval"'):
        drawing_teachers([teacher], mode="dropout")


def test_randomness_inside_is_that_of_the_seed_and_outside_as_before():
    state = torch.random.get_rng_state()
    with drawing_from(3, torch.device("cpu")):
        first = torch.rand(4)
    assert torch.equal(torch.random.get_rng_state(), state)
    with drawing_from(3, torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)


@pytest.mark.parametrize("mode", ["dropout", "train"])
def test_an_onnx_teacher_has_no_train_mode(mode):
    facts = {"spec": None, "num_parameters": None, "num_classes": 10, "sha256": "", "num_bytes": 0}
    teacher = Teacher(name="a.onnx", role="clean", answer=lambda x: x, network=None, **facts)
    with pytest.raises(TeacherError, match=r"clean teacher a\.onnx is .*teacher_mode = \"eval\""):
        make_method([teacher], teacher_mode=mode)
    make_method([teacher])  # answers are enough


@PHASES
def test_the_order_of_teachers_does_not_matter(moment):
    """With the slices in the same order, losses and gradients are those of the other order."""
    teachers = [make_teacher(seed) for seed in (1, 2, 3)]
    one, other = make_student(3), make_student(3)
    order = torch.tensor([2, 0, 1])
    rows = (order[:, None] * 10 + torch.arange(10)).flatten()
    head = other.network.backbone.fc
    with torch.no_grad():
        head.to_map.weight.copy_(head.to_map.weight[rows])
        head.to_map.bias.copy_(head.to_map.bias[rows])
        head.to_logits.weight.copy_(head.to_logits.weight[:, rows])
    first, _ = take_step(make_method(teachers), one, moment=moment)
    second, _ = take_step(make_method([teachers[i] for i in order]), other, moment=moment)
    assert first.logged["loss_nats"] == pytest.approx(second.logged["loss_nats"], rel=1e-5)
    name = "backbone.conv1.weight"
    assert torch.allclose(slopes(one)[name], slopes(other)[name], rtol=1e-3, atol=1e-6)


@PHASES
@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("num_teachers", [1, 5])
def test_few_images_and_any_number_of_teachers(num_images, num_teachers, moment):
    method = make_method([make_teacher(seed) for seed in range(num_teachers)])
    student = make_student(num_teachers)
    result, _ = take_step(method, student, moment=moment, batch=make_batch(num_images))
    assert torch.isfinite(result.loss)
    assert all(torch.isfinite(slope).all() for slope in slopes(student).values())


@PHASES
def test_bfloat16_is_close_to_float32(moment):
    teachers = [make_teacher(1), make_teacher(2)]
    exact, _ = take_step(make_method(teachers), make_student(), moment=moment)
    rounded, _ = take_step(make_method(teachers), make_student(dtype=torch.bfloat16), moment=moment)
    assert rounded.loss.dtype == torch.float32
    assert rounded.logged == pytest.approx(exact.logged, rel=0.03, abs=0.01)

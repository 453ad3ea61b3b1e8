"""What every method with teachers of both roles keeps: any order, copies, small batches, teachers
as they were."""

import dataclasses
import json

import onnx  # noqa: TID253 (makes the files)
import pytest
import torch
from torch.testing import assert_close

from compressor.data import Batch
from compressor.method_recipes import BMTARDRecipe, CIARDRecipe, MTARDRecipe, RCRecipe
from compressor.method_table import InnerAttackRecipe
from compressor.methods.build import build_method
from compressor.methods.protocol import Moment
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.recipe import TeacherRecipe
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.teachers import load_teacher
from compressor.threat import ThreatModel
from tests.onnx_files import linear_model

ATTACK = InnerAttackRecipe(num_steps=2, step_size_pixels=4 / 255)
BMTARD = BMTARDRecipe(attack=ATTACK, temperature_rate=0.05, weight_rate=0.2)
MTARD = MTARDRecipe(attack=ATTACK, weight_rate=0.2, relative_loss_exponent=2.0)
RC = RCRecipe(temperature_rate=0.05, weight_rate=0.2)
CIARD = CIARDRecipe(attack=ATTACK, teacher_learning_rate=0.01)
TABLES = {
    "bmtard": BMTARD,
    "mtard": MTARD,
    "rc": RC,
    "ciard": CIARD,
    "ciard as released": CIARD.model_copy(update={"teacher_statistics": "batch"}),
}
SPEC = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8), width=0.5)
FIVE = [("robust", 1), ("clean", 2), ("robust", 3), ("clean", 4), ("robust", 5)]
TWO = [("clean", 2), ("robust", 1)]
NUM_STEPS = 3

every_method = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
of_any_number = pytest.mark.parametrize("table", [BMTARD, MTARD, RC], ids=["bmtard", "mtard", "rc"])


def make_teacher(role, seed):
    """Of random weights, but the surer the higher the seed."""
    network = build_classifier(SPEC, seed=seed)
    with torch.no_grad():
        network.backbone.fc.weight.mul_(5 * seed)
    facts = {"spec": SPEC, "num_parameters": 1, "num_classes": 10, "num_bytes": 0}
    hash_ = f"{(seed * 7) % 10}"  # whose order is not that of the seeds
    return Teacher(name="t", role=role, answer=network, network=network, sha256=hash_, **facts)


def make_method(table, teachers):
    threat = ThreatModel(epsilon_pixels=8 / 255)
    made = [t if isinstance(t, Teacher) else make_teacher(*t) for t in teachers]
    return build_method(table, threat=threat, teachers=made, num_steps=10_000)


def teacher_set(method):
    """Also of a method whose attack grows."""
    return getattr(method, "method", method).teachers


def make_batch(num_images, step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.arange(num_images)
    x = torch.rand(num_images, 1, 8, 8, generator=generator)
    return Batch(x_NCHW=x, y_N=(ids + step) % 10, index_N=ids, keys_N=ids + 100 * step)


def take_steps(method, *, num_images=8, dtype=torch.float32):
    """What was logged, the gradients and the state of some steps, in the last third of a run."""
    performance = Performance(device=torch.device("cpu"), training_dtype=dtype)
    student = Student(build_classifier(SPEC, seed=0), performance)
    rows, state = [], method.initial_state()
    for step in range(NUM_STEPS):
        moment = Moment(fraction=0.6 + 0.1 * step)
        result, state = method.step(student, make_batch(num_images, step), state, moment)
        student.network.zero_grad()
        result.loss.backward()
        parameters = list(student.network.parameters())
        slopes = torch.cat([p.grad.flatten() for p in parameters])
        rows.append((dict(result.logged), slopes, result.loss.detach()))
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(0.5 * parameter.grad)
    return rows, state


def renamed(logged, places):
    """Names with a position, moved to where their teacher stands in the other order."""
    moved = {}
    for name, value in logged.items():
        role, *middle, unit = name.split("_")
        if middle and middle[-1].isdecimal():
            middle[-1] = str(places[role][int(middle[-1]) - 1])
        moved["_".join([role, *middle, unit])] = value
    return moved


@of_any_number
@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 1, 4, 3]])
def test_the_order_of_teachers_changes_nothing_to_the_last_bit(table, order):
    ours, _ = take_steps(make_method(table, FIVE))
    theirs, _ = take_steps(make_method(table, [FIVE[i] for i in order]))
    places = {}
    for role in ("clean", "robust"):
        here = [i for i, (found, _) in enumerate(FIVE) if found == role]
        there = [i for i in order if FIVE[i][0] == role]
        places[role] = [there.index(i) + 1 for i in here]
    for (logged, slopes, loss), (their_logged, their_slopes, their_loss) in zip(
        ours, theirs, strict=True
    ):
        assert renamed(logged, places) == their_logged
        assert torch.equal(slopes, their_slopes)
        assert torch.equal(loss, their_loss)


@of_any_number
@pytest.mark.parametrize("num_copies", [1, 2])
def test_a_copy_changes_nothing_but_the_share_between_the_copies(table, num_copies):
    """The third robust teacher once more, or twice."""
    ours, state = take_steps(make_method(table, FIVE))
    theirs, their_state = take_steps(make_method(table, FIVE + [FIVE[4]] * num_copies))
    assert state == their_state
    for (logged, slopes, _), (their_logged, their_slopes, _) in zip(ours, theirs, strict=True):
        assert torch.equal(slopes, their_slopes)
        weights = [
            their_logged.pop(f"robust_weight_{place}_fraction")
            for place in range(3, 4 + num_copies)
        ]
        assert weights == [logged.pop("robust_weight_3_fraction") / (1 + num_copies)] * len(weights)
        copies = {name for name in their_logged if "_4_" in name or "_5_" in name}
        assert all(
            their_logged.pop(name) == logged[name.replace(name.split("_")[-2], "3")]
            for name in copies
        )
        assert their_logged == logged


@of_any_number
def test_two_of_the_same_role_are_a_copy_only_if_all_is_the_same(table):
    """The same file behind another normalisation, or in another role, is another teacher."""
    plain = make_teacher("robust", 1)
    other = dataclasses.replace(plain, spec=dataclasses.replace(SPEC, mean=(0.5,), std=(0.5,)))
    clean = make_teacher("clean", 1)
    teachers = teacher_set(make_method(table, [plain, other, clean, plain]))
    assert [m.positions for m in teachers.members] in [
        [(1, 3), (2,), (1,)],
        [(2,), (1, 3), (1,)],
    ]
    assert sorted(teachers.shares) == [0.5, 0.5, 1.0]


@of_any_number
def test_the_same_tensors_in_another_file_are_a_copy(table):
    """A file may have other metadata; a network with one other number is another teacher."""
    plain, saved_again, changed = (make_teacher("robust", 1) for _ in range(3))
    saved_again = dataclasses.replace(saved_again, sha256="another file")
    with torch.no_grad():
        changed.network.backbone.fc.bias[3] += 1e-6
    method = make_method(table, [plain, saved_again, changed, make_teacher("clean", 1)])
    positions = [m.positions for m in teacher_set(method).members if m.teacher.role == "robust"]
    assert sorted(positions) == [(1, 2), (3,)]


@of_any_number
def test_roles_have_half_of_the_weight_whatever_their_numbers(table):
    method = make_method(table.model_copy(update={"weight_rate": 0.0}), FIVE)
    for logged, _, _ in take_steps(method)[0]:
        weights = {n: v for n, v in logged.items() if n.endswith("_fraction")}
        assert [v for n, v in weights.items() if n.startswith("clean")] == [0.25] * 2
        assert [v for n, v in weights.items() if n.startswith("robust")] == [1 / 6] * 3


def test_names_of_one_of_each_have_no_position():
    logged = take_steps(make_method(BMTARD, TWO))[0][0][0]
    stems = ["loss_nats", "weight_fraction", "temperature_ratio", "teacher_entropy_nats"]
    names = [f"{role}_{stem}" for stem in stems for role in ("robust", "clean")]
    assert list(logged) == ["loss_nats", *names]


def test_names_of_several_have_the_position_in_their_role():
    logged = take_steps(make_method(BMTARD, [*TWO, ("robust", 3)]))[0][0][0]
    losses = {name for name in logged if "loss" in name}
    assert losses == {"loss_nats", "clean_loss_nats", "robust_loss_1_nats", "robust_loss_2_nats"}


def test_mtard_is_bmtard_without_temperatures():
    without = BMTARD.model_copy(update={"temperature_rate": 0.0})
    same = MTARD.model_copy(update={"relative_loss_exponent": 1.0})
    pairs = zip(
        take_steps(make_method(without, FIVE))[0],
        take_steps(make_method(same, FIVE))[0],
        strict=True,
    )
    for (logged, slopes, _), (their_logged, their_slopes, _) in pairs:
        assert torch.equal(slopes, their_slopes)
        assert their_logged.items() <= logged.items()


@every_method
@pytest.mark.parametrize("num_images", [1, 2])
def test_small_batches(table, num_images):
    for _, slopes, loss in take_steps(make_method(table, TWO), num_images=num_images)[0]:
        assert loss.shape == ()
        assert torch.isfinite(slopes).all()


@every_method
def test_the_given_teachers_stay_as_they_are(table):
    teachers = [make_teacher(*t) for t in TWO]
    before = [{n: v.clone() for n, v in t.network.state_dict().items()} for t in teachers]
    take_steps(make_method(table, teachers))
    for teacher, values in zip(teachers, before, strict=True):
        assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())
        assert not any(module.training for module in teacher.network.modules())
        for name, value in teacher.network.state_dict().items():
            assert torch.equal(value, values[name]), name


@every_method
def test_bfloat16_is_close_to_float32(table):
    exact, _ = take_steps(make_method(table, TWO))
    rough, _ = take_steps(make_method(table, TWO), dtype=torch.bfloat16)
    (_, slopes, loss), (_, rough_slopes, rough_loss) = exact[0], rough[0]
    assert rough_loss.dtype == torch.float32
    assert_close(rough_loss, loss, rtol=0.05, atol=0)
    assert torch.cosine_similarity(slopes, rough_slopes, dim=0) > 0.95


@every_method
def test_the_logged_loss_is_the_minimised_one(table):
    for logged, _, loss in take_steps(make_method(table, TWO))[0]:
        assert logged["loss_nats"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("table", [BMTARD, MTARD, CIARD], ids=lambda table: table.name)
def test_state_survives_json(table):
    method = make_method(table, TWO if table is CIARD else FIVE)
    for state in (method.initial_state(), take_steps(method)[1]):
        stored = json.loads(json.dumps(dataclasses.asdict(state)))
        assert method.restore_state(stored) == state


def test_ciard_copy_is_in_the_checkpoint_with_all_that_it_carries():
    method = make_method(CIARD, TWO)
    network = method.robust_teacher.network
    names = set(method.tensors())
    assert {f"teacher.{name}" for name in network.state_dict()} <= names
    assert {f"teacher_momentum.{name}" for name, _ in network.named_parameters()} <= names
    before = {name: value.clone() for name, value in method.tensors().items()}
    take_steps(method)
    moved = {
        name for name, value in method.tensors().items() if not torch.equal(value, before[name])
    }
    assert {"teacher.backbone.fc.weight", "teacher_momentum.backbone.fc.weight"} <= moved
    assert not any("running" in name for name in moved)  # as the teacher came


@pytest.fixture
def onnx_file(tmp_path):
    onnx.save(linear_model(), tmp_path / "teacher.onnx")
    return tmp_path / "teacher.onnx"


def test_ciard_asks_an_onnx_clean_teacher(onnx_file):
    recipe = TeacherRecipe(role="clean", source=str(onnx_file))
    clean = load_teacher(recipe, class_names=tuple("0123456789"), image_shape=(1, 8, 8))
    rows, _ = take_steps(make_method(CIARD, [clean, make_teacher("robust", 1)]))
    assert all(torch.isfinite(slopes).all() for _, slopes, _ in rows)


def test_two_onnx_teachers_are_copies_only_with_the_same_preprocessing(onnx_file):
    def loaded(**changes):
        recipe = TeacherRecipe(role="robust", source=str(onnx_file), **changes)
        return load_teacher(recipe, class_names=tuple("0123456789"), image_shape=(1, 8, 8))

    assert loaded().identity == loaded().identity
    assert loaded().identity != loaded(mean=(0.5,), std=(0.5,)).identity

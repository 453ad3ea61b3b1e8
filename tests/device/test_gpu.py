"""What a real GPU computes: attacks, searches, a verification, and one B-MTARD step.

Against their contracts, and where numbers can be the same, against the CPU.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from compressor.attacks.build import build_inner_attack, evaluation_attacks, selection_attack
from compressor.attacks.search import by_logits
from compressor.attacks.stages import build_stages
from compressor.data import Batch
from compressor.folding import EvaluationView
from compressor.losses import cross_entropy
from compressor.method_table import InnerAttackRecipe
from compressor.methods.bmtard import BMTARD
from compressor.methods.protocol import Moment
from compressor.methods.teacher_set import TeacherSet
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.randomness import sample_keys
from compressor.recipe_file import parse_recipe
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.threat import ThreatModel
from compressor.training_workflow import TrainingRequest, train
from compressor.verification.request import VerificationRequest
from compressor.verification_workflow import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]

EPSILON = 8 / 255
THREAT = ThreatModel(epsilon_pixels=EPSILON)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PERFORMANCE = Performance(device=CUDA)
ATTACKS = {
    **evaluation_attacks(THREAT),
    "selection": selection_attack(THREAT, num_steps=20),
    **{
        f"inner_{start}": build_inner_attack(
            InnerAttackRecipe(start=start), threat=THREAT, objective=cross_entropy
        )
        for start in ("gaussian", "uniform", "zero")
    },
}


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """In all bits of float32, or 1e-4 would be out of reach; and the same every time."""
    resolve_performance(PerformanceSettings())
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def make_batch(make_images):
    def make(device):
        x, y = make_images(24)
        keys = sample_keys(torch.arange(24), seed=0)
        return Batch(
            x_NCHW=x.to(device).contiguous(memory_format=torch.channels_last),
            y_N=y.to(device),
            index_N=torch.arange(24, device=device),
            keys_N=keys.to(device),
        )

    return make


def make_network(seed):
    spec = NetworkSpec(architecture="tiny", num_classes=4, image_shape=(3, 8, 8))
    return build_classifier(spec, seed=seed)


def make_teacher(role, seed, performance):
    network = performance.place_network(make_network(seed))
    return Teacher(
        name=role,
        role=role,
        answer=network,
        network=network,
        spec=None,
        num_parameters=None,
        num_classes=4,
        sha256="",
        num_bytes=0,
    )


def bmtard_step(batch, performance, *, start="zero"):
    """What was logged, and the gradients of the student."""
    method = BMTARD(
        teachers=TeacherSet.of(
            [make_teacher("clean", 1, performance), make_teacher("robust", 2, performance)]
        ),
        attack=ATTACKS[f"inner_{start}"],
        loss_scale=0.1,
        temperature_rate=0.001,
        temperature_bounds=(1.0, 10.0),
        weight_rate=0.025,
    )
    student = Student(make_network(0), performance)
    result, _ = method.step(student, batch, method.initial_state(), Moment())
    result.loss.backward()
    return result.logged, {name: p.grad.cpu() for name, p in student.network.named_parameters()}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_keeps_its_contract_on_cuda(name, make_batch):
    batch = make_batch(CUDA)
    network = PERFORMANCE.place_network(make_network(0)).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    view, x_before = EvaluationView(network, PERFORMANCE), batch.x_NCHW.clone()

    first, second = (
        ATTACKS[name](view, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N) for _ in range(2)
    )
    assert first.device == batch.x_NCHW.device
    assert (first.shape, first.dtype) == (x_before.shape, x_before.dtype)
    assert not first.requires_grad
    assert float((first - x_before).abs().max()) <= EPSILON + 1e-6
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    assert_close(first, second, rtol=0, atol=1e-4)
    assert torch.equal(batch.x_NCHW, x_before)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    losses = [cross_entropy(network(x), batch.y_N).mean().item() for x in (x_before, first)]
    assert losses[1] > losses[0]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_does_not_wait_for_cuda(name, make_batch):
    batch = make_batch(CUDA)
    view = EvaluationView(PERFORMANCE.place_network(make_network(0)), PERFORMANCE)
    ATTACKS[name](view, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)  # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        ATTACKS[name](view, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)
    finally:
        torch.cuda.set_sync_debug_mode("default")


NUM_STEPS = 10


def make_searches(threat):
    """Those of both cascades, cut to a few steps."""
    searches = {}
    for mode in ("fast", "compat"):
        names = ("apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square")
        for stage in build_stages(names, threat=threat, mode=mode, batch_size=24):
            searches[f"{mode} {stage.name}"] = (stage, shortened(stage.search))
    return searches


def shortened(search):
    """The same, with `NUM_STEPS` steps or queries."""
    if hasattr(search, "attack"):
        return replace(search, attack=shortened(search.attack))
    steps = "num_queries" if hasattr(search, "num_queries") else "num_steps"
    return replace(search, **{steps: NUM_STEPS})


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", make_searches(THREAT))
def test_search_keeps_its_contract_on_cuda(name, norm, make_batch):
    """On images that are answered correctly; some of them fall."""
    threat = ThreatModel(norm=norm, epsilon_pixels=EPSILON if norm == "linf" else 0.5)
    stage, search = make_searches(threat)[name]
    batch = make_batch(CUDA)
    network = PERFORMANCE.place_network(make_network(0)).eval()
    view, x_before = EvaluationView(network, PERFORMANCE), batch.x_NCHW.clone()
    with torch.no_grad():
        y_N = view(batch.x_NCHW).argmax(dim=1)

    def run():
        draws = stage.draws(batch.x_NCHW, keys_N=batch.keys_N, seed=0)
        return search.search(view, batch.x_NCHW, y_N, draws=draws, judge=by_logits)

    found, again = run(), run()
    assert found.x_adv_NCHW.device == batch.x_NCHW.device
    assert threat.contains(found.x_adv_NCHW, x_before).all()
    assert torch.equal(batch.x_NCHW, x_before)
    with torch.no_grad():
        fooled_N = by_logits(found.x_adv_NCHW, view(found.x_adv_NCHW), y_N)
    assert torch.equal(found.is_fooled_N, fooled_N)
    assert torch.equal(found.is_fooled_N, again.is_fooled_N)
    assert_close(found.x_adv_NCHW, again.x_adv_NCHW, rtol=0, atol=1e-4)
    assert int(found.num_forwards_N.min()) > 0
    assert found.num_backwards_N.any() != (stage.name == "square")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that knows digits, trained on the CPU."""
    table = {
        "name": "gpu",
        "threat": {"epsilon_pixels": "32/255"},
        "data": {
            "source": "digits",
            "validation_size": 100,
            "crop_padding_pixels": 0,
            "horizontal_flip": False,
        },
        "student": {"architecture": "tiny"},
        "method": {"name": "cross_entropy"},
        "training": {"epochs": 3, "batch_size": 64},
        "selection": {"num_steps": 1},
    }
    settings = PerformanceSettings(device="cpu", training_dtype="float32")
    out = tmp_path_factory.mktemp("runs") / "gpu"
    return train(parse_recipe(table, origin="test"), TrainingRequest(out=out, settings=settings))


def verify_on(device, run, folder, *, dtype="float32", mode="fast"):
    request = VerificationRequest(
        target=str(run.path),
        settings=PerformanceSettings(device=device, training_dtype=dtype),
        attacks=("fgsm", "pgd_sat", "apgd_ce", "apgd_t"),
        mode=mode,
        num_images=60,
        batch_size=25,
        folder=folder / f"{device}-{dtype}-{mode}",
    )
    return verify(request)[0]


@pytest.mark.parametrize("mode", ["fast", "compat"])
def test_verification_on_cuda_is_that_of_the_cpu(run, tmp_path, mode):
    """Up to a borderline image: convolutions add up in another order."""
    on_cpu, on_cuda = (verify_on(device, run, tmp_path, mode=mode) for device in ("cpu", "cuda"))
    assert on_cuda.status == "verified"
    assert on_cuda.environment["device"] != on_cpu.environment["device"]
    assert on_cuda.samples.index == on_cpu.samples.index
    assert on_cuda.clean == on_cpu.clean
    difference = on_cuda.worst_case.num_correct - on_cpu.worst_case.num_correct
    assert abs(difference) <= 1
    assert 0 < on_cuda.worst_case.num_correct < on_cuda.clean.num_correct


def test_search_in_bfloat16_flatters_nobody(run, tmp_path):
    """What float32 decides after a search in fewer bits; none is missed but for borderline ones."""
    exact, fast = (verify_on("cuda", run, tmp_path, dtype=d) for d in ("float32", "bfloat16"))
    assert fast.clean == exact.clean
    assert abs(fast.worst_case.num_correct - exact.worst_case.num_correct) <= 1


def test_bmtard_step_on_cuda_is_that_of_the_cpu(make_batch):
    cpu_logged, cpu_gradients = bmtard_step(make_batch(CPU), Performance(device=CPU))
    logged, gradients = bmtard_step(make_batch(CUDA), PERFORMANCE)
    assert logged == pytest.approx(cpu_logged, rel=1e-4, abs=1e-4)
    assert_close(gradients, cpu_gradients, rtol=1e-4, atol=1e-4)


def test_bmtard_step_runs_in_bfloat16(make_batch):
    performance = Performance(device=CUDA, training_dtype=torch.bfloat16)
    logged, gradients = bmtard_step(make_batch(CUDA), performance, start="gaussian")
    assert math.isfinite(logged["loss_nats"])
    assert all(gradient.isfinite().all() for gradient in gradients.values())

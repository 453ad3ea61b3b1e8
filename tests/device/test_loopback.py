"""The GPU path without a GPU: on a pretend device nothing stays on the CPU, and nothing waits.

This file is also the script that its tests run, each part in a process of its own, since the
pretend device sets up a backend of the whole process.
"""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from compressor.architectures.teacher_map import add_teacher_map
from compressor.attacks.build import build_inner_attack, evaluation_attacks, selection_attack
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.search import by_logits
from compressor.attacks.stages import build_stages
from compressor.augmentation import Augmentation
from compressor.checkpoint import TrainState
from compressor.data import load_test_split, load_training_data, training_batches
from compressor.folding import EvaluationView
from compressor.image_sources import open_source
from compressor.image_storage import ResidentImages, StreamedImages
from compressor.losses import cross_entropy
from compressor.method_table import InnerAttackRecipe
from compressor.methods.build import build_method
from compressor.networks import NetworkSpec, build_classifier, evaluation_mode
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import parse_recipe
from compressor.selection import measure_on_validation
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.threat import ThreatModel
from compressor.training_step import Training, take_step, trained_tensors
from compressor.training_workflow import TrainingRequest, train
from compressor.verification.journal import Journal
from compressor.verification.request import VerificationRequest
from compressor.verification.verification import VerificationPlan, attack_chunks, network_subject
from compressor.verification_workflow import verify

STARTS = ("gaussian", "uniform", "zero")
EVALUATION_ATTACKS = ("fgsm", "pgd_sat", "pgd_trades", "cw_inf")
ATTACKS = (*EVALUATION_ATTACKS, "selection", *(f"inner_{start}" for start in STARTS))
BOTH = ("clean", "robust")
TEACHERS = {
    "adaad": ("robust",),
    "ard": ("robust",),
    "bmtard": BOTH,
    "ciard": BOTH,
    "cross_entropy": (),
    "darht": BOTH,
    "distillation": ("clean",),
    "iad": ("robust",),
    "mtard": BOTH,
    "pgd_at": (),
    "rslad": ("robust",),
    "trades": (),
}
"""Roles of each method's teachers."""
METHODS = tuple(TEACHERS)
WITHOUT_ATTACK = ("cross_entropy", "distillation")
AT_ONCE = {
    "ciard": {"teacher_from_fraction": 0.0},
    "darht": {"adversarial_share": 1.0, "distil_from": 0.0, "labels_until": 0.0},
    "iad": {"begin_fraction": 0.0},
}
"""What makes the first steps do all that later ones do."""
ARCHITECTURES = ("mobilenet_v2", "resnet18", "wide_resnet_22_6")
SEARCHES = {"apgd_ce": 4, "apgd_dlr": 4, "apgd_t": 8, "fab_t": 22, "square": 2}
"""How often one step waits for the device; of targeted ones, for two groups of targets."""
BATCH_SIZE, NUM_STEPS = 32, 3
NUM_TEST_IMAGES, TEST_BATCH_SIZE = 40, 16


# The part of the tests -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker():
    return run_part("checker")


@pytest.fixture(scope="module")
def product():
    return run_part("product")


def run_part(name):
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-W", "error", __file__, name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_checker_counts_each_kind_of_read_back_once(checker):
    assert set(checker["read_backs"].values()) == {1}, checker["read_backs"]


def test_checker_counts_nothing_else(checker):
    assert set(checker["no_read_backs"].values()) == {0}, checker["no_read_backs"]


def test_checker_refuses_what_it_could_not_count(checker):
    assert all(checker["refused"].values()), checker["refused"]


def test_checker_catches_a_cpu_tensor_that_meets_a_device_tensor(checker):
    assert all(checker["caught"].values()), checker["caught"]


def test_checker_lets_scalars_of_the_cpu_pass(checker):
    assert checker["scalar"] == [2.0, 2.0]


def test_checker_counts_uploads(checker):
    assert checker["uploads"] == {"copy_": 1, "tensor": 1, "to": 1, "arange": 0}


def test_checker_counts_a_planted_item_in_every_round(checker):
    assert checker["planted"] == {"without": 0, "with": 10}


def test_batches_are_augmented_on_the_device(product):
    assert product["differences"]["batches"] == 0
    assert product["traffic"]["batches"] == {"read_backs": 0, "uploads": 0}


def test_batches_are_streamed_to_the_device(product):
    assert product["differences"]["streamed"] == 0
    assert product["traffic"]["streamed"] == {"read_backs": 0, "uploads": 1}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_never_waits_for_the_device(name, product):
    assert product["traffic"][name] == {"read_backs": 0, "uploads": 0}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_finds_the_same_images_as_on_the_cpu(name, product):
    assert product["differences"][name] == 0
    assert product["moved"][name] > 1 / 255


@pytest.mark.parametrize("name", METHODS)
def test_training_step_waits_for_the_device_once(name, product):
    assert product["traffic"][name] == {"read_backs": 1, "uploads": 0}


@pytest.mark.parametrize("name", METHODS)
def test_training_steps_are_those_of_the_cpu(name, product):
    assert product["differences"][name] == 0
    assert product["differences"][f"{name} weights"] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_trains_on_the_device_as_on_the_cpu(name, product):
    """Not to the bit: a backend of its own gets other kernels for some gradients, as of SiLU."""
    assert product["traffic"][name] == {"read_backs": 1, "uploads": 0}
    assert product["differences"][name] <= 1e-6


def test_validation_waits_once_and_counts_as_on_the_cpu(product):
    assert product["traffic"]["validation"]["read_backs"] == 1
    assert product["validation"]["loopback"] == product["validation"]["cpu"]


@pytest.mark.parametrize("name", SEARCHES)
def test_search_waits_a_fixed_number_of_times_a_step(name, product):
    """To let fooled rows leave; twice as many steps show what one costs."""
    short, long = (product["traffic"][f"{name} {num_steps}"] for num_steps in (5, 10))
    per_step = (long["read_backs"] - short["read_backs"]) / 5
    assert per_step <= SEARCHES[name]
    assert short["read_backs"] <= 5 * SEARCHES[name] + 25
    assert short["uploads"] == long["uploads"] == 0


@pytest.mark.parametrize("name", SEARCHES)
def test_search_finds_the_same_as_on_the_cpu(name, product):
    """Images, which of them fool, and how often each went through the model."""
    assert product["differences"][f"{name} found"] == 0
    assert 0 < product["num_fooled"][name] < BATCH_SIZE


def test_verification_waits_only_to_judge_and_to_count(product):
    """Of attacks of fixed length: 18 times for each and each chunk, and for each image to show."""
    num_chunks = math.ceil(NUM_TEST_IMAGES / TEST_BATCH_SIZE)
    num_shown = product["verification"]["loopback"]["num_shown"]
    allowed = num_chunks * (10 + 18 * len(EVALUATION_ATTACKS)) + num_shown + 4
    assert product["traffic"]["verification"]["read_backs"] <= allowed
    assert product["traffic"]["verification"]["uploads"] <= num_chunks * 5


def test_verification_counts_as_on_the_cpu(product):
    """Of every image, what each attack did to it."""
    assert product["verification"]["loopback"] == product["verification"]["cpu"]
    samples = product["verification"]["cpu"]["samples"]
    assert len(samples) == NUM_TEST_IMAGES
    assert {tuple(sample["fooled_by"]) for sample in samples} >= {("clean", *EVALUATION_ATTACKS)}


def test_report_is_that_of_the_cpu(product):
    """Of a whole verification: the samples, the curve over radii, the checks of the evaluation."""
    assert product["report"]["loopback"] == product["report"]["cpu"]
    assert len(product["report"]["cpu"]["validity"]) > 10
    assert product["report"]["cpu"]["status"] == "verified"


# The part of the script: the checker ------------------------------------------------------------


def examine_checker(loopback):
    x = torch.arange(6.0, device=loopback.DEVICE).view(2, 3)
    ones = torch.ones(2, 3)
    scalar, mask, labels = x.sum(), x > 1, x.long().flatten()
    linear = nn.Linear(3, 2)

    def count(kind, action):
        with loopback.recorded() as traffic:
            action()
        return len(getattr(traffic, kind))

    def fails(action):
        try:
            action()
        except (RuntimeError, TypeError, ValueError):
            return True
        return False

    def waiting_objective(logits_NK, y_N):
        loss_N = cross_entropy(logits_NK, y_N)
        loss_N.mean().item()
        return loss_N

    def attack(objective, *, y_N=labels[:2]):
        recipe, threat = InnerAttackRecipe(num_steps=10), ThreatModel(epsilon_pixels=8 / 255)
        search = build_inner_attack(recipe, threat=threat, objective=objective)
        return search(lambda x_NCHW: x_NCHW.flatten(1), x, y_N, keys_N=labels[:2])

    read_backs = {
        "item": scalar.item,
        "float": lambda: float(scalar),
        "int": lambda: int(scalar),
        "bool": lambda: bool(scalar),
        "if any": lambda: 1 if mask.any() else 0,
        "compare": lambda: scalar > 3 or None,
        "index of a list": lambda: [0, 1][labels[1]],
        "tolist": x.tolist,
        "tolist of a scalar": scalar.tolist,
        "cpu": x.cpu,
        "numpy": lambda: x.cpu().numpy(),
        "to cpu": lambda: x.to("cpu"),
        "to cpu non_blocking": lambda: x.to("cpu", non_blocking=True),
        "to the device of another": lambda: x.to(ones),
        "copy_ to cpu": lambda: ones.clone().copy_(x),
        "equal": lambda: torch.equal(x, x),
        "allclose": lambda: torch.allclose(x, x),
        "contains": lambda: 1.0 in x,
        "mask": lambda: x[mask],
        "assignment by mask": lambda: x.clone().__setitem__(mask, x.flatten()[2:]),
        "masked_select": lambda: x.masked_select(mask),
        "nonzero": mask.nonzero,
        "where": lambda: torch.where(mask),
        "unique": x.unique,
        "bincount": labels.bincount,
        "repeat_interleave": lambda: torch.repeat_interleave(labels),
    }
    no_read_backs = {
        "shape": lambda: (len(x), x.shape, x.dtype, x.device, x.is_contiguous()),
        "where with values": lambda: torch.where(mask, x, 0.0),
        "masked_fill": lambda: x.masked_fill(mask, 0.0),
        "assignment of a number": lambda: x.clone().__setitem__(mask, 0.0),
        "indices": lambda: x.flatten()[labels],
        "argsort": lambda: labels.argsort(stable=True),
        "in place": lambda: x.clone().add_(1)[0].mul_(2),
        "deepcopy": lambda: copy.deepcopy(x),
        "state_dict": lambda: copy.deepcopy(linear).to(loopback.DEVICE).state_dict(),
    }
    caught = {
        "right": lambda: x + ones,
        "left": lambda: ones * x,
        "in place": lambda: ones.add_(x),
        "list": lambda: torch.cat([x, ones]),
        "out": lambda: torch.add(x, x, out=ones),
        "indices": lambda: x[torch.tensor([0, 1])],
        "weights": lambda: linear(x),
        "one element": lambda: x + torch.ones(1),
        "labels of an attack": lambda: attack(cross_entropy, y_N=torch.tensor([0, 1])),
    }
    refused = {
        "numpy": x.numpy,
        "dlpack": lambda: torch.from_dlpack(x),
        "storage": x.untyped_storage().tolist,
        "pickle": lambda: x.__reduce_ex__(2),
    }
    uploads = {
        "copy_": lambda: x.clone().copy_(ones),
        "tensor": lambda: torch.tensor([1.0], device=loopback.DEVICE),
        "to": lambda: ones.to(loopback.DEVICE),
        "arange": lambda: torch.arange(3, device=loopback.DEVICE),
    }
    return {
        "read_backs": {name: count("read_backs", act) for name, act in read_backs.items()},
        "no_read_backs": {name: count("read_backs", act) for name, act in no_read_backs.items()},
        "uploads": {name: count("uploads", act) for name, act in uploads.items()},
        "caught": {name: fails(act) for name, act in caught.items()},
        "refused": {name: fails(act) for name, act in refused.items()},
        "scalar": (torch.ones(2, device=loopback.DEVICE) + torch.tensor(1.0)).tolist(),
        "planted": {
            "without": count("read_backs", lambda: attack(cross_entropy)),
            "with": count("read_backs", lambda: attack(waiting_objective)),
        },
    }


# The part of the script: the product ------------------------------------------------------------


class Run:
    """The same work on one device: results by name, on the CPU, and what crossed meanwhile."""

    def __init__(self, device, recorded):
        self.performance = Performance(device=device)
        self.recorded = recorded
        self.tensors, self.traffic = {}, {}

    @contextmanager
    def noted(self, name):
        """Keeps the worst of all that have this name."""
        with self.recorded() as traffic:
            yield
        before = self.traffic.get(name, {"read_backs": 0, "uploads": 0})
        self.traffic[name] = {
            kind: max(count, len(getattr(traffic, kind))) for kind, count in before.items()
        }

    def keep(self, name, *tensors):
        self.tensors.setdefault(name, []).extend(tensor.detach().cpu() for tensor in tensors)


def examine_product(loopback):
    trained = train_a_little()
    cpu, device = (
        do_everything(Run(device, loopback.recorded), trained)
        for device in (torch.device("cpu"), loopback.DEVICE)
    )
    batch_x = cpu.tensors["batches"][0]
    return {
        "traffic": device.traffic,
        "differences": {
            name: max(difference(*pair) for pair in zip(there, device.tensors[name], strict=True))
            for name, there in cpu.tensors.items()
        },
        "moved": {name: difference(cpu.tensors[name][0], batch_x) for name in ATTACKS},
        "validation": {"cpu": cpu.validation, "loopback": device.validation},
        "verification": {"cpu": cpu.verification, "loopback": device.verification},
        "num_fooled": {name: int(cpu.tensors[f"{name} found"][1].sum()) for name in SEARCHES},
        "report": verify_a_run(loopback.DEVICE),
    }


def difference(a, b):
    return 0.0 if torch.equal(a, b) else float((a - b).abs().max())


def make_recipe(method, *, num_steps=10):
    attack = {} if method in WITHOUT_ATTACK else {"attack": {"num_steps": num_steps}}
    table = {
        "name": method,
        "threat": {"epsilon_pixels": "16/255"},
        "data": {"source": "digits", "num_channels": 3, "validation_size": 50},
        "student": {"architecture": "tiny"},
        "teachers": [{"role": role, "source": role} for role in TEACHERS[method]],
        "method": {"name": method, **attack, **AT_ONCE.get(method, {})},
        "training": {
            "epochs": 1,
            "batch_size": BATCH_SIZE,
            "ema_decay": 0.9,
            "gradient_clip_norm": 1.0,
        },
    }
    return parse_recipe(table, origin="test")


def make_network(architecture="tiny", *, seed=0, width=1.0):
    spec = NetworkSpec(
        architecture=architecture,
        width=width,
        num_classes=10,
        image_shape=(3, 8, 8),
        mean=(0.3,) * 3,
        std=(0.4,) * 3,
    )
    return build_classifier(spec, seed=seed)


def load_data(device):
    return load_training_data(
        make_recipe("bmtard").data, seed=0, settings=PerformanceSettings(), device=device
    )


def augmented(data):
    return training_batches(
        data.train,
        batch_size=BATCH_SIZE,
        seed=1,
        epoch=2,
        augment=Augmentation(crop_padding_pixels=1, horizontal_flip=True),
    )


def train_a_little():
    """A network that knows digits, so that counts are neither nothing nor everything."""
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for batch in augmented(load_data(torch.device("cpu"))):
        loss = cross_entropy(network(batch.x_NCHW), batch.y_N).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def do_everything(run, trained):
    data = load_data(run.performance.device)
    assert isinstance(data.train.storage, ResidentImages)
    with run.noted("batches"):
        batches = list(itertools.islice(augmented(data), NUM_STEPS))
    for batch in batches:
        run.keep("batches", batch.x_NCHW, batch.y_N, batch.index_N, batch.keys_N)
    do_streaming(run, data)
    do_attacks(run, trained, batches[0])
    do_searches(run, trained, batches[0])
    for method in METHODS:
        teachers = make_teachers(trained, run.performance, roles=TEACHERS[method])
        training = make_training(run, make_recipe(method), data, teachers=teachers, network=trained)
        do_steps(run, training, name=method, num_steps=NUM_STEPS)
    for name in ARCHITECTURES:
        recipe, network = make_recipe("bmtard", num_steps=4), make_network(name, width=1 / 8)
        teachers = make_teachers(trained, run.performance)
        training = make_training(run, recipe, data, teachers=teachers, network=network)
        do_steps(run, training, name=name, num_steps=1)
    do_measuring(run, trained, data)
    return run


def do_streaming(run, data):
    """The same batches, read from the files instead of from the device."""
    images = open_source(make_recipe("bmtard").data, part="train").images
    storage = StreamedImages(images=images, num_workers=0, device=run.performance.device)
    batches = augmented(replace(data, train=replace(data.train, storage=storage)))
    run.keep("streamed", next(batches).x_NCHW)
    for _ in range(NUM_STEPS - 1):
        with run.noted("streamed"):
            batch = next(batches)
        run.keep("streamed", batch.x_NCHW)


def do_attacks(run, trained, batch):
    threat = make_recipe("bmtard").threat.build()
    attacks = {
        **evaluation_attacks(threat),
        "selection": selection_attack(threat, num_steps=10),
        **{
            f"inner_{start}": build_inner_attack(
                InnerAttackRecipe(start=start), threat=threat, objective=cross_entropy
            )
            for start in STARTS
        },
    }
    student = Student(copy.deepcopy(trained), run.performance)
    for name, attack in attacks.items():
        with run.noted(name):
            view = student.evaluation_view()
            x_adv = attack(view, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)
        run.keep(name, x_adv)


def make_searches(threat, *, num_steps):
    """Those of the cascade, but for their length."""
    stages = build_stages(tuple(SEARCHES), threat=threat, mode="fast", batch_size=9 * BATCH_SIZE)
    searches = {stage.name: stage.search for stage in stages}
    for name in ("apgd_t", "fab_t"):
        attack = replace(searches[name].attack, num_steps=num_steps)
        searches[name] = replace(searches[name], attack=attack)
    for name in ("apgd_ce", "apgd_dlr"):
        searches[name] = replace(searches[name], num_steps=num_steps)
    return searches | {"square": replace(searches["square"], num_queries=num_steps)}


def do_searches(run, trained, batch):
    """At a radius at which some images fall; and at one at which none does, so that all stay."""
    network = run.performance.place_network(copy.deepcopy(trained)).eval()
    view = EvaluationView(network, run.performance)

    def search(one, y_N):
        draws = KeyedDraws(keys_N=batch.keys_N)
        return one.search(view, batch.x_NCHW, y_N, draws=draws, judge=by_logits)

    for name, one in make_searches(ThreatModel(epsilon_pixels=16 / 255), num_steps=5).items():
        found = search(one, batch.y_N)
        costs = (found.num_forwards_N, found.num_backwards_N)
        run.keep(f"{name} found", found.x_adv_NCHW, found.is_fooled_N.int(), *costs)
    with torch.no_grad():
        answered_N = view(batch.x_NCHW).argmax(dim=1)
    for num_steps in (5, 10):
        nothing = ThreatModel(epsilon_pixels=1e-9)
        for name, one in make_searches(nothing, num_steps=num_steps).items():
            with run.noted(f"{name} {num_steps}"):
                search(one, answered_N)


def make_training(run, recipe, data, *, teachers, network):
    network = copy.deepcopy(network)
    if recipe.method.has_teacher_map:
        add_teacher_map(network, num_teachers=len(teachers), num_classes=10, seed=0)
    student = Student(network, run.performance)
    method = build_method(
        recipe.method, threat=recipe.threat.build(), teachers=teachers, num_steps=NUM_STEPS
    )
    return Training(
        recipe=recipe,
        settings=PerformanceSettings(),
        run=None,
        data=data,
        student=student,
        method=method,
        tensors=trained_tensors(student, recipe, method),
        observe=lambda event: None,
        resume_command="",
    )


def make_teachers(trained, performance, *, roles=BOTH):
    """As in a run: the clean one folded, the robust one as it is."""
    clean = performance.place_network(copy.deepcopy(trained))
    robust = performance.place_network(make_network("resnet18", seed=1, width=1 / 16))
    facts = {"spec": None, "num_parameters": None, "num_classes": 10, "sha256": "", "num_bytes": 0}
    view = EvaluationView(clean, performance)
    teachers = {
        "clean": Teacher(name="clean", role="clean", answer=view, network=clean, **facts),
        "robust": Teacher(name="robust", role="robust", answer=robust, network=robust, **facts),
    }
    return [teachers[role] for role in roles]


def do_steps(run, training, *, name, num_steps):
    method_state = training.method.initial_state()
    state = TrainState(step=0, epoch=0, batch_in_epoch=0, method_state=method_state)
    batches = augmented(training.data)
    for step in range(1, num_steps + 1):
        with run.noted(name):
            values, method_state = take_step(training, next(batches), state)
        state = replace(state, step=step, method_state=method_state)
        run.keep(name, torch.tensor(list(values.values()), dtype=torch.float64))
    run.keep(f"{name} weights", *training.student.network.state_dict().values())
    run.keep(f"{name} weights", *training.tensors.average.values())


def do_measuring(run, trained, data):
    recipe = make_recipe("bmtard")
    network = run.performance.place_network(copy.deepcopy(trained))
    with run.noted("validation"):
        proportions = measure_on_validation(
            network, data.validation, recipe=recipe, performance=run.performance
        )
    run.validation = [proportion.num_correct for proportion in proportions]
    test = load_test_split(
        recipe.data,
        settings=PerformanceSettings(),
        device=run.performance.device,
        num_images=NUM_TEST_IMAGES,
    )
    stages = build_stages(
        EVALUATION_ATTACKS, threat=recipe.threat.build(), mode="fast", batch_size=TEST_BATCH_SIZE
    )
    plan = VerificationPlan(stages=stages, batch_size=TEST_BATCH_SIZE)
    with run.noted("verification"), evaluation_mode(network):
        subject = network_subject(network, run.performance)
        *_, found = attack_chunks(subject, test, plan, journal=Journal.in_memory())
    run.verification = {
        "samples": [asdict(sample) for sample in found.samples],
        "num_shown": len(found.gallery),
    }


def verify_a_run(loopback_device):
    """What is reported of one run on either device, but for costs and times."""
    recipe = make_recipe("cross_entropy")
    settings = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
    reports = {}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verification_workflow.cost_rows", lambda *_: ())
        patch.setattr("compressor.verification.epsilon_curve.NUM_STEPS", 5)
        run = train(recipe, TrainingRequest(out=Path(folder) / "run", settings=settings))
        for name, device in (("cpu", torch.device("cpu")), ("loopback", loopback_device)):
            performance = Performance(device=device)
            place = "compressor.verification.request.resolve_performance"
            patch.setattr(place, lambda _, performance=performance: performance)
            request = VerificationRequest(
                target=str(run.path),
                settings=settings,
                attacks=EVALUATION_ATTACKS,
                num_images=TEST_BATCH_SIZE,
                batch_size=10,
            )
            report, _ = verify(request)
            kept = {"status", "samples", "curve", "validity", "eight_bit"}
            reports[name] = report.model_dump(mode="json", include=kept)
    return reports


if __name__ == "__main__":
    import loopback  # beside this file; only here, because of what importing it does

    torch.set_num_threads(1)
    examine = {"checker": examine_checker, "product": examine_product}[sys.argv[1]]
    json.dump(examine(loopback), sys.stdout)

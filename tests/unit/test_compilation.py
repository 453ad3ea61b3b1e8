"""torch.compile: when a run compiles, that answers stay, and that nothing is compiled twice."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from compressor import compilation
from compressor.compilation import batch_size_to_compile
from compressor.errors import DeviceError
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import Ranks
from compressor.student import Student

CPU = torch.device("cpu")
PLAIN = Performance(device=CPU)
SHORT = Performance(device=CPU, training_dtype=torch.bfloat16)
SPEC = NetworkSpec(architecture="tiny", width=0.5, num_classes=4, image_shape=(3, 8, 8))


@pytest.fixture
def compiler(monkeypatch):
    """A machine that can compile, or cannot and says why; asked only where it matters."""
    asked = []

    def machine(problem: str | None = None) -> list[object]:
        monkeypatch.setattr(compilation, "_why_not", lambda device: asked.append(device) or problem)
        monkeypatch.setattr(compilation, "has_matrix_units", lambda device: True)
        return asked

    return machine


@pytest.mark.parametrize(
    ("setting", "performance", "has_units", "num_steps", "expected"),
    [
        ("auto", SHORT, True, 1000, 32),
        ("auto", SHORT, True, 999, None),
        ("auto", SHORT, False, 1000, None),
        ("auto", PLAIN, True, 1000, None),
        ("off", SHORT, True, 1000, None),
        ("on", PLAIN, False, 1, 32),
    ],
)
def test_by_default_long_runs_compile_where_it_pays(
    compiler, monkeypatch, setting, performance, has_units, num_steps, expected
):
    compiler()
    monkeypatch.setattr(compilation, "has_matrix_units", lambda device: has_units)
    settings = PerformanceSettings(compile=setting)
    size = batch_size_to_compile(settings, performance, batch_size=32, num_steps=num_steps)
    assert size == expected


def test_every_rank_compiles_for_its_part(compiler):
    compiler()
    settings = PerformanceSettings(compile="on")
    found = [
        batch_size_to_compile(
            settings,
            dataclasses.replace(PLAIN, ranks=Ranks(rank=rank, num_ranks=3)),
            batch_size=128,
            num_steps=1,
        )
        for rank in range(3)
    ]
    assert found == [42, 43, 43]


def test_without_a_compiler_auto_goes_on_and_on_is_refused(compiler):
    compiler("no g++")
    sizes = {"batch_size": 32, "num_steps": 5000}
    assert batch_size_to_compile(PerformanceSettings(), SHORT, **sizes) is None
    with pytest.raises(DeviceError, match=r"\(no g\+\+\); install .* or give --compile off"):
        batch_size_to_compile(PerformanceSettings(compile="on"), SHORT, **sizes)


def test_a_short_run_asks_no_compiler(compiler):
    asked = compiler()
    batch_size_to_compile(PerformanceSettings(), SHORT, batch_size=32, num_steps=10)
    assert asked == []


def test_a_broken_compiler_is_found_out(monkeypatch):
    def fails(*_args: object, **_options: object) -> None:
        raise RuntimeError("Python.h is missing\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    assert compilation._why_not(CPU) == "Python.h is missing"


def loss_and_gradients(student: Student, num_images: int) -> list[torch.Tensor]:
    """As a step of training asks: the view for an attack, then the network as it trains."""
    x = torch.rand(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(num_images))
    y_N = torch.arange(num_images) % 4
    x_adv = x.clone().requires_grad_()
    attacked = F.cross_entropy(student.evaluation_view()(x_adv), y_N)
    (slope,) = torch.autograd.grad(attacked, x_adv)
    student.network.zero_grad()
    loss = F.cross_entropy(student.logits(x), y_N)
    loss.backward()
    gradients = [p.grad.clone() for p in student.network.parameters()]
    return [attacked.detach(), slope, loss.detach(), *gradients, *student.network.buffers()]


def test_compiled_networks_answer_as_others_and_are_compiled_once():
    assert compilation._why_not(CPU) is None
    students = [
        Student(build_classifier(SPEC, seed=0), dataclasses.replace(PLAIN, compiled_batch_size=n))
        for n in (None, 8)
    ]
    graphs = []
    for num_images in (8, 5, 8, 3, 8):
        plain, found = (loss_and_gradients(student, num_images) for student in students)
        for a, b in zip(plain, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 1  # the small function of the trial is one
    assert set(graphs) == {graphs[0]}

"""Small things that many tests need: tiny networks, seeded images, one thread, own cache."""

import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings

from compressor.architectures.tiny import build_tiny
from compressor.attacks.stages import protocol_of
from compressor.performance_settings import PerformanceSettings
from compressor.proportions import Proportion
from compressor.recipe_file import parse_recipe
from compressor.reports.report import (
    AttackRow,
    CostRow,
    Count,
    CurvePoint,
    EightBitFacts,
    RobustnessReport,
    SampleTable,
    TargetFacts,
    TestFacts,
    ValidityRow,
)
from compressor.threat import ThreatModel
from compressor.training_workflow import TrainingRequest, train

CPU_SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)

settings.register_profile("quiet", deadline=None, database=None)
settings.load_profile("quiet")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """No test reads or fills the cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUST_COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_tiny():
    """Builds a seeded tiny network, 4 classes and 3x8x8 unless told."""

    def make(*, seed=0, num_classes=4, num_channels=3, width=0.5, dtype=torch.float32):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_tiny(
                num_classes=num_classes, image_shape=(num_channels, 8, 8), width=width
            )
        return network.to(dtype)

    return make


@pytest.fixture(scope="session")
def make_images():
    """Builds seeded uniform images in [0, 1] and labels."""

    def make(num_images=6, *, seed=0, num_classes=4, num_channels=3, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        x_NCHW = torch.rand(num_images, num_channels, 8, 8, generator=generator).to(dtype)
        return x_NCHW, torch.arange(num_images) % num_classes

    return make


@pytest.fixture(scope="session")
def make_trained(make_tiny):
    """Builds a network in eval mode that tells four noisy prototypes apart, and more of these."""

    def make(num_images):
        network = make_tiny(seed=1, width=1.0)
        generator = torch.Generator().manual_seed(2)
        prototypes = torch.rand(4, 3, 8, 8, generator=generator) * 0.3 + 0.35

        def noisy(num):
            y = torch.arange(num) % 4
            noise = 0.1 * torch.randn(num, 3, 8, 8, generator=generator)
            return (prototypes[y] + noise).clamp(0, 1), y

        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(60):
            x, y = noisy(64)
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        return network.eval(), *noisy(num_images)

    return make


@pytest.fixture(scope="session")
def exported_tiny(tmp_path_factory, make_trained):
    """That network, 200 of its images with labels, and its file in float32."""
    from exporters.to_onnx import OnnxForm, write_onnx

    network, x_NCHW, y_N = make_trained(200)
    path = tmp_path_factory.mktemp("exported") / "model.fp32.onnx"
    write_onnx(network, path, form=OnnxForm(image_shape=(3, 8, 8)), metadata={"key": "value"})
    return SimpleNamespace(network=network, path=path, x_NCHW=x_NCHW, y_N=y_N)


@pytest.fixture(scope="session")
def digits_table():
    """Builds a recipe that teaches the tiny network the digits in a second."""

    def make(name, *, epochs=2, **changes):
        table = {
            "name": name,
            "data": {
                "source": "digits",
                "validation_size": 100,
                "crop_padding_pixels": 0,
                "horizontal_flip": False,
            },
            "student": {"architecture": "tiny"},
            "method": {"name": "cross_entropy"},
            "training": {"epochs": epochs, "batch_size": 64},
            "selection": {"num_steps": 1},
        }
        return table | changes

    return make


@pytest.fixture(scope="session")
def train_on_digits(digits_table):
    """Trains by such a recipe into a folder; the run."""

    def run(out, *, name=None, epochs=2, **changes):
        table = digits_table(name or out.name, epochs=epochs, **changes)
        request = TrainingRequest(out=out, settings=CPU_SETTINGS)
        return train(parse_recipe(table, origin="test"), request)

    return run


@pytest.fixture
def tiny_network(make_tiny):
    return make_tiny()


@pytest.fixture
def threat():
    return ThreatModel(epsilon_pixels=8 / 255)


@pytest.fixture(scope="session")
def make_report():
    """Builds a report that agrees with itself: 4 classes; image i is broken by `broken_by[i]`.

    The protocol is that of the attacks, unless it is given.
    """

    def make(broken_by=(None,) * 5 + ("pgd_sat",) * 3 + ("clean",) * 2, **changes):
        num = len(broken_by)
        labels = tuple(i % 4 for i in range(num))
        wrong = [None if b is None else (y + 1) % 4 for b, y in zip(broken_by, labels, strict=True)]
        standing = num - broken_by.count("clean")
        clean, rows = _count(standing, num), []
        for name in ("pgd_sat", "apgd_t", "square", "apgd_ce", "fab_t"):
            tried, broken = standing, broken_by.count(name)
            standing -= broken
            rows.append(
                AttackRow(
                    name=name,
                    kind="black-box" if name == "square" else "white-box",
                    parameters={"num_steps": 20},
                    num_tried=tried,
                    num_broken=broken,
                    standing=_count(standing, num),
                    accuracy=_count(standing, num) if name == "pgd_sat" else None,
                    num_forwards=100 * tried,
                    num_backwards=50 * tried,
                    duration_seconds=1.5,
                )
            )
        names = [row.name for row in changes.get("attacks", rows)]
        values = {
            "name": "tiny",
            "status": "verified",
            "status_reason": "all images went through all attacks",
            "protocol": protocol_of(names, "fast") if names else "no attack",
            "target": TargetFacts(
                kind="run", architecture="tiny, width 1", sha256="b" * 64, source_sha256=None
            ),
            "norm": "linf",
            "epsilon_pixels": 8 / 255,
            "seed": 0,
            "data": TestFacts(
                source="digits",
                class_names=("zero", "one", "two", "three"),
                content_sha256="e" * 64,
                index_sha256="f" * 64,
                num_available=max(num, 1000),
                num_planned=num,
            ),
            "clean": clean,
            "attacks": tuple(rows),
            "worst_case": _count(broken_by.count(None), num),
            "eight_bit": EightBitFacts(num_found=3, num_still_fooling=2),
            "curve": tuple(
                CurvePoint(epsilon_pixels=eps / 255, accuracy=_count(correct, 10))
                for eps, correct in ((0, 8), (4, 6), (8, 5), (16, 1))
            ),
            "validity": (
                ValidityRow(
                    name="zero_gradient",
                    status="passed",
                    found="0 of 10 images have a zero gradient",
                    threshold="alarm above 1 %",
                    p_value=None,
                    advice="",
                ),
            ),
            "samples": SampleTable(
                index=tuple(range(num)),
                label=labels,
                broken_by=tuple(broken_by),
                prediction=tuple(wrong),
            ),
            "training": None,
            "cost": (
                CostRow(
                    name="student tiny",
                    num_parameters=6_418,
                    num_multiply_adds=1_000_000,
                    num_bytes=25_672,
                    latency_ms=1.5,
                    latency_low_ms=1.2,
                    latency_high_ms=2.0,
                ),
            ),
            "environment": {"num_threads": 2, "device": "cpu", "torch": "2.15.0"},
            "duration_seconds": 12.5,
        }
        return RobustnessReport(**(values | changes))

    return make


def _count(num_correct, num_total):
    return Count.of(Proportion(num_correct=num_correct, num_total=num_total))


@pytest.fixture
def limited_files():
    """A disk that is full: while the block runs, no file of this process grows beyond a size."""

    @contextmanager
    def limited(num_bytes: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited

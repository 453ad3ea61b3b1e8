"""What only a real GPU runs of training: shared BatchNorm, streamed pinned images, compiling, NCCL.

None of it has been run by us. A test that is left out says what it lacks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from compressor.architectures.shared_batch_norm import SharedBatchNorm2d
from compressor.errors import DeviceError
from compressor.image_storage import StreamedImages
from compressor.metrics import TrainingStarted, read_metrics
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import Ranks
from compressor.recipe_file import parse_recipe
from compressor.run_directory import RunDirectory
from compressor.training_workflow import TrainingRequest, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]

ROOT = Path(__file__).parents[2]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """In all bits of float32, and the same every time."""
    resolve_performance(PerformanceSettings(device=DEVICE))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_shared_batch_norm_of_one_rank_is_that_of_torch(dtype, tolerance, layout):
    """Parameters are float32, as under autocast."""
    generator = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(32, 8, 6, 6, generator=generator) for _ in range(2))
    x, slope = (t.to(DEVICE, dtype, memory_format=layout) for t in (3 + 2 * x, slope))
    found = []
    for is_shared in (False, True):
        plain = nn.BatchNorm2d(8).to(DEVICE)
        with torch.no_grad():
            plain.weight.copy_(torch.linspace(-1, 2, 8))
            plain.bias.copy_(torch.linspace(0, 1, 8))
        layer = SharedBatchNorm2d(plain, Ranks()) if is_shared else plain
        images = x.clone(memory_format=torch.preserve_format).requires_grad_()
        answer = layer(images)
        answer.backward(slope)
        statistics = [layer.running_mean, layer.running_var]
        gradients = [images.grad, layer.weight.grad, layer.bias.grad]
        assert answer.dtype == images.grad.dtype == dtype
        found.append([t.detach().float() for t in (answer, *statistics, *gradients)])
    for expected, got in zip(*found, strict=True):
        assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def recipe_with(**more):
    table = {
        "name": "gpu",
        "threat": {"epsilon_pixels": "8/255"},
        "data": {"source": "digits", "validation_size": 200},
        "student": {"architecture": "tiny"},
        "method": {"name": "pgd_at", "attack": {"num_steps": 4}},
        "training": {"epochs": 1, "batch_size": 100, "learning_rate": 0.02},
        "selection": {"num_steps": 1},
    }
    return table | more


@pytest.fixture
def photographs(tmp_path):
    """Images of 1.2 MiB in all, so that a budget of 1 MiB streams them."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 200), ("test", 2)):
        for place, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(100 * place, 100 * place + 156, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return {"source": f"imagefolder:{tmp_path / 'images'}", "validation_size": 50}


def train_on(data, out, *, events, **settings):
    settings = PerformanceSettings(
        device=DEVICE,
        training_dtype="float32",
        cache_images=False,
        log_every_steps=1,
        num_workers=2,
        **settings,
    )
    request = TrainingRequest(out=out, settings=settings)
    train(parse_recipe(recipe_with(data=data), origin="test"), request, observe=events.append)
    return losses_of(RunDirectory(out))


def losses_of(run):
    return [line["loss_nats"] for line in read_metrics(run) if line["kind"] == "step"]


def test_streamed_and_compiled_it_learns_what_it_learns_otherwise(
    photographs, tmp_path, monkeypatch
):
    streamed, events, original = [], [], StreamedImages.batches

    def noted(self, positions):
        streamed.append(self.device.type)
        return original(self, positions)

    monkeypatch.setattr(StreamedImages, "batches", noted)
    plain = train_on(photographs, tmp_path / "plain", events=[], compile="off")
    assert not streamed
    try:
        fast = train_on(
            photographs, tmp_path / "fast", events=events, compile="on", memory_budget_mib=1
        )
    except DeviceError as error:
        pytest.skip(str(error))  # there is no compiler
    assert set(streamed) == {torch.device(DEVICE).type}
    assert [event.is_compiled for event in events if isinstance(event, TrainingStarted)] == [True]
    assert len(plain) == 4
    assert fast == pytest.approx(plain, rel=2e-2)
    assert fast[0] == pytest.approx(plain[0], rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two CUDA devices")
def test_two_gpus_learn_what_one_learns(tmp_path):
    """From the first to the last step that is logged, up to the order of sums."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_with(training={"epochs": 2, "batch_size": 101})))
    losses = {}
    for number in ("1", "2"):
        out = tmp_path / number
        command = [sys.executable, "-m", "cli.main", "distill", recipe, "--out", out]
        command += ["--device", DEVICE, "--dtype", "float32", "--nproc", number]
        command += ["--no-verify", "--no-export"]
        own = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses[number] = losses_of(RunDirectory(out))
    assert len(losses["1"]) >= 2
    assert losses["2"][0] == pytest.approx(losses["1"][0], rel=1e-4)
    assert losses["2"] == pytest.approx(losses["1"], rel=1e-2)

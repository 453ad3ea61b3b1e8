"""A run that is killed at any moment and resumed ends as one that was left alone."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compressor.networks import NetworkSpec, build_classifier, save_classifier

NUM_KILLS = 10

TRAIN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import load_recipe
from compressor.training_workflow import TrainingRequest, train

out, resume = Path(sys.argv[2]), sys.argv[3] == "resume"
settings = PerformanceSettings(
    device="cpu", training_dtype="float32", num_threads=1, log_every_steps=1,
    checkpoint_every_minutes=1e-4, cache_images=False,
)
request = TrainingRequest(out=out, settings=settings, resume=resume, accept_teachers=True)
train(load_recipe(Path(sys.argv[1])), request,
      observe=lambda event: print(type(event).__name__, flush=True))
"""

RECIPE = """
name = "resume"
seed = 3
[threat]
epsilon_pixels = "16/255"
[data]
source = "digits"
validation_size = 100
[student]
architecture = "tiny"
[[teachers]]
role = "clean"
source = "{teacher}"
[[teachers]]
role = "robust"
source = "{teacher}"
[method]
name = "bmtard"
attack.num_steps = 2
attack.step_size_pixels = "12/255"
[training]
epochs = 6
batch_size = 128
ema_decay = 0.9
schedule.kind = "cosine"
[selection]
num_steps = 2
"""


def start(recipe: Path, out: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAIN, str(recipe), str(out), mode]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path.cwd()
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.fixture
def recipe(tmp_path):
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    teacher = tmp_path / "teacher.safetensors"
    save_classifier(teacher, build_classifier(spec, seed=1), spec, {})
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(teacher=teacher))
    return path


@pytest.mark.workflow
def test_ten_kills_leave_no_trace(tmp_path, recipe):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(recipe, undisturbed, "new"))
    moments = random.Random(0)
    started = 0
    while started < NUM_KILLS:
        mode = "resume" if (killed / "recipe.resolved.json").exists() else "new"
        process = start(recipe, killed, mode)
        assert process.stdout is not None
        for _ in range(moments.randrange(1, 12)):  # events until the moment comes
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.02))  # in the middle of a step or of a write
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        started += 1
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    finish(start(recipe, killed, "resume"))

    assert (undisturbed / "model.safetensors").read_bytes() == (
        killed / "model.safetensors"
    ).read_bytes()
    last = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())[-1]
    for file in (undisturbed / "checkpoints" / last).iterdir():
        assert file.read_bytes() == (killed / "checkpoints" / last / file.name).read_bytes()
    assert without_speed(undisturbed) == without_speed(killed)


def without_speed(run: Path) -> list[str]:
    """The metrics, but for the one that depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line.partition(', "speed_images_per_second"')[0] for line in lines]

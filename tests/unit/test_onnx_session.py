"""Files that ONNX Runtime would crash on are answered, in the project and on a device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import VisionTransformer

from exporters.to_float16 import write_float16
from exporters.to_onnx import OnnxForm, write_onnx

OPENS = {
    "here": "from compressor.onnx_model import load_onnx_model\n"
    "answer = load_onnx_model(path)(torch.zeros(2, 3, 32, 32)).numpy()",
    "on a device": "from compressor.device.onnx_session import OnnxSession\n"
    "answer = OnnxSession(path.read_bytes())(numpy.zeros((2, 3, 32, 32), numpy.float32))",
}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A vision transformer of torchvision in float16."""
    torch.manual_seed(0)
    network = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=4,
    ).eval()
    folder = tmp_path_factory.mktemp("transformer")
    write_onnx(network, folder / "whole.onnx", form=OnnxForm(image_shape=(3, 32, 32)), metadata={})
    write_float16(folder / "whole.onnx", folder / "half.onnx", metadata={})
    return folder / "half.onnx"


@pytest.mark.parametrize("opens", OPENS.values(), ids=OPENS)
def test_a_transformer_in_float16_does_not_crash(opens, half):
    code = f"import numpy, torch\nfrom pathlib import Path\npath = Path({str(half)!r})\n{opens}\n"
    finished = subprocess.run(
        [sys.executable, "-c", f"{code}assert answer.shape == (2, 4)"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr

"""What a build kit says to people: its README, and the two scripts, which only call its modules."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

_SCRIPT = '''\
"""{title} See README.md."""

import sys
from pathlib import Path

try:
    from device.{module} import main
except ModuleNotFoundError as error:
    print(f"UNVERIFIED  {{error}}: see README.md for what to install")
    sys.exit(4)

if __name__ == "__main__":
    sys.exit(main(folder=Path(__file__).resolve().parent))
'''

SCRIPTS: Mapping[str, str] = MappingProxyType(
    {
        "build_engine.py": _SCRIPT.format(
            title="Build a TensorRT engine of each ONNX file here.", module="build_engine"
        ),
        "replay.py": _SCRIPT.format(
            title="Replay the golden images on the engines or ONNX files here.", module="replay"
        ),
    }
)
"""By file name. `compressor/device` is the folder `device` of a kit."""

_README = """\
# Build kit

Classifiers as ONNX files, which this machine turns into TensorRT engines of its own, and golden
images that prove each engine: clean ones, and adversarial ones ({threat}), with the answers that
must come back.

Needed: Python 3.10 or later, numpy, and TensorRT 10.3 to 11.4, TensorRT-RTX or ONNX Runtime. No
PyTorch, no network. Run everything in this folder.

## Jetson with JetPack 6 (TensorRT 10.3, Python 3.10) or JetPack 7 (Python 3.12)

TensorRT is part of JetPack and not on PyPI, so use the Python of the system.

    sudo apt install -y nvidia-jetpack python3-numpy
    python3 -c "import numpy, tensorrt; print(tensorrt.__version__)"
    python3 build_engine.py --workspace-mib 1024
    python3 replay.py

In a virtual environment TensorRT is seen only with `python3 -m venv --system-site-packages`.
After an update of JetPack build again: an engine fits one version of TensorRT and one kind of GPU.

## PC with an NVIDIA GPU

TensorRT has an index of its own; what PyPI has under this name holds no libraries.

    python3 -m venv .venv
    .venv/bin/pip install numpy tensorrt-cu13 --extra-index-url https://pypi.nvidia.com
    .venv/bin/python build_engine.py
    .venv/bin/python replay.py

With a driver older than 580: `tensorrt-cu12`. For TensorRT-RTX, on GeForce and RTX cards, the
second line is `.venv/bin/pip install numpy tensorrt-rtx nvidia-cuda-runtime`.

## Without TensorRT

    python3 -m venv .venv
    .venv/bin/pip install numpy onnxruntime
    .venv/bin/python replay.py {files}

## What the words mean

| word | exit code | meaning |
| --- | --- | --- |
| PASS | 0 | all golden images answered as they must be, in the precision asked for |
| FAIL | 5 | other answers, another precision, or a file that was changed; do not deploy it |
| UNVERIFIED | 4 | it could not be run here, so nothing was shown; this is no pass |

`kit.json` holds the sha256 of every file here, so its own hash vouches for all: compare it with
one that you got another way, by `--kit-sha256`. An engine is a program: run none that you did not
build. It is run only if its sidecar `NAME.engine.json` names its hash and the ONNX file of this
kit.

The builder was tested with TensorRT-RTX 1.7 on a CPU, the replay with ONNX Runtime and with a
pretended GPU; robust-compress has not yet run them on a real GPU or a Jetson.
"""


def readme(files: Sequence[str], *, threat: str) -> str:
    """`README.md` of a kit with these ONNX files."""
    return _README.format(files=" ".join(files), threat=threat)

"""`robust-compress doctor`: what is here, what is missing, and the line that installs it."""

import os
import sys
from importlib import metadata, util

from cli.installation import overwritten_files
from cli.options import JsonOption
from cli.output import Output

_NEEDED = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "pydantic",
    "typer",
    "rich",
    "tensorboard",
    "matplotlib",
    "jinja2",
)
_TENSORRT_LINE = "pip install tensorrt --extra-index-url https://pypi.nvidia.com"
_RTX_LINE = "pip install 'robust-compress[tensorrt-rtx]'"


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, devices, instruction sets and TensorRT, and how to get what is missing.

    Example: `robust-compress doctor`
    """
    output = Output(as_json=as_json)
    packages = {name: _version(name) for name in _NEEDED}
    facts = {
        "python": sys.version.split()[0],
        "packages": packages,
        "devices": _devices(),
        "tensorrt": _tensorrt(),
        "overwritten_files": overwritten_files(),
    }
    output.result(facts)
    output.title("Packages")
    missing = [name for name, version in packages.items() if version is None]
    output.table(
        ("package", "version"), [[name, version or "missing"] for name, version in packages.items()]
    )
    output.title("Devices")
    for name, text in _devices().items():
        output.say(f"  {name}: {text}")
    output.title("TensorRT")
    output.say(f"  {_tensorrt()}")
    if missing:
        output.next_command(f"pip install {' '.join(missing)}")
    else:
        output.next_command("robust-compress distill --help")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    if util.find_spec("torch") is None:
        return {"none": "torch is missing"}
    import torch

    from compressor.environment import processor_name
    from compressor.performance import multiplies_bfloat16

    cpu = torch.device("cpu")
    trained_in = "bfloat16" if multiplies_bfloat16(cpu) else "float32"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{processor_name()}, {capability}, trains in {trained_in}, {threads}"}
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
        found[f"cuda:{number}"] = (
            f"{torch.cuda.get_device_name(device)}, {memory_gib:.0f} GiB, trains in {dtype}"
        )
    if len(found) == 1:
        found["cuda"] = "no CUDA device; training runs on the CPU"
    return found


def _tensorrt() -> str:
    for package, module in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        version = _version(package)
        if version is not None and util.find_spec(module) is not None:
            return f"{package} {version}"
    return f"absent. For engines on this machine: {_TENSORRT_LINE}; without a GPU: {_RTX_LINE}"

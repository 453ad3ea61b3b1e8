"""What a result depends on besides the recipe: versions, commit, processor, threads."""

import platform
import sys
from importlib import metadata
from typing import Any

import torch

from compressor import __version__
from compressor.commit import commit_of_checkout
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import num_ranks_of_environment

_PACKAGES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
    "numpy",
)


def describe_environment(performance: Performance) -> dict[str, Any]:
    """Plain values, without host names or paths; `commit` only where it is known."""
    commit = commit_of_checkout()
    return {
        "robust-compress": __version__,
        **({} if commit is None else {"commit": commit}),
        "python": platform.python_version(),
        **package_versions(_PACKAGES),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "device": device_name(performance.device),
        "number_format": str(performance.training_dtype).removeprefix("torch."),
        "is_compiled": performance.compiled_batch_size is not None,
        "num_threads": torch.get_num_threads(),
        "num_processes": num_ranks_of_environment(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of installed packages; those that are absent are left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """`cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor_name() -> str:
    """As the system calls it."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def settings_dict(settings: PerformanceSettings) -> dict[str, Any]:
    """The settings as asked for, to be recorded."""
    return settings.model_dump(mode="json")

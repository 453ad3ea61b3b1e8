"""What may run an ONNX file within ONNX Runtime, and what is said where it is not here.

ONNX Runtime goes on with the CPU where a GPU fails; here that is an error, as a number measured
there would be taken for one of the GPU.
"""

import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

from compressor.errors import MissingDependencyError

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

_SUFFIX = "ExecutionProvider"
_CPU, _CUDA, _TENSORRT = (f"{name}{_SUFFIX}" for name in ("CPU", "CUDA", "Tensorrt"))
_ORDERS: Mapping[Provider, tuple[str, ...]] = MappingProxyType(
    {"cpu": (_CPU,), "cuda": (_CUDA, _CPU), "tensorrt": (_TENSORRT, _CUDA, _CPU)}
)
_OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType({_CUDA: {"use_tf32": "0"}})
"""Float32 would else be multiplied with 10 bits; the one of TensorRT has no such option."""
_HOW_TO_GET_IT = (
    "Run pip uninstall onnxruntime, then pip install onnxruntime-gpu, which replaces it; both "
    "together spoil each other. Or leave --provider at cpu"
)


def providers_for(
    provider: Provider, available: Sequence[str], *, runtime: str
) -> list[tuple[str, dict[str, str]]]:
    """The providers of a session with their options; the first that can run a node runs it.

    Args:
        provider: the first.
        available: what ONNX Runtime was made with.
        runtime: its name and version.

    Raises:
        MissingDependencyError: if the first is not among them.
    """
    first = _ORDERS[provider][0]
    if first not in available:
        raise MissingDependencyError(
            f"--provider {provider}: {runtime} has no {first}, only {', '.join(available)}. "
            f"{_HOW_TO_GET_IT}"
        )
    return [(name, dict(_OPTIONS.get(name, {}))) for name in _ORDERS[provider] if name in available]


def refuse_other_provider(provider: Provider, found: Sequence[str], *, runtime: str) -> None:
    """Refuse a session that was made and runs on something else.

    Args:
        provider: what was asked for.
        found: the providers of the session.
        runtime: its name and version.

    Raises:
        MissingDependencyError: if the first of them is another.
    """
    if found[0] != _ORDERS[provider][0]:
        raise not_started(provider, f"it would run on {found[0]}", runtime=runtime)


def not_started(provider: Provider, reason: str, *, runtime: str) -> MissingDependencyError:
    """The error that says that a provider of ONNX Runtime cannot be used on this machine."""
    libraries = "CUDA, cuDNN and TensorRT" if provider == "tensorrt" else "CUDA and cuDNN"
    said = re.sub(r"^\S+:\d+ .*?\) ", "", reason).rstrip(".")  # without the place in its source
    return MissingDependencyError(
        f"--provider {provider}: {runtime} has {_ORDERS[provider][0]} and cannot start it here "
        f"({said}). It needs an NVIDIA GPU with its driver, and the versions of {libraries} that "
        "it was made for. If both onnxruntime and onnxruntime-gpu are installed they spoil each "
        "other: pip uninstall both, then pip install onnxruntime-gpu, which replaces onnxruntime. "
        "Or leave --provider at cpu"
    )


def described(found: Sequence[str]) -> str:
    """The providers of a session for people, such as `CUDA, CPU`."""
    said = ", ".join(name.removesuffix(_SUFFIX) for name in found)
    may_round = found[0] == _TENSORRT and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    return f"{said}, TF32 allowed" if may_round else said

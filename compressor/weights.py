"""Reading weights without running what a file says, writing them atomically, naming them alike.

A checkpoint of PyTorch is a pickle and can execute code. Here such files are read only by
PyTorch's restricted reader (`weights_only=True`); what that reader refuses is refused.
"""

import hashlib
import json
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compressor.errors import WeightsError
from compressor.run_directory import write_bytes_atomically

_PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".tar"}
_NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net", "ema")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
_USE_ONNX = "export the model to ONNX where it was made, and give the .onnx file"
_COUNTER = "num_batches_tracked"
_MEAN_NAMES, _STD_NAMES = {"mean", "mu"}, {"std", "sigma"}
_DEAD_NAMES = _MEAN_NAMES | _STD_NAMES | {_COUNTER, "n_averaged"}
_DEAD_PREFIX = "sub_block1."
"""Built by the TRADES code and never used by its forward pass."""
_RENAMES = ((".shortcut.", ".downsample."), ("linear.", "fc."))
"""kuangliu's pytorch-cifar -> torchvision; each is tried in both directions."""


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """What a file of weights holds."""

    tensors: dict[str, Tensor]
    """On the CPU, under the names of the file without prefixes of wrappers."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Empty for files of PyTorch, which have none."""
    sha256: str


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a `.safetensors` file, or of a checkpoint of PyTorch, never running code.

    Raises:
        WeightsError: if the file is missing, damaged, of another kind, would run code, holds
            something other than tensors, or holds NaN or infinity.
    """
    _check_file(path)
    content: object
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path)
    elif path.suffix in _PICKLED:
        content = _read_pickled(path)
    elif path.suffix == ".pt2":
        raise WeightsError(f"{path}: loading a .pt2 archive can execute code; {_USE_ONNX}")
    elif path.suffix == ".onnx":
        raise WeightsError(f"{path}: give an '.onnx' file without an architecture before it")
    else:
        known = ", ".join([".safetensors", *sorted(_PICKLED)])
        raise WeightsError(
            f"{path}: {path.suffix or 'no suffix'!r} is not a kind of weights: {known}"
        )
    tensors = _without_wrappers(path, _find_tensors(path, content))
    _check_finite(path, tensors)
    return StateDict(tensors=tensors, metadata=metadata, sha256=sha256_of_file(path))


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes, formats and every bit, wherever the tensors are."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        numbers = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(numbers.view(torch.uint8).numpy().data)
    return found.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the bytes of a file, 64 hexadecimal digits.

    Raises:
        WeightsError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and texts so that the file is either the old one or complete.

    The same tensors and texts always give the same bytes.

    Raises:
        WeightsError: if the file cannot be written.
    """
    layout = torch.contiguous_format
    plain = {name: t.detach().cpu().clone(memory_format=layout) for name, t in tensors.items()}
    content = _with_sorted_header(safetensors.torch.save(plain, metadata=dict(metadata)))
    try:
        write_bytes_atomically(path, content)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror}") from None


def fit_to_layout(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names of `network`, ready for a strict `load_state_dict`.

    Understands the names of torchvision, of kuangliu's pytorch-cifar, of the TRADES and of
    DeepMind's wide residual networks. The dead `sub_block1` of TRADES and the constants of a
    normalisation inside the model are left out (see `normalisation_in`); a missing counter of
    batches becomes zero.

    Raises:
        WeightsError: if tensors are missing, unexpected, or of another shape; with a hint
            where the class count, the width, the channels or the stem explain it.
    """
    expected: dict[str, Tensor] = network.state_dict()
    fitted = _renamed(tensors, expected)
    problems = _mismatches(fitted, expected)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        listed = "; ".join(problems[:3]) + more
        raise WeightsError(f"the file {listed}. Next: {_hint(fitted, expected)}")
    counters = {name: torch.zeros_like(t) for name, t in expected.items() if name not in fitted}
    return {name: tensor for name, tensor in fitted.items() if name in expected} | counters


def normalisation_in(
    tensors: Mapping[str, Tensor], *, num_channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std per channel that a model saved with its weights; None if it did not."""
    found = []
    for names in (_MEAN_NAMES, _STD_NAMES):
        values = next((t for name, t in tensors.items() if _last(name) in names), None)
        if values is None or values.numel() not in (1, num_channels):
            return None
        found.append(tuple(values.flatten().expand(num_channels).tolist()))
    return found[0], found[1]


def count_classes(tensors: Mapping[str, Tensor], network: nn.Module) -> int | None:
    """Classes of the last linear layer as the file has it; None if it is not recognised."""
    expected = network.state_dict()
    head = _renamed(tensors, expected).get(_head_name(expected))
    return int(head.shape[0]) if head is not None and head.dim() == 2 else None


def _check_file(path: Path) -> None:
    if not path.exists():
        raise WeightsError(f"{path} does not exist; check the path")
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; name the file of weights in it")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path} is empty; copy or download it again")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or not a safetensors file ({error}); copy or download it again"
        ) from None


def _read_pickled(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # Warnings about old formats; whether the file can be read is all that matters.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes make the reader fail in any way whatever.
        text = str(error)
        if "weights_only" not in text:
            raise WeightsError(
                f"{path} is damaged or not a checkpoint of PyTorch ({type(error).__name__}); "
                "copy or download it again"
            ) from None
        wanted = re.search(r"GLOBAL (\S+)", text)
        raise WeightsError(
            f"{path} wants to run code while it is loaded"
            f"{f' ({wanted[1]})' if wanted else ''}, so it was not loaded. Where it was made, save "
            "its tensors alone: safetensors.torch.save_file(model.state_dict(), "
            f"'weights.safetensors'); or {_USE_ONNX}"
        ) from None


def _find_tensors(path: Path, content: object) -> dict[str, Tensor]:
    while isinstance(content, dict):
        nested = [key for key in _NESTED_UNDER if isinstance(content.get(key), dict)]
        if not nested:
            break
        content = content[nested[0]]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path} holds {_describe(content)}, not a table of tensors by name")
    alien = next((n for n, value in content.items() if not isinstance(value, Tensor)), None)
    if alien is not None:
        kind = _describe(content[alien])
        raise WeightsError(f"{path}: {alien!r} is {kind}, not a tensor; save model.state_dict()")
    return {str(name): value.detach() for name, value in content.items()}


def _describe(value: object) -> str:
    return f"an empty {type(value).__name__}" if value == {} else f"a {type(value).__name__}"


def _without_wrappers(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DataParallel, torch.compile and wrapper classes add."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name
        while wrapper := next((w for w in _WRAPPERS if bare.startswith(w)), None):
            bare = bare.removeprefix(wrapper)
        if bare in plain:
            raise WeightsError(f"{path} holds two networks ({bare!r} twice); save only one of them")
        plain[bare] = tensor
    return plain


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"{path}: {name!r} holds NaN or infinity, so training had failed; use an "
                "earlier checkpoint"
            )


def _with_sorted_header(content: bytes) -> bytes:
    """The same file with its header in one order; the library writes the texts in any order."""
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors that begin at multiples of 8
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _renamed(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names of `expected`, as far as a renaming leads to one."""
    renamed = {}
    for name, tensor in tensors.items():
        spellings = [name]
        for one, other in _RENAMES:
            spellings += [name.replace(one, other), name.replace(other, one)]
        renamed[next((s for s in spellings if s in expected), name)] = tensor
    return renamed


def _is_dead(name: str) -> bool:
    return name.startswith(_DEAD_PREFIX) or _last(name) in _DEAD_NAMES


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _mismatches(fitted: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    have = {name: tuple(tensor.shape) for name, tensor in fitted.items() if not _is_dead(name)}
    want = {name: tuple(tensor.shape) for name, tensor in expected.items() if not _is_dead(name)}
    missing = [f"has no {name!r} {want[name]}" for name in want if name not in have]
    alien = [f"has {name!r} {have[name]}, the network not" for name in have if name not in want]
    pairs = [(name, have[name], want[name]) for name in want if name in have]
    wrong = [f"has {n!r} of shape {h}, the network {w}" for n, h, w in pairs if h != w]
    return missing + alien + wrong


def _head_name(expected: Mapping[str, Tensor]) -> str:
    return next((name for name, t in reversed(list(expected.items())) if t.dim() == 2), "")


def _hint(fitted: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What explains a mismatch, judged by the first convolution and the last linear layer."""
    hint = "name the architecture that the weights were made for"
    if any(name not in fitted for name in expected if not _is_dead(name)):
        return hint
    head = _head_name(expected)
    if head and fitted[head].shape[0] != expected[head].shape[0]:
        hint = (
            f"the file has {fitted[head].shape[0]} classes, the network "
            f"{expected[head].shape[0]}; use weights trained on the same classes"
        )
    stem = next((name for name, t in expected.items() if t.dim() == fitted[name].dim() == 4), "")
    return (stem and _stem_hint(tuple(fitted[stem].shape), tuple(expected[stem].shape))) or hint


def _stem_hint(have: tuple[int, ...], want: tuple[int, ...]) -> str:
    if have[0] != want[0]:
        return f"the file is {have[0] / want[0]:.4g} times as wide as the network; set its width"
    if have[1] != want[1]:
        return f"the file takes images of {have[1]} channels, the network of {want[1]}"
    if have[2:] != want[2:]:
        return (
            f"the file begins with a {have[2]}x{have[3]} convolution, the network with "
            f"{want[2]}x{want[3]}: they are made for images of other sizes; set resize_to"
        )
    return ""

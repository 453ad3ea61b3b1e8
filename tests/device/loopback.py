"""A pretend accelerator: device `loopback` computes on the CPU and tells on what a GPU would mind.

A CPU tensor that meets a device tensor raises, but for a scalar, as on CUDA. Every operation that
makes the host wait for the device is written down, and so is every upload. Importing this sets up
a backend of the whole process, so it belongs in a process of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

backend_registration._setup_privateuseone_for_python_backend("loopback")  # noqa: SLF001
DEVICE = torch.device("loopback", 0)


@dataclass(frozen=True)
class Traffic:
    """Names of the operations that crossed between host and device, in order."""

    read_backs: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)


_recorders: list[Traffic] = []


@contextmanager
def recorded() -> Iterator[Traffic]:
    """What crosses inside."""
    traffic = Traffic()
    _recorders.append(traffic)
    try:
        yield traffic
    finally:
        _recorders[:] = [other for other in _recorders if other is not traffic]


class LoopbackTensor(torch.Tensor):
    """Looks like the CPU tensor `raw` that it holds, but for its device."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # noqa: SLF001

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "LoopbackTensor":
        wrapper = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        wrapper.raw = raw
        return wrapper

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        # `module.to(memory_format=...)` assigns here; torch would leave `raw` behind.
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch refuses subclasses

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("saving would read the device back unseen; save a copy on the CPU")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _refuse_cpu_tensors(func, args, kwargs)
        _write_down(func, args, kwargs)
        given = {id(t.raw): t for t in tree_leaves((args, kwargs)) if isinstance(t, cls)}
        raw_args, raw_kwargs = tree_map(_unwrap, (args, kwargs))
        stays = not _is_to_host(func, args, kwargs)
        if stays and "device" in raw_kwargs:
            raw_kwargs["device"] = "cpu"
        result = func(*raw_args, **raw_kwargs)

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            same = given.get(id(value))  # an in-place operation returns what it was given,
            if same is None:
                return cls(value)
            if (same.shape, same.stride()) != (value.shape, value.stride()):
                same.data = cls(value)  # which it may have given another shape
            return same

        return tree_map(wrap, result) if stays else result


def _unwrap(value: Any) -> Any:
    return value.raw if isinstance(value, LoopbackTensor) else value


def _is_cpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, LoopbackTensor)


_COPIES = {"copy_", "_copy_from", "_to_copy"}


def _refuse_cpu_tensors(func, args, kwargs) -> None:
    for value in tree_leaves((args, kwargs)):
        if _is_cpu(value) and value.dim() > 0 and func.overloadpacket.__name__ not in _COPIES:
            raise RuntimeError(
                f"{func}: a CPU tensor of shape {tuple(value.shape)} meets a tensor on the device"
            )


def _is_to_host(func, args, kwargs) -> bool:
    """Whether the result is a CPU tensor."""
    if func.overloadpacket.__name__ == "copy_":
        return _is_cpu(args[0])
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _write_down(func, args, kwargs) -> None:
    name = func.overloadpacket.__name__
    if name in _COPIES and _is_to_host(func, args, kwargs):
        _note("read_backs", name)
    elif name == "copy_" and _is_cpu(args[1]):
        _note("uploads", name)
    elif _waits(func, name, args):
        _note("read_backs", name)


def _waits(func, name: str, args) -> bool:
    """Whether CUDA would wait: the host needs a value, or the number of values, to go on."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        is_mask = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        # A single value goes through masked_fill, which does not wait.
        return is_mask and (name == "index" or args[2].numel() != 1)
    needs_a_value = torch.Tag.data_dependent_output in func.tags
    return needs_a_value or torch.Tag.dynamic_output_shape in func.tags


def _note(kind: str, name: str) -> None:
    for traffic in _recorders:
        getattr(traffic, kind).append(name)


def _factory(operator):
    def make(*args, **kwargs):
        kwargs = {**kwargs, "device": "cpu"}
        kwargs.pop("pin_memory", None)
        return LoopbackTensor(operator(*args, **kwargs))

    return make


def _copy_from(source, target, non_blocking=False):  # noqa: FBT002 (torch's signature)
    """The end of `torch.tensor(..., device=...)`, which goes past `__torch_dispatch__`."""
    _note("uploads", "_copy_from")
    target.raw.copy_(source)
    return target


# The other factories, such as `zeros`, fill or resize what one of these makes.
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", _factory(torch.ops.aten.empty.memory_format), "PrivateUse1")
_library.impl("empty_strided", _factory(torch.ops.aten.empty_strided.default), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")

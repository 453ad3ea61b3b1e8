"""The ONNX operators of image classifiers as differentiable PyTorch functions.

Each takes its node, for the attributes, and one tensor per input, None where an optional input is
absent. Sizes, axes and bounds are no function of the pixels (`compressor.onnx_gradients` sees to
it). float16 is computed in float32.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.convolution import conv2d
from compressor.onnx_gradients import FLOAT_TYPES
from compressor.onnx_graph import NoPlainGraphError, OnnxNode
from compressor.quantization import quantize

Operator = Callable[..., Any]
"""(node, *inputs) -> a tensor, or a tuple of them where the operator has several outputs."""


def _conv(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _refuse(node, weight.dim() != 4, "is not two-dimensional")
    x, padding = _padded(node, x, value=0.0)
    return conv2d(
        x,
        weight,
        bias,
        stride=node.attributes.get("strides", [1, 1]),
        padding=padding,
        dilation=node.attributes.get("dilations", [1, 1]),
        num_groups=node.attributes.get("group", 1),
    )


def _max_pool(node: OnnxNode, x: Tensor) -> Tensor:
    x, padding = _padded(node, x, value=float("-inf"))
    return F.max_pool2d(
        x,
        node.attributes["kernel_shape"],
        stride=node.attributes.get("strides", [1, 1]),
        padding=padding,
        dilation=node.attributes.get("dilations", [1, 1]),
        ceil_mode=bool(node.attributes.get("ceil_mode", 0)),
    )


def _average_pool(node: OnnxNode, x: Tensor) -> Tensor:
    pads = node.attributes.get("pads", [0, 0, 0, 0])
    counts = bool(node.attributes.get("count_include_pad", 0))
    _refuse(node, pads[:2] != pads[2:], "pads one side more than the other")
    return F.avg_pool2d(
        x,
        node.attributes["kernel_shape"],
        stride=node.attributes.get("strides", [1, 1]),
        padding=pads[:2],
        ceil_mode=bool(node.attributes.get("ceil_mode", 0)),
        count_include_pad=counts,
    )


def _padded(node: OnnxNode, x: Tensor, *, value: float) -> tuple[Tensor, list[int]]:
    """The image, padded where the sides differ, and the padding that is left to the operator."""
    _refuse(node, node.attributes.get("auto_pad", "NOTSET") != "NOTSET", "pads by auto_pad")
    top, left, bottom, right = node.attributes.get("pads", [0, 0, 0, 0])
    if (top, left) == (bottom, right):
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom), value=value), [0, 0]


def _gemm(node: OnnxNode, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if node.attributes.get("transA", 0) else a
    b = b.T if node.attributes.get("transB", 0) else b
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    if c is not None and c.dim() == 1 and alpha == beta == 1.0:
        return F.linear(a, b.T, c)
    product: Tensor = alpha * (a @ b)
    return product if c is None else product + beta * c


def _clip(
    node: OnnxNode, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    del node
    bounds = [None if bound is None else float(bound) for bound in (low, high)]
    return x.clamp(bounds[0], bounds[1])


def _reduce_mean(node: OnnxNode, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = node.attributes.get("axes") if axes is None else axes.tolist()
    return x.mean(dim=dims, keepdim=bool(node.attributes.get("keepdims", 1)))


def _reshape(node: OnnxNode, x: Tensor, shape: Tensor) -> Tensor:
    is_kept = not node.attributes.get("allowzero", 0)  # what a 0 means
    sizes = [
        x.shape[place] if size == 0 and is_kept else size
        for place, size in enumerate(shape.tolist())
    ]
    return x.reshape(sizes)


def _shape(node: OnnxNode, x: Tensor) -> Tensor:
    start, end = node.attributes.get("start", 0), node.attributes.get("end", None)
    return torch.tensor(x.shape[start:end])


def _transpose(node: OnnxNode, x: Tensor) -> Tensor:
    return x.permute(node.attributes.get("perm", list(range(x.dim()))[::-1]))


def _flatten(node: OnnxNode, x: Tensor) -> Tensor:
    _refuse(node, node.attributes.get("axis", 1) != 1, "keeps more than the batch")
    return x.flatten(1)


def _squeeze(node: OnnxNode, x: Tensor, axes: Tensor) -> Tensor:
    del node
    return x.squeeze(axes.tolist())


def _unsqueeze(node: OnnxNode, x: Tensor, axes: Tensor) -> Tensor:
    del node
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def _slice(node: OnnxNode, x: Tensor, *bounds: Tensor) -> Tensor:
    """Bounds: starts, ends and, unless they are the first ones, axes; and steps, if not all 1."""
    starts, ends, *rest = (bound.tolist() for bound in bounds)
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    _refuse(node, min(steps) < 1, "goes backwards")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index = [slice(None)] * x.dim()
        size = x.shape[axis]  # the largest number stands for the end, and PyTorch warns of it
        index[axis] = slice(max(start, -size), min(end, size), step)
        x = x[tuple(index)]
    return x


def _resize(
    node: OnnxNode,
    x: Tensor,
    _roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    kind = node.attributes.get("mode", "nearest")
    centre = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    is_known = kind == "linear" and centre in {"half_pixel", "pytorch_half_pixel"}
    is_plain = not node.attributes.get("antialias", 0)
    _refuse(node, not (is_known and is_plain), f"resizes by {kind}, {centre}")
    if sizes is not None:
        return F.interpolate(x, size=sizes.tolist()[2:], mode="bilinear", align_corners=False)
    _refuse(node, scales is None, "says neither scales nor sizes")
    factors = [] if scales is None else scales.tolist()[2:]
    return F.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=False)


def _batch_norm(node: OnnxNode, x: Tensor, *tensors: Tensor) -> Tensor:
    weight, bias, mean, variance = tensors
    epsilon = node.attributes.get("epsilon", 1e-5)
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=epsilon)


def _layer_norm(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    epsilon = node.attributes.get("epsilon", 1e-5)
    return F.layer_norm(x, weight.shape, weight, bias, eps=epsilon)


def _cast(node: OnnxNode, x: Tensor) -> Tensor:
    return x.float() if node.attributes["to"] in FLOAT_TYPES else x.long()


def _quantize(node: OnnxNode, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    _refuse_asymmetric(node, zero)
    return quantize(x, _along_axis(node, scale, x))


def _dequantize(node: OnnxNode, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    _refuse_asymmetric(node, zero)
    return x.float() * _along_axis(node, scale, x)


def _refuse_asymmetric(node: OnnxNode, zero: Tensor | None) -> None:
    is_symmetric = zero is not None and zero.dtype == torch.int8 and not bool(zero.any())
    _refuse(node, not is_symmetric, "is not symmetric int8")


def _along_axis(node: OnnxNode, scale: Tensor, x: Tensor) -> Tensor:
    """Scales [K] of the channels on the node's axis, ready to broadcast against `x`."""
    if scale.numel() == 1:
        return scale.reshape(())
    sizes = [1] * x.dim()
    sizes[node.attributes.get("axis", 1)] = -1
    return scale.reshape(sizes)


def _refuse(node: OnnxNode, is_refused: bool, why: str) -> None:  # noqa: FBT001 (a condition)
    if is_refused:
        raise NoPlainGraphError(f"operator {node.op} {node.name!r} {why}")


def _split(node: OnnxNode, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = node.attributes.get("axis", 0)
    if sizes is not None:
        return torch.split(x, sizes.tolist(), dim=axis)
    return x.chunk(len(node.outputs), dim=axis)


def _expand(node: OnnxNode, x: Tensor, shape: Tensor) -> Tensor:
    del node
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))  # type: ignore[no-untyped-call]


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Add": lambda _, a, b: a + b,
        "AveragePool": _average_pool,
        "BatchNormalization": _batch_norm,
        "Cast": _cast,
        "Clip": _clip,
        "Concat": lambda node, *parts: torch.cat(parts, dim=node.attributes["axis"]),
        "Conv": _conv,
        "DequantizeLinear": _dequantize,
        "Div": lambda _, a, b: a / b,
        "Dropout": lambda _, x, *rest: x,
        "Elu": lambda node, x: F.elu(x, node.attributes.get("alpha", 1.0)),
        "Erf": lambda _, x: torch.erf(x),
        "Exp": lambda _, x: x.exp(),
        "Expand": _expand,
        "Flatten": _flatten,
        "Gather": lambda node, x, index: x.index_select(
            node.attributes.get("axis", 0), index.reshape(-1)
        ).squeeze(node.attributes.get("axis", 0) if index.dim() == 0 else ()),
        "Gelu": lambda node, x: F.gelu(x, approximate=node.attributes.get("approximate", "none")),
        "Gemm": _gemm,
        "GlobalAveragePool": lambda _, x: x.mean(dim=(2, 3), keepdim=True),
        "HardSigmoid": lambda node, x: (
            node.attributes.get("alpha", 0.2) * x + node.attributes.get("beta", 0.5)
        ).clamp(0, 1),
        "HardSwish": lambda _, x: F.hardswish(x),
        "Identity": lambda _, x: x,
        "LayerNormalization": _layer_norm,
        "LeakyRelu": lambda node, x: F.leaky_relu(x, node.attributes.get("alpha", 0.01)),
        "MatMul": lambda _, a, b: a @ b,
        "MaxPool": _max_pool,
        "Mul": lambda _, a, b: a * b,
        "Neg": lambda _, x: -x,
        "Pow": lambda _, a, b: a**b,
        "QuantizeLinear": _quantize,
        "ReduceMean": _reduce_mean,
        "Relu": lambda _, x: x.relu(),
        "Reshape": _reshape,
        "Resize": _resize,
        "Shape": _shape,
        "Sigmoid": lambda _, x: x.sigmoid(),
        "Slice": _slice,
        "Softmax": lambda node, x: x.softmax(dim=node.attributes.get("axis", -1)),
        "Split": _split,
        "Sqrt": lambda _, x: x.sqrt(),
        "Squeeze": _squeeze,
        "Sub": lambda _, a, b: a - b,
        "Tanh": lambda _, x: x.tanh(),
        "Transpose": _transpose,
        "Unsqueeze": _unsqueeze,
    }
)

"""The function that a network is in eval mode, cheap to call and to differentiate by its input.

In eval mode BatchNorm is a fixed affine map, so it folds into the convolution before it. A
folded copy costs one small pass over the weights and saves every BatchNorm of every later
pass, which pays when an attack calls the same weights ten times.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from compressor.compilation import compiled
from compressor.convolution import arrange_convolutions
from compressor.performance import Performance


@dataclass(frozen=True, kw_only=True)
class _FoldedPair:
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    folded: nn.Conv2d


class EvaluationView:
    """`network` in eval mode as a plain function images [N, C, H, W] -> logits [N, K].

    The network itself is neither changed nor switched to another mode. Weights are those of the
    last `refresh`. Inside, numbers have the format of `performance`; logits and gradients come
    out in the format of the images. A network that torch.fx cannot follow is copied unfolded.
    """

    def __init__(self, network: nn.Module, performance: Performance) -> None:
        self._performance = performance
        frozen = copy.deepcopy(network).eval()
        if performance.is_bfloat16_on_cpu:
            arrange_convolutions(frozen)
        self._module, self._pairs = _fold_graph(frozen, originals=dict(network.named_modules()))
        self._module.requires_grad_(False)  # noqa: FBT003 (torch's signature)
        folded = {id(t) for pair in self._pairs for t in pair.folded.parameters()}
        originals: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
        originals |= dict(network.named_buffers(remove_duplicate=False))
        targets = [*self._module.named_parameters(), *self._module.named_buffers()]
        self._copied = [  # constants that tracing found are no part of the network's state
            (originals[name], t) for name, t in targets if name in originals and id(t) not in folded
        ]
        if performance.training_dtype != torch.float32:
            for layer in self._module.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):  # the layers that autocast casts
                    layer.to(performance.training_dtype)
        self._answer = compiled(self._module, performance)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the present weights and statistics of the network."""
        for source, target in self._copied:
            target.copy_(source)
        for pair in self._pairs:
            _fold_into(pair)

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        with self._performance.autocast():
            logits_NK = self._answer(x_NCHW)
        return logits_NK.to(x_NCHW.dtype)


class _Tracer(fx.Tracer):
    """Takes what is like a layer of torch for one layer, as torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, nn.Conv2d | nn.BatchNorm2d)
        return is_layer or super().is_leaf_module(m, module_qualified_name)


def _fold_graph(
    frozen: nn.Module, *, originals: dict[str, nn.Module]
) -> tuple[nn.Module, list[_FoldedPair]]:
    """A graph of `frozen`, which may change, and where its weights come from."""
    try:
        traced = fx.GraphModule(frozen, _Tracer().trace(frozen))
    except (fx.proxy.TraceError, TypeError, RuntimeError):
        return frozen, []
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    num_calls = Counter(id(originals[target]) for target in targets)
    pairs = []
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.args else None
        if not (_is_call_of(node, nn.BatchNorm2d, originals) and isinstance(source, fx.Node)):
            continue
        if not _is_call_of(source, nn.Conv2d, originals) or len(source.users) != 1:
            continue
        if num_calls[id(originals[str(source.target)])] > 1:
            continue  # one set of weights cannot hold two different foldings
        pairs.append(_pair(source, node, originals=originals, traced=traced))
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, pairs


def _pair(
    conv: fx.Node, norm: fx.Node, *, originals: dict[str, nn.Module], traced: fx.GraphModule
) -> _FoldedPair:
    folded = cast("nn.Conv2d", traced.get_submodule(str(conv.target)))
    folded.weight = nn.Parameter(folded.weight.detach().clone())  # two layers may share one
    if folded.bias is None:
        folded.bias = nn.Parameter(folded.weight.new_zeros(folded.out_channels))
    return _FoldedPair(
        conv=cast("nn.Conv2d", originals[str(conv.target)]),
        norm=cast("nn.BatchNorm2d", originals[str(norm.target)]),
        folded=folded,
    )


def _is_call_of(node: fx.Node, kind: type[nn.Module], modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), kind)


def _fold_into(pair: _FoldedPair) -> None:
    norm = pair.norm
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise TypeError("a BatchNorm without running statistics is not a fixed map in eval mode")
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale * norm.weight if norm.weight is not None else scale
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    bias = shift if pair.conv.bias is None else shift + pair.conv.bias * scale
    pair.folded.weight.copy_(pair.conv.weight * scale[:, None, None, None])
    if pair.folded.bias is not None:
        pair.folded.bias.copy_(bias)

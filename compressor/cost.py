"""What models cost: parameters, multiply-adds, bytes, and latency at batch 1 on the CPU."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.networks import evaluation_mode

_NUM_ROUNDS = 60
_WARM_UP_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds per image at batch 1."""

    median_ms: float
    low_ms: float
    """Tenth percentile."""
    high_ms: float
    """Ninetieth percentile."""


def count_multiply_adds(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of convolutions and linear layers for one image."""
    total = 0

    def add(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            per_output = module.weight[0].numel()
            total += per_output * output.numel()
        elif isinstance(module, nn.Linear):
            total += module.in_features * output.numel()

    hooks = [module.register_forward_hook(add) for module in network.modules()]
    try:
        device = next(network.parameters()).device
        with evaluation_mode(network), torch.no_grad():
            network(torch.zeros(1, *image_shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def measure_latencies(
    models: Mapping[str, Callable[[Tensor], Tensor]], image_shape: tuple[int, int, int]
) -> dict[str, Latency]:
    """Latency of each model, one call of each in turn, so that a drift of the machine hits all."""
    x = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for round_number in range(_WARM_UP_ROUNDS + _NUM_ROUNDS):
            for name, model in models.items():
                started_at_seconds = time.perf_counter()
                model(x)
                if round_number >= _WARM_UP_ROUNDS:
                    seconds[name].append(time.perf_counter() - started_at_seconds)
    return {name: _summary(values) for name, values in seconds.items()}


def on_cpu(network: nn.Module) -> nn.Module:
    """A float32 copy in eval mode for latency; the original stays where it is."""
    return copy.deepcopy(network).cpu().eval()


def _summary(values_seconds: list[float]) -> Latency:
    ordered = sorted(1000 * value for value in values_seconds)
    last = len(ordered) - 1
    low, median, high = (ordered[round(q * last)] for q in (0.1, 0.5, 0.9))
    return Latency(median_ms=median, low_ms=low, high_ms=high)

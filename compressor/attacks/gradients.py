"""One forward and one backward pass of an attacker."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compressor.attacks.protocol import Model, Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What the attacker learns at one point per sample."""

    logits_NK: Tensor
    values_N: Tensor
    """The objective."""
    gradient_NCHW: Tensor
    """Of the objective with respect to the image; 0 where the model hides it."""


def evaluate(model: Model, x_NCHW: Tensor, targets: Tensor, *, objective: Objective) -> Evaluation:
    """Logits, objective and input gradient. Those of parameters are neither computed nor touched.

    A model whose output does not depend on its input in a differentiable way has gradient 0; that
    this says nothing about its robustness is for `compressor.validity.validity` to find out.
    """
    with torch.enable_grad():
        x = x_NCHW.detach().requires_grad_(True)  # noqa: FBT003 (torch's signature)
        logits_NK = model(x)
        values_N = objective(logits_NK, targets)
        gradient = None
        if values_N.requires_grad:
            (gradient,) = torch.autograd.grad(values_N.sum(), x, allow_unused=True)
    return Evaluation(
        logits_NK=logits_NK.detach(),
        values_N=values_N.detach(),
        gradient_NCHW=torch.zeros_like(x_NCHW) if gradient is None else gradient,
    )


def input_gradient(
    model: Model, x_NCHW: Tensor, targets: Tensor, *, objective: Objective
) -> Tensor:
    """Gradient of each example's objective with respect to its image, shape of `x_NCHW`."""
    return evaluate(model, x_NCHW, targets, objective=objective).gradient_NCHW


def in_parts(model: Model, *, max_rows: int) -> Model:
    """The same function; no more than `max_rows` images are in memory at once.

    Where a gradient is asked for, a part is computed again on the way back.
    """

    def answer(x_NCHW: Tensor) -> Tensor:
        if len(x_NCHW) <= max_rows:
            return model(x_NCHW)
        parts = torch.split(x_NCHW, max_rows)
        if torch.is_grad_enabled() and x_NCHW.requires_grad:
            return torch.cat([checkpoint(model, part, use_reentrant=False) for part in parts])
        return torch.cat([model(part) for part in parts])

    return answer

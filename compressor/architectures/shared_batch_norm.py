"""BatchNorm over the images of all ranks, in training; in eval mode it is the usual one.

torch's SyncBatchNorm does the same and takes tensors of GPUs only. N images, C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compressor.ranks import Ranks

_PER_CHANNEL = (0, 2, 3)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Normalises by mean and variance of the batch of all ranks, and collects these statistics.

    Source: Ioffe and Szegedy, "Batch normalization", ICML 2015, algorithm 1, its sums taken over
    the ranks. The variance is taken around the mean, in two transfers, since in one the difference
    of two large sums would cost float32 its digits.
    """

    def __init__(self, like: nn.BatchNorm2d, ranks: Ranks) -> None:
        """With the parameters and statistics of `like`, which it takes the place of."""
        super().__init__(
            like.num_features,
            eps=like.eps,
            momentum=like.momentum,
            affine=like.affine,
            track_running_stats=like.track_running_stats,
        )
        self._parameters, self._buffers = like._parameters, like._buffers  # noqa: SLF001
        self.train(like.training)
        self._ranks = ranks

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """See `torch.nn.BatchNorm2d`."""
        if not self.training:
            return super().forward(x_NCHW)
        answer: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalise.apply(
            x_NCHW, self.weight, self.bias, self.eps, self._ranks
        )
        y_NCHW, mean_C, variance_C, count = answer
        self._collect(mean_C, variance_C * (count / (count - 1)))
        return y_NCHW

    @torch.no_grad()
    def _collect(self, mean_C: Tensor, variance_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        share: float | Tensor = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / self.num_batches_tracked if self.momentum is None else share
        self.running_mean.lerp_(mean_C.to(self.running_mean), share)
        self.running_var.lerp_(variance_C.to(self.running_var), share)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (torch passes them by position)
        ctx: Any,  # noqa: ANN401 (torch's signature)
        x_NCHW: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
        own_count = values.new_full((1,), values.numel() / values.shape[1])
        sums = ranks.sum_in_place(torch.cat([values.sum(dim=_PER_CHANNEL), own_count]))
        count = sums[-1]
        mean_C = sums[:-1] / count
        centred = values - mean_C[:, None, None]
        variance_C = ranks.sum_in_place(centred.square().sum(dim=_PER_CHANNEL)) / count
        inverse_C = torch.rsqrt(variance_C + eps)
        normal = centred.mul_(inverse_C[:, None, None])
        y = normal if weight_C is None else normal * weight_C[:, None, None]
        y = y if bias_C is None else y + bias_C[:, None, None]
        ctx.save_for_backward(normal, weight_C, inverse_C, count)
        ctx.ranks, ctx.has_bias = ranks, bias_C is not None
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return y.to(x_NCHW.dtype), mean_C, variance_C, count

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        slope_NCHW: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor | None, ...]:
        normal, weight_C, inverse_C, count = ctx.saved_tensors
        slope = slope_NCHW.to(normal.dtype)
        along_C = (slope * normal).sum(dim=_PER_CHANNEL)
        plain_C = slope.sum(dim=_PER_CHANNEL)
        # Each rank keeps its part of the parameters' gradients; images meet those of all ranks.
        sums_2C = ctx.ranks.sum_in_place(torch.stack([along_C, plain_C])) / count
        back = slope - sums_2C[1][:, None, None] - normal * sums_2C[0][:, None, None]
        scale_C = inverse_C if weight_C is None else inverse_C * weight_C
        return (
            (back * scale_C[:, None, None]).to(slope_NCHW.dtype),
            None if weight_C is None else along_C.to(weight_C.dtype),
            plain_C if ctx.has_bias else None,
            None,
            None,
        )


@torch.no_grad()
def average_statistics(network: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm keep the mean of what the ranks have collected, each from its images."""
    if ranks.num_ranks == 1:
        return
    kept = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in kept:
        for values in (layer.running_mean, layer.running_var):
            if values is not None:
                ranks.sum_in_place(values).div_(ranks.num_ranks)


def share_batch_norm(network: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm of `network` take the images of all ranks, in place; names stay."""
    layers = [(name, m) for name, m in network.named_modules() if type(m) is nn.BatchNorm2d]
    for name, layer in layers:
        network.set_submodule(name, SharedBatchNorm2d(layer, ranks))

"""BatchNorm over the images of all ranks, in training; in eval mode it is the usual one.

torch's SyncBatchNorm does the same and takes tensors of GPUs only. N images, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.ranks import Ranks


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Normalises by mean and variance of the batch of all ranks, and collects these statistics.

    Source: Ioffe and Szegedy, "Batch normalization", ICML 2015, algorithm 1, its sums taken over
    the ranks.
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
        mean_C, variance_C, count = _statistics(x_NCHW, ranks)
        y_NCHW = x_NCHW.clone()
        if len(x_NCHW) > 0:  # a last batch may have fewer images than there are ranks
            y_NCHW = F.batch_norm(x_NCHW, mean_C, variance_C, weight_C, bias_C, eps=eps)
        ctx.save_for_backward(x_NCHW, weight_C, mean_C, variance_C, count)
        ctx.eps, ctx.ranks, ctx.has_bias = eps, ranks, bias_C is not None
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return y_NCHW, mean_C, variance_C, count

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        slope_NCHW: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x_NCHW, weight_C, mean_C, variance_C, count = ctx.saved_tensors
        inverse_C = torch.rsqrt(variance_C + ctx.eps)
        along_C = plain_C = torch.zeros_like(mean_C)
        if len(x_NCHW) > 0:
            # Along the normal values and plain, in one pass, as for statistics that do not move.
            # The kernel of CPUs takes the first pair of them, that of GPUs insists on the second.
            _, along_C, plain_C = torch.ops.aten.native_batch_norm_backward(
                slope_NCHW,
                x_NCHW,
                weight_C,
                *(mean_C, variance_C),
                *(mean_C, inverse_C),
                False,  # noqa: FBT003
                ctx.eps,
                [False, True, True],
            )
        # Each rank keeps its part of the parameters' gradients; images meet those of all ranks.
        along_all_C, plain_all_C = ctx.ranks.sum_in_place(torch.stack([along_C, plain_C])) / count
        scale_C = inverse_C if weight_C is None else inverse_C * weight_C
        # scale x (slope - plain - normal x along), as slope and x times a factor plus a constant
        of_x_C = -scale_C * inverse_C * along_all_C
        constant_C = -scale_C * plain_all_C - of_x_C * mean_C
        back = torch.addcmul(constant_C[:, None, None], x_NCHW, of_x_C[:, None, None])
        back.addcmul_(slope_NCHW, scale_C[:, None, None])
        return (
            back.to(slope_NCHW.dtype),
            None if weight_C is None else along_C.to(weight_C.dtype),
            plain_C if ctx.has_bias else None,
            None,
            None,
        )


def _statistics(x_NCHW: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], variance [C] and number of values a channel, over the images of all ranks.

    Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983: each
    rank's variance is taken around its own mean, as a difference of large sums would cost float32
    its digits, and all of it goes in one transfer.
    """
    values = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
    num_channels = values.shape[1]
    own_mean_C = own_variance_C = values.new_zeros(num_channels)
    if len(values) > 0:
        # What torch's own layer calls; var_mean takes ten times as long where channels come last.
        own_mean_C, own_variance_C = torch.ops.aten.batch_norm_update_stats(values, None, None, 0.0)
    own_count = values.new_full((1,), values.numel() / num_channels)
    found = ranks.gather_tensors(torch.cat([own_mean_C, own_variance_C, own_count]))
    mean_RC, variance_RC = found[:, :num_channels], found[:, num_channels:-1]
    count_R1 = found[:, -1:]
    count = count_R1.sum()
    share_R1 = count_R1 / count
    mean_C = (share_R1 * mean_RC).sum(dim=0)
    variance_C = (share_R1 * (variance_RC + (mean_RC - mean_C).square())).sum(dim=0)
    return mean_C, variance_C, count


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

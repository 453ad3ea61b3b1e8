"""The images on which exported files are compared with their source: held out of training.

Test images are for the final report, so nothing is chosen on them.

N images, C channels, H rows, W columns, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.attacks.build import evaluation_attacks
from compressor.data import Batch, TrainingSplit, evaluation_batches
from compressor.folding import EvaluationView
from compressor.networks import evaluation_mode
from compressor.performance import Performance
from compressor.threat import ThreatModel

Answer = Callable[[Tensor], Tensor]
"""Images in [0, 1], float [N, C, H, W] -> logits [N, K]."""

BATCH_SIZE = 64
_LEVELS = 255


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Images, adversarial images made on the source from them, and what the source says to both."""

    x_NCHW: Tensor
    x_adv_NCHW: Tensor
    y_N: Tensor
    keys_N: Tensor
    threat: ThreatModel
    source: Answer
    """The float32 network in eval mode."""
    clean_NK: Tensor
    adversarial_NK: Tensor

    @property
    def num_images(self) -> int:
        """How many images there are, each clean and attacked."""
        return len(self.y_N)

    def batches(self) -> list[Batch]:
        """The clean images, some at a time."""
        index_N = torch.arange(self.num_images)
        return [
            Batch(
                x_NCHW=self.x_NCHW[rows],
                y_N=self.y_N[rows],
                index_N=rows,
                keys_N=self.keys_N[rows],
            )
            for rows in torch.split(index_N, BATCH_SIZE)
        ]


def held_out_images(
    network: nn.Module,
    split: TrainingSplit,
    *,
    threat: ThreatModel,
    num_images: int,
    takes_bytes: bool = False,
) -> HeldOut:
    """Images spread evenly over the split, attacked with the PGD of 20 steps of the papers.

    Args:
        network: the source, in eval mode.
        split: images that the network was not trained on.
        threat: what the attacker may do.
        num_images: how many; all, if there are fewer.
        takes_bytes: adversarial images are rounded to 8 bits, as the file will get them.
    """
    batch = spread(split, num_images=num_images)
    folded = EvaluationView(network, Performance(device=torch.device("cpu")))
    x_adv_NCHW = attacked(folded, batch, threat=threat)
    if takes_bytes:
        x_adv_NCHW = (x_adv_NCHW * _LEVELS).round() / _LEVELS
    return HeldOut(
        x_NCHW=batch.x_NCHW,
        x_adv_NCHW=x_adv_NCHW,
        y_N=batch.y_N,
        keys_N=batch.keys_N,
        threat=threat,
        source=network,
        clean_NK=answers(network, batch.x_NCHW),
        adversarial_NK=answers(network, x_adv_NCHW),
    )


def spread(split: TrainingSplit, *, num_images: int) -> Batch:
    """Images spread evenly over the split, which may have one class after the other."""
    num_chosen = min(num_images, split.num_images)
    places_N = torch.arange(num_chosen, device=split.index_N.device)
    order_N = places_N * split.num_images // num_chosen
    return next(evaluation_batches(split, batch_size=num_chosen, order_N=order_N))


def attacked(model: Answer, batch: Batch, *, threat: ThreatModel) -> Tensor:
    """Adversarial images, shape of `batch.x_NCHW`, by a differentiable model in eval mode."""
    attack = evaluation_attacks(threat)["pgd_sat"]
    rows = torch.split(torch.arange(len(batch.y_N)), BATCH_SIZE)
    parts = [
        attack(model, batch.x_NCHW[part], batch.y_N[part], keys_N=batch.keys_N[part])
        for part in rows
    ]
    return torch.cat(parts)


@torch.no_grad()
def answers(model: Answer, x_NCHW: Tensor) -> Tensor:
    """Logits [N, K] on the CPU, a batch at a time."""
    if isinstance(model, nn.Module):
        with evaluation_mode(model):
            return torch.cat([model(part).cpu() for part in torch.split(x_NCHW, BATCH_SIZE)])
    return torch.cat([model(part).cpu() for part in torch.split(x_NCHW, BATCH_SIZE)])

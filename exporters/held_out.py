"""The images on which exported files are compared with their source: held out of training.

One part judges, another chooses. Test images are for the final report, so they do neither.

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
from compressor.sample_order import representative_order
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


def judging_places(split: TrainingSplit, *, num_images: int) -> Tensor:
    """Places of the images that judge finished files, int64 [N].

    No more than half of the split, because the next `num_images` choose among candidates: the
    best of many on some images looks better on those than on any others.
    """
    order_N = representative_order(split.labels_N, split.index_N)
    return order_N[: min(num_images, split.num_images // 2)]


def choosing_places(split: TrainingSplit, *, num_images: int) -> Tensor:
    """Places of the images on which candidates are chosen, int64 [N]; they judge nothing."""
    order_N = representative_order(split.labels_N, split.index_N)
    num_judging = len(judging_places(split, num_images=num_images))
    return order_N[num_judging : num_judging + num_images]


def held_out_images(
    network: nn.Module,
    split: TrainingSplit,
    places_N: Tensor,
    *,
    threat: ThreatModel,
    takes_bytes: bool = False,
) -> HeldOut:
    """Some images of a split, attacked with the PGD of 20 steps of the papers.

    Args:
        network: the source, in eval mode.
        split: images that the network was not trained on.
        places_N: which of them, int64.
        threat: what the attacker may do.
        takes_bytes: adversarial images are rounded to 8 bits, as the file will get them.
    """
    batch = next(evaluation_batches(split, batch_size=len(places_N), order_N=places_N))
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

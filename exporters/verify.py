"""verify_export: does the file answer as the network does, on clean and on attacked images?"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressor.attacks.build import evaluation_attacks
from compressor.data import TrainingSplit, evaluation_batches
from compressor.networks import evaluation_mode
from compressor.proportions import Proportion
from compressor.threat import ThreatModel
from exporters.exported_model import ExportVerification

_RELATIVE_TOLERANCE = 1e-3
_BATCH_SIZE = 64


def verify_export(
    network: nn.Module,
    exported: Callable[[Tensor], Tensor],
    images: TrainingSplit,
    *,
    threat: ThreatModel,
    max_images: int = 512,
) -> ExportVerification:
    """Compare logits and labels on held-out images and on PGD images made from them.

    It fails if a logit differs by more than a thousandth of the largest one, or if a label
    differs whose margin in the source is above twice that. Held-out training images serve,
    because test images are for the final report only.
    """
    attack = evaluation_attacks(threat)["pgd_sat"]
    stride = max(1, images.num_images // max_images)
    source: list[Tensor] = []
    answer: list[Tensor] = []
    with evaluation_mode(network):
        for batch in evaluation_batches(images, batch_size=_BATCH_SIZE * stride):
            x, y, keys = batch.x_NCHW[::stride], batch.y_N[::stride], batch.keys_N[::stride]
            x_adv = attack(network, x, y, keys_N=keys)
            both = torch.stack([x, x_adv])
            with torch.no_grad():
                source.append(torch.stack([network(part) for part in both]).cpu())
            answer.append(torch.stack([exported(part) for part in both]).cpu())
    return _compare(torch.cat(source, dim=1), torch.cat(answer, dim=1))


def _compare(source_2NK: Tensor, answer_2NK: Tensor) -> ExportVerification:
    """Both tensors: clean images first, adversarial ones second."""
    tolerance = _RELATIVE_TOLERANCE * max(1.0, float(source_2NK.abs().max()))
    difference = float((source_2NK - answer_2NK).abs().max())
    same_2N = source_2NK.argmax(dim=2) == answer_2NK.argmax(dim=2)
    top_2N2 = source_2NK.topk(2, dim=2).values
    margin_2N = top_2N2[..., 0] - top_2N2[..., 1]
    num_clear_flips = int((~same_2N & (margin_2N > 2 * tolerance)).sum())
    failed = not difference <= tolerance or num_clear_flips > 0  # NaN is not <= anything
    clean, adversarial = (
        Proportion(num_correct=int(flags.sum()), num_total=len(flags)) for flags in same_2N
    )
    reason = f"largest logit difference {difference:.2e}, tolerance {tolerance:.2e}"
    if num_clear_flips:
        reason += f"; {num_clear_flips} labels differ beyond rounding"
    return ExportVerification(
        status="failed" if failed else "verified",
        reason=reason,
        clean_agreement=clean,
        adversarial_agreement=adversarial,
        max_logit_difference=difference,
        tolerance=tolerance,
    )

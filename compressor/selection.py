"""Clean and robust accuracy on held-out training images, to choose the best epoch by."""

from dataclasses import replace

import torch
from torch import nn

from compressor.attacks.build import selection_attack
from compressor.data import TrainingSplit, evaluation_batches
from compressor.folding import EvaluationView
from compressor.networks import evaluation_mode
from compressor.performance import Performance
from compressor.proportions import Proportion
from compressor.recipe import Recipe

_BATCH_SIZE = 256


def measure_on_validation(
    network: nn.Module, validation: TrainingSplit, *, recipe: Recipe, performance: Performance
) -> tuple[Proportion, Proportion]:
    """Clean accuracy, and accuracy under PGD, both judged in float32.

    The search for adversarial images may run in the format of training; what they do is always
    decided by the float32 network. The counts wait for the device once, at the end. Each rank takes
    its part of the images, and all get the counts of all.
    """
    attack = selection_attack(recipe.threat.build(), num_steps=recipe.selection.num_steps)
    # Compiled anew for every candidate, it would take longer than its few passes.
    view = EvaluationView(network, replace(performance, compiled_batch_size=None))
    counts = torch.zeros(2, dtype=torch.int64, device=performance.device)
    with evaluation_mode(network):
        places_N = torch.arange(validation.num_images, device=performance.device)
        own_N = places_N[performance.ranks.part(validation.num_images)]
        for batch in evaluation_batches(validation, batch_size=_BATCH_SIZE, order_N=own_N):
            x_adv = attack(view, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)
            with torch.no_grad():
                for place, x in enumerate((batch.x_NCHW, x_adv)):
                    counts[place] += (network(x).argmax(dim=1) == batch.y_N).sum()
    clean, robust = performance.ranks.sum_in_place(counts).tolist()
    total = validation.num_images
    return (
        Proportion(num_correct=clean, num_total=total),
        Proportion(num_correct=robust, num_total=total),
    )

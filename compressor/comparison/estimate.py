"""How long runs will take: passes per image times what a pass takes on this machine."""

from collections.abc import Sequence
from dataclasses import asdict
from math import ceil

from compressor.attacks.stages import build_stages
from compressor.comparison.measurements import CASCADE, WHITE_BOX
from compressor.comparison.measuring import ImageCounts
from compressor.comparison.pass_seconds import PassSeconds
from compressor.comparison.passes import Passes
from compressor.comparison.result import PassRow
from compressor.recipe import Recipe

_BATCH_SIZE = 64
_STANDING_SHARE = 0.5
"""Of the images, against which every attack of the cascade has to run to its end; a guess."""
_ENDS_ON_ALL = "apgd_ce"
"""The attack of the cascade that meets all images."""


def training_seconds(
    recipe: Recipe, passes: Passes, seconds: PassSeconds, *, num_images: int, num_validation: int
) -> float:
    """All steps and all validations of one run."""
    per_image = seconds.of(recipe, num_images=num_images).per_image(PassRow(**asdict(passes)))
    selection, epochs = recipe.selection, recipe.training.epochs
    num_validated = 1 + ceil(epochs * (1 - selection.from_fraction)) // selection.every_epochs
    both = seconds.student_forward + seconds.student_backward
    validation = num_validated * num_validation * selection.num_steps * both
    candidates = 1 if recipe.training.ema_decay is None else 2
    return epochs * num_images * per_image + candidates * validation


def measuring_seconds(
    recipe: Recipe, seconds: PassSeconds, *, images: ImageCounts
) -> dict[str, float]:
    """By part; of the cascade as if half of the images stood to the end."""
    threat = recipe.threat.build()

    def attacked(names: Sequence[str], num_images: int) -> float:
        total = 0.0
        for stage in build_stages(names, threat=threat, mode="fast", batch_size=_BATCH_SIZE):
            meets_all = stage.tries_all or stage.name == _ENDS_ON_ALL
            share = 1.0 if meets_all else _STANDING_SHARE
            forwards = stage.max_forwards * seconds.student_forward
            total += share * (forwards + stage.max_backwards * seconds.student_backward)
        return num_images * total

    return {
        "clean": images.clean * seconds.student_forward,
        "white_box": attacked(WHITE_BOX, images.white_box),
        "cascade": attacked(CASCADE, images.cascade),
    }

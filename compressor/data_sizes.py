"""Whether the parts that a recipe wants can be cut from the images that there are."""

import torch
from torch import Tensor

from compressor.errors import DataError
from compressor.image_sources import ImageSource
from compressor.recipe import DataRecipe


def check_training_size(recipe: DataRecipe, *, num_left: int) -> None:
    """No more images than there are.

    Raises:
        DataError: if `recipe.training_size` is above `num_left`.
    """
    if recipe.training_size is not None and recipe.training_size > num_left:
        raise DataError(
            f"data.training_size = {recipe.training_size} is more than the {num_left} images that "
            "are left for training; set it to that or less, or leave it out"
        )


def check_validation_size(source: ImageSource, labels_N: Tensor, validation_size: int) -> None:
    """At least one image of each class is held out, and one left for training.

    Raises:
        DataError: if not.
    """
    num_classes = len(source.class_names)
    if validation_size < num_classes:
        raise DataError(
            f"data.validation_size = {validation_size} is less than one image for each of the "
            f"{num_classes} classes of {source.name}; set it to {num_classes} or more"
        )
    counts_K = torch.bincount(labels_N, minlength=num_classes)
    smallest, label = int(counts_K.min()), int(counts_K.argmin())
    per_class = -(-validation_size // num_classes)
    if per_class >= smallest:
        limit = (smallest - 1) * num_classes
        advice = f"set it to {limit} or less" if limit > 0 else "add images of that class"
        raise DataError(
            f"data.validation_size = {validation_size} takes {per_class} images of a class, and "
            f"{source.name} has only {smallest} of class {source.class_names[label]!r}; {advice}"
        )

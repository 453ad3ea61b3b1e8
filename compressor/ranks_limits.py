"""What cannot be shared among processes, since their number would be a part of what is learnt."""

from compressor.errors import RecipeError
from compressor.method_recipes import CIARDRecipe, DARHTRecipe
from compressor.recipe import Recipe

_ADVICE = "run it in one process, without --nproc and torchrun, or change that"


def refuse_on_ranks(recipe: Recipe, *, num_ranks: int) -> None:
    """Stop before anything is loaded.

    Raises:
        RecipeError: naming what depends on the number of processes.
    """
    if num_ranks == 1:
        return
    method, batch_size = recipe.method, recipe.training.batch_size
    if batch_size < num_ranks:
        raise RecipeError(
            f"training.batch_size = {batch_size} gives nothing to some of {num_ranks} processes; "
            "set a larger one"
        )
    if isinstance(method, CIARDRecipe) and method.teacher_statistics == "batch":
        raise RecipeError(f'method.teacher_statistics = "batch" takes whole batches; {_ADVICE}')
    if isinstance(method, DARHTRecipe) and method.teacher_mode != "eval":
        mode = method.teacher_mode
        raise RecipeError(f'method.teacher_mode = "{mode}" takes whole batches; {_ADVICE}')

"""`robust-compress recipe check`: is this recipe well formed, and what does it resolve to?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.options import JsonOption, SetOption
from cli.output import Output


def check(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe without touching data, teachers or a GPU.

    Example: `robust-compress recipe check examples/recipes/cifar10-small.toml`
    """
    from compressor.recipe import resolved_dict
    from compressor.recipe_file import load_recipe

    recipe = load_recipe(recipe_path, overrides or [])
    output = Output(as_json=as_json)
    output.result({"recipe_id": recipe.recipe_id, "recipe": resolved_dict(recipe)})
    output.say(f"{recipe_path} is well formed, recipe id {recipe.recipe_id[:8]}. It resolves to")
    output.say(json.dumps(resolved_dict(recipe), indent=2))
    command = "teacher train" if not recipe.teachers else "distill"
    output.next_command(f"robust-compress {command} {recipe_path}")

"""How finished runs do on training images that they did not learn from: to choose a method by.

Clean and under CW_inf, each run against the first one, on the images that chose its epoch, or with
`--unseen N` on that many others, class-balanced, which the run has not met at all; there must be so
many beside its `data.training_size`. The test images stay untouched.

    python tests/evidence/held_out_scores.py RUN RUN... --data imagefolder:FOLDER [--unseen 8000]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.attacks.build import evaluation_attacks
from compressor.comparison.statistics import paired_test
from compressor.data import TrainingSplit, evaluation_batches, load_training_data
from compressor.folding import EvaluationView
from compressor.networks import load_trained
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import Recipe
from compressor.recipe_file import load_recipe
from compressor.reports.markdown import markdown_table
from compressor.run_directory import RunDirectory, write_text_atomically

BATCH_SIZE = 250
HEADER = ("run", "n", "clean, %", "CW_inf, %", "mean", "CW_inf, gain on the first", "mean, gain")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Which held-out images one network gets right, clean and attacked; bool [N]."""

    clean_N: Tensor
    robust_N: Tensor

    def row(self, name: str, first: "Scores") -> list[str]:
        """As a line of the table."""
        clean, robust = (100 * float(t.double().mean()) for t in (self.clean_N, self.robust_N))
        cells = [name, f"{len(self.clean_N):,}"]
        cells += [f"{value:.1f}" for value in (clean, robust, (clean + robust) / 2)]
        if self is first:
            return [*cells, "-", "-"]
        pairs = [(self.robust_N, first.robust_N, 1)]
        pairs += [(self.clean_N.int() + self.robust_N, first.clean_N.int() + first.robust_N, 2)]
        return [*cells, *(_gain(*pair) for pair in pairs)]


def _gain(ours_N: Tensor, theirs_N: Tensor, points_per_unit: int) -> str:
    """In percentage points, with its 95 % interval over the images."""
    ours, theirs = (tuple(points_N.int().tolist()) for points_N in (ours_N, theirs_N))
    test = paired_test([ours], [theirs], points_per_unit=points_per_unit)
    low, high = test.over_images_95
    return f"{100 * test.mean:+.2f} ({100 * low:.2f} to {100 * high:.2f})"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--unseen", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    settings = PerformanceSettings(training_dtype="float32", num_threads=options.threads)
    performance = resolve_performance(settings)
    rows: list[list[str]] = []
    first, places = None, None
    for path in options.runs:
        run = RunDirectory.open(path)
        recipe = load_recipe(run.resolved_recipe, [f"data.source={options.data}"])
        images = held_out(recipe, options.unseen, settings)
        if places not in {None, images.index_sha256}:
            parser.error(f"{path} holds out other images than the first run")
        places = images.index_sha256
        network, _ = load_trained(run)
        scores = measure(network, images, recipe, performance)
        first = first or scores
        rows.append(scores.row(path.name, first))
        print(*rows[-1], sep=" | ", flush=True)  # noqa: T201
    if options.write:
        write_text_atomically(options.write, markdown_table(HEADER, rows) + "\n")


def held_out(
    recipe: Recipe, num_unseen: int | None, settings: PerformanceSettings
) -> TrainingSplit:
    """The images that chose the epoch, or others that follow those of training in their order."""
    device = torch.device("cpu")
    data = load_training_data(recipe.data, seed=recipe.seed, settings=settings, device=device)
    if num_unseen is None:
        return data.validation
    more = recipe.data.model_copy(update={"training_size": data.train.num_images + num_unseen})
    larger = load_training_data(more, seed=recipe.seed, settings=settings, device=device).train
    return larger.without(torch.isin(larger.index_N, data.train.index_N).nonzero()[:, 0])


def measure(
    network: nn.Module, held_out: TrainingSplit, recipe: Recipe, performance: Performance
) -> Scores:
    """In float32, 30 steps of CW_inf."""
    view = EvaluationView(performance.place_network(network).eval(), performance)
    attack = evaluation_attacks(recipe.threat.build())["cw_inf"]
    right: list[tuple[Tensor, Tensor]] = []
    for batch in evaluation_batches(held_out, batch_size=BATCH_SIZE):
        x_adv = attack(view, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)
        with torch.no_grad():
            clean_N, robust_N = (view(x).argmax(dim=1) == batch.y_N for x in (batch.x_NCHW, x_adv))
        right.append((clean_N, clean_N & robust_N))
    clean, robust = (torch.cat(parts) for parts in zip(*right, strict=True))
    return Scores(clean_N=clean, robust_N=robust)


if __name__ == "__main__":
    main()

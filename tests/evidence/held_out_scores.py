"""How finished runs do on their held-out training images: what a method may be chosen by.

Clean and under CW_inf, each run against the first one. The test images stay unseen.

    python tests/evidence/held_out_scores.py RUN RUN... --data imagefolder:FOLDER [--write FILE.md]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.attacks.build import evaluation_attacks
from compressor.data import TrainingSplit, evaluation_batches, load_training_data
from compressor.folding import EvaluationView
from compressor.networks import load_trained
from compressor.paired_difference import PairedDrop
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import Recipe
from compressor.recipe_file import load_recipe
from compressor.reports.markdown import markdown_table
from compressor.run_directory import RunDirectory, write_text_atomically

BATCH_SIZE = 250
HEADER = ("run", "n", "clean, %", "CW_inf, %", "mean", "CW_inf, drop from the first")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Which held-out images one network gets right, clean and attacked; bool [N]."""

    clean_N: Tensor
    robust_N: Tensor

    def row(self, name: str, first: "Scores") -> list[str]:
        """As a line of the table."""
        clean, robust = (100 * float(t.double().mean()) for t in (self.clean_N, self.robust_N))
        drop = PairedDrop(
            num_newly_broken=int((first.robust_N & ~self.robust_N).sum()),
            num_newly_fixed=int((self.robust_N & ~first.robust_N).sum()),
            num_total=len(self.robust_N),
        )
        mean = (clean + robust) / 2
        return [name, f"{len(self.clean_N):,}", *(f"{v:.1f}" for v in (clean, robust, mean))] + [
            "-" if self is first else str(drop)
        ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
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
        data = load_training_data(
            recipe.data, seed=recipe.seed, settings=settings, device=performance.device
        )
        if places not in {None, data.validation.index_sha256}:
            parser.error(f"{path} holds out other images than the first run")
        places = data.validation.index_sha256
        network, _ = load_trained(run)
        scores = measure(network, data.validation, recipe, performance)
        first = first or scores
        rows.append(scores.row(path.name, first))
        print(*rows[-1], sep=" | ", flush=True)  # noqa: T201
    if options.write:
        write_text_atomically(options.write, markdown_table(HEADER, rows) + "\n")


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

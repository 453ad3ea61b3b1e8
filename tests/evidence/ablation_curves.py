"""Both relative losses and the total loss along runs of B-MTARD with and without its two balances.

The figures 4 and 5 of the paper (Zhao et al., "Mitigating the accuracy-robustness trade-off via
multi-teacher adversarial distillation", TPAMI 2024), from runs of one comparison. A relative loss
is the loss over what it was in the first step; the balance of losses wants both to fall alike.

    python tests/evidence/ablation_curves.py baseline=RUN ebb=RUN --write docs/results/ablation.md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from compressor.metrics import read_metrics
from compressor.recipe_file import load_recipe
from compressor.reports.markdown import markdown_table
from compressor.run_directory import RunDirectory, write_text_atomically

NUM_WINDOWS = 60
ROLES = ("clean", "robust")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def losses(run: RunDirectory, name: str) -> NDArray[np.float64]:
    """One value for each step."""
    steps = [line for line in read_metrics(run) if line["kind"] == "step"]
    return np.array([line[name] for line in steps], dtype=np.float64)


def relative(run: RunDirectory, role: str) -> NDArray[np.float64]:
    """Loss against one teacher over that of the first step."""
    values = losses(run, f"{role}_loss_nats")
    return values / values[0]


def windows(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over equal parts of the run, and where they end in percent of it."""
    parts = np.array_split(values, min(NUM_WINDOWS, len(values)))
    ends = np.cumsum([len(part) for part in parts]) / len(values)
    return 100 * ends, np.array([part.mean() for part in parts])


def picture(runs: Mapping[str, RunDirectory], path: Path) -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        for axis, role in zip(axes[:2], ROLES, strict=True):
            axis.plot(*windows(relative(run, role)), color=colour, label=name)
            axis.set_ylabel(f"relative loss, {role} teacher")
        axes[2].plot(*windows(losses(run, "loss_nats")), color=colour, label=name)
    axes[2].set_ylabel("total loss, nats")
    for axis in axes:
        axis.set_xlabel("share of the run, %")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def row(name: str, run: RunDirectory) -> list[str]:
    """How the run ended: means over its last tenth."""
    of_role = {role: relative(run, role) for role in ROLES}
    last = {
        role: float(values[-max(1, len(values) // 10) :].mean()) for role, values in of_role.items()
    }
    total = losses(run, "loss_nats")
    return [
        name,
        load_recipe(run.resolved_recipe).recipe_id[:8],
        *(f"{last[role]:.3f}" for role in ROLES),
        f"{abs(last['clean'] - last['robust']):.3f}",
        f"{float(total[-max(1, len(total) // 10) :].mean()):.3f}",
    ]


def markdown(runs: Mapping[str, RunDirectory], picture_name: str) -> str:
    header = ("", "recipe", *(f"relative loss, {role}" for role in ROLES), "apart", "total, nats")
    blocks = [
        "# B-MTARD with and without its balances: the losses",
        f"![Curves]({picture_name})",
        "Relative loss: over its value in the first step; means over the last tenth of the run. "
        "Accuracies are in the comparison that the runs are of. Totals of runs with other weights "
        "are sums of other things, and those with other temperatures are of softer answers.",
        markdown_table(header, [row(name, run) for name, run in runs.items()]),
        "Command: `python tests/evidence/ablation_curves.py NAME=RUN ... --write FILE.md`.",
    ]
    return "\n\n".join(blocks) + "\n"


def named_runs(words: Sequence[str]) -> dict[str, RunDirectory]:
    """From `name=folder`."""
    pairs = [word.partition("=") for word in words]
    return {name: RunDirectory.open(Path(folder)) for name, _, folder in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--write", type=Path, required=True)
    options = parser.parse_args()
    runs = named_runs(options.runs)
    image = options.write.with_suffix(".png")
    picture(runs, image)
    write_text_atomically(options.write, markdown(runs, image.name))


if __name__ == "__main__":
    main()

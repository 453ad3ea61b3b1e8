"""The cells of every table of a comparison, as text. Needs no torch."""

from collections.abc import Sequence
from math import ceil, floor
from statistics import fmean, stdev

from compressor.comparison.result import (
    METRICS,
    TITLES,
    ComparisonResult,
    MethodRow,
    Metric,
    Score,
)

MINUS = "\N{MINUS SIGN}"


def main_cells(result: ComparisonResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: every metric in percent, then what training costs."""
    header = ("method", "seeds", *(title_of(result, metric) for metric in METRICS))
    rows = [
        (
            row.label,
            f"{row.num_measured} of {len(row.runs)}",
            *(score_cell(row, metric) for metric in METRICS),
            seconds_text(row.predicted_seconds),
            seconds_text(row.training_seconds),
            *pass_cells(row),
        )
        for row in result.methods
    ]
    costs = ("training, predicted", "training, clock", "student passes", "teacher passes")
    return (*header, *costs), rows


def paired_cells(result: ComparisonResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: every test against the reference."""
    header = ("method", "metric", "images", "seeds", "difference")
    intervals = ("over images, 95 %", "over seeds, 95 %")
    rows: list[tuple[str, ...]] = [
        (
            row.label,
            TITLES[pair.metric],
            f"{pair.num_images:,}",
            str(len(pair.seeds)),
            points_text(pair.mean),
            _interval_of_difference(pair.over_images_low_95, pair.over_images_high_95) or "-",
            _interval_of_difference(pair.over_seeds_low_95, pair.over_seeds_high_95) or "one seed",
            p_text(pair.p_value),
            p_text(pair.p_value_holm),
            pair.verdict,
        )
        for row in result.methods
        for pair in row.paired
    ]
    return (*header, *intervals, "p", "p, Holm", "verdict"), rows


def interval_cells(result: ComparisonResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: the 95 % interval of every accuracy; W-Robust, which is none, has none."""
    metrics = [metric for metric in METRICS if metric != "w_robust"]
    header = ("method", *(title_of(result, metric) for metric in metrics))
    return header, [
        (row.label, *(_interval_text(row.score(metric)) for metric in metrics))
        for row in result.methods
    ]


def validation_cells(result: ComparisonResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: what held-out training images said of the chosen epochs."""
    counts = {known.num_images for row in result.methods for known in row.validations}
    n = f" (n = {counts.pop():,})" if len(counts) == 1 else ""
    rows: list[tuple[str, ...]] = []
    for row in result.methods:
        pairs = [(known.clean.fraction, known.robust.fraction) for known in row.validations]
        columns = [[a for a, _ in pairs], [b for _, b in pairs], [(a + b) / 2 for a, b in pairs]]
        cells = [_mean_text(values, num_runs=len(row.runs)) for values in columns]
        epochs = [str(run.selected_epoch) for run in row.runs if run.selected_epoch is not None]
        rows.append((row.label, *cells, ", ".join(epochs) or "-"))
    return ("method", f"clean{n}", f"PGD{n}", "mean of both", "epoch"), rows


def setting_text(result: ComparisonResult) -> str:
    """`digits, linf 8/255, seeds 0, 1, 2`: what no table may be read without."""
    seeds = ", ".join(map(str, result.seeds))
    plural = "" if len(result.seeds) == 1 else "s"
    return f"{result.protocol['data']['source']}, {result.threat}, seed{plural} {seeds}"


def score_text(score: Score | None) -> str:
    """`42.31 ± 0.52` in percent; a dash where nothing may be believed or was measured."""
    if score is None:
        return "-"
    spread = "" if score.sample_sd is None else f" \N{PLUS-MINUS SIGN} {100 * score.sample_sd:.2f}"
    return f"{100 * score.mean:.2f}{spread}"


def points_text(fraction: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * fraction:+.2f}".replace("-", MINUS)


def p_text(p_value: float) -> str:
    """Two digits, as far down as they mean something."""
    return "<1e-15" if p_value < 1e-15 else f"{p_value:.2g}"


def seconds_text(seconds: float | None) -> str:
    """`1 h 05 min`, `3 min 20 s` or `12.5 s`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def pass_cells(row: MethodRow) -> tuple[str, str]:
    """`12 + 12`: forwards and backwards of the student, then of all teachers."""
    passes = row.passes
    return (
        f"{passes.student_forwards:.3g} + {passes.student_backwards:.3g}",
        f"{passes.teacher_forwards:.3g} + {passes.teacher_backwards:.3g}",
    )


def _interval_text(score: Score | None) -> str:
    """Rounded outwards, so that the interval holds what it says."""
    if score is None or score.low_95 is None or score.high_95 is None:
        return "-"
    low, high = (round(1000 * value, 6) for value in (score.low_95, score.high_95))
    return f"{floor(low) / 10:.1f}\N{EN DASH}{ceil(high) / 10:.1f}"


def _mean_text(values: Sequence[float], *, num_runs: int) -> str:
    """As a score of as many seeds."""
    if not values:
        return "-"
    spread = f" \N{PLUS-MINUS SIGN} {100 * stdev(values):.2f}" if len(values) > 1 else ""
    some = "" if len(values) == num_runs else f" [{len(values)} of {num_runs}]"
    return f"{100 * fmean(values):.2f}{spread}{some}"


def score_cell(row: MethodRow, metric: Metric) -> str:
    """With how many seeds it rests on, where these are not all."""
    score = row.score(metric)
    if score is None or score.num_seeds == len(row.runs):
        return score_text(score)
    return f"{score_text(score)} [{score.num_seeds} of {len(row.runs)}]"


def title_of(result: ComparisonResult, metric: Metric) -> str:
    """With its n, where all methods have the same; W-Robust with that of both its parts."""
    parts: tuple[Metric, ...] = ("clean", "autoattack") if metric == "w_robust" else (metric,)
    counts = [{s.num_images for row in result.methods if (s := row.score(p))} for p in parts]
    if any(len(some) != 1 for some in counts):
        return TITLES[metric]
    return f"{TITLES[metric]} (n = {' and '.join(f'{some.pop():,}' for some in counts)})"


def _interval_of_difference(low: float | None, high: float | None) -> str | None:
    """In points, rounded outwards; None where there is none."""
    if low is None or high is None:
        return None
    ends = floor(round(1000 * low, 6)) / 10, ceil(round(1000 * high, 6)) / 10
    return f"{ends[0]:.1f} to {ends[1]:.1f}".replace("-", MINUS)

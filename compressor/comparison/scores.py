"""What a run scored: by metric, by image, and over seeds.

An evaluation that raised an alarm has no numbers here, as in every report.
"""

from collections.abc import Sequence

from compressor.comparison.measurements import Attacked, Standing
from compressor.comparison.result import METRICS, Metric, Score
from compressor.comparison.runs import FinishedRun
from compressor.comparison.statistics import Points, Spread, interval_at_mean


def points_of(run: FinishedRun, metric: Metric) -> dict[int, int] | None:
    """What each test image scored, in rising order; None where nothing may be believed.

    One point for standing. For W-Robust one for the clean image and one for withstanding the
    cascade, on the images of the cascade alone; its score takes the clean part of all clean images.
    """
    if metric == "w_robust":
        cascade = _believed(run.measured.cascade)
        if cascade is None:
            return None
        pairs = zip(cascade.clean.stands, cascade.worst_case.stands, strict=True)
        points: Points = tuple(a + b for a, b in pairs)
        return dict(zip(cascade.clean.index, points, strict=True))
    standing = _standing(run, metric)
    if standing is None:
        return None
    return dict(zip(standing.index, map(int, standing.stands), strict=True))


def _standing(run: FinishedRun, metric: Metric) -> Standing | None:
    measured = run.measured
    if metric == "clean":
        return measured.clean
    if metric == "autoattack":
        cascade = _believed(measured.cascade)
        return cascade.worst_case if cascade else None
    white_box = _believed(measured.white_box)
    return white_box.by_attack.get(metric) if white_box else None


def _believed(attacked: Attacked | None) -> Attacked | None:
    """An alarm takes the numbers away, as in every report."""
    return attacked if attacked is not None and attacked.status == "verified" else None


def scores_of(runs: Sequence[FinishedRun]) -> tuple[Score, ...]:
    """Mean and spread of every metric that was measured, over the runs of one method."""
    by_seed = sorted(runs, key=lambda run: run.planned.recipe.seed)
    found = []
    for metric in METRICS:
        known = [(run, value) for run in by_seed if (value := _value(run, metric)) is not None]
        if known:
            found.append(_score(metric, known))
    return tuple(found)


def _score(metric: Metric, known: Sequence[tuple[FinishedRun, float]]) -> Score:
    values = tuple(value for _, value in known)
    spread = Spread.of(values)
    counted: Metric = "autoattack" if metric == "w_robust" else metric
    standings = [_standing(run, counted) for run, _ in known]
    proportions = [standing.proportion for standing in standings if standing]
    low, high = (None, None) if metric == "w_robust" else interval_at_mean(proportions)
    return Score(
        metric=metric,
        num_images=proportions[0].num_total,
        seeds=tuple(run.planned.recipe.seed for run, _ in known),
        values=values,
        mean=spread.mean,
        sample_sd=spread.sample_sd,
        low_95=low,
        high_95=high,
    )


def _value(run: FinishedRun, metric: Metric) -> float | None:
    """W-Robust takes the clean accuracy of all images that were answered clean."""
    if metric == "w_robust":
        clean, robust = _standing(run, "clean"), _standing(run, "autoattack")
        if clean is None or robust is None:
            return None
        return (clean.proportion.fraction + robust.proportion.fraction) / 2
    standing = _standing(run, metric)
    return None if standing is None else standing.proportion.fraction

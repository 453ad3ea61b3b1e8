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
    cascade, on the images of the cascade.
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
    found = []
    for metric in METRICS:
        known = {run.planned.recipe.seed: run for run in runs}
        values = {seed: _value(run, metric) for seed, run in sorted(known.items())}
        seeds = tuple(seed for seed, value in values.items() if value is not None)
        shares = [value for value in values.values() if value is not None]
        if not shares:
            continue
        spread = Spread.of(shares)
        standings = [_standing(known[seed], metric) for seed in seeds]
        proportions = [standing.proportion for standing in standings if standing]
        cascade = known[seeds[0]].measured.cascade
        num_cascade = cascade.worst_case.proportion.num_total if cascade else 0
        low, high = interval_at_mean(proportions) if proportions else (None, None)
        found.append(
            Score(
                metric=metric,
                num_images=proportions[0].num_total if proportions else num_cascade,
                seeds=seeds,
                values=tuple(shares),
                mean=spread.mean,
                sample_sd=spread.sample_sd,
                low_95=low,
                high_95=high,
            )
        )
    return tuple(found)


def _value(run: FinishedRun, metric: Metric) -> float | None:
    """W-Robust takes the clean accuracy of all images that were answered clean."""
    if metric == "w_robust":
        clean, robust = _standing(run, "clean"), _standing(run, "autoattack")
        if clean is None or robust is None:
            return None
        return (clean.proportion.fraction + robust.proportion.fraction) / 2
    standing = _standing(run, metric)
    return None if standing is None else standing.proportion.fraction

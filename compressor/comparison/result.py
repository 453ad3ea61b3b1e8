"""ComparisonResult: what a comparison found, for programs and for every table and picture.

Closed and versioned; a result that contradicts itself is refused. Needs no torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from compressor.closed_table import ClosedTable, Count, NonNegative, TupleOf
from compressor.proportions import Proportion
from compressor.records import read_record, write_record
from compressor.threat import ThreatModel

Metric = Literal["clean", "pgd_sat", "pgd_trades", "cw_inf", "autoattack", "w_robust"]
ROBUST: tuple[Metric, ...] = ("pgd_sat", "pgd_trades", "cw_inf", "autoattack")
METRICS: tuple[Metric, ...] = ("clean", *ROBUST, "w_robust")
TITLES: dict[Metric, str] = {
    "clean": "clean",
    "pgd_sat": "PGD_sat",
    "pgd_trades": "PGD_trades",
    "cw_inf": "CW_inf",
    "autoattack": "AutoAttack-style",
    "w_robust": "W-Robust",
}
Verdict = Literal["better", "worse", "better weights", "worse weights", "not shown"]
"""`better`: luck explains neither the images nor the seeds. `better weights`: it does not explain
the images, so these weights differ; whether the method does, the seeds do not show."""
SIGNIFICANCE = 0.05
_Share = Annotated[float, Field(ge=0, le=1)]
_Difference = Annotated[float, Field(ge=-1, le=1)]
_Seed = Annotated[int, Field(ge=0)]


class Score(ClosedTable):
    """One metric of one method, over its seeds; fractions."""

    metric: Metric
    num_images: Count
    """Of each seed; of W-Robust those of the cascade."""
    seeds: Annotated[TupleOf[_Seed], Field(min_length=1)]
    values: TupleOf[_Share]
    """One per seed."""
    mean: _Share
    sample_sd: Annotated[float, Field(ge=0)] | None
    """Over the seeds; None for one seed."""
    low_95: _Share | None
    high_95: _Share | None
    """Interval of the mean for these weights, the images as the sample; None for W-Robust."""

    @property
    def num_seeds(self) -> int:
        """Whose runs have this number."""
        return len(self.seeds)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if len(self.values) != len(self.seeds):
            raise ValueError(f"{len(self.values)} values of {len(self.seeds)} seeds")
        if (self.sample_sd is None) != (len(self.seeds) == 1):
            raise ValueError("a spread needs two seeds, and two seeds have one")
        if abs(sum(self.values) / len(self.values) - self.mean) > 1e-9:
            raise ValueError(f"{self.mean} is not the mean of {self.values}")
        return self


class Paired(ClosedTable):
    """A method minus the reference on the same images; see `statistics.paired_test`."""

    metric: Metric
    num_images: Count
    seeds: Annotated[TupleOf[_Seed], Field(min_length=1)]
    """In common."""
    differences: TupleOf[_Difference]
    """Fractions, one per seed."""
    mean: _Difference
    over_seeds_low_95: _Difference | None
    over_seeds_high_95: _Difference | None
    """Student's t interval with the seeds as the sample; None for one seed."""
    over_images_low_95: _Difference | None = None
    over_images_high_95: _Difference | None = None
    """Of the mean for these weights, the images as the sample; None: of an earlier version."""
    p_value: _Share
    p_value_holm: _Share
    """Corrected for all tests of this result."""
    verdict: Verdict

    @property
    def num_seeds(self) -> int:
        """In common."""
        return len(self.seeds)

    @model_validator(mode="after")
    def _is_not_overstated(self) -> Self:
        if self.p_value_holm < self.p_value:
            raise ValueError("a corrected p-value cannot be smaller")
        if self.verdict != "not shown" and self.p_value_holm > SIGNIFICANCE:
            raise ValueError(f"{self.verdict} at p = {self.p_value_holm}")
        low, high = self.over_seeds_low_95, self.over_seeds_high_95
        is_of_seeds = low is not None and high is not None and (low > 0 or high < 0)
        if self.verdict in {"better", "worse"} and not is_of_seeds:
            raise ValueError(f"{self.verdict} with {low} to {high} over the seeds")
        return self


class PassRow(ClosedTable):
    """Images through the networks per training image, the mean over a run."""

    student_forwards: float
    student_backwards: float
    teacher_forwards: float
    teacher_backwards: float


class PassSecondsRow(ClosedTable):
    """What one image costs one method in one pass, all methods measured together."""

    student_forward: NonNegative
    student_backward: NonNegative
    teacher_forward: NonNegative
    """The mean over its teachers; a way back takes twice as long."""
    num_images: Count
    """Training images of an epoch."""

    def per_image(self, passes: PassRow) -> float:
        """Seconds of all passes that a training image needs."""
        teacher_passes = passes.teacher_forwards + 2 * passes.teacher_backwards
        return (
            passes.student_forwards * self.student_forward
            + passes.student_backwards * self.student_backward
            + teacher_passes * self.teacher_forward
        )


class Validation(ClosedTable):
    """What the chosen epoch showed on held-out training images, by which it was chosen."""

    clean_correct: Annotated[int, Field(ge=0)]
    robust_correct: Annotated[int, Field(ge=0)]
    """Under the attack of the choice; see `selection` of the recipe."""
    num_images: Count

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if max(self.clean_correct, self.robust_correct) > self.num_images:
            raise ValueError(f"more than {self.num_images} of {self.num_images} images")
        return self

    @property
    def clean(self) -> Proportion:
        """Of the held-out images."""
        return Proportion(num_correct=self.clean_correct, num_total=self.num_images)

    @property
    def robust(self) -> Proportion:
        """Of the held-out images."""
        return Proportion(num_correct=self.robust_correct, num_total=self.num_images)


class RunRow(ClosedTable):
    """One method with one seed."""

    seed: _Seed
    recipe_id: str
    status: Literal["measured", "failed", "not yet"]
    reason: str
    """Of a failure, and of measurements that do not count."""
    model_sha256: str | None
    selected_epoch: int | None
    """Chosen on held-out training images."""
    training_seconds: float | None
    """All steps, without validation and checkpoints; see `training_record`."""
    trained_on: str
    """Device, number format, software and processor, as far as the run says; see `made_on`."""
    measured_on: TupleOf[str]
    """The same of its attacks; more than one where a later call added some."""
    validation: Validation | None = None
    """None: not recorded by an earlier version, and the checkpoints, which know it, are gone."""


class MethodRow(ClosedTable):
    """One method."""

    label: str
    name: str
    settings: dict[str, Any]
    """Its whole table."""
    training: dict[str, Any]
    """The whole table of its recipes."""
    origin: str
    """Where these values come from."""
    teachers: str
    passes: PassRow
    runs: TupleOf[RunRow]
    scores: TupleOf[Score]
    """Missing where nothing was measured that may be believed."""
    paired: TupleOf[Paired]
    pass_seconds: PassSecondsRow | None = None
    """None: the result is of an earlier version."""

    def score(self, metric: Metric) -> Score | None:
        """Of one metric; None where there is none."""
        return next((score for score in self.scores if score.metric == metric), None)

    def pair(self, metric: Metric) -> Paired | None:
        """Against the reference; None where there is none."""
        return next((pair for pair in self.paired if pair.metric == metric), None)

    @property
    def training_seconds(self) -> float | None:
        """By the clock, the mean over the runs that know theirs."""
        known = [run.training_seconds for run in self.runs if run.training_seconds is not None]
        return sum(known) / len(known) if known else None

    @property
    def predicted_seconds(self) -> float | None:
        """Of the same steps, from passes and what a pass took: equal work has equal time."""
        if self.pass_seconds is None:
            return None
        num_images = self.training["epochs"] * self.pass_seconds.num_images
        return float(num_images * self.pass_seconds.per_image(self.passes))

    @property
    def validations(self) -> tuple[Validation, ...]:
        """Of the runs that know theirs."""
        return tuple(run.validation for run in self.runs if run.validation is not None)

    @property
    def num_measured(self) -> int:
        """Runs with numbers."""
        return sum(run.status == "measured" for run in self.runs)


class ComparisonResult(ClosedTable):
    """Methods under one protocol."""

    schema_version: Literal[1] = 1
    name: str
    reference: str
    """The label that the others are tested against."""
    protocol: dict[str, Any]
    """What all recipes share, without the places of files; `threat` and `data` above all."""
    methods: Annotated[TupleOf[MethodRow], Field(min_length=1)]
    notes: TupleOf[str]
    environment: dict[str, Any]

    @model_validator(mode="after")
    def _has_reference(self) -> Self:
        if self.reference not in {method.label for method in self.methods}:
            raise ValueError(f"there is no method {self.reference!r} to refer to")
        return self

    @property
    def num_tests(self) -> int:
        """That were corrected for together."""
        return sum(len(method.paired) for method in self.methods)

    @property
    def threat(self) -> ThreatModel:
        """What every attack on every method was allowed to do."""
        return ThreatModel(**self.protocol["threat"])

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of any method."""
        return tuple(sorted({run.seed for method in self.methods for run in method.runs}))


def write_result(result: ComparisonResult, path: Path) -> None:
    """As JSON, as a whole or not at all."""
    write_record(result, path)


def read_result(path: Path) -> ComparisonResult:
    """A result from JSON.

    Raises:
        RunError: if it is missing, damaged or of another schema.
    """
    return read_record(
        path,
        ComparisonResult,
        kind="comparison of schema 1",
        remedy="the command that made it writes it again",
    )

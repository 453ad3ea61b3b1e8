"""RobustnessReport: what was measured, on what, with which n, and whether it may be believed.

Closed and strict, because a gate may read it from strangers: counts that contradict the table of
samples, or a verified report with an alarm, are refused. Needs no torch. Forms for people are in
`markdown.py` and `html.py`.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from compressor.proportions import Proportion
from compressor.records import read_record, write_record
from compressor.reports.consistency import WRONG_CLEAN, contradictions
from compressor.threat import Norm

SCHEMA_VERSION = 2

CAVEAT = (
    "Accuracy under attack is an upper bound of the true robust accuracy: a stronger attack may "
    "still be found."
)

Status = Literal["verified", "incomplete", "unverified", "invalid"]
"""`verified`: every planned image went through every attack, and no validity check raised an
alarm. `incomplete`: a budget ended first; the images that are done are a random part.
`unverified`: there was no white-box attack. `invalid`: an alarm; the numbers say nothing."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Count(_Table):
    """A proportion with its exact 95 % interval (Clopper and Pearson, two-sided)."""

    num_correct: int
    num_total: int
    low_95: float
    high_95: float

    @classmethod
    def of(cls, proportion: Proportion) -> "Count":
        """With the bounds filled in."""
        low, high = proportion.interval(0.95)
        return cls(
            num_correct=proportion.num_correct,
            num_total=proportion.num_total,
            low_95=low,
            high_95=high,
        )

    @model_validator(mode="after")
    def _is_exact(self) -> Self:
        proportion = Proportion(num_correct=self.num_correct, num_total=self.num_total)
        low, high = proportion.interval(0.95)
        if abs(self.low_95 - low) > 1e-6 or abs(self.high_95 - high) > 1e-6:
            raise ValueError(f"the 95 % interval of {proportion} is {low:.6f} to {high:.6f}")
        return self

    @property
    def fraction(self) -> float:
        """The point estimate."""
        return self.num_correct / self.num_total


class CostRow(_Table):
    """What one model costs; latencies of all rows come from one interleaved run."""

    name: str
    num_parameters: int | None
    num_multiply_adds: int | None
    num_bytes: int
    latency_ms: float
    """Median at batch 1 on the CPU, float32."""
    latency_low_ms: float
    """Tenth percentile."""
    latency_high_ms: float
    """Ninetieth percentile."""


class TeacherRow(_Table):
    """A teacher, by content, and what it scored on a few held-out images before training."""

    role: Literal["clean", "robust"]
    name: str
    sha256: str
    clean: Count
    robust: Count | None


class AttackRow(_Table):
    """One attack of the cascade; it tries the images that stood before it."""

    name: str
    kind: Literal["white-box", "black-box", "transfer"]
    parameters: dict[str, float | int | str | bool]
    num_tried: int
    num_broken: int
    """Of those tried."""
    standing: Count
    """Images that are correct clean and after this and every attack before it."""
    accuracy: Count | None
    """Accuracy under this attack alone; None where it tried only what others had left."""
    num_forwards: int
    """Images that went through the model, summed over samples."""
    num_backwards: int
    duration_seconds: float


class CurvePoint(_Table):
    """Accuracy within one radius, of some of the images."""

    epsilon_pixels: float
    accuracy: Count


class EightBitFacts(_Table):
    """Cameras deliver 8 bits: how many adversarial images still fool after rounding."""

    num_found: int
    num_still_fooling: int


class ValidityRow(_Table):
    """One check of the evaluation itself."""

    name: str
    status: Literal["passed", "alarm", "not_run"]
    found: str
    """What was measured, with its n."""
    threshold: str
    """From where on it is an alarm."""
    p_value: float | None
    """Of the exact test, where there is one; compared with 1 % after Holm's correction."""
    advice: str
    """What an alarm means and what to do; or why the check was not run."""


class SampleTable(_Table):
    """One entry per image, in the order in which images were attacked."""

    index: tuple[int, ...]
    """Position in the test images."""
    label: tuple[int, ...]
    broken_by: tuple[str | None, ...]
    """`clean` if it is wrong without an attack, else the first attack that broke it; None: it
    stands."""
    prediction: tuple[int | None, ...]
    """The class answered on the clean image if that is wrong, else on the image that broke it."""


class TargetFacts(_Table):
    """What was verified."""

    kind: Literal["run", "weights", "onnx", "engine"]
    architecture: str
    sha256: str
    source_sha256: str | None
    """Of the weights whose gradients were used, if the target has none."""


class ArtefactFacts(_Table):
    """How a file without gradients was attacked."""

    attacked_through: Literal["twin", "source"]
    """Its differentiable twin, or the network that it was exported from."""
    twin: str
    """How well the twin answers as the file, or why there is none."""
    transfer: Count | None
    """Accuracy of the file under images made on its source alone, which flatters."""
    source: Count | None
    """Accuracy of the source under the same attack, on the same images."""
    transfer_flatters: bool = False
    """Whether the file looks better than its source under images made on that."""
    gradients_are_masked: bool
    """Whether attacks without gradients, or images of others, break what attacks with gradients
    could not; a validity check has then raised the alarm."""
    masking: str
    """What both rest on."""


class TestFacts(_Table):
    """Which images; hashes are SHA-256."""

    __test__ = False  # or pytest takes the class for a test case

    source: str
    class_names: tuple[str, ...]
    content_sha256: str
    index_sha256: str
    num_available: int
    """Test images that there are."""
    num_planned: int
    """Of these, to be attacked: all, or a random part with the classes in proportion."""


class SelectionFacts(_Table):
    """Which weights, chosen on held-out training images."""

    epoch: int
    candidate: str
    attack: str
    clean: Count
    robust: Count


class TrainingFacts(_Table):
    """Where the weights come from, if a run of ours trained them."""

    recipe_id: str
    recipe: dict[str, Any]
    content_sha256: str
    num_training: int
    num_validation: int
    validation_index_sha256: str
    selection: SelectionFacts | None
    """None: the checkpoints of the run, which record it, are gone."""
    teachers: tuple[TeacherRow, ...]
    environment: dict[str, Any]


class RobustnessReport(_Table):
    """The result of verifying one model on test images."""

    schema_version: Literal[2] = 2
    name: str
    status: Status
    status_reason: str
    looks: Literal["one", "many"] = "one"
    """`many`: `gate --live` looked after every chunk and could stop by what it saw, so bounds for a
    fixed number of images do not hold."""
    protocol: str
    """What the worst case is the worst of: `AutoAttack-style`, `AutoAttack (compat)`, or the
    names of the attacks."""
    target: TargetFacts
    artefact: ArtefactFacts | None = None
    """Of a file that was attacked; None for a network."""
    norm: Norm
    epsilon_pixels: float
    seed: int
    data: TestFacts
    clean: Count
    attacks: tuple[AttackRow, ...]
    worst_case: Count | None
    """Images that are correct clean and under every attack; None where nothing was shown."""
    eight_bit: EightBitFacts | None
    curve: tuple[CurvePoint, ...]
    validity: tuple[ValidityRow, ...]
    samples: SampleTable
    training: TrainingFacts | None
    cost: tuple[CostRow, ...]
    environment: dict[str, Any]
    """Of the verification."""
    duration_seconds: float
    caveat: str = CAVEAT

    @property
    def is_complete(self) -> bool:
        """Whether all planned images are in it."""
        return self.clean.num_total == self.data.num_planned

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for contradiction in contradictions(self):
            raise ValueError(contradiction)
        return self


def class_counts(report: RobustnessReport) -> list[tuple[str, Count, Count]]:
    """(class, clean, worst case) of every class that has images."""
    rows = []
    samples = report.samples
    for place, name in enumerate(report.data.class_names):
        broken = [b for b, y in zip(samples.broken_by, samples.label, strict=True) if y == place]
        if broken:
            correct = sum(b != WRONG_CLEAN for b in broken)
            counts = [
                Count.of(Proportion(num_correct=num, num_total=len(broken)))
                for num in (correct, broken.count(None))
            ]
            rows.append((name, counts[0], counts[1]))
    return rows


def w_robust_fraction(clean: Count, robust: Count) -> float:
    """Mean of clean and robust accuracy, as in B-MTARD."""
    return (clean.fraction + robust.fraction) / 2


def write_report(report: RobustnessReport, path: Path) -> None:
    """Write it as JSON, as a whole or not at all."""
    write_record(report, path)


def read_report(path: Path) -> RobustnessReport:
    """A report from JSON.

    Raises:
        RunError: if it is missing, damaged or of another schema.
    """
    return read_record(
        path,
        RobustnessReport,
        kind=f"report of schema {SCHEMA_VERSION}",
        remedy="write it again with `robust-compress verify RUN`",
    )


def percent(count: Count) -> str:
    """`52.00 %`."""
    return f"{100 * count.fraction:.2f} %"

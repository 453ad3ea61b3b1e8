"""What a comparison keeps of a training, so that its weights may go once they are measured."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressor.checkpoint import Best, selected_candidate
from compressor.closed_table import ClosedTable, TupleOf
from compressor.comparison.made_on import made_on
from compressor.comparison.result import Validation
from compressor.errors import CheckpointError, RunError
from compressor.metrics import read_metrics
from compressor.recipe_file import load_recipe
from compressor.run_directory import RunDirectory, read_facts, read_json, write_json_atomically


class TrainingRecord(ClosedTable):
    """One finished training: from what, into what."""

    schema_version: int = 1
    recipe_id: str
    made_from: dict[str, Any]
    """Training images, classes and teachers, by content."""
    model_sha256: str
    image_shape: TupleOf[int]
    """(channels, height, width)."""
    selected_epoch: int | None
    """Chosen on held-out training images; None: the checkpoints, which record it, are gone."""
    training_seconds: float | None
    """See `training_seconds`."""
    trained_on: str
    """See `made_on`."""
    validation: Validation | None = None
    """Of the chosen epoch; None as of `selected_epoch`, or kept by an earlier version."""

    @classmethod
    def of(cls, run: RunDirectory) -> "TrainingRecord":
        """What a finished run says of itself.

        Raises:
            CheckpointError: if its last checkpoint is damaged.
            RunError: if its files cannot be read.
        """
        facts = read_facts(run)
        best = selected_candidate(run) if run.checkpoint_steps() else None
        teachers = [{"role": t["role"], "sha256": t["sha256"]} for t in facts["teachers"]]
        return cls(
            recipe_id=load_recipe(run.resolved_recipe).recipe_id,
            made_from={
                "training_content_sha256": facts["training_content_sha256"],
                "class_names": facts["class_names"],
                "teachers": teachers,
            },
            model_sha256=facts["model_sha256"],
            image_shape=facts["image_shape"],
            selected_epoch=best.epoch if best else None,
            training_seconds=training_seconds(run),
            trained_on=made_on(read_json(run.environment)),
            validation=_validation(best) if best else None,
        )

    def completed_from(self, run: RunDirectory) -> "TrainingRecord":
        """With what an earlier version did not keep, as far as the run still knows it."""
        if self.validation is not None or not run.checkpoint_steps():
            return self
        try:
            best, place = selected_candidate(run), made_on(read_json(run.environment))
        except (CheckpointError, RunError):
            return self
        return self.model_copy(update={"validation": _validation(best), "trained_on": place})


def _validation(best: Best) -> Validation:
    return Validation(
        clean_correct=best.clean_correct,
        robust_correct=best.robust_correct,
        num_images=best.num_validation,
    )


def training_seconds(run: RunDirectory) -> float | None:
    """All steps, without validation and checkpoints; None if no step was logged.

    The mean time per image of the steps that were logged, times all images. Other work of the
    machine is in it.
    """
    steps = [line for line in read_metrics(run) if line["kind"] == "step"]
    speeds = [line["speed_images_per_second"] for line in steps]
    per_image = [1 / speed for speed in speeds[1:] or speeds if speed > 0]  # the first warms up
    if not per_image:
        return None
    epochs = read_json(run.resolved_recipe)["training"]["epochs"]
    return float(sum(per_image) / len(per_image) * read_facts(run)["num_training"] * epochs)


def write_record(path: Path, record: TrainingRecord) -> None:
    """As a whole or not at all."""
    write_json_atomically(path, record.model_dump(mode="json"))


def find_record(path: Path) -> TrainingRecord | None:
    """What an earlier call has kept, if it is there and can be read."""
    try:
        return TrainingRecord.model_validate(read_json(path))
    except (RunError, ValidationError):
        return None

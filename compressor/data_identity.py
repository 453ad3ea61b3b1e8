"""Whether images are those that a run was trained and selected on."""

from compressor.data import TrainingData
from compressor.errors import DataError
from compressor.run_directory import RunDirectory, read_facts


def refuse_other_data(data: TrainingData, run: RunDirectory) -> None:
    """The training images of a run, cut into the same two parts.

    Otherwise images count as held out that it was trained on, or labels mean other classes.

    Raises:
        DataError: if they are others.
        RunError: if the run does not say which they were.
    """
    facts, train = read_facts(run), data.train
    have = {
        "class_names": list(train.class_names),
        "image_shape": list(train.image_shape),
        "training_content_sha256": train.content_sha256,
        "validation_index_sha256": data.validation.index_sha256,
    }
    for name, value in have.items():
        if facts[name] != value:
            raise DataError(
                f"the training images are others than those of {run.path} ({name} was "
                f"{_short(facts[name])}, now it is {_short(value)}); give the data of the run with "
                "--data"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 64 else f"{text[:60]} ..."

"""What a ranking of teachers found, as a record that can be kept. Needs no torch.

Teachers are numbered from 1 in the order of `teachers`, the most robust first.
"""

from typing import Literal

from compressor.closed_table import ClosedTable, TupleOf
from compressor.reports.report import Count
from compressor.threat import Norm, format_pixels

Seen = Literal["no", "yes", "unknown"]
"""Whether a teacher was trained on some of the images."""


class RankedTeacher(ClosedTable):
    """One teacher. Counts are over all images; None: it could not be attacked."""

    name: str
    """Unique in the ranking."""
    source: str
    architecture: str
    sha256: str
    num_parameters: int | None
    """None for ONNX files."""
    clean: Count
    robust: Count | None
    """Right on the clean image and on every iterate of its own attack."""
    worst_case: Count | None
    """`robust`, and right also on the images made on the other teachers."""
    clean_entropy_nats: float
    adversarial_entropy_nats: float | None
    """On the images made on itself; where it is wrong on the clean image, on that."""
    forward_ms: float
    """Per image, in batches, on the machine of the ranking."""
    has_seen_images: Seen


class TransferCell(ClosedTable):
    """Images made on one teacher and shown to another, both by number."""

    made_on: int
    shown_to: int
    accuracy: Count | None
    """Of the second, over the images that the first gets right clean; None if there is none."""
    transferability: Count | None
    """Share that the second gets wrong, over the images that fool the first and that the second
    gets right clean; None if there is none."""


class ChosenTeachers(ClosedTable):
    """The recommended set."""

    numbers: TupleOf[int]
    num_wanted: int
    num_robust: int
    """Teachers among which was chosen."""
    transfer_weight: float
    score: float
    """Mean robust accuracy (the worst case) less `transfer_weight` times mean transferability."""
    mean_robust: float
    mean_transferability: float | None
    """Over ordered pairs; None for a single teacher."""
    same_choice: Count
    """In how many resamples of the images the choice is the same set."""
    reason: str


class TeacherRanking(ClosedTable):
    """The whole ranking."""

    schema_version: Literal[1] = 1
    data: str
    """Kind of the data, without its folder."""
    content_sha256: str
    index_sha256: str
    """Of the places of the images among those for training."""
    class_names: TupleOf[str]
    num_images: int
    seed: int
    norm: Norm
    epsilon_pixels: float
    num_steps: int
    """Of APGD on the cross-entropy."""
    teachers: TupleOf[RankedTeacher]
    transfer: TupleOf[TransferCell]
    """Every teacher that could be attacked with every teacher, itself included."""
    chosen: ChosenTeachers | None
    """None if no teacher is robust."""
    notes: TupleOf[str]

    @property
    def threat(self) -> str:
        """For people: `linf 8/255`."""
        radius = self.epsilon_pixels
        return f"{self.norm} {format_pixels(radius) if self.norm == 'linf' else f'{radius:g}'}"

    @property
    def protocol(self) -> str:
        """For people, in one line."""
        return (
            f"{self.num_images} images of the training part of {self.data}, classes balanced; "
            f"{self.threat}, APGD on the cross-entropy, {self.num_steps} steps"
        )

    def cell(self, made_on: int, shown_to: int) -> TransferCell | None:
        """None where the first could not be attacked."""
        pairs = {(cell.made_on, cell.shown_to): cell for cell in self.transfer}
        return pairs.get((made_on, shown_to))

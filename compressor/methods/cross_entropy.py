"""Plain training on labels: clean teachers, and the baseline without a defence."""

from dataclasses import dataclass

from compressor.data import Batch
from compressor.losses import cross_entropy
from compressor.methods.protocol import Moment, NoState, Stateless, StepResult, read_back
from compressor.student import Student


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Stateless):
    """Minimise the cross-entropy of clean images."""

    def step(
        self, student: Student, batch: Batch, state: NoState, moment: Moment
    ) -> tuple[StepResult, NoState]:
        """One pass."""
        del moment
        loss = batch.mean(cross_entropy(student.logits(batch.x_NCHW), batch.y_N))
        return StepResult(loss=loss, logged={"loss_nats": read_back(loss)[0]}), state

"""The errors a user can meet, and the exit code that each becomes.

A message says what is wrong, with which value, and what to do next. Anything that is
not a `RobustCompressError` is a bug of ours and ends with `ExitCode.BUG`.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended. The README prints the same table."""

    DONE = 0
    """Done, or the gate passed."""
    BUG = 1
    """A bug of ours."""
    USAGE = 2
    """The command line is not understood."""
    GATE_FAILED = 3
    """The model is not good enough."""
    KNOWN_ERROR = 4
    """Something in the input or in the environment is wrong."""
    MISMATCH = 5
    """An artefact does not match its source."""
    INCONCLUSIVE = 6
    """A budget ended before the question was decided."""
    INVALID = 7
    """The evaluation is invalid, or nothing was verified."""
    INTERRUPTED = 130
    """SIGINT; the run can be resumed."""
    TERMINATED = 143
    """SIGTERM; the run can be resumed."""


class RobustCompressError(Exception):
    """Base of every error that is explained to the user instead of shown as a traceback."""

    exit_code = ExitCode.KNOWN_ERROR


class UsageError(RobustCompressError):
    """The command line contradicts itself or names something that does not exist."""

    exit_code = ExitCode.USAGE


class RecipeError(RobustCompressError):
    """A recipe is malformed or asks for something impossible."""


class DataError(RobustCompressError):
    """Images, labels or folders are not as they must be."""


class TeacherError(RobustCompressError):
    """A teacher cannot be loaded, or does not fit the data or its role."""


class WeightsError(RobustCompressError):
    """A file of weights is missing, unsafe, or does not fit the architecture."""


class RunError(RobustCompressError):
    """A run folder is missing, occupied, or incomplete."""


class LostProcessError(RunError):
    """Another process of the same run has ended, or does not come; the cause is there."""


class CheckpointError(RobustCompressError):
    """A checkpoint is missing, damaged, or belongs to another recipe."""


class NonFiniteLossError(RobustCompressError):
    """Training produced a loss that is not a finite number."""


class DeviceError(RobustCompressError):
    """The device that was asked for is not there, or has too little memory."""


class MissingDependencyError(RobustCompressError):
    """An optional package is needed and absent."""


class BudgetSpentError(RobustCompressError):
    """A budget of time ended before the work did; what is finished is kept."""

    exit_code = ExitCode.INCONCLUSIVE


class InvalidEvaluationError(RobustCompressError):
    """An evaluation broke its own rules, so its numbers say nothing."""

    exit_code = ExitCode.INVALID


class ArtefactMismatchError(RobustCompressError):
    """A file does not answer as the model that it claims to be, or has another hash."""

    exit_code = ExitCode.MISMATCH


class TooLossyError(RobustCompressError):
    """A file is the right model but loses more accuracy under attack than was allowed."""

    exit_code = ExitCode.GATE_FAILED


class InterruptedRunError(RobustCompressError):
    """A signal ended training after the current step; everything is saved."""

    exit_code = ExitCode.INTERRUPTED


class TerminatedRunError(InterruptedRunError):
    """As `InterruptedRunError`, for SIGTERM."""

    exit_code = ExitCode.TERMINATED

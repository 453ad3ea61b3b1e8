"""What a benchmark found, as a record that can be kept: targets, times, accuracies.

Closed and strict, because the page of a run reads it from a file that anybody may have written; one
that contradicts itself is refused. Needs no torch.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compressor.closed_table import ClosedTable, TupleOf
from compressor.errors import RunError
from compressor.records import read_record
from compressor.reports.report import Count, Status

MIN_CALLS_P90, MIN_CALLS_P99 = 10, 100
"""From fewer calls, the percentile would be the slowest call or close to it."""
_MAX_FILE_BYTES = 4 * 2**20
_MAX_LETTERS, _MAX_KEPT_LETTERS = 500, 200

_Text = Annotated[str, Field(max_length=_MAX_LETTERS)]
_Number = Annotated[int, Field(ge=1, le=2**50)]
_Quantity = Annotated[float, Field(ge=0, le=1e12)]


def printable(text: str) -> str:
    """A text from strangers, fit for a terminal and for a record."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:_MAX_KEPT_LETTERS]


class Timing(ClosedTable):
    """One target at one batch size and thread count; percentiles by nearest rank, in ms."""

    batch_size: _Number
    num_threads: _Number
    num_rounds: _Number
    num_calls: _Number
    p50_ms: _Quantity
    lowest_p50_ms: _Quantity
    """Of the rounds."""
    highest_p50_ms: _Quantity
    p90_ms: _Quantity | None
    """None from fewer than `MIN_CALLS_P90` calls."""
    p99_ms: _Quantity | None
    """None from fewer than `MIN_CALLS_P99` calls."""
    images_per_second: _Quantity

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        tail = [self.p50_ms, *(ms for ms in (self.p90_ms, self.p99_ms) if ms is not None)]
        if sorted(tail) != tail or not self.lowest_p50_ms <= self.p50_ms <= self.highest_p50_ms:
            raise ValueError("percentiles are out of order")
        if self.p99_ms is not None and self.num_calls < MIN_CALLS_P99:
            raise ValueError(f"a p99 needs {MIN_CALLS_P99} calls, not {self.num_calls}")
        return self


class Accuracy(ClosedTable):
    """What a verification of this very file found; numbers only if it ended as verified."""

    status: Status | Literal["sequential"]
    """`sequential`: by `gate --live`, which stops by what it sees; the interval would be wrong."""
    report: _Text
    """Folder and name of the file."""
    threat: _Text
    protocol: _Text
    images_sha256: _Text
    """Of the content of the test images."""
    gradients_are_masked: bool
    clean: Count | None
    worst_case: Count | None

    @model_validator(mode="after")
    def _has_numbers_only_if_verified(self) -> Self:
        if {self.clean is not None, self.worst_case is not None} != {self.status == "verified"}:
            raise ValueError(f"the numbers do not fit the status {self.status}")
        return self


class BenchmarkRow(ClosedTable):
    """One target: what it is, what it costs, and how accurate it was found to be."""

    name: _Text
    kind: Literal["pytorch", "onnx", "engine"]
    precision: _Text
    sha256: _Text
    source_sha256: _Text | None
    """Of the weights that it was made from; precisions of one run have it in common."""
    num_bytes: _Number
    image_shape: Annotated[TupleOf[_Number], Field(min_length=3, max_length=3)]
    """(C, H, W)."""
    takes_bytes: bool
    """Pixels are uint8 instead of float32 in [0, 1]."""
    runs_on: _Text
    peak_memory_mib: _Quantity | None
    timings: TupleOf[Timing]
    not_measured: TupleOf[_Text]
    """What, and why."""
    accuracy: Accuracy | None

    def timing(self, batch_size: int, num_threads: int) -> Timing | None:
        """At this batch size and thread count; None if it was not measured."""
        key = (batch_size, num_threads)
        return next((t for t in self.timings if (t.batch_size, t.num_threads) == key), None)


class Benchmark(ClosedTable):
    """Targets measured in turn on one machine."""

    schema_version: Literal[1] = 1
    targets: Annotated[TupleOf[BenchmarkRow], Field(min_length=1, max_length=60)]
    batch_sizes: Annotated[TupleOf[_Number], Field(min_length=1)]
    thread_counts: Annotated[TupleOf[_Number], Field(min_length=1)]
    num_cores: _Number
    num_usable_cores: _Number
    load_before: _Quantity | None
    """Processes that want to run, mean over a minute; None where the system does not say."""
    load_after: _Quantity | None
    mode: dict[_Text, _Text]
    """Device, versions, clock frequency: what the times depend on besides."""

    @property
    def setting(self) -> tuple[int, int]:
        """(Batch size, threads) by which targets are compared: the smallest of both."""
        return min(self.batch_sizes), min(self.thread_counts)

    @property
    def comparable(self) -> tuple[tuple[BenchmarkRow, Count], ...]:
        """Targets and their worst cases, under the threat and on the images that most share."""
        known = [
            ((row.accuracy.threat, row.accuracy.images_sha256), row, row.accuracy.worst_case)
            for row in self.targets
            if row.accuracy and row.accuracy.worst_case
        ]
        most = Counter(conditions for conditions, _, _ in known).most_common(1)
        return tuple((row, count) for conditions, row, count in known if conditions == most[0][0])


def read_benchmark(path: Path) -> Benchmark:
    """A benchmark from JSON.

    Raises:
        RunError: if it is missing, damaged or of another schema.
    """
    if path.is_file() and path.stat().st_size > _MAX_FILE_BYTES:
        raise RunError(f"{path} is larger than any benchmark; measure again")
    return read_record(path, Benchmark, kind="benchmark of schema 1", remedy="measure again")


def without_accuracy(benchmark: Benchmark, *, sha256: str) -> Benchmark:
    """The same, where the accuracy of one target is not to be shown."""
    rows = (
        row.model_copy(update={"accuracy": None}) if row.sha256 == sha256 else row
        for row in benchmark.targets
    )
    return benchmark.model_copy(update={"targets": tuple(rows)})

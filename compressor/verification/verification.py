"""attack_chunks: images x attacks, chunk by chunk, each chunk through the whole cascade.

The images go in a random order that keeps the shares of the classes, so that those done before a
budget ends are a fair part of all. Always eval mode and un-augmented; float32 decides.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from compressor.attacks.stages import Form, Stage
from compressor.data import Batch, TestSplit, evaluation_batches
from compressor.errors import BudgetSpentError, InvalidEvaluationError, RobustCompressError
from compressor.folding import EvaluationView
from compressor.performance import Performance
from compressor.randomness import Stream, sample_keys, uniform
from compressor.ranks import ALONE, Ranks
from compressor.sample_order import proportional_order
from compressor.verification.cascade import (
    Found,
    Outcome,
    Subject,
    answer_clean,
    run_stage,
)
from compressor.verification.gallery_entry import GalleryEntry
from compressor.verification.journal import Journal
from compressor.verification.progress import Meter, VerificationProgress
from compressor.verification.samples import CLEAN_STAGE, Sample, take_outcomes

NEAR_SHARE = 0.15
"""Images that an attack has driven below this share of their clean margin are searched in float32.

All images that Square found in float32 but not in bfloat16, of 65 in three runs, ended below 0.14.
"""


@dataclass(frozen=True, kw_only=True)
class VerificationPlan:
    """What is done to each image."""

    stages: Sequence[Stage]
    seed: int = 0
    batch_size: int = 250
    """Images of a chunk, and rows of one pass."""
    max_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What is known after some chunks; every image in it went through every stage."""

    samples: Sequence[Sample]
    gallery: Sequence[GalleryEntry]
    outcomes: Sequence[Outcome]
    num_planned: int

    @property
    def is_complete(self) -> bool:
        """Whether all planned images are done."""
        return len(self.samples) == self.num_planned


def network_subject(network: nn.Module, performance: Performance) -> Subject:
    """A network in eval mode, and its views with BatchNorm folded.

    The caller keeps the network in eval mode (`compressor.networks.evaluation_mode`).
    """
    exact = Performance(device=performance.device)
    network = exact.place_network(network)
    float32 = EvaluationView(network, exact)
    is_float32 = performance.training_dtype == torch.float32
    search = float32 if is_float32 else EvaluationView(network, performance)
    return Subject(answer=network, float32=float32, search_dtype=search)


def attack_chunks(
    subject: Subject,
    split: TestSplit,
    plan: VerificationPlan,
    *,
    journal: Journal,
    observe: Callable[[VerificationProgress], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> Iterator[Verification]:
    """What is known after each chunk. Finished stages are in the journal and are not run again.

    Several ranks take a chunk each and tell one another, so that all know all; what is known then
    grows by that many chunks.

    Raises:
        BudgetSpentError: when `max_seconds` are over; the chunk it was in does not count.
        InvalidEvaluationError: if an attack left its threat model.
    """
    order_N = verification_order(split, seed=plan.seed)
    samples = _empty_samples(split, order_N)
    meter = Meter(plan.stages, num_images=len(samples), observe=observe)
    deadline = None if plan.max_seconds is None else time.monotonic() + plan.max_seconds

    def tick(num_images: int) -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise BudgetSpentError(f"the budget of {plan.max_seconds:g} seconds is spent")
        meter.tick(num_images)

    watched = subject.watched(tick)
    outcomes: list[Outcome] = []
    chunks = _chunks(split, order_N, plan)
    num_done = 0
    known = _Known(samples=samples, journal=journal, meter=meter)
    while together := list(islice(chunks, ranks.num_ranks)):
        outcomes += _attack_together(together, watched, known, ranks)
        num_done += sum(len(chunk.places) for chunk in together)
        yield Verification(
            samples=samples[:num_done],
            gallery=[entry for outcome in outcomes for entry in outcome.gallery],
            outcomes=tuple(outcomes),
            num_planned=len(samples),
        )


def _chunks(split: TestSplit, order_N: Tensor, plan: VerificationPlan) -> "Iterator[_Chunk]":
    batches = evaluation_batches(split, batch_size=plan.batch_size, seed=plan.seed, order_N=order_N)
    for number, batch in enumerate(batches):
        places = torch.arange(len(batch.y_N), device=batch.y_N.device) + number * plan.batch_size
        yield _Chunk(number=number, batch=batch, places=places, plan=plan)


def verification_order(split: TestSplit, *, seed: int) -> Tensor:
    """The order in which images are attacked: places in the split, int64 [N]."""
    keys_N = sample_keys(split.index_N, seed=seed)
    draws_N2 = uniform(keys_N, stream=Stream.VERIFICATION_ORDER, shape=(2,))
    return proportional_order(split.labels_N, draws_N2)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    number: int
    batch: Batch
    places: Tensor
    plan: VerificationPlan

    def part(self, rows_M: Tensor) -> tuple[Batch, Tensor]:
        """Some rows, and their places in the order of the verification."""
        batch = self.batch
        part = Batch(
            x_NCHW=batch.x_NCHW[rows_M],
            y_N=batch.y_N[rows_M],
            index_N=batch.index_N[rows_M],
            keys_N=batch.keys_N[rows_M],
        )
        return part, self.places[rows_M]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Known:
    """Where outcomes are written down, in place."""

    samples: Sequence[Sample]
    journal: Journal
    meter: Meter

    def take(self, outcome: Outcome) -> None:
        if self.journal.get(outcome.chunk, outcome.stage) is None:
            self.journal.add(outcome)
        take_outcomes(self.samples, [outcome])
        self.meter.done(outcome)


def _attack_together(
    chunks: Sequence[_Chunk], subject: Subject, known: _Known, ranks: Ranks
) -> list[Outcome]:
    """Each rank its own chunk, if there is one for it; then all know of all, of errors too."""
    own: list[Outcome] = []
    error: RobustCompressError | None = None
    try:
        for chunk in chunks[ranks.rank : ranks.rank + 1]:
            own = _attack_chunk(chunk, subject, known)
    except (BudgetSpentError, InvalidEvaluationError) as caught:
        error = caught
    outcomes: list[Outcome] = []
    for place, (theirs, their_error) in enumerate(ranks.gather((own, error))):
        if their_error is not None:
            raise their_error
        for outcome in theirs if place != ranks.rank else ():
            known.take(outcome)
        outcomes += theirs
    return outcomes


def _attack_chunk(chunk: _Chunk, subject: Subject, known: _Known) -> list[Outcome]:
    outcomes = []
    for name, stage in [(CLEAN_STAGE, None), *((s.name, s) for s in chunk.plan.stages)]:
        tried_M = _tried(chunk, stage, known.samples)
        outcome = known.journal.get(chunk.number, name)
        if outcome is None:
            with known.meter.stage(name, num_tried=len(tried_M)):
                outcome = _run(chunk, stage, subject, tried_M, samples=known.samples)
        known.take(outcome)
        outcomes.append(outcome)
    return outcomes


def _tried(chunk: _Chunk, stage: Stage | None, samples: Sequence[Sample]) -> Tensor:
    """Rows of the chunk that the stage is to try."""
    wanted = (None, CLEAN_STAGE) if stage is None else (None,)
    rows = []
    for row, place in enumerate(chunk.places.tolist()):
        broken_by = samples[place].broken_by
        tries_broken = stage is not None and stage.tries_all and broken_by != CLEAN_STAGE
        if broken_by in wanted or tries_broken:
            rows.append(row)
    return torch.tensor(rows, dtype=torch.int64, device=chunk.places.device)


def _run(
    chunk: _Chunk,
    stage: Stage | None,
    subject: Subject,
    tried_M: Tensor,
    *,
    samples: Sequence[Sample],
) -> Outcome:
    started_at_seconds = time.perf_counter()
    found: tuple[Found, ...] = ()
    gallery: tuple[GalleryEntry, ...] = ()
    if stage is None:
        found = answer_clean(subject, *chunk.part(tried_M))
    else:
        for form, rows_M in _by_form(chunk, stage, tried_M, samples):
            if len(rows_M):
                batch, places = chunk.part(rows_M)
                one = run_stage(stage, subject, batch, places, form=form, seed=chunk.plan.seed)
                found, gallery = found + one[0], gallery + one[1]
    return Outcome(
        chunk=chunk.number,
        stage=CLEAN_STAGE if stage is None else stage.name,
        found=tuple(sorted(found, key=lambda row: row.place)),
        gallery=gallery,
        duration_seconds=time.perf_counter() - started_at_seconds,
    )


def _by_form(
    chunk: _Chunk, stage: Stage, tried_M: Tensor, samples: Sequence[Sample]
) -> list[tuple[Form, Tensor]]:
    """Which rows are searched on which form of the model."""
    if stage.runs_on != "by_margin":
        return [(stage.runs_on, tried_M)]
    places = chunk.places[tried_M].tolist()
    near = [samples[place].is_near(NEAR_SHARE) for place in places]
    near_M = torch.tensor(near, dtype=torch.bool, device=tried_M.device)
    return [("float32", tried_M[near_M]), ("search_dtype", tried_M[~near_M])]


def _empty_samples(split: TestSplit, order_N: Tensor) -> list[Sample]:
    rows = zip(split.index_N[order_N].tolist(), split.labels_N[order_N].tolist(), strict=True)
    return [Sample(index=index, label=label) for index, label in rows]

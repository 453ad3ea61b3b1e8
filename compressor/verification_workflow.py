"""verify: from a target to its report on test images."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compressor.attacks.gradients import in_parts
from compressor.attacks.stages import protocol_of
from compressor.errors import BudgetSpentError, RunError
from compressor.metrics import read_metrics
from compressor.ranks import ALONE, UNLIKE_WORK, Ranks, joined_ranks
from compressor.reports.files import ReportFiles
from compressor.reports.html import write_html
from compressor.reports.markdown import to_markdown
from compressor.reports.report import (
    ArtefactFacts,
    CostRow,
    CurvePoint,
    RobustnessReport,
    TestFacts,
    ValidityRow,
    read_report,
    write_report,
)
from compressor.run_directory import write_text_atomically
from compressor.verification.cascade import Subject
from compressor.verification.doubt import artefact_facts, check_verification
from compressor.verification.epsilon_curve import accuracy_curve
from compressor.verification.gallery import choose_gallery, first_images
from compressor.verification.progress import VerificationProgress
from compressor.verification.request import Prepared, VerificationRequest, prepare
from compressor.verification.rows import (
    attack_rows,
    cost_rows,
    count_standing,
    eight_bit_facts,
    training_facts,
)
from compressor.verification.samples import to_table, write_csv
from compressor.verification.status import status_of
from compressor.verification.verification import Verification, attack_chunks

NUM_CURVE_IMAGES = 200


def verify(
    request: VerificationRequest,
    *,
    observe: Callable[[VerificationProgress], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[RobustnessReport, ReportFiles]:
    """Attack a model on test images and write its report, sample table and pages.

    Args:
        request: what is asked for. A verification that was cut off goes on where it was.
        observe: told several times a second.
        tell: told in words what is done after the attacks.

    Raises:
        UsageError: if the request contradicts itself.
        BudgetSpentError: if the budget ended before the first chunk was done.
        RobustCompressError: if the target or the data cannot be used.
    """
    prepared = prepare(request)
    report = _verify(prepared, ALONE, observe=observe, tell=tell)
    assert report is not None  # noqa: S101 (the one rank is the first)
    return report


def verify_together(
    request: VerificationRequest,
    *,
    observe: Callable[[VerificationProgress], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[RobustnessReport, ReportFiles] | None:
    """As `verify`, with those processes that the environment speaks of; the same table of samples.

    Returns:
        What `verify` returns, in the first process; None in the others.

    Raises:
        RunError: if another process ends; else as `verify`.
    """
    prepared = prepare(request)
    device = prepared.performance.device
    with joined_ranks(device, purpose="verification", patience=UNLIKE_WORK) as ranks:
        return _verify(prepared, ranks, observe=observe, tell=tell)


def _verify(
    prepared: Prepared,
    ranks: Ranks,
    *,
    observe: Callable[[VerificationProgress], None],
    tell: Callable[[str], None],
) -> tuple[RobustnessReport, ReportFiles] | None:
    journal = prepared.journal(ranks)
    found: Verification | None = None
    with prepared.subject() as subject:
        try:
            for found in attack_chunks(  # noqa: B007 (the last one is needed)
                subject,
                prepared.split,
                prepared.plan,
                journal=journal,
                observe=observe,
                ranks=ranks,
            ):
                pass
        except BudgetSpentError as error:
            if found is None:
                raise BudgetSpentError(
                    f"{error} before the first {prepared.plan.batch_size} images were done; what "
                    "is finished is kept: run the same command again, or give --batch-size a "
                    "smaller number"
                ) from None
        assert found is not None  # noqa: S101
        finished = ranks.gather(journal.outcomes)
        if ranks.is_first:
            for outcomes in finished:
                journal.absorb(outcomes)
        ranks.wait()  # until all is in the journal of the first, which may go on for hours
        written = conclude(prepared, subject, found, tell=tell) if ranks.is_first else None
    if found.is_complete:
        journal.remove()
    return written


Looks = Literal["one", "many"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a report says beside the attacks; empty where it is not known yet."""

    artefact: ArtefactFacts | None = None
    validity: Sequence[ValidityRow] = ()
    curve: Sequence[CurvePoint] = ()
    cost: Sequence[CostRow] = ()


def conclude(
    prepared: Prepared,
    subject: Subject,
    found: Verification,
    *,
    tell: Callable[[str], None] = lambda _: None,
    cost: Sequence[CostRow] = (),
    ended_because: str = "the budget ended",
    looks: Looks = "one",
) -> tuple[RobustnessReport, ReportFiles]:
    """Check the evaluation, measure costs, and write everything that people and programs read.

    Args:
        prepared: what was to be done.
        subject: the model, still in eval mode.
        found: what the attacks found.
        tell: told in words what is done.
        cost: measured here if it was not yet.
        ended_because: why, if not all planned images are done.
        looks: `many` if it could be stopped by what was found.
    """
    validity: tuple[ValidityRow, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    artefact: ArtefactFacts | None = None
    subject = _in_parts(subject, max_rows=prepared.max_rows)
    if prepared.stages:
        tell("checking that the evaluation can be believed")
        validity = check_verification(prepared, subject, found)
        artefact = artefact_facts(prepared, found, validity)
        tell("measuring accuracy at other radii")
        num_images = min(NUM_CURVE_IMAGES, len(found.samples))
        batch = first_images(prepared.split, prepared.plan, num_images=num_images)
        curve = accuracy_curve(subject, batch, found.samples[:num_images], threat=prepared.threat)
    if not cost:
        tell("measuring latency")
        cost = cost_rows(prepared.target, prepared.model, prepared.teachers)
    evidence = Evidence(artefact=artefact, validity=validity, curve=curve, cost=cost)
    report = describe(prepared, found, evidence=evidence, ended_because=ended_because, looks=looks)
    return report, _write(report, prepared, subject, found)


def describe(
    prepared: Prepared,
    found: Verification,
    *,
    evidence: Evidence,
    ended_because: str,
    looks: Looks,
) -> RobustnessReport:
    """The report of what is known."""
    names = [stage.name for stage in prepared.stages]
    status, reason = status_of(prepared, found, evidence.validity, ended_because)
    has_white_box = any(stage.kind == "white-box" for stage in prepared.stages)
    is_shown = has_white_box and status != "unverified"
    return RobustnessReport(
        name=prepared.target.name,
        status=status,
        status_reason=reason,
        looks=looks,
        protocol=protocol_of(names, prepared.request.mode) if names else "no attack",
        target=prepared.model.facts,
        artefact=evidence.artefact,
        norm=prepared.threat.norm,
        epsilon_pixels=prepared.threat.epsilon_pixels,
        seed=prepared.plan.seed,
        data=TestFacts(
            source=prepared.data_kind,
            class_names=prepared.split.class_names,
            content_sha256=prepared.split.content_sha256,
            index_sha256=prepared.split.index_sha256,
            num_available=prepared.split.num_available,
            num_planned=found.num_planned,
        ),
        clean=count_standing(found.samples, after=()),
        attacks=attack_rows(found, prepared.stages),
        worst_case=count_standing(found.samples, after=names) if is_shown else None,
        eight_bit=eight_bit_facts(found.samples) if names else None,
        curve=tuple(evidence.curve),
        validity=tuple(evidence.validity),
        samples=to_table(found.samples),
        training=training_facts(prepared.target),
        cost=tuple(evidence.cost),
        environment=prepared.environment(),
        duration_seconds=time.perf_counter() - prepared.started_at_seconds,
    )


def _write(
    report: RobustnessReport, prepared: Prepared, subject: Subject, found: Verification
) -> ReportFiles:
    """The JSON last: where it is, the others are too."""
    files = _make_room(prepared.files, report)
    gallery = choose_gallery(prepared.split, prepared.plan, found, answer=subject.answer)
    run = prepared.target.run
    curves = read_metrics(run) if run is not None else []
    write_csv(files.samples, found.samples, [stage.name for stage in prepared.stages])
    write_text_atomically(files.markdown, to_markdown(report))
    write_html(files.html, report, gallery=gallery, curves=curves)
    write_report(report, files.json)
    return files


def _in_parts(subject: Subject, *, max_rows: int) -> Subject:
    """The checks take more images at once than a chunk may have where images are large."""
    return Subject(
        answer=in_parts(subject.answer, max_rows=max_rows),
        float32=in_parts(subject.float32, max_rows=max_rows),
        search_dtype=in_parts(subject.search_dtype, max_rows=max_rows),
    )


def _make_room(files: ReportFiles, report: RobustnessReport) -> ReportFiles:
    """Where `report` goes, so that it replaces nothing but an older report of its own.

    A report of another model or of other images is moved aside: what was verified last is what a
    gate finds. A complete one stays if `report` is of a verification that ended early.
    """
    try:
        there = read_report(files.json)
    except RunError:
        if files.json.exists():  # of an older version, perhaps of another model
            files.move_to(files.labelled("unreadable"))
        return files
    target, data = there.target, there.data
    if (target, data.content_sha256) != (report.target, report.data.content_sha256):
        files.move_to(files.labelled(target.sha256[:8], data.content_sha256[:8]))
        return files
    is_worth_less = report.looks == "one" and not report.is_complete and there.is_complete
    return files.labelled("incomplete") if is_worth_less else files

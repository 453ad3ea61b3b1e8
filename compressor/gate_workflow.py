"""gate_live: attack a run and stop as soon as its policy is decided."""

from collections.abc import Callable
from dataclasses import replace

from compressor.attacks.stages import AUTOATTACK, PAPER_ATTACKS, protocol_of
from compressor.errors import BudgetSpentError
from compressor.gate.checks import check_question
from compressor.gate.gate import decide_live, judge_live, require_baseline
from compressor.gate.input import read_baseline
from compressor.gate.paired import Asked
from compressor.gate.plan import CHUNK_SIZE
from compressor.gate.policy import GatePolicy, PolicyError
from compressor.gate.result import GateResult
from compressor.image_sources import open_source
from compressor.performance_settings import PerformanceSettings
from compressor.reports.files import ReportFiles
from compressor.reports.report import RobustnessReport, ValidityRow
from compressor.run_directory import RunDirectory
from compressor.verification.progress import VerificationProgress
from compressor.verification.request import (
    Prepared,
    VerificationRequest,
    fitting_batch_size,
    prepare,
)
from compressor.verification.rows import cost_rows
from compressor.verification.target import open_target
from compressor.verification.verification import Verification, attack_chunks
from compressor.verification_workflow import Evidence, conclude, describe

_CHECKED_LATER = ValidityRow(
    name="all checks",
    status="not_run",
    found="",
    threshold="",
    p_value=None,
    advice="they are run once the gate is decided, and can still make it invalid",
)


def gate_live(
    run: RunDirectory,
    policy: GatePolicy,
    *,
    settings: PerformanceSettings,
    num_images: int | None = None,
    max_seconds: float | None = None,
    data_source: str | None = None,
    observe: Callable[[VerificationProgress], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> GateResult:
    """Put the images to all attacks, chunk by chunk, and ask the policy after each chunk.

    The report of what was attacked is written as `report-live.*`. An interrupted gate goes on
    where it was.

    Args:
        run: what wants to ship.
        policy: the rules.
        settings: the device and the number format of the search.
        num_images: a part of the test images, or all if there are fewer; None for all.
        max_seconds: for the attacks; when they are over the result may be inconclusive.
        data_source: where the data lies now, if not where it was.
        observe: told several times a second.
        tell: told in words what else is done.

    Raises:
        PolicyError: if the policy asks for what these attacks on these images cannot show.
        BudgetSpentError: if the budget ended before the first chunk was done.
        RobustCompressError: if the run, the data or the baseline cannot be used.
    """
    baseline = read_baseline(policy)
    require_baseline(policy, baseline)
    threat = policy.threat
    recipe = open_target(str(run.path), source=None).data_recipe(data_source)
    source = open_source(recipe, part="test")
    request = VerificationRequest(
        target=str(run.path),
        settings=settings,
        data_source=data_source,
        attacks=(*AUTOATTACK, *policy.attacks),
        norm=None if threat is None else threat.norm,
        epsilon_pixels=None if threat is None else threat.epsilon,
        num_images=None if num_images is None else min(num_images, len(source.labels)),
        batch_size=min(CHUNK_SIZE, fitting_batch_size(source.image_shape)),
        max_seconds=max_seconds,
    )
    prepared = prepare(request)
    _refuse_unanswerable(prepared, policy, baseline)
    prepared = replace(prepared, files=ReportFiles(folder=prepared.files.folder, label="live"))
    cost = cost_rows(prepared.target, prepared.model, prepared.teachers)
    journal = prepared.journal()
    found: Verification | None = None
    ended_because = "the gate was decided"
    with prepared.subject() as subject:
        try:
            for known in attack_chunks(
                subject, prepared.split, prepared.plan, journal=journal, observe=observe
            ):
                found = known
                evidence = Evidence(validity=(_CHECKED_LATER,), cost=cost)
                report = describe(
                    prepared, found, evidence=evidence, ended_because=ended_because, looks="many"
                )
                if decide_live(report, policy, baseline=baseline).verdict != "undecided":
                    break
        except BudgetSpentError:
            ended_because = "the budget ended"
            if found is None:
                raise
        assert found is not None  # noqa: S101
        report, _ = conclude(
            prepared,
            subject,
            found,
            tell=tell,
            cost=cost,
            ended_because=ended_because,
            looks="many",
        )
    if ended_because == "the gate was decided":
        journal.remove()
    return judge_live(report, policy, baseline=baseline)


def _refuse_unanswerable(
    prepared: Prepared, policy: GatePolicy, baseline: RobustnessReport | None
) -> None:
    """What would be known after hours of attacks only."""
    split, stages = prepared.split, prepared.stages
    alone = [stage.name for stage in stages if stage.tries_all]
    missing = [name for name in policy.attacks if name not in alone]
    if missing:
        raise PolicyError(
            f"attacks.{missing[0]}: gate --live cannot show the accuracy under it alone, as only "
            f"{', '.join(PAPER_ATTACKS)} try all images, each by its own name; limit one of these, "
            "or [worst_case]"
        )
    asked = Asked(
        content_sha256=split.content_sha256,
        class_names=split.class_names,
        label_of=dict(zip(split.index_N.tolist(), split.labels_N.tolist(), strict=True)),
        threat=prepared.threat,
        protocol=protocol_of([stage.name for stage in stages], prepared.request.mode),
    )
    bars = [one for one in check_question(asked, policy, baseline) if one.status != "passed"]
    if bars:
        reasons = "; ".join(f"{bar.name}: {bar.message}" for bar in bars)
        raise PolicyError(
            f"nothing was attacked, as gate --live would answer another question: {reasons}; "
            "change the policy, --data or --baseline"
        )

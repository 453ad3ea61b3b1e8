"""gate_live: attack a run and stop as soon as its policy is decided."""

from collections.abc import Callable
from dataclasses import replace

from compressor.attacks.stages import AUTOATTACK
from compressor.errors import BudgetSpentError
from compressor.gate.gate import decide_live, judge_live, require_baseline
from compressor.gate.input import read_baseline
from compressor.gate.policy import GatePolicy
from compressor.gate.result import GateResult
from compressor.performance_settings import PerformanceSettings
from compressor.reports.files import ReportFiles
from compressor.run_directory import RunDirectory
from compressor.verification.progress import VerificationProgress
from compressor.verification.request import VerificationRequest, prepare
from compressor.verification.rows import cost_rows
from compressor.verification.verification import Verification, attack_chunks
from compressor.verification_workflow import Evidence, conclude, describe

CHUNK_SIZE = 50
"""Images between two looks: fewer are attacked more slowly, more are decided on later."""


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
        num_images: a class-balanced part of the test images; None for all.
        max_seconds: for the attacks; when they are over the result may be inconclusive.
        data_source: where the data lies now, if not where it was.
        observe: told several times a second.
        tell: told in words what else is done.

    Raises:
        BudgetSpentError: if the budget ended before the first chunk was done.
        RobustCompressError: if the run, the data or the baseline cannot be used.
    """
    baseline = read_baseline(policy)
    require_baseline(policy, baseline)
    threat = policy.threat
    request = VerificationRequest(
        target=str(run.path),
        settings=settings,
        data_source=data_source,
        attacks=(*AUTOATTACK, *policy.attacks),
        norm=None if threat is None else threat.norm,
        epsilon_pixels=None if threat is None else threat.epsilon,
        num_images=num_images,
        batch_size=CHUNK_SIZE,
        max_seconds=max_seconds,
    )
    prepared = prepare(request)
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
                evidence = Evidence(cost=cost)
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

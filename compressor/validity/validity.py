"""check_validity: may the numbers of an evaluation be believed at all?

Tiers in causal order: what the model is given and what kind of function it is; its gradients;
whether the twin of a file is like the file under attack; the attacks. An alarm in one explains
alarms in the later ones, which are then not run, so that what is reported is the cause.
"""

import torch

from compressor.reports.report import ValidityRow
from compressor.validity.active_test import ACTIVE_TEST, active_test
from compressor.validity.attack_checks import ATTACK_CHECKS, attack_checks
from compressor.validity.claim import Claim, Purpose
from compressor.validity.gradient_checks import GRADIENT_CHECKS, gradient_checks
from compressor.validity.output_checks import OUTPUT_CHECKS, output_checks
from compressor.validity.twin_check import TWIN_CHECKS, twin_checks

NUM_IMAGES = 128
"""Attacks are compared on so many."""


def check_validity(claim: Claim, *, num_images: int = NUM_IMAGES) -> tuple[ValidityRow, ...]:
    """All checks, always in the same order, one row each; those not run say why.

    Those of a twin are for files only.

    Args:
        claim: what the evaluation says; its first images are used.
        num_images: how many of them.
    """
    claim = claim.select(torch.arange(min(num_images, len(claim.y_N)), device=claim.y_N.device))
    tiers = (
        (OUTPUT_CHECKS, _outputs),
        (GRADIENT_CHECKS, _gradients),
        (TWIN_CHECKS if claim.file is not None else (), twin_checks),
        ((*ATTACK_CHECKS, ACTIVE_TEST), _attacks),
    )
    rows: list[ValidityRow] = []
    for checks, run in tiers:
        causes = ", ".join(row.name for row in rows if row.status == "alarm")
        rows += [c.not_run(f"explained by {causes}") for c in checks] if causes else run(claim)
    return tuple(rows)


def _outputs(claim: Claim) -> list[ValidityRow]:
    return output_checks(claim.model, claim.x_NCHW, threat=claim.threat)


def _gradients(claim: Claim) -> list[ValidityRow]:
    keys_N = claim.draws(Purpose.GRADIENTS).keys_N
    return gradient_checks(claim.model, claim.x_NCHW, claim.y_N, keys_N=keys_N)


def _attacks(claim: Claim) -> list[ValidityRow]:
    return [*attack_checks(claim), _active_test(claim)]


def _active_test(claim: Claim) -> ValidityRow:
    if claim.features is None:
        return ACTIVE_TEST.not_run("the model has no linear layer at its end")
    return active_test(
        claim.features,
        claim.x_NCHW,
        keys_N=claim.draws(Purpose.ACTIVE_TEST).keys_N,
        threat=claim.threat,
        attack=claim.attack,
        num_queries=claim.num_steps,
    )

"""Bugs that flatter, planted one at a time: each is caught, and the row says by which net.

A net is a check of the conformance suite or of `compressor.validity.validity`, or a refusal of the
evaluation or of the report. Without the bug the same net lets the evaluation pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from pydantic import ValidationError
from torch import nn

from compressor.attacks.stages import AUTOATTACK
from compressor.errors import InvalidEvaluationError
from tests.contract import planted
from tests.contract import test_conformance_oracles as oracles
from tests.contract import test_conformance_verdict as verdict
from tests.contract.test_conformance_counts import check_passes
from tests.contract.test_conformance_metamorphic import check_batch_size_does_not_matter

FLATTER = r"[1-9]\d* of 50 images flatter"
OUTSIDE = "left its threat model"


def with_batchnorm():
    """The robust network behind a layer that does nothing in eval mode."""
    return nn.Sequential(nn.BatchNorm2d(1, affine=False), verdict.MAKER.load_network()).eval()


def oracle(norm, names=("apgd_t",), **options):
    return lambda _: oracles.check_exact(oracles.linear_case(norm), names, **options)


def report_of(num_chunks):
    return lambda make_report: verdict.check_report(make_report, num_chunks=num_chunks)


NETS = {
    "linear oracle, linf": oracle("linf"),
    "linear oracle, l2": oracle("l2"),
    "linear oracle, whole cascade": oracle("linf", AUTOATTACK),
    "linear oracle, in small batches": oracle("linf", batch_size=10),
    "box oracle": lambda _: oracles.check_exact(oracles.box_case(), ("apgd_t",)),
    "passes of APGD": lambda _: check_passes("apgd_ce", "fast"),
    "passes of APGD-T": lambda _: check_passes("apgd_t", "fast"),
    "batch size": lambda _: check_batch_size_does_not_matter(with_batchnorm),
    "silent success": lambda _: verdict.check_no_success_is_silent("apgd_ce"),
    "float32 decides": lambda _: verdict.check_float32_decides(),
    "not-a-number": lambda _: verdict.check_not_a_number_is_no_answer(),
    "worst case": lambda _: verdict.check_worst_case_is_per_image(),
    "validity": lambda _: verdict.check_believed(),
    "report": report_of(2),
    "report of a part": report_of(1),
}
"""Checks by name; those of a report are given the fixture that makes one."""


@dataclass(frozen=True, kw_only=True)
class Bug:
    plant: Callable[[pytest.MonkeyPatch], None]
    net: str
    says: str = FLATTER
    error: type[Exception] = AssertionError


def refused(plant, net, says=OUTSIDE):
    return Bug(plant=plant, net=net, says=says, error=InvalidEvaluationError)


def contradiction(plant, says, net="report"):
    return Bug(plant=plant, net=net, says=says, error=ValidationError)


BUGS = {
    "network in training mode": Bug(
        plant=planted.train_mode, net="batch size", says="of 40 images"
    ),
    "epsilon divided by 255 twice": Bug(
        plant=planted.epsilon_divided_twice, net="linear oracle, linf"
    ),
    "epsilon divided by 255 twice, again": Bug(
        plant=planted.epsilon_divided_twice, net="validity", says="alarms: epsilon_units"
    ),
    "clipped to [-1, 1]": refused(planted.clip_to(-1, 1), "box oracle"),
    "clipped to [0, 0.5]": refused(planted.clip_to(0, 0.5), "linear oracle, linf"),
    "normalised images": refused(
        planted.images_changed(lambda x: (x - 0.5) / 0.25), "linear oracle, linf"
    ),
    "more contrast": Bug(
        plant=planted.images_changed(lambda x: ((x - 0.5) * 1.5 + 0.5).clamp(0, 1)),
        net="linear oracle, linf",
    ),
    "last iterate": Bug(
        plant=planted.last_iterate, net="silent success", says="successes were lost"
    ),
    "half the steps": Bug(plant=planted.steps(50), net="passes of APGD", says=r"\[51, 51\]"),
    "no steps": Bug(plant=planted.no_attack_at_all, net="linear oracle, linf"),
    "no steps, again": Bug(plant=planted.no_attack_at_all, net="validity", says="converged"),
    "steps 1,000 times too small": Bug(plant=planted.tiny_steps, net="linear oracle, linf"),
    "wrong labels": Bug(plant=planted.wrong_labels, net="linear oracle, linf"),
    "wrong sign of the gradient": Bug(plant=planted.wrong_sign, net="linear oracle, linf"),
    "projection around the iterate": refused(
        planted.project_around_the_iterate, "linear oracle, linf"
    ),
    "first target only": Bug(
        plant=planted.first_target_only, net="passes of APGD-T", says=r"\[102, 102\]"
    ),
    "FAB beyond epsilon": refused(planted.fab_goes_too_far, "linear oracle, whole cascade"),
    "Square beyond epsilon": refused(planted.square_goes_too_far, "linear oracle, whole cascade"),
    "FAB beyond epsilon, and nothing counts as outside": Bug(
        plant=planted.nothing_is_outside,
        net="linear oracle, whole cascade",
        says=r"[1-9]\d* robust ones were broken",
    ),
    "rounded before it is judged": refused(
        planted.rounded_before_it_is_judged, "linear oracle, l2"
    ),
    "the search's own logits judge": Bug(plant=planted.search_model_judges, net="float32 decides"),
    "answer averaged over flips": Bug(
        plant=planted.answer_averaged_over_flips, net="linear oracle, linf"
    ),
    "answer with noise": Bug(
        plant=planted.answer_with_noise, net="validity", says="random_outputs"
    ),
    "hidden gradient": Bug(plant=planted.hidden_gradient, net="validity", says="zero_gradient"),
    "gradient of not-a-number": Bug(
        plant=planted.gradient_of_not_a_number, net="linear oracle, linf"
    ),
    "gradient of not-a-number, again": Bug(
        plant=planted.gradient_of_not_a_number, net="validity", says="finite_gradients"
    ),
    "not-a-number is class 0": Bug(
        plant=planted.not_a_number_is_class_0, net="not-a-number", says="was a right answer"
    ),
    "first batch answers for all": Bug(
        plant=planted.first_batch_answers_for_all, net="linear oracle, in small batches"
    ),
    "last attack decides": Bug(
        plant=planted.last_attack_decides, net="worst case", says="worst of"
    ),
    "divided by the correct images": contradiction(
        planted.counted_over(planted.over_the_correct), "samples say 45 of 50"
    ),
    "best case for worst case": contradiction(
        planted.counted_over(planted.best_case), "samples say"
    ),
    "wrong images left out": Bug(
        plant=planted.wrong_images_left_out, net="report", says="50 attacked, 45 counted"
    ),
    "part taken for the whole": contradiction(
        planted.part_taken_for_the_whole, "all planned images", net="report of a part"
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, monkeypatch, make_report):
    bug = BUGS[name]
    bug.plant(monkeypatch)
    with pytest.raises(bug.error, match=bug.says):
        NETS[bug.net](make_report)


@pytest.mark.parametrize("name", sorted({bug.net for bug in BUGS.values()}))
def test_net_lets_an_honest_evaluation_pass(name, make_report):
    NETS[name](make_report)

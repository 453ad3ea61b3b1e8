"""Bugs that flatter, planted one at a time: each is caught, and the row says by which net.

A net is a check of the conformance suite or of `compressor.validity`, or a refusal of the
evaluation or of the report. Without the bug the same net lets the evaluation pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compressor import cascade, verification, verification_report
from compressor.attacks import apgd, search, stages
from compressor.attacks.apgd import APGD
from compressor.attacks.fab import FAB
from compressor.attacks.search import Tally, by_logits
from compressor.attacks.square import Square
from compressor.attacks.stages import AUTOATTACK
from compressor.attacks.targeted import Targeted
from compressor.errors import InvalidEvaluationError
from compressor.proportions import Proportion
from compressor.report import Count
from compressor.samples import Sample
from compressor.threat import ThreatModel
from compressor.verification import Verification
from tests.contract import test_conformance_oracles as oracles
from tests.contract import test_conformance_verdict as verdict
from tests.contract.test_conformance_counts import check_passes
from tests.contract.test_conformance_metamorphic import check_batch_size_does_not_matter

FLATTER = "images flatter"
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
    "silent success": lambda _: verdict.check_no_success_is_silent("apgd_dlr"),
    "float32 decides": lambda _: verdict.check_float32_decides(),
    "not-a-number": lambda _: verdict.check_not_a_number_is_no_answer(),
    "worst case": lambda _: verdict.check_worst_case_is_per_image(),
    "validity": lambda _: verdict.check_believed(),
    "report": report_of(2),
    "report of a part": report_of(1),
}
"""Checks by name; those of a report are given the fixture that makes one."""


# The bugs. Each is planted by one or two `monkeypatch.setattr`.


def train_mode(patch):
    patch.setattr(nn.Module, "eval", nn.Module.train)


def epsilon_divided_twice(patch):
    original = oracles.build_stages

    def build_stages(names, *, threat, **options):
        threat = replace(threat, epsilon_pixels=threat.epsilon_pixels / 255)
        return original(names, threat=threat, **options)

    patch.setattr(oracles, "build_stages", build_stages)


def clip_to(low, high):
    def plant(patch):
        def project(threat, x_adv_NCHW, x_NCHW):
            return threat.project_to_ball(x_adv_NCHW, x_NCHW).clamp(low, high)

        patch.setattr(ThreatModel, "project", project)

    return plant


def project_around_the_iterate(patch):
    patch.setattr(ThreatModel, "project", lambda _, x_adv_NCHW, x_NCHW: x_adv_NCHW.clamp(0, 1))


def images_changed(change):
    def plant(patch):
        original = verification.evaluation_batches

        def evaluation_batches(*arguments, **options):
            for batch in original(*arguments, **options):
                yield replace(batch, x_NCHW=change(batch.x_NCHW))

        patch.setattr(verification, "evaluation_batches", evaluation_batches)

    return plant


def last_iterate(patch):
    def note(tally, x_MCHW, logits_MK, *, has_gradient):
        tally._num_forwards[tally._live] += 1
        tally._num_backwards[tally._live] += has_gradient
        tally._is_fooled = by_logits(x_MCHW, logits_MK, tally._y)
        tally._x_adv = x_MCHW.clone()

    patch.setattr(Tally, "note", note)
    patch.setattr(Tally, "release_fooled", lambda _: None)


def steps(number):
    return lambda patch: patch.setattr(stages, "APGD", partial(APGD, num_steps=number))


def no_attack_at_all(patch):
    steps(0)(patch)
    patch.setattr(APGD, "_random_start", lambda _, x_NCHW, draws: x_NCHW)


def tiny_steps(patch):
    original = ThreatModel.steepest
    patch.setattr(
        ThreatModel, "steepest", lambda threat, gradient: original(threat, gradient) / 100
    )


def wrong_labels(patch):
    original = Targeted.search

    def search(attack, model, x_NCHW, y_N, **options):
        return original(attack, model, x_NCHW, (y_N + 1) % 10, **options)

    patch.setattr(Targeted, "search", search)


def wrong_sign(patch):
    original = apgd.evaluate

    def evaluate(*arguments, **options):
        found = original(*arguments, **options)
        return replace(found, gradient_NCHW=-found.gradient_NCHW)

    patch.setattr(apgd, "evaluate", evaluate)


def first_target_only(patch):
    patch.setattr(stages, "Targeted", partial(Targeted, num_targets=1))


def fab_goes_too_far(patch):
    original = FAB.search_targets

    def search_targets(attack, *arguments, **options):
        far = replace(attack.threat, epsilon_pixels=3 * attack.threat.epsilon_pixels)
        return original(replace(attack, threat=far), *arguments, **options)

    patch.setattr(FAB, "search_targets", search_targets)


def square_goes_too_far(patch):
    original = Square.search

    def search(attack, *arguments, **options):
        far = replace(attack.threat, epsilon_pixels=3 * attack.threat.epsilon_pixels)
        return original(replace(attack, threat=far), *arguments, **options)

    patch.setattr(Square, "search", search)


def rounded_before_it_is_judged(patch):
    original = Targeted.search

    def search(attack, *arguments, **options):
        found = original(attack, *arguments, **options)
        return replace(found, x_adv_NCHW=(found.x_adv_NCHW * 255).floor() / 255)

    patch.setattr(Targeted, "search", search)


def search_model_judges(patch):
    original = APGD.search

    def search(attack, model, x_NCHW, y_N, *, draws, judge):
        del judge
        return original(attack, model, x_NCHW, y_N, draws=draws, judge=by_logits)

    patch.setattr(APGD, "search", search)


def answer_averaged_over_flips(patch):
    original = oracles.network_subject

    def network_subject(network, performance):
        subject = original(network, performance)
        return replace(subject, answer=lambda x: (network(x) + network(x.flip(-1))) / 2)

    patch.setattr(oracles, "network_subject", network_subject)


def answer_with_noise(patch):
    original, generator = nn.Sequential.forward, torch.Generator().manual_seed(0)

    def forward(network, x_NCHW):
        return original(network, x_NCHW + 0.1 * torch.randn(x_NCHW.shape, generator=generator))

    patch.setattr(nn.Sequential, "forward", forward)


def hidden_gradient(patch):
    original = nn.Sequential.forward
    patch.setattr(nn.Sequential, "forward", lambda net, x: original(net, (x * 8).round() / 8))


def not_a_number_is_class_0(patch):
    def by_argmax(x_MCHW, logits_MK, y_M):
        return logits_MK.nan_to_num(nan=0).argmax(dim=1) != y_M

    patch.setattr(cascade, "by_logits", by_argmax)
    patch.setattr(search, "by_logits", by_argmax)


def first_batch_answers_for_all(patch):
    original, known = verification.run_stage, {}

    def run_stage(stage, subject, batch, places, **options):
        if stage.name not in known:
            known[stage.name] = original(stage, subject, batch, places, **options)[0]
        rows = known[stage.name]
        places = places.tolist()
        return tuple(replace(rows[i % len(rows)], place=p) for i, p in enumerate(places)), ()

    patch.setattr(verification, "run_stage", run_stage)


def last_attack_decides(patch):
    original = Sample.take

    def take(sample, stage, found):
        if stage != "clean" and sample.broken_by != "clean":
            sample.broken_by = None
        original(sample, stage, found)

    patch.setattr(Sample, "take", take)


def counted_over(count):
    """`count(samples, attacks)` gives the two numbers of a proportion."""

    def plant(patch):
        def count_standing(samples, *, after):
            num_correct, num_total = count(samples, set(after))
            return Count.of(Proportion(num_correct=num_correct, num_total=num_total))

        patch.setattr(verification_report, "count_standing", count_standing)

    return plant


def over_the_correct(samples, attacks):
    correct = [s for s in samples if s.broken_by != "clean"]
    return sum(s.broken_by not in attacks for s in correct), len(correct)


def best_case(samples, attacks):
    stands = [any(not s.fooled_by.get(a, True) for a in attacks or ["clean"]) for s in samples]
    return sum(stands), len(samples)


def wrong_images_left_out(patch):
    original = verdict.attack_chunks

    def attack_chunks(*arguments, **options):
        for found in original(*arguments, **options):
            yield replace(found, samples=[s for s in found.samples if s.broken_by != "clean"])

    patch.setattr(verdict, "attack_chunks", attack_chunks)


def part_taken_for_the_whole(patch):
    patch.setattr(Verification, "is_complete", True)


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
    "network in training mode": Bug(plant=train_mode, net="batch size", says="of 40 images"),
    "epsilon divided by 255 twice": Bug(plant=epsilon_divided_twice, net="linear oracle, linf"),
    "epsilon divided by 255 twice, again": Bug(
        plant=epsilon_divided_twice, net="validity", says="alarms: epsilon_units"
    ),
    "clipped to [-1, 1]": refused(clip_to(-1, 1), "box oracle"),
    "clipped to [0, 0.5]": refused(clip_to(0, 0.5), "linear oracle, linf"),
    "normalised images": refused(images_changed(lambda x: (x - 0.5) / 0.25), "linear oracle, linf"),
    "more contrast": Bug(
        plant=images_changed(lambda x: ((x - 0.5) * 1.5 + 0.5).clamp(0, 1)),
        net="linear oracle, linf",
    ),
    "last iterate": Bug(plant=last_iterate, net="silent success", says="successes were lost"),
    "half the steps": Bug(plant=steps(50), net="passes of APGD", says=r"\[51, 51\]"),
    "no steps": Bug(plant=no_attack_at_all, net="linear oracle, linf"),
    "no steps, again": Bug(plant=no_attack_at_all, net="validity", says="more_search"),
    "steps 100 times too small": Bug(plant=tiny_steps, net="linear oracle, linf"),
    "wrong labels": Bug(plant=wrong_labels, net="linear oracle, linf"),
    "wrong sign of the gradient": Bug(plant=wrong_sign, net="linear oracle, linf"),
    "projection around the iterate": refused(project_around_the_iterate, "linear oracle, linf"),
    "first target only": Bug(plant=first_target_only, net="passes of APGD-T", says=r"\[102, 102\]"),
    "FAB beyond epsilon": refused(fab_goes_too_far, "linear oracle, whole cascade"),
    "Square beyond epsilon": refused(square_goes_too_far, "linear oracle, whole cascade"),
    "rounded before it is judged": Bug(plant=rounded_before_it_is_judged, net="linear oracle, l2"),
    "the search's own logits judge": Bug(plant=search_model_judges, net="float32 decides"),
    "answer averaged over flips": Bug(plant=answer_averaged_over_flips, net="linear oracle, linf"),
    "answer with noise": Bug(plant=answer_with_noise, net="validity", says="random_outputs"),
    "hidden gradient": Bug(plant=hidden_gradient, net="validity", says="zero_gradient"),
    "not-a-number is class 0": Bug(
        plant=not_a_number_is_class_0, net="not-a-number", says="was a right answer"
    ),
    "first batch answers for all": Bug(
        plant=first_batch_answers_for_all, net="linear oracle, in small batches"
    ),
    "last attack decides": Bug(plant=last_attack_decides, net="worst case", says="worst of"),
    "divided by the correct images": contradiction(
        counted_over(over_the_correct), "samples say 45 of 50"
    ),
    "best case for worst case": contradiction(counted_over(best_case), "samples say"),
    "wrong images left out": contradiction(wrong_images_left_out, "all planned images"),
    "part taken for the whole": contradiction(
        part_taken_for_the_whole, "all planned images", net="report of a part"
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

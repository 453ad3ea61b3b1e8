"""Bugs that flatter, each planted by one or two `setattr` of pytest's monkeypatch.

What catches them is said in `test_planted_bugs.py`.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from compressor.attacks import apgd, search, stages
from compressor.attacks.apgd import APGD
from compressor.attacks.fab import FAB
from compressor.attacks.search import Tally, by_logits
from compressor.attacks.square import Square
from compressor.attacks.targeted import Targeted
from compressor.proportions import Proportion
from compressor.reports.report import Count
from compressor.threat import ThreatModel
from compressor.verification import cascade, verification
from compressor.verification import rows as report_rows
from compressor.verification.samples import Sample
from compressor.verification.verification import Verification
from tests.contract import test_conformance_oracles as oracles
from tests.contract import test_conformance_verdict as verdict


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
        ThreatModel, "steepest", lambda threat, gradient: original(threat, gradient) / 1_000
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


def nothing_is_outside(patch):
    fab_goes_too_far(patch)
    patch.setattr(ThreatModel, "contains", lambda _, x_adv_NCHW, x_NCHW: torch.tensor(True))  # noqa: FBT003


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


def gradient_of_not_a_number(patch):
    """Its sign is 0, so that attacks in linf stand still."""
    original = nn.Sequential.forward

    def forward(network, x_NCHW):
        return original(network, x_NCHW) + 0 * (x_NCHW - x_NCHW.detach()).abs().sqrt().sum()

    patch.setattr(nn.Sequential, "forward", forward)


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

        patch.setattr(report_rows, "count_standing", count_standing)

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

"""A report whose numbers were raised in one place is refused, whichever place that is."""

import math

import pytest
from pydantic import ValidationError

from compressor.attacks import stages
from compressor.proportions import Proportion
from compressor.reports.consistency import AUTOATTACK
from compressor.reports.report import (
    ArtefactFacts,
    Count,
    EightBitFacts,
    SelectionFacts,
    TrainingFacts,
)


def count(num_correct, num_total=10):
    return Count.of(Proportion(num_correct=num_correct, num_total=num_total))


def with_attack(report, place=0, **changes):
    rows = list(report.attacks)
    rows[place] = rows[place].model_copy(update=changes)
    return {"attacks": tuple(rows)}


def with_samples(report, **changes):
    return {"samples": report.samples.model_copy(update=changes)}


def with_cost(report, **changes):
    return {"cost": (report.cost[0].model_copy(update=changes),)}


def without(report, *names):
    """Under the same protocol."""
    rows = tuple(row for row in report.attacks if row.name not in names)
    return {"attacks": rows, "protocol": report.protocol}


def training(content_sha256):
    return TrainingFacts(
        recipe_id="a" * 64,
        recipe={},
        content_sha256=content_sha256,
        num_training=700,
        num_validation=10,
        validation_index_sha256="d" * 64,
        selection=SelectionFacts(
            epoch=1, candidate="network", attack="PGD", clean=count(9), robust=count(5)
        ),
        teachers=(),
        environment={},
    )


def takes(low, median, high):
    return {"latency_low_ms": low, "latency_ms": median, "latency_high_ms": high}


FLATTERED = {
    "standing": (lambda r: with_attack(r, standing=count(8)), "standing after pgd_sat is 8 of 10"),
    "standing n": (lambda r: with_attack(r, standing=count(5, 6)), "samples say 5 of 10"),
    "alone": (lambda r: with_attack(r, accuracy=count(6)), "accuracy under pgd_sat alone"),
    "alone n": (lambda r: with_attack(r, accuracy=count(5, 5)), "accuracy under pgd_sat alone"),
    "tried too few": (
        lambda r: with_attack(r, num_tried=7),
        "pgd_sat tried 7 images, where 8 stood before it and 8 are right without an attack",
    ),
    "tried some of those left": (
        lambda r: with_attack(r, 1, num_tried=4),
        "apgd_t tried 4 images, where 5 stood before it and 8 are right",
    ),
    "tried none": (lambda r: with_attack(r, 1, num_tried=0), "apgd_t tried 0 images"),
    "tried wrong ones": (lambda r: with_attack(r, 1, num_tried=9), "apgd_t tried 9 images"),
    "too few passes": (
        lambda r: with_attack(r, 1, num_forwards=4),
        "apgd_t tried 5 images in 4 forward passes",
    ),
    "backwards": (
        lambda r: with_attack(r, num_backwards=-1),
        "pgd_sat took -1 backward passes",
    ),
    "in no time": (lambda r: with_attack(r, duration_seconds=-0.5), "pgd_sat took -0.5 seconds"),
    "all in no time": (lambda _: {"duration_seconds": -1.0}, "the verification took -1 seconds"),
    "cascade": (lambda r: without(r, "fab_t"), "protocol is 'AutoAttack-style' without fab_t"),
    "compat": (
        lambda r: without(r, "apgd_ce", "square") | {"protocol": "AutoAttack (compat)"},
        r"'AutoAttack \(compat\)' without apgd_ce, square",
    ),
    "worst of fewer": (
        lambda _: {"protocol": "worst of pgd_sat"},
        "is 'worst of pgd_sat', the attacks are pgd_sat, apgd_t, square, apgd_ce, fab_t",
    ),
    "worst of more": (
        lambda r: without(r, "fab_t") | {"protocol": "worst of pgd_sat, apgd_t, square, fab_t"},
        "the attacks are pgd_sat, apgd_t, square, apgd_ce",
    ),
    "no attack": (lambda _: {"protocol": "no attack"}, "'no attack', the attacks are pgd_sat, a"),
    "no checks": (lambda _: {"validity": ()}, "without a validity check cannot be verified"),
    "no checks, incomplete": (
        lambda _: {"validity": (), "status": "incomplete"},
        "without a validity check cannot be incomplete",
    ),
    "trained on": (
        lambda r: {"training": training(r.data.content_sha256)},
        r"the test images are the training images \(both have SHA-256 eeeeeeeeeeee\)",
    ),
    "no bytes": (lambda r: with_cost(r, num_bytes=0), "student tiny has 0 bytes"),
    "parameters": (lambda r: with_cost(r, num_parameters=-1), "student tiny has -1 parameters"),
    "operations": (lambda r: with_cost(r, num_multiply_adds=0), "tiny has 0 multiply-adds"),
    "no latency": (
        lambda r: with_cost(r, **takes(0, 0, 0)),
        "student tiny takes 0 ms, between 0 and 0",
    ),
    "low latency": (
        lambda r: with_cost(r, **takes(-1, 1, 2)),
        "student tiny takes 1 ms, between -1 and 2",
    ),
    "median latency": (
        lambda r: with_cost(r, **takes(1.5, 1, 2)),
        "student tiny takes 1 ms, between 1.5 and 2",
    ),
    "high latency": (
        lambda r: with_cost(r, **takes(1, 2, 1.5)),
        "student tiny takes 2 ms, between 1 and 1.5",
    ),
    "two names": (lambda r: with_attack(r, 1, name="square"), "two attacks have one name"),
    "clean": (lambda r: with_attack(r, 1, name="clean"), "an attack is called clean"),
    "label": (lambda r: with_samples(r, label=(4,) * 10), "none of the 4 classes"),
    "answer": (lambda r: with_samples(r, prediction=(None,) * 10), "without a wrong answer"),
    "rounding": (
        lambda _: {"eight_bit": EightBitFacts(num_found=3, num_still_fooling=4)},
        "4 of 3 is not a proportion",
    ),
    "planned": (
        lambda r: {"status": "incomplete", "data": r.data.model_copy(update={"num_planned": 9})},
        "10 images are in samples, 9 were planned",
    ),
    "unverified": (lambda _: {"status": "unverified"}, "an unverified report has no worst case"),
    "not a number": (lambda _: {"epsilon_pixels": math.nan}, "finite number"),
}


@pytest.mark.parametrize("what", FLATTERED)
def test_contradiction_is_refused(what, make_report):
    change, message = FLATTERED[what]
    with pytest.raises(ValidationError, match=message):
        make_report(**change(make_report()))


def test_what_is_possible_is_not_refused(make_report):
    report = make_report()
    tries_all = with_attack(report, 1, num_tried=8)  # also what an attack before it broke
    make_report(**tries_all, training=training("c" * 64), duration_seconds=0)
    instant = {"num_forwards": 8, "num_backwards": 0, "duration_seconds": 0}
    make_report(**with_attack(report, **instant))
    unknown = {"num_parameters": None, "num_multiply_adds": None}
    make_report(**with_cost(report, **unknown, **takes(1, 1, 1)))
    make_report(protocol="AutoAttack (compat)")


def test_a_protocol_names_its_attacks_or_none(make_report):
    report = make_report()
    three = make_report(attacks=report.attacks[:3])
    assert three.protocol == "worst of pgd_sat, apgd_t, square"
    nothing = {"status": "unverified", "worst_case": None, "validity": (), "attacks": ()}
    assert make_report((None, "clean"), **nothing).protocol == "no attack"
    with pytest.raises(ValidationError, match="'worst of ', the attacks are none"):
        make_report((None, "clean"), **nothing, protocol="worst of ")


def test_attacks_of_the_protocol_are_those_that_run():
    assert AUTOATTACK == stages.AUTOATTACK
    for mode in ("fast", "compat"):
        assert stages.protocol_of(AUTOATTACK, mode).startswith("AutoAttack")
    assert stages.protocol_of(("fgsm", "square"), "fast") == "worst of fgsm, square"


def test_unknown_attack_is_refused(make_report):
    broken = (None,) * 5 + ("pgd_sat",) * 3 + ("clean", "magic")
    with pytest.raises(ValidationError, match="broken by magic, which is not among the attacks"):
        make_report(**with_samples(make_report(), broken_by=broken), clean=count(9))


@pytest.mark.parametrize("status", ["verified", "incomplete"])
def test_nothing_is_verified_without_a_white_box_attack(status, make_report):
    report = make_report((None, None, "clean"))
    rows = tuple(row for row in report.attacks if row.kind == "black-box")
    for attacks in (rows, ()):
        with pytest.raises(ValidationError, match="without a white-box attack cannot be"):
            make_report((None, None, "clean"), attacks=attacks, status=status)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_correct": 11}, "11 of 10 is not a proportion"),
        ({"num_correct": 0, "num_total": 0}, "0 of 0 is not a proportion"),
        ({"num_correct": -1}, "is not a proportion"),
        ({"low_95": 0.49}, "the 95 % interval of 50.00 % .* is 0.187086 to 0.812914"),
        ({"high_95": 1.0}, "the 95 % interval of"),
    ],
)
def test_count_is_possible_and_its_interval_exact(change, message):
    with pytest.raises(ValidationError, match=message):
        Count.model_validate(count(5).model_dump() | change)


@pytest.mark.parametrize("flatters", [True, False])
def test_a_report_whose_gradients_are_masked_shows_nothing(make_report, flatters):
    """Whether transfer alone would flatter takes nothing away."""
    facts = ArtefactFacts(
        attacked_through="twin",
        twin="",
        transfer=None,
        source=None,
        transfer_flatters=flatters,
        gradients_are_masked=False,
        masking="",
    )
    report = make_report(artefact=facts)
    masked = facts.model_copy(update={"gradients_are_masked": True})
    with pytest.raises(ValidationError, match="whose gradients are masked cannot be verified"):
        make_report(artefact=masked)
    assert report.status == "verified"

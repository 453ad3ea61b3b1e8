"""A report whose numbers were raised in one place is refused, whichever place that is."""

import math

import pytest
from pydantic import ValidationError

from compressor.proportions import Proportion
from compressor.reports.report import Count, EightBitFacts


def count(num_correct, num_total=10):
    return Count.of(Proportion(num_correct=num_correct, num_total=num_total))


def with_attack(report, place=0, **changes):
    rows = list(report.attacks)
    rows[place] = rows[place].model_copy(update=changes)
    return {"attacks": tuple(rows)}


def with_samples(report, **changes):
    return {"samples": report.samples.model_copy(update=changes)}


FLATTERED = {
    "standing": (lambda r: with_attack(r, standing=count(8)), "standing after pgd_sat is 8 of 10"),
    "standing n": (lambda r: with_attack(r, standing=count(5, 6)), "samples say 5 of 10"),
    "alone": (lambda r: with_attack(r, accuracy=count(6)), "accuracy under pgd_sat alone"),
    "alone n": (lambda r: with_attack(r, accuracy=count(5, 5)), "accuracy under pgd_sat alone"),
    "tried": (lambda r: with_attack(r, num_tried=2), "pgd_sat broke 3 of 2"),
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

"""Each verdict about a file, from answers that are written down image by image.

The first pixel of an image says which one it is, the second how it was attacked.
"""

import json
import math
from dataclasses import replace

import pytest
import torch

from compressor.paired_difference import PairedDrop
from compressor.threat import ThreatModel
from exporters.budget import Budget
from exporters.exported_model import verification_table
from exporters.held_out import HeldOut
from exporters.hops import LIMITS, prove_hop, signal_to_noise_db

NUM = 200
CLEAN, TRANSFERRED, BY_TWIN = 0.0, 0.5, 1.0
GENEROUS = Budget(max_clean_drop=1.0, max_robust_drop=1.0)


def images(kind):
    x_NCHW = torch.zeros(NUM, 1, 2, 2)
    x_NCHW[:, 0, 0, 0] = torch.arange(NUM) / NUM
    x_NCHW[:, 0, 0, 1] = kind
    return x_NCHW


class Answers:
    """Logits of a seeded classifier of 4 classes, and what is changed in them."""

    def __init__(self, *, margin=4.0):
        generator = torch.Generator().manual_seed(0)
        self.y_N = torch.arange(NUM) % 4
        logits = torch.randn(NUM, 4, generator=generator)
        logits[torch.arange(NUM), self.y_N] = logits.max(dim=1).values + margin
        self.tables = {kind: logits.clone() for kind in (CLEAN, TRANSFERRED, BY_TWIN)}

    def __call__(self, x_NCHW):
        places = (x_NCHW[:, 0, 0, 0] * NUM).round().long().tolist()
        kinds = x_NCHW[:, 0, 0, 1].tolist()
        return torch.stack([self.tables[k][n] for n, k in zip(places, kinds, strict=True)])

    def wrong(self, kind, places):
        """The same answers, but other labels than the true ones for these images."""
        changed = Answers()
        changed.tables = {k: table.clone() for k, table in self.tables.items()}
        for place in places:
            changed.tables[kind][place] = self.tables[kind][place].roll(1)
        return changed

    def moved(self, change):
        """The same, with every logit changed by a function."""
        changed = Answers()
        changed.tables = {k: change(table) for k, table in self.tables.items()}
        return changed


SOURCE = Answers()
CENTRED = SOURCE.tables[CLEAN] - SOURCE.tables[CLEAN].mean(dim=1, keepdim=True)
LARGEST = float(CENTRED.abs().max())


def held_out(source=SOURCE):
    clean, adversarial = images(CLEAN), images(TRANSFERRED)
    return HeldOut(
        x_NCHW=clean,
        x_adv_NCHW=adversarial,
        y_N=SOURCE.y_N,
        keys_N=torch.arange(NUM),
        threat=ThreatModel(epsilon_pixels=8 / 255),
        source=source,
        clean_NK=source(clean),
        adversarial_NK=source(adversarial),
    )


@pytest.fixture(autouse=True)
def twin_attack(monkeypatch):
    """What the attack through a twin finds."""
    monkeypatch.setattr("exporters.hops.attacked", lambda *_, **__: images(BY_TWIN))


def prove(file, *, variant="fp32", twin=None, source=SOURCE, **options):
    return prove_hop(file, held_out(source), variant=variant, twin=twin, **options)


def twin(x_NCHW):
    raise AssertionError("only the attack asks it")


def noise(scale):
    """Seeded, for every table the same."""
    generator = torch.Generator().manual_seed(1)
    error = torch.randn(NUM, 4, generator=generator)
    return lambda logits: logits + scale * error


# Verdicts


@pytest.mark.parametrize("variant", LIMITS)
def test_the_same_answers_are_verified(variant):
    shown = prove(SOURCE, variant=variant, twin=twin)
    assert shown.status == "verified"
    assert shown.clean_agreement.num_correct == shown.adversarial_agreement.num_correct == NUM
    assert (shown.num_clear_flips, shown.flipped_margin_fraction) == (0, 0)
    assert (shown.max_logit_difference, shown.sqnr_db) == (0, math.inf)
    assert shown.clean_drop.fraction == shown.robust_drop.fraction == 0
    assert shown.robust.num_correct == NUM


@pytest.mark.parametrize(("variant", "tolerance"), [("fp32", 1e-3), ("fp16", 2e-2)])
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_one_logit_may_move_as_far_as_the_format_rounds(variant, tolerance, share):
    def move(logits):
        moved = logits.clone()
        moved[7, 0] -= share * tolerance * LARGEST / (3 / 4)  # of which the mean takes a quarter
        return moved

    shown = prove(SOURCE.moved(move), variant=variant, twin=twin)
    assert shown.tolerance == pytest.approx(tolerance * LARGEST)
    assert shown.status == ("verified" if share < 1 else "failed")
    if share > 1:
        assert shown.reason.startswith("largest logit difference ")
        assert f"tolerance {shown.tolerance:.2e}" in shown.reason


def test_small_logits_have_the_tolerance_of_one():
    small = SOURCE.moved(lambda logits: logits / 100)
    assert prove(small, source=small).tolerance == pytest.approx(1e-3)


@pytest.mark.parametrize("variant", LIMITS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_fails(variant, value):
    def spoil(logits):
        spoilt = logits.clone()
        spoilt[3, 2] = value
        return spoilt

    shown = prove(SOURCE.moved(spoil), variant=variant, twin=twin, budget=GENEROUS)
    assert shown.status == "failed"


@pytest.mark.parametrize(
    ("variant", "decibels"), [("fp32", 60), ("fp16", 40), ("int8", 10), ("int8-qat", 3)]
)
def test_noise_may_be_as_loud_as_the_format_makes_it(variant, decibels):
    power = float(SOURCE.tables[CLEAN].square().mean())
    for extra, status in ((1.0, "verified"), (-1.0, "failed")):
        scale = math.sqrt(power / 10 ** ((decibels + extra) / 10))
        limits = replace(LIMITS[variant], relative_tolerance=math.inf, min_agreement=0.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("exporters.hops.LIMITS", {variant: limits})
            shown = prove(SOURCE.moved(noise(scale)), variant=variant, twin=twin, budget=GENEROUS)
        assert shown.sqnr_db == pytest.approx(decibels + extra, abs=0.5)
        assert shown.status == status
        if status == "failed":
            assert f"at least {decibels:g} dB are expected" in shown.reason


def test_a_constant_on_all_classes_hides_no_error():
    """It changes no answer, and would stretch every tolerance that is a share of the logits."""
    lifted = SOURCE.moved(lambda table: table + 1e4)
    wrong = lifted.moved(lambda _: SOURCE.tables[CLEAN] + 1e4 + torch.tensor([1.0, -1, 0, 0]))
    same = prove_hop(lifted, held_out(), variant="fp16", twin=lifted, budget=GENEROUS)
    assert (same.status, same.tolerance < 1) == ("verified", True)
    shown = prove_hop(wrong, held_out(lifted), variant="fp16", twin=wrong, budget=GENEROUS)
    assert shown.status == "failed"
    assert shown.max_logit_difference == pytest.approx(1, abs=0.01)
    assert shown.sqnr_db < 40


@pytest.mark.parametrize(
    ("variant", "num_allowed"), [("fp32", 2), ("fp16", 6), ("int8", 20), ("int8-qat", 50)]
)
def test_labels_may_differ_as_often_as_the_format_makes_them(variant, num_allowed):
    for num, status in ((num_allowed, "verified"), (num_allowed + 1, "failed")):
        file = SOURCE.wrong(CLEAN, range(num))
        limits = replace(LIMITS[variant], relative_tolerance=math.inf, min_sqnr_db=0.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("exporters.hops.LIMITS", {variant: limits})
            shown = prove(file, variant=variant, twin=twin, budget=GENEROUS)
        assert (shown.status, shown.clean_agreement.num_correct) == (status, NUM - num)
        if status == "failed":
            assert f"same label on only {shown.clean_agreement} clean images" in shown.reason


def test_labels_that_flip_against_the_odds_are_counted_and_weighed():
    """A clear flip is one that rounding cannot explain."""
    file = SOURCE.wrong(CLEAN, [1, 2]).wrong(TRANSFERRED, [5])
    shown = prove(file)
    assert shown.num_clear_flips == 3
    assert "3 labels differ beyond rounding" in shown.reason
    top_2 = SOURCE.tables[CLEAN].topk(2, dim=1).values
    margin_N = top_2[:, 0] - top_2[:, 1]
    expected = margin_N[[1, 2, 5]].sum() / (2 * margin_N.sum())
    assert shown.flipped_margin_fraction == pytest.approx(float(expected), rel=1e-5)


def test_a_tie_that_rounding_breaks_is_no_clear_flip():
    tied = Answers()
    for table in tied.tables.values():
        table[4] = torch.tensor([2.0, 2.0 - 1e-4, 0, 0])

    def tip(logits):
        tipped = logits.clone()
        tipped[4, 1] += 2e-4
        return tipped

    shown = prove(tied.moved(tip), source=tied)
    assert (shown.status, shown.num_clear_flips) == ("verified", 0)
    assert shown.clean_agreement.num_correct == NUM - 1


def test_what_else_is_wrong_fails_whatever_it_answers():
    shown = prove(SOURCE, variant="int8", twin=twin, complaints=["its scales are odd"])
    assert (shown.status, shown.reason) == ("failed", "its scales are odd")


# Accuracies


@pytest.mark.parametrize(("num", "status"), [(4, "verified"), (5, "too_lossy")])
def test_clean_accuracy_may_fall_by_the_budget(num, status):
    file = SOURCE.wrong(CLEAN, range(num))
    budget = Budget(max_clean_drop=0.02, max_robust_drop=1.0)
    shown = prove(file, variant="int8", twin=twin, budget=budget)
    assert shown.status == status
    assert shown.clean_drop == PairedDrop(num_newly_broken=num, num_newly_fixed=0, num_total=NUM)
    if status == "too_lossy":
        assert shown.reason == f"clean accuracy falls by {shown.clean_drop}, allowed are 2 points"


@pytest.mark.parametrize("kind", [CLEAN, TRANSFERRED, BY_TWIN])
@pytest.mark.parametrize(("num", "status"), [(2, "verified"), (3, "too_lossy")])
def test_accuracy_under_attack_may_fall_by_the_budget(kind, num, status):
    """An image counts if the file is right on it clean, and on both that were made from it."""
    file = SOURCE.wrong(kind, range(num))
    shown = prove(file, variant="int8", twin=twin)
    assert shown.status == status
    assert shown.robust.num_correct == NUM - num
    assert shown.robust_drop.num_newly_broken == num
    if status == "too_lossy":
        words = f"accuracy under attack falls by {shown.robust_drop}, allowed are 1 points"
        assert words in shown.reason


def test_the_worst_of_all_images_counts_once():
    file = SOURCE.wrong(CLEAN, [1, 2]).wrong(TRANSFERRED, [2, 3]).wrong(BY_TWIN, [3, 4])
    shown = prove(file, variant="int8", twin=twin, budget=GENEROUS)
    assert shown.robust.num_correct == NUM - 4


def test_the_source_is_judged_on_the_same_images():
    """What fools both through the twin is no loss of the file, and what it stands is none."""
    source = SOURCE.wrong(BY_TWIN, range(10))
    shown = prove(source, source=source, variant="int8", twin=twin)
    assert (shown.robust.num_correct, shown.robust_drop.fraction) == (NUM - 10, 0)
    better = prove(SOURCE, source=source, variant="int8", twin=twin)
    assert better.robust_drop == PairedDrop(num_newly_broken=0, num_newly_fixed=10, num_total=NUM)


def test_a_file_that_rounds_nothing_is_not_attacked_anew():
    shown = prove(SOURCE.wrong(BY_TWIN, range(100)), variant="fp32", twin=twin)
    assert (shown.status, shown.robust.num_correct) == ("verified", NUM)


@pytest.mark.parametrize("variant", ["fp16", "int8", "int8-mixed", "int8-qat"])
def test_a_lossy_file_that_cannot_be_attacked_is_unverified(variant):
    shown = prove(SOURCE, variant=variant, twin=None)
    assert shown.status == "unverified"
    assert shown.reason == "it has no differentiable twin, so it was not attacked itself"


def test_failing_is_worse_than_losing_and_losing_than_not_knowing():
    lossy = SOURCE.wrong(TRANSFERRED, range(10))
    assert prove(lossy, variant="int8", twin=None).status == "too_lossy"
    assert prove(lossy, variant="int8", twin=None, complaints=["odd"]).status == "failed"


@pytest.mark.parametrize(
    ("signal", "noisy", "expected"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], math.inf),
        ([[3.0, 4.0]], [[3.0, 4.5]], 20.0),
        ([[1.0, 0.0]], [[2.0, 0.0]], 0.0),
        ([[1.0, 0.0]], [[math.nan, 0.0]], -math.inf),
        ([[1.0, 0.0]], [[math.inf, 0.0]], -math.inf),
    ],
)
def test_signal_to_noise(signal, noisy, expected):
    assert signal_to_noise_db(torch.tensor(signal), torch.tensor(noisy)) == pytest.approx(expected)


@pytest.mark.parametrize("variant", LIMITS)
def test_what_is_shown_is_plain_json(variant):
    table = verification_table(prove(SOURCE, variant=variant, twin=twin))
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert table["robust_drop"].keys() >= {"fraction", "low_95", "high_95", "num_total"}

"""Passes through the model are counted, and as many as they should be.

The released AutoAttack asks 7,852 times for logits and 1,910 times for a gradient about an image
of ten classes that it cannot break. N images, K classes.
"""

import pytest
import torch

from compressor.attacks.search import by_logits
from compressor.attacks.stages import AUTOATTACK, build_stages
from compressor.threat import ThreatModel
from compressor.verification.cascade import Subject
from tests.contract.test_conformance_oracles import both_modes, evaluate, split_of, stages_of

EPSILON_PIXELS = {"linf": 8 / 255, "l2": 0.5}
COMPAT_PASSES = {
    "apgd_ce": (102, 101),
    "apgd_dlr": (102, 101),
    "apgd_t": (919, 909),
    "fab_t": (1_828, 900),
    "square": (5_003, 0),
}
"""Forwards and backwards of the released code, about an image of ten classes that stands."""
FAST_PASSES = {
    "apgd_ce": (101, 101),
    "apgd_dlr": (101, 101),
    "apgd_t": (910, 909),  # the classes are ranked once, and nothing is asked twice
    "fab_t": (1_801, 900),
    "square": (5_001, 0),
}
PASSES = {"fast": FAST_PASSES, "compat": COMPAT_PASSES}


class Counting:
    """A model of ten classes that counts images on their way in, and gradients on their way back.

    Class 0 leads by `lead`. Of the others some rise wherever one goes from grey: their slopes are
    pairs of opposites.
    """

    def __init__(self, lead):
        generator = torch.Generator().manual_seed(0)
        slope_5D = torch.randn(5, 192, generator=generator) / 192
        self._weight_KD = torch.cat([0 * slope_5D[:1], slope_5D, -slope_5D[:4]])
        self._lead_K = torch.tensor([lead] + 9 * [0.0])
        self.num_forwards = self.num_backwards = 0

    def __call__(self, x_NCHW):
        self.num_forwards += len(x_NCHW)
        logits_NK = (x_NCHW - 0.5).flatten(1) @ self._weight_KD.T + self._lead_K
        if logits_NK.requires_grad:
            logits_NK.register_hook(self._count)
        return logits_NK

    def _count(self, gradient_NK):
        self.num_backwards += len(gradient_NK)


def stage_of(name, mode, *, norm="linf", epsilon_pixels=None):
    threat = ThreatModel(norm=norm, epsilon_pixels=epsilon_pixels or EPSILON_PIXELS[norm])
    (stage,) = build_stages([name], threat=threat, mode=mode, batch_size=250)
    return stage


def search(stage, model, x_NCHW):
    y_N = torch.zeros(len(x_NCHW), dtype=torch.int64)
    draws = stage.draws(x_NCHW, keys_N=torch.arange(len(x_NCHW)), seed=0)
    return stage.search.search(model, x_NCHW, y_N, draws=draws, judge=by_logits)


def grey_images(num_images):
    generator = torch.Generator().manual_seed(1)
    return 0.4 + 0.2 * torch.rand(num_images, 3, 8, 8, generator=generator)


def check_passes(name, mode, *, norm="linf", num_images=2):
    """An image that stands costs exactly so much, by the attack's account and by the model's."""
    num_forwards, num_backwards = PASSES[mode][name]
    model = Counting(lead=100.0)
    found = search(stage_of(name, mode, norm=norm), model, grey_images(num_images))
    assert found.num_forwards_N.tolist() == [num_forwards] * num_images
    assert found.num_backwards_N.tolist() == [num_backwards] * num_images
    assert model.num_forwards == num_images * num_forwards
    assert model.num_backwards == num_images * num_backwards
    assert not found.is_fooled_N.any()


def test_passes_of_standard_autoattack_are_those_of_the_released_code():
    forwards, backwards = zip(*(COMPAT_PASSES[name] for name in AUTOATTACK), strict=True)
    assert (sum(forwards), sum(backwards)) == (7_852, 1_910)


def test_fast_attacks_never_save_a_step():
    """They save only passes whose answer is known: the same gradients, and all the queries."""
    for name in COMPAT_PASSES:
        assert FAST_PASSES[name][1] == COMPAT_PASSES[name][1]
    forwards = [FAST_PASSES[name][0] for name in AUTOATTACK]
    assert sum(forwards) == 7_813


@both_modes
@pytest.mark.parametrize("name", COMPAT_PASSES)
def test_passes_for_an_image_that_stands(name, mode):
    check_passes(name, mode)


@pytest.mark.parametrize("name", ["apgd_ce", "apgd_t", "fab_t"])
def test_passes_are_the_same_in_l2_and_for_one_image(name):
    check_passes(name, "compat", norm="l2", num_images=1)


@both_modes
@pytest.mark.parametrize("name", COMPAT_PASSES)
def test_stage_tells_how_long_an_image_that_stands_takes(name, mode):
    stage = stage_of(name, mode)
    passes = (stage.max_forwards, stage.max_backwards)
    assert passes == pytest.approx(PASSES[mode][name], rel=0.02)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("apgd_ce", (102, 101)),
        ("apgd_t", (1 + 102, 101)),  # further targets are not tried
        ("fab_t", (1 + 203, 100)),
        ("square", (3, 0)),
    ],
)
def test_released_attacks_finish_with_an_image_that_is_fooled_at_once(name, passes):
    model = Counting(lead=1e-4)
    found = search(stage_of(name, "compat", epsilon_pixels=0.2), model, grey_image())
    assert found.is_fooled_N.tolist() == [True]
    assert (int(found.num_forwards_N), int(found.num_backwards_N)) == passes
    assert (model.num_forwards, model.num_backwards) == passes


@pytest.mark.parametrize(
    ("name", "passes"),
    [("apgd_ce", (1, 1)), ("apgd_t", (2, 1)), ("fab_t", (3, 1)), ("square", (1, 0))],
)
def test_fast_attacks_leave_an_image_that_is_fooled_at_once(name, passes):
    model = Counting(lead=1e-4)
    found = search(stage_of(name, "fast", epsilon_pixels=0.2), model, grey_image())
    assert found.is_fooled_N.tolist() == [True]
    assert (int(found.num_forwards_N), int(found.num_backwards_N)) == passes
    assert (model.num_forwards, model.num_backwards) == passes


def grey_image():
    """Class 0 leads a little."""
    return torch.full((1, 3, 8, 8), 0.5)


@both_modes
@pytest.mark.parametrize("name", COMPAT_PASSES)
def test_no_image_is_no_work(name, mode):
    found = search(stage_of(name, mode), Counting(lead=1.0), grey_images(2)[:0])
    assert found.x_adv_NCHW.shape == (0, 3, 8, 8)
    assert found.is_fooled_N.shape == found.num_forwards_N.shape == (0,)


def evaluation_of(model, *, labels, mode, epsilon_pixels=0.2):
    levels_NCHW = torch.full((len(labels), 3, 8, 8), 128, dtype=torch.uint8)
    levels_NCHW += torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None]
    stages = stages_of(AUTOATTACK, threat=ThreatModel(epsilon_pixels=epsilon_pixels), mode=mode)
    subject = Subject(answer=model, float32=model, search_dtype=model)
    return evaluate(subject, split_of(levels_NCHW, torch.tensor(labels)), stages, batch_size=3)


@both_modes
def test_images_that_are_wrong_without_an_attack_are_asked_about_once(mode):
    model = Counting(lead=100.0)
    found = evaluation_of(model, labels=[1, 2, 3, 4], mode=mode)
    assert {sample.broken_by for sample in found.samples} == {"clean"}
    assert [len(outcome.found) for outcome in found.outcomes] == [3, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert model.num_forwards == 4


@both_modes
def test_images_that_the_first_attack_breaks_are_not_tried_again(mode):
    found = evaluation_of(Counting(lead=0.01), labels=[0, 0, 0, 0], mode=mode)
    assert {sample.broken_by for sample in found.samples} == {"apgd_ce"}
    assert [len(outcome.found) for outcome in found.outcomes] == [3, 3, 0, 0, 0, 1, 1, 0, 0, 0]


@both_modes
def test_one_image_that_stands_goes_through_every_attack(mode):
    model = Counting(lead=100.0)
    found = evaluation_of(model, labels=[0], mode=mode)
    (sample,) = found.samples
    assert sample.fooled_by == {"clean": False, **dict.fromkeys(AUTOATTACK, False)}
    assert sample.num_backwards == sum(PASSES[mode][name][1] for name in AUTOATTACK)
    num_judged = 1 + len(AUTOATTACK)
    queries_left_out = 5_000 - 100
    expected = sum(PASSES[mode][name][0] for name in AUTOATTACK) + num_judged - queries_left_out
    assert sample.num_forwards == expected

"""Every attack of both cascades takes images of any size and models of any number of classes.

N images, C channels, H and W pixels, K classes.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from compressor.attacks.compat import ReleasedSearch, ReleasedTargets
from compressor.attacks.fixed import FixedAttack
from compressor.attacks.search import by_logits
from compressor.attacks.square import Square
from compressor.attacks.stages import PAPER_ATTACKS, build_stages
from compressor.attacks.targeted import Targeted
from compressor.threat import ThreatModel

EPSILON_PIXELS = {"linf": 8 / 255, "l2": 0.5}
SHAPES = [(1 + 2 * (side % 2), side, side) for side in range(4, 41)]
SHAPES += [(1, 4, 4), (3, 12, 12), (3, 14, 14), (1, 19, 19), (3, 24, 24), (3, 96, 96)]
SHAPES += [(3, 4, 96), (3, 96, 4), (1, 5, 9), (3, 9, 5), (1, 12, 31), (3, 31, 12), (2, 24, 14)]
NUMS_CLASSES = [2, 3, 4, 5, 9, 10, 100]

both_norms = pytest.mark.parametrize("norm", EPSILON_PIXELS)
SEARCHES = ("apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square")
every_stage = pytest.mark.parametrize(
    ("name", "mode"),
    [*product((*PAPER_ATTACKS, *SEARCHES), ["fast"]), *product(SEARCHES, ["compat"])],
)


def build(name, mode, norm, *, num_targets=2):
    """The stage with two steps instead of a hundred."""
    threat = ThreatModel(norm=norm, epsilon_pixels=EPSILON_PIXELS[norm])
    (stage,) = build_stages([name], threat=threat, mode=mode, batch_size=8)
    return replace(stage, search=_shorter(stage.search, num_targets))


def _shorter(search, num_targets):
    if isinstance(search, Targeted | ReleasedTargets):
        attack = _shorter(search.attack, num_targets)
        return replace(search, attack=attack, num_targets=num_targets)
    if isinstance(search, ReleasedSearch | FixedAttack):
        return replace(search, attack=_shorter(search.attack, num_targets))
    if isinstance(search, Square):
        return replace(search, num_queries=4)
    return replace(search, num_steps=2)


def curved_model(image_shape, num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    num_pixels = torch.Size(image_shape).numel()
    first = torch.randn(num_pixels, 16, generator=generator) / num_pixels**0.5
    second = torch.randn(16, num_classes, generator=generator)
    return lambda x_NCHW: torch.tanh((x_NCHW.flatten(1) - 0.5) @ first) @ second


def check_search(stage, image_shape, num_classes):
    """It stays inside, says the truth about what it found, and leaves the images alone."""
    generator = torch.Generator().manual_seed(7)
    x_NCHW = torch.rand(3, *image_shape, generator=generator)
    x_NCHW[1] = x_NCHW[1].round()  # black and white, where the clip to [0, 1] holds too
    before, model = x_NCHW.clone(), curved_model(image_shape, num_classes)
    y_N = model(x_NCHW).argmax(dim=1)
    draws = stage.draws(x_NCHW, keys_N=torch.arange(3), seed=1)
    found = stage.search.search(model, x_NCHW, y_N, draws=draws, judge=by_logits)
    assert torch.equal(x_NCHW, before)
    assert found.x_adv_NCHW.shape == x_NCHW.shape
    assert found.x_adv_NCHW.dtype == x_NCHW.dtype
    assert stage.search.threat.contains(found.x_adv_NCHW, x_NCHW).all(), image_shape
    is_wrong_N = model(found.x_adv_NCHW).argmax(dim=1) != y_N
    assert torch.equal(found.is_fooled_N, is_wrong_N), image_shape
    assert (found.num_forwards_N > 0).all()
    assert found.num_forwards_N.dtype == found.num_backwards_N.dtype == torch.int64


@both_norms
@every_stage
def test_attack_takes_images_of_any_size(name, mode, norm):
    stage = build(name, mode, norm)
    for image_shape in SHAPES:
        check_search(stage, image_shape, 5)


@both_norms
@every_stage
def test_attack_takes_models_of_any_number_of_classes(name, mode, norm):
    stage = build(name, mode, norm, num_targets=9)
    for num_classes in NUMS_CLASSES:
        check_search(stage, (3, 8, 8), num_classes)

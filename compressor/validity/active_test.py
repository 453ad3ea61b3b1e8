"""The active test: does the attack find, on this very model, what is known to be there?

N images, M of them with a planted one, P points around each, C channels, H and W pixels,
D features.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.attacks.draws import Draws, KeyedDraws
from compressor.attacks.protocol import Model
from compressor.attacks.search import Search, by_logits
from compressor.randomness import child_keys
from compressor.reports.report import ValidityRow
from compressor.threat import ThreatModel
from compressor.validity.check import SIGNIFICANCE, Check, binomial_tail
from compressor.validity.origins import Origins, border_points, distinct, inner_points

NUM_IMAGES = 32
NUM_COMMON = 200
"""Points around each image that belong to class 0, half of them on the border."""
NUM_CANDIDATES = 32
"""Points on the border, of which the one that stands out most is planted."""
CLOSENESS = 0.9
"""Where the hyperplane cuts the way from the outermost common point (0) to the planted one (1)."""
SHRINKAGE = 0.8
"""Share of a multiple of the identity in the covariance. With less, hyperplanes lie along features
that hardly ever move, where no gradient leads."""
MIN_GAP = 0.5
"""Standard deviations by which a planted point must be beyond the outermost common point."""
MIN_FOUND = 0.95
MAX_RANDOM = 0.5

ACTIVE_TEST = Check(
    name="active_test",
    threshold=f"alarm if fewer than {100 * MIN_FOUND:g} % are found: exact test, "
    f"p < {100 * SIGNIFICANCE:g} %; says nothing if random search finds {100 * MAX_RANDOM:g} %",
    advice="In this very model, images were given an adversarial image inside the ball, and the "
    "attack missed some, so what it did not break says nothing. Look for hidden gradients, too "
    "small a step, too few steps, or an attack that loses what it found.",
)


_Points = Callable[[Tensor, ThreatModel, Draws], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedModel:
    """Two classes, and an adversarial image for each of M images: [N, C, H, W] -> logits [N, 2].

    Class 0 is what is common around the image; class 1 begins beyond a hyperplane in the features.
    """

    features: Model
    origins: Origins
    weight_MD: Tensor
    bias_M: Tensor
    """Each image has its own hyperplane."""

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Logits: the score, halved, with both signs."""
        places_N = self.origins.of(x_NCHW)
        score_N = (self.features(x_NCHW) * self.weight_MD[places_N]).sum(dim=1)
        score_N = score_N + self.bias_M[places_N]
        return torch.stack([-score_N / 2, score_N / 2], dim=1)


def active_test(
    features: Model,
    x_NCHW: Tensor,
    *,
    keys_N: Tensor,
    threat: ThreatModel,
    attack: Search,
    num_queries: int,
) -> ValidityRow:
    """Plant an adversarial image in each ball and let the attack look for them.

    Source: Zimmermann, Brendel, Tramer and Carlini, "Increasing confidence in adversarial
    robustness evaluations", NeurIPS 2022 (the binarisation test). Differs in that the hyperplane
    is a linear discriminant with a shrunken covariance, in closed form, instead of a trained
    logistic regression; that class 0 has points on the border, too, or in small images random
    search finds what is planted; that all images are attacked at once; and that the verdict is an
    exact binomial test.

    Args:
        features: images -> what the last linear layer is given [N, D], differentiable.
        x_NCHW: clean images; the first that are far enough apart are used.
        keys_N: one key per image.
        threat: that of the evaluation.
        attack: what is tested, as it was run.
        num_queries: of the random search that the attack is compared with.
    """
    far_apart = distinct(x_NCHW, threat)[:NUM_IMAGES]
    x, keys = x_NCHW[far_apart], keys_N[far_apart]
    planted, places_M = plant(features, x, keys_N=child_keys(keys, 1), threat=threat)
    if not len(places_M):
        return ACTIVE_TEST.not_run(f"no hyperplane sets a point apart, of {len(x)} images")
    x, keys = x[places_M], keys[places_M]
    draws = KeyedDraws(keys_N=child_keys(keys, 2))
    found = attack.search(
        planted, x, torch.zeros_like(places_M), draws=draws, judge=by_logits
    ).x_adv_NCHW
    is_found_M = _is_beyond(planted, found) & threat.contains(found, x)
    is_met_M = torch.zeros_like(is_found_M)
    draws = KeyedDraws(keys_N=child_keys(keys, 3))
    for _ in range(num_queries):
        is_met_M |= _is_beyond(planted, border_points(x, threat, draws))
    return _verdict(int(is_found_M.sum()), int(is_met_M.sum()), len(x), num_queries)


def _verdict(num_found: int, num_chance: int, num_planted: int, num_queries: int) -> ValidityRow:
    num_missed = num_planted - num_found
    p_value = binomial_tail(num_missed, num_total=num_planted, probability=1 - MIN_FOUND)
    found = (
        f"the attack found {num_found} of {num_planted} planted adversarial images, random search "
        f"with {num_queries} queries {num_chance}"
    )
    if p_value >= SIGNIFICANCE and num_chance > MAX_RANDOM * num_planted:
        return ACTIVE_TEST.not_run(f"too easy to say anything: {found}")
    return ACTIVE_TEST.judged(found, is_alarm=p_value < SIGNIFICANCE, p_value=p_value)


@torch.no_grad()
def _is_beyond(planted: PlantedModel, x_NCHW: Tensor) -> Tensor:
    return planted(x_NCHW).argmax(dim=1) == 1


def penultimate_features(network: nn.Module, x_NCHW: Tensor) -> Model | None:
    """Images -> what the last linear layer is given [N, D]; None if `network` ends otherwise.

    Args:
        network: in evaluation mode; it is copied.
        x_NCHW: some images that it takes.
    """
    network = copy.deepcopy(network).requires_grad_(False)  # noqa: FBT003 (torch's signature)
    called: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: called.append((name, output))

    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers]
    with torch.no_grad():
        logits_NK = network(x_NCHW[:1])
    for hook in hooks:
        hook.remove()
    names = [name for name, _ in called]
    is_at_the_end = bool(called) and called[-1][1] is logits_NK and names.count(names[-1]) == 1
    if not is_at_the_end or logits_NK.dim() != 2 or not names[-1]:
        return None
    network.set_submodule(names[-1], nn.Identity())
    return network


@torch.no_grad()
def plant(
    features: Model, x_NCHW: Tensor, *, keys_N: Tensor, threat: ThreatModel
) -> tuple[PlantedModel, Tensor]:
    """The planted model, and the places of the M images for which it worked, int64 [M].

    Class 0 has the image, points inside the ball and points on its border.
    """
    draws = KeyedDraws(keys_N=keys_N)

    def features_around(points: _Points, num_points: int) -> list[Tensor]:
        return [features(points(x_NCHW, threat, draws)) for _ in range(num_points)]

    inner = features_around(inner_points, NUM_COMMON // 2)
    border = features_around(border_points, NUM_COMMON // 2)
    common_NPD = torch.stack([features(x_NCHW), *inner, *border], dim=1)
    candidate_NPD = torch.stack(features_around(border_points, NUM_CANDIDATES), dim=1)
    weight_ND, bias_N, is_apart_N = _hyperplanes(common_NPD.double(), candidate_NPD.double())
    places_M = is_apart_N.nonzero()[:, 0]
    planted = PlantedModel(
        features=features,
        origins=Origins(x_NCHW[places_M], threat),
        weight_MD=weight_ND[places_M].to(common_NPD.dtype),
        bias_M=bias_N[places_M].to(common_NPD.dtype),
    )
    return planted, places_M


def _hyperplanes(common_NPD: Tensor, candidate_NPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normals [N, D] and offsets [N] with all common points below 0 and one candidate above.

    In units of the common points' standard deviation along the normal. The third value says
    whether the candidate is far enough beyond the outermost common point.
    """
    mean_N1D = common_NPD.mean(dim=1, keepdim=True)
    common_NPD, candidate_NPD = common_NPD - mean_N1D, candidate_NPD - mean_N1D
    covariance_NDD = common_NPD.mT @ common_NPD / common_NPD.shape[1]
    variance_N = covariance_NDD.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-30)
    sphere_NDD = variance_N[:, None, None] * torch.eye(common_NPD.shape[2]).to(common_NPD)
    normal_NDP = torch.linalg.solve(
        torch.lerp(covariance_NDD, sphere_NDD, SHRINKAGE), candidate_NPD.mT
    )
    normal_NDP = normal_NDP / (common_NPD @ normal_NDP).std(dim=1, keepdim=True).clamp(min=1e-30)
    outermost_NP = (common_NPD @ normal_NDP).amax(dim=1)
    gap_NP = (candidate_NPD * normal_NDP.mT).sum(dim=2) - outermost_NP
    gap_N, best_N = gap_NP.max(dim=1)
    rows_N = torch.arange(len(gap_N), device=gap_N.device)
    normal_ND = normal_NDP[rows_N, :, best_N]
    edge_N = outermost_NP[rows_N, best_N] + CLOSENESS * gap_N
    return normal_ND, -edge_N - (normal_ND * mean_N1D[:, 0]).sum(dim=1), gap_N > MIN_GAP

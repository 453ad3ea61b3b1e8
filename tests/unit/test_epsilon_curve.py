"""The curve of accuracy over radii: near a truth that is known, and never rising."""

import pytest
import torch

from compressor.data import Batch
from compressor.randomness import sample_keys
from compressor.threat import ThreatModel
from compressor.verification.cascade import Subject
from compressor.verification.epsilon_curve import RADII_OVER_EPSILON, accuracy_curve
from compressor.verification.samples import Sample

EPSILON = 0.02
NUM_IMAGES, NUM_CLASSES = 40, 4


@pytest.fixture(scope="module")
def linear():
    """A linear model, images away from black and white, and each image's true distances."""
    generator = torch.Generator().manual_seed(0)
    weight_DK = torch.randn(48, NUM_CLASSES, generator=generator) / 4
    x_NCHW = torch.rand(NUM_IMAGES, 3, 4, 4, generator=generator) * 0.5 + 0.25
    bias_K = -(x_NCHW.flatten(1) @ weight_DK).mean(dim=0)

    def answer(images_NCHW):
        return images_NCHW.flatten(1) @ weight_DK + bias_K

    logits_NK = answer(x_NCHW)
    y_N = logits_NK.argmax(dim=1)
    y_N[::8] = (y_N[::8] + 1) % NUM_CLASSES  # some are answered wrongly
    lead_NK = logits_NK.gather(1, y_N[:, None]) - logits_NK
    slope_NKD = weight_DK.T[y_N][:, None, :] - weight_DK.T[None]
    distances = {}
    for norm, dual in (("linf", 1), ("l2", 2)):
        ratio_NK = lead_NK / slope_NKD.norm(p=dual, dim=2)
        ratio_NK.scatter_(1, y_N[:, None], torch.inf)
        distances[norm] = ratio_NK.amin(dim=1)
    index_N = torch.arange(NUM_IMAGES)
    batch = Batch(x_NCHW=x_NCHW, y_N=y_N, index_N=index_N, keys_N=sample_keys(index_N, seed=0))
    return answer, batch, distances


def found_by_the_cascade(batch, distance_N, *, epsilon):
    samples = []
    for label, distance in zip(batch.y_N.tolist(), distance_N.tolist(), strict=True):
        broken_by = "apgd_t" if distance <= epsilon else None
        broken_by = "clean" if distance <= 0 else broken_by
        samples.append(Sample(index=len(samples), label=label, broken_by=broken_by))
    return samples


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", EPSILON), ("l2", 0.1)])
def test_curve_of_a_linear_model_is_the_truth(linear, norm, epsilon):
    """Or a little above, as its one attack does not try every class; never below."""
    answer, batch, distances = linear
    subject = Subject(answer=answer, float32=answer, search_dtype=answer)
    samples = found_by_the_cascade(batch, distances[norm], epsilon=epsilon)
    threat = ThreatModel(norm=norm, epsilon_pixels=epsilon)
    points = accuracy_curve(subject, batch, samples, threat=threat)
    radii = [point.epsilon_pixels for point in points]
    assert radii == pytest.approx([ratio * epsilon for ratio in RADII_OVER_EPSILON])
    true = [int((distances[norm] > radius).sum()) for radius in radii]
    excess = [p.accuracy.num_correct - num for p, num in zip(points, true, strict=True)]
    assert min(excess) == 0
    assert max(excess) <= 1
    assert excess[0] == excess[RADII_OVER_EPSILON.index(1.0)] == 0
    assert len(set(true)) > 4
    assert {point.accuracy.num_total for point in points} == {NUM_IMAGES}


def test_curve_keeps_what_the_cascade_found(linear):
    """Attacks stronger than the curve's own broke more, at epsilon and so beyond it."""
    answer, batch, _ = linear
    deaf = Subject(answer=answer, float32=answer, search_dtype=lambda x: 0 * answer(x))
    by_eighth = ("clean", "square", "square", *(None,) * 5)
    samples = [Sample(index=n, label=0, broken_by=by_eighth[n % 8]) for n in range(NUM_IMAGES)]
    points = accuracy_curve(deaf, batch, samples, threat=ThreatModel(epsilon_pixels=1e-9))
    at_epsilon = RADII_OVER_EPSILON.index(1.0)
    counts = [point.accuracy.num_correct for point in points]
    assert counts[0] == NUM_IMAGES - 5
    assert counts[at_epsilon - 1] == NUM_IMAGES - 5
    assert counts[at_epsilon:] == [NUM_IMAGES - 15] * 4


def test_curve_never_rises_whatever_the_attack_finds(linear):
    """A cascade that found nothing, though the curve's attack does at smaller radii."""
    answer, batch, distances = linear
    subject = Subject(answer=answer, float32=answer, search_dtype=answer)
    blind = [
        Sample(index=n, label=0, broken_by="clean" if distance <= 0 else None)
        for n, distance in enumerate(distances["linf"].tolist())
    ]
    points = accuracy_curve(subject, batch, blind, threat=ThreatModel(epsilon_pixels=EPSILON))
    counts = [point.accuracy.num_correct for point in points]
    assert counts == sorted(counts, reverse=True)
    assert counts[RADII_OVER_EPSILON.index(1.0)] < counts[0]


def test_the_answer_decides_on_the_curve_too(linear):
    """A search in few bits that sees every image fooled breaks none by saying so."""
    _, batch, _ = linear
    right = torch.nn.functional.one_hot(batch.y_N, NUM_CLASSES).float()

    def stubborn(x_NCHW):
        near = torch.cdist(x_NCHW.flatten(1), batch.x_NCHW.flatten(1)).argmin(dim=1)
        return right[near]

    liar = Subject(
        answer=stubborn, float32=stubborn, search_dtype=lambda x: -stubborn(x) + 0 * x.sum()
    )
    samples = [Sample(index=n, label=0) for n in range(NUM_IMAGES)]
    points = accuracy_curve(liar, batch, samples, threat=ThreatModel(epsilon_pixels=EPSILON))
    assert {point.accuracy.num_correct for point in points} == {NUM_IMAGES}

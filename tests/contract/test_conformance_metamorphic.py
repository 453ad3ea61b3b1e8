"""What must not matter does not, and a stronger attack is never weaker.

On a network that was trained against attacks, in float64, so that rounding decides nothing.
N images, K classes.
"""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compressor.attacks.draws import KeyedDraws
from compressor.attacks.search import by_logits
from compressor.attacks.stages import AUTOATTACK, build_stages
from compressor.verification.cascade import Subject
from tests.contract.test_conformance_oracles import evaluate, stages_of

GOLDEN = Path(__file__).parents[1] / "golden"
MAKER = SimpleNamespace(**runpy.run_path(str(GOLDEN / "make_autoattack_flags.py")))
LENGTHS = {
    "fgsm": {},
    "pgd_sat": {},
    "apgd_ce": {"num_steps": 20},
    "apgd_dlr": {"num_steps": 20},
    "apgd_t": {"num_steps": 12},
    "fab_t": {"num_steps": 10},
    "square": {"num_queries": 60},
}
TARGETED, NUM_TARGETS = ("apgd_t", "fab_t"), 4

every_attack = pytest.mark.parametrize("name", LENGTHS)
both_norms = pytest.mark.parametrize("norm", MAKER.THREATS)


def build(name, norm, *, scale=1.0, num_targets=NUM_TARGETS, **length):
    threat = MAKER.THREATS[norm]
    threat = replace(threat, epsilon_pixels=scale * threat.epsilon_pixels)
    (stage,) = build_stages([name], threat=threat, mode="fast", batch_size=64)
    length = length or LENGTHS[name]
    if name in TARGETED:
        attack = replace(stage.search.attack, **length)
        return replace(stage.search, attack=attack, num_targets=num_targets)
    return replace(stage.search, **length)


@pytest.fixture(scope="module")
def robust():
    network, batch = MAKER.load_network().double(), MAKER.load_images(MAKER.load_split())
    x_NCHW = batch.x_NCHW.contiguous().double()
    is_right_N = network(x_NCHW).argmax(dim=1) == batch.y_N
    return network, x_NCHW[is_right_N], batch.y_N[is_right_N], batch.keys_N[is_right_N]


def run(search, images, *, model=None, rows=slice(None)):
    network, x_NCHW, y_N, keys_N = images
    draws = KeyedDraws(keys_N=keys_N[rows])
    return search.search(model or network, x_NCHW[rows], y_N[rows], draws=draws, judge=by_logits)


def is_fooled(search, images, **options):
    return run(search, images, **options).is_fooled_N


@both_norms
@every_attack
def test_larger_epsilon_never_raises_accuracy(name, norm, robust):
    numbers = [
        int(is_fooled(build(name, norm, scale=scale), robust).sum())
        for scale in (0.25, 0.5, 1.0, 1.5, 2.0)
    ]
    assert numbers == sorted(numbers)
    assert numbers[0] + 5 < numbers[-1]


@both_norms
@pytest.mark.parametrize(
    ("name", "what", "lengths"),
    [
        ("apgd_t", "num_targets", [1, 2, 4, 9]),
        ("fab_t", "num_targets", [1, 2, 4, 9]),
        ("fab_t", "num_steps", [1, 2, 4, 8]),
        ("square", "num_queries", [0, 10, 40, 160]),
    ],
)
def test_longer_search_breaks_all_that_a_shorter_one_does(name, norm, what, lengths, robust):
    """It is the same search, that goes on."""
    flags = [is_fooled(build(name, norm, **{what: n}), robust) for n in lengths]
    for shorter, longer in zip(flags, flags[1:], strict=False):
        assert not (shorter & ~longer).any()
    assert int(flags[0].sum()) < int(flags[-1].sum())


@both_norms
@pytest.mark.parametrize("name", ["apgd_ce", "apgd_dlr", "apgd_t"])
def test_more_steps_of_apgd_never_raise_accuracy(name, norm, robust):
    """Its windows change with the number of steps, so not image by image."""
    lengths = [0, 2, 10, 50]
    numbers = [int(is_fooled(build(name, norm, num_steps=n), robust).sum()) for n in lengths]
    assert numbers == sorted(numbers)
    assert numbers[0] < numbers[-1]


@both_norms
@every_attack
@pytest.mark.parametrize("parts", ["reversed", "alone", "in three"])
def test_image_does_not_depend_on_its_batch(name, norm, parts, robust):
    images, search = tuple(each[:13] for each in robust[1:]), build(name, norm)
    images = (robust[0], *images)
    together = run(search, images)
    places = {
        "reversed": [list(range(12, -1, -1))],
        "alone": [[5]],
        "in three": [[0, 7], [1, 2, 3, 4, 5, 6, 8], [9, 10, 11, 12]],
    }[parts]
    num_differing = 0
    for rows in places:
        apart = run(search, images, rows=rows)
        assert torch.equal(apart.is_fooled_N, together.is_fooled_N[rows])
        assert torch.equal(apart.num_forwards_N, together.num_forwards_N[rows])
        change_NCHW = (apart.x_adv_NCHW - together.x_adv_NCHW[rows]).abs()
        num_differing += int((change_NCHW > 1e-6).flatten(1).any(dim=1).sum())
    # where a step ends at the kink of a ReLU, even rounding in float64 chooses between two slopes
    assert num_differing <= (0 if parts == "alone" else 1)


def check_batch_size_does_not_matter(make_network=MAKER.load_network):
    """Neither for what breaks an image nor for how often the model was asked about it."""
    network, split = make_network(), MAKER.load_split()
    subject = Subject(answer=network, float32=network, search_dtype=network)
    stages = stages_of(("fgsm", "apgd_dlr", "square"), threat=MAKER.THREATS["linf"])
    small, large = (
        {
            sample.index: sample.broken_by
            for sample in evaluate(subject, split, stages, batch_size=batch_size).samples
        }
        for batch_size in (7, 40)
    )
    assert small.keys() == large.keys()
    num_differing = sum(small[index] != large[index] for index in small)
    assert num_differing <= 1, f"{num_differing} of {len(small)} images"  # float32 rounds


def test_batch_size_of_an_evaluation_does_not_matter():
    check_batch_size_does_not_matter()


@both_norms
@every_attack
def test_order_of_the_classes_does_not_matter(name, norm, robust):
    network, x_NCHW, y_N, keys_N = robust
    order_K = torch.tensor([3, 7, 0, 9, 4, 1, 8, 2, 6, 5])
    search = build(name, norm)
    other = run(
        search,
        (network, x_NCHW, order_K.argsort()[y_N], keys_N),
        model=lambda x: network(x)[:, order_K],
    )
    assert torch.equal(other.is_fooled_N, is_fooled(search, robust))


@both_norms
@every_attack
def test_constant_added_to_all_logits_of_an_image_does_not_matter(name, norm, robust):
    network, search = robust[0], build(name, norm)

    def shifted(x_NCHW):
        return network(x_NCHW) + 10 * x_NCHW.detach().mean(dim=(1, 2, 3))[:, None] - 50

    assert torch.equal(is_fooled(search, robust, model=shifted), is_fooled(search, robust))


@both_norms
@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("name", ["apgd_dlr", "apgd_t", "fab_t", "square"])
def test_scale_of_the_logits_does_not_matter_to_margins(name, norm, scale, robust):
    network, search = robust[0], build(name, norm)
    scaled = is_fooled(search, robust, model=lambda x: scale * network(x))
    assert torch.equal(scaled, is_fooled(search, robust))


def test_scale_of_the_logits_matters_to_cross_entropy_and_not_to_the_cascade(robust):
    """Large logits saturate it in float32; whatever it misses then, the others find."""
    network, search = MAKER.load_network(), build("apgd_ce", "linf")
    _, x_NCHW, y_N, keys_N = robust
    images = (network, x_NCHW.float(), y_N, keys_N)
    num_fooled = int(is_fooled(search, images).sum())
    saturated = is_fooled(search, images, model=lambda x: 1e4 * network(x))
    assert int(saturated.sum()) < num_fooled
    threat, split = MAKER.THREATS["linf"], MAKER.load_split()
    stages = stages_of(AUTOATTACK[:2], threat=threat)
    numbers = []
    for scale in (1.0, 1e4):

        def model(x_NCHW, scale=scale):
            return scale * network(x_NCHW)

        subject = Subject(answer=model, float32=model, search_dtype=model)
        samples = evaluate(subject, split, stages).samples
        numbers.append(sum(sample.broken_by is None for sample in samples))
    assert abs(numbers[0] - numbers[1]) <= 1

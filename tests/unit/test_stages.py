"""Which attacks run, in which order, on which form of the model, and what they may be called."""

from dataclasses import replace

import pytest
import torch

from compressor.attacks.compat import ReleasedSearch, ReleasedTargets
from compressor.attacks.draws import seeded_draws
from compressor.attacks.fixed import FixedAttack
from compressor.attacks.pgd import PGD
from compressor.attacks.stages import (
    ATTACK_NAMES,
    AUTOATTACK,
    PAPER_ATTACKS,
    build_stages,
    expand_names,
    protocol_of,
    with_transfer_late,
)
from compressor.errors import UsageError
from compressor.randomness import sample_keys
from compressor.threat import ThreatModel

THREATS = [ThreatModel(epsilon_pixels=8 / 255), ThreatModel(norm="l2", epsilon_pixels=0.5)]
LINF = THREATS[0]
MODES = ("fast", "compat")


def build(mode="fast", *, names=ATTACK_NAMES, threat=LINF, num_sources=2):
    sources = [torch.nn.Flatten() for _ in range(num_sources)]
    stages = build_stages(names, threat=threat, mode=mode, batch_size=64, sources=sources)
    return {stage.name: stage for stage in stages}


# Names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["papers"], PAPER_ATTACKS),
        (["autoattack"], AUTOATTACK),
        (["papers", "autoattack"], (*PAPER_ATTACKS, *AUTOATTACK)),
        (["autoattack", "papers"], (*PAPER_ATTACKS, *AUTOATTACK)),
        (["square", "fgsm", "fgsm"], ("fgsm", "square")),
        (["apgd_dlr", "papers", "cw_inf"], (*PAPER_ATTACKS, "apgd_dlr")),
    ],
    ids=str,
)
def test_names_become_attacks_in_the_order_of_the_cascade(names, expected):
    assert expand_names(names) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("fgsm", "apgd_ce"), ("fgsm", "apgd_ce", "transfer")),
        (("fgsm", "square"), ("fgsm", "transfer", "square")),
        (("transfer", "apgd_ce", "square"), ("apgd_ce", "transfer", "square")),
        (("square",), ("transfer", "square")),
        (AUTOATTACK, ("apgd_ce", "apgd_t", "fab_t", "transfer", "square")),
    ],
    ids=str,
)
def test_transfer_to_a_file_comes_after_gradients_and_before_the_black_box(names, expected):
    assert with_transfer_late(names) == expected
    assert tuple(build(names=with_transfer_late(names))) == expected


@pytest.mark.parametrize("names", [[], ["pgd"], ["papers", "nonsense"], [""], ["FGSM"]], ids=str)
def test_names_that_mean_nothing_are_refused(names):
    with pytest.raises(UsageError, match=r"there is no attack .*; use papers, autoattack, fgsm"):
        expand_names(names)


@pytest.mark.parametrize(
    ("names", "mode", "protocol"),
    [
        ((*PAPER_ATTACKS, *AUTOATTACK), "fast", "AutoAttack-style"),
        (AUTOATTACK, "compat", "AutoAttack (compat)"),
        (AUTOATTACK[:3], "fast", "worst of apgd_ce, apgd_t, fab_t"),
        (PAPER_ATTACKS, "fast", "worst of fgsm, pgd_sat, pgd_trades, cw_inf"),
        ((*AUTOATTACK[1:], "transfer"), "compat", "worst of apgd_t, fab_t, square, transfer"),
    ],
)
def test_only_all_four_attacks_may_be_called_autoattack(names, mode, protocol):
    assert protocol_of(names, mode) == protocol


# Stages


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_every_attack_has_the_threat_that_was_asked_for(mode, threat):
    stages = build(mode, threat=threat)
    assert tuple(stages) == ATTACK_NAMES
    assert {stage.search.threat for stage in stages.values()} == {threat}


@pytest.mark.parametrize("mode", MODES)
def test_parameters_in_the_report_are_those_of_the_search(mode):
    """What is printed is what is run; released values: Croce and Hein, ICML 2020."""
    stages = build(mode)
    for name in PAPER_ATTACKS:
        attack = stages[name].search.attack
        parameters = stages[name].parameters
        assert parameters["num_steps"] == attack.num_steps
        assert parameters["step_size_pixels"] == attack.step_size_pixels
        assert stages[name].max_forwards == attack.num_steps + 1
        assert stages[name].max_backwards == attack.num_steps
    for name in ("apgd_ce", "apgd_dlr"):
        search = stages[name].search
        search = search.attack if mode == "compat" else search
        assert stages[name].parameters == {"num_steps": search.num_steps, "restarts": 1}
        assert search.num_steps == 100
    for name in ("apgd_t", "fab_t"):
        search = stages[name].search
        expected = {"num_steps": search.attack.num_steps, "targets": search.num_targets}
        assert stages[name].parameters == expected == {"num_steps": 100, "targets": 9}
    square = stages["square"].search
    square = square.attack if mode == "compat" else square
    assert stages["square"].parameters == {"num_queries": square.num_queries}
    assert square.num_queries == 5000


@pytest.mark.parametrize("num_sources", [1, 3])
def test_transfer_says_from_how_many_models(num_sources):
    (stage,) = build(names=("transfer",), num_sources=num_sources).values()
    assert len(stage.search.sources) == num_sources
    steps = stage.search.attack.num_steps
    assert stage.parameters == {"num_steps": steps, "num_sources": num_sources}


def test_transfer_needs_a_model_to_transfer_from():
    with pytest.raises(UsageError, match="there is nothing to transfer from"):
        build(names=("fgsm", "transfer"), num_sources=0)
    assert list(build(names=("fgsm",), num_sources=0)) == ["fgsm"]


def test_papers_attack_as_the_papers_do():
    stages = build(names=PAPER_ATTACKS)
    steps = {
        name: (s.search.attack.num_steps, 255 * s.search.attack.step_size_pixels)
        for name, s in stages.items()
    }
    expected = {"fgsm": (1, 8), "pgd_sat": (20, 2), "pgd_trades": (20, 0.765), "cw_inf": (30, 2)}
    assert steps == {name: pytest.approx(value) for name, value in expected.items()}


@pytest.mark.parametrize("mode", MODES)
def test_kinds_and_who_tries_all(mode):
    stages = build(mode)
    others = {name: s.kind for name, s in stages.items() if s.kind != "white-box"}
    assert others == {"square": "black-box", "transfer": "transfer"}
    assert {name for name, s in stages.items() if s.tries_all} == set(PAPER_ATTACKS)


def test_an_image_stands_only_after_attacks_in_float32():
    """Each of which decides alone: the attacks of the papers, APGD-T, or near the decision."""
    forms = {name: stage.runs_on for name, stage in build().items()}
    assert {forms[name] for name in (*PAPER_ATTACKS, "apgd_t")} == {"float32"}
    assert {forms[name] for name in ("fab_t", "square")} == {"by_margin"}
    assert forms["transfer"] == "answer"


@pytest.mark.parametrize("name", ["apgd_ce", "apgd_dlr", "fab_t", "square"])
def test_without_apgd_t_nothing_searches_in_fewer_bits(name):
    """Square alone, in bfloat16, left 5 points more of a ResNet-18 standing than in float32."""
    assert build(names=("fgsm", name))[name].runs_on == "float32"
    assert build(names=(name, "apgd_t"))[name].runs_on != "float32"


def test_compat_attacks_what_answers():
    stages = build("compat", names=AUTOATTACK)
    assert {stage.runs_on for stage in stages.values()} == {"answer"}
    kinds = [type(stage.search) for stage in stages.values()]
    assert kinds == [ReleasedSearch, ReleasedTargets, ReleasedTargets, ReleasedSearch]


# Random numbers


@pytest.fixture
def batch(make_images):
    x_NCHW, y_N = make_images(8)
    return x_NCHW, y_N, sample_keys(torch.arange(8), seed=0)


def test_every_attack_draws_its_own_numbers(batch):
    x_NCHW, _, keys_N = batch
    drawn = {
        name: stage.draws(x_NCHW, keys_N=keys_N, seed=0).uniform((1,))
        for name, stage in build().items()
    }
    assert len({tuple(numbers.flatten().tolist()) for numbers in drawn.values()}) == len(drawn)


def test_numbers_belong_to_the_image_and_not_to_its_batch(batch):
    x_NCHW, _, keys_N = batch
    for stage in build().values():
        whole = stage.draws(x_NCHW, keys_N=keys_N, seed=0).normal((3,))
        part = stage.draws(x_NCHW[5:], keys_N=keys_N[5:], seed=1).normal((3,))
        assert torch.equal(whole[5:], part)


def test_compat_draws_as_the_released_code(batch):
    """One generator, seeded anew for every batch and attack."""
    x_NCHW, _, keys_N = batch
    for name, stage in build("compat", names=AUTOATTACK).items():
        numbers = stage.draws(x_NCHW, keys_N=keys_N, seed=7).uniform((2,))
        assert torch.equal(numbers, seeded_draws(7, x_NCHW).uniform((2,))), name
        assert not torch.equal(numbers, seeded_draws(8, x_NCHW).uniform((2,)))


# Images of other models


def test_transfer_is_decided_on_the_model_itself(tiny_network, make_tiny, batch):
    """What fools a source is nothing by itself; another source is tried where the first fails."""
    x_NCHW, _, keys_N = batch
    sources = [make_tiny(seed=seed).eval() for seed in (5, 0)]
    threat = ThreatModel(epsilon_pixels=64 / 255)
    (stage,) = build_stages(
        ("transfer",), threat=threat, mode="fast", batch_size=8, sources=sources
    )
    draws = stage.draws(x_NCHW, keys_N=keys_N, seed=0)
    y_N = tiny_network.eval()(x_NCHW).argmax(dim=1)

    def right(images_NCHW):
        nearest = torch.cdist(images_NCHW.flatten(1), x_NCHW.flatten(1)).argmin(dim=1)
        return torch.nn.functional.one_hot(y_N[nearest], 4).float()

    assert not stage.search.search(right, x_NCHW, y_N, draws=draws).is_fooled_N.any()
    found = stage.search.search(tiny_network, x_NCHW, y_N, draws=draws)
    assert found.is_fooled_N.sum() > 4  # the second source is the model itself
    assert torch.equal(found.is_fooled_N, tiny_network(found.x_adv_NCHW).argmax(dim=1) != y_N)
    assert threat.contains(found.x_adv_NCHW, x_NCHW).all()


# Attacks of fixed length as searches


def test_a_fixed_attack_is_judged_at_its_last_point_only(tiny_network, batch):
    x_NCHW, y_N, keys_N = batch
    attack = PGD(threat=LINF, step_size_pixels=2 / 255, num_steps=3)
    (stage,) = build(names=("pgd_sat",)).values()
    search = replace(stage.search, attack=attack)
    tiny_network.eval()
    calls = []

    def model(images_NCHW):
        calls.append(images_NCHW.detach().clone())
        return tiny_network(images_NCHW)

    draws = stage.draws(x_NCHW, keys_N=keys_N, seed=0)
    found = search.search(model, x_NCHW, y_N, draws=draws)
    expected = attack(tiny_network, x_NCHW, y_N, keys_N=draws.keys_N)
    assert torch.equal(found.x_adv_NCHW, expected)
    assert torch.equal(found.is_fooled_N, tiny_network(expected).argmax(dim=1) != y_N)
    assert torch.equal(calls[-1], expected)
    assert len(calls) == 3 + 1
    assert set(found.num_forwards_N.tolist()) == {4}
    assert set(found.num_backwards_N.tolist()) == {3}


def test_a_fixed_attack_asks_the_judge(tiny_network, batch):
    x_NCHW, y_N, keys_N = batch
    (stage,) = build(names=("fgsm",)).values()
    draws = stage.draws(x_NCHW, keys_N=keys_N, seed=0)
    model = tiny_network.eval()
    found = stage.search.search(
        model, x_NCHW, y_N, draws=draws, judge=lambda x, logits, y: torch.zeros_like(y).bool()
    )
    assert not found.is_fooled_N.any()
    assert stage.search.search(model, x_NCHW, y_N, draws=draws).is_fooled_N.any()


def test_a_fixed_attack_needs_keys(tiny_network, batch):
    x_NCHW, y_N, _ = batch
    (stage,) = build(names=("fgsm",)).values()
    assert isinstance(stage.search, FixedAttack)
    with pytest.raises(TypeError, match="draw by keys"):
        stage.search.search(tiny_network, x_NCHW, y_N, draws=seeded_draws(0, x_NCHW))

"""A file says itself which attacker it withstands; no weaker one is taken in silence."""

from types import SimpleNamespace

import pytest

from compressor.recipe import ThreatRecipe
from compressor.threat import DEFAULT_THREAT, ThreatModel
from compressor.verification.claimed_threat import claimed_threat

OF_RUN = ThreatModel(epsilon_pixels=4 / 255)


def target(*, card=None, has_run=False, is_file=True):
    metadata = {} if card is None else {"robust_compress.threat": card}
    recipe = SimpleNamespace(threat=ThreatRecipe(epsilon_pixels="4/255")) if has_run else None
    return SimpleNamespace(
        path="far.onnx",
        recipe=recipe,
        file=SimpleNamespace(metadata=metadata) if is_file else None,
    )


@pytest.mark.parametrize("has_run", [True, False])
def test_a_network_has_that_of_its_run(has_run):
    """Weights alone claim nothing."""
    claimed = claimed_threat(target(has_run=has_run, is_file=False))
    assert claimed.threat == (OF_RUN if has_run else DEFAULT_THREAT)
    assert DEFAULT_THREAT == ThreatModel(epsilon_pixels=8 / 255)


@pytest.mark.parametrize(
    "threat",
    [ThreatModel(epsilon_pixels=16 / 255), ThreatModel(norm="l2", epsilon_pixels=0.5)],
    ids=str,
)
def test_a_file_alone_has_that_of_its_card(threat):
    claimed = claimed_threat(target(card=str(threat)))
    assert (claimed.threat, claimed.problem) == (threat, "")


@pytest.mark.parametrize("card", [None, "linf 4/255"])
def test_a_file_of_a_run_has_that_of_the_run(card):
    assert claimed_threat(target(card=card, has_run=True)).threat == OF_RUN


@pytest.mark.parametrize("has_run", [True, False])
def test_a_card_that_cannot_be_read_is_no_claim(has_run):
    claimed = claimed_threat(target(card="linf eight " + "x" * 1000, has_run=has_run))
    assert claimed.threat is None
    assert "the model card of far.onnx names the threat 'linf eight x" in claimed.problem
    assert claimed.problem.endswith("', which cannot be read")
    assert len(claimed.problem) < 150


@pytest.mark.parametrize("card", ["linf 8/255", "linf 2/255", "l2 0.0156863"])
def test_a_card_that_contradicts_the_run_is_no_claim(card):
    claimed = claimed_threat(target(card=card, has_run=True))
    assert claimed.threat is None
    assert claimed.problem == (
        f"the model card of far.onnx names the threat {card!r}, and its source 'linf 4/255'"
    )


def test_a_file_without_a_card_claims_nothing():
    claimed = claimed_threat(target())
    assert claimed.threat is None
    assert claimed.problem == "far.onnx does not say within which radius it is to stand"

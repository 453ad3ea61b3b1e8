"""Our cascades against what the released AutoAttack said about a small robust network.

The flags are recorded in `autoattack_flags.json`; see `make_autoattack_flags.py`.
"""

import functools
import json
import runpy
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compressor.attacks.square import Square
from compressor.attacks.stages import AUTOATTACK
from compressor.verification.cascade import Subject
from compressor.verification.journal import Journal
from compressor.verification.verification import VerificationPlan, attack_chunks
from tests.contract.test_conformance_oracles import stages_of

HERE = Path(__file__).parent
MAKER = SimpleNamespace(**runpy.run_path(str(HERE / "make_autoattack_flags.py")))
RECORDED = json.loads((HERE / "autoattack_flags.json").read_text())
NUM_LIVE, NUM_LIVE_QUERIES = 12, 200
NUM_FAST_QUERIES = 300

both_norms = pytest.mark.parametrize("norm", MAKER.THREATS)


def evaluate(split, mode, norm, *, num_queries):
    """The first attack that breaks each image, in the order of a verification."""
    network = MAKER.load_network()
    stages = stages_of(AUTOATTACK, threat=MAKER.THREATS[norm], mode=mode, num_queries=num_queries)
    plan = VerificationPlan(stages=stages, seed=MAKER.SEED)
    subject = Subject(answer=network, float32=network, search_dtype=network)
    (found,) = attack_chunks(subject, split, plan, journal=Journal.in_memory())
    return [sample.broken_by for sample in found.samples]


@pytest.fixture(scope="module")
def compat():
    """What the whole of it says about the recorded images; run once per norm."""
    split = MAKER.load_split()
    return functools.cache(
        lambda norm: evaluate(split, "compat", norm, num_queries=Square.num_queries)
    )


@contextmanager
def released_code_contained():
    """It seeds the global generator and takes away the tracer, with which coverage is measured."""
    tracer = sys.gettrace()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        sys.settrace(tracer)


def is_broken(broken_by):
    return [attack is not None for attack in broken_by]


def places_of_difference(ours, theirs):
    return {place for place, pair in enumerate(zip(ours, theirs, strict=True)) if len({*pair}) > 1}


def test_recording_is_of_these_images():
    split = MAKER.load_split()
    assert split.content_sha256 == RECORDED["content_sha256"]
    assert MAKER.load_images(split).index_N.tolist() == RECORDED["index"]


@both_norms
def test_recording_has_images_of_every_kind(norm):
    recorded = RECORDED[norm]["broken_by"]
    assert set(recorded) == {"clean", "apgd_ce", "apgd_t", None}
    assert 12 <= recorded.count(None) <= 20
    assert len(RECORDED[norm]["depends_on_seed"]) <= 2


@both_norms
def test_compat_agrees_with_the_recording_image_by_image(norm, compat):
    """On another processor rounding decides what another seed may, and which attack is first."""
    ours, recorded = compat(norm), RECORDED[norm]["broken_by"]
    differ = places_of_difference(is_broken(ours), is_broken(recorded))
    assert differ <= set(RECORDED[norm]["depends_on_seed"])
    assert len(places_of_difference(ours, recorded)) <= 5  # of 40


@both_norms
def test_fast_is_not_higher_than_compat_but_for_the_noise_of_a_seed(norm, compat):
    """Even with so few queries; more of them only break more."""
    fast = evaluate(MAKER.load_split(), "fast", norm, num_queries=NUM_FAST_QUERIES)
    assert fast.count(None) <= compat(norm).count(None) + 1
    assert len(places_of_difference(is_broken(fast), is_broken(compat(norm)))) <= 2


def test_compat_agrees_with_the_released_code_run_now():
    """One norm; `test_conformance_engines.py` has each attack in both."""
    norm, whole = "linf", MAKER.load_split()
    split = replace(whole, index_N=whole.index_N[:NUM_LIVE], labels_N=whole.labels_N[:NUM_LIVE])
    ours = evaluate(split, "compat", norm, num_queries=NUM_LIVE_QUERIES)
    batch = MAKER.load_images(split)
    with released_code_contained():
        is_fooled_N = MAKER.reference_fooled(
            MAKER.load_network(),
            batch.x_NCHW.contiguous(),
            batch.y_N,
            norm=norm,
            num_queries=NUM_LIVE_QUERIES,
        )
    assert is_broken(ours) == is_fooled_N.tolist()
    assert 2 <= sum(is_broken(ours)) <= NUM_LIVE - 2

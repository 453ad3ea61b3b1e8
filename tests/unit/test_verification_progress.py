"""What is told of a verification under way is never better than it will turn out, and adds up."""

import pytest
import torch

from compressor.attacks.stages import build_stages
from compressor.data import load_test_split
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.threat import ThreatModel
from compressor.verification.cascade import Found, Outcome
from compressor.verification.journal import Journal
from compressor.verification.progress import Meter
from compressor.verification.verification import VerificationPlan, attack_chunks, network_subject

THREAT = ThreatModel(epsilon_pixels=8 / 255)
STAGES = build_stages(("fgsm", "apgd_ce", "square"), threat=THREAT, mode="fast", batch_size=10)
NUM_IMAGES, CHUNK = 40, 10


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("compressor.verification.progress.time", clock)
    return clock


@pytest.fixture
def seen():
    return []


@pytest.fixture
def meter(clock, seen):
    return Meter(STAGES, num_images=NUM_IMAGES, observe=seen.append)


def outcome(stage, places, fooled=(), *, seconds=0.0):
    rows = [
        Found(
            place=place,
            is_fooled=place in fooled,
            prediction=0,
            margin=0.0,
            distance_pixels=0.0,
            fools_in_8_bits=False,
            num_forwards=1,
            num_backwards=1,
        )
        for place in places
    ]
    return Outcome(chunk=0, stage=stage, found=tuple(rows), gallery=(), duration_seconds=seconds)


def passes(stage):
    return stage.max_forwards + stage.max_backwards


def run(meter, stage, places, fooled=(), *, seconds=0.0):
    with meter.stage(stage, num_tried=len(places)):
        pass
    meter.done(outcome(stage, places, fooled, seconds=seconds))


def test_nothing_is_known_at_first(meter, seen):
    with meter.stage("clean", num_tried=CHUNK):
        pass
    (event,) = seen
    assert (event.num_images, event.num_begun, event.num_standing) == (NUM_IMAGES, 0, 0)
    assert (event.current, event.num_current) == ("clean", CHUNK)
    assert event.left_seconds is None
    assert [row.name for row in event.stages] == ["clean", "fgsm", "apgd_ce", "square"]


def test_counts_add_up(meter, seen, clock):
    run(meter, "clean", range(10), {0, 1}, seconds=1)
    run(meter, "fgsm", range(2, 10), {2, 3, 4}, seconds=2)
    clock.now += 7
    run(meter, "apgd_ce", range(5, 10), {5}, seconds=3)
    event = seen[-1]
    assert (event.num_begun, event.num_standing, event.elapsed_seconds) == (10, 4, 7)
    told = {row.name: (row.num_tried, row.num_fooled) for row in event.stages}
    assert told == {"clean": (10, 2), "fgsm": (8, 3), "apgd_ce": (5, 1), "square": (0, 0)}
    assert [row.duration_seconds for row in event.stages] == [1, 2, 3, 0]


def test_an_image_that_two_attacks_fool_falls_once(meter, seen):
    run(meter, "clean", range(10))
    run(meter, "fgsm", range(10), {1, 2})
    run(meter, "apgd_ce", range(10), {2, 3})
    assert seen[-1].num_standing == 7


def test_left_is_what_is_tried_times_what_a_try_costs(meter, seen):
    """A chunk of 10, of 40 images: 10 s for FGSM on 8, 40 s for APGD on 4; Square has 2 to try."""
    run(meter, "clean", range(10), {0, 1}, seconds=0.5)
    run(meter, "fgsm", range(2, 10), {2, 3, 4, 5}, seconds=10)
    run(meter, "apgd_ce", range(6, 10), {6, 7}, seconds=40)
    fgsm, apgd, square = STAGES
    seconds_per_pass = 50 / (8 * passes(fgsm) + 4 * passes(apgd))
    expected = 30 * 0.5 / 10 + 24 * 10 / 8 + 12 * 40 / 4
    expected += 8 * seconds_per_pass * passes(square)
    assert seen[-1].left_seconds == pytest.approx(expected)


def test_left_shrinks_to_nothing_and_is_never_less(meter, seen):
    """At even speed; also where no image is left for an attack."""
    for chunk in range(4):
        places = range(10 * chunk, 10 * chunk + 10)
        run(meter, "clean", places, seconds=0.1)
        run(meter, "fgsm", places, places, seconds=1)
        run(meter, "apgd_ce", [])
        run(meter, "square", [])
    left = [event.left_seconds for event in seen if event.left_seconds is not None]
    assert min(left) >= 0
    assert left[-1] == 0
    after_chunks = left[2::8]
    assert after_chunks == sorted(after_chunks, reverse=True)
    assert after_chunks[0] == pytest.approx(3 * 1.1)


def test_left_falls_within_a_stage_at_the_speed_it_has(meter, seen, clock):
    """Nothing else takes time: a tenth of the passes of 5 images took 20 s, so all 20 take 800."""
    run(meter, "clean", range(10), seconds=0)
    run(meter, "fgsm", range(10), range(5), seconds=0)
    run(meter, "apgd_ce", range(5, 10), seconds=0)
    square = STAGES[-1]
    with meter.stage("square", num_tried=5):
        for done in (0.1, 0.5, 0.9):
            clock.now = 100 + 200 * done
            meter.tick(round((done if done == 0.1 else 0.4) * 5 * square.max_forwards))
            assert seen[-1].current_fraction == pytest.approx(done, rel=0.01)
            assert seen[-1].left_seconds == pytest.approx(800 - 200 * done, rel=0.01)


def test_left_falls_within_a_stage_that_ran_before(meter, seen, clock):
    """It took 10 s for 5 images; now 4 s have gone for 5 others, and 10 images come after them."""
    for places in (range(10), range(10, 20)):
        run(meter, "clean", places, seconds=0)
        run(meter, "fgsm", places, places[:5], seconds=0)
        run(meter, "apgd_ce", places[5:], seconds=0)
        if places[0] == 0:
            run(meter, "square", places[5:], seconds=10)
    with meter.stage("square", num_tried=5):
        clock.now += 4
        meter.tick(5)
        assert seen[-1].left_seconds == pytest.approx(6 + 20)


def test_passes_are_told_at_most_five_times_a_second(meter, seen, clock):
    for _ in range(1000):
        clock.now += 0.01
        meter.tick(10)
    assert 40 <= len(seen) <= 50


def test_a_real_verification_is_told_truly():
    """Images that stand can only fall within a chunk; in the end all is known."""
    recipe = DataRecipe(source="digits", validation_size=100)
    cpu = Performance(device=torch.device("cpu"))
    split = load_test_split(
        recipe, settings=PerformanceSettings(), device=cpu.device, num_images=NUM_IMAGES
    )
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    network = build_classifier(spec, seed=1).eval()
    stages = build_stages(("fgsm", "pgd_sat", "apgd_ce"), threat=THREAT, mode="fast", batch_size=9)
    seen = []
    *_, found = attack_chunks(
        network_subject(network, cpu),
        split,
        VerificationPlan(stages=stages, batch_size=9),
        journal=Journal.in_memory(),
        observe=seen.append,
    )
    for before, after in zip(seen, seen[1:], strict=False):
        assert after.num_begun >= before.num_begun
        if after.num_begun == before.num_begun:
            assert after.num_standing <= before.num_standing
        assert after.left_seconds is None or after.left_seconds >= 0
    last = seen[-1]
    assert last.num_begun == last.num_images == len(found.samples)
    assert last.num_standing == sum(sample.broken_by is None for sample in found.samples)
    assert last.left_seconds == pytest.approx(0)

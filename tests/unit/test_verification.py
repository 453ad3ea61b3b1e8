"""attack_chunks: counted per image, fair at any moment, and never believing an attack."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.nn.functional import one_hot

from compressor.attacks.apgd import APGD
from compressor.attacks.fab import FAB
from compressor.attacks.fixed import FixedAttack
from compressor.attacks.search import SearchResult
from compressor.attacks.square import Square
from compressor.attacks.stages import Stage, build_stages
from compressor.attacks.targeted import Targeted
from compressor.augmentation import Augmentation
from compressor.data import (
    evaluation_batches,
    load_test_split,
    load_training_data,
    training_batches,
)
from compressor.errors import BudgetSpentError, InvalidEvaluationError
from compressor.losses import cross_entropy, targeted_dlr
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.threat import ThreatModel
from compressor.verification.cascade import Subject
from compressor.verification.journal import Journal
from compressor.verification.rows import attack_rows, count_standing
from compressor.verification.verification import (
    NEAR_SHARE,
    VerificationPlan,
    attack_chunks,
    network_subject,
)

CPU = Performance(device=torch.device("cpu"))
THREAT = ThreatModel(epsilon_pixels=8 / 255)
A, B = "fgsm", "pgd_sat"


@pytest.fixture(scope="module")
def split():
    recipe = DataRecipe(source="digits", validation_size=100)
    return load_test_split(recipe, settings=PerformanceSettings(), device=CPU.device, num_images=60)


class Reader:
    """Knows every image of the split; wrong where corner pixel 0, 1 or 2 of the top row is lit."""

    def __init__(self, split, *, wrong=()):
        (batch,) = evaluation_batches(split, batch_size=split.num_images)
        self.known, self.labels = batch.x_NCHW.flatten(1), batch.y_N.clone()
        self.index_N = batch.index_N
        is_wrong_N = torch.isin(self.index_N, torch.tensor(wrong))
        self.labels[is_wrong_N] = (self.labels[is_wrong_N] + 1) % 10
        self.num_images_asked = 0

    def nearest(self, x_NCHW):
        return torch.cdist(x_NCHW.flatten(1), self.known).argmin(dim=1)

    def positions(self, x_NCHW):
        """In the test images."""
        return self.index_N[self.nearest(x_NCHW)].tolist()

    def is_lit(self, x_NCHW):
        rise_N3 = x_NCHW[:, 0, 0, :3] - self.known.view(-1, 8, 8)[self.nearest(x_NCHW), 0, :3]
        return rise_N3.abs().amax(dim=1) > 0.01

    def __call__(self, x_NCHW):
        self.num_images_asked += len(x_NCHW)
        labels_N = self.labels[self.nearest(x_NCHW)]
        labels_N = torch.where(self.is_lit(x_NCHW), (labels_N + 1) % 10, labels_N)
        return one_hot(labels_N, 10).float()


@dataclass(frozen=True)
class Light:
    """Lights one corner pixel of every image whose position in the test images `fits`."""

    reader: Reader
    corner: int
    fits: Callable[[int], bool]
    threat: ThreatModel = THREAT
    seen: list[int] = field(default_factory=list)

    def search(self, model, x_NCHW, y_N, *, draws, judge):
        del draws, judge
        positions = self.reader.positions(x_NCHW)
        self.seen.extend(positions)
        x_adv = x_NCHW.clone()
        for row, position in enumerate(positions):
            if self.fits(position):
                pixel = x_adv[row, 0, 0, self.corner]
                pixel += 0.03 if pixel < 0.5 else -0.03
        one_N = torch.ones_like(y_N)
        return SearchResult(
            x_adv_NCHW=x_adv,
            is_fooled_N=one_N.bool(),
            num_forwards_N=2 * one_N,
            num_backwards_N=one_N,
        )


def stage(name, search, **changes):
    values = {"kind": "white-box", "runs_on": "float32", "parameters": {}, "max_forwards": 1}
    return Stage(name=name, search=search, **(values | changes))


def subject_of(answer):
    return Subject(answer=answer, float32=answer, search_dtype=answer)


def last(subject, split, stages, *, journal=None, **plan):
    *_, found = attack_chunks(
        subject,
        split,
        VerificationPlan(stages=stages, **plan),
        journal=journal or Journal.in_memory(),
    )
    return found


def broken_by(found):
    return {sample.index: sample.broken_by for sample in found.samples}


@pytest.fixture
def halves(split):
    """Wrong clean are images whose position ends in 0 or 5; A fools even ones, B thirds."""
    wrong = [i for i in split.index_N.tolist() if i % 5 == 0]
    reader = Reader(split, wrong=wrong)
    a, b = Light(reader, 0, lambda i: i % 2 == 0), Light(reader, 1, lambda i: i % 3 == 0)
    return reader, [stage(A, a), stage(B, b, tries_all=True)], {A: a.seen, B: b.seen}


def test_worst_case_is_per_image(split, halves):
    """Two attacks that break different images leave fewer than either."""
    reader, stages, _ = halves
    found = last(subject_of(reader), split, stages, batch_size=16)
    index = split.index_N.tolist()
    stands = {i for i in index if i % 2 and i % 3 and i % 5}
    assert {i for i, broken in broken_by(found).items() if broken is None} == stands
    a, b = attack_rows(found, stages)
    assert count_standing(found.samples, after=[A, B]).num_correct == len(stands)
    assert len(stands) < b.accuracy.num_correct < found.num_planned
    assert len(stands) < a.standing.num_correct


def test_images_that_are_wrong_clean_are_never_attacked_and_count_as_wrong(split, halves):
    reader, stages, seen = halves
    found = last(subject_of(reader), split, stages, batch_size=16)
    wrong = {i for i in split.index_N.tolist() if i % 5 == 0}
    assert wrong
    assert {i for i, broken in broken_by(found).items() if broken == "clean"} == wrong
    assert not wrong & {*seen[A], *seen[B]}
    for sample in found.samples:
        if sample.index in wrong:
            assert sample.prediction == (sample.label + 1) % 10
            assert sample.fooled_by == {"clean": True}
    _, b = attack_rows(found, stages)
    assert b.accuracy.num_total == len(found.samples) == 60


def test_an_attack_that_tries_all_has_an_accuracy_of_its_own_over_all_images(split, halves):
    reader, stages, seen = halves
    found = last(subject_of(reader), split, stages, batch_size=16)
    index = split.index_N.tolist()
    a, b = attack_rows(found, stages)
    assert a.accuracy is None
    assert sorted(seen[B]) == [i for i in index if i % 5]
    assert b.accuracy.num_correct == sum(i % 5 != 0 and i % 3 != 0 for i in index)
    twice = [s for s in found.samples if s.fooled_by.get(A) and s.fooled_by.get(B)]
    assert twice
    assert all(sample.broken_by == A for sample in twice)


def test_an_attack_that_does_not_try_all_tries_what_stands(split, halves):
    reader, stages, seen = halves
    stages[1] = replace(stages[1], tries_all=False)
    found = last(subject_of(reader), split, stages, batch_size=16)
    assert sorted(seen[B]) == [i for i in split.index_N.tolist() if i % 5 and i % 2]
    assert attack_rows(found, stages)[1].accuracy is None


def test_counts_of_the_rows_add_up(split, halves):
    reader, stages, _ = halves
    found = last(subject_of(reader), split, stages, batch_size=16)
    clean = count_standing(found.samples, after=()).num_correct
    standing = clean
    for row in attack_rows(found, stages):
        standing -= row.num_broken
        assert row.standing.num_correct == standing
        assert row.num_tried == clean
        assert row.num_forwards == 3 * row.num_tried
        assert row.num_backwards == row.num_tried
    counts = Counter(sample.broken_by for sample in found.samples)
    assert counts == {"clean": 60 - clean, A: counts[A], B: counts[B], None: standing}
    assert sum(s.num_forwards for s in found.samples) == 60 + 2 * 3 * clean


def test_a_point_outside_the_threat_model_ends_the_verification(split):
    reader = Reader(split)
    far = replace(THREAT, epsilon_pixels=0.01)
    cheat = stage(A, Light(reader, 0, lambda i: i % 7 == 0, threat=far))
    with pytest.raises(InvalidEvaluationError, match="fgsm left its threat model"):
        last(subject_of(reader), split, [cheat], batch_size=16)


def test_not_a_number_is_never_right(split):
    def nothing(x_NCHW):
        return torch.full((len(x_NCHW), 10), torch.nan)

    found = last(subject_of(nothing), split, [])
    assert {sample.broken_by for sample in found.samples} == {"clean"}


# The model


@pytest.fixture
def network():
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    return build_classifier(spec, seed=0).eval()


def test_network_has_three_forms_of_one_function(split, network):
    """And stays as it is."""
    (batch,) = evaluation_batches(split, batch_size=60)
    before = copy.deepcopy(network.state_dict())
    subject = network_subject(network, CPU)
    assert subject.answer is network
    assert subject.float32 is subject.search_dtype
    torch.testing.assert_close(subject.float32(batch.x_NCHW), network(batch.x_NCHW))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_only_the_search_has_fewer_bits(split, network):
    (batch,) = evaluation_batches(split, batch_size=60)
    performance = Performance(device=CPU.device, training_dtype=torch.bfloat16)
    subject = network_subject(network, performance)
    exact = network(batch.x_NCHW)
    assert torch.equal(subject.answer(batch.x_NCHW), exact)
    torch.testing.assert_close(subject.float32(batch.x_NCHW), exact)
    assert float((subject.search_dtype(batch.x_NCHW) - exact).detach().abs().max()) > 1e-4


class Faint(Reader):
    """Is always right, but hardly so where a corner is lit."""

    def __call__(self, x_NCHW):
        logits_NK = one_hot(self.labels[self.nearest(x_NCHW)], 10).float()
        return logits_NK * torch.where(self.is_lit(x_NCHW), 0.5 * NEAR_SHARE, 1.0)[:, None]


def test_images_near_the_decision_are_searched_in_float32(split):
    """Those that an earlier attack has driven there; the others in the search's own format."""
    faint, asked = Faint(split), {"float32": set(), "search_dtype": set()}

    def form(name):
        def answer(x_NCHW):
            asked[name].update(faint.positions(x_NCHW))
            return faint(x_NCHW)

        return answer

    @dataclass(frozen=True)
    class Ask(Light):
        def search(self, model, x_NCHW, y_N, *, draws, judge):
            model(x_NCHW)
            return super().search(model, x_NCHW, y_N, draws=draws, judge=judge)

    subject = Subject(answer=faint, **{name: form(name) for name in asked})
    stages = [
        stage(A, Light(faint, 0, lambda i: i % 2 == 0)),
        stage("square", Ask(faint, 1, lambda i: False), runs_on="by_margin"),
    ]
    found = last(subject, split, stages, batch_size=16)
    index = split.index_N.tolist()
    assert asked["float32"] == {i for i in index if i % 2 == 0}
    assert asked["search_dtype"] == {i for i in index if i % 2}
    assert set(broken_by(found).values()) == {None}


# Chunks


def flags(found):
    return {s.index: (s.broken_by, s.prediction, tuple(s.fooled_by.items())) for s in found.samples}


def searches(threat, *, max_rows):
    """Every kind of search, shortened; all try all images, or there would be few for the last."""
    fixed = build_stages(("fgsm", "pgd_sat"), threat=threat, mode="fast", batch_size=7)
    targeted = APGD(threat=threat, objective=targeted_dlr, num_steps=5)
    stages = [
        *fixed,
        stage("apgd_ce", APGD(threat=threat, num_steps=8)),
        stage("apgd_t", Targeted(attack=targeted, max_rows=max_rows, num_targets=4)),
        stage("fab_t", Targeted(attack=FAB(threat=threat, num_steps=3), max_rows=max_rows)),
        stage("square", Square(threat=threat, num_queries=30), kind="black-box"),
    ]
    return [replace(one, tries_all=True) for one in stages]


@pytest.fixture(scope="module")
def trained(make_tiny):
    """A network that knows digits, in float64."""
    recipe = DataRecipe(source="digits", validation_size=100)
    settings = PerformanceSettings()
    data = load_training_data(recipe, seed=0, settings=settings, device=CPU.device)
    network = make_tiny(num_classes=10, num_channels=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    plain = Augmentation(crop_padding_pixels=0, horizontal_flip=False)
    for epoch in range(2):
        for batch in training_batches(
            data.train, batch_size=64, seed=0, epoch=epoch, augment=plain
        ):
            optimizer.zero_grad()
            cross_entropy(network(batch.x_NCHW), batch.y_N).mean().backward()
            optimizer.step()
    return network.double().eval()


def test_chunks_change_no_flag(split, trained):
    """In float64, where the size of a batch cannot tip a borderline image."""

    def answer(x_NCHW):
        return trained(x_NCHW.double())

    threat = ThreatModel(epsilon_pixels=20 / 255)
    small, large = (
        last(subject_of(answer), split, searches(threat, max_rows=size), batch_size=size)
        for size in (7, 50)
    )
    assert flags(small) == flags(large)
    for attack in searches(threat, max_rows=7):
        tried = [s.fooled_by[attack.name] for s in small.samples if attack.name in s.fooled_by]
        assert 0 < sum(tried) < len(tried), attack.name


def test_another_seed_is_another_order(split, halves):
    reader, stages, _ = halves
    orders = [
        list(broken_by(last(subject_of(reader), split, stages, seed=seed))) for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_images_done_after_any_chunk_have_the_shares_of_the_whole(split, halves):
    reader, stages, _ = halves
    plan = VerificationPlan(stages=stages, batch_size=10)
    sizes = []
    for found in attack_chunks(subject_of(reader), split, plan, journal=Journal.in_memory()):
        counts = Counter(sample.label for sample in found.samples)
        assert max(counts.values()) - min(counts.values()) <= 2
        sizes.append((len(found.samples), found.num_planned, found.is_complete))
    assert sizes == [(n, 60, n == 60) for n in range(10, 61, 10)]


def test_every_image_that_is_told_went_through_every_attack(split, halves):
    reader, stages, _ = halves
    plan = VerificationPlan(stages=stages, batch_size=25)
    for found in attack_chunks(subject_of(reader), split, plan, journal=Journal.in_memory()):
        for sample in found.samples:
            expected = {"clean"} if sample.broken_by == "clean" else {"clean", A, B}
            assert sample.fooled_by.keys() == expected
        names = [(outcome.chunk, outcome.stage) for outcome in found.outcomes]
        chunks = range(-(-len(found.samples) // 25))
        assert names == [(chunk, name) for chunk in chunks for name in ("clean", A, B)]


# Journal and budget


class Clock:
    """Every look at it is a tenth of a second later."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 0.1
        return self.now

    def perf_counter(self):
        return self.now


def test_what_is_in_the_journal_is_not_run_again(split, halves, tmp_path):
    reader, stages, _ = halves
    plan = {"seed": 0}

    def attack():
        journal = Journal.open(tmp_path / "journal", plan)
        return last(subject_of(reader), split, stages, journal=journal, batch_size=16)

    first = attack()
    assert reader.num_images_asked > 0
    reader.num_images_asked = 0
    assert attack() == first
    assert reader.num_images_asked == 0


def attack_within(budget_seconds, reader, split, stages, path):
    """The last that was told, and why it ended."""
    plan = VerificationPlan(stages=stages, batch_size=16, max_seconds=budget_seconds)
    found = None
    try:
        for known in attack_chunks(subject_of(reader), split, plan, journal=Journal.open(path, {})):
            found = known
    except BudgetSpentError as error:
        return found, str(error)
    return found, "done"


def test_a_budget_ends_between_passes_and_the_next_call_goes_on(
    split, halves, tmp_path, monkeypatch
):
    """Each call gets further, whole chunks are told, and the end is that of one long call."""
    reader, stages, _ = halves
    whole = last(subject_of(reader), split, stages, batch_size=16)
    monkeypatch.setattr("compressor.verification.verification.time", Clock())
    told, reason = [], ""
    while reason != "done":
        found, reason = attack_within(1.2, reader, split, stages, tmp_path / "journal")
        assert reason in {"done", "the budget of 1.2 seconds is spent"}
        told.append(0 if found is None else len(found.samples))
    assert told[0] == 0
    assert told == sorted(told)
    assert {16, 32, 48} & set(told)
    assert flags(found) == flags(whole)


def test_a_part_of_a_chunk_is_never_told(split, halves, tmp_path, monkeypatch):
    """Images that only the first attack has tried would look too robust."""
    reader, stages, _ = halves
    monkeypatch.setattr("compressor.verification.verification.time", Clock())
    plan = VerificationPlan(stages=stages, batch_size=60, max_seconds=2)
    journal = Journal.open(tmp_path / "journal", {})
    with pytest.raises(BudgetSpentError):
        next(attack_chunks(subject_of(reader), split, plan, journal=journal))
    assert (tmp_path / "journal").read_text().count("\n") >= 2


# Attacks of fixed length


def test_fixed_attacks_count_their_passes(split, network):
    (fgsm,) = build_stages(("fgsm",), threat=THREAT, mode="fast", batch_size=60)
    assert isinstance(fgsm.search, FixedAttack)
    found = last(network_subject(network, CPU), split, [fgsm])
    (row,) = attack_rows(found, [fgsm])
    assert (row.num_forwards, row.num_backwards) == (3 * row.num_tried, row.num_tried)

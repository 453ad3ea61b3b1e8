"""Through what a file is attacked, whether it hides gradients, and how transfer would flatter."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compressor.data import Batch, load_test_split
from compressor.errors import WeightsError
from compressor.onnx_model import load_onnx_model
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.reports.report import ValidityRow
from compressor.threat import ThreatModel
from compressor.verification import artefact
from compressor.verification.artefact import (
    Twin,
    checked_twin,
    compared_images,
    describe_artefact,
    rounds,
)
from tests.onnx_files import constant, linear_model, node, other_off_the_grey_levels

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
THREAT = ThreatModel(epsilon_pixels=8 / 255)


def images(num_images=40):
    generator = torch.Generator().manual_seed(0)
    x_NCHW = torch.rand(num_images, 1, 8, 8, generator=generator)
    places_N = torch.arange(num_images)
    return Batch(x_NCHW=x_NCHW, y_N=places_N % 10, index_N=places_N, keys_N=places_N)


@pytest.fixture
def file_of(tmp_path):
    def load(*after, **options):
        path = tmp_path / "some.onnx"
        path.write_bytes(linear_model(*after, **options).SerializeToString())
        return load_onnx_model(path)

    return load


@pytest.fixture
def twin_that(monkeypatch):
    """Puts another function of the true twin's logits in its place."""
    original = artefact.differentiable_twin

    def plant(change):
        class Changed(torch.nn.Module):
            def __init__(self, twin):
                super().__init__()
                self.twin = twin

            def forward(self, x_NCHW):
                return change(self.twin(x_NCHW))

        monkeypatch.setattr(
            artefact, "differentiable_twin", lambda *a, **o: Changed(original(*a, **o))
        )

    return plant


# The twin


def test_a_twin_that_answers_alike_is_used(file_of):
    twin = checked_twin(file_of(), [images(), images(10)])
    assert twin.module is not None
    assert not twin.module.training
    assert (twin.agreement.num_correct, twin.agreement.num_total) == (50, 50)
    assert twin.reason.startswith(
        "its differentiable twin gives its label on 100.00 % (50 of 50) test images, and its logits"
    )


def wrong_labels(num):
    """Two logits of the first images change places."""

    def change(logits_NK):
        changed = logits_NK.clone()
        changed[:num] = changed[:num].roll(1, dims=1)
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "is_used"),
    [
        (lambda logits: logits * 1.03, True),
        (lambda logits: logits * 1.07, False),
        (lambda logits: logits + 100, False),
        (lambda logits: logits.softmax(dim=1), False),
        (lambda logits: logits * torch.nan, False),
        (wrong_labels(30), False),
    ],
    ids=["nearly", "scaled", "shifted", "softmax", "NaN", "labels"],
)
def test_a_twin_that_answers_otherwise_is_not(file_of, twin_that, change, is_used):
    """Its gradients would lead elsewhere."""
    twin_that(change)
    twin = checked_twin(file_of(), [images()])
    assert (twin.module is not None) == is_used
    assert twin.reason.endswith(": too far to attack through it") != is_used
    assert twin.agreement.num_total == 40


def test_a_number_added_to_all_logits_hides_no_error(file_of, twin_that):
    model = file_of(node("Add", "raw far"), constants=[constant("far", 1e4)], name="raw")
    assert checked_twin(model, [images()]).module is not None
    twin_that(lambda logits: 1e4 + (logits - 1e4) * 1.15)
    assert checked_twin(model, [images()]).module is None


def test_labels_count_beside_logits(file_of, twin_that, monkeypatch):
    monkeypatch.setattr(artefact, "MAX_TWIN_ERROR", 10.0)
    for num, is_used in ((2, True), (3, False)):
        twin_that(wrong_labels(num))
        twin = checked_twin(file_of(), [images()])
        assert twin.agreement.num_correct == 40 - num
        assert (twin.module is not None) == is_used
        monkeypatch.undo()
        monkeypatch.setattr(artefact, "MAX_TWIN_ERROR", 10.0)


def fail(error):
    def change(_):
        raise error

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (fail(KeyError("axis")), "KeyError"),
        (fail(RuntimeError()), "RuntimeError"),
        (lambda logits: logits[:, :3], r"it would give \(40, 3\)"),
        (lambda logits: logits[:1], r"it would give \(1, 10\)"),
    ],
)
def test_a_twin_that_cannot_answer_is_explained(file_of, twin_that, change, why):
    twin_that(change)
    twin = checked_twin(file_of(), [images()])
    assert (twin.module, twin.agreement) == (None, None)
    assert re.fullmatch(rf"it has no differentiable twin \({why}\)", twin.reason)


def test_an_operator_without_a_derivative_is_named(file_of):
    twin = checked_twin(file_of(node("Sum", "raw"), name="raw"), [images()])
    assert "without a derivative here: Sum" in twin.reason


def test_a_file_that_cannot_answer_is_no_matter_of_its_twin(file_of):
    """It is refused, not called unverified."""
    shape = constant("shape", [1, 1])
    model = file_of(
        node("Expand", "raw shape", "wide"),
        node("Slice", "wide one two", "logits"),
        constants=[shape, constant("one", [0]), constant("two", [1])],
        name="raw",
    )
    with pytest.raises(WeightsError, match="declares one row of 10 logits per image"):
        checked_twin(model, [images()])


def noise_of(logits_NK):
    """One for the first class of each image, none for the others, times the largest."""
    return logits_NK.abs().max() * (torch.arange(logits_NK.shape[1]) == 0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda logits: logits, False),
        (lambda logits: logits + 1e-4 * noise_of(logits), False),
        (lambda logits: logits + 4e-3 * noise_of(logits), True),
        (lambda logits: logits + 1, False),  # one constant on all classes is the same answer
        (lambda logits: logits * torch.nan, True),
    ],
)
def test_a_file_rounds_if_it_is_more_than_its_source_written_down(file_of, change, expected):
    model = file_of()
    assert rounds(model, lambda x_NCHW: change(model(x_NCHW)), [images()]) == expected


def test_large_logits_do_not_hide_that_a_file_rounds():
    def source(x_NCHW):
        return 1000 + x_NCHW.flatten(1)[:, :10]

    def file(x_NCHW):
        return (8 * source(x_NCHW)).round() / 8

    assert rounds(file, source, [images()])
    assert not rounds(source, source, [images()])


def test_one_batch_is_enough_to_round(file_of):
    model, changes = file_of(), iter([0.0, 0.0, 1.0])

    def changed(x_NCHW):
        logits_NK = model(x_NCHW)
        return logits_NK + next(changes) * noise_of(logits_NK)

    assert rounds(model, changed, [images(4)] * 3)


def test_compared_images_are_spread_over_the_split():
    split = load_test_split(
        DataRecipe(source="digits", validation_size=50), settings=SETTINGS, device="cpu"
    )
    batches = compared_images(split)
    assert [len(batch.y_N) for batch in batches] == [50] * 5
    places = torch.cat([batch.index_N for batch in batches])
    assert len(places.unique()) == 250
    assert places.max() - places.min() > 0.95 * split.num_images


# A file that tells grey levels from what lies between


@pytest.mark.parametrize("threat", [THREAT, ThreatModel(norm="l2", epsilon_pixels=0.5)], ids=str)
def test_a_twin_must_answer_alike_around_the_images_too(tmp_path, threat):
    path = tmp_path / "two.onnx"
    path.write_bytes(other_off_the_grey_levels(linear_model()).SerializeToString())
    batch = images()
    batch = replace(batch, x_NCHW=(batch.x_NCHW * 255).round() / 255)
    twin = checked_twin(load_onnx_model(path), [batch], threat=threat)
    assert twin.module is None
    assert "gives its label on 100.00 % (40 of 40) test images" in twin.reason
    assert re.search(rf"with noise of {threat} on them, on [\d.]+ % \(\d of 40\)", twin.reason)
    assert twin.reason.endswith(": too far to attack through it")
    radius = replace(threat, epsilon_pixels=1e-9)
    assert checked_twin(load_onnx_model(path), [batch], threat=radius).module is not None


# Masked gradients, and transfer that flatters


def row(name, status, found="3 of 40 images, 20 of which stood"):
    values = {"name": name, "status": status, "found": found if status != "not_run" else ""}
    return ValidityRow(threshold="", p_value=None, advice="", **values)


def described(monkeypatch, *, better, worse, both=50, neither=50, twin=True, validity=()):
    """Of a file that stands what its source does not on `better` images, and the other way."""
    of_file = [True] * better + [False] * worse + [True] * both + [False] * neither
    of_source = [False] * better + [True] * worse + [True] * both + [False] * neither
    monkeypatch.setattr(artefact, "_stands", lambda *_, **__: torch.tensor(of_source))
    return describe_artefact(
        Twin(module=torch.nn.Identity() if twin else None, agreement=None, reason="it is alike"),
        lambda x_NCHW: x_NCHW,
        images(len(of_file)),
        threat=THREAT,
        stands_transfer_N=torch.tensor(of_file),
        validity=validity,
    )


@pytest.mark.parametrize(
    ("better", "worse", "both", "flatters"),
    [
        (0, 0, 50, False),
        (20, 0, 50, True),
        (20, 20, 50, False),
        (0, 20, 50, False),
        (6, 0, 50, False),  # p = 0.016
        (7, 0, 50, True),  # p = 0.008
        (30, 10, 50, True),
        (7, 0, 700, False),  # not a point
    ],
)
def test_a_file_may_look_better_than_its_source_under_transfer_alone(
    monkeypatch, better, worse, both, flatters
):
    """That alone is no masking: the file may have become another function."""
    facts = described(monkeypatch, better=better, worse=worse, both=both)
    assert (facts.transfer_flatters, facts.gradients_are_masked) == (flatters, False)
    total = better + worse + both + 50
    points = 100 * (better - worse) / total
    said = (
        "to images made on its source its gradients are masked, or it is another function by now: "
        f"transfer alone would flatter by {points:.1f} points: "
        if flatters
        else "transfer alone would not flatter: "
    )
    assert facts.masking.startswith(
        f"whether gradients are masked was not asked; {said}{better} images fool only the source "
        f"they were made on, {worse} only the file, of {total} (p = "
    )
    assert (facts.transfer.num_correct, facts.transfer.num_total) == (better + both, total)
    assert (facts.source.num_correct, facts.source.num_total) == (worse + both, total)


@pytest.mark.parametrize("flatters", [True, False])
@pytest.mark.parametrize(
    ("validity", "is_masked", "said"),
    [
        ([row("black_box", "not_run"), row("noise", "alarm")], False, "whether .* was not asked; "),
        (
            [row("black_box", "passed"), row("transfer", "not_run")],
            False,
            "no sign of masked gradients: Square broke no more than chance",
        ),
        (
            [row("black_box", "passed"), row("transfer", "passed")],
            False,
            "no sign of masked gradients: Square and transferred images broke no more than chance",
        ),
        (
            [row("black_box", "alarm"), row("transfer", "passed")],
            True,
            "gradients are masked: Square alone broke 3 of 40 images, 20 of which stood against ",
        ),
        (
            [row("black_box", "passed"), row("transfer", "alarm")],
            True,
            "gradients are masked: transferred images alone broke 3 of 40 images",
        ),
    ],
)
def test_gradients_are_masked_if_attacks_without_them_find_more(
    monkeypatch, validity, is_masked, said, flatters
):
    """Which the validity checks say, whatever transfer alone would."""
    facts = described(monkeypatch, better=20 if flatters else 0, worse=0, validity=validity)
    assert (facts.gradients_are_masked, facts.transfer_flatters) == (is_masked, flatters)
    assert re.match(said, facts.masking)


@pytest.mark.parametrize(("twin", "through"), [(True, "twin"), (False, "source")])
def test_through_what_it_was_attacked_is_said(monkeypatch, twin, through):
    facts = described(monkeypatch, better=0, worse=0, twin=twin)
    assert (facts.attacked_through, facts.twin) == (through, "it is alike")


@pytest.mark.parametrize("missing", ["source", "transfer"])
def test_what_was_not_asked_is_not_answered(missing):
    facts = describe_artefact(
        Twin(module=None, agreement=None, reason="why"),
        None if missing == "source" else (lambda x_NCHW: x_NCHW),
        images(),
        threat=THREAT,
        stands_transfer_N=None if missing == "transfer" else torch.ones(40, dtype=torch.bool),
        validity=[row("black_box", "alarm")],
    )
    assert (facts.transfer, facts.source, facts.transfer_flatters) == (None, None, False)
    assert facts.gradients_are_masked
    assert facts.masking.endswith("; no images were made on a source")


def test_the_source_is_attacked_as_transfer_does(make_trained):
    """And must be right on the clean image to withstand the other."""
    network, x_NCHW, y_N = make_trained(40)
    keys_N = torch.arange(40)
    batch = SimpleNamespace(x_NCHW=x_NCHW, y_N=y_N, keys_N=keys_N)
    strong = ThreatModel(epsilon_pixels=64 / 255)
    with torch.no_grad():
        right_N = network(x_NCHW).argmax(dim=1) == y_N
    stands = [
        artefact._stands(network, batch, threat=ThreatModel(epsilon_pixels=epsilon))
        for epsilon in (1e-6, 16 / 255, strong.epsilon_pixels)
    ]
    assert torch.equal(stands[0], right_N)
    assert stands[0].sum() > stands[1].sum() >= stands[2].sum()


def test_memory_that_ends_is_not_said_to_be_the_file(file_of, monkeypatch):
    """Another machine would find its twin, and attack it harder."""

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 8 GiB")

    monkeypatch.setattr(artefact, "differentiable_twin", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        checked_twin(file_of(), [images()])

"""What ranks share, seen from one of them: batches, statistics, wishes, errors.

`Ranks` are stood in for, so that no second process is needed; those that meet are in
tests/workflow/test_ranks.py.
"""

import copy
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compressor import trainer, training_step, verification_workflow
from compressor.architectures.shared_batch_norm import SharedBatchNorm2d, average_statistics
from compressor.augmentation import Augmentation
from compressor.batch_groups import BatchGroups
from compressor.checkpoint import TrainState
from compressor.data import Batch, load_training_data, training_batches
from compressor.errors import (
    BudgetSpentError,
    DataError,
    TeacherError,
    TerminatedRunError,
)
from compressor.image_decoding import ImageArray
from compressor.image_storage import StreamedImages
from compressor.interruption import StopWish
from compressor.methods.protocol import StepResult
from compressor.networks import NetworkSpec, build_classifier
from compressor.not_finite import explain_loss
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import Ranks
from compressor.recipe import DataRecipe
from compressor.recipe_file import parse_recipe
from compressor.training_preparation import refuse_small_batches
from compressor.verification import verification

CPU = torch.device("cpu")
SPEC = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8), width=0.5)
NOT_YET = TrainState(step=0, epoch=0, batch_in_epoch=0, method_state=None)


def recipe_with(**training):
    return parse_recipe(
        {
            "name": "shared",
            "data": {"source": "digits", "validation_size": 100},
            "student": {"architecture": "tiny"},
            "method": {"name": "cross_entropy"},
            "training": training,
        },
        origin="the test",
    )


def test_shards_make_up_the_batch():
    data = load_training_data(
        DataRecipe(source="digits", validation_size=100),
        seed=0,
        settings=PerformanceSettings(),
        device=CPU,
    )
    augment = Augmentation(crop_padding_pixels=1, horizontal_flip=True)
    asked = {"batch_size": 101, "seed": 3, "epoch": 1, "augment": augment}
    shares = [
        training_batches(data.train, **asked, ranks=Ranks(rank=rank, num_ranks=2))
        for rank in range(2)
    ]
    for whole, *parts in zip(training_batches(data.train, **asked), *shares, strict=True):
        for name in ("x_NCHW", "y_N", "index_N", "keys_N"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name)), name
        assert all(part.num_images == whole.num_images for part in parts)
        assert all(torch.equal(part.key, whole.key) for part in parts)


def test_a_rank_may_have_no_image_of_a_streamed_batch():
    images = ImageArray(images_NCHW=torch.zeros(5, 3, 8, 8, dtype=torch.uint8).numpy())
    stream = StreamedImages(images=images, num_workers=0, device=CPU)
    positions = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)]
    shapes = [tuple(batch.shape) for batch in stream.batches(positions)]
    assert shapes == [(2, 3, 8, 8), (0, 3, 8, 8)]


@pytest.mark.parametrize(
    ("batch_norm", "num_ranks", "batch_size", "better"),
    [
        ("own_images", 2, 399, 400),
        ("own_images", 2, 3, 5),
        ("own_images", 1, 399, None),
        ("whole_batch", 2, 399, None),
        ("whole_batch", 2, 1198, 1199),
    ],
)
def test_every_rank_has_two_images_where_it_normalises_by_its_own(
    batch_norm, num_ranks, batch_size, better
):
    recipe = recipe_with(batch_norm=batch_norm, batch_size=batch_size)
    data = SimpleNamespace(train=SimpleNamespace(num_images=1199))
    if better is None:
        refuse_small_batches(recipe, data, num_ranks=num_ranks)
        return
    with pytest.raises(DataError, match=rf"set training\.batch_size = {better}$"):
        refuse_small_batches(recipe, data, num_ranks=num_ranks)


def test_shared_statistics_of_bfloat16_are_float32():
    x_NCHW = 100 + torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, shared = nn.BatchNorm2d(3), SharedBatchNorm2d(nn.BatchNorm2d(3), Ranks())
    x_NCHW = x_NCHW.bfloat16()
    expected = plain(x_NCHW.float())
    torch.testing.assert_close(shared(x_NCHW).float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(shared.running_var, plain.running_var, rtol=1e-4, atol=1e-5)


class TwiceTheSame(Ranks):
    """Ranks, two of which hold the same and the others zeros."""

    def sum_in_place(self, values):
        return values.mul_(2)


def test_statistics_of_own_images_are_averaged():
    network = build_classifier(SPEC, seed=0)
    layers = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.running_mean.fill_(3.0)
        layer.running_var.fill_(5.0)
    average_statistics(network, TwiceTheSame(num_ranks=2))
    assert all(bool((layer.running_mean == 3.0).all()) for layer in layers)
    average_statistics(network, TwiceTheSame(num_ranks=4))
    assert all(bool((layer.running_mean == 1.5).all()) for layer in layers)
    assert all(bool((layer.running_var == 2.5).all()) for layer in layers)


@pytest.mark.parametrize(
    ("batch_norm", "is_averaged"), [("own_images", True), ("whole_batch", False)]
)
def test_they_are_averaged_where_each_has_its_own(monkeypatch, batch_norm, is_averaged):
    asked, network = [], nn.Linear(1, 1)
    monkeypatch.setattr(training_step, "average_statistics", lambda *_: asked.append(1))
    result = StepResult(loss=network(torch.ones(1, 1)).sum(), logged={"loss_nats": 0.0})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    training = SimpleNamespace(
        tensors=SimpleNamespace(optimizer=optimizer, average=None),
        recipe=recipe_with(batch_norm=batch_norm),
        num_steps=9,
        groups=BatchGroups(size=1, num_batches=9),
        fraction_before=0.0,
        ranks=Ranks(),
        method=SimpleNamespace(step=lambda *_: (result, None)),
        student=SimpleNamespace(network=network),
    )
    training_step.take_step(training, None, NOT_YET)
    assert bool(asked) is is_averaged


class OneWasStopped(Ranks):
    """Another rank was sent a signal."""

    def largest(self, number):
        return max(number, int(signal.SIGTERM))


def test_a_wish_of_any_rank_stops_all():
    training = SimpleNamespace(
        ranks=OneWasStopped(rank=1, num_ranks=2), stop=StopWish(), num_steps=9, resume_command="x"
    )
    state = TrainState(step=1, epoch=0, batch_in_epoch=1, method_state=None)
    with pytest.raises(TerminatedRunError):
        trainer._stop_if_wished(training, state)


class OneIsOutOfTime(Ranks):
    """Another rank has spent its budget."""

    def gather(self, value):
        return [value, ([], BudgetSpentError("spent"))]


def test_an_error_of_any_rank_ends_all():
    with pytest.raises(BudgetSpentError):
        verification._attack_together([], None, None, OneIsOutOfTime(rank=0, num_ranks=2))


class AnotherSawTwo(Ranks):
    """Another rank found two answers that are no numbers."""

    def largest(self, number):
        return max(number, 2)


def test_a_teacher_that_failed_on_another_rank_is_named():
    healthy_here = SimpleNamespace(role="clean", name="t", num_not_finite=lambda: 0)
    batch = Batch(
        x_NCHW=torch.rand(3, 1, 8, 8),
        y_N=torch.arange(3),
        index_N=torch.arange(3),
        keys_N=torch.arange(3),
    )
    error = explain_loss(
        {"loss_nats": float("nan")},
        batch,
        step=1,
        teachers=[healthy_here],
        of_method={},
        ranks=AnotherSawTwo(rank=0, num_ranks=2),
        last_good="none yet",
    )
    assert isinstance(error, TeacherError)
    assert "2 images" in str(error)


class Uncopied:
    """As a process group: of this process, not of a copy."""

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle")


def test_a_layer_whose_ranks_have_a_group_of_hosts_can_be_copied():
    """Of several GPUs the hosts have one; validation copies the network."""
    ranks = Ranks(rank=0, num_ranks=2, control=Uncopied())
    layer = copy.deepcopy(SharedBatchNorm2d(torch.nn.BatchNorm2d(3), ranks))
    assert layer._ranks is ranks


class OneOfTwo(Ranks):
    """One of two, alone; notes what it was asked to do with the other."""

    def __init__(self, rank):
        super().__init__(rank=rank, num_ranks=2)
        object.__setattr__(self, "said", [])

    def gather(self, value):
        self.said.append("gather")
        return [value, OF_THE_OTHER]

    def wait(self):
        self.said.append("wait")


OF_THE_OTHER = ("of the other",)


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_waits_for_the_report_of_the_first(monkeypatch, rank):
    """Checks and curves may take longer than ranks wait for each other; nothing is lost by it."""
    ranks, kept = OneOfTwo(rank), []
    journal = SimpleNamespace(
        outcomes=("own",), absorb=kept.extend, remove=lambda: ranks.said.append("remove")
    )
    prepared = SimpleNamespace(
        journal=lambda _: journal, subject=lambda: nullcontext("subject"), split=None, plan=None
    )
    found = SimpleNamespace(is_complete=True)
    monkeypatch.setattr(verification_workflow, "attack_chunks", lambda *_, **__: [found])
    monkeypatch.setattr(
        verification_workflow,
        "conclude",
        lambda *_, **__: ranks.said.append("report") or "written",
    )
    nothing = {"observe": lambda _: None, "tell": lambda _: None}
    written = verification_workflow._verify(prepared, ranks, **nothing)
    assert ranks.said == ["gather", "wait", *(["report"] if rank == 0 else []), "remove"]
    assert kept == (["own", "of the other"] if rank == 0 else [])
    assert written == ("written" if rank == 0 else None)

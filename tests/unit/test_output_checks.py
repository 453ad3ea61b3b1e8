"""Output checks at their thresholds, and that they leave no trace."""

import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import grad

from compressor.threat import ThreatModel
from compressor.validity.output_checks import NUM_IMAGES, OUTPUT_CHECKS, output_checks

WEIGHT = torch.randn(4, 192, generator=torch.Generator().manual_seed(5))


def linear(x_NCHW):
    return x_NCHW.flatten(1) @ WEIGHT.T


def rows_of(model, x, threat):
    rows = output_checks(model, x, threat=threat)
    assert [row.name for row in rows] == [check.name for check in OUTPUT_CHECKS]
    return {row.name: row for row in rows}


def status(model, x, threat, name):
    return rows_of(model, x, threat)[name].status


def test_output_checks_pass_a_plain_function(make_images, threat):
    x, _ = make_images(70)
    rows = rows_of(linear, x, threat)
    assert {row.status for row in rows.values()} == {"passed"}
    assert {row.advice for row in rows.values()} == {""}
    assert rows["input_range"].found.endswith(f"in {NUM_IMAGES} images")


@pytest.mark.parametrize(
    ("value", "expected", "kind"),
    [
        (0.0, "passed", "0 to"),
        (1.0, "passed", "to 1 in"),
        (-0.001, "alarm", "normalised"),
        (1.001, "alarm", "1.001"),
        (255.0, "alarm", "8-bit"),
        (float("nan"), "alarm", "not finite"),
        (float("inf"), "alarm", "not finite"),
    ],
)
def test_input_range(*, value, expected, kind, make_images, threat):
    x, _ = make_images(4)
    x[1, 2, 3, 4] = value
    row = rows_of(linear, x, threat)["input_range"]
    assert row.status == expected
    assert kind in row.found


@pytest.mark.parametrize(
    ("norm", "epsilon", "expected"),
    [
        ("linf", 0.4 / 255, "alarm"),
        ("linf", 0.6 / 255, "passed"),
        ("linf", 0.5, "passed"),
        ("linf", 0.51, "alarm"),
        ("linf", 8.0, "alarm"),
        ("l2", 0.4 / 255, "alarm"),
        ("l2", 0.5, "passed"),
        ("l2", 13.8, "passed"),  # the diagonal of 3x8x8 is 13.86
        ("l2", 13.9, "alarm"),
    ],
)
def test_epsilon_units(norm, epsilon, expected, make_images):
    threat = ThreatModel(norm=norm, epsilon_pixels=epsilon)
    assert status(linear, make_images(4)[0], threat, "epsilon_units") == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite_outputs_counts_images(value, make_images, threat):
    def model(x_NCHW):
        logits = linear(x_NCHW)
        return torch.where((x_NCHW[:, 0, 0, 0] < 0.5)[:, None], value, logits)

    x, _ = make_images(20)
    rows = rows_of(model, x, threat)
    num_bad = int((x[:, 0, 0, 0] < 0.5).sum())
    assert 0 < num_bad < 20
    assert rows["finite_outputs"].found.startswith(f"{num_bad} of 20 images")
    assert {name for name, row in rows.items() if row.status == "alarm"} == {"finite_outputs"}


def test_probabilities_need_every_row(make_images, threat):
    def model(x_NCHW):
        p = linear(x_NCHW).softmax(dim=1)
        return torch.where((x_NCHW[:, 0, 0, 0] < 0.1)[:, None], 2 * p, p)

    x, _ = make_images(20)
    x[:, 0, 0, 0] += 0.1
    x = x.clamp(0, 1)
    assert status(model, x, threat, "probabilities") == "alarm"
    x[7, 0, 0, 0] = 0
    row = rows_of(model, x, threat)["probabilities"]
    assert row.status == "passed"
    assert row.found == "19 of 20 rows are probabilities"


def test_log_probabilities_are_told_from_shifted_logits(make_images, threat):
    x, _ = make_images(4)
    head = nn.LogSoftmax(dim=1)
    assert status(lambda x: head(linear(x)), x, threat, "log_probabilities") == "alarm"
    assert status(lambda x: head(linear(x)) + 0.01, x, threat, "log_probabilities") == "passed"


def with_autograd_grad(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(linear(x).square().sum(), x)[0].flatten(1)[:, :4]


def with_imported_grad(x):
    x = x.detach().requires_grad_()
    return grad(linear(x).square().sum(), x)[0].flatten(1)[:, :4]


def with_backward(x):
    x = x.detach().requires_grad_()
    linear(x).square().sum().backward()
    return x.grad.flatten(1)[:, :4]


@pytest.mark.parametrize("model", [with_autograd_grad, with_imported_grad, with_backward])
def test_dynamic_model_is_noticed_and_explains_the_rest(model, make_images, threat):
    rows = rows_of(model, make_images(4)[0], threat)
    assert {name for name, row in rows.items() if row.status == "alarm"} == {"dynamic_model"}
    for name in ("random_outputs", "batch_dependence"):
        assert rows[name].status == "not_run"
        assert rows[name].advice == "explained by dynamic_model"


def test_dynamic_model_is_judged_model_by_model_and_keeps_the_trace_function(make_images, threat):
    calls = []

    def trace(*args):
        calls.append(args[1])

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert status(with_backward, make_images(4)[0], threat, "dynamic_model") == "alarm"
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert calls
    assert status(linear, make_images(4)[0], threat, "dynamic_model") == "passed"


def drifting(size):
    """Each pass gives logits that are larger by this share of their spread."""
    count = 0

    def model(x_NCHW):
        nonlocal count
        count += 1
        logits = torch.tensor([0.0, 1.0, 2.0, 10.0]).expand(len(x_NCHW), 4)
        return logits + 10 * size * count

    return model


@pytest.mark.parametrize(("size", "expected"), [(2e-6, "passed"), (1e-4, "alarm")])
def test_random_outputs_allow_rounding(size, expected, make_images, threat):
    rows = rows_of(drifting(size), make_images(4)[0], threat)
    assert rows["random_outputs"].status == expected
    if expected == "alarm":
        assert rows["batch_dependence"].advice == "explained by random_outputs"


@pytest.mark.parametrize(("size", "expected"), [(1e-5, "passed"), (1e-3, "alarm")])
def test_batch_dependence_allows_rounding(size, expected, make_images, threat):
    def model(x_NCHW):
        return torch.tensor([0.0, 1.0, 2.0, 10.0]).expand(len(x_NCHW), 4) + size * len(x_NCHW)

    assert status(model, make_images(16)[0], threat, "batch_dependence") == expected


def rounding(x_NCHW, *, step):
    """Logits of spread 3 that jump by up to 50 steps at a last bit, of pixels or of a sum."""
    summed = linear(x_NCHW) * (1 + 1e-7 * len(x_NCHW))  # in another order in another batch
    return (summed * 1e6).floor() % 50 * step + torch.arange(4.0)


def test_batch_dependence_allows_the_jumps_of_a_model_that_rounds(make_images, threat):
    row = rows_of(partial(rounding, step=0.001), make_images(16)[0], threat)["batch_dependence"]
    assert row.status == "passed"
    assert "last bits of the pixels" in row.found


def test_batch_dependence_of_a_model_that_rounds(make_images, threat):
    def model(x_NCHW):
        return rounding(x_NCHW, step=0.001) * (1.1 if len(x_NCHW) == 16 else 1)

    assert status(model, make_images(16)[0], threat, "batch_dependence") == "alarm"


def test_batch_dependence_is_not_excused_by_large_jumps(make_images, threat):
    model = partial(rounding, step=0.05)
    assert status(model, make_images(16)[0], threat, "batch_dependence") == "alarm"


def test_batch_dependence_only_of_a_single_image(make_images, threat):
    def model(x_NCHW):
        return linear(x_NCHW) * (0.5 if len(x_NCHW) == 1 else 1)

    assert status(model, make_images(16)[0], threat, "batch_dependence") == "alarm"


def test_batch_dependence_of_a_batchnorm_that_refuses_one_image(make_images, threat):
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten()).train()
    network[1].bias.data += torch.arange(4.0)
    row = rows_of(network, make_images(16)[0], threat)["batch_dependence"]
    assert row.status == "alarm"
    assert "refused" in row.found


def test_batch_dependence_needs_two_images(make_images, threat):
    assert status(linear, make_images(1)[0], threat, "batch_dependence") == "not_run"


def test_constant_model_is_neither_random_nor_dependent(make_images, threat):
    rows = rows_of(lambda x: torch.zeros(len(x), 4), make_images(4)[0], threat)
    assert rows["random_outputs"].status == rows["batch_dependence"].status == "passed"


def test_output_checks_leave_running_statistics_alone(make_tiny, make_images, threat):
    network = make_tiny().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    output_checks(network, make_images(16)[0], threat=threat)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network.training

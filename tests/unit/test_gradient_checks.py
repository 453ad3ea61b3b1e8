"""Gradient checks on models whose gradients are known."""

import pytest
import torch

from compressor.validity.gradient_checks import (
    GRADIENT_CHECKS,
    NOISE_PIXELS,
    NUM_IMAGES,
    gradient_checks,
)

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 1.0, 0.25]])


def linear(x_NCHW):
    return x_NCHW.flatten(1) @ WEIGHT.T


def images(num_images):
    """All are of class 0, by a logit or more, with the index in the last pixel."""
    x = torch.zeros(num_images, 3, 1, 1)
    x[:, 0] = 0.9
    x[:, 2, 0, 0] = 0.1 + 0.5 * torch.arange(num_images) / num_images
    return x, torch.zeros(num_images, dtype=torch.long)


def rows_of(model, x, y):
    rows = gradient_checks(model, x, y, keys_N=torch.arange(len(x)))
    assert [row.name for row in rows] == [check.name for check in GRADIENT_CHECKS]
    return {row.name: row for row in rows}


def hidden_for(num_hidden, num_images, hide):
    """`hide` changes the logits of the first images."""
    limit = 0.1 + 0.5 * (num_hidden - 0.5) / num_images - NOISE_PIXELS

    def model(x_NCHW):
        is_hidden = x_NCHW[:, 2, :, 0] < limit
        return torch.where(is_hidden, hide(linear(x_NCHW)), linear(x_NCHW))

    return model


def test_gradient_checks_pass_a_linear_model():
    rows = rows_of(linear, *images(100))
    assert {row.status for row in rows.values()} == {"passed"}
    # The margin's gradient is the difference of two rows: |-2| + |3| + |-0.25|.
    assert "margin 5.2, 5.2, 5.2" in rows["saturated_loss"].found


@pytest.mark.parametrize(
    ("num_hidden", "num_images", "expected"),
    [(0, 100, "passed"), (1, 100, "passed"), (2, 100, "alarm"), (1, 99, "alarm"), (9, 9, "alarm")],
)
def test_zero_gradient_alarms_above_one_percent(num_hidden, num_images, expected):
    model = hidden_for(num_hidden, num_images, torch.Tensor.detach)
    row = rows_of(model, *images(num_images))["zero_gradient"]
    assert row.status == expected
    assert f"{num_hidden} of {num_images} images" in row.found


@pytest.mark.parametrize(
    ("num_hidden", "num_images", "expected"),
    [(0, 100, "passed"), (1, 100, "passed"), (2, 100, "alarm"), (9, 9, "alarm")],
)
def test_saturated_loss_alarms_above_one_percent(num_hidden, num_images, expected):
    model = hidden_for(num_hidden, num_images, lambda logits: 1e4 * logits)
    rows = rows_of(model, *images(num_images))
    assert rows["zero_gradient"].status == "passed"
    assert rows["saturated_loss"].status == expected
    assert f"{num_hidden} of {num_images} images" in rows["saturated_loss"].found


@pytest.mark.parametrize(
    "model",
    [
        lambda x: linear((255 * x).round() / 255),
        lambda x: linear(x.detach()),
        lambda x: torch.tensor(linear(x.detach()).tolist()),
    ],
    ids=["rounded", "detached", "left torch"],
)
def test_zero_gradient_of_hidden_inputs(model):
    rows = rows_of(model, *images(20))
    assert rows["zero_gradient"].status == "alarm"
    assert rows["saturated_loss"].status == "passed"  # it is not the loss that is flat


def test_finite_gradients_count_images_and_explain_the_rest():
    def model(x_NCHW):
        is_bad = x_NCHW[:, 2:, 0, 0] < 0.2
        # The root of 0 has an infinite slope, and 0 times it is not a number.
        root = torch.where(is_bad, 0 * x_NCHW[:, :1, 0, 0], 1.0).sqrt()
        return linear(x_NCHW) + root

    x, y = images(10)
    rows = rows_of(model, x, y)
    num_bad = int((x[:, 2, 0, 0] < 0.2).sum())
    assert rows["finite_gradients"].status == "alarm"
    assert rows["finite_gradients"].found.startswith(f"{num_bad} of 10 images")
    for name in ("zero_gradient", "saturated_loss"):
        assert rows[name].status == "not_run"
        assert rows[name].advice == "explained by finite_gradients"


def test_gradient_checks_use_the_first_correct_images():
    x, y = images(NUM_IMAGES + 50)
    y[:20] = 1
    assert "0 of 128 images" in rows_of(linear, x, y)["zero_gradient"].found
    assert "0 of 40 images" in rows_of(linear, x[:60], y[:60])["zero_gradient"].found


def test_gradient_checks_need_a_correct_image():
    x, y = images(5)
    rows = rows_of(linear, x, 1 - y)
    assert {row.status for row in rows.values()} == {"not_run"}
    assert {row.advice for row in rows.values()} == {"no image is answered correctly"}


def test_gradient_checks_look_next_to_the_image():
    seen = []

    def model(x_NCHW):
        seen.append(x_NCHW.detach().clone())
        return linear(x_NCHW)

    x, y = images(20)
    rows_of(model, x, y)
    for point in seen[1:]:
        distance = (point - x).abs()
        assert 0 < float(distance.max()) <= NOISE_PIXELS + 1e-7
        assert float(point.min()) >= 0
        assert torch.equal(point, seen[1])


def test_gradient_checks_leave_no_trace(make_tiny, make_images):
    network = make_tiny().eval()
    x, _ = make_images()
    with torch.no_grad():
        y = network(x).argmax(dim=1)
        rows_of(network, x, y)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert x.grad is None
    assert not x.requires_grad

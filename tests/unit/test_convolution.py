"""Another order of work, the same convolution: answers, gradients, names."""

import copy

import pytest
import torch
from torch import Tensor, nn

from compressor.convolution import ArrangedConv2d, arrange_convolutions

BFLOAT16 = 2**-8
"""Relative rounding of one number."""


def pair(*sizes: int, num_groups: int = 1, **options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    in_channels, out_channels, kernel = sizes
    plain = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, groups=num_groups, **options)
    )
    plain.to(memory_format=torch.channels_last)
    arranged = copy.deepcopy(plain)
    arrange_convolutions(arranged)
    return plain, arranged


def answer_and_gradients(network: nn.Module, x_NCHW: Tensor, *, autocast: bool) -> list[Tensor]:
    x_NCHW = x_NCHW.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y_NCHW = network(x_NCHW)
    y_NCHW.float().square().sum().backward()
    return [y_NCHW.detach(), x_NCHW.grad, *(p.grad for p in network.parameters())]


CASES = {  # in, out, kernel, stride, size of the images, number of them
    "stage of 4 x 4": (96, 192, 3, 1, 4, 32),
    "stride 2": (64, 192, 3, 2, 8, 32),
    "odd width, stride 2": (64, 192, 3, 2, 7, 32),
    "kernel of 5": (64, 192, 5, 1, 3, 24),
    "stride 3, one wide image": (48, 96, 3, 3, 5, 16),
    "seven images": (64, 192, 3, 1, 4, 7),
    "few channels": (8, 16, 3, 1, 4, 16),
    "one pixel": (16, 64, 3, 1, 1, 8),
    "1 x 1": (64, 192, 1, 1, 4, 16),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_and_gradients_are_those_of_the_plain_convolution(case):
    in_channels, out_channels, kernel, stride, size, num_images = CASES[case]
    plain, arranged = pair(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=True
    )
    x = torch.rand(num_images, in_channels, size, size)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = answer_and_gradients(plain, x, autocast=True)
    found = answer_and_gradients(arranged, x, autocast=True)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        torch.testing.assert_close(b, a, rtol=2 * BFLOAT16, atol=BFLOAT16 * float(a.abs().max()))


def test_narrow_images_of_many_channels_lie_side_by_side(monkeypatch):
    """Seen by the widths that reach the convolution: 16 images, 4 pixels and a zero each."""
    _, arranged = pair(16, 192, 3, padding=1)
    widths = []
    original = torch.nn.functional.conv2d
    monkeypatch.setattr(
        "torch.nn.functional.conv2d", lambda x, *rest: widths.append(x.shape) or original(x, *rest)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arranged(torch.rand(32, 16, 4, 4))
        arranged(torch.rand(32, 16, 5, 5))
        arranged(torch.rand(31, 16, 4, 4))
        arranged[0].weight.requires_grad = False
        arranged(torch.rand(32, 16, 5, 5))
    arranged(torch.rand(32, 16, 4, 4))
    shapes = [tuple(shape) for shape in widths]
    assert shapes == [
        (2, 16, 4, 80),
        (2, 16, 5, 96),  # the gradient of the weights gains most
        (31, 16, 4, 4),
        (32, 16, 5, 5),
        (32, 16, 4, 4),
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_strided_depthwise_convolution_has_gradients_of_float32(bias):
    """Of its own bfloat16 answer, to the last bits of float32."""
    plain, arranged = pair(32, 32, 3, num_groups=32, stride=2, padding=1, bias=bias)
    x = torch.rand(4, 32, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = plain(x)
    found = answer_and_gradients(arranged, x, autocast=True)
    assert torch.equal(found[0], answer)
    x.requires_grad_()
    plain(x).backward((2 * answer.float()).bfloat16().float())
    for a, b in zip([x, *plain.parameters()], found[1:], strict=True):
        torch.testing.assert_close(b, a.grad, rtol=1e-5, atol=1e-5)


def test_without_autocast_it_is_the_plain_convolution_to_the_last_bit():
    plain, arranged = pair(16, 192, 3, padding=1)
    x = torch.rand(16, 16, 4, 4)
    expected = answer_and_gradients(plain, x, autocast=False)
    found = answer_and_gradients(arranged, x, autocast=False)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 0},
        {"padding": 1, "dilation": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same"},
        {"padding": (1, 0)},
        {"padding": 1, "num_groups": 2},
        {"padding": 1, "stride": (1, 2)},
    ],
    ids=str,
)
def test_other_forms_stay_as_they_are(options):
    plain, arranged = pair(16, 192, 3, **options)
    x = torch.rand(16, 16, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain(x), arranged(x))


def test_parameters_and_their_names_stay():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1, bias=False)))
    before = dict(plain.named_parameters())
    arrange_convolutions(plain)
    after = dict(plain.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert [type(m) for m in plain.modules() if isinstance(m, nn.Conv2d)] == [ArrangedConv2d] * 2

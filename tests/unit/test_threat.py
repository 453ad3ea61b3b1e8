"""The threat model: projection order, and pixel quantities in and out of texts."""

import pytest
import torch

from compressor.threat import ThreatModel, format_pixels, parse_fraction, parse_threat


@pytest.mark.parametrize(
    ("adv", "in_ball", "allowed"),
    [
        (0.50, 0.50, 0.50),
        (0.90, 0.60, 0.60),
        (0.10, 0.40, 0.40),
    ],
)
def test_project_inside_the_cube(adv, in_ball, allowed):
    threat, x = ThreatModel(epsilon_pixels=0.1), torch.tensor([0.5]).double()
    adv = torch.tensor([adv]).double()
    assert float(threat.project_to_ball(adv, x)) == pytest.approx(in_ball)
    assert float(threat.project(adv, x)) == pytest.approx(allowed)


@pytest.mark.parametrize(
    ("x", "adv", "in_ball", "allowed"), [(0.95, 2.0, 1.05, 1.0), (0.02, -3.0, -0.08, 0.0)]
)
def test_project_at_the_face_of_the_cube(x, adv, in_ball, allowed):
    threat = ThreatModel(epsilon_pixels=0.1)
    x, adv = torch.tensor([x]).double(), torch.tensor([adv]).double()
    assert float(threat.project_to_ball(adv, x)) == pytest.approx(in_ball)
    assert float(threat.project(adv, x)) == pytest.approx(allowed)


def test_project_to_ball_first_then_to_the_cube():
    """They differ where the centre itself is outside: the pixels must be valid at the end."""
    threat = ThreatModel(epsilon_pixels=0.1)
    assert float(threat.project(torch.tensor([0.5]), torch.tensor([1.3]))) == 1.0


def test_project_is_idempotent_and_per_pixel():
    threat = ThreatModel(epsilon_pixels=0.1)
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    adv = x + torch.linspace(-1, 1, x.numel()).view_as(x)
    once = threat.project(adv, x)
    assert torch.equal(threat.project(once, x), once)
    assert float((once - x).abs().max()) <= 0.1 + 1e-7


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("8/255", 8 / 255),
        ("0.031", 0.031),
        (0.031, 0.031),
        (1, 1.0),
        ("1e-2", 0.01),
        (" 1 / 4", 0.25),
    ],
)
def test_parse_fraction(given, value):
    parsed = parse_fraction(given)
    assert parsed == value
    assert type(parsed) is float


@pytest.mark.parametrize("given", ["eight", "", "8/", "/255", "8/0", "1/2/3", True, False])
def test_parse_fraction_refuses(given):
    with pytest.raises(ValueError, match="is not a number"):
        parse_fraction(given)


@pytest.mark.parametrize(
    ("value", "text"),
    [(8 / 255, "8/255"), (2 / 255, "2/255"), (0.031, "0.031"), (1 / 255, "1/255"), (0.25, "0.25")],
)
def test_format_pixels(value, text):
    assert format_pixels(value) == text


@pytest.mark.parametrize("num_levels", range(1, 256))
def test_format_pixels_round_trip(num_levels):
    assert parse_fraction(format_pixels(num_levels / 255)) == num_levels / 255


def test_text_for_people():
    assert str(ThreatModel(epsilon_pixels=8 / 255)) == "linf 8/255"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_gives_a_step_that_is(norm, value):
    """Or an attack would leave its ball before a check could say what is wrong with the model."""
    gradient = torch.ones(2, 1, 2, 2)
    gradient[0, 0, 0, 0] = value
    step = ThreatModel(norm=norm, epsilon_pixels=0.1).steepest(gradient)
    assert step.isfinite().all()
    assert step[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("norm", "epsilon_pixels"),
    [
        ("linf", 8 / 255),
        ("linf", 1 / 255),
        ("linf", 0.031),
        ("linf", 0.5 / 255),
        ("linf", 0.0123456789),
        ("l2", 0.5),
        ("l2", 128 / 255),
        ("l2", 1e-7),
    ],
)
def test_a_threat_model_can_be_read_from_what_it_says(norm, epsilon_pixels):
    """With the digits that it shows."""
    threat = ThreatModel(norm=norm, epsilon_pixels=epsilon_pixels)
    read = parse_threat(str(threat))
    assert read.norm == norm
    assert read.epsilon_pixels == pytest.approx(epsilon_pixels, rel=1e-5)
    assert str(read) == str(threat)
    assert parse_threat(str(read)) == read


@pytest.mark.parametrize(
    "text",
    ["", "linf", "8/255", "l1 8/255", "Linf 8/255", "linf eight", "linf 8/0", "linf -8/255"]
    + ["linf 0", "linf nan", "linf inf", "l2 1e999", "linf 8/255 or so", "linf,8/255"],
)
def test_what_is_no_threat_model_is_refused(text):
    with pytest.raises(ValueError, match="not a number|no threat model"):
        parse_threat(text)

"""What the attacker may do: a norm and a radius in pixel units, and the projection onto both."""

from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["linf", "l2"]

_TINY = 1e-12  # keeps a direction of length 0 at 0; the value of the released AutoAttack


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """All images within `epsilon_pixels` of the original, pixels in [0, 1].

    The radius is measured over all pixels and channels: the largest change (`linf`), or the
    square root of the sum of squares (`l2`).
    """

    norm: Norm = "linf"
    epsilon_pixels: float

    def project(self, x_adv_NCHW: "Tensor", x_NCHW: "Tensor") -> "Tensor":
        """First the nearest point of the ball around `x_NCHW`, then of [0, 1]."""
        return self.project_to_ball(x_adv_NCHW, x_NCHW).clamp(0, 1)

    def project_to_ball(self, x_adv_NCHW: "Tensor", x_NCHW: "Tensor") -> "Tensor":
        """The nearest point of the ball; it may lie outside [0, 1]."""
        epsilon = self.epsilon_pixels
        if self.norm == "linf":
            return x_adv_NCHW.clamp(x_NCHW - epsilon, x_NCHW + epsilon)
        change = x_adv_NCHW - x_NCHW
        length = self.length(change).view(-1, 1, 1, 1)
        return x_NCHW + change / (length + _TINY) * length.clamp(max=epsilon)

    def steepest(self, gradient_NCHW: "Tensor") -> "Tensor":
        """The step of length 1 in this norm along which a linear function rises most.

        None where the gradient is not finite: an attack stays where it is, and that nothing can be
        concluded from it is for the validity checks to say.
        """
        if self.norm == "linf":
            return gradient_NCHW.sign()
        step_NCHW = gradient_NCHW / (self.length(gradient_NCHW).view(-1, 1, 1, 1) + _TINY)
        return step_NCHW.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def length(self, change_NCHW: "Tensor") -> "Tensor":
        """The norm of each change, [N], in pixel units."""
        flat = change_NCHW.flatten(1)
        return flat.abs().amax(dim=1) if self.norm == "linf" else (flat**2).sum(dim=1).sqrt()

    def contains(self, x_adv_NCHW: "Tensor", x_NCHW: "Tensor") -> "Tensor":
        """Whether each image is allowed, bool [N], with room for float32 rounding.

        1e-6 in L-infinity, a relative 1e-5 in L2. Not-a-number is outside.
        """
        slack = 1e-6 if self.norm == "linf" else 1e-5 * self.epsilon_pixels
        is_near = self.length(x_adv_NCHW - x_NCHW) <= self.epsilon_pixels + slack
        flat = x_adv_NCHW.flatten(1)
        return is_near & (flat.amin(dim=1) >= 0) & (flat.amax(dim=1) <= 1)

    def __str__(self) -> str:
        """For people: `linf 8/255`, `l2 0.5`."""
        if self.norm == "l2":
            return f"l2 {self.epsilon_pixels:g}"
        return f"{self.norm} {format_pixels(self.epsilon_pixels)}"


DEFAULT_THREAT = ThreatModel(epsilon_pixels=8 / 255)
"""Where nobody claims another; reports name it."""


def parse_threat(text: str) -> ThreatModel:
    """What `str` of a threat model says, as a threat model; a radius has the digits that it shows.

    Raises:
        ValueError: if the text is not of that form, or its radius not a positive number.
    """
    norm, _, radius = text.partition(" ")
    norms: dict[str, Norm] = {"linf": "linf", "l2": "l2"}
    if norm not in norms:
        raise ValueError(f'{text!r} is no threat model; write one as "linf 8/255" or "l2 0.5"')
    epsilon_pixels = parse_fraction(radius)
    if not (isfinite(epsilon_pixels) and epsilon_pixels > 0):
        raise ValueError(f"{text!r} is no threat model: its radius is {epsilon_pixels:g}")
    return ThreatModel(norm=norms[norm], epsilon_pixels=epsilon_pixels)


def parse_fraction(text: str | float) -> float:
    """`"8/255"`, `"0.031"` or 0.031 as a float.

    Raises:
        ValueError: if the text is neither a number nor a fraction of two.
    """
    try:
        if isinstance(text, str):
            top, slash, bottom = text.partition("/")
            return float(top) / float(bottom) if slash else float(top)
        if isinstance(text, int | float) and not isinstance(text, bool):
            return float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    raise ValueError(f'{text!r} is not a number; write a fraction as "8/255"')


def format_pixels(value: float) -> str:
    """A pixel quantity for people: in 255ths where it is a round number of them."""
    in_255 = Fraction(value * 255).limit_denominator(10)
    if abs(float(in_255) / 255 - value) < 1e-9 and in_255.denominator == 1:
        return f"{in_255}/255"
    return f"{value:g}"

"""What the attacker may do: a norm and a radius in pixel units, and the projection onto both."""

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["linf"]


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """All images within `epsilon_pixels` of the original, pixels in [0, 1]."""

    norm: Norm = "linf"
    epsilon_pixels: float

    def project(self, x_adv_NCHW: "Tensor", x_NCHW: "Tensor") -> "Tensor":
        """The nearest allowed image: first into the ball around `x_NCHW`, then into [0, 1]."""
        return self.project_to_ball(x_adv_NCHW, x_NCHW).clamp(0, 1)

    def project_to_ball(self, x_adv_NCHW: "Tensor", x_NCHW: "Tensor") -> "Tensor":
        """The nearest point of the ball; it may lie outside [0, 1]."""
        epsilon = self.epsilon_pixels
        return x_adv_NCHW.clamp(x_NCHW - epsilon, x_NCHW + epsilon)

    def __str__(self) -> str:
        """For people: `linf 8/255`."""
        return f"{self.norm} {format_pixels(self.epsilon_pixels)}"


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

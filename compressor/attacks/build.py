"""From the words of a recipe to attacks."""

from collections.abc import Mapping
from types import MappingProxyType

from compressor.attacks.margin import MarginPGD
from compressor.attacks.pgd import PGD
from compressor.attacks.protocol import Attack, Objective
from compressor.method_table import InnerAttackRecipe
from compressor.threat import ThreatModel

_PAPER_EPSILON_PIXELS = 8 / 255
_TRADES_STEP_PIXELS = 0.003
_SELECTION_STEPS = 20


def build_inner_attack(
    recipe: InnerAttackRecipe, *, threat: ThreatModel, objective: Objective
) -> PGD:
    """The attack inside training."""
    return PGD(
        threat=threat,
        step_size_pixels=recipe.resolved_step_size_pixels(threat.epsilon_pixels),
        num_steps=recipe.num_steps,
        start=recipe.start,
        objective=objective,
    )


def evaluation_attacks(threat: ThreatModel) -> Mapping[str, Attack]:
    """The white-box attacks that the distillation papers report.

    Parameters are those at 8/255, and steps keep their ratio to epsilon at any other radius, so
    that an attack never fails to reach the border of the ball.
    """
    scale = threat.epsilon_pixels / _PAPER_EPSILON_PIXELS
    fgsm = PGD(threat=threat, step_size_pixels=threat.epsilon_pixels, num_steps=1, start="zero")
    pgd_sat = PGD(threat=threat, step_size_pixels=scale * 2 / 255, num_steps=20)
    pgd_trades = PGD(threat=threat, step_size_pixels=scale * _TRADES_STEP_PIXELS, num_steps=20)
    cw_inf = MarginPGD(threat=threat, step_size_pixels=scale * 2 / 255, num_steps=30)
    return MappingProxyType(
        {"fgsm": fgsm, "pgd_sat": pgd_sat, "pgd_trades": pgd_trades, "cw_inf": cw_inf}
    )


def selection_attack(threat: ThreatModel, *, num_steps: int) -> PGD:
    """The PGD that the authors select checkpoints with: 20 steps of 0.003 at 8/255, uniform start.

    Fewer steps are longer ones, so that any number of them reaches as far.
    """
    scale = threat.epsilon_pixels / _PAPER_EPSILON_PIXELS * _SELECTION_STEPS / num_steps
    return PGD(threat=threat, step_size_pixels=scale * _TRADES_STEP_PIXELS, num_steps=num_steps)

"""The attacks of a verification, in order: which search, on which form of the model, on what.

`fast` and `compat` are two cascades of the same four attacks; see `compressor.attacks.compat`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from compressor.attacks.apgd import APGD
from compressor.attacks.build import evaluation_attacks
from compressor.attacks.compat import ReleasedSearch, ReleasedTargets
from compressor.attacks.draws import Draws, KeyedDraws, seeded_draws
from compressor.attacks.fab import FAB
from compressor.attacks.fixed import FixedAttack
from compressor.attacks.protocol import Attack, Model
from compressor.attacks.search import Search
from compressor.attacks.square import Square
from compressor.attacks.targeted import Targeted
from compressor.attacks.transfer import Transfer
from compressor.errors import UsageError
from compressor.losses import dlr, targeted_dlr
from compressor.randomness import child_keys
from compressor.threat import ThreatModel

Kind = Literal["white-box", "black-box", "transfer"]
Mode = Literal["fast", "compat"]
Form = Literal["float32", "search_dtype", "answer"]
"""Of a model: with BatchNorm folded, in float32 or in the number format that searches fast; or what
answers in the end, which has no gradient if it is a file."""

PAPER_ATTACKS = ("fgsm", "pgd_sat", "pgd_trades", "cw_inf")
AUTOATTACK = ("apgd_ce", "apgd_t", "fab_t", "square")
_DECIDES = "apgd_t"
"""What has to run in float32 on an image that is called robust."""
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"papers": PAPER_ATTACKS, "autoattack": AUTOATTACK}
)
ATTACK_NAMES = (*PAPER_ATTACKS, "transfer", "apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square")
"""All attacks, in the order in which they run: what breaks samples soonest comes first."""


_NUMBERS: Mapping[str, int] = MappingProxyType(
    {
        "fgsm": 0,
        "pgd_sat": 1,
        "pgd_trades": 2,
        "cw_inf": 3,
        "apgd_ce": 4,
        "apgd_dlr": 5,
        "apgd_t": 6,
        "fab_t": 7,
        "square": 8,
        "transfer": 9,
    }
)
"""Of the random numbers of each attack; another attack must not change those of the others."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One attack of the cascade."""

    name: str
    kind: Kind
    search: Search
    runs_on: Form | Literal["by_margin"]
    """The form of the model that is searched. `by_margin`: float32 for images that an attack has
    already driven near the decision, where fewer bits lose attacks that walk along it; the search's
    own number format for the others."""
    tries_all: bool = False
    """Tries every correct image, not only those that stand, so it has an accuracy of its own."""
    parameters: Mapping[str, float | int | str | bool]
    max_forwards: int
    max_backwards: int = 0
    """About how many passes an image costs that is never fooled; for the ETA."""

    def draws(self, x_NCHW: Tensor, *, keys_N: Tensor, seed: int) -> Draws:
        """Random numbers of this attack for these samples: each sample's own."""
        del x_NCHW, seed
        return KeyedDraws(keys_N=child_keys(keys_N, _NUMBERS[self.name]))


@dataclass(frozen=True, kw_only=True)
class CompatStage(Stage):
    """A stage that draws as the released code: one generator, seeded anew for each batch."""

    def draws(self, x_NCHW: Tensor, *, keys_N: Tensor, seed: int) -> Draws:
        """See the class."""
        del keys_N
        return seeded_draws(seed, x_NCHW)


def expand_names(names: Sequence[str]) -> tuple[str, ...]:
    """Attack names in the order in which they run; `papers` and `autoattack` are groups.

    Raises:
        UsageError: for a name that does not exist, or none at all.
    """
    wanted = {attack for name in names for attack in GROUPS.get(name, (name,))}
    unknown = sorted(wanted - set(ATTACK_NAMES))
    if unknown or not wanted:
        known = ", ".join([*GROUPS, *ATTACK_NAMES])
        raise UsageError(f"there is no attack {', '.join(unknown) or '(none named)'}; use {known}")
    return tuple(name for name in ATTACK_NAMES if name in wanted)


def with_transfer_late(names: Sequence[str]) -> tuple[str, ...]:
    """These attacks and `transfer`, after those with gradients and before those without.

    So what the gradients find by themselves can be told from what transfer adds.
    """
    rest = [name for name in names if name != "transfer"]
    black_box = [name for name in rest if name == "square"]
    return (*(name for name in rest if name != "square"), "transfer", *black_box)


def is_autoattack(names: Sequence[str]) -> bool:
    """Whether all four attacks of AutoAttack are among these."""
    return set(AUTOATTACK) <= set(names)


def protocol_of(names: Sequence[str], mode: Mode) -> str:
    """What the worst case over these attacks may be called."""
    if not is_autoattack(names):
        return f"worst of {', '.join(names)}"
    return "AutoAttack-style" if mode == "fast" else "AutoAttack (compat)"


def build_stages(
    names: Sequence[str],
    *,
    threat: ThreatModel,
    mode: Mode,
    batch_size: int,
    sources: Sequence[Model] = (),
) -> tuple[Stage, ...]:
    """The stages of these attacks, in the order of `names`.

    Args:
        names: see `expand_names`.
        threat: what the attacker may do.
        mode: of AutoAttack's four.
        batch_size: rows of one pass.
        sources: models from which `transfer` takes its images.

    Raises:
        UsageError: if there is nothing to transfer from.
    """
    papers = evaluation_attacks(threat)
    build = _fast if mode == "fast" else _compat
    stages = []
    # A faster format searches only where APGD-T in float32 decides: alone, its attacks are weaker.
    is_decided = _DECIDES in names
    for name in names:
        if name in papers:
            stages.append(_of_fixed_length(name, papers[name]))
        elif name == "transfer":
            stages.append(_transfer(threat, sources))
        else:
            stage = build(name, threat, batch_size)
            is_exact = is_decided or stage.runs_on == "answer"
            stages.append(stage if is_exact else replace(stage, runs_on="float32"))
    return tuple(stages)


def _of_fixed_length(name: str, attack: Attack) -> Stage:
    return Stage(
        name=name,
        kind="white-box",
        search=FixedAttack(attack=attack),
        runs_on="float32",
        tries_all=True,
        parameters=_parameters(attack),
        max_forwards=vars(attack)["num_steps"] + 1,
        max_backwards=vars(attack)["num_steps"],
    )


def _transfer(threat: ThreatModel, sources: Sequence[Model]) -> Stage:
    if not sources:
        raise UsageError(
            "there is nothing to transfer from: no teacher of the run could be found that has a "
            "gradient; leave `transfer` out, or put the teachers back where they were"
        )
    return Stage(
        name="transfer",
        kind="transfer",
        search=Transfer(attack=APGD(threat=threat, objective=dlr), sources=sources),
        runs_on="answer",
        parameters={"num_steps": 100, "num_sources": len(sources)},
        max_forwards=101 * len(sources),  # on the model itself; the sources' are not seen
    )


def _fast(name: str, threat: ThreatModel, batch_size: int) -> Stage:
    apgd_t = APGD(threat=threat, objective=targeted_dlr)
    searches: Mapping[str, Callable[[], Search]] = {
        "apgd_ce": lambda: APGD(threat=threat),
        "apgd_dlr": lambda: APGD(threat=threat, objective=dlr),
        "apgd_t": lambda: Targeted(attack=apgd_t, max_rows=batch_size),
        "fab_t": lambda: Targeted(attack=FAB(threat=threat), max_rows=batch_size),
        "square": lambda: Square(threat=threat),
    }
    # A sample is called robust only after APGD-T has run in float32.
    forms: Mapping[str, Form | Literal["by_margin"]] = {
        "apgd_ce": "search_dtype",
        "apgd_dlr": "search_dtype",
        "apgd_t": "float32",
        "fab_t": "by_margin",
        "square": "by_margin",
    }
    return Stage(
        name=name,
        kind="black-box" if name == "square" else "white-box",
        search=searches[name](),
        runs_on=forms[name],
        parameters=_PARAMETERS[name],
        max_forwards=_MAX_PASSES[name][0],
        max_backwards=_MAX_PASSES[name][1],
    )


def _compat(name: str, threat: ThreatModel, batch_size: int) -> Stage:
    del batch_size
    untargeted = {
        "apgd_ce": APGD(threat=threat, leaves_when_fooled=False),
        "apgd_dlr": APGD(threat=threat, objective=dlr, leaves_when_fooled=False),
    }
    apgd_t = APGD(threat=threat, objective=targeted_dlr, leaves_when_fooled=False)
    fab = FAB(threat=threat, stops_at_epsilon=False)
    square = Square(threat=threat, windows_reach_edge=False)
    if name in untargeted:
        attack = untargeted[name]
        search: Search = ReleasedSearch(attack=attack, num_passes_before=1, num_passes_after=0)
    elif name == "apgd_t":
        search = ReleasedTargets(attack=apgd_t, num_passes_before=1, num_passes_after=0)
    elif name == "fab_t":
        search = ReleasedTargets(attack=fab, num_passes_before=2, num_passes_after=1)
    else:
        search = ReleasedSearch(attack=square, num_passes_before=1, num_passes_after=1)
    return CompatStage(
        name=name,
        kind="black-box" if name == "square" else "white-box",
        search=search,
        runs_on="answer",
        parameters=_PARAMETERS[name],
        max_forwards=_MAX_PASSES[name][0],
        max_backwards=_MAX_PASSES[name][1],
    )


_PARAMETERS: Mapping[str, Mapping[str, float | int | str | bool]] = MappingProxyType(
    {
        "apgd_ce": {"num_steps": 100, "restarts": 1},
        "apgd_dlr": {"num_steps": 100, "restarts": 1},
        "apgd_t": {"num_steps": 100, "targets": 9},
        "fab_t": {"num_steps": 100, "targets": 9},
        "square": {"num_queries": 5000},
    }
)


_MAX_PASSES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "apgd_ce": (101, 101),
        "apgd_dlr": (101, 101),
        "apgd_t": (909, 909),
        "fab_t": (1800, 900),
        "square": (5003, 0),
    }
)
"""Forwards and backwards; see `Stage`."""


def _parameters(attack: object) -> dict[str, float | int | str | bool]:
    return {k: v for k, v in vars(attack).items() if isinstance(v, int | float | str)}

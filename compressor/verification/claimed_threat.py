"""Which attacker a target says that it withstands; nobody else may make him weaker unasked."""

from dataclasses import dataclass

from compressor.threat import DEFAULT_THREAT, ThreatModel, parse_threat
from compressor.verification.target import Target

THREAT_KEY = "robust_compress.threat"
"""In the model card of a file, with the text of a `ThreatModel`."""
_MAX_QUOTED = 60


@dataclass(frozen=True, kw_only=True)
class ClaimedThreat:
    """The attacker, or why it is not known."""

    threat: ThreatModel | None
    problem: str = ""
    """In words, where there is no threat."""


def claimed_threat(target: Target) -> ClaimedThreat:
    """That of the run, or of the model card of a file, which must be the same if both are known.

    Weights without a run claim nothing, and are tried within the default.
    """
    of_run = target.recipe.threat.build() if target.recipe is not None else None
    if target.file is None:
        return ClaimedThreat(threat=of_run or DEFAULT_THREAT)
    card = target.file.metadata.get(THREAT_KEY)
    if card is None:
        problem = "" if of_run else f"{target.path} does not say within which radius it is to stand"
        return ClaimedThreat(threat=of_run, problem=problem)
    said = f"the model card of {target.path} names the threat {card[:_MAX_QUOTED]!r}"
    try:
        of_card = parse_threat(card)
    except ValueError:
        return ClaimedThreat(threat=None, problem=f"{said}, which cannot be read")
    if of_run is not None and str(of_run) != str(of_card):
        return ClaimedThreat(threat=None, problem=f"{said}, and its source {str(of_run)!r}")
    return ClaimedThreat(threat=of_run or of_card)

"""What of an environment may move a number, in one line; and in what several of them differ.

Earlier versions recorded less: what a line does not say is not known, and differs from nothing.
Needs no torch.
"""

from collections.abc import Iterable, Mapping
from typing import Any

_NAMED = ("robust-compress", "torch", "commit", "processor")
_SHOWN_DIGITS, _UNKNOWN = 12, "unknown"


def made_on(environment: Mapping[str, Any]) -> str:
    """`cpu, bfloat16, robust-compress 0.1.0, torch 2.15.0, commit 1a2b3c, processor ..., compiled`.

    Args:
        environment: see `describe_environment`; facts that it lacks are left out.
    """
    said = [str(environment.get(key, _UNKNOWN)) for key in ("device", "number_format")]
    said += [f"{key} {_shown(key, environment[key])}" for key in _NAMED if key in environment]
    if "is_compiled" in environment:
        said.append("compiled" if environment["is_compiled"] else "not compiled")
    return ", ".join(said)


def differences(places: Iterable[str]) -> list[str]:
    """Every fact of these lines that is known to be another elsewhere, a text for each fact."""
    facts: dict[str, set[str]] = {}
    for place in places:
        for number, part in enumerate(place.split(", ")):
            if part != _UNKNOWN:
                facts.setdefault(_kind(number, part), set()).add(part)
    return [" or ".join(sorted(parts)) for parts in facts.values() if len(parts) > 1]


def _kind(number: int, part: str) -> str:
    """Device and number format come first and have no name; the others begin with theirs."""
    if number < 2:
        return str(number)
    return part.split()[-1] if part.endswith("compiled") else part.split()[0]


def _shown(key: str, value: object) -> str:
    """Without the comma that parts facts; of a commit the first digits."""
    text = " ".join(str(value).replace(",", " ").split())
    if key != "commit":
        return text
    digits, plus, changes = text.partition("+")
    return f"{digits[:_SHOWN_DIGITS]}{plus}{changes}"

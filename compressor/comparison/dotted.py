"""Nested tables as dotted keys and values, as `--set` takes them. Needs no torch."""

from collections.abc import Mapping
from typing import Any


def dotted(table: Mapping[str, Any], *, below: str = "") -> dict[str, Any]:
    """`{"attack": {"num_steps": 5}}` as `{"attack.num_steps": 5}`, in the order of the table."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, Mapping)
        found |= dotted(value, below=f"{below}{key}.") if inner else {f"{below}{key}": value}
    return found


def assignments(table: Mapping[str, Any]) -> str:
    """`beta=1.0, attack.num_steps=5`."""
    return ", ".join(f"{key}={_value_text(value)}" for key, value in dotted(table).items())


def _value_text(value: object) -> str:
    """As a person writes it: `none`, `true`, `[0.7, 0.9]`, 4 digits of a fraction."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value_text, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

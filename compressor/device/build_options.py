"""BuildOptions: what can be chosen when an engine is built; part of `kit.json`.

Goes into build kits.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .kit_files import DeviceError

DEFAULT_BATCH = (1, 8, 32)
_MAX_BATCH = 1 << 16
_MAX_WORKSPACE_MIB = 1 << 20


class BuildError(DeviceError):
    """An engine cannot be built of this file, with these options, on this machine."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine is built. None of these changes the precision, which is in the graph.

    Raises:
        BuildError: if a value is out of range.
    """

    batch: tuple[int, int, int] | None = None
    """Smallest, usual and largest batch; None: what the file fixes, or else 1, 8, 32."""
    workspace_mib: int = 1024
    """Memory of the GPU that one layer may use while it computes."""
    optimization_level: int = 3
    """0 builds fast, 5 searches long."""
    tf32: bool = False
    """Let float32 layers round their factors to 10 bits, which is not float32."""
    version_compatible: bool = False
    """Also for later versions of TensorRT, which need the lean runtime of this one; not for RTX."""
    hardware_compatible: bool = False
    """For every GPU since Ampere, not only this one; slower; not for RTX."""
    compute_capabilities: tuple[str, ...] = ()
    """RTX only, such as SM89: the GPUs to build for; empty: TensorRT-RTX decides."""

    def __post_init__(self) -> None:
        batch = self.batch
        if batch is not None and (
            len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2] <= _MAX_BATCH
        ):
            raise BuildError(
                f"batch {':'.join(map(str, batch))} is not min:opt:max with "
                f"1 <= min <= opt <= max <= {_MAX_BATCH}"
            )
        if not 1 <= self.workspace_mib <= _MAX_WORKSPACE_MIB:
            raise BuildError(
                f"a workspace of {self.workspace_mib} MiB is not within 1 to {_MAX_WORKSPACE_MIB}"
            )
        if not 0 <= self.optimization_level <= 5:
            raise BuildError(f"optimization level {self.optimization_level} is not one of 0 to 5")
        odd = [name for name in self.compute_capabilities if not re.fullmatch(r"SM\d+", name)]
        if odd:
            raise BuildError(
                f"compute capability {odd[0]!r} is not SM and a number, such as SM89 of an RTX 4090"
            )
        if self.compute_capabilities and (self.version_compatible or self.hardware_compatible):
            raise BuildError(
                "compute capabilities are for TensorRT-RTX, whose engines know no version or "
                "hardware compatibility; choose one of the two"
            )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "BuildOptions":
        """The options that `to_table` wrote.

        Raises:
            BuildError: if one is missing, unknown, or of another type.
        """
        defaults = {option.name: option.default for option in dataclasses.fields(cls)}
        unfit = sorted(defaults.keys() ^ table.keys())
        known = [name for name in defaults if name in table]
        unfit += [name for name in known if not _FITS[name](table[name])]
        if unfit:
            raise BuildError(f"these build options are damaged or not known: {', '.join(unfit)}")
        batch = None if table["batch"] is None else tuple(table["batch"])
        targets = tuple(table["compute_capabilities"])
        return cls(**(dict(table) | {"batch": batch, "compute_capabilities": targets}))

    def to_table(self) -> dict[str, Any]:
        """As plain JSON types."""
        table = dataclasses.asdict(self)
        table["batch"] = None if self.batch is None else list(self.batch)
        return table | {"compute_capabilities": list(self.compute_capabilities)}


def parse_batch(text: str) -> tuple[int, int, int]:
    """From `min:opt:max`, or `N` for one size only.

    Raises:
        BuildError: if it is neither.
    """
    numbers = text.split(":")
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise BuildError(f"batch {text!r} is neither min:opt:max nor one number, such as 1:8:32")
    low, usual, high = (int(number) for number in numbers)
    return low, usual, high


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_batch(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_int, value)))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_FITS: Mapping[str, Callable[[object], bool]] = MappingProxyType(
    {
        "batch": _is_batch,
        "workspace_mib": _is_int,
        "optimization_level": _is_int,
        "tf32": _is_flag,
        "version_compatible": _is_flag,
        "hardware_compatible": _is_flag,
        "compute_capabilities": _are_names,
    }
)

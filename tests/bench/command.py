"""The command that made a page, as it was run."""

import argparse
import shlex
from collections.abc import Sequence


def typed_command(module: str, options: argparse.Namespace, *, left_out: Sequence[str] = ()) -> str:
    """With every option, those too that were left at their defaults, which may change.

    Args:
        module: that was run.
        options: as they were read.
        left_out: names of options that had no part in it.
    """
    words = ["python", "-m", module]
    for name, value in vars(options).items():
        if value is not None and name not in left_out:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)

"""Detects that another package has overwritten our files.

`compressor` and `exporters` are also the import names of other distributions, and pip does not
notice when one overwrites another.
"""

import base64
import hashlib
from importlib import metadata

from compressor.errors import RobustCompressError

_OUR_FOLDERS = ("compressor/", "cli/", "exporters/")


class OverwrittenInstallationError(RobustCompressError):
    """A file of ours is now somebody else's."""


def refuse_overwritten_installation() -> None:
    """Compare our Python files with the hashes that the installer recorded.

    Raises:
        OverwrittenInstallationError: naming the file and the other package.
    """
    overwritten = overwritten_files()
    if overwritten:
        owners = metadata.packages_distributions().get(overwritten[0].partition("/")[0], [])
        others = sorted(set(owners) - {"robust-compress"})
        raise OverwrittenInstallationError(
            f"{overwritten[0]} was overwritten by another package"
            f"{' (' + ', '.join(others) + ')' if others else ''}. Install robust-compress in an "
            "environment of its own: pipx install robust-compress"
        )


def overwritten_files() -> list[str]:
    """Our recorded `__init__.py` files whose content is no longer ours; empty when editable."""
    try:
        files = metadata.files("robust-compress") or []
    except metadata.PackageNotFoundError:
        return []
    changed = []
    for file in files:
        is_marker = file.name == "__init__.py" and str(file).startswith(_OUR_FOLDERS)
        if is_marker and file.hash is not None and not _is_ours(file):
            changed.append(str(file))
    return changed


def _is_ours(file: metadata.PackagePath) -> bool:
    if file.hash is None:
        return True
    try:
        digest = hashlib.sha256(file.read_binary()).digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value

"""ReportFiles: the only file that knows what a verification writes, and how its files are named."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """The files of one verification in a folder.

    `label` is empty for the verification that a release is decided on (all test images, the
    threat of the recipe, all attacks); any other has a name of its own and overwrites nothing.
    """

    folder: Path
    label: str = ""

    @property
    def json(self) -> Path:
        """For programs."""
        return self._path("report", "json")

    @property
    def markdown(self) -> Path:
        """For people, in a terminal."""
        return self._path("report", "md")

    @property
    def html(self) -> Path:
        """For people, in a browser or as a mail attachment."""
        return self._path("report", "html")

    @property
    def samples(self) -> Path:
        """One line per image."""
        return self._path("samples", "csv")

    def move_to(self, others: "ReportFiles") -> None:
        """Give them the names of others, which are replaced."""
        for own, other in zip(self._all, others._all, strict=True):
            with suppress(FileNotFoundError):
                own.replace(other)

    @property
    def _all(self) -> tuple[Path, ...]:
        """The JSON first: without it, the rest is nothing that a program would find."""
        return self.json, self.markdown, self.html, self.samples

    def journal(self, plan: str) -> Path:
        """Finished stages of a verification that has not ended."""
        return self.folder / f".verification-{plan}.jsonl"

    def labelled(self, *words: str) -> Self:
        """Others of the same folder, with more words in their names."""
        return replace(self, label="-".join(filter(None, [self.label, *words])))

    def _path(self, stem: str, extension: str) -> Path:
        return self.folder / f"{'-'.join(filter(None, [stem, self.label]))}.{extension}"


def report_of_file(path: Path, *, sha256: str) -> ReportFiles:
    """Where the verification of a file that is no run goes, unless the user says otherwise."""
    return ReportFiles(folder=Path("runs") / f"verify-{path.stem}-{sha256[:8]}")

"""ComparisonFolder: the only file that knows what a comparison writes, and where.

A comparison on disk::

    runs/LABEL-seed0/            an ordinary run
    verifications/LABEL-seed0/   training.json, clean.json, and the reports of the attacks
    failures/LABEL-seed0.json    why a run ended without weights
    comparison.json  comparison.md  comparison.csv  comparison.tex  comparison.svg

A run that is measured may be removed: with the data and the teachers, what lies beside it is enough
for the tables.
"""

from dataclasses import dataclass
from pathlib import Path

from compressor.reports.files import ReportFiles
from compressor.run_directory import make_folder


@dataclass(frozen=True)
class ComparisonFolder:
    """A folder that holds the runs of one comparison and what they show."""

    path: Path

    def make(self) -> None:
        """Make the folder, where it is not there yet.

        Raises:
            RunError: if it cannot be made.
        """
        make_folder(self.path, called="folder")

    def run(self, name: str) -> Path:
        """The run of that name."""
        return self.path / "runs" / name

    def verification(self, name: str) -> Path:
        """The folder of what was measured on that run."""
        return self.path / "verifications" / name

    def training(self, name: str) -> Path:
        """What is kept of that run's training."""
        return self.verification(name) / "training.json"

    def measured(self) -> list[str]:
        """The runs of which a training is kept, of this call or of an earlier one."""
        return sorted(path.parent.name for path in self.path.glob("verifications/*/training.json"))

    def clean(self, name: str) -> Path:
        """Which test images the run answers correctly without an attack."""
        return self.verification(name) / "clean.json"

    def reports(self, name: str) -> list[ReportFiles]:
        """All verifications of that run."""
        found = sorted(self.verification(name).glob("report*.json"))
        labels = [path.stem.removeprefix("report").removeprefix("-") for path in found]
        return [ReportFiles(folder=self.verification(name), label=label) for label in labels]

    def failure(self, name: str) -> Path:
        """Why that run has no result."""
        return self.path / "failures" / f"{name}.json"

    @property
    def result(self) -> Path:
        """For programs."""
        return self.path / "comparison.json"

    @property
    def markdown(self) -> Path:
        """For people and pull requests."""
        return self.path / "comparison.md"

    @property
    def csv(self) -> Path:
        """For spreadsheets."""
        return self.path / "comparison.csv"

    @property
    def latex(self) -> Path:
        """For papers."""
        return self.path / "comparison.tex"

    @property
    def picture(self) -> Path:
        """Clean against robust accuracy."""
        return self.path / "comparison.svg"

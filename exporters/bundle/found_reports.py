"""What `verify` and `gate` have left behind about some files, found by the hash of the target."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from compressor.device.kit_files import DeviceError, read_limited, sha256_of
from compressor.errors import RunError
from compressor.gate.result import GateResult
from compressor.reports.report import RobustnessReport
from compressor.run_directory import RunDirectory
from exporters.bundle.manifest import REPORT_FOLDER, BundledGate, BundledReport

MAX_REPORT_BYTES = 64 << 20
_VERIFICATIONS = "verify-*"
"""As `compressor.reports.files.report_of_file` names the folders of files."""
_Content = TypeVar("_Content", RobustnessReport, GateResult)


@dataclass(frozen=True, kw_only=True)
class FoundReports:
    """Reports and decisions about the targets asked for, by their path in a bundle."""

    reports: tuple[BundledReport, ...]
    gates: tuple[BundledGate, ...]
    contents: Mapping[str, bytes] = field(repr=False)
    """Of all of these, unchanged."""
    unreadable: tuple[tuple[Path, str], ...]
    """Files that are named like a report and are none of this version, and why."""


def find_reports(run: RunDirectory, names: Mapping[str, str]) -> FoundReports:
    """Look in the run, and in the folders into which `verify` writes about single files.

    Args:
        run: of the student.
        names: from the sha256 of a target to what it is called, such as `model.int8`.
    """
    found = _Finder(names=names)
    for folder in _folders(run):
        for path in sorted(folder.glob("report*.json")):
            found.add_report(path)
        for path in sorted(folder.glob("gate*.json")):
            found.add_gate(path)
    return FoundReports(
        reports=tuple(sorted(found.reports.values(), key=lambda row: row.file)),
        gates=tuple(sorted(found.gates.values(), key=lambda row: row.file)),
        contents=dict(sorted(found.contents.items())),
        unreadable=tuple(found.unreadable),
    )


def parse_report(content: bytes) -> RobustnessReport:
    """A report from the bytes of its JSON.

    Raises:
        RunError: if it is none of this version, or contradicts itself.
    """
    return _parsed(content, RobustnessReport.model_validate_json, what="report")


def parse_gate(content: bytes) -> GateResult:
    """A decision of a gate from the bytes of its JSON.

    Raises:
        RunError: if it is none.
    """
    return _parsed(content, GateResult.model_validate_json, what="decision of a gate")


def _parsed(content: bytes, parse: Callable[[bytes], _Content], *, what: str) -> _Content:
    try:
        return parse(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RunError(f"it is no {what} of this version: {place}: {first['msg']}") from None
    except (ArithmeticError, RecursionError) as error:  # numbers of a thousand digits
        raise RunError(f"it is no {what} of this version: {error}") from None


def _folders(run: RunDirectory) -> Collection[Path]:
    roots = [Path("runs"), run.path.parent]
    folders = [run.path, *(path for root in roots for path in sorted(root.glob(_VERIFICATIONS)))]
    return {path.resolve(): path for path in folders}.values()


@dataclass(frozen=True, kw_only=True)
class _Finder:
    names: Mapping[str, str]
    reports: dict[str, BundledReport] = field(default_factory=dict)
    gates: dict[str, BundledGate] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)

    def add_report(self, path: Path) -> None:
        try:
            content = read_limited(path, max_bytes=MAX_REPORT_BYTES)
            report = parse_report(content)
        except (DeviceError, RunError) as error:
            self.unreadable.append((path, str(error)))
            return
        sha256 = report.target.sha256
        if sha256 in self.names:
            file = self._file(f"report.{self.names[sha256]}", content)
            self.reports[file] = BundledReport.of(report, file=file)

    def add_gate(self, path: Path) -> None:
        try:
            content = read_limited(path, max_bytes=MAX_REPORT_BYTES)
            result = parse_gate(content)
        except (DeviceError, RunError) as error:
            self.unreadable.append((path, str(error)))
            return
        if result.model_sha256 in self.names:
            file = self._file(f"gate.{self.names[result.model_sha256]}", content)
            self.gates[file] = BundledGate.of(result, file=file)

    def _file(self, stem: str, content: bytes) -> str:
        """A name that depends on nothing but the content, so that bundles are the same."""
        name = f"{REPORT_FOLDER}/{stem}.{sha256_of(content)[:8]}.json"
        self.contents[name] = content
        return name


def summaries(reports: Sequence[BundledReport], gates: Sequence[BundledGate]) -> list[str]:
    """What they say, a line each, with n."""
    lines = []
    for row in reports:
        stands = "nothing was shown under attack"
        if row.worst_case is not None:
            count = row.worst_case
            stands = f"{count.num_correct} of {count.num_total} stand against {row.protocol}"
        clean = f"clean {row.clean.num_correct} of {row.clean.num_total}"
        lines.append(f"{row.file}: {row.status.upper()}, {row.threat}: {clean}, {stands}")
    lines += [f"{row.file}: gate {row.verdict.upper()}: {row.reason}" for row in gates]
    return lines if gates else [*lines, "not gated"]

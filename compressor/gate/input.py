"""Reports from strangers: read, and refused where nobody could judge them. Needs no torch."""

import hashlib
from pathlib import Path

from compressor.errors import ArtefactMismatchError, InvalidEvaluationError, RunError
from compressor.gate.policy import GatePolicy
from compressor.reports.files import report_of_file
from compressor.reports.report import RobustnessReport, read_report
from compressor.run_directory import RunDirectory

_EXPORTED = {".onnx", ".engine"}
_AGAIN = "write it again with `robust-compress verify RUN`"
_LARGEST_EPSILON = {"linf": 1.0, "l2": 1e6}  # of L2: further apart than any two images


def read_gated_report(path: Path) -> RobustnessReport:
    """The report in a file or in a run folder, from anybody; or that of an exported file.

    Raises:
        RunError: if there is none, or if it is damaged or contradicts itself.
        InvalidEvaluationError: if an exported file was never verified.
        ArtefactMismatchError: if the weights of the run are not those that were verified.
    """
    if path.suffix in _EXPORTED:
        path = _report_of_file(path)
    run = RunDirectory(path) if path.is_dir() else None
    if run is not None:
        path = run.report().json
    if not path.exists():
        raise RunError(f"{path} does not exist; make it with `robust-compress verify RUN`")
    try:
        report = read_report(path)
    except (ValueError, ArithmeticError, RecursionError) as error:  # numbers of a thousand digits
        raise RunError(f"{path} is not a report: {error}; {_AGAIN}") from None
    if not 0 < report.epsilon_pixels <= _LARGEST_EPSILON[report.norm]:
        raise RunError(f"{path}: epsilon_pixels is {report.epsilon_pixels:g}; {_AGAIN}")
    if run is not None and run.model.exists():
        _refuse_other_weights(run, report)
    names = report.data.class_names
    if len(set(names)) != len(names):
        raise RunError(f"{path}: two classes have the same name; {_AGAIN}")
    return report


def _report_of_file(path: Path) -> Path:
    """Where `verify` puts the report of an exported file."""
    if not path.is_file():
        raise RunError(f"{path} does not exist; check the path")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found = report_of_file(path, sha256=sha256).json
    if not found.exists():
        raise InvalidEvaluationError(
            f"{path} is UNVERIFIED: there is no {found}. What was not attacked cannot be gated: "
            f"robust-compress verify {path}"
        )
    report = read_report(found)
    if report.target.sha256 != sha256:
        raise ArtefactMismatchError(f"{found} is about another file than {path}; {_AGAIN}")
    return found


def _refuse_other_weights(run: RunDirectory, report: RobustnessReport) -> None:
    with run.model.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if report.target.kind != "run":
        raise ArtefactMismatchError(
            f"{run.report().json} is not about this run but about a file of kind "
            f"{report.target.kind!r}; give that report itself, or {_AGAIN}"
        )
    if sha256 != report.target.sha256:
        raise ArtefactMismatchError(
            f"{run.report().json} is about weights with SHA-256 {report.target.sha256[:12]}, "
            f"{run.model} has {sha256[:12]}; {_AGAIN}"
        )


def read_baseline(policy: GatePolicy) -> RobustnessReport | None:
    """The report that the policy names, if it names one.

    Raises:
        RunError: as `read_gated_report`.
    """
    path = policy.baseline.report
    return None if path is None else read_gated_report(Path(path))

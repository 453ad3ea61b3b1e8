"""Is every method's arithmetic really held by tests? Slips are planted in copies of the project.

Each slip is the kind that scripts are published with: swapped teachers, a factor T squared too
many, clean images for attacked ones, a mean of another kind. The tests of the arithmetic must fail.

    python tests/evidence/method_mutations.py --write docs/results/method-mutations.md
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_text_atomically

ROOT = Path(__file__).parents[2]
COPIED = ("compressor", "cli", "exporters", "tests", "examples", "pyproject.toml")
TESTS = "tests/golden"
NOT_OF_METHODS = "not autoattack"
HEADER = ("method", "slip", "tests that failed", "the first of them")


@dataclass(frozen=True, kw_only=True)
class Slip:
    """One change of one file, whose text `was` must be there exactly once."""

    method: str
    what: str
    file: str
    was: str
    becomes: str


SLIPS = (
    Slip(
        method="bmtard",
        what="each teacher sees the other's images",
        file="methods/teacher_set.py",
        was='{"robust": x_adv, "clean": x}',
        becomes='{"robust": x, "clean": x_adv}',
    ),
    Slip(
        method="bmtard",
        what="a factor T squared",
        file="methods/teacher_set.py",
        was="losses.append(loss_scale *",
        becomes="losses.append(temperature**2 * loss_scale *",
    ),
    Slip(
        method="bmtard",
        what="weights of the batch before",
        file="methods/bmtard.py",
        was="self.teachers.weighed(terms, losses, weighing.weights)",
        becomes="self.teachers.weighed(terms, losses, state.weights.weights)",
    ),
    Slip(
        method="bmtard",
        what="the sharper teacher is cooled",
        file="balancers.py",
        was="temperature - rate * sign",
        becomes="temperature + rate * sign",
    ),
    Slip(
        method="mtard",
        what="a temperature other than 1",
        file="methods/mtard.py",
        was="[1.0] * len",
        becomes="[2.0] * len",
    ),
    Slip(
        method="mtard",
        what="the exponent forgotten",
        file="methods/mtard.py",
        was="exponent=self.relative_loss_exponent",
        becomes="exponent=1.0",
    ),
    Slip(
        method="rc",
        what="the last attack's step, in place of the same reach",
        file="methods/growing.py",
        was="step_size_pixels=reach_pixels / num_steps",
        becomes="step_size_pixels=full.step_size_pixels",
    ),
    Slip(
        method="rc",
        what="all steps one phase too early",
        file="methods/growing.py",
        was="for place, num_steps in enumerate(fewer)",
        becomes="for place, num_steps in enumerate(range(first_num_steps + 1, full.num_steps + 1))",
    ),
    Slip(
        method="ciard",
        what="pushed from what the clean teacher gets right",
        file="methods/ciard.py",
        was="teacher_logits_NK.argmax(dim=1) != batch.y_N",
        becomes="teacher_logits_NK.argmax(dim=1) == batch.y_N",
    ),
    Slip(
        method="ciard",
        what="the push attracts",
        file="methods/ciard.py",
        was="total = total - factor *",
        becomes="total = total + factor *",
    ),
    Slip(
        method="ciard",
        what="mean over all images, not over the wrong ones",
        file="methods/ciard.py",
        was="batch.mean(is_wrong_N * kl_N) / wrong_fraction.clamp(min=_A_PART_OF_ONE)",
        becomes="batch.mean(is_wrong_N * kl_N)",
    ),
    Slip(
        method="darht",
        what="slices of the map belong to other teachers",
        file="methods/darht.py",
        was="slices = map_NMK.unbind(dim=1)",
        becomes="slices = map_NMK.unbind(dim=1)[::-1]",
    ),
    Slip(
        method="darht",
        what="trust in the teacher that is wrong",
        file="methods/darht.py",
        was="F.softmax(-label_loss_M, dim=0)",
        becomes="F.softmax(label_loss_M, dim=0)",
    ),
    Slip(
        method="darht",
        what="the last layer's loss reaches the network",
        file="methods/darht.py",
        was="student.read_out(map_NMK.detach())",
        becomes="student.read_out(map_NMK)",
    ),
    Slip(
        method="ard",
        what="the teacher is asked about attacked images",
        file="methods/ard.py",
        was="self.robust_teacher.logits(x), student.logits(x_adv)",
        becomes="self.robust_teacher.logits(x_adv), student.logits(x_adv)",
    ),
    Slip(
        method="ard",
        what="labels on attacked images",
        file="methods/ard.py",
        was="cross_entropy(student.logits(x), y)",
        becomes="cross_entropy(student.logits(x_adv), y)",
    ),
    Slip(
        method="iad",
        what="trust is measured on clean images",
        file="methods/iad.py",
        was="self._trust(x_adv, y)",
        becomes="self._trust(x, y)",
    ),
    Slip(
        method="iad",
        what="the divergence from itself is turned round",
        file="methods/iad.py",
        was="kl_divergence(own_NK, adv_logits_NK)",
        becomes="kl_divergence(adv_logits_NK, own_NK)",
    ),
    Slip(
        method="rslad",
        what="clean images for attacked ones",
        file="methods/rslad.py",
        was="student.logits(x_adv), p_NK",
        becomes="student.logits(x), p_NK",
    ),
    Slip(
        method="rslad",
        what="clean and adversarial share swapped",
        file="methods/rslad.py",
        was='"clean_loss_nats"] = (1 - self.robust_weight, clean_loss)',
        becomes='"clean_loss_nats"] = (self.robust_weight, clean_loss)',
    ),
    Slip(
        method="adaad",
        what="the teacher is asked about clean images",
        file="methods/adaad.py",
        was="self._divergence(student.logits(x_adv), x_adv)",
        becomes="self._divergence(student.logits(x_adv), x)",
    ),
    Slip(
        method="adaad",
        what="no gradient of the attack through the teacher",
        file="methods/adaad.py",
        was="self.robust_teacher.logits_with_gradient(x_NCHW)",
        becomes="self.robust_teacher.logits(x_NCHW)",
    ),
    Slip(
        method="distillation",
        what="T squared forgotten",
        file="losses.py",
        was="return temperature**2 * kl_to_probabilities",
        becomes="return kl_to_probabilities",
    ),
    Slip(
        method="distillation",
        what="weights of teacher and labels swapped",
        file="methods/distillation.py",
        was='"teacher_loss_nats": (self.teacher_weight,',
        becomes='"teacher_loss_nats": (1 - self.teacher_weight,',
    ),
    Slip(
        method="trades",
        what="the divergence is turned round",
        file="methods/trades.py",
        was="kl_divergence(clean_logits_NK, adv_logits_NK)",
        becomes="kl_divergence(adv_logits_NK, clean_logits_NK)",
    ),
    Slip(
        method="trades",
        what="no gradient through the clean answer",
        file="methods/trades.py",
        was="kl_divergence(clean_logits_NK, adv_logits_NK)",
        becomes="kl_divergence(clean_logits_NK.detach(), adv_logits_NK)",
    ),
    Slip(
        method="pgd_at",
        what="clean images for attacked ones",
        file="methods/pgd_at.py",
        was="student.logits(x_adv)",
        becomes="student.logits(batch.x_NCHW)",
    ),
    Slip(
        method="pgd_at",
        what="a sum for a mean",
        file="methods/pgd_at.py",
        was="loss = batch.mean(",
        becomes="loss = len(batch.y_N) * batch.mean(",
    ),
    Slip(
        method="cross_entropy",
        what="an element mean, as over N x K",
        file="methods/cross_entropy.py",
        was="loss = batch.mean(",
        becomes="loss = 0.25 * batch.mean(",
    ),
    Slip(
        method="cross_entropy",
        what="labels of the next image",
        file="methods/cross_entropy.py",
        was="batch.y_N))",
        becomes="batch.y_N.roll(1)))",
    ),
)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="slips of one method; cannot be written")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.only and options.write:
        parser.error("--write takes every method")
    slips = [slip for slip in SLIPS if options.only in {None, slip.method}]
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        if failed := failing_tests(Path(folder)):
            parser.error(f"tests fail without a slip: {failed[0]}")
        rows = [tested(slip, Path(folder)) for slip in slips]
    if options.write:
        write_text_atomically(options.write, report(rows))
    if survivors := sum(row[2] == "0" for row in rows):
        sys.exit(f"{survivors} slips were not noticed")


def copy_project(folder: Path) -> None:
    """What the tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)


def tested(slip: Slip, copy: Path) -> list[str]:
    """A line of the table, printed."""
    failed = failing_tests_with(slip, copy)
    row = [slip.method, slip.what, str(len(failed)), failed[0] if failed else "none"]
    print(*row, sep=" | ", flush=True)  # noqa: T201
    return row


def failing_tests_with(slip: Slip, copy: Path) -> list[str]:
    """Names of the tests that notice `slip`; the copy is as before."""
    path = copy / "compressor" / slip.file
    text = path.read_text()
    if text.count(slip.was) != 1:
        sys.exit(f"{slip.file} has {slip.was!r} {text.count(slip.was)} times: change the slip")
    path.write_text(text.replace(slip.was, slip.becomes))
    try:
        return failing_tests(copy)
    finally:
        path.write_text(text)


def failing_tests(copy: Path) -> list[str]:
    """Names of failing tests in a copy, which the tests import in place of this project."""
    command = [sys.executable, "-P", "-B", "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-n", "0", "-k", NOT_OF_METHODS, TESTS],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    failed = re.findall(
        r"^(?:FAILED|ERROR) tests/golden/(.+?)(?: - .*)?$", done.stdout, flags=re.MULTILINE
    )
    if (done.returncode != 0) != bool(failed):
        sys.exit(f"tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed


def report(rows: list[list[str]]) -> str:
    """As Markdown."""
    caught = sum(row[2] != "0" for row in rows)
    return f"""# Slips planted in the methods

{caught} of {len(rows)} are noticed by the tests of the methods' arithmetic.

{markdown_table(HEADER, rows, align="llrl")}

`python tests/evidence/method_mutations.py`
"""


if __name__ == "__main__":
    main()

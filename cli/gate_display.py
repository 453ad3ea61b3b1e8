"""A gate's result and its plan in the terminal: the verdict first."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from cli.output import Output

if TYPE_CHECKING:
    from compressor.gate.paired import Comparison
    from compressor.gate.plan import ImageCost, RulePlan
    from compressor.gate.result import GateResult

_MAX_LISTED = 10  # newly broken images
_STYLES = {"pass": "bold green", "fail": "bold red"}
_DOUBTFUL = "bold yellow"


def print_result(result: "GateResult", *, target: Path, policy_path: Path, output: Output) -> None:
    """Verdict, one line per rule, why it is not a pass, what broke, and what to type next."""
    style = _STYLES.get(result.verdict, _DOUBTFUL)
    line = f"{result.verdict.upper()}  {result.name}, n = {result.images}"
    output.console.print(line, style=style, markup=False)
    if result.verdict == "inconclusive" and result.exit_code == 0:
        warning = "WARNING: nothing was decided; exit code 0, as the policy says `warn`."
        output.console.print(warning, style="bold black on yellow", markup=False)
    rows = [
        (_short(rule.rule), rule.measured, rule.shown, rule.required, rule.verdict.upper())
        for rule in result.rules
    ]
    _table(("\nrule", "measured", "shown", "required", "verdict"), rows, output)
    _print_reasons(result, output)
    if result.comparison is not None:
        _print_comparison(result.comparison, output)
    output.say(f"\n{result.bounded} {result.caveat}")
    output.next_command(_next(result, target=target, policy_path=policy_path))


def print_plan(plans: Sequence["RulePlan"], cost: "ImageCost", output: Output) -> None:
    """How many images each rule needs, and what the most demanding one costs."""
    rows = [
        (
            _short(plan.rule),
            f"{100 * plan.limit:.4g} %",
            f"{100 * plan.assumed_accuracy:.2f} %",
            _number(plan.num_fixed),
            _number(plan.num_planned),
            _number(plan.average_if_assumed),
            _number(plan.average_at_limit),
            _number(plan.average_if_clear),
        )
        for plan in plans
    ]
    header = ("rule", "at least", "assumed", "fixed", "--live", "average", "at limit", "if clear")
    output.title("Images for a decision, with a power of 90 %")
    _table(header, rows, output)
    output.say(
        "\nfixed: attack so many and judge once. --live: plan so many, and stop early; on average "
        "after so many if the assumption is true, if the accuracy is just the limit, and if it is "
        "twice as far above it. A dash: the assumption is too close to the limit, or below it."
    )
    needed = [plan.num_fixed for plan in plans]
    if None not in needed:
        _print_cost(max((n for n in needed if n is not None), default=0), cost, output)
    else:
        output.say("No number of images is likely to show all rules under these assumptions.")


def _print_cost(num_images: int, cost: "ImageCost", output: Output) -> None:
    text = (
        f"{num_images:,} images cost about {num_images * cost.num_forwards:,.0f} forward and "
        f"{num_images * cost.num_backwards:,.0f} backward passes"
    )
    if cost.duration_seconds is not None:
        text += f", {num_images * cost.duration_seconds / 60:,.1f} minutes"
    output.say(f"{text} ({cost.source}).")


def _print_reasons(result: "GateResult", output: Output) -> None:
    """Checks and rules that did not pass, in full; then the checks that say nothing."""
    for check in result.checks:
        if check.status not in {"passed", "not run"}:
            output.say(f"\n{check.name} ({check.status}): {check.message}")
    for rule in result.rules:
        if rule.verdict not in {"pass", "not judged"}:
            output.say(f"\n{rule.rule} ({rule.verdict}): {rule.message}")
    not_run = [(check.name, check.message) for check in result.checks if check.status == "not run"]
    if not_run:
        output.say("")
        output.not_run(not_run)


def _print_comparison(comparison: "Comparison", output: Output) -> None:
    from compressor.gate.paired import describe_comparison

    output.title(f"Against {comparison.baseline_name}")
    output.say(describe_comparison(comparison))
    listed = comparison.newly_broken[:_MAX_LISTED]
    if listed:
        rows = [(str(image.index), image.label, image.attack) for image in listed]
        _table(("newly broken image", "class", "broken by"), rows, output)
    num_more = len(comparison.newly_broken) - len(listed)
    if num_more:
        output.say(f"and {num_more} more; --out FILE has all of them")


def _next(result: "GateResult", *, target: Path, policy_path: Path) -> str:
    place, policy = shlex.quote(str(target)), shlex.quote(str(policy_path))
    run = place if target.is_dir() else "RUN"
    if result.verdict == "pass":
        return f"robust-compress export {run} --format onnx"
    if result.verdict == "inconclusive":
        return f"robust-compress gate {place} --policy {policy} --plan"
    if result.verdict == "fail" and result.comparison is None:
        return f"robust-compress gate {place} --policy {policy} --baseline REPORT"
    return f"robust-compress verify {run}"


def _short(rule: str) -> str:
    """`worst_case.min_accuracy` as `worst_case`, `size.max_bytes` as `size bytes`."""
    words = rule.removesuffix(".min_accuracy").replace(".min_", " ").replace(".max_", " ")
    return words.replace("_accuracy", "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], output: Output) -> None:
    """Names are of strangers, and the terminal library has a markup in brackets."""
    output.table(header, [[escape(cell) for cell in row] for row in rows])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"

"""`robust-compress gate`: is this student robust enough to ship?"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DeviceOption, JsonOption, MovedDataOption, ThreadsOption
from cli.output import Output
from compressor.errors import InterruptedRunError, UsageError

if TYPE_CHECKING:
    from compressor.gate.plan import RulePlan
    from compressor.gate.policy import GatePolicy
    from compressor.gate.result import GateResult


def gate(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="REPORT|RUN|FILE",
            help="A report.json, a run that has one, or a verified FILE.onnx or FILE.engine.",
        ),
    ] = None,
    policy_path: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="The rules, in TOML.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="REPORT|RUN", help="What ships now, to compare image by image."),
    ] = None,
    inconclusive: Annotated[
        str | None,
        typer.Option(metavar="fail|inconclusive|warn", help="Exit with 3, 6 or 0 if undecided."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as JUnit XML.")
    ] = None,
    sarif: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as SARIF, for code scanning.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as Markdown, for a job page.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Attack the run now, and stop once it is decided.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help="With --live: at most so many test images.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="With --live: at most so long.")
    ] = None,
    data: MovedDataOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say how many images a decision will need, and end.")
    ] = False,
    assume: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="With --plan: the accuracy of what no report has measured [default: each limit "
            "and 5 points].",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a report by a policy: PASS (0), FAIL (3), INCONCLUSIVE (6), INVALID (7).

    A limit is passed only if the exact lower bound of the population accuracy reaches it.

    Example: `robust-compress gate runs/mine --policy examples/gate.toml --junit gate.xml`
    """
    from cli.gate_display import print_result

    if policy_path is None:
        raise UsageError("--policy FILE is missing; start from examples/gate.toml")
    files = {"--out": out, "--junit": junit, "--sarif": sarif, "--summary": summary}
    of_live: dict[str, object] = {
        "--samples": samples,
        "--max-seconds": max_seconds,
        "--data": data,
        "--device": None if device == "auto" else device,
        "--threads": threads,
    }
    if plan:
        idle = {"--live": live or None, **of_live, **files}
        idle |= {"--baseline": baseline, "--inconclusive": inconclusive}
        _refuse_idle(idle, "--plan, which attacks nothing and writes no file; leave out either")
    elif not live:
        _refuse_idle(of_live, "a report, which is judged as it is; add --live to attack")
    if not plan:
        _refuse_idle({"--assume": assume}, "a verdict; add --plan")
    policy = _policy(policy_path, baseline=baseline, inconclusive=inconclusive)
    output = Output(as_json=as_json)
    if plan:
        _plan(target, policy, assumed_accuracy=assume, output=output)
        return
    if target is None:
        raise UsageError("which REPORT, RUN or FILE? Only --plan does without one")
    if live:
        result = _attack(
            target,
            policy,
            samples=samples,
            max_seconds=max_seconds,
            data_source=data,
            device=device,
            threads=threads,
            output=output,
        )
    else:
        result = _judge(target, policy)
    _write(result, policy_path, out=out, junit=junit, sarif=sarif, summary=summary)
    output.result(result.model_dump(mode="json", by_alias=True))
    print_result(result, target=target, policy_path=policy_path, output=output)
    raise typer.Exit(result.exit_code)


def _refuse_idle(options: Mapping[str, object], purpose: str) -> None:
    """Refuse the options that were given: whoever gave them expected an effect."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} would have no effect on {purpose}")


def _policy(path: Path, *, baseline: Path | None, inconclusive: str | None) -> "GatePolicy":
    from compressor.gate.policy import load_policy, with_baseline

    policy = load_policy(path)
    if baseline is not None:
        policy = with_baseline(policy, baseline)
    if inconclusive is None:
        return policy
    if inconclusive not in {"fail", "inconclusive", "warn"}:
        raise UsageError(f"--inconclusive {inconclusive!r} is not one of fail, inconclusive, warn")
    return policy.model_copy(update={"inconclusive": inconclusive})


def _judge(target: Path, policy: "GatePolicy") -> "GateResult":
    from compressor.gate.gate import judge
    from compressor.gate.input import read_baseline, read_gated_report

    return judge(read_gated_report(target), policy, baseline=read_baseline(policy))


def _attack(
    target: Path,
    policy: "GatePolicy",
    *,
    samples: int | None,
    max_seconds: float | None,
    data_source: str | None,
    device: str,
    threads: int | None,
    output: Output,
) -> "GateResult":
    from cli.training import performance_settings
    from cli.verification_display import verification_display
    from compressor.gate_workflow import gate_live
    from compressor.run_directory import RunDirectory

    try:
        with verification_display(output) as observe:
            return gate_live(
                RunDirectory.open(target),
                policy,
                settings=performance_settings(device=device, dtype="auto", num_threads=threads),
                num_images=samples or policy.budget.max_samples,
                max_seconds=max_seconds or policy.budget.max_seconds,
                data_source=data_source,
                observe=observe,
                tell=lambda text: output.say(f"... {text}"),
            )
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "interrupted; what is finished is kept: the same command goes on from there"
        ) from None


def _plan(
    target: Path | None, policy: "GatePolicy", *, assumed_accuracy: float | None, output: Output
) -> None:
    from cli.gate_display import print_plan
    from compressor.gate.input import read_gated_report
    from compressor.gate.plan import image_cost, plan_rules

    report = None if target is None else read_gated_report(target)
    if report is not None and report.status in {"invalid", "unverified"}:
        output.say(f"The report is {report.status}, so its accuracies are not taken for true.")
        report = None
    plans = plan_rules(policy, report=report, assumed_accuracy=assumed_accuracy)
    cost = image_cost(report, accuracy=min((p.assumed_accuracy for p in plans), default=0.0))
    output.result({"rules": [asdict(plan) for plan in plans], "cost_per_image": asdict(cost)})
    print_plan(plans, cost, output)
    if report is None and policy.per_class != type(policy.per_class)():
        output.say("per_class is not planned: a report is needed, for the number of classes.")
    output.next_command(_next_of_plan(target, plans))


def _next_of_plan(target: Path | None, plans: "Sequence[RulePlan]") -> str:
    run = shlex.quote(str(target)) if target is not None and target.is_dir() else "RUN"
    needed = [plan.num_fixed for plan in plans]
    if not needed or None in needed:
        return f"robust-compress verify {run}"
    return f"robust-compress verify {run} --samples {max(n for n in needed if n is not None)}"


def _write(
    result: "GateResult",
    policy_path: Path,
    *,
    out: Path | None,
    junit: Path | None,
    sarif: Path | None,
    summary: Path | None,
) -> None:
    """What was asked for. Alerts of SARIF point to the policy, by its place in the checkout."""
    from compressor.run_directory import write_json_atomically, write_text_atomically

    if out is not None:
        write_json_atomically(out, result.model_dump(mode="json", by_alias=True))
    if junit is None and sarif is None and summary is None:
        return
    from compressor.gate.outputs import to_junit, to_sarif, to_summary

    if junit is not None:
        write_text_atomically(junit, to_junit(result))
    if sarif is not None:
        here, policy = Path.cwd(), policy_path.absolute()
        place = policy.relative_to(here) if policy.is_relative_to(here) else Path(policy.name)
        write_json_atomically(sarif, to_sarif(result, policy_uri=place.as_posix()))
    if summary is not None:
        write_text_atomically(summary, to_summary(result))

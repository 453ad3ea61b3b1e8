"""What `robust-compress export` says about its files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cli.output import Output

if TYPE_CHECKING:
    from pathlib import Path

    from exporters.exported_model import ExportedModel
    from exporters.request import ExportRequest
    from exporters.worth import Worth


def print_files(made: "Sequence[ExportedModel]", output: Output) -> None:
    """A row for each file, and how it was made."""
    shown = made[0].verification
    num_images = shown.clean.num_total
    output.title(f"{len(made)} files, compared with the network on {num_images} held-out images")
    rows = []
    for exported in made:
        found = exported.verification
        rows.append(
            [
                exported.variant,
                f"{exported.num_bytes:,}",
                f"{100 * exported.num_bytes / made[0].num_bytes:.0f} %",
                f"{100 * found.clean_agreement.fraction:.1f} %",
                f"{100 * found.adversarial_agreement.fraction:.1f} %",
                _points(found.clean_drop),
                _points(found.robust_drop),
                found.status.replace("_", " "),
            ]
        )
    header = ("", "bytes", "", "same label", "attacked", "clean drop", "robust drop", "")
    output.table(header, rows)
    output.say("Drops in points with 95 % intervals, image by image; below 0 is better.")
    for exported in made:
        output.say(f"{exported.path}: {exported.verification.reason}")
        for line in _how_it_was_made(exported):
            output.say(f"  {line}")
    output.say(f"Input: {made[0].input_name}, {made[0].input_contract}")


def _points(drop: Any) -> str:  # noqa: ANN401 (a PairedDrop; imported late)
    low, high = drop.interval_95()
    return f"{100 * drop.fraction:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _how_it_was_made(exported: "ExportedModel") -> list[str]:
    details = exported.details
    if "calibration_kind" not in details:
        return []
    tried = ", ".join(
        f"{row['kind']} {row['robust']['num_correct']} of {row['robust']['num_total']}"
        + ("" if row["status"] == "verified" else f" ({row['status'].replace('_', ' ')})")
        for row in details["calibrations"]
    )
    lines = [
        f"calibrated by {details['calibration_method']} on {details['num_calibration_images']} "
        f"{details['calibration_kind']} training images; robust on images held out to choose by: "
        f"{tried}"
    ]
    if details["fine_tuned_epochs"] == 0:
        lines.append(
            "fine-tuning did not help: these are the weights before it, the best there were"
        )
    kept = [layer for layer in details["layers"] if layer["is_kept"]]
    if kept:
        lines.append(f"kept in float, {len(kept)} of {len(details['layers'])} layers:")
        lines += [f"  {_why_kept(layer)}" for layer in kept]
    return lines


def _why_kept(layer: dict[str, Any]) -> str:
    drop, sqnr_db = layer["robust_drop"], layer["sqnr_db"]
    lost = "" if drop is None else f", and costs {100 * drop:.1f} points under attack"
    left = "changes nothing" if sqnr_db is None else f"leaves {sqnr_db:.1f} dB of the logits"
    return f"{layer['name']}: quantised alone it {left}{lost} ({layer['num_weights']:,} weights)"


def print_plan(
    request: "ExportRequest",
    formats: list[str],
    output: Output,
    *,
    fine_tunes: bool,
    bundle: "Path | None",
) -> None:
    """What `export` would write."""
    from exporters.exported_model import PRECISIONS

    int8 = "int8-qat" if fine_tunes else "int8-mixed" if request.int8.min_kept else "int8"
    names = {precision: int8 if precision == "int8" else precision for precision in PRECISIONS}
    asked = [names[precision] for precision in PRECISIONS if precision in request.precisions]
    files = [request.run.onnx(name) for name in dict.fromkeys(["fp32", *asked])]
    engines = [request.run.engine(name) for name in asked] if "engine" in formats else []
    paths = [text for path in (*files, *engines) for text in (str(path), f"{path}.json")]
    if engines:
        paths.append(str(request.run.build_kit))
    paths += [] if bundle is None else [str(bundle)]
    output.title("Would write")
    for path in paths:
        output.say(f"  {path}")
    if "int8" in asked:
        output.say("  (int8-mixed instead of int8, if a layer has to stay in float)")
    output.result({"would_write": paths, "formats": formats})
    output.next_command("the same command without --dry-run")


def print_worth(worths: "Sequence[Worth]", output: Output) -> None:
    """What each lossy file gains."""
    for worth in worths:
        output.say(f"  {worth.sentence()}")

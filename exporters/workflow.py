"""export_run: from a finished run to files, each shown to be the same model or named as not."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from compressor.errors import ArtefactMismatchError, TooLossyError
from compressor.onnx_model import OnnxModel
from compressor.run_directory import (
    write_bytes_atomically,
    write_json_atomically,
)
from exporters.exported_model import (
    PRECISION_OF,
    ExportedModel,
    ExportVerification,
    Variant,
    verification_table,
)
from exporters.float16_audit import overflows
from exporters.hops import prove_hop
from exporters.int8.workflow import FineTune, make_fine_tuned, make_int8, verify_int8
from exporters.request import ExportRequest, Prepared, prepare, twin_of
from exporters.to_float16 import write_float16
from exporters.to_onnx import INPUT_NAME, write_onnx

_REMEDIES: Mapping[Variant, str] = MappingProxyType(
    {
        "fp32": "look for what the exporter changed",
        "fp16": "use --precision fp32",
        "int8": "keep layers in float with --keep-float 1, fine-tune it with --qat 1, or use "
        "--precision fp16",
        "int8-mixed": "keep more layers in float with --keep-float, fine-tune it with --qat 1, or "
        "use --precision fp16",
        "int8-qat": "fine-tune it longer with --qat, or use --precision fp16",
    }
)


def export_run(
    request: ExportRequest,
    *,
    fine_tune: FineTune | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Prepared, list[ExportedModel]]:
    """Write the selected network of a run in every precision asked for, and prove every hop.

    float32 comes first whatever was asked, because the others are made from it. A file takes its
    place only after it is verified; an earlier export is untouched until then.

    Args:
        request: what is asked for.
        fine_tune: how the int8 file is fine-tuned; None: it is not.
        tell: told in words what is done.

    Raises:
        RunError: if training has not ended, or another process writes into the run.
        ArtefactMismatchError: if a file is not the same model; it names the hop.
        TooLossyError: if a file loses more accuracy under attack than allowed.
        ExportError: if a format cannot express the network.
    """
    with request.run.locked():
        tell("attacking the network on held-out images")
        prepared = prepare(request)
        made = [_float32(prepared, tell=tell)]
        if "fp16" in request.precisions:
            made.append(_float16(prepared, tell=tell))
        if "int8" in request.precisions:
            made.append(_int8(prepared, fine_tune=fine_tune, tell=tell))
        return prepared, made


def _float32(prepared: Prepared, *, tell: Callable[[str], None]) -> ExportedModel:
    unverified = prepared.request.run.unverified_onnx("fp32")
    tell("fp32: writing ONNX")
    write_onnx(prepared.network, unverified, form=prepared.form, metadata=prepared.metadata())
    tell("fp32: comparing its answers")
    model = prepared.opened(unverified)
    shown = prove_hop(
        model, prepared.held_out, variant="fp32", twin=None, budget=prepared.request.budget
    )
    return _settle(prepared, "fp32", model, shown)


def _float16(prepared: Prepared, *, tell: Callable[[str], None]) -> ExportedModel:
    run, held_out = prepared.request.run, prepared.held_out
    unverified = run.unverified_onnx("fp16")
    tell("fp16: converting and attacking")
    write_float16(run.onnx("fp32"), unverified, metadata=prepared.metadata())
    model = prepared.opened(unverified)
    twin = twin_of(model, held_out)
    images = (held_out.x_NCHW, held_out.x_adv_NCHW)
    shown = prove_hop(
        model,
        held_out,
        variant="fp16",
        twin=twin,
        budget=prepared.request.budget,
        complaints=[] if twin is None else overflows(twin, torch.cat(images)),
    )
    return _settle(prepared, "fp16", model, shown)


def _int8(
    prepared: Prepared, *, fine_tune: FineTune | None, tell: Callable[[str], None]
) -> ExportedModel:
    run = prepared.request.run
    float32, unverified = run.onnx("fp32"), run.unverified_onnx("int8")
    if fine_tune is None:
        made = make_int8(prepared, float32, unverified, tell=tell)
    else:
        made = make_fine_tuned(prepared, float32, unverified, fine_tune=fine_tune, tell=tell)
    model = prepared.opened(unverified)
    tell("int8: attacking the file")
    shown = verify_int8(prepared, model, made.unrounded, prepared.held_out, variant=made.variant)
    return _settle(prepared, made.variant, model, shown, details=made.details(prepared))


def _settle(
    prepared: Prepared,
    variant: Variant,
    model: OnnxModel,
    shown: ExportVerification,
    *,
    details: dict[str, Any] | None = None,
) -> ExportedModel:
    """Put the very bytes that were verified in their place, with what was shown beside them."""
    run, precision = prepared.request.run, PRECISION_OF[variant]
    if shown.status in {"failed", "too_lossy"}:
        raise _refusal(model.path, variant, shown)
    exported = ExportedModel(
        path=run.onnx(variant),
        format="onnx",
        precision=precision,
        variant=variant,
        opset=prepared.form.opset,
        input_name=INPUT_NAME,
        input_contract=prepared.form.input_contract,
        sha256=model.sha256,
        source_sha256=prepared.source_sha256,
        num_bytes=model.num_bytes,
        verification=shown,
        details=details or {},
    )
    write_bytes_atomically(exported.path, model.content)
    write_json_atomically(run.onnx_verification(variant), as_table(exported))
    model.path.unlink()
    return exported


def _refusal(
    path: Path, variant: Variant, shown: ExportVerification
) -> ArtefactMismatchError | TooLossyError:
    precision = PRECISION_OF[variant]
    before = "torch" if precision == "fp32" else "fp32"
    hop = f"the hop {before} -> {precision}"
    if shown.status == "failed":
        return ArtefactMismatchError(
            f"{hop} is the first that loses something: {path} does not answer as its source: "
            f"{shown.reason}. Do not deploy it; an earlier export, if there was one, is untouched"
        )
    worth = ", so int8 is not worth it here" if precision == "int8" else ""
    return TooLossyError(
        f"{hop} costs too much{worth}: {shown.reason}. {path} is not to be deployed; "
        f"{_REMEDIES[variant]}, or allow more with --max-robust-drop or --max-clean-drop"
    )


def as_table(exported: ExportedModel) -> dict[str, Any]:
    """Plain values for JSON; the path is only a name, as folders move."""
    shown = verification_table(exported.verification)
    return asdict(exported) | {"path": exported.path.name, "verification": shown}

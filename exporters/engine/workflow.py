"""From verified ONNX files to a build kit and, where TensorRT is, to engines.

N images, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from compressor.device.build_options import BuildOptions
from compressor.device.build_progress import PhaseEvent
from compressor.device.engine import Engine, audit_layers, wrong_precision
from compressor.device.kit_files import DeviceError, MissingPackageError
from compressor.device.tensorrt_runtime import TensorRT
from compressor.errors import ArtefactMismatchError, TooLossyError
from exporters.engine.build_kit import KitModel, write_build_kit
from exporters.engine.golden import Golden
from exporters.engine.to_tensorrt import (
    EngineFacts,
    NewEngine,
    build_engine,
    device_errors_explained,
)
from exporters.exported_model import (
    ExportedModel,
    ExportVerification,
    Variant,
    verification_table,
)
from exporters.held_out import answers
from exporters.hops import prove_hop
from exporters.int8.calibration import as_input
from exporters.request import Prepared, twin_of

NUM_GOLDEN_IMAGES = 32
"""Clean, and as many adversarial; together a few hundred kB for small images."""


@dataclass(frozen=True, kw_only=True)
class _Closeness:
    """How closely an engine must answer as the ONNX file that it was built from."""

    tolerance: float
    """Root mean square of the error of the logits, as a share of their spread."""
    min_agreement: float


_CLOSENESS: MappingProxyType[str, _Closeness] = MappingProxyType(
    {
        "fp32": _Closeness(tolerance=1e-3, min_agreement=0.98),
        "fp16": _Closeness(tolerance=2e-2, min_agreement=0.96),
        # Sums in another order round some activations the other way.
        "int8": _Closeness(tolerance=0.1, min_agreement=0.9),
    }
)


@dataclass(frozen=True, kw_only=True)
class ExportedEngine:
    """An engine, and what was shown about it."""

    facts: EngineFacts
    variant: Variant
    status: Literal["verified", "unverified"]
    reason: str
    verification: ExportVerification | None
    """None: it could not be run here."""


def export_kit(
    prepared: Prepared,
    made: Sequence[ExportedModel],
    *,
    options: BuildOptions,
    folder: Path | None = None,
) -> Path:
    """Write the build kit of some files; see `exporters.engine.build_kit`.

    Raises:
        ExportError: if a file cannot go into a kit.
    """
    folder = folder or prepared.request.run.build_kit
    write_build_kit(
        folder,
        models=[
            KitModel(
                path=exported.path,
                precision=exported.variant,
                tolerance=_CLOSENESS[exported.precision].tolerance,
                min_agreement=_CLOSENESS[exported.precision].min_agreement,
            )
            for exported in made
        ],
        golden=golden_of(prepared, made),
        options=options,
        class_names=prepared.class_names,
        threat=str(prepared.threat),
    )
    return folder


def golden_of(prepared: Prepared, made: Sequence[ExportedModel]) -> Golden:
    """Held-out images, clean and attacked, and what each file answers."""
    held_out, takes_bytes = prepared.held_out, prepared.form.takes_bytes
    clean_NCHW = held_out.x_NCHW[:NUM_GOLDEN_IMAGES]
    adversarial_NCHW = held_out.x_adv_NCHW[:NUM_GOLDEN_IMAGES]
    models = {exported.variant: prepared.opened(exported.path) for exported in made}
    return Golden(
        clean_NCHW=as_input(clean_NCHW, takes_bytes=takes_bytes),
        adversarial_NCHW=as_input(adversarial_NCHW, takes_bytes=takes_bytes),
        labels_N=held_out.y_N[:NUM_GOLDEN_IMAGES].numpy(),
        clean_logits_NK={name: answers(m, clean_NCHW).numpy() for name, m in models.items()},
        adversarial_logits_NK={
            name: answers(m, adversarial_NCHW).numpy() for name, m in models.items()
        },
    )


def export_engine(
    prepared: Prepared,
    exported: ExportedModel,
    *,
    options: BuildOptions,
    tensorrt: TensorRT,
    timing_cache: Path | None = None,
    observe: Callable[[PhaseEvent], None] | None = None,
) -> ExportedEngine:
    """Build the engine of one file and, where there is a GPU for it, prove this hop too.

    One that loses something is not written; an engine that was there before stays.

    Raises:
        ExportError: if it cannot be built.
        ArtefactMismatchError: if it does not answer as the network.
        TooLossyError: if it loses more accuracy than allowed.
    """
    new = build_engine(
        exported.path,
        prepared.request.run.engine(exported.variant),
        precision=exported.variant,
        options=options,
        tensorrt=tensorrt,
        timing_cache=timing_cache,
        observe=observe,
    )
    reason, shown = _run(prepared, exported, new, tensorrt=tensorrt, options=options)
    if shown is not None and shown.status in {"failed", "too_lossy"}:
        kind = TooLossyError if shown.status == "too_lossy" else ArtefactMismatchError
        raise kind(
            f"the hop {exported.variant} -> engine is the first that loses something: {reason}. "
            "The engine is not written; the ONNX file is verified"
        )
    is_verified = shown is not None and shown.status == "verified"
    status: Literal["verified", "unverified"] = "verified" if is_verified else "unverified"
    table = {} if shown is None else {"verification": verification_table(shown)}
    new.write(shown={"status": status, **table})
    return ExportedEngine(
        facts=new.facts,
        variant=exported.variant,
        status=status,
        reason=reason,
        verification=shown,
    )


def _run(
    prepared: Prepared,
    exported: ExportedModel,
    new: NewEngine,
    *,
    tensorrt: TensorRT,
    options: BuildOptions,
) -> tuple[str, ExportVerification | None]:
    """What was shown by running an engine, and in words; None if it does not run here."""
    with device_errors_explained():
        try:
            engine = Engine(new.built.plan, tensorrt=tensorrt)
        except DeviceError as error:
            if not isinstance(error, MissingPackageError) and not options.compute_capabilities:
                raise
            return f"it was built and could not be run here: {error}", None
        with engine:
            layers = audit_layers(engine.layer_information())
            shown = _prove(prepared, exported, engine, layers=layers, tf32=options.tf32)
    if not layers and shown.status == "verified":
        reason = "the inspector tells nothing of its layers, so its precision is not known"
        shown = replace(shown, status="unverified", reason=reason)
    return shown.reason, shown


def _prove(
    prepared: Prepared,
    exported: ExportedModel,
    engine: Engine,
    *,
    layers: Mapping[str, int],
    tf32: bool,
) -> ExportVerification:
    """The engine beside the network, attacked through the twin of the file it was built from."""
    wrong = wrong_precision(layers, exported.variant, tf32=tf32) if layers else None

    def answer(x_NCHW: Tensor) -> Tensor:
        return torch.from_numpy(engine(as_input(x_NCHW, takes_bytes=prepared.form.takes_bytes)))

    return prove_hop(
        answer,
        prepared.held_out,
        variant=exported.variant,
        twin=twin_of(prepared.opened(exported.path), prepared.held_out),
        budget=prepared.request.budget,
        complaints=[wrong] if wrong else [],
    )

"""From a float32 file to the int8 file that loses least, measured on held-out images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compressor.onnx_graph import read_graph
from compressor.onnx_model import OnnxModel
from exporters.exported_model import ExportVerification, Variant
from exporters.held_out import HeldOut, answers, judging_places
from exporters.hops import prove_hop, signal_to_noise_db
from exporters.int8.audit import audit, layer_weights
from exporters.int8.calibration import CALIBRATION_KINDS, CalibrationImages, CalibrationKind
from exporters.int8.mixed_precision import (
    LayerSensitivity,
    Trial,
    is_inside_budget,
    keep_until_inside,
    rank_layers,
    worth,
)
from exporters.int8.to_int8 import (
    calibrate,
    largest_magnitudes,
    quantized_layers,
    write_fine_tuned,
    write_int8,
)
from exporters.request import Prepared, twin_of
from exporters.to_onnx import ExportError

if TYPE_CHECKING:
    from onnxruntime.quantization.calibrate import TensorsData


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What one kind of calibration images led to, all layers in 8 bits."""

    kind: CalibrationKind
    index_sha256: str
    verification: ExportVerification


@dataclass(frozen=True, kw_only=True)
class Unrounded:
    """What the numbers of an int8 file were rounded from, which its audit compares them with."""

    weights: Mapping[str, Tensor]
    """By the name of the node."""
    largest: Mapping[str, float]
    """Magnitude that the range of a tensor ends at, by its name."""


@dataclass(frozen=True, kw_only=True)
class Int8Result:
    """How the file came about that was chosen; other images judge it."""

    variant: Variant
    unrounded: Unrounded
    chosen_kind: CalibrationKind
    calibrations: tuple[Calibrated, ...]
    layers: tuple[LayerSensitivity, ...]
    """Most sensitive first; empty where all layers bear 8 bits."""
    trials: tuple[Trial, ...]
    fine_tuned_epochs: int | None = None
    """Of the epoch that was best; 0 if it was none, and None without fine-tuning."""

    def details(self, prepared: Prepared) -> dict[str, Any]:
        """How the file was made, as plain values."""
        asked = prepared.request.int8
        chosen = next(c for c in self.calibrations if c.kind == self.chosen_kind)
        return {
            "calibration_method": asked.method,
            "calibration_kind": self.chosen_kind,
            "num_calibration_images": min(asked.num_images, prepared.data.train.num_images),
            "calibration_index_sha256": chosen.index_sha256,
            "calibrations": [
                {
                    "kind": c.kind,
                    "status": c.verification.status,
                    "robust": asdict(c.verification.robust),
                }
                for c in self.calibrations
            ],
            "fine_tuned_epochs": self.fine_tuned_epochs,
            "kept_in_float": [layer.name for layer in self.layers if layer.is_kept],
            "layers": [_layer_table(layer) for layer in self.layers],
            "trials": [
                {
                    "num_kept": trial.num_kept,
                    "status": trial.verification.status,
                    "robust_drop": trial.verification.robust_drop.fraction,
                }
                for trial in self.trials
            ],
        }


def _layer_table(layer: LayerSensitivity) -> dict[str, Any]:
    drop = layer.robust_drop
    return {
        "name": layer.name,
        "num_weights": layer.num_weights,
        "sqnr_db": layer.sqnr_db if isfinite(layer.sqnr_db) else None,
        "robust_drop": None if drop is None else drop.fraction,
        "is_kept": layer.is_kept,
    }


FineTune = Callable[[Path, Path, Tensor], tuple[Mapping[str, Tensor], int]]
"""(float32 file, int8 file, places of held-out images that may choose nothing, int64) -> what
`exporters.int8.to_int8.write_fine_tuned` takes, and the epoch it is from; 0: from before it."""


def make_int8(
    prepared: Prepared, float32: Path, path: Path, *, tell: Callable[[str], None]
) -> Int8Result:
    """Write the int8 file to `path`: all layers in 8 bits, or with the few worst in float.

    Raises:
        ExportError: if the file cannot be quantised.
    """
    maker = _Maker(prepared=prepared, float32=float32, path=path, images=prepared.choosing())
    best, ranges, tried = _calibrate(maker, tell=tell)
    layers: list[LayerSensitivity] = []
    trials: list[Trial] = []
    if not is_inside_budget(best.verification) or prepared.request.int8.min_kept:
        layers, trials = _mix(maker, ranges, tell=tell)
    if not trials and prepared.request.int8.min_kept:
        raise ExportError(
            f"keeping {prepared.request.int8.min_kept} of {len(layers)} layers in float leaves "
            "more than a third of the weights there, and half of the bytes; keep fewer, or use "
            "--precision fp16"
        )
    maker.write(ranges, kept=[layer.name for layer in layers if layer.is_kept])
    return Int8Result(
        variant="int8-mixed" if trials else "int8",
        unrounded=maker.unrounded(ranges),
        chosen_kind=best.kind,
        calibrations=tuple(tried),
        layers=tuple(layers),
        trials=tuple(trials),
    )


def make_fine_tuned(
    prepared: Prepared,
    float32: Path,
    path: Path,
    *,
    fine_tune: FineTune,
    tell: Callable[[str], None],
) -> Int8Result:
    """Write the int8 file to `path`, all layers in 8 bits, after fine-tuning what is rounded.

    Raises:
        ExportError: if the file cannot be quantised.
    """
    maker = _Maker(prepared=prepared, float32=float32, path=path, images=prepared.choosing())
    best, ranges, tried = _calibrate(maker, tell=tell)
    maker.write(ranges, kept=())
    graph = read_graph(path.read_bytes(), path)
    tell("int8: fine-tuning the rounded network")
    validation, num_images = prepared.data.validation, prepared.request.num_images
    trained, epoch = fine_tune(float32, path, judging_places(validation, num_images=num_images))
    if epoch:  # else the file stays, byte for byte, what it is without fine-tuning
        write_fine_tuned(path, path, trained, metadata=prepared.metadata())
    makers = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.inputs[0] in trained}
    weights = {
        node.name: trained[makers[node.inputs[1]]]
        for node in graph.nodes
        if len(node.inputs) > 1 and node.inputs[1] in makers
    }
    return Int8Result(
        variant="int8-qat" if epoch else "int8",  # nothing was tuned, and its limits are narrower
        unrounded=Unrounded(weights=weights, largest=largest_magnitudes(ranges)),
        chosen_kind=best.kind,
        calibrations=tuple(tried),
        layers=(),
        trials=(),
        fine_tuned_epochs=epoch,
    )


def _calibrate(
    maker: "_Maker", *, tell: Callable[[str], None]
) -> "tuple[Calibrated, TensorsData, list[Calibrated]]":
    """The calibration whose file is worth most on held-out images, its ranges, and all tried."""
    asked = maker.prepared.request.int8
    kinds = CALIBRATION_KINDS if asked.kind is None else (asked.kind,)
    ranges, tried = {}, []
    for kind in kinds:
        tell(f"int8: calibrating on {asked.num_images} {kind} training images")
        images = maker.calibration_images(kind)
        ranges[kind] = calibrate(maker.float32, images.batches(), method=asked.method)
        verification = maker.measure(ranges[kind], kept=())
        tried.append(
            Calibrated(kind=kind, index_sha256=images.index_sha256, verification=verification)
        )
    best = max(tried, key=lambda c: worth(c.verification))
    return best, ranges[best.kind], tried


def _mix(
    maker: "_Maker", ranges: "TensorsData", *, tell: Callable[[str], None]
) -> tuple[list[LayerSensitivity], list[Trial]]:
    sizes = {name: weight.numel() for name, weight in maker.unrounded(ranges).weights.items()}
    names = quantized_layers(maker.float32)
    tell(f"int8: ranking {len(names)} layers, each quantised alone")
    ranked = rank_layers(
        [(name, sizes[name]) for name in names],
        proxy_db=lambda kept: maker.proxy_db(ranges, kept),
        measure=lambda kept: maker.measure(ranges, kept=kept),
    )

    def measure(kept: Sequence[str]) -> ExportVerification:
        found = maker.measure(ranges, kept=kept)
        tell(f"int8: {len(kept)} of {len(names)} layers in float: {found.status}, {found.reason}")
        return found

    return keep_until_inside(
        ranked,
        measure=measure,
        num_first=max(1, maker.prepared.request.int8.min_kept),
    )


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Writes candidates over each other and measures them."""

    prepared: Prepared
    float32: Path
    path: Path
    images: HeldOut
    """On which candidates are chosen."""

    def calibration_images(self, kind: CalibrationKind) -> CalibrationImages:
        prepared = self.prepared
        return CalibrationImages(
            network=prepared.network,
            split=prepared.data.train,
            threat=prepared.threat,
            num_images=prepared.request.int8.num_images,
            kind=kind,
            takes_bytes=prepared.form.takes_bytes,
        )

    def unrounded(self, ranges: "TensorsData") -> Unrounded:
        return Unrounded(
            weights=layer_weights(read_graph(self.float32.read_bytes(), self.float32)),
            largest=largest_magnitudes(ranges),
        )

    def write(self, ranges: "TensorsData", *, kept: Sequence[str]) -> None:
        metadata = self.prepared.metadata()
        write_int8(self.float32, self.path, ranges, kept_in_float=kept, metadata=metadata)

    def proxy_db(self, ranges: "TensorsData", kept: Sequence[str]) -> float:
        self.write(ranges, kept=kept)
        found_NK = answers(self.prepared.opened(self.path), self.images.x_adv_NCHW)
        return signal_to_noise_db(self.images.adversarial_NK, found_NK)

    def measure(self, ranges: "TensorsData", *, kept: Sequence[str]) -> ExportVerification:
        self.write(ranges, kept=kept)
        model = self.prepared.opened(self.path)
        return verify_int8(self.prepared, model, self.unrounded(ranges), self.images)


def verify_int8(
    prepared: Prepared,
    model: OnnxModel,
    unrounded: Unrounded,
    images: HeldOut,
    *,
    variant: Variant = "int8",
) -> ExportVerification:
    """Compare an int8 file with the network, attack it, and look at its scales."""
    twin = twin_of(model, images)
    complaints = audit(
        read_graph(model.content, model.path),
        twin,
        images.x_NCHW,
        float_weights=unrounded.weights,
        largest=unrounded.largest,
    )
    return prove_hop(
        model,
        images,
        variant=variant,
        twin=twin,
        budget=prepared.request.budget,
        complaints=complaints,
    )

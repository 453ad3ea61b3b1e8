"""write_build_kit: a folder from which a device builds its own engines and proves them.

A kit holds ONNX files, golden images with the answers that must come back, and scripts that need
only the standard library, numpy and TensorRT or ONNX Runtime. The same inputs give the same bytes.
N images, C channels, H and W pixels, K classes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.device.build_options import BuildOptions
from compressor.device.kit_files import (
    CODE_FOLDER,
    GOLDEN_FILE,
    KIT_FILE,
    MODEL_FILE_NAME,
    read_kit,
    sha256_of,
)
from compressor.device.replay import replay
from compressor.errors import ArtefactMismatchError
from compressor.run_directory import folder_written_atomically
from exporters.engine.golden import Golden
from exporters.engine.kit_texts import SCRIPTS, readme
from exporters.engine.to_tensorrt import read_checked_onnx
from exporters.to_onnx import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

_PRECISION = re.compile(r"(fp32|fp16|int8)(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class KitModel:
    """One ONNX file, and how closely engines made of it must answer.

    Attributes:
        path: the file, whose name it keeps.
        precision: fp32, fp16 or int8, perhaps with a suffix such as int8-mixed; one of a kind.
        tolerance: largest root mean square error of the logits, relative to the size of the logits
            (their root mean square distance from the mean over the classes).
        min_agreement: smallest fraction of golden images, clean and adversarial, that must get the
            label that the file gives them.
    """

    path: Path
    precision: str
    tolerance: float
    min_agreement: float


@dataclass(frozen=True, kw_only=True)
class _Contract:
    """What all files of a kit take and give."""

    input_name: str
    dtype: str
    image_shape: tuple[int, ...]
    output_name: str
    num_classes: int

    def to_table(self) -> dict[str, Any]:
        pixels = "0 to 255" if self.dtype == "uint8" else "0 to 1"
        shape = list(self.image_shape)
        return {
            "input": {
                "name": self.input_name,
                "dtype": self.dtype,
                "shape": shape,
                "pixels": pixels,
            },
            "output": {"name": self.output_name, "num_classes": self.num_classes},
        }


def write_build_kit(
    folder: Path,
    *,
    models: Sequence[KitModel],
    golden: Golden,
    options: BuildOptions,
    class_names: Sequence[str],
    threat: str,
) -> str:
    """Write a kit as a whole or not at all, once ONNX Runtime has replayed it.

    Args:
        folder: is made, or replaced if it is a kit, with all that was built in it.
        models: at least one, each of another precision.
        golden: the images and what the models answer.
        options: how engines are built, unless the device says otherwise.
        class_names: K of them.
        threat: for people, such as "linf 8/255".

    Returns:
        The sha256 of `kit.json`, which holds those of all other files.

    Raises:
        ExportError: if a file, an array or the folder is not as it must be.
        ArtefactMismatchError: if a file does not answer the golden images as `golden` says.
    """
    contents, contract = _read_models(models)
    golden.check(
        image_shape=contract.image_shape,
        dtype=contract.dtype,
        num_classes=contract.num_classes,
        precisions=[model.precision for model in models],
    )
    if len(class_names) != contract.num_classes:
        raise ExportError(f"{len(class_names)} class names for {contract.num_classes} classes")
    _refuse_other_folders(folder)
    files = _code() | {GOLDEN_FILE: golden.to_npz()}
    files["README.md"] = readme([model.path.name for model in models], threat=threat).encode()
    rows = [_row(model, contents[model.path.name]) for model in models]
    about = {"class_names": list(class_names), "threat": threat, **contract.to_table()}
    kit_json = _kit_json({**about, "models": rows, "build": options.to_table()}, files)
    with folder_written_atomically(folder) as new:
        (new / CODE_FOLDER).mkdir()
        for name, content in {**contents, **files, KIT_FILE: kit_json}.items():
            (new / name).write_bytes(content)
        _replay_all(new, folder)
    return sha256_of(kit_json)


def _kit_json(table: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    hashes = {name: sha256_of(files[name]) for name in sorted(files)}
    whole = {"schema_version": 1, **table, "files": hashes}
    return (json.dumps(whole, indent=2, allow_nan=False) + "\n").encode()


def _row(model: KitModel, content: bytes) -> dict[str, Any]:
    return {
        "file": model.path.name,
        "sha256": sha256_of(content),
        "precision": model.precision,
        "tolerance": model.tolerance,
        "min_agreement": model.min_agreement,
    }


def _read_models(models: Sequence[KitModel]) -> tuple[dict[str, bytes], _Contract]:
    if not models:
        raise ExportError("a build kit needs at least one ONNX file")
    contents, contracts = {}, {}
    for model in models:
        if not _PRECISION.fullmatch(model.precision):
            raise ExportError(f"precision {model.precision!r} is not fp32, fp16 or int8")
        if not MODEL_FILE_NAME.fullmatch(model.path.name):
            raise ExportError(
                f"{model.path.name!r} cannot be the name of a file in a kit; use letters, digits, "
                "., _ and -, and end with .onnx"
            )
        if not (0 < model.tolerance < 1 and 0 < model.min_agreement <= 1):
            raise ExportError(f"{model}: tolerance or min_agreement is out of range")
        contents[model.path.name], graph = read_checked_onnx(model.path)
        contracts[model.precision] = _contract_of(graph, model.path)
    if not len(contents) == len(contracts) == len(models):
        raise ExportError("the files of a build kit must differ in name and in precision")
    if len(set(contracts.values())) > 1:
        raise ExportError(f"the files of a build kit take or give different tensors: {contracts}")
    return contents, next(iter(contracts.values()))


def _contract_of(model: "ModelProto", path: Path) -> _Contract:
    import onnx

    inputs, outputs = _tensors(model)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ExportError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs, not 1 of each"
        )
    image, logits = inputs[0].type.tensor_type, outputs[0].type.tensor_type
    sides = [side.dim_value for side in image.shape.dim[1:]]
    num_classes = [side.dim_value for side in logits.shape.dim[1:]]
    if len(sides) != 3 or len(num_classes) != 1 or not all(sides + num_classes):
        raise ExportError(f"{path} must take images of one size and give logits of K classes")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(image.elem_type).name
    if dtype not in ("float32", "uint8"):
        raise ExportError(f"{path} takes {dtype}; float32 and uint8 serve")
    return _Contract(
        input_name=inputs[0].name,
        dtype=dtype,
        image_shape=tuple(sides),
        output_name=outputs[0].name,
        num_classes=num_classes[0],
    )


def _tensors(model: "ModelProto") -> "tuple[list[ValueInfoProto], list[ValueInfoProto]]":
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    return inputs, list(model.graph.output)


def _code() -> dict[str, bytes]:
    """The modules that run on the device, as they are here, and the scripts that call them."""
    package = resources.files("compressor.device")
    modules = sorted(path.name for path in package.iterdir() if path.name.endswith(".py"))
    code = {f"{CODE_FOLDER}/{name}": (package / name).read_bytes() for name in modules}
    return code | {name: text.encode() for name, text in SCRIPTS.items()}


def _refuse_other_folders(folder: Path) -> None:
    """Writing replaces the folder, so it must be new, empty or a kit."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not (folder / KIT_FILE).is_file():
        raise ExportError(f"{folder} exists and is no build kit; choose another folder")


def _replay_all(new: Path, folder: Path) -> None:
    """The kit must pass its own replay before anybody gets it."""
    kit = read_kit(new)
    for entry in kit.entries:
        shown = replay(kit, entry.file)
        if shown.status != "PASS":
            raise ArtefactMismatchError(
                f"{folder} was not written: {entry.file} does not answer its golden images: "
                f"{shown.reason}"
            )

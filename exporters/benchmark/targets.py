"""find_targets: from what a user types to targets of a benchmark.

C channels, H and W pixels.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from compressor.architectures.build import build_backbone, infer_width
from compressor.device.kit_files import KIT_FILE, read_kit
from compressor.errors import ArtefactMismatchError, RunError, UsageError
from compressor.networks import (
    Classifier,
    NetworkSpec,
    classifier_with_weights,
    load_classifier,
    load_trained,
)
from compressor.onnx_model import load_onnx_model
from compressor.onnx_providers import Provider
from compressor.recipe_file import load_recipe
from compressor.run_directory import RunDirectory, read_facts
from compressor.weights import count_classes, read_state_dict, sha256_of_file
from exporters.benchmark.engine_targets import built_from, engine_of_run, engine_target
from exporters.benchmark.onnx_target import onnx_target
from exporters.benchmark.target import Answer, BenchTarget, Images, ImageShape
from exporters.bundle.manifest import KIT_FOLDER, MANIFEST_FILE
from exporters.engine.to_tensorrt import device_errors_explained


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """How what is found is to be run."""

    image_shape: ImageShape | None
    provider: Provider
    trusted_sha256: Collection[str]
    leave_out: Callable[[Path, str], None] = field(compare=False)


def find_targets(
    source: str,
    *,
    image_shape: ImageShape | None = None,
    provider: Provider = "cpu",
    trusted_sha256: Collection[str] = (),
    leave_out: Callable[[Path, str], None] = lambda *_: None,
) -> list[BenchTarget]:
    """What a run, a bundle, a build kit, an exported file, or a file of weights holds.

    A run is its network, every ONNX file exported from it but those that failed their check, and
    its engines; what was made from other weights than it holds now is left out. A bundle or a build
    kit is its ONNX files, each compared with its hash.

    Args:
        source: as typed: a folder, FILE.onnx, FILE.engine, ARCH:WEIGHTS or WEIGHTS.
        image_shape: of the images where the file does not say it.
        provider: what runs ONNX files.
        trusted_sha256: of the sidecars of engines that may be run.
        leave_out: told which files of a run are left out, and why.

    Raises:
        UsageError: if nobody says which images it takes.
        RobustCompressError: if it is not what it should be, or what runs it is not here.
    """
    path = Path(source)
    wanted = _Wanted(
        image_shape=image_shape,
        provider=provider,
        trusted_sha256=trusted_sha256,
        leave_out=leave_out,
    )
    if path.is_dir():
        return _targets_in(path, wanted)
    if path.suffix == ".onnx":
        return [_dated(_onnx_target(path, wanted))]
    if path.suffix == ".engine":
        target = engine_target(path, trusted_sha256=trusted_sha256, image_shape=image_shape)
        return [_dated(target)]
    if ":" in source and not path.is_file():
        return [_architecture_target(source, image_shape)]
    network, spec = load_classifier(path)
    return [_network_target(network, spec, path, source=source)]


def is_run(folder: Path) -> bool:
    """Whether `find_targets` takes a folder as a run, and not as a bundle or a build kit."""
    return RunDirectory(folder).resolved_recipe.is_file()


def _targets_in(folder: Path, wanted: _Wanted) -> list[BenchTarget]:
    if not is_run(folder) and (folder / MANIFEST_FILE).is_file():
        return _targets_of_kit(folder / KIT_FOLDER, wanted, folder=folder)
    if not is_run(folder) and (folder / KIT_FILE).is_file():
        return _targets_of_kit(folder, wanted, folder=folder)
    return _targets_of_run(RunDirectory.open(folder), wanted)


def _targets_of_kit(kit_folder: Path, wanted: _Wanted, *, folder: Path) -> list[BenchTarget]:
    with device_errors_explained():
        kit = read_kit(kit_folder)
    targets = []
    for entry in kit.entries:
        target = _onnx_target(kit_folder / entry.file, wanted, folder=folder)
        if target.sha256 != entry.sha256:
            raise ArtefactMismatchError(
                f"{target.source} has SHA-256 {target.sha256}, and {KIT_FILE} names "
                f"{entry.sha256}; copy {folder} again"
            )
        targets.append(target)
    return targets


def _targets_of_run(run: RunDirectory, wanted: _Wanted) -> list[BenchTarget]:
    network, spec = load_trained(run)
    first = replace(
        _network_target(network, spec, run.model, source=str(run.model)),
        threat=str(load_recipe(run.resolved_recipe).threat.build()),
    )
    unproven = run.unverified_onnx("*").name
    exports = sorted(run.exports.glob("*.onnx"))
    files = [path for path in exports if not path.match(unproven)]
    found = [_dated(_onnx_target(path, wanted, folder=run.path)) for path in files]
    found.sort(key=lambda target: -target.num_bytes)
    for stale in (target for target in found if target.is_stale):
        wanted.leave_out(
            Path(stale.source),
            f"made from other weights than {run.path} holds now; export it again",
        )
    return [
        first,
        *(target for target in found if not target.is_stale),
        *_engines_of_run(run, found, wanted, like=first),
    ]


def _engines_of_run(
    run: RunDirectory, files: Sequence[BenchTarget], wanted: _Wanted, *, like: BenchTarget
) -> list[BenchTarget]:
    """All but those that were built from a file that is stale, or is another now."""
    made_from = {target.name: target for target in files}
    engines = []
    for path in sorted(run.exports.glob("*.engine")):
        name, sha256 = built_from(path) or ("", "")
        source = made_from.get(name)
        if source is not None and (source.is_stale or source.sha256 != sha256):
            wanted.leave_out(
                path, f"built from another {name} than that of the run; build it again"
            )
            continue
        same_name = made_from.get(f"{path.stem}.onnx")
        nearest = like if same_name is None or same_name.is_stale else same_name
        engines.append(engine_of_run(path, like=nearest, trusted_sha256=wanted.trusted_sha256))
    return engines


def _dated(target: BenchTarget) -> BenchTarget:
    """The same, marked as stale if it is in a run that has other weights now."""
    folder = Path(target.source).absolute().parent
    run = RunDirectory(folder.parent)
    if run.exports != folder or not is_run(run.path):
        return target
    try:
        weights = read_facts(run).get("model_sha256")
    except RunError:  # it is not known
        return target
    return replace(target, is_stale=target.source_sha256 not in {weights, None})


def _onnx_target(path: Path, wanted: _Wanted, *, folder: Path | None = None) -> BenchTarget:
    model = load_onnx_model(path, num_threads=1, provider=wanted.provider)
    return onnx_target(model, image_shape=wanted.image_shape, folder=folder)


def _architecture_target(source: str, image_shape: ImageShape | None) -> BenchTarget:
    architecture, _, file = source.rpartition(":")
    content = read_state_dict(Path(file))
    width = infer_width(architecture, content.tensors)
    if image_shape is None:
        raise UsageError(f"{source} does not say for which images; give --image-shape 3x32x32")
    with torch.device("meta"):  # names and shapes, without weights
        shadow = build_backbone(architecture, num_classes=2, image_shape=image_shape, width=width)
    spec = NetworkSpec(
        architecture=architecture,
        width=width,
        num_classes=count_classes(content.tensors, shadow) or 2,
        image_shape=image_shape,
    )
    network = classifier_with_weights(spec, content)
    return _network_target(network, spec, Path(file), source=source)


def _network_target(
    network: Classifier, spec: NetworkSpec, path: Path, *, source: str
) -> BenchTarget:
    def answer(images_NCHW: Images) -> None:
        with torch.inference_mode():
            network(torch.from_numpy(images_NCHW)).numpy()

    def open_on(num_threads: int) -> Answer:
        torch.set_num_threads(num_threads)
        return answer

    return BenchTarget(
        name=path.name,
        kind="pytorch",
        source=source,
        folder=path.parent,
        precision="fp32",
        sha256=sha256_of_file(path),
        source_sha256=sha256_of_file(path),
        num_bytes=path.stat().st_size,
        image_shape=spec.image_shape,
        runs_on="PyTorch, CPU",
        open=open_on,
    )

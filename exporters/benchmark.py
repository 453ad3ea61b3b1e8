"""What artefacts answer with, and how long it takes them, side by side.

Targets take turns: A, B, C, A, B, C, so that a drift of the machine hits all of them. A turn is one
call that is not timed, as the caches hold what the target before left there, and then calls one
after the other, each timed from images to logits as arrays of the host.

N images, C channels, H and W pixels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.architectures.build import build_backbone, infer_width
from compressor.errors import ArtefactMismatchError, UsageError
from compressor.networks import (
    Classifier,
    NetworkSpec,
    classifier_with_weights,
    load_classifier,
    load_trained,
)
from compressor.onnx_model import OnnxModel, load_onnx_model
from compressor.run_directory import RunDirectory
from compressor.weights import count_classes, read_state_dict, sha256_of_file

Images = NDArray[np.float32] | NDArray[np.uint8]
Answer = Callable[[Images], None]
"""Takes images [N, C, H, W] and makes their logits."""
ImageShape = tuple[int, int, int]  # (C, H, W)

_MIN_CALLS, _MAX_CALLS = 3, 10_000  # that are timed in one turn
_WARM_UP_SHARE = 0.1  # of the time of a measurement


@dataclass(frozen=True, kw_only=True)
class BenchTarget:
    """Something that answers images, and how to open it."""

    name: str
    kind: Literal["pytorch", "onnx", "engine"]
    source: str
    """With which `find_targets` finds this target alone, in another process."""
    folder: Path
    """Of its run, or else of the file."""
    precision: str
    sha256: str
    source_sha256: str | None
    """Of the weights that it was made from, where it says so."""
    num_bytes: int
    image_shape: ImageShape
    takes_bytes: bool = False
    """Pixels are uint8 instead of float32 in [0, 1]."""
    runs_on: str
    batch_size: int | None = None
    """The only one that it takes; None: any."""
    open: Callable[[int], Answer] = field(repr=False, compare=False)
    """From a number of threads; may set that of the process, which `measure` puts back."""

    def images(self, batch_size: int) -> Images:
        """Seeded uniform images of the shape and type that it takes."""
        shape, generator = (batch_size, *self.image_shape), np.random.default_rng(0)
        if self.takes_bytes:
            return generator.integers(0, 256, shape, dtype=np.uint8)
        return generator.random(shape, dtype=np.float32)


def find_targets(source: str, *, image_shape: ImageShape | None = None) -> list[BenchTarget]:
    """What a run folder, an ONNX file, `ARCH:WEIGHTS` or a self-describing file of weights holds.

    A run is its network and every ONNX file exported from it but those that failed their check.

    Args:
        source: as typed.
        image_shape: of the images where the file does not say it.

    Raises:
        UsageError: if nobody says which images it takes.
        RobustCompressError: if it is not what it should be.
    """
    path = Path(source)
    if path.is_dir():
        return _targets_of_run(RunDirectory.open(path), image_shape)
    if path.suffix == ".onnx":
        return [_onnx_target(path, image_shape, folder=path.parent)]
    if ":" in source and not path.is_file():
        return [_architecture_target(source, image_shape)]
    network, spec = load_classifier(path)
    return [_network_target(network, spec, path, source=source)]


def _targets_of_run(run: RunDirectory, image_shape: ImageShape | None) -> list[BenchTarget]:
    network, spec = load_trained(run)
    unproven = run.unverified_onnx("*").name
    exports = sorted(run.onnx("*").parent.glob("*.onnx"))
    files = [path for path in exports if not path.match(unproven)]
    artefacts = [_onnx_target(path, image_shape, folder=run.path) for path in files]
    artefacts.sort(key=lambda target: -target.num_bytes)
    return [_network_target(network, spec, run.model, source=str(run.model)), *artefacts]


def _onnx_target(path: Path, image_shape: ImageShape | None, *, folder: Path) -> BenchTarget:
    model = load_onnx_model(path, num_threads=1)
    sides = zip(model.image_shape, image_shape or (None,) * 3, strict=True)
    channels, height, width = (own or given or 0 for own, given in sides)
    if not (channels and height and width):
        raise UsageError(f"{path} takes images of any size; give one, as --image-shape 3x32x32")
    return BenchTarget(
        name=path.name,
        kind="onnx",
        source=str(path),
        folder=folder,
        precision=_precision(model.content),
        sha256=model.sha256,
        source_sha256=model.metadata.get("robust_compress.source_sha256"),
        num_bytes=model.num_bytes,
        image_shape=(channels, height, width),
        takes_bytes=model.takes_bytes,
        runs_on=f"ONNX Runtime, {', '.join(model.session.get_providers())}",
        batch_size=model.batch_size,
        open=lambda num_threads: _open_onnx(model, num_threads),
    )


def _precision(content: bytes) -> str:
    """By what is in the graph: `int8` if anything is quantised, else by its constants."""
    import onnx  # heavy; only needed here

    graph = onnx.ModelProto.FromString(content).graph
    if any(node.op_type == "DequantizeLinear" for node in graph.node):
        return "int8"
    halves = onnx.TensorProto.FLOAT16
    return "fp16" if any(tensor.data_type == halves for tensor in graph.initializer) else "fp32"


def _open_onnx(model: OnnxModel, num_threads: int) -> Answer:
    """The session of `model` has one thread, and is used again for that."""
    opened = model if num_threads == 1 else load_onnx_model(model.path, num_threads=num_threads)
    if opened.sha256 != model.sha256:
        raise ArtefactMismatchError(f"{model.path} was changed meanwhile; measure it again")
    session, input_name = opened.session, opened.input_name

    def answer(images_NCHW: Images) -> None:
        session.run(None, {input_name: images_NCHW})

    return answer


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; `seconds` are for one target at one batch size and thread count."""

    batch_sizes: tuple[int, ...]
    thread_counts: tuple[int, ...]
    num_rounds: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One target at one batch size and thread count."""

    target: BenchTarget
    batch_size: int
    num_threads: int
    why_not: str = ""
    rounds_ns: tuple[tuple[int, ...], ...] = ()
    """Durations of the calls of each round; none if `why_not` says why."""


def measure(
    targets: Sequence[BenchTarget],
    plan: Plan,
    *,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    observe: Callable[[Measured, int], None] = lambda *_: None,
) -> list[Measured]:
    """Time every target at every batch size and thread count.

    Args:
        targets: in the order in which they take turns.
        plan: how long and how often.
        clock_ns: nanoseconds since some moment.
        observe: told what is measured next, and in which round, from 1.
    """
    found: list[Measured] = []
    torch_threads = torch.get_num_threads()
    try:
        for num_threads in plan.thread_counts:
            answers = [target.open(num_threads) for target in targets]
            for size in plan.batch_sizes:
                contenders = []
                for target, answer in zip(targets, answers, strict=True):
                    cell = Measured(target=target, batch_size=size, num_threads=num_threads)
                    contenders.append(_Contender(cell, answer, clock_ns))
                found += _contest(contenders, plan, observe=observe)
    finally:
        torch.set_num_threads(torch_threads)
    return found


class _Contender:
    """A measurement under way."""

    def __init__(self, cell: Measured, answer: Answer, clock_ns: Callable[[], int]) -> None:
        self.cell, self._answer, self._clock_ns = cell, answer, clock_ns

    def warm_up(self, seconds: float) -> None:
        """Which also tells whether such a batch can be answered at all."""
        only = self.cell.target.batch_size
        why_not = f"it takes batches of {only} only"
        try:
            if only in (None, self.cell.batch_size):
                self._images = self.cell.target.images(self.cell.batch_size)
                self._durations_ns(seconds)
                return
        except Exception as error:  # noqa: BLE001 (a runtime raises whatever it meets)
            said = str(error).partition("\n")[0][:200]
            why_not = f"it failed: {said or type(error).__name__}"
        self.cell = replace(self.cell, why_not=why_not)

    def take_turn(self, seconds: float) -> None:
        """The durations of one round."""
        rounds_ns = (*self.cell.rounds_ns, self._durations_ns(seconds))
        self.cell = replace(self.cell, rounds_ns=rounds_ns)

    def _durations_ns(self, seconds: float) -> tuple[int, ...]:
        self._answer(self._images)
        durations: list[int] = []
        now = self._clock_ns()
        end = now + round(1e9 * seconds)
        while len(durations) < _MIN_CALLS or (now < end and len(durations) < _MAX_CALLS):
            started = self._clock_ns()
            self._answer(self._images)
            now = self._clock_ns()
            durations.append(now - started)
        return tuple(durations)


def _contest(
    contenders: Sequence[_Contender], plan: Plan, *, observe: Callable[[Measured, int], None]
) -> list[Measured]:
    for contender in contenders:
        contender.warm_up(_WARM_UP_SHARE * plan.seconds)
    able = [contender for contender in contenders if not contender.cell.why_not]
    for number in range(1, plan.num_rounds + 1):
        for contender in able:
            observe(contender.cell, number)
            contender.take_turn(plan.seconds / plan.num_rounds)
    return [contender.cell for contender in contenders]

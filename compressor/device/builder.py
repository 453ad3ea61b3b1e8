"""build: from the bytes of an ONNX file to a TensorRT engine, on one path for all versions.

Right for TensorRT 10.3 to 11.4 and for TensorRT-RTX: networks are strongly typed, so the precision
is that of the graph. Flags of precision, which TensorRT 11 has dropped, are never touched.
Goes into build kits.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .build_network import Tensor, add_profile, batch_of, images_and_logits, parse_onnx
from .build_options import BuildError, BuildOptions
from .build_progress import BuildWatch, PhaseEvent, monitor_of
from .cuda import gpu_name
from .kit_files import MAX_MODEL_BYTES
from .tensorrt_runtime import TensorRT, errors_of, import_tensorrt, logger_of

_POLL_SECONDS = 0.1
_Result = TypeVar("_Result")
_Messages = Sequence[tuple[str, str]]


class BuildCancelledError(BuildError):
    """A build was cancelled; nothing of it is left."""

    exit_code = 130


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine that was never run, and how it was made."""

    plan: bytes
    tensorrt: TensorRT
    options: BuildOptions
    images: Tensor
    logits: Tensor
    batch: tuple[int, int, int]
    """Smallest, usual and largest."""
    flags: tuple[str, ...]
    """The builder flags that were set, as TensorRT reads them back."""
    gpu: str | None
    """None: built without one."""
    build_seconds: float
    warnings: tuple[str, ...]
    timing_cache: bytes | None
    """Makes the next build fast; None for RTX, which has none."""


def build(
    onnx_bytes: bytes,
    options: BuildOptions,
    *,
    tensorrt: TensorRT | None = None,
    timing_cache: bytes = b"",
    observe: Callable[[PhaseEvent], None] | None = None,
    cancel: threading.Event | None = None,
) -> BuiltEngine:
    """Build an engine in a thread of its own, so that Ctrl-C in the main thread can stop it.

    Args:
        onnx_bytes: the content of a file that holds everything.
        options: all but the precision.
        tensorrt: of `import_tensorrt`; None: the first that can be imported.
        timing_cache: of an earlier build on this GPU; RTX does not use it.
        observe: hears how far it is, one call at a time, from threads of TensorRT.
        cancel: when it is set, the build ends at its next step.

    Raises:
        MissingPackageError: if TensorRT is not here.
        BuildError: if the file, the options or the machine do not allow it.
        BuildCancelledError: if `cancel` was set.
    """
    if not 0 < len(onnx_bytes) <= MAX_MODEL_BYTES:
        raise BuildError(
            f"the ONNX file has {len(onnx_bytes):,} bytes; 1 to {MAX_MODEL_BYTES:,} can be built"
        )
    tensorrt = tensorrt or import_tensorrt()
    _check_options(tensorrt, options)
    cancel = cancel or threading.Event()
    watch = BuildWatch(observe or (lambda _: None), cancel)

    def work() -> BuiltEngine:
        return _build(onnx_bytes, options, tensorrt, timing_cache=timing_cache, watch=watch)

    return _in_worker(work, cancel)


def _in_worker(work: Callable[[], _Result], cancel: threading.Event) -> _Result:
    """The result of `work`; an interrupt here cancels it and waits for its end."""
    results: list[_Result] = []
    failures: list[BaseException] = []
    is_done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (raised below, in the thread that waits)
            failures.append(error)
        finally:
            is_done.set()

    worker = threading.Thread(target=run, name="tensorrt-build", daemon=True)
    try:
        worker.start()
        # Not `join`: interrupted, Python 3.11 takes the thread for ended though it still runs.
        while not is_done.wait(_POLL_SECONDS):
            pass
    except BaseException:
        cancel.set()
        if worker.ident is not None:  # it did start
            is_done.wait()
        raise
    if failures:
        raise failures[0]
    return results[0]


def _check_options(tensorrt: TensorRT, options: BuildOptions) -> None:
    trt = tensorrt.module
    if not tensorrt.is_rtx:
        if options.compute_capabilities:
            raise BuildError(f"{tensorrt} builds for the GPU that is here; only RTX can be told")
        if options.hardware_compatible and not hasattr(
            trt.HardwareCompatibilityLevel, "AMPERE_PLUS"
        ):
            raise BuildError(f"{tensorrt} has no hardware compatibility; leave it out")
        return
    if options.version_compatible or options.hardware_compatible:
        raise BuildError(
            f"{tensorrt} has no version or hardware compatibility: its engines fit its own version "
            "and the GPUs that are named; leave them out, or install tensorrt"
        )
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    unknown = [name for name in options.compute_capabilities if name not in known]
    if unknown:
        raise BuildError(
            f"{tensorrt} does not know the compute capability {', '.join(unknown)}; "
            f"it builds for {', '.join(known)}"
        )


def _build(
    onnx_bytes: bytes,
    options: BuildOptions,
    tensorrt: TensorRT,
    *,
    timing_cache: bytes,
    watch: BuildWatch,
) -> BuiltEngine:
    """All objects of TensorRT live and die in here."""
    trt, started = tensorrt.module, time.perf_counter()
    logger, log = logger_of(trt)
    with log.recording() as messages:
        builder = _new_builder(tensorrt, logger, messages)
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = _made(builder.create_network(typed), "network", messages)
        parse_onnx(onnx_bytes, network, tensorrt=tensorrt, logger=logger)
        images, logits = images_and_logits(trt, network)
        batch = batch_of(images, options.batch)
        config = _made(builder.create_builder_config(), "configuration", messages)
        _configure(config, tensorrt, options)
        add_profile(builder, config, images, batch)
        cache = None if tensorrt.is_rtx else _use_timing_cache(config, timing_cache)
        monitor = monitor_of(trt, watch)  # held here, as long as TensorRT calls it
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if plan is None or not watch.goes_on:
            raise _failure(tensorrt, watch, messages)
        return BuiltEngine(
            plan=bytes(plan),
            tensorrt=tensorrt,
            options=options,
            images=images,
            logits=logits,
            batch=batch,
            flags=_set_flags(tensorrt, config),
            gpu=gpu_name(),
            build_seconds=time.perf_counter() - started,
            warnings=tuple(text for severity, text in messages if severity == "WARNING"),
            timing_cache=None if cache is None else bytes(cache.serialize()),
        )


def _new_builder(tensorrt: TensorRT, logger: Any, messages: _Messages) -> Any:  # noqa: ANN401
    trt = tensorrt.module
    try:
        return _made(trt.Builder(logger), "builder", messages)
    except (TypeError, RuntimeError) as error:  # how the bindings say that it cannot be made
        raise BuildError(
            f"{tensorrt} cannot start on this machine: {errors_of(messages)} ({error}). It needs "
            "an NVIDIA GPU with its driver; tensorrt-rtx builds without one"
        ) from None


def _made(value: Any, what: str, messages: _Messages) -> Any:  # noqa: ANN401 (a class of TensorRT)
    if value is None:
        raise BuildError(f"TensorRT cannot make a {what}: {errors_of(messages)}")
    return value


def _configure(config: Any, tensorrt: TensorRT, options: BuildOptions) -> None:  # noqa: ANN401
    trt = tensorrt.module
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the audit of precisions
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # Or the file would hold code of the host, which is not let in when it is loaded.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
    for place, name in enumerate(options.compute_capabilities):
        if not config.set_compute_capability(trt.ComputeCapability.__members__[name], place):
            raise BuildError(f"{tensorrt} refuses the compute capability {name}")


def _use_timing_cache(config: Any, content: bytes) -> Any:  # noqa: ANN401 (a class of TensorRT)
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildError(
            "the timing cache is damaged, or of another GPU or version of TensorRT; delete it"
        )
    return cache


def _set_flags(tensorrt: TensorRT, config: Any) -> tuple[str, ...]:  # noqa: ANN401
    flags = tensorrt.module.BuilderFlag.__members__
    return tuple(name for name, flag in flags.items() if config.get_flag(flag))


def _failure(tensorrt: TensorRT, watch: BuildWatch, messages: _Messages) -> Exception:
    if watch.error is not None:
        return watch.error
    if not watch.goes_on:
        return BuildCancelledError("the build was cancelled; nothing was written")
    reason, advice = errors_of(messages), ""
    if "workspace" in reason:
        advice = "; give it more workspace"
    return BuildError(f"{tensorrt} cannot build this network: {reason}{advice}")

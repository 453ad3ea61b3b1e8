"""Build TensorRT engines from the ONNX files of a build kit, on the machine that will run them.

    python3 build_engine.py [--model FILE.onnx] [--workspace-mib N] [--timing-cache FILE]

Writes NAME.engine and, beside it, NAME.engine.json, which says what it is made of. An engine is
UNVERIFIED until replay.py passes. Ends with 0; with 5 if a file was changed; with 4 for anything
else that is wrong; with 130 after Ctrl-C, which leaves no half engine behind.
Goes into build kits.
"""

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import kit_files
from .build_options import BuildOptions, parse_batch
from .build_progress import PhaseEvent
from .builder import BuiltEngine, build
from .kit_files import DeviceError, Kit, KitEntry
from .tensorrt_runtime import TensorRT, import_tensorrt

_MAX_CACHE_BYTES = 1 << 28


def sidecar_of(
    built: BuiltEngine, *, engine_file: str, onnx_file: str, onnx_sha256: str, precision: str
) -> dict[str, Any]:
    """What is written beside an engine, of plain JSON types."""
    return {
        "schema_version": 1,
        "status": "unverified",
        "engine": {
            "file": engine_file,
            "sha256": kit_files.sha256_of(built.plan),
            "num_bytes": len(built.plan),
        },
        "onnx": {"file": onnx_file, "sha256": onnx_sha256},
        "precision": precision,
        "tensorrt": {"flavour": built.tensorrt.flavour, "version": built.tensorrt.version},
        "machine": {"gpu": built.gpu, "processor": platform.machine(), "system": platform.system()},
        "input": _table_of(built.images),
        "output": _table_of(built.logits),
        "profile": dict(zip(("min", "opt", "max"), built.batch)),  # noqa: B905 (three of each)
        "options": built.options.to_table(),
        "flags": list(built.flags),
        "build_seconds": round(built.build_seconds, 3),
        "warnings": list(built.warnings),
    }


def write_engine_files(path: Path, built: BuiltEngine, sidecar: dict[str, Any]) -> None:
    """Write the plan to `path` and its sidecar beside it, each as a whole or not at all.

    A plan without the sidecar that names its hash is not run, so the order does not matter.
    """
    text = json.dumps(sidecar, indent=2, allow_nan=False) + "\n"
    kit_files.write_atomically(path, built.plan)
    kit_files.write_atomically(path.with_name(f"{path.name}.json"), text.encode())


def _table_of(tensor: Any) -> dict[str, Any]:  # noqa: ANN401
    return dataclasses.asdict(tensor) | {"shape": list(tensor.shape)}


def main(arguments: Sequence[str] | None = None, *, folder: Path = Path()) -> int:
    """Build what the command line names; the exit code.

    Args:
        arguments: None: of the command line.
        folder: the kit, unless the arguments name another.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kit", type=Path, default=folder, metavar="DIR")
    parser.add_argument("--kit-sha256", help="the sha256 of kit.json, from where you trust it")
    parser.add_argument("--model", metavar="FILE.onnx", help="one file [default: all of the kit]")
    parser.add_argument("--batch", metavar="MIN:OPT:MAX", help="batches that the engine will meet")
    parser.add_argument("--workspace-mib", type=int, metavar="N")
    parser.add_argument("--optimization-level", type=int, metavar="0-5")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="read, and written after")
    parser.add_argument("--flavour", help="tensorrt or tensorrt-rtx, where both are installed")
    parsed = parser.parse_args(arguments)
    try:
        kit = kit_files.read_kit(parsed.kit, sha256=parsed.kit_sha256)
        options = _options(kit, parsed)
        entries = [kit.entry(parsed.model)] if parsed.model else kit.entries
        tensorrt = import_tensorrt(parsed.flavour)
        for entry in entries:
            _build_entry(kit, entry, options, tensorrt=tensorrt, cache_path=parsed.timing_cache)
    except DeviceError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201 (a script)
        return error.exit_code
    except OSError as error:  # a full disk, or a folder where a file should be
        print(f"Error: cannot write: {error}", file=sys.stderr)  # noqa: T201 (a script)
        return DeviceError.exit_code
    except KeyboardInterrupt:
        print("Cancelled; engines named above are complete.", file=sys.stderr)  # noqa: T201
        return 130
    print("Next: python3 replay.py")  # noqa: T201 (a script)
    return 0


def _options(kit: Kit, parsed: argparse.Namespace) -> BuildOptions:
    """Those of the kit, changed by the command line."""
    table = dict(kit.build_options)
    for name in ("workspace_mib", "optimization_level"):
        if getattr(parsed, name) is not None:
            table[name] = getattr(parsed, name)
    if parsed.batch is not None:
        table["batch"] = list(parse_batch(parsed.batch))
    return BuildOptions.from_table(table)


def _build_entry(
    kit: Kit,
    entry: KitEntry,
    options: BuildOptions,
    *,
    tensorrt: TensorRT,
    cache_path: Path | None,
) -> None:
    onnx_bytes = kit.read_checked(entry.file)
    print(f"{entry.file}: building with {tensorrt}", flush=True)  # noqa: T201 (a script)
    cache = b""
    if cache_path is not None and cache_path.exists():
        cache = kit_files.read_limited(cache_path, max_bytes=_MAX_CACHE_BYTES)
    built = build(onnx_bytes, options, tensorrt=tensorrt, timing_cache=cache, observe=_say)
    sidecar = sidecar_of(
        built,
        engine_file=entry.engine_file,
        onnx_file=entry.file,
        onnx_sha256=entry.sha256,
        precision=entry.precision,
    )
    write_engine_files(kit.folder / entry.engine_file, built, sidecar)
    if cache_path is not None and built.timing_cache is not None:
        kit_files.write_atomically(cache_path, built.timing_cache)
    print(  # noqa: T201 (a script)
        f"{entry.engine_file}: {len(built.plan):,} bytes in {built.build_seconds:.1f} s, "
        "UNVERIFIED until replay.py passes"
    )


def _say(event: PhaseEvent) -> None:
    """The outermost phases, one line each."""
    if event.kind == "started" and event.parent is not None and event.parent == "Building engine":
        print(f"  {event.phase}", flush=True)  # noqa: T201 (a script)


if __name__ == "__main__":
    sys.exit(main())

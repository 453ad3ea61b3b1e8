"""Import TensorRT 10.3 to 11.4 or TensorRT-RTX, whichever is here, and hear what it says.

Goes into build kits.
"""

import functools
import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .kit_files import DeviceError, MissingPackageError

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL_LINES = """\
  on a PC with an NVIDIA GPU: pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com
    (tensorrt-cu12 with a driver older than 580)
  on a Jetson it is part of JetPack: sudo apt install nvidia-jetpack; a virtual environment sees it
    only when made by: python3 -m venv --system-site-packages
  without a GPU, for GeForce and RTX cards: pip install tensorrt-rtx"""


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """A TensorRT that was imported."""

    module: ModuleType
    flavour: str
    """tensorrt or tensorrt-rtx."""
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which leaves some choices out."""
        return self.flavour == "tensorrt-rtx"

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"


def import_tensorrt(flavour: str | None = None) -> TensorRT:
    """Import TensorRT, or TensorRT-RTX where that is the one here.

    Args:
        flavour: tensorrt or tensorrt-rtx; None: the first that can be imported.

    Raises:
        MissingPackageError: if none can; it says what to install, or which library is missing.
        DeviceError: if there is no such flavour.
    """
    if flavour is not None and flavour not in _MODULES:
        raise DeviceError(f"flavour {flavour!r} is not known; use {' or '.join(_MODULES)}")
    wanted = list(_MODULES) if flavour is None else [flavour]
    broken = []
    for name in wanted:
        try:
            module = importlib.import_module(_MODULES[name])
            return TensorRT(module=module, flavour=name, version=str(module.__version__))
        except ModuleNotFoundError as error:
            if error.name != _MODULES[name]:
                broken.append(f"{name} is installed and cannot be imported: {error}")
        except (ImportError, OSError, AttributeError) as error:
            broken.append(f"{name} is installed and its libraries cannot be loaded: {error}")
    if broken:
        raise MissingPackageError(
            f"{'; '.join(broken)}. The package on PyPI holds no libraries: install it again from "
            f"NVIDIA's own index, and do not mix versions:\n{INSTALL_LINES}"
        )
    raise MissingPackageError(f"{' or '.join(wanted)} is not installed:\n{INSTALL_LINES}")


class MessageLog:
    """What TensorRT says, from any thread: passed to whoever records at the moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recorders: list[list[tuple[str, str]]] = []

    def add(self, severity: str, text: str) -> None:
        """Called by TensorRT; severity as it names them, such as ERROR."""
        with self._lock:
            for messages in self._recorders:
                messages.append((severity, text))

    @contextmanager
    def recording(self) -> Iterator[list[tuple[str, str]]]:
        """The (severity, text) of all warnings and errors inside, as they come."""
        messages: list[tuple[str, str]] = []
        with self._lock:
            self._recorders.append(messages)
        try:
            yield messages
        finally:
            with self._lock:
                self._recorders = [other for other in self._recorders if other is not messages]


def errors_of(messages: Sequence[tuple[str, str]]) -> str:
    """The errors among messages as one line, or that there are none."""
    errors = [" ".join(text.split()) for severity, text in messages if "ERROR" in severity]
    return "; ".join(dict.fromkeys(errors)) or "it gave no reason"


@functools.cache
def logger_of(trt: ModuleType) -> tuple[Any, MessageLog]:
    """The logger to give to TensorRT, and what it hears.

    One for each process: TensorRT keeps the first that it is given and ignores others. If some
    other library gave one before, ours stays silent, and errors have no reason.
    """
    log = MessageLog()
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:  # noqa: ANN401 (an enum of TensorRT)
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                log.add(severity.name, text)

    return Logger(), log

"""PhaseEvent: how far a build is, as TensorRT tells it; and how a build is cancelled.

Goes into build kits.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PhaseEvent:
    """A phase of a build began, came a step further, or ended."""

    kind: str
    """started, step or ended."""
    phase: str
    parent: str | None
    """The phase that this one is a part of; None for the outermost."""
    num_done: int
    num_steps: int


class BuildWatch:
    """Passes what TensorRT tells to `observe`, one call at a time, and tells it when to stop."""

    def __init__(self, observe: Callable[[PhaseEvent], None], cancel: threading.Event) -> None:
        self._observe, self._cancel = observe, cancel
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int]] = {}
        self.error: Exception | None = None
        """What `observe` raised, which also stops the build."""

    @property
    def goes_on(self) -> bool:
        """Whether the build is to go on."""
        return self.error is None and not self._cancel.is_set()

    def start(self, phase: str, parent: str | None, num_steps: int) -> None:
        """A phase began."""
        with self._lock:
            self._phases[phase] = (parent or None, num_steps)
            self._tell("started", phase, 0)

    def step(self, phase: str, num_done: int) -> bool:
        """A phase came further; whether the build is to go on."""
        with self._lock:
            self._tell("step", phase, num_done)
        return self.goes_on

    def end(self, phase: str) -> None:
        """A phase ended."""
        with self._lock:
            self._tell("ended", phase, self._phases.get(phase, (None, 0))[1])
            self._phases.pop(phase, None)

    def _tell(self, kind: str, phase: str, num_done: int) -> None:
        parent, num_steps = self._phases.get(phase, (None, 0))
        event = PhaseEvent(
            kind=kind, phase=phase, parent=parent, num_done=num_done, num_steps=num_steps
        )
        try:
            if self.error is None:
                self._observe(event)
        except Exception as error:  # noqa: BLE001 (TensorRT would swallow it; the builder raises it)
            self.error = error


def monitor_of(trt: ModuleType, watch: BuildWatch) -> Any:  # noqa: ANN401 (a class of TensorRT)
    """What `IBuilderConfig.progress_monitor` takes."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            watch.start(phase, parent, num_steps)

        def step_complete(self, phase: str, step: int) -> bool:
            return watch.step(phase, step + 1)

        def phase_finish(self, phase: str) -> None:
            watch.end(phase)

    return Monitor()

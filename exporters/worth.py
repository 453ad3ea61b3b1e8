"""Whether a lossy file is worth its loss: bytes, and latency where it was just made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from compressor.cost import Latency, measure_latencies
from exporters.exported_model import ExportedModel
from exporters.request import Prepared

_MAX_SIZE_FRACTION = 0.6
"""Of the float32 bytes: more than float16 needs, graph included, is not worth the rounding."""


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What a file gains against float32."""

    variant: str
    size_fraction: float
    latency: Latency
    float32_latency: Latency

    @property
    def is_small(self) -> bool:
        """Whether it saves what its precision promises."""
        return self.size_fraction <= _MAX_SIZE_FRACTION

    @property
    def is_slower(self) -> bool:
        """Beyond the spread of both: even its fast answers are slower than slow ones in float32."""
        return self.latency.low_ms > self.float32_latency.high_ms

    def sentence(self) -> str:
        """For people."""
        ratio = self.latency.median_ms / self.float32_latency.median_ms
        facts = (
            f"{100 * self.size_fraction:.0f} % of the bytes, {ratio:.2f} times the latency in ONNX "
            f"Runtime on this CPU (batch 1: {self.latency.median_ms:.2f} ms against "
            f"{self.float32_latency.median_ms:.2f} ms)"
        )
        if not self.is_small:
            return f"{self.variant} is not worth it here: {facts}"
        if self.is_slower:
            return (
                f"{self.variant} is not worth it for speed on this CPU: {facts}; it is made for "
                "TensorRT, which was not measured"
            )
        return f"{self.variant}: {facts}"


def worth_of(prepared: Prepared, made: Sequence[ExportedModel]) -> list[Worth]:
    """Of every file but the first, which is float32; all are timed in turn in one run."""
    models: dict[str, Callable[[Tensor], Tensor]] = {
        exported.variant: prepared.opened(exported.path) for exported in made
    }
    latencies = measure_latencies(models, prepared.spec.image_shape)
    float32, *others = made
    return [
        Worth(
            variant=exported.variant,
            size_fraction=exported.num_bytes / float32.num_bytes,
            latency=latencies[exported.variant],
            float32_latency=latencies[float32.variant],
        )
        for exported in others
    ]

"""PerformanceSettings: what may change the speed of a run but not its meaning."""

from typing import Literal

from compressor.closed_table import ClosedTable, Count, Positive


class PerformanceSettings(ClosedTable):
    """What may change the speed of a run but not its meaning; recorded, not in `recipe_id`."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    training_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 autocast where the device multiplies matrices in it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether networks are compiled; `auto`: in long runs in bfloat16 on CPUs with AMX.

    On several processes the student's training pass is not, whatever is said here.
    """
    num_threads: Count | None = None
    num_workers: Count | None = None
    """Processes that decode images, for each process of the run; None: its share of the cores."""
    memory_budget_mib: Count = 4096
    """Data sets larger than this, as uint8, are streamed from disk."""
    cache_images: bool = True
    log_every_steps: Count = 10
    checkpoint_every_minutes: Positive = 10.0
    keep_every_epochs: Count | None = None
    """Keep the checkpoint of every such epoch, beside the best and the last two."""

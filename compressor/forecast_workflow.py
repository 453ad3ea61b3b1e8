"""plan: from a recipe to what its run will cost on this machine."""

from pathlib import Path

from compressor.architectures.build import find_architecture
from compressor.forecast import Forecast, forecast
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import Recipe
from compressor.run_directory import RunDirectory
from compressor.training_preparation import prepare_training


def forecast_run(
    recipe: Recipe, settings: PerformanceSettings, *, out: Path | None, download: bool = False
) -> Forecast:
    """Load what the run would load, and take some of its steps; nothing is written but caches.

    Teachers are not examined. `out` is the folder of the run; None: one that is not taken.

    Raises:
        RobustCompressError: where the run would be refused.
    """
    find_architecture(recipe.student.architecture)
    run = RunDirectory(Path("runs")) if out is None else RunDirectory.vacant(out)
    performance = resolve_performance(settings)
    training = prepare_training(recipe, settings, performance, run=run, download=download)
    return forecast(training, out=run.path)

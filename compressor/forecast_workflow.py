"""plan: from a recipe to what its run will cost on this machine."""

from pathlib import Path

from compressor.architectures.build import find_architecture
from compressor.forecast import Forecast, NoForecast, forecast
from compressor.out_of_memory import is_out_of_memory
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import Recipe
from compressor.run_directory import RunDirectory
from compressor.training_preparation import prepare_training


def forecast_run(
    recipe: Recipe, settings: PerformanceSettings, *, out: Path | None, download: bool = False
) -> Forecast | NoForecast:
    """Load what the run would load, and take some of its steps; nothing is written but caches.

    Teachers are not examined. `out` is the folder of the run; None: one that is not taken.

    Raises:
        RobustCompressError: where the run would be refused.
    """
    find_architecture(recipe.student.architecture)
    run = RunDirectory(Path("runs")) if out is None else RunDirectory.vacant(out)
    performance = resolve_performance(settings)
    try:
        training = prepare_training(recipe, settings, performance, run=run, download=download)
        return forecast(training, out=run.path)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return NoForecast.after(error)
        raise

"""plan: from a recipe to what its run will cost on this machine."""

from pathlib import Path

from compressor.data import load_training_data
from compressor.forecast import Forecast, forecast
from compressor.methods.build import build_method
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import Recipe
from compressor.run_directory import RunDirectory
from compressor.schedules import num_steps_of
from compressor.student import Student
from compressor.trainer import Training, trained_tensors
from compressor.training_workflow import (
    load_teachers,
    network_spec,
    refuse_single_image_batches,
    student_network,
    with_compilation,
)


def forecast_run(
    recipe: Recipe, settings: PerformanceSettings, *, out: Path, download: bool = False
) -> Forecast:
    """Load what the run would load, and take some of its steps; nothing is written but caches.

    Raises:
        RobustCompressError: where the run would be refused.
    """
    performance = resolve_performance(settings)
    data = load_training_data(
        recipe.data,
        seed=recipe.seed,
        settings=settings,
        device=performance.device,
        download=download,
    )
    refuse_single_image_batches(recipe, data)
    performance = with_compilation(recipe, settings, performance, data)
    teachers = load_teachers(recipe, data, performance=performance)
    method = build_method(
        recipe.method,
        threat=recipe.threat.build(),
        teachers=teachers,
        num_steps=num_steps_of(recipe, num_images=data.train.num_images),
    )
    student = Student(student_network(recipe, network_spec(recipe, data)), performance)
    training = Training(
        recipe=recipe,
        settings=settings,
        run=RunDirectory(out),
        data=data,
        student=student,
        method=method,
        teachers=teachers,
        tensors=trained_tensors(student, recipe, method),
        observe=lambda _: None,
        resume_command="",
    )
    return forecast(training, out=out)

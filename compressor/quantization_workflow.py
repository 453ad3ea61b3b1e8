"""fine_tune: a short distillation of a student that already rounds to 8 bits.

The network that is trained is the int8 file itself, as its trainable twin: the graph, the scales of
its activations and the rounding are those that will run on the device. The teachers, the data and
the method are those of the run, with a lower rate and fewer epochs.

N images, K classes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compressor.checkpoint import TrainState, load_candidate, load_checkpoint
from compressor.data import TrainingData, load_training_data
from compressor.environment import describe_environment, settings_dict
from compressor.errors import DataError, TeacherError
from compressor.interruption import StopWish
from compressor.methods.build import build_method
from compressor.metrics import Observer
from compressor.onnx_graph import OnnxGraph, read_graph
from compressor.onnx_twin import OnnxTwin, trainable_twin
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import CosineRecipe, Recipe, canonical_json, resolved_dict
from compressor.recipe_file import load_recipe
from compressor.run_directory import RunDirectory, read_facts, write_json_atomically
from compressor.schedules import num_steps_of
from compressor.student import Student
from compressor.teachers import Teacher
from compressor.trainer import Training, fit, trained_tensors
from compressor.training_workflow import load_teachers, writing_metrics
from compressor.weights import sha256_of_file

RATE_FACTOR = 0.1
"""Of the run's learning rate: the weights are already good, and only rounding has to be learnt."""


@dataclass(frozen=True, kw_only=True)
class FineTuningRequest:
    """What `fine_tune` needs."""

    run: RunDirectory
    """The run whose student was quantised."""
    epochs: int
    settings: PerformanceSettings
    data_source: str | None = None
    resume_command: str


def fine_tune(
    request: FineTuningRequest,
    *,
    float32: Path,
    int8: Path,
    takes_bytes: bool = False,
    observe: Observer = lambda _: None,
    stop: StopWish | None = None,
) -> dict[str, Tensor]:
    """Train what an int8 file rounds, so that rounding costs less.

    It is a run of its own inside the folder of the run, and goes on there after an interruption.
    One that has ended is not repeated.

    Args:
        request: of what, how long, how fast.
        float32: the file that was quantised, whose weights are the start.
        int8: the file with all layers in 8 bits.
        takes_bytes: whether it takes bytes.
        observe: told of every step.
        stop: whether to end early.

    Returns:
        Weights before rounding, and biases, by the name of the constant in the int8 file.

    Raises:
        DataError: if the images are not those of the run.
        TeacherError: if a teacher of the run cannot be found, or has changed.
        InterruptedRunError: when a stop was wished for; everything is saved.
    """
    graph = read_graph(int8.read_bytes(), int8)
    twin = trainable_twin(
        graph,
        float_weights(graph, read_graph(float32.read_bytes(), float32)),
        takes_bytes=takes_bytes,
    )
    files = {"int8_sha256": sha256_of_file(int8), "float32_sha256": sha256_of_file(float32)}
    training, facts = _training(request, twin, files, observe=observe, stop=stop or StopWish())
    environment = describe_environment(training.student.performance)
    state = _fit(training, facts, environment=environment)
    if state.best is None:
        raise AssertionError("the last epoch is always validated")
    twin.load_state_dict(load_candidate(training.run, state.best))
    return twin.cpu().trained_constants()


def _training(
    request: FineTuningRequest,
    twin: OnnxTwin,
    files: Mapping[str, str],
    *,
    observe: Observer,
    stop: StopWish,
) -> tuple[Training, dict[str, str]]:
    """What `fit` needs, and what tells this fine-tuning from any other."""
    recipe = fine_tuning_recipe(load_recipe(request.run.resolved_recipe), epochs=request.epochs)
    if request.data_source is not None:
        moved = recipe.data.model_copy(update={"source": request.data_source})
        recipe = recipe.model_copy(update={"data": moved})
    performance = resolve_performance(request.settings)
    data = load_training_data(
        recipe.data, seed=recipe.seed, settings=request.settings, device=performance.device
    )
    teachers = load_teachers(recipe, data, performance=performance)
    _refuse_other_parts(request.run, data, teachers)
    student = Student(twin, performance)
    facts = {"recipe_id": recipe.recipe_id, **files}
    label = hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:8]
    training = Training(
        recipe=recipe,
        settings=request.settings,
        run=request.run.fine_tuning(label),
        data=data,
        student=student,
        method=build_method(
            recipe.method,
            threat=recipe.threat.build(),
            teachers=teachers,
            num_steps=num_steps_of(recipe, num_images=data.train.num_images),
        ),
        tensors=trained_tensors(student, recipe),
        observe=observe,
        resume_command=request.resume_command,
        stop=stop,
    )
    return training, facts


def _refuse_other_parts(run: RunDirectory, data: TrainingData, teachers: Sequence[Teacher]) -> None:
    """The same images and teachers as those of the run."""
    facts = read_facts(run)
    if data.train.content_sha256 != facts["training_content_sha256"]:
        raise DataError(
            f"the training images are others than those of {run.path} (content hash "
            f"{data.train.content_sha256[:12]}); give the data of the run with --data"
        )
    known = {row["sha256"] for row in facts["teachers"]}
    for teacher in teachers:
        if teacher.sha256 not in known:
            raise TeacherError(
                f"{teacher.role} teacher {teacher.name} has changed since {run.path} was trained "
                f"(SHA-256 {teacher.sha256[:12]}); put the one of the run back"
            )


def fine_tuning_recipe(recipe: Recipe, *, epochs: int) -> Recipe:
    """The recipe of a run, shortened: a tenth of its rate, falling to zero along a cosine."""
    training = recipe.training.model_copy(
        update={
            "epochs": epochs,
            "learning_rate": recipe.training.learning_rate * RATE_FACTOR,
            "schedule": CosineRecipe(),
            "ema_decay": None,
        }
    )
    return recipe.model_copy(update={"name": f"{recipe.name}-qat", "training": training})


def float_weights(graph: OnnxGraph, float32: OnnxGraph) -> dict[str, Tensor]:
    """What the int8 weights of a file were before rounding, by the name of their constant."""
    originals = {node.name: node.inputs[1] for node in float32.nodes if len(node.inputs) > 1}
    makers = {node.outputs[0]: node for node in graph.nodes if node.op == "DequantizeLinear"}
    found = {}
    for node in graph.nodes:
        maker = makers.get(node.inputs[1]) if len(node.inputs) > 1 else None
        original = originals.get(node.name)
        if maker is not None and original is not None and original in float32.constants:
            found[maker.inputs[0]] = float32.constants[original]
    return found


def _fit(
    training: Training, facts: Mapping[str, object], *, environment: Mapping[str, object]
) -> TrainState:
    run, method = training.run, training.method
    run.make()
    with run.locked():
        settings = settings_dict(training.settings)
        write_json_atomically(run.environment, dict(environment) | {"settings": settings})
        write_json_atomically(run.facts, facts)
        write_json_atomically(run.resolved_recipe, resolved_dict(training.recipe))
        state = TrainState(step=0, epoch=0, batch_in_epoch=0, method_state=method.initial_state())
        if run.checkpoint_steps():
            state = load_checkpoint(
                run,
                training.tensors,
                recipe_id=training.recipe.recipe_id,
                restore_method_state=method.restore_state,
            )
        with writing_metrics(training, state) as observed:
            return fit(observed, state)

"""fine_tune: a short distillation of a student that already rounds to 8 bits.

The network that is trained is the int8 file itself, as its trainable twin: the graph, the scales of
its activations and the rounding are those that will run on the device. The teachers, the data and
the method are those of the run, with a lower rate and fewer epochs.

N images, K classes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from compressor.checkpoint import (
    TrainState,
    last_method_state,
    load_candidate,
    load_checkpoint,
)
from compressor.data import TrainingData, load_training_data
from compressor.data_identity import refuse_other_data
from compressor.environment import describe_environment, settings_dict
from compressor.errors import RecipeError, TeacherError
from compressor.interruption import StopWish
from compressor.methods.build import build_method
from compressor.metrics import Observer
from compressor.onnx_graph import OnnxGraph, read_graph
from compressor.onnx_twin import trainable_twin
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import CosineRecipe, Recipe, canonical_json, resolved_dict
from compressor.recipe_file import load_recipe
from compressor.run_directory import RunDirectory, read_facts, write_json_atomically
from compressor.schedules import num_steps_of
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.trainer import fit
from compressor.training_preparation import load_teachers
from compressor.training_step import Training, trained_tensors
from compressor.training_workflow import writing_metrics
from compressor.weights import sha256_of_file

ALMOST_ALL = 1 - 2**-20
"""Share of the run that is over: methods with phases stay in their last one."""
RATE_FACTOR = 0.01
"""Of the run's learning rate: the weights are already good, and only rounding has to be learnt. A
tenth cost a ResNet-18 on CIFAR-10 3 points of clean accuracy in one epoch."""


@dataclass(frozen=True, kw_only=True)
class FineTuningRequest:
    """What `fine_tune` needs.

    Raises:
        RecipeError: on construction, if the method of the run cannot train an exported file.
    """

    run: RunDirectory
    """The run whose student was quantised."""
    epochs: int
    settings: PerformanceSettings
    data_source: str | None = None
    resume_command: str

    def __post_init__(self) -> None:
        method = load_recipe(self.run.resolved_recipe).method
        if method.has_teacher_map:
            raise RecipeError(
                f"{self.run.path} was trained with method.name = {method.name!r}, whose losses "
                "need the student-teacher map; an exported file has it merged into its last layer "
                "and cannot be fine-tuned. Leave out --qat, or distil with another method"
            )


def fine_tune(
    request: FineTuningRequest,
    *,
    float32: Path,
    int8: Path,
    judging_N: Tensor,
    takes_bytes: bool = False,
    observe: Observer = lambda _: None,
    stop: StopWish | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Train what an int8 file rounds, so that rounding costs less.

    It is a run of its own inside the folder of the run, and goes on there after an interruption.
    One that has ended is not repeated. The weights before fine-tuning are a candidate, too.

    Args:
        request: of what, how long, how fast.
        float32: the file that was quantised, whose weights are the start.
        int8: the file with all layers in 8 bits.
        judging_N: places of the held-out images that judge the file, int64; no epoch is chosen on
            them.
        takes_bytes: whether it takes bytes.
        observe: told of every step.
        stop: whether to end early.

    Returns:
        Weights before rounding, and biases, by the name of the constant in the int8 file; and
        the epoch that was best, 0 if none was better than the weights before.

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
    recipe = _recipe(request)
    facts = {
        "recipe_id": recipe.recipe_id,
        "int8_sha256": sha256_of_file(int8),
        "float32_sha256": sha256_of_file(float32),
        "num_judging": len(judging_N),
    }
    label = hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:8]
    data = _training_data(request, recipe)
    student = Student(twin, resolve_performance(request.settings))
    teachers = _teachers(request.run, recipe, data, performance=student.performance)
    method = build_method(
        recipe.method,
        threat=recipe.threat.build(),
        teachers=teachers,
        num_steps=num_steps_of(recipe, num_images=data.train.num_images),
    )
    training = Training(
        recipe=recipe,
        settings=request.settings,
        run=request.run.fine_tuning(label),
        data=replace(data, validation=data.validation.without(judging_N)),
        student=student,
        method=method,
        teachers=teachers,
        tensors=trained_tensors(student, recipe, method),
        observe=observe,
        resume_command=request.resume_command,
        stop=stop or StopWish(),
        start_is_candidate=True,
        fraction_before=ALMOST_ALL,
    )
    state = _fit(training, facts, source=request.run)
    if state.best is None:
        raise AssertionError("the last epoch is always validated")
    twin.load_state_dict(load_candidate(training.run, state.best))
    return twin.cpu().trained_constants(), state.best.epoch


def _recipe(request: FineTuningRequest) -> Recipe:
    recipe = fine_tuning_recipe(load_recipe(request.run.resolved_recipe), epochs=request.epochs)
    if request.data_source is None:
        return recipe
    moved = recipe.data.model_copy(update={"source": request.data_source})
    return recipe.model_copy(update={"data": moved})


def _training_data(request: FineTuningRequest, recipe: Recipe) -> TrainingData:
    """The very images of the run."""
    data = load_training_data(
        recipe.data,
        seed=recipe.seed,
        settings=request.settings,
        device=resolve_performance(request.settings).device,
    )
    refuse_other_data(data, request.run)
    return data


def _teachers(
    run: RunDirectory, recipe: Recipe, data: TrainingData, *, performance: Performance
) -> tuple[Teacher, ...]:
    """The very teachers of the run."""
    teachers = load_teachers(recipe, data, performance=performance)
    known = {row["sha256"] for row in read_facts(run)["teachers"]}
    for teacher in teachers:
        if teacher.sha256 not in known:
            raise TeacherError(
                f"{teacher.role} teacher {teacher.name} has changed since {run.path} was trained "
                f"(SHA-256 {teacher.sha256[:12]}); put the one of the run back"
            )
    return teachers


def fine_tuning_recipe(recipe: Recipe, *, epochs: int) -> Recipe:
    """The recipe of a run, shortened: a hundredth of its rate, falling to zero along a cosine."""
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


def _fit(training: Training, facts: Mapping[str, object], *, source: RunDirectory) -> TrainState:
    run = training.run
    run.make()
    with run.locked():
        environment = describe_environment(training.student.performance)
        settings = settings_dict(training.settings)
        write_json_atomically(run.environment, dict(environment) | {"settings": settings})
        write_json_atomically(run.facts, facts)
        write_json_atomically(run.resolved_recipe, resolved_dict(training.recipe))
        state = _state(training, source)
        with writing_metrics(training, state) as observed:
            return fit(observed, state)


def _state(training: Training, source: RunDirectory) -> TrainState:
    """Where an interrupted fine-tuning stopped, or the weights of the file and what its run knew.

    Temperatures and weights of the losses go on from the run, whose teachers they fit.
    """
    method = training.method
    if training.run.checkpoint_steps():
        return load_checkpoint(
            training.run,
            training.tensors,
            recipe_id=training.recipe.recipe_id,
            restore_method_state=method.restore_state,
        )
    method_state = method.initial_state()
    if source.checkpoint_steps():
        method_state = last_method_state(source, method.restore_state, training.tensors.of_method)
    return TrainState(step=0, epoch=0, batch_in_epoch=0, method_state=method_state)

"""A defect planted in any hop of an export is refused, and the right hop is named."""

import shutil

import numpy as np
import onnx  # noqa: TID253 (plants)
import pytest
import torch
from onnx import helper, numpy_helper  # noqa: TID253
from PIL import Image

import exporters.int8.workflow
import exporters.workflow
from compressor.errors import ArtefactMismatchError, TooLossyError
from compressor.onnx_graph import read_graph
from compressor.performance_settings import PerformanceSettings
from compressor.quantization_workflow import float_weights
from compressor.run_directory import RunDirectory
from exporters.budget import Budget
from exporters.request import ExportRequest, Int8Request
from exporters.workflow import export_run
from tests.onnx_files import appended, constant

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
STUDENT = {"architecture": "tiny", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Images of four classes that differ by colour as well."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(2)
    prototypes = torch.rand(4, 3, 8, 8, generator=generator) * 0.3 + 0.35
    for part, num in (("train", 90), ("test", 10)):
        for label, prototype in enumerate(prototypes):
            (folder / part / str(label)).mkdir(parents=True)
            noise = 0.1 * torch.randn(num, 3, 8, 8, generator=generator)
            levels = ((prototype + noise).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
            for place, image in enumerate(levels.numpy()):
                Image.fromarray(image).save(folder / part / str(label) / f"{place}.png")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, train_on_digits, coloured):
    """A run with files of every precision, all of them verified."""
    run = train_on_digits(
        tmp_path_factory.mktemp("runs") / "run",
        epochs=6,
        student=STUDENT,
        data={
            "source": f"imagefolder:{coloured}",
            "validation_size": 120,
            "crop_padding_pixels": 0,
            "horizontal_flip": False,
        },
    )
    _, made = export_run(request_for(run, "fp16", "int8"))
    assert [file.verification.status for file in made] == ["verified"] * 3
    return run


@pytest.fixture
def run(exported, tmp_path):
    """A copy, to be exported once more."""
    return RunDirectory(shutil.copytree(exported.path, tmp_path / "run"))


def request_for(run, *precisions, method="minmax"):
    """With budgets so wide that what is refused is not refused for a few images."""
    return ExportRequest(
        run=run,
        settings=SETTINGS,
        precisions=precisions,
        int8=Int8Request(kind="clean", num_images=64, method=method),
        budget=Budget(max_clean_drop=0.05, max_robust_drop=0.05),
        num_images=80,
    )


# Defects: from a sound file to a spoilt one


def replaced(model, change):
    """With every constant that `change` gives something for."""
    num_changed = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        found = change(tensor.name, array)
        if found is not None:
            num_changed += 1
            tensor.CopyFrom(numpy_helper.from_array(found.astype(array.dtype), tensor.name))
    assert num_changed, "nothing was planted"
    return model


def inserted(model, op, second, **attributes):
    """With one operator more, in front of everything."""
    (images,) = (value.name for value in model.graph.input)
    for node in model.graph.node:
        node.input[:] = ["inserted" if name == images else name for name in node.input]
    model.graph.initializer.append(second)
    node = helper.make_node(op, [images, second.name], ["inserted"], **attributes)
    model.graph.node.insert(0, node)
    return model


def wrong_normalisation(model):
    """Means are those of another data set."""
    (subtraction,) = (node for node in model.graph.node if node.op_type == "Sub")
    mean = subtraction.input[1]
    return replaced(model, lambda name, array: array * 0.2 if name == mean else None)


def swapped_channels(model):
    """BGR for RGB."""
    return inserted(model, "Gather", constant("order", [2, 1, 0]), axis=1)


def swapped_classes(model):
    return appended(model, "Gather", constants=[constant("order", [1, 0, 2, 3])], axis=1)


def added_softmax(model):
    return appended(model, "Softmax", axis=1)


def weights_times_4(model):
    """Of one layer: of its weights or, if they are rounded, of their scale."""

    def change(name, array):
        is_scale = name.endswith("weight_scale") and name in first
        is_weight = name.endswith("weight") and array.ndim == 4 and name in first
        return array * 4 if is_scale or is_weight else None

    read = [name for node in model.graph.node for name in node.input]
    first = next([name] for name in read if name.endswith(("conv2.weight", "weight_scale")))
    return replaced(model, change)


def activations_times_4(model):
    """The scale of what the first rounded layer reads."""
    scale = next(n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear")
    return replaced(model, lambda name, array: array * 4 if name == scale else None)


def asymmetric_activations(model):
    """As ONNX Runtime rounds unless it is told, and TensorRT refuses."""
    zero = next(n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear")
    return replaced(model, lambda name, array: np.array(-5) if name == zero else None)


EVERYWHERE = (
    wrong_normalisation,
    swapped_channels,
    swapped_classes,
    added_softmax,
    weights_times_4,
)
HOPS = {
    "torch -> fp32": ("fp32", exporters.workflow, "write_onnx", EVERYWHERE),
    "fp32 -> fp16": ("fp16", exporters.workflow, "write_float16", EVERYWHERE),
    "fp32 -> int8": (
        "int8",
        exporters.int8.workflow,
        "write_int8",
        (*EVERYWHERE, activations_times_4, asymmetric_activations),
    ),
}
TABLE = [(hop, defect) for hop, (*_, defects) in HOPS.items() for defect in defects]


def contents(run):
    return {path.name: path.read_bytes() for path in run.exports.iterdir()}


@pytest.fixture
def write_known_float32(monkeypatch, exported):
    """The float32 file is always the same; PyTorch need not write it again."""
    known = exported.onnx("fp32").read_bytes()
    monkeypatch.setattr(
        exporters.workflow, "write_onnx", lambda _, path, **__: path.write_bytes(known)
    )


@pytest.mark.parametrize(
    ("hop", "defect"), TABLE, ids=[f"{hop}, {defect.__name__}" for hop, defect in TABLE]
)
def test_a_planted_defect_is_refused_and_its_hop_named(
    run, monkeypatch, write_known_float32, hop, defect
):
    precision, module, writer, _ = HOPS[hop]
    sound = getattr(module, writer)
    written = []

    def plant(*arguments, **options):
        sound(*arguments, **options)
        path = arguments[1]
        onnx.save(defect(onnx.load(path)), path)
        written.append(path)

    before = contents(run)
    monkeypatch.setattr(module, writer, plant)
    with pytest.raises((ArtefactMismatchError, TooLossyError)) as caught:
        export_run(request_for(run, precision))
    assert written
    assert f"the hop {hop} " in str(caught.value)
    assert caught.value.exit_code in (3, 5)
    assert "not deploy" in str(caught.value) or "not to be deployed" in str(caught.value)
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {f"unverified.{precision}.onnx"}


def test_without_a_defect_nothing_is_refused(run, write_known_float32):
    before = contents(run)
    export_run(request_for(run, "fp16", "int8"))
    assert contents(run) == before


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_a_coarse_scale_is_refused_where_ranges_are_cut(
    run, monkeypatch, write_known_float32, method
):
    """They are used beyond their end by design, which must not hide that they are too coarse."""
    sound = exporters.int8.workflow.write_int8

    def plant(*arguments, **options):
        sound(*arguments, **options)
        onnx.save(activations_times_4(onnx.load(arguments[1])), arguments[1])

    monkeypatch.setattr(exporters.int8.workflow, "write_int8", plant)
    with pytest.raises((ArtefactMismatchError, TooLossyError), match="the hop fp32 -> int8 "):
        export_run(request_for(run, "int8", method=method))


def untrained(float32, int8, judging_N):
    """Fine-tuning that leaves everything as it was."""
    graphs = [read_graph(path.read_bytes(), path) for path in (int8, float32)]
    return float_weights(*graphs), 1


@pytest.mark.parametrize("defect", HOPS["fp32 -> int8"][3])
def test_a_defect_after_fine_tuning_is_refused(run, monkeypatch, write_known_float32, defect):
    """Its limits are wider, as its weights may have moved."""
    sound = exporters.int8.workflow.write_fine_tuned

    def plant(*arguments, **options):
        sound(*arguments, **options)
        onnx.save(defect(onnx.load(arguments[1])), arguments[1])

    before = contents(run)
    monkeypatch.setattr(exporters.int8.workflow, "write_fine_tuned", plant)
    with pytest.raises((ArtefactMismatchError, TooLossyError), match="the hop fp32 -> int8 "):
        export_run(request_for(run, "int8"), fine_tune=untrained)
    after = contents(run)
    assert {name: after[name] for name in before} == before


def test_fine_tuning_that_changes_nothing_is_not_refused(run, write_known_float32):
    _, made = export_run(request_for(run, "int8"), fine_tune=untrained)
    assert (made[-1].variant, made[-1].verification.status) == ("int8-qat", "verified")

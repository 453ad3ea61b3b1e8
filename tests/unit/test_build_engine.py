"""Engines are really built, on the CPU by TensorRT-RTX; refusals and cancelling leave nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import onnx  # noqa: TID253 (makes the files)
import pytest
from onnx import TensorProto, helper  # noqa: TID253

from compressor.device import tensorrt_runtime
from compressor.device.build_options import BuildError, BuildOptions, parse_batch
from compressor.device.builder import build
from compressor.device.kit_files import sha256_of
from compressor.errors import MissingDependencyError
from exporters.engine.to_tensorrt import build_engine, import_tensorrt, read_checked_onnx
from exporters.to_onnx import ExportError
from tests.unit.device_models import (
    PRECISIONS,
    make_model,
    make_models,
    needs_tensorrt_rtx,
)

FLOAT32 = make_model().SerializeToString()


def needs_rtx(test):
    return pytest.mark.tensorrt(needs_tensorrt_rtx(test))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@needs_rtx
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_becomes_an_engine_with_a_sidecar(paths, precision, tmp_path):
    path = tmp_path / "new" / "tiny.engine"
    new = build_engine(paths[precision], path, precision=precision, options=BuildOptions())
    new.write()
    facts = new.facts
    sidecar = json.loads(facts.sidecar.read_text())
    assert sorted(path.parent.iterdir()) == [path, facts.sidecar]
    assert facts.sha256 == sidecar["engine"]["sha256"] == sha256_of(path.read_bytes())
    assert facts.num_bytes == sidecar["engine"]["num_bytes"] == path.stat().st_size
    onnx_sha256 = sha256_of(paths[precision].read_bytes())
    assert facts.onnx_sha256 == sidecar["onnx"]["sha256"] == onnx_sha256
    assert sidecar["status"] == "unverified"
    assert sidecar["precision"] == precision
    assert sidecar["tensorrt"]["flavour"] == "tensorrt-rtx"
    assert sidecar["profile"] == {"min": 1, "opt": 8, "max": 32}
    assert sidecar["input"] == {"name": "images", "dtype": "float32", "shape": [-1, 3, 8, 8]}
    assert sidecar["output"]["shape"] == [-1, 4]
    assert sidecar["flags"] == []  # TF32 is off
    assert str(tmp_path) not in facts.sidecar.read_text()
    assert b"unverified" not in path.read_bytes()  # nothing is glued to the engine


@needs_rtx
def test_the_same_build_gives_the_same_bytes():
    assert build(FLOAT32, BuildOptions()).plan == build(FLOAT32, BuildOptions()).plan


@needs_rtx
def test_tf32_is_on_only_when_asked_for():
    assert build(FLOAT32, BuildOptions(tf32=True)).flags == ("TF32",)


@needs_rtx
def test_images_of_bytes_and_a_fixed_batch():
    model = make_model(batch=2, takes_bytes=True).SerializeToString()
    built = build(model, BuildOptions())
    assert built.batch == (2, 2, 2)
    assert (built.images.dtype, built.images.shape) == ("uint8", (2, 3, 8, 8))
    with pytest.raises(BuildError, match="batches of exactly 2, so 1:8:32 cannot be built"):
        build(model, BuildOptions(batch=(1, 8, 32)))


@needs_rtx
def test_the_batch_that_was_asked_for():
    assert build(FLOAT32, BuildOptions(batch=(2, 3, 5))).batch == (2, 3, 5)


@needs_rtx
def test_rtx_builds_for_gpus_that_are_named():
    two = build(FLOAT32, BuildOptions(compute_capabilities=("SM86", "SM89"))).plan
    assert two != build(FLOAT32, BuildOptions(compute_capabilities=("SM86",))).plan


def without_kernel(model):
    del model.graph.initializer[0]
    return model


def with_bad_node(model):
    model.graph.node[1].op_type = "NoSuchOperator"
    return model


def with_output(model, *, name="r2", rank=4):
    sides = [None] * rank
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sides))
    return model


def with_input(model):
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    model.graph.node.append(helper.make_node("Relu", ["more"], ["unused"]))
    return model


def with_images_as_output(model):
    del model.graph.output[:]
    return with_output(model)


BAD_FILES = {
    "no file": (b"", "0 bytes"),
    "another kind of file": (b"PK\x03\x04 zip", "cannot read this ONNX file: .*parse"),
    "cut off": (FLOAT32[:300], "cannot read this ONNX file"),
    "no graph": (onnx.ModelProto(ir_version=10).SerializeToString(), "cannot read this ONNX file"),
    "bad node": (with_bad_node(make_model()).SerializeToString(), r"node conv1 \(NoSuchOperator\)"),
    "no kernel": (without_kernel(make_model()).SerializeToString(), "conv1"),
    "extra output": (with_output(make_model()).SerializeToString(), "r2 float32 .* as the only"),
    "extra input": (with_input(make_model()).SerializeToString(), "more float32 .* as the only"),
    "no logits": (with_images_as_output(make_model()).SerializeToString(), "as the only output"),
    "open size": (
        make_model(image_shape=(3, "h", "w")).SerializeToString(),
        "only the batch may be open",
    ),
}


@needs_rtx
@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_wrong_file_is_refused_with_one_message(content, message, capfd):
    with pytest.raises(BuildError, match=message) as caught:
        build(content, BuildOptions())
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_rtx
def test_weights_in_another_file_are_not_read(tmp_path, monkeypatch):
    """Without care, TensorRT-RTX 1.7 reads them from the current folder."""
    onnx.save(
        make_model(),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match="weights in further files are not read"):
        build((tmp_path / "m.onnx").read_bytes(), BuildOptions())
    with pytest.raises(ExportError, match=r"m\.onnx keeps its weights in another file"):
        read_checked_onnx(tmp_path / "m.onnx")


BAD_OPTIONS = {
    "version": ({"version_compatible": True}, "no version or hardware compatibility"),
    "hardware": ({"hardware_compatible": True}, "no version or hardware compatibility"),
    "orin": (
        {"compute_capabilities": ("SM87",)},
        "does not know the compute capability SM87",
    ),
    "turing": ({"compute_capabilities": ("SM75",)}, "Turing"),
}


@needs_rtx
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_what_rtx_cannot_do_is_refused(options, message):
    with pytest.raises(BuildError, match=message):
        build(FLOAT32, BuildOptions(**options))


def test_options_survive_json():
    options = BuildOptions(batch=(1, 2, 3), tf32=True, compute_capabilities=("SM86",))
    assert BuildOptions.from_table(json.loads(json.dumps(options.to_table()))) == options
    assert BuildOptions.from_table(BuildOptions().to_table()) == BuildOptions()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": [3, 2, 1]}, "3:2:1 is not min:opt:max"),
        ({"batch": [0, 1, 1]}, "0:1:1 is not"),
        ({"batch": [1, 2]}, "1:2 is not"),
        ({"batch": "1:2:3"}, "damaged or not known: batch"),
        ({"batch": [1, 2, 3.5]}, "damaged or not known: batch"),
        ({"workspace_mib": 0}, "0 MiB"),
        ({"workspace_mib": 1 << 40}, "MiB is not within"),
        ({"workspace_mib": True}, "damaged or not known: workspace_mib"),
        ({"optimization_level": 6}, "level 6 is not one of 0 to 5"),
        ({"tf32": 1}, "damaged or not known: tf32"),
        ({"compute_capabilities": [86]}, "damaged or not known: compute_capabilities"),
        ({"fp16": True}, "damaged or not known: fp16"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(BuildError, match=message):
        BuildOptions.from_table(BuildOptions().to_table() | change)


def test_a_batch_is_three_numbers_or_one():
    assert parse_batch("1:8:32") == (1, 8, 32)
    assert parse_batch("4") == (4, 4, 4)
    for text in ("", "1:2", "a", "1:-2:3", "1:2:3:4", "²"):
        with pytest.raises(BuildError, match="neither min:opt:max nor one number"):
            parse_batch(text)


@needs_rtx
def test_progress_is_told_in_order(capfd):
    events = []
    build(FLOAT32, BuildOptions(), observe=events.append)
    assert [event.phase for event in (events[0], events[-1])] == ["Building engine"] * 2
    assert (events[0].kind, events[-1].kind) == ("started", "ended")
    under_way = []
    for event in events:
        if event.kind == "started":
            assert event.parent is None or event.parent in under_way
            under_way.append(event.phase)
        assert event.phase in under_way
        assert event.num_done <= event.num_steps
        if event.kind == "ended":
            under_way.remove(event.phase)
    assert under_way == []
    assert len({event.phase for event in events}) > 3
    steps = [one for one in events if (one.kind, one.phase) == ("step", "Cloning network graph")]
    assert [one.num_done for one in steps] == list(range(1, steps[0].num_steps + 1))


def names_of_threads():
    time.sleep(0.05)  # one that has set its event may have a line to go
    return [thread.name for thread in threading.enumerate()]


@needs_rtx
def test_a_cancelled_build_leaves_nothing(paths, tmp_path):
    cancel = threading.Event()
    seen = []

    def stop_in_the_middle(event):
        seen.append(event)
        if event.phase == "Optimizing graph":
            cancel.set()

    with pytest.raises(ExportError, match="cancelled; nothing was written"):
        build_engine(
            paths["fp32"],
            tmp_path / "a.engine",
            precision="fp32",
            options=BuildOptions(),
            observe=stop_in_the_middle,
            cancel=cancel,
        )
    assert list(tmp_path.iterdir()) == []
    assert "Computing profile costs" not in {event.phase for event in seen}
    assert "tensorrt-build" not in names_of_threads()
    assert build(FLOAT32, BuildOptions()).plan  # the next one is not disturbed


@needs_rtx
def test_ctrl_c_in_the_main_thread_cancels_the_build():
    seen = []

    def interrupt(event):
        seen.append(event)
        if event.phase == "Preparing graph for optimization" and event.kind == "started":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # longer than the main thread looks away

    cancel = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(FLOAT32, BuildOptions(), observe=interrupt, cancel=cancel)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancel.is_set()
    assert "Optimizing graph" not in {event.phase for event in seen}
    num_seen = len(seen)
    assert "tensorrt-build" not in names_of_threads()
    assert len(seen) == num_seen  # it had ended when we came back


@needs_rtx
def test_an_error_of_the_observer_ends_the_build():
    def fail(event):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        build(FLOAT32, BuildOptions(), observe=fail)


@needs_rtx
def test_messages_come_to_the_build_that_caused_them():
    """TensorRT keeps the first logger of a process, so all builds share one."""
    for _ in range(2):
        with pytest.raises(BuildError, match="Turing"):
            build(FLOAT32, BuildOptions(compute_capabilities=("SM75",)))
    assert build(FLOAT32, BuildOptions()).warnings == ()


@needs_rtx
def test_a_foreign_logger_does_no_harm():
    """Where another library gave one before, ours may hear nothing, but a failure stays one."""
    code = """
import sys, tensorrt_rtx as trt
class Foreign(trt.ILogger):
    def __init__(self): trt.ILogger.__init__(self)
    def log(self, severity, text): pass
builder = trt.Builder(Foreign())
from compressor.device.builder import build
from compressor.device.build_options import BuildError, BuildOptions
content = sys.stdin.buffer.read()
print(len(build(content, BuildOptions()).plan) > 1000)
try:
    build(content, BuildOptions(compute_capabilities=("SM75",)))
except BuildError as error:
    print("Turing" in str(error) or "it gave no reason" in str(error))
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], input=FLOAT32, capture_output=True, check=True, timeout=60
    )
    assert finished.stdout.split() == [b"True", b"True"]


def pretended(monkeypatch, name, error):
    """Imports of `name` fail with `error`; those of the other flavour find nothing."""

    def import_module(wanted):
        raise error if wanted == name else ModuleNotFoundError(f"no {wanted}", name=wanted)

    monkeypatch.setattr(tensorrt_runtime.importlib, "import_module", import_module)


def test_without_tensorrt_it_is_said_what_to_install(monkeypatch):
    pretended(monkeypatch, "", None)
    with pytest.raises(MissingDependencyError) as caught:
        import_tensorrt()
    for line in (
        "pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com",
        "tensorrt-cu12",
        "sudo apt install nvidia-jetpack",
        "python3 -m venv --system-site-packages",
        "pip install 'robust-compress[tensorrt-rtx]'",
    ):
        assert line in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libnvonnxparser.so.11: cannot open shared object file"),
        FileNotFoundError("libnvonnxparser.so.11: cannot open shared object file"),
        ModuleNotFoundError("libnvonnxparser.so.11: cannot open", name="tensorrt_libs"),
    ],
)
def test_a_missing_library_has_its_own_text(monkeypatch, error):
    pretended(monkeypatch, "tensorrt", error)
    with pytest.raises(
        MissingDependencyError, match=r"tensorrt is installed and .*libnvonnxparser.*NVIDIA's own"
    ):
        import_tensorrt()


def test_an_unknown_flavour_is_refused():
    with pytest.raises(ExportError, match="flavour 'trtexec' is not known"):
        import_tensorrt("trtexec")


def test_a_machine_on_which_tensorrt_cannot_start():
    """What the bindings do without a driver: an error in the log, then a TypeError."""
    module = types.ModuleType("pretended")

    class Logger:
        pass

    def make_builder(logger):
        logger.log(types.SimpleNamespace(name="ERROR"), "CUDA initialization failure: 35")
        raise TypeError("factory function returned nullptr")

    module.ILogger, module.Builder = Logger, make_builder
    module.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    tensorrt = tensorrt_runtime.TensorRT(module=module, flavour="tensorrt", version="11.4")
    with pytest.raises(BuildError, match=r"11\.4 cannot start .* failure: 35 .*tensorrt-rtx"):
        build(FLOAT32, BuildOptions(), tensorrt=tensorrt)


def with_nan(model):
    values = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    values.flat[3] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, "w1"))
    return model


def with_opset(model, version):
    model.opset_import[0].version = version
    return model


def with_huge_weight(model):
    model.graph.initializer[0].dims[0] = 1 << 40
    return model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 zip", "damaged, or no ONNX file"),
        (FLOAT32[:500], "damaged|refused by onnx.checker"),
        (with_nan(make_model()).SerializeToString(), "not numbers: w1"),
        (with_opset(make_model(), 99).SerializeToString(), "later opset than"),
        (
            with_huge_weight(make_model()).SerializeToString(),
            "onnx.checker: .*too small",
        ),
    ],
)
def test_hostile_onnx_files_are_refused(content, message, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=message) as caught:
        read_checked_onnx(tmp_path / "m.onnx")
    assert "m.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_onnx_file_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"other\.onnx cannot be read: No such file"):
        read_checked_onnx(tmp_path / "other.onnx")

"""Engines on a pretended GPU, precisions audited, ONNX Runtime; and engines on a real GPU."""

import json

import numpy as np
import onnx  # noqa: TID253 (makes the files)
import pytest

from compressor.device.build_options import BuildOptions
from compressor.device.builder import build
from compressor.device.cuda import Cuda
from compressor.device.engine import Engine, audit_layers, wrong_precision
from compressor.device.kit_files import DeviceError, MissingPackageError
from compressor.device.onnx_session import OnnxSession
from compressor.device.replay import compare
from compressor.device.tensorrt_runtime import import_tensorrt
from tests.unit.device_models import (
    PRECISIONS,
    images,
    make_model,
    make_models,
    needs_tensorrt_rtx,
)
from tests.unit.pretended_gpu import BF16, HALF, UINT8, Cudart, Gpu, layers_json

WEIGHT_PK = np.random.default_rng(0).normal(size=(3 * 8 * 8, 4)).astype(np.float32)


def linear(images_NCHW):
    return images_NCHW.reshape(-1, len(WEIGHT_PK)).astype(np.float32) @ WEIGHT_PK


@pytest.fixture
def cudart():
    return Cudart()


@pytest.fixture
def make_engine(cudart):
    def make(**options):
        gpu = Gpu(cudart=cudart, **({"answer": linear} | options))
        return Engine(b"plan", tensorrt=gpu.tensorrt(), cuda=Cuda(cudart))

    return make


@pytest.mark.parametrize("num_images", [0, 1, 8, 21])
def test_any_number_of_images_is_answered(make_engine, num_images):
    with make_engine() as engine:
        logits_NK = engine(images(num_images))
        assert (engine.min_batch, engine.max_batch) == (1, 8)
        assert (engine.image_shape, engine.num_classes) == ((3, 8, 8), 4)
    assert logits_NK.dtype == np.float32
    np.testing.assert_allclose(logits_NK, linear(images(num_images)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"profile": (1, 4, 8)}, [8, 8, 5]),
        ({"profile": (7, 7, 8)}, [8, 8, 7]),
        ({"static": 4}, [4] * 6),
    ],
)
def test_batches_stay_within_the_profile(make_engine, options, sizes):
    seen = []

    def answer(images_NCHW):
        seen.append(images_NCHW.copy())
        return linear(images_NCHW)

    with make_engine(answer=answer, **options) as engine:
        logits_NK = engine(images(21))
    np.testing.assert_allclose(logits_NK, linear(images(21)), rtol=1e-6)
    assert [len(batch) for batch in seen] == sizes
    num_filled = sum(sizes) - 21
    assert num_filled == 0 or not seen[-1][-num_filled:].any()


@pytest.mark.parametrize(("dtype", "kind"), [(UINT8, np.uint8), (HALF, np.float16)])
def test_images_of_other_types(make_engine, dtype, kind):
    pictures = images(5, dtype=np.uint8).astype(kind)
    with make_engine(dtype=dtype) as engine:
        assert engine.input_dtype == kind
        np.testing.assert_allclose(engine(pictures), linear(pictures), rtol=1e-6)
        with pytest.raises(DeviceError, match=rf"takes {np.dtype(kind)} images .* float32"):
            engine(images(5))


def test_strided_images_are_taken(make_engine):
    with make_engine() as engine:
        turned = np.asfortranarray(images(9))[::2]
        np.testing.assert_allclose(engine(turned), linear(turned), rtol=1e-6)


def test_all_memory_is_given_back(make_engine, cudart):
    with make_engine() as engine:
        engine(images(3))
        assert len(cudart.memory) == 2
    assert (cudart.memory, cudart.streams) == ({}, set())


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("create_execution_context", "cannot make a context"),
        ("set_tensor_address", "refuses the memory for images"),
        ("set_input_shape", "a batch of 3 is refused"),
        ("execute_async_v3", "the engine cannot be run"),
    ],
)
def test_every_refusal_of_tensorrt_is_an_error(make_engine, refuses, message):
    with pytest.raises(DeviceError, match=message):
        make_engine(refuses=(refuses,))(images(3))


def test_a_failing_gpu_is_an_error():
    for call in ("cudaMalloc", "cudaStreamSynchronize"):
        cudart = Cudart(**{call: 2})
        gpu = Gpu(cudart=cudart, answer=linear)
        with pytest.raises(DeviceError, match=rf"{call} failed: something is wrong \(CUDA error 2"):
            Engine(b"plan", tensorrt=gpu.tensorrt(), cuda=Cuda(cudart))(images(3))


def test_an_engine_of_another_version_is_refused_with_the_reason(cudart):
    gpu = Gpu(cudart=cudart, answer=linear)
    with pytest.raises(DeviceError, match="refuses this engine: the version does not match"):
        Engine(b"of another version", tensorrt=gpu.tensorrt(), cuda=Cuda(cudart))


def test_images_of_another_shape_and_engines_of_other_types_are_refused(make_engine):
    with make_engine() as engine, pytest.raises(DeviceError, match=r"of \(3, 8, 8\), and .*4, 4"):
        engine(np.zeros((1, 3, 4, 4), np.float32))
    with pytest.raises(DeviceError, match="images is of type BF16"):
        make_engine(dtype=BF16)


@pytest.mark.parametrize("cudart", [Cudart(cudaGetDeviceCount=35), Cudart(count=0)])
def test_no_gpu_is_said(cudart):
    with pytest.raises(MissingPackageError, match="no usable NVIDIA GPU"):
        Cuda(cudart)


# What the inspector of TensorRT 10 says, and that of 11, which splits `Format/Datatype`.
LAYERS_10 = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv1",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "images", "Format/Datatype": "Row major linear FP32 format"}],
            "Outputs": [{"Name": "x", "Format/Datatype": "Channel major FP16 format"}],
        },
        {
            "Name": "conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Channel major FP16 format"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Channel major FP16 format"}],
            "Weights": {"Type": "Half", "Count": 216},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc",
        },
        {
            "Name": "conv2",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "y", "Format/Datatype": "Thirty-two wide channel Int8 format"}],
            "Outputs": [{"Name": "z", "Format/Datatype": "Row major linear FP32"}],
            "Weights": {"Type": "Int8", "Count": 576},
        },
        {
            "Name": "__myl_Mean",
            "LayerType": "kgen",
            "Inputs": [{"Name": "z", "Format/Datatype": "Float"}],
            "Outputs": [],
            "TacticName": "__myl_Mean_0x0123",
        },
    ],
    "Bindings": ["images", "logits"],
}
LAYERS_11 = {
    "Layers": [
        {
            "Name": "conv1",
            "LayerType": "conv",
            "Inputs": [{"Name": "x", "Format": "NHWC8", "Datatype": "Half", "Dimensions": [1]}],
            "Outputs": [{"Name": "y", "Format": "NHWC8", "Datatype": "Half"}],
        },
        {
            "Name": "linear",
            "LayerType": "gemm",
            "Inputs": [{"Name": "y", "Format": "kLINEAR", "DataType": "Float"}],
            "Outputs": [{"Name": "logits", "Format": "kLINEAR", "DataType": "Float"}],
            "TacticName": "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n",
        },
    ],
    "I/O Tensors": [{"Name": "images", "DataType": "Float"}],
}


def test_the_audit_counts_layers_that_multiply():
    assert audit_layers(json.dumps(LAYERS_10)) == {"fp16": 1, "int8": 1}
    assert audit_layers(json.dumps(LAYERS_11)) == {"fp16": 1, "tf32": 1}


def test_where_none_multiplies_for_sure_all_that_compute_count():
    """Fused kernels need not say what they do; conversions still do not count."""
    layers = [layer | {"LayerType": "kgen"} for layer in LAYERS_11["Layers"]]
    for layer in layers:
        layer.pop("TacticName", None)
    layers.append({"LayerType": "Reformat", "Inputs": [{"Datatype": "Int8"}]})
    assert audit_layers(json.dumps({"Layers": layers})) == {"fp16": 1, "fp32": 1}


def test_a_lone_conversion_from_int8_computes_nothing_in_int8():
    convert = {
        "LayerType": "kgen",
        "Name": "__myl_Dequ",
        "Inputs": [{"Name": "q", "Format/Datatype": "Int8"}],
    }
    layers = audit_layers(
        json.dumps({"Layers": [convert, *json.loads(layers_json("FP32"))["Layers"]]})
    )
    assert layers == {"fp32": 1}
    assert "no layer runs in it: 1 in fp32" in wrong_precision(layers, "int8", tf32=False)


@pytest.mark.parametrize(
    "text",
    [
        '{"Layers": [{"LayerType": "conv", "Inputs": [{"Datatype": "Half"}]}, "conv2"]}',
        "",
        "[]",
        "no json",
        '{"Layers": ["conv1", "conv2"]}',
        '{"Bindings": []}',
        '{"Layers": 3}',
    ],
)
def test_an_engine_without_details_cannot_be_audited(text):
    assert audit_layers(text) == {}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("FP32", "fp32"),
        ("FP16", "fp16"),
        ("BFloat16", "bf16"),
        ("BF16", "bf16"),
        ("Int8", "int8"),
        ("UInt8", "unknown"),
        ("FP8", "fp8"),
        ("INT4", "int4"),
        ("Int32", "unknown"),
    ],
)
def test_types_are_recognised(kind, name):
    assert audit_layers(layers_json(kind)) == {name: 1}


@pytest.mark.parametrize(
    ("layers", "precision", "tf32", "fault"),
    [
        ({"fp32": 3}, "fp32", False, None),
        ({"fp32": 3, "unknown": 1}, "fp32", False, None),
        ({"unknown": 1}, "fp32", False, "fp32 was asked for, and no layer"),
        ({"fp32": 3, "tf32": 1}, "fp32", False, "other types: 3 in fp32, 1 in tf32"),
        ({"tf32": 1}, "fp32", True, None),
        ({"fp32": 3, "fp16": 1}, "fp32", True, "other types"),
        ({"fp32": 3}, "fp16", False, "fp16 was asked for, and no layer runs in it: 3 in fp32"),
        ({"fp32": 3, "fp16": 9}, "fp16", False, None),
        ({"fp32": 1, "int8": 9}, "int8", False, None),
        ({"fp16": 9}, "int8", False, "int8 was asked for"),
        ({"fp32": 8, "int8": 1}, "int8-mixed", False, None),
        ({"fp32": 8, "int8": 1}, "int8", False, "most layers do not run in it: 8 in fp32, 1 in"),
        ({"fp32": 8, "fp16": 7}, "fp16", False, "most layers do not run in it"),
        ({"fp32": 8, "fp16": 8, "unknown": 30}, "fp16", False, None),
        ({}, "fp32", False, "no layers"),
    ],
)
def test_the_precision_asked_for_must_be_there(layers, precision, tf32, fault):
    found = wrong_precision(layers, precision, tf32=tf32)
    assert found is None if fault is None else fault in found


@pytest.mark.parametrize("batch", ["batch", 4])
def test_onnx_runtime_answers_any_number_of_images(batch):
    session = OnnxSession(make_model(batch=batch).SerializeToString(), num_threads=1)
    assert session.batch_size == (4 if batch == 4 else None)
    assert (session.image_shape, session.num_classes) == ((3, 8, 8), 4)
    one_by_one = np.concatenate([session(images(9)[k : k + 1]) for k in range(9)])
    np.testing.assert_allclose(session(images(9)), one_by_one, atol=1e-6)
    assert session(images(0)).shape == (0, 4)
    with pytest.raises(DeviceError, match="ONNX Runtime .* cannot answer"):
        session(np.zeros((1, 3, 4, 4), np.float32))


def test_onnx_files_that_are_no_classifiers_are_refused():
    with pytest.raises(DeviceError, match="refuses the file"):
        OnnxSession(b"no onnx")
    model = make_model()
    model.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info("r2", onnx.TensorProto.FLOAT, [None] * 4)
    )
    with pytest.raises(DeviceError, match=r"r2 tensor\(float\).* serve"):
        OnnxSession(model.SerializeToString())


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def real_gpu():
    try:
        Cuda()
        return import_tensorrt()
    except MissingPackageError as error:
        pytest.skip(f"{error}".partition("\n")[0])


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_engine_answers_as_onnx_runtime(paths, precision, real_gpu):
    content = paths[precision].read_bytes()
    plan = build(content, BuildOptions(batch=(2, 4, 8)), tensorrt=real_gpu).plan
    with Engine(plan, tensorrt=real_gpu) as engine:
        shown = compare(OnnxSession(content)(images(21)), engine(images(21)), tolerance=0.05)
        layers = audit_layers(engine.layer_information())
    assert shown.num_clear_flips == 0
    assert shown.relative_error < 0.05
    assert wrong_precision(layers, precision, tf32=False) is None


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_without_a_gpu_an_engine_is_refused_before_it_is_loaded():
    try:
        Cuda()
    except MissingPackageError:
        plan = build(make_model().SerializeToString(), BuildOptions()).plan
        with pytest.raises(MissingPackageError, match="no usable NVIDIA GPU|libcudart"):
            Engine(plan, tensorrt=import_tensorrt())
    else:
        pytest.skip("there is a GPU")

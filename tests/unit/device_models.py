"""Tiny classifiers as ONNX files in three precisions, and a kit of them, for the device tests."""

from importlib import util

import numpy as np
import onnx  # noqa: TID253 (makes the files)
import pytest
from onnx import TensorProto, helper, numpy_helper  # noqa: TID253

from compressor.device.build_options import BuildOptions
from compressor.device.onnx_session import OnnxSession
from exporters.engine.build_kit import KitModel, write_build_kit
from exporters.engine.golden import Golden

IMAGE_SHAPE = (3, 8, 8)
NUM_CLASSES = 4
NUM_IMAGES = 21
PRECISIONS = ("fp32", "fp16", "int8")

needs_tensorrt_rtx = pytest.mark.skipif(
    util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


def make_model(*, batch="batch", takes_bytes=False, image_shape=IMAGE_SHAPE, scale=1.0):
    """Two convolutions, a mean over the pixels, a linear map; as the exporter names things."""
    random = np.random.default_rng(0)

    def weights(name, *shape):
        values = random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array((scale * values).astype(np.float32), name)

    kind = TensorProto.UINT8 if takes_bytes else TensorProto.FLOAT
    constants = [weights("w1", 8, 3, 3, 3), weights("w2", 8, 8, 3, 3), weights("w3", 4, 8)]
    constants.append(numpy_helper.from_array(np.array(255, np.float32), "white"))
    first = [helper.make_node("Identity", ["images"], ["pixels"])]
    if takes_bytes:
        first = [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["floats", "white"], ["pixels"]),
        ]
    nodes = [
        *first,
        helper.make_node("Conv", ["pixels", "w1"], ["c1"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["mean"], name="pool"),
        helper.make_node("Flatten", ["mean"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "w3"], ["logits"], name="linear", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", kind, [batch, *image_shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, NUM_CLASSES])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def to_float16(model):
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    converted = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
    converted.topological_sort()
    return converted.model


def to_int8(model, folder):
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"images": images(32)}])

        def get_next(self):
            return next(self.batches, None)

    onnx.save(model, folder / "float.onnx")
    quantize_static(
        folder / "float.onnx",
        folder / "int8.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
        },
    )
    return onnx.load(folder / "int8.onnx")


def images(num_images, *, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    floats = random.random((num_images, *IMAGE_SHAPE), dtype=np.float32)
    return floats if dtype == np.float32 else (255 * floats).astype(np.uint8)


def make_models(folder):
    model = make_model()
    made = {"fp32": model, "fp16": to_float16(make_model()), "int8": to_int8(model, folder)}
    paths = {}
    for precision, one in made.items():
        paths[precision] = folder / f"model.{precision}.onnx"
        onnx.save(one, paths[precision])
    return paths


def make_golden(paths, *, dtype=np.float32, num_images=NUM_IMAGES):
    clean = images(num_images, seed=1, dtype=dtype)
    noise = images(num_images, seed=2, dtype=dtype)
    adversarial = (0.9 * clean + 0.1 * noise).astype(dtype)
    sessions = {name: OnnxSession(path.read_bytes(), num_threads=1) for name, path in paths.items()}
    return Golden(
        clean_NCHW=clean,
        adversarial_NCHW=adversarial,
        labels_N=np.arange(num_images) % NUM_CLASSES,
        clean_logits_NK={name: session(clean) for name, session in sessions.items()},
        adversarial_logits_NK={name: session(adversarial) for name, session in sessions.items()},
    )


def make_kit(folder, paths, *, golden=None, models=None, **options):
    """Writes a kit; the sha256 of its `kit.json`."""
    models = models or [
        KitModel(path=path, precision=name, tolerance=0.02, min_agreement=0.95)
        for name, path in paths.items()
    ]
    return write_build_kit(
        folder,
        models=models,
        golden=golden or make_golden(paths),
        options=BuildOptions(**options),
        class_names=["cat", "dog", "fox", "owl"],
        threat="linf 8/255",
    )

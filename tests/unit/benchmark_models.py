"""Targets of benchmarks and the files behind them, for the tests of these."""

import itertools
import json

import onnx  # noqa: TID253 (makes the files)
import torch
from onnx import TensorProto, helper  # noqa: TID253

from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.weights import sha256_of_file
from exporters.benchmark.measurement import Plan
from exporters.benchmark.target import BenchTarget

MS = 1_000_000
PLAN = Plan(batch_sizes=(1,), thread_counts=(1,), num_rounds=2, seconds=0.02)


RECIPE = {
    "name": "mine",
    "data": {"source": "digits", "validation_size": 100},
    "student": {"architecture": "tiny"},
    "method": {"name": "cross_entropy"},
}


class World:
    """A clock that only answers of targets move, and a record of these."""

    def __init__(self):
        self.now_ns, self.calls = 0, []

    def clock_ns(self):
        return self.now_ns

    def target(self, name, folder, *durations_ms, **changes):
        durations_ns = itertools.cycle(round(MS * ms) for ms in durations_ms)

        def open_on(num_threads):
            self.calls.append(f"open {name}")
            torch.set_num_threads(num_threads)

            def answer(images_NCHW):
                self.calls.append((name, images_NCHW.shape, str(images_NCHW.dtype)))
                self.now_ns += next(durations_ns)

            return answer

        values = {
            "name": name,
            "kind": "onnx",
            "source": name,
            "folder": folder,
            "precision": "fp32",
            "sha256": name * 64,
            "source_sha256": None,
            "num_bytes": 100,
            "image_shape": (3, 4, 5),
            "runs_on": "nothing",
            "open": open_on,
        }
        return BenchTarget(**(values | changes))


def save_onnx(path, *, batch="batch", size=(3, 8, 8), num_classes=4, **options):
    """Flatten, cast where the pixels are bytes, and a linear map; `metadata` goes into it."""
    kind = options.get("kind", TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info("pixels", kind, [batch, *size])]
    num_pixels = size[0] * 64
    half = options.get("half", False)
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    values = [(place % 7 - 3) / 4 for place in range(num_pixels * num_classes)]  # logits differ
    weight = helper.make_tensor("w", dtype, [num_pixels, num_classes], values)
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node(
            "MatMul", ["float", "wide"], ["logits" if not options.get("quantised") else "raw"]
        ),
    ]
    constants = [weight]
    if options.get("quantised"):
        constants.append(helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]))
        constants.append(helper.make_tensor("zero", TensorProto.INT8, [], [0]))
        nodes.append(helper.make_node("QuantizeLinear", ["raw", "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["logits"]))
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, num_classes])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, options.get("metadata", {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def save_network(path):
    spec = NetworkSpec(architecture="tiny", width=0.5, num_classes=4, image_shape=(3, 8, 8))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(path, build_classifier(spec, seed=0), spec, {})
    return path


def save_run(folder):
    """A finished run with three exports, one of which failed its check."""
    sha256 = sha256_of_file(save_network(folder / "model.safetensors"))
    (folder / "recipe.resolved.json").write_text(json.dumps(RECIPE))
    facts = """class_names teachers training_content_sha256 num_training num_validation
        validation_index_sha256 image_shape selection_attack"""
    (folder / "run.json").write_text(
        json.dumps(dict.fromkeys(facts.split(), 0) | {"model_sha256": sha256})
    )
    metadata = {"robust_compress.source_sha256": sha256}
    exports = folder / "exports"
    save_onnx(exports / "model.fp32.onnx", metadata=metadata)
    save_onnx(exports / "model.int8.onnx", metadata=metadata, quantised=True, half=True)
    save_onnx(exports / "unverified.fp16.onnx", metadata=metadata)
    return folder

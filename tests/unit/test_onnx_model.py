import hashlib
import os
import warnings

import numpy as np
import onnx  # noqa: TID253 (makes the files)
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper  # noqa: TID253

from compressor.errors import WeightsError
from compressor.onnx_model import load_onnx_model

WEIGHT_KC = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def make_model(*, batch="batch", size=(3, 8, 8), input_type=TensorProto.FLOAT, extra_input=False):
    """Mean over pixels, then a linear map without bias."""
    inputs = [helper.make_tensor_value_info("pixels", input_type, [batch, *size])]
    if extra_input:
        inputs.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w"], ["logits"], transB=1),
        ],
        "linear",
        inputs,
        [helper.make_tensor_value_info("logits", input_type, [batch, 4])],
        [
            numpy_helper.from_array(
                WEIGHT_KC.astype(helper.tensor_dtype_to_np_dtype(input_type)), "w"
            )
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"key": "value"})
    return model


@pytest.fixture
def save(tmp_path):
    def save(model, name="m.onnx"):
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return save


def expected_logits(x_NCHW):
    return x_NCHW.mean(dim=(2, 3)) @ torch.from_numpy(WEIGHT_KC).T


def images(num_images, *, size=(3, 8, 8)):
    return torch.rand(num_images, *size, generator=torch.Generator().manual_seed(num_images))


@pytest.mark.parametrize("num_images", [0, 1, 5])
def test_logits_of_a_file_with_dynamic_batch(save, num_images):
    model = load_onnx_model(save(make_model()), num_threads=1)
    logits_NK = model(images(num_images))
    assert logits_NK.dtype == torch.float32
    assert not logits_NK.requires_grad
    torch.testing.assert_close(logits_NK, expected_logits(images(num_images)))


@pytest.mark.parametrize("num_images", [0, 1, 4, 9])
def test_a_fixed_batch_is_filled_and_cut(save, num_images):
    model = load_onnx_model(save(make_model(batch=4)))
    assert model.batch_size == 4
    torch.testing.assert_close(model(images(num_images)), expected_logits(images(num_images)))


def test_images_of_other_types_and_layouts_are_taken(save):
    model = load_onnx_model(save(make_model()))
    x_NCHW = images(3).to(memory_format=torch.channels_last).double().requires_grad_()
    torch.testing.assert_close(model(x_NCHW), expected_logits(images(3)))


def test_facts_about_the_file(save):
    path = save(make_model())
    model = load_onnx_model(path)
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.num_bytes == path.stat().st_size
    assert (model.num_classes, model.input_name, model.batch_size) == (4, "pixels", None)
    assert model.image_shape == (3, 8, 8)
    assert model.metadata == {"key": "value"}


def test_images_of_another_shape_are_refused(save):
    fixed = load_onnx_model(save(make_model()))
    with pytest.raises(WeightsError, match=r"takes images of 3x8x8 .* not 3x9x8"):
        fixed(images(1, size=(3, 9, 8)))
    free = load_onnx_model(save(make_model(size=(3, "height", "width")), "free.onnx"))
    x_NCHW = images(2, size=(3, 9, 12))
    torch.testing.assert_close(free(x_NCHW), expected_logits(x_NCHW))
    with pytest.raises(WeightsError, match=r"takes images of 3xanyxany .* not 1x8x8"):
        free(images(1, size=(1, 8, 8)))


def test_a_file_exported_by_pytorch_answers_as_the_network(tmp_path, make_tiny):
    network = make_tiny().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(
            network,
            (images(2),),
            str(tmp_path / "m.onnx"),
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    model = load_onnx_model(tmp_path / "m.onnx")
    with torch.no_grad():
        torch.testing.assert_close(model(images(7)), network(images(7)), rtol=1e-4, atol=1e-5)


def test_damaged_files_are_explained_and_nothing_is_printed(save, tmp_path, capfd):
    path = save(make_model())
    content = path.read_bytes()
    damaged = {"is empty": b"", "is damaged": content[: len(content) // 2]}
    for message, some_bytes in damaged.items():
        path.write_bytes(some_bytes)
        with pytest.raises(WeightsError, match=rf"m\.onnx {message}"):
            load_onnx_model(path)
    path.write_bytes(b"PK\x03\x04 some other kind of file")
    with pytest.raises(WeightsError, match="is damaged, or not an ONNX file"):
        load_onnx_model(path)
    with pytest.raises(WeightsError, match="does not exist"):
        load_onnx_model(tmp_path / "other.onnx")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_onnx_model(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_runtime_does_not_warn_on_its_own(save, capfd):
    model = make_model()
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT_KC, "unused"))
    load_onnx_model(save(model))
    assert capfd.readouterr() == ("", "")


def test_data_in_another_file_are_refused(tmp_path, monkeypatch):
    onnx.save(
        make_model(),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    monkeypatch.chdir(tmp_path)  # where ONNX Runtime would find it
    with pytest.raises(WeightsError, match=r"weights in another file.*external_data=False"):
        load_onnx_model(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_input": True}, "must have one input .* other tensor"),
        ({"input_type": TensorProto.FLOAT16}, r"must have one input .* tensor\(float16\)"),
        ({"size": (3, 8)}, "must have one input"),
    ],
)
def test_other_inputs_are_refused(save, options, message):
    with pytest.raises(WeightsError, match=message):
        load_onnx_model(save(make_model(**options)))


@pytest.mark.parametrize("num_dimensions", [1, 2, 3])
def test_outputs_that_are_not_logits_are_refused(save, num_dimensions):
    model = make_model()
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n"] * num_dimensions)
    )
    if num_dimensions == 2:  # of a shape that nobody can infer
        del model.graph.node[2], model.graph.initializer[0]
        model.graph.node.append(helper.make_node("NonZero", ["flat"], ["places"]))
        model.graph.node.append(helper.make_node("Cast", ["places"], ["logits"], to=1))
    elif num_dimensions == 3:
        model.graph.node[2].output[0] = "two"
        model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
        model.graph.node.append(helper.make_node("Unsqueeze", ["two", "axis"], ["logits"]))
    else:
        model.graph.node[2].output[0] = "two"
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "shape"))
        model.graph.node.append(helper.make_node("Reshape", ["two", "shape"], ["logits"]))
    with pytest.raises(WeightsError, match="must have one output of float32"):
        load_onnx_model(save(model))


def test_a_second_output_is_refused(save):
    model = make_model()
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, [None, 3]))
    with pytest.raises(WeightsError, match=r"one output .* logits .*, flat"):
        load_onnx_model(save(model))


def test_a_batch_of_nothing_is_no_batch(save):
    with pytest.raises(WeightsError, match="must have one input"):
        load_onnx_model(save(make_model(batch=0)))


@pytest.mark.parametrize("batch", ["batch", 4])
def test_an_answer_that_is_not_what_was_declared_is_refused(save, batch):
    """Shapes may be computed, so this is seen only when the file answers."""
    model = make_model(batch=batch)
    model.graph.node[2].output[0] = "two"
    for name, value in (("start", [0]), ("end", [1]), ("axes", [0])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    inputs = ["two", "start", "end", "axes"]
    model.graph.node.append(helper.make_node("Slice", inputs, ["logits"]))
    if batch == 4:
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    loaded = load_onnx_model(save(model))
    with pytest.raises(WeightsError, match=r"declares one row of 4 logits per image, and answers"):
        loaded(images(3))


def test_a_failure_while_answering_is_explained(save):
    model = make_model()
    model.graph.node[2].output[0] = "two"
    model.graph.initializer.append(numpy_helper.from_array(np.array([7, 4]), "shape"))
    model.graph.node.append(helper.make_node("Reshape", ["two", "shape"], ["logits"]))
    loaded = load_onnx_model(save(model))
    with pytest.raises(WeightsError, match=r"cannot be run on 3 images of 3x8x8 .*; export it"):
        loaded(images(3))


def test_what_is_no_file_is_not_read(tmp_path):
    """Reading a pipe or a device would never end."""
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "device.onnx").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        with pytest.raises(WeightsError, match="it is no file but a device or a pipe"):
            load_onnx_model(path)


def test_a_file_beyond_protobuf_is_not_read(tmp_path):
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # without data on the disk
    with pytest.raises(WeightsError, match=r"has 2,147,483,649 bytes, and an ONNX file ends at"):
        load_onnx_model(path)

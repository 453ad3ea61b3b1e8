"""The example for the device answers as the run does, without torch and without us."""

import ast
import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import numpy as np
import onnx  # noqa: TID253 (changes a file)
import pytest
import torch
from PIL import Image

from compressor.device.onnx_session import OnnxSession
from compressor.image_decoding import Decoding
from compressor.networks import NetworkSpec, build_classifier, load_classifier
from exporters.to_onnx import OnnxForm, write_onnx
from tests.unit.device_models import make_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/device/classify.py"
STUDENT = ROOT / "docs/results/cifar10-small/model.safetensors"
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def card(names, contract="float32"):
    return {
        "robust_compress.class_names": json.dumps(names),
        "robust_compress.input_contract": contract,
    }


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """Runs the script where numpy, ONNX Runtime and Pillow are, and neither torch nor we."""
    packages = tmp_path_factory.mktemp("packages")
    for name in ("numpy", "onnxruntime", "PIL"):
        package = Path(util.find_spec(name).origin).parent
        (packages / name).symlink_to(package)
        for libraries in (
            package.with_name(f"{name.lower()}.libs"),
            package.with_name("pillow.libs"),
        ):
            if libraries.is_dir() and not (packages / libraries.name).exists():
                (packages / libraries.name).symlink_to(libraries)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-S", SCRIPT, *arguments],
            env={"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def student():
    """The CIFAR-10 student that is in the repository."""
    return load_classifier(STUDENT)


@pytest.fixture(scope="module")
def model(student, tmp_path_factory):
    network, spec = student
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    form = OnnxForm(image_shape=spec.image_shape)
    write_onnx(network, path, form=form, metadata=card(CIFAR10, form.input_contract))
    return path


def photo(path, *, size=(48, 40), mode="RGB", seed=0):
    """Smooth colours, as a JPEG would keep them."""
    coarse = np.random.default_rng(seed).random((5, 6, 3)) * 255
    image = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    image.convert(mode).save(path)
    return path


def answer(network, path, *, image_size):
    """Label and confidence by way of the decoding that training used."""
    with Image.open(path) as image:
        pixels_CHW = Decoding(image_size=image_size).apply(image).copy()
    x_NCHW = torch.from_numpy(pixels_CHW)[None].float() / 255
    with torch.no_grad():
        odds_K = network.eval()(x_NCHW)[0].softmax(dim=0)
    return int(odds_K.argmax()), float(odds_K.max())


@pytest.mark.parametrize("size", [(48, 40), (33, 97), (32, 32)])
def test_a_photo_gets_the_answer_of_the_network(classify, student, model, tmp_path, size):
    network, _ = student
    path = photo(tmp_path / "photo.jpg", size=size, seed=size[0])
    place, confidence = answer(network, path, image_size=32)
    finished = classify(model, path)
    assert finished.returncode == 0, finished.stderr
    shown = finished.stdout.split("\t")
    assert shown[:2] == [str(path), CIFAR10[place]]
    assert float(shown[2]) == pytest.approx(confidence, abs=6e-4)
    assert "float32 [batch, 3, 32, 32], pixels in [0, 1]" in finished.stderr


def test_a_grey_image_gets_the_answer_of_the_network(classify, tmp_path):
    """Of the architecture and the shape of the digits demo."""
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    network, model = build_classifier(spec, seed=3), tmp_path / "model.onnx"
    names = [str(digit) for digit in range(10)]
    write_onnx(network, model, form=OnnxForm(image_shape=(1, 8, 8)), metadata=card(names))
    photos = [photo(tmp_path / f"{seed}.png", mode="L", seed=seed) for seed in range(4)]
    finished = classify(model, *photos)
    assert finished.returncode == 0, finished.stderr
    for path, line in zip(photos, finished.stdout.splitlines(), strict=True):
        place, confidence = answer(network, path, image_size=8)
        assert line.split("\t")[:2] == [str(path), names[place]]
        assert float(line.split("\t")[2]) == pytest.approx(confidence, abs=6e-4)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"takes_bytes": True}, (30, 20)),
        ({"batch": 3}, (8, 8)),
        ({"image_shape": (3, 8, 12)}, (12, 8)),
    ],
    ids=["uint8", "batches of 3", "no square"],
)
def test_each_kind_of_input_gets_its_answers(classify, tmp_path, options, size):
    model, names = tmp_path / "model.onnx", ["cat", "dog", "fox", "owl"]
    graph = make_model(**options, scale=9)
    onnx.helper.set_model_props(graph, card(names))
    onnx.save(graph, model)
    path = photo(tmp_path / "photo.png", size=size)
    with Image.open(path) as image:
        square = options.get("image_shape", (3, 8, 8))[1:] == (8, 8)
        pixels_CHW = Decoding(image_size=8 if square else None).apply(image)
    takes_bytes = options.get("takes_bytes", False)
    image_CHW = pixels_CHW if takes_bytes else pixels_CHW.astype(np.float32) / 255
    logits_K = OnnxSession(model.read_bytes(), num_threads=1)(image_CHW[None])[0]
    finished = classify(model, path)
    assert finished.returncode == 0, finished.stderr
    confidence = 1 / np.exp(logits_K - logits_K.max()).sum()
    assert finished.stdout == f"{path}\t{names[logits_K.argmax()]}\t{confidence:.3f}\n"


def refused(finished):
    assert finished.returncode == 4
    assert "Traceback" not in finished.stderr
    return finished.stderr.splitlines()[-1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_wrong_channels_are_refused(classify, model, tmp_path, mode):
    path = tmp_path / "image.png"
    if mode == "I;16":
        Image.fromarray(np.zeros((40, 40), np.uint16)).save(path)
    else:
        photo(path, mode=mode)
    line = refused(classify(model, path))
    assert f"has pixels of mode {mode}, and the model takes 3 channels, mode RGB" in line


def test_what_cannot_be_used_is_explained(classify, model, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    image = photo(tmp_path / "photo.jpg")
    bare = onnx.load(model)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    (tmp_path / "broken.onnx").write_bytes(model.read_bytes()[:1000])
    for arguments, says in (
        ((model, tmp_path / "absent.jpg"), "No such file"),
        ((model, tmp_path / "text.jpg"), "cannot identify image file"),
        ((tmp_path / "bare.onnx", image), "names no classes: write it with `robust-compress"),
        ((tmp_path / "broken.onnx", image), "Error: "),
        ((tmp_path / "absent.onnx", image), "Error: "),
    ):
        assert says in refused(classify(*arguments))


def test_images_that_are_no_square_are_not_cropped(classify, tmp_path):
    graph = make_model(image_shape=(3, 8, 12))
    onnx.helper.set_model_props(graph, card(["a", "b", "c", "d"]))
    onnx.save(graph, tmp_path / "model.onnx")
    wrong = photo(tmp_path / "wrong.png", size=(24, 16))
    line = refused(classify(tmp_path / "model.onnx", wrong))
    assert "must have 12x8 pixels, which is no square" in line


def test_it_is_short_and_speaks_python_3_10():
    """As on JetPack 6."""
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 100
    ast.parse(text, feature_version=(3, 10))

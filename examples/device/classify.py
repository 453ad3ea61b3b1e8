"""Classify image files with an ONNX file that robust-compress exported.

    python3 classify.py model.int8.onnx photo.jpg [more.jpg ...]

Prints a line for each image: file, label, and softmax probability of the label, which is not
calibrated. Needs Python 3.10, numpy, onnxruntime, and Pillow to decode images; no PyTorch.

C channels, H and W pixels, K classes.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np
import onnxruntime  # noqa: TID253 (a script of its own)
from PIL import Image

MODES = {1: "L", 3: "RGB"}  # what Pillow calls 8-bit images of 1 and of 3 channels
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
Array = np.ndarray[Any, Any]


def open_model(path: str) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """The session and the names of its K classes."""
    here = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(path, providers=[p for p in PROVIDERS if p in here])
    card = session.get_modelmeta().custom_metadata_map
    if "robust_compress.class_names" not in card:
        raise ValueError(f"{path} names no classes: write it with `robust-compress export RUN`")
    print(f"{path} takes {card['robust_compress.input_contract']}", file=sys.stderr)
    return session, json.loads(card["robust_compress.class_names"])


def read_image(path: str, shape: tuple[int, int, int]) -> Array:
    """Pixels as uint8 [C, H, W], resized and cropped as for training."""
    channels, height, width = shape
    with Image.open(path) as opened:
        image: Image.Image = opened
        if image.mode != MODES[channels]:
            raise ValueError(
                f"{path} has pixels of mode {image.mode}, and the model takes {channels} channels, "
                f"mode {MODES[channels]}; convert the image first"
            )
        if image.size != (width, height):
            if height != width:
                raise ValueError(f"{path} must have {width}x{height} pixels, which is no square")
            image = resize_and_crop(image, width)
        pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side gets `size` pixels, then the centre of the other is kept."""
    width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def classify(session: onnxruntime.InferenceSession, pixels_CHW: Array) -> Array:
    """The softmax of the logits, [K], of one image."""
    (taken,) = session.get_inputs()
    images = pixels_CHW[None]
    if taken.type == "tensor(float)":  # otherwise the file takes bytes, and divides itself
        images = images.astype(np.float32) / 255
    if isinstance(taken.shape[0], int):  # a fixed batch: the same image in every place
        images = np.repeat(images, taken.shape[0], axis=0)
    logits_K: Array = session.run(None, {taken.name: np.ascontiguousarray(images)})[0][0]
    odds_K: Array = np.exp(logits_K - logits_K.max())
    odds_K /= odds_K.sum()
    return odds_K


def main() -> int:
    """Classify what the command line names; 0, or 4 if something cannot be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    wanted = parser.parse_args()
    try:
        session, names = open_model(wanted.model)
        channels, height, width = session.get_inputs()[0].shape[1:]
        if channels not in MODES or not isinstance(height, int) or not isinstance(width, int):
            raise ValueError(f"{wanted.model} takes no grey or RGB images of one size")
        for path in wanted.images:
            odds_K = classify(session, read_image(path, (channels, height, width)))
            print(f"{path}\t{names[odds_K.argmax()]}\t{odds_K.max():.3f}")
    except Exception as error:  # noqa: BLE001 (those of ONNX Runtime have no class in common)
        print(f"Error: {error}".partition("\n")[0], file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One row for each way in which input can be wrong: how it is made, the command, what is said.

Every command runs in a folder that holds a good `recipe.toml`, a good `plain.toml` without
teachers and a good `teacher.safetensors`; and, where the command names them, a good image folder
`images` and a good finished run `run`. The row spoils one of them.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from cli.main import main

PLAIN = """
name = "plain"
[threat]
epsilon_pixels = "1/255"
[data]
source = "digits"
validation_size = 50
[student]
architecture = "tiny"
[method]
name = "cross_entropy"
[training]
epochs = 1
batch_size = 64
[selection]
num_steps = 1
"""
TEACHERS = """
[[teachers]]
role = "clean"
source = "teacher.safetensors"
[[teachers]]
role = "robust"
source = "teacher.safetensors"
"""
INNER_ATTACK = """
[method.attack]
num_steps = 1
step_size_pixels = "1/255"
"""
RECIPE = (
    PLAIN.replace('"plain"', '"good"').replace('"cross_entropy"', '"bmtard"')
    + INNER_ATTACK
    + TEACHERS
)

CHECK = "recipe check recipe.toml"
DISTILL = "distill recipe.toml --threads 1 --no-verify --no-export"
TRAIN = "teacher train plain.toml --threads 1"
ON_IMAGES = f"{TRAIN} --data imagefolder:images --set data.validation_size=4"
RESUME = "distill run --resume --threads 1 --no-verify --no-export"
ROBUST = f"{DISTILL} --robust-teacher"
VERIFY = "verify run --threads 1 --samples 10"
FILE = "verify teacher.onnx --threads 1 --samples 10"
GATE = "gate run --policy gate.toml"
LIVE = f"{GATE} --live --threads 1"

USAGE, KNOWN_ERROR, MISMATCH = 2, 4, 5


class Bad(NamedTuple):
    """A row: what is spoilt in a good folder, the command, its exit code, what it says."""

    spoil: Callable[[], object]
    command: str
    code: int
    says: tuple[str, ...]
    """Fragments: the offending value, and what to do."""


def row(spoil, command, *says, code=KNOWN_ERROR):
    return Bad(spoil, command, code, says)


# How things are spoilt


def nothing():
    """The command itself is bad."""


def written(content, path="recipe.toml"):
    encoded = content if isinstance(content, bytes) else content.encode()
    return lambda: Path(path).write_bytes(encoded)


def edited(old, new, path="recipe.toml"):
    def edit():
        text = Path(path).read_text()
        assert old in text
        Path(path).write_text(text.replace(old, new, 1))

    return edit


def added(text):
    """To the end of the recipe, which is the table of the last teacher."""
    return written(RECIPE + text)


def removed(path):
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def emptied(folder):
    return lambda: (shutil.rmtree(folder), Path(folder).mkdir())


def truncated(path, num_bytes=60):
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:num_bytes])


def replaced_by_folder(path):
    return lambda: (Path(path).unlink(), Path(path).mkdir())


def replaced_by_loop(path):
    """A link to itself cannot be read by anybody, not even by root."""
    return lambda: (Path(path).unlink(), Path(path).symlink_to(Path(path).name))


def image(path, *, size=(8, 8), mode="RGB"):
    def draw():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 64).convert(mode).save(path)

    return draw


def both(one, other):
    return lambda: (one(), other())


def teacher_with(change, *, path="teacher.safetensors"):
    """The good teacher, its tensors changed, its description kept."""

    def write():
        with safe_open("teacher.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return write


def fill_with_nan(tensors):
    tensors["conv2.weight"].fill_(float("nan"))


def forget_everything(tensors):
    tensors["fc.weight"].zero_()


def onnx_file(*, num_classes=10, side=8, num_bytes=None):
    """A linear map from grey images to logits."""

    def write():
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        weight = numpy_helper.from_array(torch.zeros(side * side, num_classes).numpy(), "weight")
        graph = helper.make_graph(
            [
                helper.make_node("Flatten", ["images"], ["flat"]),
                helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
            ],
            "linear",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, side, side])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", num_classes])],
            [weight],
        )
        opset = helper.make_opsetid("", 20)
        content = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
        onnx.load_model_from_string(content)
        Path("teacher.onnx").write_bytes(content[:num_bytes])

    return write


class Payload:
    """Unpickling this makes a file."""

    def __reduce__(self):
        return open, ("owned", "w")


def malicious_pickle():
    torch.save({"conv1.weight": Payload()}, "teacher.pt")


def newest_checkpoint(name, num_bytes):
    def damage():
        folder = max(Path("run/checkpoints").iterdir())
        truncated(folder / name, num_bytes)()

    return damage


# The table

RECIPES = {
    "missing file": row(removed("recipe.toml"), CHECK, "recipe.toml does not exist", "start from"),
    "folder": row(replaced_by_folder("recipe.toml"), CHECK, "recipe.toml is a folder", "--resume"),
    "unreadable file": row(replaced_by_loop("recipe.toml"), CHECK, "recipe.toml cannot be read"),
    "binary": row(written(b"\x89PNG\r\n\xff"), CHECK, "recipe.toml is not a text", "is a TOML"),
    "UTF-16": row(written(RECIPE.encode("utf-16")), CHECK, "not a text file in UTF-8", "TOML"),
    "bad TOML": row(
        written('name = "good'), CHECK, "recipe.toml is not valid TOML", "Unterminated"
    ),
    "key twice": row(
        edited('name = "good"', 'name = "good"\nname = "other"'), CHECK, "not valid TOML", "line 3"
    ),
    "number of 5000 digits": row(added(f"sha256 = {'9' * 5000}"), CHECK, "not valid TOML"),
    "endless nesting": row(added(f"mean = {'[' * 3000}"), CHECK, "recipe.toml", "not valid TOML"),
    "JSON array": row(
        written("[1, 2]", "recipe.json"), "recipe check recipe.json", "holds a list", "tables of"
    ),
    "bad JSON": row(
        written("{", "recipe.json"), "recipe check recipe.json", "recipe.json is not valid JSON"
    ),
    "empty": row(written(""), CHECK, "4 problems", "name: is missing", "student: is missing"),
    "text for a number": row(
        edited("epochs = 1", 'epochs = "1"'),
        CHECK,
        "training.epochs: must be a whole number, without quotes (got '1')",
    ),
    "fraction of an epoch": row(
        edited("epochs = 1", "epochs = 1.5"), CHECK, "training.epochs: must be a", "(got 1.5)"
    ),
    "number for a text": row(
        edited('"tiny"', "18"), CHECK, 'student.architecture: must be a text in "quotes" (got 18)'
    ),
    "text for a truth": row(
        edited("[student]", 'horizontal_flip = "no"\n[student]'),
        CHECK,
        "data.horizontal_flip: must be true or false, without quotes (got 'no')",
    ),
    "text for a list": row(
        edited('"tiny"', '"tiny"\nmean = "0.5"'),
        CHECK,
        "student.mean: must be a list in [brackets] (got '0.5')",
    ),
    "number for a table": row(
        written("training = 3\n" + RECIPE.replace("[training]", "[selection.training]")),
        CHECK,
        "training: must be a table of settings (got 3)",
    ),
    "list for a fraction": row(
        edited('"1/255"', "[1, 255]"),
        CHECK,
        "threat.epsilon_pixels: [1, 255] is not a number",
        'write a fraction as "8/255"',
    ),
    "absurd number for a fraction": row(
        edited('"1/255"', f"1{'0' * 400}"), CHECK, "threat.epsilon_pixels: 10000"
    ),
    "unknown key": row(
        edited("epochs = 1", "epoch = 1"),
        CHECK,
        "training.epoch: unknown key (got 1)",
        "did you mean epochs?",
    ),
    "unknown table": row(
        written(RECIPE + "[trainning]\nepochs = 3"), CHECK, "trainning", "did you mean training?"
    ),
    "grey levels for epsilon": row(
        edited('"1/255"', "8"), CHECK, "threat.epsilon_pixels", "(got 8)", 'as "8/255"'
    ),
    "no epsilon": row(
        edited('"1/255"', "0"), CHECK, "threat.epsilon_pixels", "greater than 0 (got 0)"
    ),
    "epsilon that is no fraction": row(
        edited('"1/255"', '"8/x"'), CHECK, "epsilon_pixels: '8/x' is not a number", 'as "8/255"'
    ),
    "epsilon NaN": row(
        edited('"1/255"', "nan"), CHECK, "epsilon_pixels: must be a finite number (got nan)"
    ),
    "epsilon infinite": row(
        edited('"1/255"', "inf"), CHECK, "epsilon_pixels: must be a finite number (got inf)"
    ),
    "learning rate NaN": row(
        edited("epochs = 1", "epochs = 1\nlearning_rate = nan"),
        CHECK,
        "training.learning_rate: must be a finite number (got nan)",
    ),
    "learning rate negative": row(
        edited("epochs = 1", "epochs = 1\nlearning_rate = -0.1"),
        CHECK,
        "training.learning_rate: must be greater than 0 (got -0.1)",
    ),
    "no epochs": row(
        edited("epochs = 1", "epochs = 0"),
        CHECK,
        "training.epochs: must be greater than or equal to 1 (got 0)",
    ),
    "batches of one": row(
        edited("batch_size = 64", "batch_size = 1"),
        CHECK,
        "training.batch_size: must be greater than or equal to 2 (got 1)",
    ),
    "choice of attacks": row(
        written(RECIPE + '[verification]\nattacks = ["fgsm"]'), CHECK, "verification: unknown key"
    ),
    "unknown norm": row(
        edited("[threat]", '[threat]\nnorm = "l2"'), CHECK, "threat.norm", "'linf'", "(got 'l2')"
    ),
    "unknown method": row(
        edited('"bmtard"', '"bmtrad"'), CHECK, "method: 'bmtrad' is not one of", "'bmtard'"
    ),
    "method without a name": row(
        edited('name = "bmtard"', ""), CHECK, "method: needs the key 'name'"
    ),
    "unknown role": row(
        edited('"robust"', '"tough"'), CHECK, "teachers.1.role", "'robust'", "(got 'tough')"
    ),
    "no teachers": row(
        edited(TEACHERS, ""), CHECK, "1 clean teacher, the recipe has 0", "give --clean-teacher"
    ),
    "one teacher missing": row(
        edited('role = "clean"', 'role = "robust"'), CHECK, "1 clean teacher, the recipe has 0"
    ),
    "too many teachers": row(
        written(RECIPE.replace('"bmtard"', '"ciard"') + TEACHERS),
        CHECK,
        "takes 1 clean teacher, the recipe has 2",
        "remove",
    ),
    "fewer teacher options than teachers": row(
        added(TEACHERS),
        f"{DISTILL} --clean-teacher x.onnx",
        "the recipe has 2 clean teachers and --clean-teacher names 1",
        "give the option 2 times",
        code=USAGE,
    ),
    "teachers without a use": row(
        edited('"bmtard"', '"pgd_at"'), CHECK, "'pgd_at' takes 0 clean teacher", "remove"
    ),
    "milestones that fall": row(
        edited(
            "[selection]",
            "schedule = { kind = 'milestones', milestones = [0.9, 0.5] }\n[selection]",
        ),
        CHECK,
        "training.schedule.milestones must rise: [0.9, 0.5]",
    ),
    "milestone in epochs": row(
        edited(
            "[selection]", "schedule = { kind = 'milestones', milestones = [215] }\n[selection]"
        ),
        CHECK,
        "training.schedule.milestones.0: must be less than or equal to 1 (got 215)",
    ),
    "weak inner attack": row(
        edited('size_pixels = "1/255"', 'size_pixels = "0.1/255"'),
        CHECK,
        "method.attack: 1 steps of 0.0003922 reach only 0.0003922 of epsilon 0.003922",
        "Raise num_steps",
    ),
    "name with a space": row(edited('"good"', '"my run"'), CHECK, "name:", "'my run'", "letters"),
    "name with a path": row(edited('"good"', '"../../x"'), CHECK, "'../../x'", "letters"),
    "name in unicode": row(edited('"good"', '"größe"'), CHECK, "name:", "'größe'", "letters"),
    "name of 300 letters": row(edited("good", "g" * 300), CHECK, "name:", "at most"),
}

OVERRIDES = {
    "set without a value": row(
        nothing, f"{CHECK} --set training.epochs", "'training.epochs' is not KEY=VALUE", code=USAGE
    ),
    "set without a key": row(
        nothing, f"{CHECK} --set =3", "'=3' is not KEY=VALUE", "training.epochs=3", code=USAGE
    ),
    "set with a hole in the key": row(
        nothing, f"{CHECK} --set training..epochs=3", "is not KEY=VALUE", code=USAGE
    ),
    "set beyond the list": row(
        nothing, f"{CHECK} --set teachers.7.source=x", "no '7' in a list of 2", code=USAGE
    ),
    "set with a name for a place": row(
        nothing, f"{CHECK} --set teachers.robust.source=x", "no 'robust' in a list", code=USAGE
    ),
    "set with a superscript for a place": row(
        nothing, f"{CHECK} --set teachers.²=x", "no '²' in a list of 2", code=USAGE
    ),
    "set below a number": row(
        nothing, f"{CHECK} --set training.epochs.x=3", "training.epochs holds 1", code=USAGE
    ),
    "set an unknown key": row(
        nothing, f"{CHECK} --set training.epoch=3", "training.epoch: unknown", "mean epochs?"
    ),
    "set a text for a number": row(
        nothing, f"{CHECK} --set training.epochs=three", "must be a whole number", "'three'"
    ),
    "set a bad value": row(
        nothing, f"{CHECK} --set training.momentum=1.0", "training.momentum: must be less than 1"
    ),
}

OPTIONS = {
    "unknown command": row(nothing, "distil", "No such command 'distil'", "--help", code=USAGE),
    "unknown option": row(
        nothing, f"{CHECK} --epochs 3", "No such option: --epochs", "--help", code=USAGE
    ),
    "no recipe": row(nothing, "recipe check", "RECIPE.toml", "--help", code=USAGE),
    "two recipes": row(nothing, f"{CHECK} more.toml", "more.toml", "--help", code=USAGE),
    "no threads": row(nothing, f"{DISTILL} --threads 0", "'--threads'", "--help", code=USAGE),
    "threads in words": row(nothing, f"{TRAIN} --threads two", "'--threads'", "--help", code=USAGE),
    "checkpoint interval NaN": row(
        nothing, f"{TRAIN} --checkpoint-minutes nan", "--checkpoint-minutes", code=USAGE
    ),
    "checkpoint interval infinite": row(
        nothing, f"{TRAIN} --checkpoint-minutes inf", "--checkpoint-minutes inf", code=USAGE
    ),
    "no recipe and not enough options": row(
        nothing, "distill --data digits", "--clean-teacher", "must be given", code=USAGE
    ),
    "resume without a run": row(nothing, "distill --resume", "name the run", code=USAGE),
    "unknown role": row(
        nothing, f"{TRAIN} --role tough", "--role 'tough' is not clean or robust", code=USAGE
    ),
    "role against the recipe": row(
        nothing, f"{TRAIN} --role robust", "'cross_entropy' does not train", "use 'pgd_at'"
    ),
    "teacher from a recipe for students": row(
        nothing, "teacher train recipe.toml", "'bmtard' does not train", "use 'cross_entropy'"
    ),
    "unknown format": row(
        nothing, "export run --format tflite", "--format 'tflite'", "use onnx", code=USAGE
    ),
    "unknown precision": row(
        nothing, "export run --precision fp8", "--precision 'fp8'", "fp32, fp16", code=USAGE
    ),
    "opset of the future": row(
        nothing, "export run --opset 99", "--opset 99 is outside 18 to 23", "leave it", code=USAGE
    ),
    "calibration for 8-bit floats": row(
        nothing,
        "export run --int8 --calibration-method distribution",
        "'distribution' is refused: it is made for 8-bit floats",
        "use minmax, entropy, percentile",
        code=USAGE,
    ),
    "dynamic calibration": row(
        nothing,
        "export run --int8 --calibration-method dynamic",
        "'dynamic' is refused: TensorRT has no dynamic quantisation",
        "use minmax",
        code=USAGE,
    ),
    "unknown calibration": row(
        nothing,
        "export run --int8 --calibration-method magic",
        "'magic' is refused: it is not known",
        code=USAGE,
    ),
    "unknown calibration images": row(
        nothing,
        "export run --int8 --calibration-images test",
        "--calibration-images 'test'",
        "use auto, clean, adversarial, mixed",
        code=USAGE,
    ),
    "static batch of none": row(nothing, "export run --static 0", "'--static'", code=USAGE),
    "batch and static": row(
        nothing, "export run --batch 1:2:4 --static 2", "contradict each other", code=USAGE
    ),
    "drop above all": row(
        nothing, "export run --max-robust-drop 2", "'--max-robust-drop'", code=USAGE
    ),
    "too few images to compare": row(nothing, "export run --samples 99", "'--samples'", code=USAGE),
    "nonsense dtype": row(
        nothing, f"{TRAIN} --dtype int3", "--dtype 'int3'", "float32, bfloat16", code=USAGE
    ),
    "nonsense device": row(
        nothing, f"{TRAIN} --device toaster", "'toaster' is not known", "use auto, cpu"
    ),
    "device that torch knows and we do not": row(
        nothing, f"{TRAIN} --device meta", "'meta' is not known", "use auto, cpu"
    ),
    "device without a number": row(
        nothing, f"{TRAIN} --device cuda:x", "'cuda:x' is not known", "use auto, cpu"
    ),
    "teacher option for a list that is none": row(
        written("teachers = 3\n" + RECIPE.replace(TEACHERS, "")),
        f"{DISTILL} --clean-teacher x.onnx",
        "teachers in the recipe is 3",
    ),
}

DATA = {
    "unknown source": row(
        nothing, f"{TRAIN} --data mnist", "data.source = 'mnist' is not known", "imagefolder:FOLDER"
    ),
    "source without its folder": row(
        nothing, f"{TRAIN} --data cifar10", "'cifar10'", "must be written 'cifar10:FOLDER'"
    ),
    "root that is missing": row(
        nothing, f"{TRAIN} --data imagefolder:nowhere", "there is no folder nowhere"
    ),
    "root of an unknown user": row(
        nothing, f"{TRAIN} --data imagefolder:~no-such-user/x", "~no-such-user/x"
    ),
    "no download": row(
        nothing, f"{TRAIN} --data cifar10:.", "CIFAR10 in .: Dataset not found", "--download"
    ),
    "no train folder": row(
        removed("images/train"), ON_IMAGES, "images has no folder train", "train/<class>/"
    ),
    "no test folder": row(
        removed("images/test"), ON_IMAGES, "images has no folder test or val", "test/<class>/"
    ),
    "no classes": row(
        emptied("images/train"), ON_IMAGES, "train has no class folders", "train/<class>/"
    ),
    "empty class": row(emptied("images/train/dog"), ON_IMAGES, "without images: dog", "remove"),
    "one class": row(
        both(removed("images/train/dog"), removed("images/test/dog")),
        ON_IMAGES,
        "only one class, 'cat'",
        "needs two or more",
    ),
    "classes differ": row(
        image("images/train/emu/0.png"), ON_IMAGES, "only in train: emu", "same class folders"
    ),
    "corrupt JPEG": row(
        both(image("images/train/cat/x.jpg"), truncated("images/train/cat/x.jpg", 200)),
        ON_IMAGES,
        "train/cat/x.jpg: is",
        "repair or remove",
    ),
    "truncated PNG": row(
        truncated("images/train/dog/1.png"), ON_IMAGES, "train/dog/1.png: is damaged", "repair or"
    ),
    "text among images": row(
        written("hello", "images/train/dog/notes.txt"), ON_IMAGES, "dog/notes.txt: is not an image"
    ),
    "unreadable image": row(
        replaced_by_loop("images/train/dog/1.png"), ON_IMAGES, "train/dog/1.png", "repair or"
    ),
    "mixed sizes": row(
        image("images/train/dog/1.png", size=(9, 7)),
        ON_IMAGES,
        "train/dog/1.png: 9x7 pixels",
        "set data.image_size",
    ),
    "mixed channels": row(
        image("images/train/dog/1.png", mode="L"), ON_IMAGES, "1 channels", "set data.num_channels"
    ),
    "fewer images than a batch": row(
        nothing, ON_IMAGES, "12 training images", "= 64", "set a smaller training.batch_size"
    ),
    "last batch of one": row(
        nothing,
        f"{ON_IMAGES} --set training.batch_size=11",
        "12 training images in batches of 11",
        "set training.batch_size = 12",
    ),
    "validation part too small": row(
        nothing,
        f"{TRAIN} --set data.validation_size=9",
        "data.validation_size = 9",
        "set it to 10 or more",
    ),
    "validation part too large": row(
        nothing,
        f"{TRAIN} --set data.validation_size=5000",
        "data.validation_size = 5000",
        "or less",
    ),
    "absurd image size": row(
        nothing,
        f"{CHECK} --set data.image_size=1000000",
        "data.image_size: must be less than or equal to",
        "(got 1000000)",
    ),
    "two manners to crop": row(
        nothing,
        f"{CHECK} --set data.min_crop_area=0.25",
        "data.min_crop_area = 0.25 crops in place of padding",
        "set data.crop_padding_pixels to 0 (it is 4)",
    ),
    "absurd padding": row(
        nothing,
        f"{CHECK} --set data.crop_padding_pixels=1000000",
        "data.crop_padding_pixels: must be less than or equal to",
        "(got 1000000)",
    ),
}

STUDENTS = {
    "unknown architecture": row(
        nothing,
        f"{TRAIN} --set student.architecture=resnet81",
        "architecture 'resnet81' is not known",
        "did you mean resnet18?",
    ),
    "unknown architecture of torchvision": row(
        nothing,
        f"{TRAIN} --set student.architecture=torchvision:resnet81",
        "no classifier 'resnet81'",
        "did you mean",
    ),
    "image too small": row(
        nothing, f"{TRAIN} --set data.image_size=4", "tiny: images of 1x4x4", "at least 8x8"
    ),
    "image too small for torchvision": row(
        nothing,
        f"{TRAIN} --set student.architecture=torchvision:alexnet --set data.num_channels=3",
        "cannot take images of 3x8x8",
        "set data.image_size",
    ),
    "grey images for torchvision": row(
        nothing,
        f"{TRAIN} --set student.architecture=torchvision:resnet18",
        "3 channels, not 1",
        "set data.num_channels = 3",
    ),
    "width of nothing": row(nothing, f"{TRAIN} --set student.width=0.0", "student.width", "got 0"),
    "absurd width": row(
        nothing,
        f"{CHECK} --set student.width=1e9",
        "student.width: must be less than or equal to",
        "(got 1000000000.0)",
    ),
    "mean without std": row(
        nothing, f"{TRAIN} --set student.mean=[0.5]", "give mean and std together", "std=None"
    ),
    "mean of other channels": row(
        nothing,
        f"{TRAIN} --set student.mean=[0.5,0.5] --set student.std=[1.0,1.0]",
        "mean has 2 values for images of 1 channels",
    ),
}

TEACHER_FILES = {
    "missing teacher": row(nothing, f"{ROBUST} tiny:none.pt", "none.pt does not exist", "check"),
    "missing file of its own": row(
        nothing, f"{ROBUST} none.safetensors", "none.safetensors does not exist", "check the path"
    ),
    "teacher name of 300 letters": row(nothing, f"{ROBUST} {'t' * 300}", "ttt", "check"),
    "folder that is no run": row(
        lambda: Path("folder").mkdir(), f"{ROBUST} folder", "folder", "does not exist", "check"
    ),
    "teacher of an unfinished run": row(
        removed("run/model.safetensors"), f"{ROBUST} run", "run/model.safetensors does not exist"
    ),
    "unknown architecture": row(
        nothing, f"{ROBUST} resnet81:teacher.safetensors", "'resnet81'", "did you mean resnet18?"
    ),
    "empty file": row(
        written("", "x.safetensors"), f"{ROBUST} tiny:x.safetensors", "is empty", "copy"
    ),
    "unknown suffix": row(
        written("x", "x.h5"), f"{ROBUST} tiny:x.h5", "'.h5' is not a kind of weights: .safetensors"
    ),
    "truncated safetensors": row(
        both(teacher_with(dict, path="x.safetensors"), truncated("x.safetensors", 3000)),
        f"{ROBUST} tiny:x.safetensors",
        "x.safetensors is damaged",
        "copy or download it again",
    ),
    "truncated checkpoint": row(
        both(lambda: torch.save({"a": torch.ones(9)}, "x.pt"), truncated("x.pt", 300)),
        f"{ROBUST} tiny:x.pt",
        "x.pt is damaged",
        "copy or download it again",
    ),
    "no description": row(
        lambda: save_file({"a": torch.ones(1)}, "x.safetensors"),
        f"{ROBUST} x.safetensors",
        "does not say which network it holds",
        "write ARCHITECTURE:FILE",
    ),
    "wrong architecture": row(
        nothing,
        f"{ROBUST} resnet18:teacher.safetensors",
        "teacher.safetensors: these are not weights of resnet18",
        "name the right architecture",
    ),
    "other tensors": row(
        teacher_with(lambda tensors: tensors.pop("bn2.weight"), path="x.safetensors"),
        f"{ROBUST} tiny:x.safetensors",
        "has no 'bn2.weight'",
        "name the architecture",
    ),
    "wrong class count": row(
        nothing,
        "distill recipe.toml --data imagefolder:images --set data.validation_size=4 "
        "--set data.num_channels=1 --set training.batch_size=6 --threads 1",
        "teacher.safetensors: it has 10 classes, the data has 2",
        "use a teacher trained on the same classes",
    ),
    "other image size": row(
        nothing,
        f"{DISTILL} --set data.image_size=16",
        "made for images of 1x8x8",
        "1x16x16",
        "resize_to = 8",
    ),
    "malicious pickle": row(
        malicious_pickle,
        f"{ROBUST} tiny:teacher.pt",
        "teacher.pt wants to run code",
        "so it was not loaded",
        "safetensors.torch.save_file",
    ),
    "archive that can run code": row(
        written("x", "teacher.pt2"),
        f"{ROBUST} tiny:teacher.pt2",
        ".pt2",
        "export the model to ONNX",
    ),
    "not a number in the weights": row(
        teacher_with(fill_with_nan, path="x.safetensors"),
        f"{ROBUST} tiny:x.safetensors",
        "x.safetensors: 'conv2.weight' holds NaN",
        "use an earlier checkpoint",
    ),
    "other hash": row(
        added(f'sha256 = "{"0" * 64}"'),
        DISTILL,
        "teacher.safetensors has SHA-256",
        "0000",
        "give the file that",
        code=MISMATCH,
    ),
    "truncated ONNX": row(
        onnx_file(num_bytes=200), f"{ROBUST} teacher.onnx", "teacher.onnx is damaged", "again"
    ),
    "architecture before an ONNX file": row(
        onnx_file(), f"{ROBUST} tiny:teacher.onnx", "'.onnx'", "without an architecture"
    ),
    "ONNX of other classes": row(
        onnx_file(num_classes=7), f"{ROBUST} teacher.onnx", "7 classes, the data has 10", "use a"
    ),
    "ONNX of another size": row(
        onnx_file(side=32), f"{ROBUST} teacher.onnx", "takes images of 1x32x32", "resize_to"
    ),
    "at chance level": row(
        teacher_with(forget_everything),
        DISTILL,
        "the clean teacher teacher.safetensors is no better than chance",
        "--accept-teachers",
    ),
    "without robustness": row(
        nothing,
        f"{DISTILL} --set threat.epsilon_pixels=128/255 --set method.attack.num_steps=200",
        "the robust teacher teacher.safetensors is not robust",
        "--accept-teachers",
    ),
}

RUNS = {
    "occupied": row(
        nothing, f"{DISTILL} --out run", "run already exists", "--resume", "another folder"
    ),
    "out is a file": row(
        nothing, f"{DISTILL} --out plain.toml", "plain.toml already exists", "another folder"
    ),
    "out below a file": row(
        nothing, f"{DISTILL} --out plain.toml/run", "plain.toml/run cannot be made", "--out"
    ),
    "out name of 300 letters": row(nothing, f"{DISTILL} --out {'o' * 300}", "ooo", "--out"),
    "run without resume": row(nothing, "distill run", "run is a folder", "--resume"),
    "resume of nothing": row(nothing, "distill nowhere --resume", "nowhere does not exist"),
    "resume of a folder": row(
        lambda: Path("folder").mkdir(), "distill folder --resume", "folder is not a run", "Make one"
    ),
    "resume with a setting": row(
        nothing, f"{RESUME} --set training.epochs=9", "leave out --set", code=USAGE
    ),
    "resume with another student": row(
        nothing, f"{RESUME} --student resnet18", "own recipe", "leave out --student", code=USAGE
    ),
    "resume as a teacher": row(
        nothing, "teacher train run --resume", "method.name = 'bmtard'", "use 'cross_entropy'"
    ),
    "resume with another recipe": row(
        edited("epochs = 1", "epochs = 2"),
        f"{DISTILL} --out run --resume",
        "belongs to another recipe",
        "resume with the run's own recipe, run/recipe.resolved.json",
    ),
    "resume after the recipe was changed": row(
        edited('"epochs": 1', '"epochs": 2', "run/recipe.resolved.json"),
        RESUME,
        "belongs to another recipe",
        "resume with the run's own recipe",
    ),
    "resume of a damaged recipe": row(
        truncated("run/recipe.resolved.json"), RESUME, "recipe.resolved.json is not valid JSON"
    ),
    "damaged tensors in a checkpoint": row(
        newest_checkpoint("network.safetensors", 900),
        RESUME,
        "is damaged: network.safetensors has another SHA-256",
        "Remove that folder",
    ),
    "damaged state in a checkpoint": row(
        newest_checkpoint("train_state.json", 100),
        RESUME,
        "is damaged: train_state.json cannot be read",
        "Remove that folder",
    ),
    "export of a folder": row(
        lambda: Path("folder").mkdir(), "export folder", "folder is not a run", "Make one"
    ),
    "export of an unfinished run": row(
        removed("run/model.safetensors"), "export run", "training has not ended", "--resume"
    ),
    "export of a damaged model": row(
        truncated("run/model.safetensors", 3000),
        "export run",
        "model.safetensors has SHA-256",
        "--resume",
        code=MISMATCH,
    ),
    "export with empty facts": row(
        written("{}", "run/run.json"), "export run", "run.json", "again"
    ),
}

TARGETS = {
    "nothing": row(nothing, "verify nowhere", "nowhere is not a run", "Make one"),
    "folder that is no run": row(
        lambda: Path("folder").mkdir(), "verify folder", "folder is not a run", "Make one"
    ),
    "folder named as a file": row(
        lambda: Path("folder.onnx").mkdir(), "verify folder.onnx", "is not a run", "Make one"
    ),
    "unfinished run": row(
        removed("run/model.safetensors"), "verify run", "training has not ended", "--resume"
    ),
    "damaged model": row(
        truncated("run/model.safetensors", 3000),
        "verify run",
        "model.safetensors has SHA-256",
        "--resume",
        code=MISMATCH,
    ),
    "without facts": row(
        removed("run/run.json"), "verify run", "run/run.json is missing from the run"
    ),
    "with empty facts": row(written("{}", "run/run.json"), "verify run", "run.json", "again"),
    "without its environment": row(
        removed("run/environment.json"), VERIFY, "environment.json is missing", "copy it back"
    ),
    "other images": row(
        nothing,
        "verify run --threads 1 --data imagefolder:images",
        "the test images have shape [3, 8, 8] and the classes ['cat', 'dog']",
        "give the data of the run with --data",
    ),
    "images that are not there": row(
        nothing, f"{VERIFY} --data imagefolder:nowhere", "there is no folder nowhere"
    ),
    "weights without data": row(
        nothing, "verify teacher.safetensors", "does not say on which images", "--data", code=USAGE
    ),
    "weights that are not there": row(
        nothing, "verify tiny:none.pt --data digits", "none.pt does not exist", "check"
    ),
    "weights of another architecture": row(
        nothing,
        "verify resnet18:teacher.safetensors --data digits",
        "these are not weights of resnet18",
        "name the right architecture",
    ),
    "weights for other classes": row(
        nothing,
        "verify teacher.safetensors --data imagefolder:images",
        "it has 10 classes, the data has 2",
    ),
    "malicious pickle": row(
        malicious_pickle, "verify tiny:teacher.pt --data digits", "wants to run code"
    ),
    "source of a run": row(
        nothing,
        f"{VERIFY} --source run",
        "--source is for exported files",
        "run is not one",
        code=USAGE,
    ),
    "source of weights": row(
        nothing,
        "verify teacher.safetensors --source run --data digits",
        "--source is for exported files",
        code=USAGE,
    ),
    "file that is not there": row(nothing, FILE, "teacher.onnx does not exist", "check the path"),
    "truncated file": row(onnx_file(num_bytes=200), f"{FILE} --source run", "is damaged", "again"),
    "empty file": row(written("", "teacher.onnx"), FILE, "teacher.onnx is empty", "again"),
    "file without data": row(
        onnx_file(), FILE, "does not say on which images", "--data imagefolder:PATH", code=USAGE
    ),
    "file without a radius": row(
        onnx_file(),
        f"{FILE} --data digits",
        "does not say within which radius",
        "--epsilon, such as 8/255",
        code=USAGE,
    ),
    "file of other classes": row(
        onnx_file(num_classes=7), f"{FILE} --source run", "has 7 classes", "have 10", "--data"
    ),
    "file of another size": row(
        onnx_file(side=32), f"{FILE} --source run", "takes images of 1x32x32", "not 1x8x8"
    ),
    "source that is no run": row(
        both(onnx_file(), lambda: Path("folder").mkdir()),
        f"{FILE} --source folder",
        "folder is not a run",
    ),
    "source that is not there": row(
        onnx_file(), f"{FILE} --source none.pt --data digits", "none.pt does not exist", "check"
    ),
    "source without a gradient": row(
        onnx_file(),
        f"{FILE} --source teacher.onnx --data digits",
        "has no gradient either",
        "give the run it came from",
        code=USAGE,
    ),
}

VERIFICATIONS = {
    "unknown attack": row(
        nothing, f"{VERIFY} --attacks nonsense", "no attack nonsense", "papers", code=USAGE
    ),
    "no attack": row(
        nothing, f"{VERIFY} --attacks ,", "(none named)", "use papers, autoattack", code=USAGE
    ),
    "unknown mode": row(nothing, f"{VERIFY} --mode x", "--mode 'x'", "fast, compat", code=USAGE),
    "unknown norm": row(nothing, f"{VERIFY} --norm l1", "--norm 'l1'", "linf, l2", code=USAGE),
    "norm without a radius": row(
        nothing, f"{VERIFY} --norm l2", "--norm l2 needs a radius", "give --epsilon", code=USAGE
    ),
    "grey levels for a radius": row(
        nothing, f"{VERIFY} --epsilon 8", "--epsilon 8 is outside", '"8/255"', code=USAGE
    ),
    "radius of nothing": row(
        nothing, f"{VERIFY} --epsilon 0", "--epsilon 0 is outside (0, 1]", code=USAGE
    ),
    "radius below nothing": row(
        nothing, f"{VERIFY} --epsilon=-1/255", "--epsilon -0.00392", "is outside", code=USAGE
    ),
    "radius that is no number": row(
        nothing, f"{VERIFY} --epsilon x", "'x' is not a number", 'as "8/255"', code=USAGE
    ),
    "radius NaN": row(nothing, f"{VERIFY} --epsilon nan", "--epsilon nan is outside", code=USAGE),
    "radius divided by nothing": row(
        nothing, f"{VERIFY} --epsilon 8/0", "'8/0' is not a number", code=USAGE
    ),
    "radius larger than any image": row(
        nothing, f"{VERIFY} --norm l2 --epsilon 9", "--epsilon 9 is outside (0, 8]", code=USAGE
    ),
    "no samples": row(nothing, "verify run --samples 0", "'--samples'", "--help", code=USAGE),
    "samples in words": row(
        nothing, "verify run --samples all", "'--samples'", "--help", code=USAGE
    ),
    "too many samples": row(
        nothing, "verify run --samples 9999 --threads 1", "9999", "ask for 1 to 497"
    ),
    "no time": row(nothing, f"{VERIFY} --max-seconds 0", "'--max-seconds'", code=USAGE),
    "time NaN": row(nothing, f"{VERIFY} --max-seconds nan", "--max-seconds", code=USAGE),
    "no batch": row(nothing, f"{VERIFY} --batch-size 0", "'--batch-size'", code=USAGE),
    "seed below nothing": row(nothing, f"{VERIFY} --seed=-1", "'--seed'", "--help", code=USAGE),
    "nonsense dtype": row(nothing, f"{VERIFY} --dtype int3", "--dtype 'int3'", code=USAGE),
    "nonsense device": row(nothing, f"{VERIFY} --device toaster", "'toaster'", "use auto, cpu"),
    "out is a file": row(nothing, f"{VERIFY} --attacks fgsm --out plain.toml", "plain.toml"),
    "two targets": row(nothing, f"{VERIFY} more", "more", "--help", code=USAGE),
}

POLICY = "schema = 1\n[clean]\nmin_accuracy = 0.5\n"
THREAT = "[threat]\nnorm = 'linf'\nepsilon = '8/255'\n"
policy = written(POLICY, "gate.toml")

GATES = {
    "no policy": row(nothing, "gate run", "--policy FILE is missing", "gate.toml", code=USAGE),
    "missing policy": row(nothing, GATE, "gate.toml does not exist", "start from"),
    "no target": row(policy, "gate --policy gate.toml", "which REPORT, RUN or FILE?", code=USAGE),
    "no report": row(policy, GATE, "run/report.json does not exist", "make it with"),
    "live without a run": row(
        policy, "gate nowhere --policy gate.toml --live", "nowhere is not a run", "Make one"
    ),
    "live of an unfinished run": row(
        both(policy, removed("run/model.safetensors")), LIVE, "training has not ended"
    ),
    "live with other images": row(
        policy, f"{LIVE} --data imagefolder:images", "give the data of the run with --data"
    ),
    "live with no samples": row(policy, f"{LIVE} --samples 0", "'--samples'", code=USAGE),
    "live with no time": row(policy, f"{LIVE} --max-seconds 0", "'--max-sec", code=USAGE),
    "live with an unknown attack": row(
        written(f"{POLICY}{THREAT}[attacks.pgd_20]\nmin_accuracy = 0.5", "gate.toml"),
        LIVE,
        "there is no attack pgd_20",
        code=USAGE,
    ),
    "live with a group of attacks": row(
        written(f"{POLICY}{THREAT}[attacks.papers]\nmin_accuracy = 0.5", "gate.toml"),
        LIVE,
        "attacks.papers: gate --live cannot show the accuracy under it alone",
        "limit one of these",
    ),
    "live on other images than the policy names": row(
        written(f"{POLICY}[data]\ncontent_sha256 = '{'0' * 64}'", "gate.toml"),
        LIVE,
        f"the policy asks for {'0' * 64}",
        "change the policy, --data or --baseline",
    ),
    "rule about attacks without a threat": row(
        written(f"{POLICY}[attacks.fgsm]\nmin_accuracy = 0.5", "gate.toml"),
        LIVE,
        'add [threat] with norm = "linf"',
    ),
    "live with a missing baseline": row(
        policy, f"{LIVE} --baseline before.json", "before.json does not exist"
    ),
    "live on a nonsense device": row(policy, f"{LIVE} --device toaster", "'toaster'"),
    "samples without live": row(
        policy, f"{GATE} --samples 5", "--samples would have no effect", "--live", code=USAGE
    ),
    "plan with a file": row(
        policy, f"{GATE} --plan --out g.json", "--out would have no effect on --plan", code=USAGE
    ),
    "unknown verdict": row(
        policy, f"{GATE} --inconclusive maybe", "--inconclusive 'maybe'", "warn", code=USAGE
    ),
    "assumption above all": row(policy, f"{GATE} --plan --assume 2", "'--assume'", code=USAGE),
}

TABLES = {
    "recipe": RECIPES,
    "set": OVERRIDES,
    "options": OPTIONS,
    "data": DATA,
    "student": STUDENTS,
    "teacher": TEACHER_FILES,
    "run": RUNS,
    "target": TARGETS,
    "verification": VERIFICATIONS,
    "gate": GATES,
}
ROWS = {f"{table}: {name}": bad for table, rows in TABLES.items() for name, bad in rows.items()}


# The tests


def call(command):
    """The exit code of a command line that runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-compress", *command.split()])
        try:
            main()
        except SystemExit as end:
            return end.code or 0
    return 0


def words(text):
    """On one line, without the boxes around usage errors."""
    return " ".join(re.sub("[─-╿]", " ", text).split())


def tree(folder):
    """Everything below a folder: the bytes of files, the targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.relative_to(folder)] = os.readlink(path)
        else:
            found[path.relative_to(folder)] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture(scope="module")
def materials(tmp_path_factory, one_thread, session_cache):
    """Everything good, made once."""
    folder = tmp_path_factory.mktemp("materials")
    with contextlib.chdir(folder):
        Path("recipe.toml").write_text(RECIPE)
        Path("plain.toml").write_text(PLAIN)
        for part, num_images in (("train", 8), ("test", 1)):
            for name in ("cat", "dog"):
                for number in range(num_images):
                    image(f"images/{part}/{name}/{number}.png")()
        assert call(f"{TRAIN} --out trained --set training.epochs=4") == 0
        Path("trained/model.safetensors").rename("teacher.safetensors")
        assert call(f"{DISTILL} --out run") == 0
    return folder


@pytest.fixture
def folder(materials, tmp_path, monkeypatch):
    """The working folder of a command, with all small files; `bring` adds a larger one."""
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.toml", "plain.toml", "teacher.safetensors"):
        shutil.copy(materials / name, name)
    return tmp_path


def bring(materials, command):
    for name in ("images", "run"):
        if name in re.split(r"[ :]", command):
            shutil.copytree(materials / name, name)


@pytest.mark.parametrize("bad", ROWS.values(), ids=ROWS)
def test_bad_input(materials, folder, bad, capsys):
    bring(materials, bad.command)
    bad.spoil()
    before = tree(folder)
    capsys.readouterr()

    code = call(bad.command)

    out, err = capsys.readouterr()
    message = words(err)
    assert "Traceback" not in out + err, message[-300:]
    assert code == bad.code, message
    assert [part for part in bad.says if part not in message] == [], message
    assert len(re.findall("Error:|Usage:", message)) == 1, message
    assert tree(folder) == before


JSON_ROWS = {name: bad for name, bad in ROWS.items() if bad.command.startswith("recipe check")}


@pytest.mark.parametrize("bad", JSON_ROWS.values(), ids=JSON_ROWS)
def test_bad_input_as_json(materials, folder, bad, capsys):
    bad.spoil()
    code = call(f"{bad.command} --json")
    out, err = capsys.readouterr()
    error = json.loads(out)
    assert err == ""
    assert code == error["exit_code"] == bad.code
    message = words(error["message"])
    assert [part for part in bad.says if part not in message] == [], message


def test_bad_input_without_cuda(folder, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = tree(folder)
    assert call(f"{TRAIN} --device cuda") == KNOWN_ERROR
    message = words(capsys.readouterr().err)
    assert "device 'cuda' was asked for" in message
    assert "use --device cpu" in message
    assert tree(folder) == before


def test_bad_input_run_of_another_process(materials, folder, capsys):
    bring(materials, RESUME)
    before = tree(folder)
    with open("run/.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert call(RESUME) == KNOWN_ERROR
    message = words(capsys.readouterr().err)
    assert "another process is training or exporting in run" in message
    assert "wait for it or stop it" in message
    assert tree(folder) == before


def test_bad_input_malicious_pickle_is_malicious(folder):
    """The row above would notice, as unpickling makes a file."""
    malicious_pickle()
    torch.load("teacher.pt", weights_only=False)["conv1.weight"].close()
    assert Path("owned").exists()

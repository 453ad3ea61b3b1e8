"""A kit stands alone, without torch and us; it has the same bytes each time; changes are named."""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from importlib import resources, util
from pathlib import Path

import numpy as np
import onnx  # noqa: TID253 (makes the files)
import pytest

from compressor.device import build_engine, replay
from compressor.device.build_options import BuildOptions
from compressor.device.kit_files import DeviceError, MismatchError, read_kit, sha256_of
from compressor.errors import ArtefactMismatchError
from exporters.engine.build_kit import KitModel
from exporters.to_onnx import ExportError
from tests.unit.device_models import (
    make_golden,
    make_kit,
    make_model,
    make_models,
    needs_tensorrt_rtx,
)

MODULES = sorted(path for path in Path(replay.__file__).parent.glob("*.py"))
FOREIGN = {"numpy", "onnxruntime"}
"""All that the code of a kit may import besides the standard library; TensorRT goes by name."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def golden(paths):
    return make_golden(paths)


@pytest.fixture(scope="module")
def original_kit(paths, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits") / "kit"
    make_kit(folder, paths, golden=golden, batch=(1, 4, 8))
    return folder


@pytest.fixture
def kit(original_kit, tmp_path):
    return shutil.copytree(original_kit, tmp_path / "kit")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python that finds numpy, ONNX Runtime and TensorRT-RTX, and no other package."""
    folder = tmp_path_factory.mktemp("packages")
    wanted = ("numpy", "onnxruntime", "tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs")
    for name in wanted:
        spec = util.find_spec(name)
        if spec is not None:
            package = Path(spec.origin).parent
            (folder / name).symlink_to(package)
            libraries = package.with_name(f"{name}.libs")
            if libraries.is_dir():
                (folder / libraries.name).symlink_to(libraries)

    def run(*arguments, cwd, packages=folder):
        return subprocess.run(
            [sys.executable, "-S", *arguments],  # no site-packages
            cwd=cwd,
            env={"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_the_bare_python_has_neither_torch_nor_us(bare_python, tmp_path):
    for name in ("torch", "compressor", "onnx"):
        finished = bare_python("-c", f"import {name}", cwd=tmp_path)
        assert f"No module named '{name}'" in finished.stderr


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_a_kit_builds_and_replays_without_torch(kit, bare_python):
    finished = bare_python("build_engine.py", cwd=kit)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("UNVERIFIED until replay.py passes") == 3
    for precision in ("fp32", "fp16", "int8"):
        sidecar = json.loads((kit / f"model.{precision}.engine.json").read_text())
        content = (kit / f"model.{precision}.engine").read_bytes()
        assert sidecar["engine"]["sha256"] == sha256_of(content)
        assert sidecar["onnx"]["sha256"] == sha256_of(
            (kit / f"model.{precision}.onnx").read_bytes()
        )
        assert sidecar["profile"] == {"min": 1, "opt": 4, "max": 8}
        assert sidecar["precision"] == precision
    finished = bare_python("replay.py", cwd=kit)
    if finished.returncode == 4:
        assert finished.stdout.count("UNVERIFIED") == 3
        assert finished.stdout.count("no usable NVIDIA GPU") + finished.stdout.count("cudart") == 3
        assert "PASS" not in finished.stdout
    else:  # there is a GPU
        assert finished.stdout.count("PASS") == 3


def test_a_kit_replays_its_onnx_files_without_torch(kit, bare_python, tmp_path):
    """Called from elsewhere, it still finds its own folder."""
    finished = bare_python(str(kit / "replay.py"), "model.int8.onnx", cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.startswith("PASS  model.int8.onnx by ONNX Runtime")
    assert "adversarial images: same label on 21 of 21" in finished.stdout


@pytest.mark.parametrize("script", ["build_engine.py", "replay.py"])
def test_without_any_package_a_kit_says_so(kit, bare_python, tmp_path, script):
    (tmp_path / "empty").mkdir()
    finished = bare_python(script, cwd=kit, packages=tmp_path / "empty")
    assert finished.returncode == 4
    assert finished.stdout == (
        "UNVERIFIED  No module named 'numpy': see README.md for what to install\n"
    )
    assert finished.stderr == ""


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_ctrl_c_leaves_nothing_behind(kit, bare_python):
    before = sorted(path.name for path in kit.iterdir())
    code = """
import os, signal, sys, time
from pathlib import Path
from device import build_engine

def interrupt(event):
    if event.phase == "Preparing graph for optimization" and event.kind == "started":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

build_engine._say = interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell puts aside
sys.exit(build_engine.main([], folder=Path()))
"""
    finished = bare_python("-B", "-c", code, cwd=kit)
    assert finished.returncode == 130
    assert finished.stderr == "Cancelled; engines named above are complete.\n"
    assert sorted(path.name for path in kit.iterdir()) == before


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_the_command_line_of_the_builder(kit, capsys):
    folder = ["--kit", str(kit)]
    options = ["--model", "model.fp32.onnx", "--batch", "2:2:4", "--workspace-mib", "300"]
    cache = ["--timing-cache", str(kit / "cache")]
    assert build_engine.main([*folder, *options, *cache, "--optimization-level", "0"]) == 0
    sidecar = json.loads((kit / "model.fp32.engine.json").read_text())
    assert sidecar["profile"] == {"min": 2, "opt": 2, "max": 4}
    assert sidecar["options"]["workspace_mib"] == 300
    assert sidecar["options"]["optimization_level"] == 0
    assert not (kit / "model.fp16.engine").exists()
    assert "Next: python3 replay.py" in capsys.readouterr().out
    for wrong, message in (
        (["--model", "other.onnx"], "other.onnx is not in"),
        (["--batch", "3"], "cannot be built"),
        (["--batch", "a"], "neither min:opt:max"),
        (["--workspace-mib", "0"], "0 MiB"),
        (["--flavour", "trtexec"], "flavour 'trtexec' is not known"),
        (["--kit-sha256", "0" * 64], "do not use this kit"),
    ):
        code = build_engine.main([*folder, *wrong])
        if wrong != ["--batch", "3"]:  # 3 means 3:3:3, which an open batch allows
            assert code == (5 if "--kit-sha256" in wrong else 4)
            assert message in capsys.readouterr().err


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_what_cannot_be_written_is_one_line(kit, capsys):
    (kit / "model.fp32.engine").mkdir()
    assert build_engine.main(["--kit", str(kit), "--model", "model.fp32.onnx"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("Error: cannot write: ")
    assert "model.fp32.engine" in error


def test_the_same_inputs_give_the_same_bytes(original_kit, paths, golden, tmp_path):
    make_kit(tmp_path / "kit", paths, golden=golden, batch=(1, 4, 8))
    first, second = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (original_kit, tmp_path / "kit")
    )
    assert first == second
    assert len(first) == 8 + len(MODULES)


def test_a_kit_says_what_it_is(original_kit):
    table = json.loads((original_kit / "kit.json").read_text())
    assert table["class_names"] == ["cat", "dog", "fox", "owl"]
    assert table["threat"] == "linf 8/255"
    assert table["input"] == {
        "name": "images",
        "dtype": "float32",
        "shape": [3, 8, 8],
        "pixels": "0 to 1",
    }
    assert table["output"] == {"name": "logits", "num_classes": 4}
    assert BuildOptions.from_table(table["build"]).batch == (1, 4, 8)
    named = set(table["files"]) | {model["file"] for model in table["models"]} | {"kit.json"}
    there = {path for path in original_kit.rglob("*") if path.is_file()}
    assert named == {path.relative_to(original_kit).as_posix() for path in there}
    text = "".join(path.read_text() for path in there if path.suffix in (".py", ".json", ".md"))
    assert str(original_kit) not in text


def test_the_golden_images_load_without_pickle(original_kit, golden):
    with np.load(original_kit / "golden.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == sorted(
            ["clean_NCHW", "adversarial_NCHW", "labels_N"]
            + [f"{p}_{k}_NK" for p in ("fp32", "fp16", "int8") for k in ("clean", "adversarial")]
        )
        np.testing.assert_array_equal(arrays["clean_NCHW"], golden.clean_NCHW)
        np.testing.assert_array_equal(arrays["int8_clean_NK"], golden.clean_logits_NK["int8"])
        assert arrays["labels_N"].dtype == np.int64
    with zipfile.ZipFile(original_kit / "golden.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_readme_has_commands_for_every_device(original_kit):
    text = (original_kit / "README.md").read_text()
    for line in (
        "JetPack 6 (TensorRT 10.3, Python 3.10)",
        "JetPack 7",
        "sudo apt install -y nvidia-jetpack python3-numpy",
        "pip install numpy tensorrt-cu13 --extra-index-url https://pypi.nvidia.com",
        "python3 build_engine.py",
        "python3 replay.py",
        "replay.py model.fp32.onnx model.fp16.onnx model.int8.onnx",
        "| UNVERIFIED | 4 |",
        "linf 8/255",
    ):
        assert line in text


def names_in_a_kit():
    code = [f"device/{path.name}" for path in MODULES]
    return [
        *("golden.npz", "README.md", "build_engine.py", "replay.py"),
        *("model.fp32.onnx", "model.fp16.onnx", "model.int8.onnx"),
        *code,
    ]


def change_one_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", names_in_a_kit())
def test_one_changed_byte_is_found_and_named(kit, name, capsys):
    change_one_byte(kit / name)
    assert replay.main(["--kit", str(kit)]) == 5
    said = capsys.readouterr().out
    assert said.startswith("FAIL")
    assert f"{kit / name} was changed" in said
    with pytest.raises(MismatchError, match="was changed"):
        read_kit(kit).check_all()


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_a_changed_onnx_file_is_not_built(kit, capsys):
    change_one_byte(kit / "model.fp32.onnx")
    assert build_engine.main(["--kit", str(kit)]) == 5
    assert "model.fp32.onnx was changed" in capsys.readouterr().err
    assert list(kit.glob("*.engine*")) == []


def test_the_hash_of_kit_json_vouches_for_all(original_kit, paths, golden, tmp_path, capsys):
    sha256 = make_kit(tmp_path / "kit", paths, golden=golden)
    assert sha256 == sha256_of((tmp_path / "kit" / "kit.json").read_bytes())
    arguments = ["--kit", str(tmp_path / "kit"), "model.fp32.onnx", "--kit-sha256"]
    assert replay.main([*arguments, sha256.upper()]) == 0
    assert replay.main([*arguments, "0" * 64]) == 5
    assert "do not use this kit" in capsys.readouterr().out


def test_a_file_that_is_gone_is_no_pass(kit, capsys):
    (kit / "golden.npz").unlink()
    assert replay.main(["--kit", str(kit)]) == 4
    assert capsys.readouterr().out.startswith("UNVERIFIED")


def damaged(change):
    def apply(table):
        change(table)
        return json.dumps(table).encode()

    return apply


DAMAGES = {
    "no json": (lambda _: b"{", "damaged"),
    "empty": (lambda _: b"", "empty"),
    "a list": (lambda _: b"[]", "no JSON object"),
    "deep": (lambda _: b"[" * 100_000, "damaged"),
    "long": (lambda _: b" " * (2 << 20), "larger than"),
    "later": (damaged(lambda t: t.update(schema_version=2)), "schema_version 2"),
    "no models": (damaged(lambda t: t.update(models=[])), "names no model"),
    "no build": (damaged(lambda t: t.pop("build")), "'build' is missing"),
    "twice": (damaged(lambda t: t.update(models=t["models"][:1] * 2)), "a model twice"),
    "above": (damaged(lambda t: t["models"][0].update(file="../m.onnx")), "'../m.onnx' is not"),
    "absolute": (damaged(lambda t: t["files"].update({"/etc/passwd": "0" * 64})), "'/etc/passwd'"),
    "no hash": (damaged(lambda t: t["models"][0].update(sha256="x")), "'x' is not a sha256"),
    "a number": (damaged(lambda t: t["models"][0].update(file=3)), "damaged"),
    "nan": (damaged(lambda t: t["models"][0].update(tolerance=float("nan"))), "out of range"),
    "lax": (damaged(lambda t: t["models"][0].update(min_agreement=0)), "out of range"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_kit_json_is_refused(kit, damage, message):
    path = kit / "kit.json"
    path.write_bytes(damage(json.loads(path.read_text())))
    with pytest.raises(DeviceError, match=message) as caught:
        read_kit(kit)
    assert "kit.json" in str(caught.value)
    assert replay.main(["--kit", str(kit)]) == 4


def test_a_folder_that_is_no_kit(tmp_path, capsys):
    assert replay.main(["--kit", str(tmp_path)]) == 4
    assert build_engine.main(["--kit", str(tmp_path)]) == 4
    assert capsys.readouterr().err.endswith(f"{tmp_path} is no build kit: it has no kit.json\n")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_code_of_a_kit_stands_alone(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            modules = [] if node.level else [node.module.partition(".")[0]]
        else:
            continue
        assert set(modules) <= sys.stdlib_module_names | FOREIGN


def test_the_scripts_of_a_kit_are_python_3_10(original_kit):
    for name in ("build_engine.py", "replay.py"):
        ast.parse((original_kit / name).read_text(), feature_version=(3, 10))


def test_the_code_of_a_kit_is_our_own(original_kit):
    package = resources.files("compressor.device")
    for path in MODULES:
        assert (original_kit / "device" / path.name).read_bytes() == path.read_bytes()
        assert (package / path.name).is_file()


def one(path, precision="fp32", **changes):
    values = {"path": path, "precision": precision, "tolerance": 0.02, "min_agreement": 0.9}
    return KitModel(**(values | changes))


def renamed(path, folder, name):
    return shutil.copy(path, folder / name)


BAD_MODELS = {
    "none": (lambda paths, _: [], "at least one"),
    "twice": (lambda paths, _: [one(paths["fp32"])] * 2, "differ in name and in precision"),
    "precision": (lambda paths, _: [one(paths["fp32"], "fp8")], "'fp8' is not fp32, fp16 or int8"),
    "name": (
        lambda paths, folder: [one(renamed(paths["fp32"], folder, "my model.onnx"))],
        "'my model.onnx' cannot be the name",
    ),
    "tolerance": (lambda paths, _: [one(paths["fp32"], tolerance=0.0)], "out of range"),
    "agreement": (lambda paths, _: [one(paths["fp32"], min_agreement=1.1)], "out of range"),
    "missing": (lambda _, folder: [one(folder / "no.onnx")], "no.onnx cannot be read"),
}


@pytest.mark.parametrize(("models", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_unfit_models_are_refused(paths, golden, tmp_path, models, message):
    listed = [
        KitModel(**(vars(model) | {"path": Path(model.path)})) for model in models(paths, tmp_path)
    ]
    with pytest.raises(ExportError, match=message):
        make_kit_of(tmp_path / "kit", listed, golden)
    assert not (tmp_path / "kit").exists()


def make_kit_of(folder, models, golden, class_names=("cat", "dog", "fox", "owl")):
    from exporters.engine.build_kit import write_build_kit

    return write_build_kit(
        folder,
        models=models,
        golden=golden,
        options=BuildOptions(),
        class_names=class_names,
        threat="linf 8/255",
    )


def changed(golden, **changes):
    return type(golden)(**(vars(golden) | changes))


BAD_GOLDEN = {
    "none": (lambda g: {"clean_NCHW": g.clean_NCHW[:0]}, "no golden images"),
    "type": (lambda g: {"clean_NCHW": g.clean_NCHW.astype(np.float64)}, "files take float32"),
    "shape": (lambda g: {"adversarial_NCHW": g.adversarial_NCHW[:, :1]}, "files take float32"),
    "range": (lambda g: {"adversarial_NCHW": g.adversarial_NCHW * 2}, r"outside \[0, 1\]"),
    "nan": (lambda g: {"clean_NCHW": g.clean_NCHW * np.float32("nan")}, r"outside \[0, 1\]"),
    "labels": (lambda g: {"labels_N": g.labels_N + 1}, "21 numbers below 4"),
    "fewer": (lambda g: {"labels_N": g.labels_N[:3]}, "21 numbers below 4"),
    "logits": (lambda g: {"clean_logits_NK": {}}, r"logits of \[\] for files of \['fp32'\]"),
    "infinite": (
        lambda g: {"adversarial_logits_NK": {"fp32": g.clean_logits_NK["fp32"] * np.inf}},
        "or not finite",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_GOLDEN.values(), ids=BAD_GOLDEN)
def test_unfit_golden_arrays_are_refused(paths, golden, tmp_path, change, message):
    with pytest.raises(ExportError, match=message):
        make_kit_of(
            tmp_path / "kit", [one(paths["fp32"])], changed(of_fp32(golden), **change(golden))
        )
    assert list(tmp_path.iterdir()) == []


def of_fp32(golden):
    return changed(
        golden,
        clean_logits_NK={"fp32": golden.clean_logits_NK["fp32"]},
        adversarial_logits_NK={"fp32": golden.adversarial_logits_NK["fp32"]},
    )


def test_files_for_other_images_do_not_go_together(paths, golden, tmp_path):
    onnx.save(make_model(takes_bytes=True), tmp_path / "bytes.onnx")
    models = [one(paths["fp32"]), one(tmp_path / "bytes.onnx", "int8")]
    with pytest.raises(ExportError, match="take or give different tensors"):
        make_kit_of(tmp_path / "kit", models, golden)


def test_class_names_must_be_as_many_as_classes(paths, golden, tmp_path):
    with pytest.raises(ExportError, match="1 class names for 4 classes"):
        make_kit_of(tmp_path / "kit", [one(paths["fp32"])], of_fp32(golden), class_names=["cat"])


def test_a_kit_that_would_fail_is_not_written(paths, golden, tmp_path):
    """Planted defect: two classes are swapped in what is expected."""
    swapped = {"fp32": golden.clean_logits_NK["fp32"][:, [1, 0, 2, 3]]}
    wrong = changed(of_fp32(golden), clean_logits_NK=swapped)
    with pytest.raises(ArtefactMismatchError, match="does not answer its golden images") as caught:
        make_kit_of(tmp_path / "kit", [one(paths["fp32"])], wrong)
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_images_as_bytes(tmp_path):
    path = tmp_path / "bytes.onnx"
    onnx.save(make_model(takes_bytes=True), path)
    golden = make_golden({"fp32": path}, dtype=np.uint8)
    make_kit_of(tmp_path / "kit", [one(path)], golden)
    table = json.loads((tmp_path / "kit" / "kit.json").read_text())
    assert (table["input"]["dtype"], table["input"]["pixels"]) == ("uint8", "0 to 255")
    assert replay.main(["--kit", str(tmp_path / "kit")]) == 0


def test_a_folder_with_other_things_is_left_alone(paths, golden, tmp_path):
    (tmp_path / "kit").mkdir()
    make_kit(tmp_path / "kit", paths, golden=golden)  # an empty folder is fine
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ExportError, match="exists and is no build kit"):
        make_kit(tmp_path / "mine", paths, golden=golden)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_kit_is_replaced_as_a_whole(kit, paths, golden):
    (kit / "model.fp32.engine").write_bytes(b"of the model before")
    make_kit(kit, paths, golden=golden)
    assert not (kit / "model.fp32.engine").exists()
    assert [path.name for path in kit.parent.iterdir()] == ["kit"]

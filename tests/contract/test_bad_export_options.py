"""Bad values of the options of `export`, `--bundle`, and `verify` of exported files, a row each.

Those of `bench` are in test_bench_command.py, hostile files in test_hostile_files.py.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import cli.main

DRY = "export run --dry-run"
HASH = "0123456789abcdef" * 4
USAGE, KNOWN_ERROR = 2, 4

ROWS = {
    "no run": ("export", USAGE, "Missing argument 'RUN'"),
    "not a run": ("export nowhere", KNOWN_ERROR, "nowhere is not a run"),
    "a file": ("export notes.txt", KNOWN_ERROR, "notes.txt is not a run"),
    "two runs": ("export run run", USAGE, "unexpected extra argument"),
    "empty format": (f"{DRY} --format ''", USAGE, "--format '' is not known; use onnx or engine"),
    "capital letters": (f"{DRY} --precision INT8", USAGE, "--precision 'INT8' is not known; use"),
    "batch in words": (f"{DRY} --batch x", USAGE, "batch 'x' is neither min:opt:max"),
    "batch that falls": (f"{DRY} --batch 8:1:2", USAGE, "batch 8:1:2 is not min:opt:max"),
    "batch of none": (f"{DRY} --batch 0:1:2", USAGE, "1 <= min <= opt <= max <= 65536"),
    "half a batch": (f"{DRY} --batch 1:2", USAGE, "batch '1:2' is neither"),
    "a huge batch": (f"{DRY} --batch 1:8:99999999999", USAGE, "<= 65536"),
    "static below none": (f"{DRY} --static=-1", USAGE, "'--static'"),
    "static in words": (f"{DRY} --static x", USAGE, "'--static'"),
    "a timing cache that is a folder": (f"{DRY} --timing-cache .", USAGE, "is a folder"),
    "a timing cache nowhere": (f"{DRY} --timing-cache no/such/file", USAGE, "is no folder"),
    "a huge static": (f"{DRY} --static 999999999999", USAGE, "<= 65536"),
    "an old opset": (f"{DRY} --opset 17", USAGE, "--opset 17 is outside 18 to 23"),
    "opset in words": (f"{DRY} --opset x", USAGE, "'--opset'"),
    "calibrated by none": (f"{DRY} --calibration-samples 0", USAGE, "'--calibration-samples'"),
    "calibrated by x": (f"{DRY} --calibration-samples x", USAGE, "'--calibration-samples'"),
    "layers in float without int8": (
        f"{DRY} --keep-float 2",
        USAGE,
        "--keep-float would have no effect without --int8",
    ),
    "calibration without int8": (
        f"{DRY} --half --calibration-images clean",
        USAGE,
        "--calibration-images would have no effect without --int8",
    ),
    "layers in float and fine-tuned": (
        f"{DRY} --qat 1 --keep-float 2",
        USAGE,
        "--keep-float would have no effect with --qat",
    ),
    "fewer than no layers": (f"{DRY} --keep-float=-1", USAGE, "'--keep-float'"),
    "layers in words": (f"{DRY} --keep-float conv1", USAGE, "'--keep-float'"),
    "drop NaN": (f"{DRY} --max-robust-drop nan", USAGE, "'--max-robust-drop'"),
    "clean drop NaN": (f"{DRY} --max-clean-drop nan", USAGE, "'--max-clean-drop'"),
    "drop below nothing": (f"{DRY} --max-clean-drop=-0.1", USAGE, "'--max-clean-drop'"),
    "drop in percent": (f"{DRY} --max-robust-drop 1%", USAGE, "'--max-robust-drop'"),
    "images in words": (f"{DRY} --samples all", USAGE, "'--samples'"),
    "fewer than no epochs": (f"{DRY} --qat=-1", USAGE, "'--qat'"),
    "epochs in words": (f"{DRY} --qat x", USAGE, "'--qat'"),
    "no workspace": (f"{DRY} --trt --workspace-mib 0", USAGE, "'--workspace-mib'"),
    "a huge workspace": (
        f"{DRY} --workspace-mib 9999999999",
        USAGE,
        "not within 1 to 1048576",
    ),
    "tf32 without an engine": (
        f"{DRY} --tf32",
        USAGE,
        "--tf32 would have no effect without --trt or --bundle",
    ),
    "batches without an engine": (f"{DRY} --batch 1:2:3", USAGE, "--batch would have no effect"),
    "a timing cache without an engine": (
        f"{DRY} --timing-cache cache",
        USAGE,
        "--timing-cache would have no effect without --trt",
    ),
    "a compute capability in words": (
        f"{DRY} --trt --compute-capability FOO",
        USAGE,
        "compute capability 'FOO' is not SM and a number",
    ),
    "options of both TensorRTs": (
        f"{DRY} --trt --compute-capability SM89 --version-compatible",
        USAGE,
        "choose one of the two",
    ),
    "level 6": (f"{DRY} --trt --optimization-level 6", USAGE, "'--optimization-level'"),
    "no thread": (f"{DRY} --threads 0", USAGE, "'--threads'"),
    "unknown data": ("export run --data nowhere", KNOWN_ERROR, "'nowhere' is not known; use one"),
    "no data": ("export run --data imagefolder:nowhere", KNOWN_ERROR, "no folder nowhere"),
    "bundle is a file": (
        "export run --bundle notes.txt",
        KNOWN_ERROR,
        "notes.txt exists and is no",
    ),
    "bundle in a file": ("export run --bundle notes.txt/b", KNOWN_ERROR, "cannot be written to"),
    "bundle is another": (
        "export run --bundle other",
        KNOWN_ERROR,
        "other exists and is no bundle",
    ),
    "bundle is the run": ("export run --bundle run", KNOWN_ERROR, "run exists and is no bundle"),
    "bundle among its files": (
        "export run --bundle run/exports/b",
        KNOWN_ERROR,
        "run/exports/b lies among the files of run",
    ),
    "bundle is here": ("export run --bundle .", KNOWN_ERROR, ". is where you are, and would be"),
    "bundle is above": ("export run --bundle ..", KNOWN_ERROR, ".. is where you are"),
    "key for nothing": ("export run --signing-key key.pem", USAGE, "--signing-key signs a bundle"),
    "no key": (
        "export run --bundle b --signing-key key.pem",
        KNOWN_ERROR,
        "the key key.pem cannot be read: No such file",
    ),
    "key is a folder": (
        "export run --bundle b --signing-key other",
        KNOWN_ERROR,
        "the key other cannot be read: Is a directory",
    ),
    "not a key": (
        "export run --bundle b --signing-key notes.txt",
        KNOWN_ERROR,
        "notes.txt holds no private key in PEM; make a pair with: openssl",
    ),
    "no bundle": ("verify other --public-key key.pub.pem", USAGE, "--public-key is for bundles"),
    "key for a file": ("verify m.onnx --public-key k.pem", USAGE, "--public-key is for bundles"),
    "file of nothing": ("verify nowhere.onnx", KNOWN_ERROR, "nowhere.onnx does not exist; check"),
    "engine of nothing": (
        f"verify nowhere.engine --manifest-sha256 {HASH} --data digits",
        KNOWN_ERROR,
        "nowhere.engine",
    ),
    "engine without a hash": (
        "verify program.engine --data digits",
        KNOWN_ERROR,
        "program.engine is a program",
    ),
    "gate of what is not there": (
        "gate nowhere.onnx --policy gate.toml",
        KNOWN_ERROR,
        "nowhere.onnx",
    ),
}


def call(line):
    """The exit code of a command line that runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-compress", *shlex.split(line)])
        try:
            cli.main.main()
        except SystemExit as end:
            return end.code or 0
    return 0


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_on_digits):
    return train_on_digits(tmp_path_factory.mktemp("runs") / "run", epochs=1)


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    shutil.copytree(run.path, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    Path("other").mkdir()
    Path("other/mine").write_text("mine")
    Path("program.engine").write_bytes(b"a program")
    Path("gate.toml").write_text("schema = 1\n[clean]\nmin_accuracy = 0.5\n")
    return tmp_path


def contents(folder):
    """Of everything but the lock of the run, which any command may take."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_bad_value_is_explained_and_nothing_is_written(row, folder, capsys):
    line, code, says = row
    before = contents(folder)
    found = call(line)
    out, err = capsys.readouterr()
    message = " ".join(re.sub("[─-╿]", " ", err).split())
    assert "Traceback" not in out + err, message[-300:]
    assert (found, says in message) == (code, True), message
    assert len(re.findall("Error:|Usage:", message)) == 1, message
    assert contents(folder) == before

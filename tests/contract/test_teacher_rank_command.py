"""`robust-compress teacher rank`: what it prints and writes, and how it refuses bad input."""

import contextlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import onnx  # noqa: TID253 (makes the file)
import pytest

import cli.main
from compressor.errors import ExitCode
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.recipe_file import load_recipe
from compressor.reports.teacher_ranking import TeacherRanking
from tests.onnx_files import linear_model, node

CLASSES = tuple("0123456789")
QUICK = "--samples 20 --threads 1"
RECIPE = """
name = "mine"
seed = 3
[threat]
epsilon_pixels = "16/255"
[data]
source = "digits"
validation_size = 60
[student]
architecture = "tiny"
[method]
name = "bmtard"
[[teachers]]
role = "clean"
source = "run"
[[teachers]]
role = "robust"
source = "wide.safetensors"
resize_to = 12
mean = [0.3]
std = [0.4]
"""


def save(path, *, names=CLASSES, width=1.0, image_shape=(1, 8, 8), seed=0):
    spec = NetworkSpec(
        architecture="tiny", width=width, num_classes=len(names), image_shape=image_shape
    )
    network = build_classifier(spec, seed=seed)
    save_classifier(path, network, spec, {"class_names": names})


@pytest.fixture(scope="module")
def materials(tmp_path_factory, train_on_digits):
    """A trained run, its copy as weights and as ONNX, an untrained net, and unfit ones."""
    folder = tmp_path_factory.mktemp("rank")
    with contextlib.chdir(folder):
        run = train_on_digits(Path("run"), epochs=3)
        Path("copy.safetensors").write_bytes(run.model.read_bytes())
        Path("recipe.toml").write_text(RECIPE)
        save(Path("wide.safetensors"), width=2.0, seed=1)
        onnx.save(linear_model(node("Log", "score"), name="score"), "nan.onnx")
        save(Path("five.safetensors"), names=CLASSES[:5])
        save(Path("order.safetensors"), names=CLASSES[::-1])
        save(Path("narrow.safetensors"), width=0.5, seed=2)
        onnx.save(linear_model(), "file.onnx")
        Path("plain.toml").write_text(
            RECIPE.partition("[[teachers]]")[0].replace("bmtard", "cross_entropy")
        )
        Path("occupied").write_text("a file")
    return folder


@pytest.fixture
def folder(materials, monkeypatch):
    monkeypatch.chdir(materials)
    return materials


def call(line):
    """The exit code of a command line that runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-compress", "teacher", "rank", *shlex.split(line)])
        try:
            cli.main.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def words(text):
    return " ".join(re.sub("[─-╿]", " ", text).split())


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_ranking_is_printed_and_written(folder, tmp_path, capsys):
    line = f"run wide.safetensors file.onnx --data digits {QUICK} --epsilon 4/255 --out"
    assert call(f"{line} {tmp_path}/out --choose 2") == 0
    out, err = capsys.readouterr()
    assert err == ""
    ranking = TeacherRanking.model_validate_json((tmp_path / "out/teachers.json").read_text())
    assert ranking.teachers[0].name == "run"
    assert ranking.teachers[-1].name == "file.onnx"
    assert [teacher.has_seen_images for teacher in ranking.teachers] == ["no", "unknown", "unknown"]
    assert len(ranking.transfer) == 6
    for said in (
        "20 images of the training part of digits, classes balanced",
        "Seen in training, some of these images: no: run; unknown: wide.safetensors, file.onnx.",
        "linf 4/255",
        "40 steps",
        "1 run",
        "nats APGD",
        "file.onnx: an ONNX file gives no gradient",
        "may have been trained on some of these images",
    ):
        assert said in words(out)
    text = (tmp_path / "out/teachers.md").read_text()
    assert "Recommended: run" in text
    assert "of 20" in text
    assert re.search(r"^!\[Transferability between 3 .*\]\(teachers\.svg\)$", text, re.M)
    assert "the stronger the colour" in text
    ElementTree.parse(tmp_path / "out/teachers.svg")
    assert f"Written: {tmp_path}/out/teachers.json, teachers.md, teachers.svg" in out


def test_json_is_one_object_and_the_file(folder, tmp_path, capfd):
    assert call(f"run narrow.safetensors --data digits {QUICK} --json --out {tmp_path}") == 0
    out, err = capfd.readouterr()
    assert err == ""
    said, written = json.loads(out), json.loads((tmp_path / "teachers.json").read_text())
    files = said.pop("files")
    assert said == written
    assert files == [str(tmp_path / f"teachers.{end}") for end in ("json", "md", "svg")]


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_terminal(columns, folder, capsys, monkeypatch):
    """Commands and sentences may be folded by the terminal; tables may not be cut."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert call(f"run wide.safetensors narrow.safetensors --data digits {QUICK}") == 0
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if re.match(r"[1-3] (run|wide|narrow)", line)]
    assert len(tables) == 12
    assert max(map(len, tables)) <= columns


def test_that_nothing_is_known_of_files_is_said(folder, tmp_path, capsys):
    assert call(f"wide.safetensors narrow.safetensors --data digits {QUICK} --out {tmp_path}") == 0
    out, text = words(capsys.readouterr().out), (tmp_path / "teachers.md").read_text()
    said = r"(wide|narrow)\.safetensors, (wide|narrow)\.safetensors may have been trained on some"
    assert re.search(said, out)
    assert "held out" not in out + text
    assert len(re.findall(r"\| unknown +\|", text)) == 2


def test_a_recipe_gives_teachers_data_and_threat_and_gets_them_back(folder, tmp_path, capsys):
    assert call(f"recipe.toml narrow.safetensors {QUICK} --choose 1 --out {tmp_path}") == 0
    out = capsys.readouterr().out
    ranking = TeacherRanking.model_validate_json((tmp_path / "teachers.json").read_text())
    assert (ranking.seed, ranking.threat) == (3, "linf 16/255")
    assert {teacher.source for teacher in ranking.teachers} == {
        "run",
        "wide.safetensors",
        "narrow.safetensors",
    }
    seen = {teacher.name: teacher.has_seen_images for teacher in ranking.teachers}
    assert seen["run"] == "yes"  # it was trained with another seed
    assert "some of these images: yes: run; unknown: " in words(out)
    assert "run was trained on some of these images; its accuracies flatter" in words(out)
    command = shlex.split(out.rpartition("Next: ")[2])
    assert command[:4] == ["robust-compress", "distill", "recipe.toml", "--set"]
    found = load_recipe(Path("recipe.toml"), [command[4]]).teachers
    assert [teacher.role for teacher in found] == ["clean", "robust"]
    others = {row.source: row.clean.fraction for row in ranking.teachers[1:]}
    assert others[found[0].source] == max(others.values())
    assert found[1].source == ranking.teachers[0].source


@pytest.mark.parametrize(
    ("seed", "split_seed", "seen"), [(0, None, "no"), (1, None, "yes"), (1, 0, "no"), (0, 1, "yes")]
)
def test_what_a_run_held_out_follows_its_split(seed, split_seed, seen, folder, tmp_path, capfd):
    """The images are those of split 0, as no recipe says otherwise."""
    shutil.copytree("run", tmp_path / "teacher")
    written = tmp_path / "teacher/recipe.resolved.json"
    table = json.loads(written.read_text())
    table["seed"], table["data"]["split_seed"] = seed, split_seed
    written.write_text(json.dumps(table))
    assert call(f"{tmp_path}/teacher --data digits {QUICK} --json") == 0
    (teacher,) = json.loads(capfd.readouterr().out)["teachers"]
    assert teacher["has_seen_images"] == seen


def test_the_order_of_the_teachers_changes_nothing(folder, capfd):
    found = []
    for names in ("run wide.safetensors", "wide.safetensors run"):
        assert call(f"{names} --data digits {QUICK} --json") == 0
        table = json.loads(capfd.readouterr().out)
        for row in table["teachers"]:
            del row["forward_ms"]
        found.append(table)
    assert found[0] == found[1]


def test_one_teacher_is_measured_too(folder, tmp_path, capsys):
    assert call(f"run --data digits {QUICK} --epsilon 1/255 --out {tmp_path}") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"teachers.json", "teachers.md"}
    out = capsys.readouterr().out
    assert "Recommended: run." in out
    assert "No teacher is left over, so run serves as clean and as robust teacher." in words(out)
    assert """Next: robust-compress distill RECIPE.toml --set 'teachers=[{role="clean",""" in out


GOOD = f"run --data digits {QUICK}"
BAD = {
    "no teacher": ("", 2, "Missing argument 'TEACHER...'"),
    "no data": (f"run {QUICK}", 2, "Name the data with --data"),
    "no such teacher": (f"nowhere.safetensors --data digits {QUICK}", 4, "nowhere.safetensors"),
    "no such architecture": (f"tinny:copy.safetensors --data digits {QUICK}", 4, "did you mean"),
    "other data": (f"run --data imagefolder:nowhere {QUICK}", 4, "nowhere"),
    "not a kind of data": (f"run --data digit {QUICK}", 4, "digit"),
    "not-a-number": (
        f"nan.onnx --data digits {QUICK}",
        4,
        "teacher nan.onnx answers 20 of 20 clean images with numbers that are not",
    ),
    "another class count": (
        f"run five.safetensors --data digits {QUICK}",
        4,
        "five.safetensors: it has 5 classes, the data has 10",
    ),
    "another label order": (
        f"run order.safetensors --data digits {QUICK}",
        4,
        "order.safetensors: it has the classes in another order: label 0 is '9' there",
    ),
    "the same twice": (
        f"run copy.safetensors --data digits {QUICK}",
        4,
        "run and copy.safetensors are the same teacher",
    ),
    "too few images": ("run --data digits --samples 5", 4, "--samples = 5 is less than one image"),
    "too many images": ("run --data digits --samples 5000", 4, "--samples = 5000 takes 500 images"),
    "more than the recipe holds out": ("recipe.toml --samples 61", 2, "--samples 60 or less"),
    "two recipes": (f"recipe.toml plain.toml {QUICK}", 2, "are two recipes"),
    "no teachers in the recipe": (f"plain.toml {QUICK}", 2, "plain.toml has no teachers"),
    "no such recipe": (f"nowhere.toml {QUICK}", 4, "nowhere.toml does not exist"),
    "choose none": (f"{GOOD} --choose 0", 2, "--choose"),
    "few steps": (f"{GOOD} --steps 10", 2, "--steps"),
    "a weight below 0": (f"{GOOD} --transfer-weight=-1", 2, "--transfer-weight -1 is not between"),
    "no weight": (f"{GOOD} --transfer-weight nan", 2, "--transfer-weight nan is not"),
    "epsilon in levels": (f"{GOOD} --epsilon 8", 2, 'write eight grey levels as "8/255"'),
    "no radius": (f"{GOOD} --epsilon 0", 2, "--epsilon 0 is not a radius"),
    "epsilon of words": (f"{GOOD} --epsilon eight", 2, "--epsilon: 'eight' is not a number"),
    "not a radius": (f"{GOOD} --epsilon nan", 2, "--epsilon nan is not a radius"),
    "no such norm": (f"{GOOD} --norm l1 --epsilon 1", 2, "--norm 'l1' is not one of linf, l2"),
    "a norm alone": (f"{GOOD} --norm l2", 2, "add --epsilon"),
    "no such device": (f"{GOOD} --device gpu", 4, "device 'gpu' is not known"),
    "out is a file": (f"{GOOD} --out occupied", 4, "occupied cannot be written to"),
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_bad_input_is_explained_and_nothing_is_written(row, folder, capsys):
    line, code, says = row
    before = files_below(folder)
    assert call(line) == code
    out, err = capsys.readouterr()
    assert says in words(err)
    assert "Traceback" not in out + err
    assert files_below(folder) == before


def test_an_interruption_writes_nothing(folder, monkeypatch, capsys):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("compressor.teacher_ranking_workflow.measure_teachers", stop)
    before = files_below(folder)
    assert call(f"{GOOD} --out new") == ExitCode.INTERRUPTED
    assert "interrupted; nothing is kept" in capsys.readouterr().err
    assert files_below(folder) == before

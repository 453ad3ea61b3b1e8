"""The wheel holds what it must and nothing else, and works far from the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import compressor

pytestmark = pytest.mark.packaging

CHECKOUT = Path(compressor.__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")

NAMES_OF_DJANGO_COMPRESSOR = """base cache conf contrib css exceptions filters finders js
    management models offline parser signals storage templates templatetags tests utils"""
NAMES_OF_SCRAPY_EXPORTERS = """contrib decompressors exceptions filters groupers logger meta
    persistence pipeline readers records transform utils writers"""
FOREIGN_NAMES = {
    "compressor": NAMES_OF_DJANGO_COMPRESSOR.split(),
    "exporters": NAMES_OF_SCRAPY_EXPORTERS.split(),
}
"""Of distributions that install under the same names; pip lets one overwrite the other."""

RECIPE = """
name = "tiny"
[data]
source = "digits"
validation_size = 50
[student]
architecture = "tiny"
[[teachers]]
role = "clean"
source = "taught"
[[teachers]]
role = "robust"
source = "taught"
[method]
name = "bmtard"
attack.num_steps = 1
attack.step_size_pixels = "1/255"
[threat]
epsilon_pixels = "1/255"
[training]
epochs = 1
batch_size = 64
[selection]
num_steps = 1
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source") / "robust-compress"
    shutil.copytree(CHECKOUT, source, ignore=NOT_COPIED)
    out = tmp_path_factory.mktemp("wheel")
    run("build", "--wheel", "--no-isolation", "--outdir", str(out), str(source), cwd=source)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder in which the wheel is installed, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(target))
    run("pip", "install", "--disable-pip-version-check", *options, str(wheel), cwd=target)
    return target


@pytest.fixture
def copy(installed, tmp_path):
    """An installation of one's own, to be spoilt."""
    return shutil.copytree(installed, tmp_path / "installed")


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def run(module, *arguments, cwd, path=None, code=0):
    """Both outputs of `python -m module`, with `path` before everything else."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"ROBUST_COMPRESS_CACHE": str(cwd / "cache")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    finished = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == code, finished.stdout
    return finished.stdout


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_has_three_packages_and_its_description(wheel):
    description = f"robust_compress-{compressor.__version__}.dist-info"
    top_level = {name.partition("/")[0] for name in names_in(wheel)}
    assert top_level == {"compressor", "cli", "exporters", description}


def test_wheel_has_every_module_and_no_other(wheel):
    """Also the sub-packages, which an explicit list of packages forgets."""
    packages = ("compressor", "cli", "exporters")
    paths = [path for name in packages for path in (CHECKOUT / name).rglob("*.py")]
    modules = {path.relative_to(CHECKOUT).as_posix() for path in paths}
    assert {name for name in names_in(wheel) if name.endswith(".py")} == modules


def test_wheel_has_the_digits_their_licence_the_page_and_the_types(wheel):
    names = names_in(wheel)
    data = {name for name in names if not name.endswith(".py") and ".dist-info/" not in name}
    typed = {f"{package}/py.typed" for package in ("compressor", "cli", "exporters")}
    page, digits = "compressor/reports/report.html.j2", "compressor/digits.npz"
    assert data == {page, digits, "compressor/digits.LICENSE.md"} | typed
    licences = {name.rpartition("/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "digits.LICENSE.md"}


def test_wheel_has_no_tests_and_no_examples(wheel):
    parts = {part for name in names_in(wheel) for part in name.split("/")}
    assert not parts & {"tests", "examples", "docs", "conftest.py", "runs"}


@pytest.mark.parametrize("package", FOREIGN_NAMES)
def test_wheel_shares_no_module_with_a_namesake(wheel, package):
    inside = [name.split("/")[1] for name in names_in(wheel) if name.startswith(f"{package}/")]
    ours = {name.partition(".")[0] for name in inside}
    assert sorted(ours.intersection(FOREIGN_NAMES[package])) == []


def test_installed_wheel_is_what_runs(installed, elsewhere):
    """And not the checkout, of which every other test is."""
    where = "import compressor, cli, exporters\nprint(*(m.__file__ for m in (compressor, cli)))"
    (elsewhere / "where.py").write_text(where)
    assert run("where", cwd=elsewhere, path=installed).count(str(installed)) == 2


def test_installed_wheel_knows_its_version(installed, elsewhere):
    said = run("cli.main", "--version", cwd=elsewhere, path=installed)
    assert said == f"robust-compress {compressor.__version__}\n"


def test_installed_wheel_has_a_command(installed, elsewhere):
    finished = subprocess.run(
        [sys.executable, str(installed / "bin/robust-compress"), "--version"],
        cwd=elsewhere,
        env={"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout == f"robust-compress {compressor.__version__}\n"


def test_installed_wheel_distils_from_another_directory(installed, elsewhere):
    (elsewhere / "recipe.toml").write_text(RECIPE)
    plain = RECIPE.partition("[[teachers]]")[0] + '[method]\nname = "cross_entropy"\n'
    (elsewhere / "plain.toml").write_text(plain)
    quick = ("--threads", "1", "--set", "training.epochs=1")

    said = run("cli.main", "recipe", "check", "recipe.toml", cwd=elsewhere, path=installed)
    assert "recipe.toml is well formed" in said
    train = ("teacher", "train", "plain.toml", "--out", "taught", *quick)
    run("cli.main", *train, cwd=elsewhere, path=installed)
    short = ("--accept-teachers", "--no-export")
    distil = ("distill", "recipe.toml", "--out", "student", *quick, *short)
    said = run("cli.main", *distil, cwd=elsewhere, path=installed)
    assert "Next: robust-compress verify student" in said
    made = {path.name for path in (elsewhere / "student").iterdir()}
    assert {"model.safetensors", "metrics.jsonl", "curves.png", "report-papers.html"} <= made


FOREIGN_MARKERS = {
    "with a version": '__version__ = "4.6.0"\n',
    "without a version": "",
}


@pytest.mark.parametrize("content", FOREIGN_MARKERS.values(), ids=FOREIGN_MARKERS)
@pytest.mark.parametrize("package", ["compressor", "cli", "exporters"])
def test_overwritten_file_is_named(copy, elsewhere, package, content):
    (copy / package / "__init__.py").write_text(content)
    said = run("cli.main", "--version", cwd=elsewhere, path=copy, code=4)
    assert "Traceback" not in said
    assert f"{package}/__init__.py was overwritten by another package" in said
    assert "pipx install robust-compress" in said


def test_overwritten_file_that_was_uninstalled_again(copy, elsewhere):
    """Uninstalling the other package removes the file, and ours becomes a namespace."""
    (copy / "compressor/__init__.py").unlink()
    said = run("cli.main", "--version", cwd=elsewhere, path=copy, code=4)
    assert "compressor/__init__.py was overwritten" in said


def test_untouched_installation_passes(installed, elsewhere):
    said = run("cli.main", "doctor", "--json", cwd=elsewhere, path=installed)
    assert '"overwritten_files": []' in said

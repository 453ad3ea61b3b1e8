"""What every command promises: its options, its help, its JSON, its speed, its exit codes."""

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer.main
from safetensors import safe_open
from safetensors.torch import save_file

import cli.main
from compressor.errors import ExitCode, RobustCompressError
from compressor.reports.report import read_report, write_report
from compressor.run_directory import RunDirectory

PLAIN = """
name = "plain"
[threat]
epsilon_pixels = "1/255"
[data]
source = "digits"
validation_size = 50
crop_padding_pixels = 0
horizontal_flip = false
[student]
architecture = "tiny"
[method]
name = "cross_entropy"
[training]
epochs = 1
batch_size = 128
[selection]
num_steps = 1
"""
RECIPE = f"""
{PLAIN.replace('"plain"', '"good"').replace('"cross_entropy"', '"bmtard"')}
[method.attack]
num_steps = 1
step_size_pixels = "1/255"
[[teachers]]
role = "clean"
source = "teacher.safetensors"
[[teachers]]
role = "robust"
source = "teacher.safetensors"
"""

POLICY = "schema = 1\n[clean]\nmin_accuracy = 0.01\n"

TRAINING = """--set --out --resume --device --dtype --compile --threads --checkpoint-minutes
    --keep-every --memory-mib --workers --nproc --restarts --download --json --help"""
OPTIONS = {
    "": "--version --help --install-completion --show-completion",
    "plan": """RECIPE_PATH --data --clean-teacher --robust-teacher --out --set --device --dtype
        --compile --threads --memory-mib --workers --download --json --help""",
    "distill": f"""RECIPE_PATH --data --clean-teacher --robust-teacher --student {TRAINING}
        --accept-teachers --verify --no-verify --export --no-export""",
    "verify": """TARGET --source --data --attacks --mode --epsilon --norm --samples --max-seconds
        --batch-size --seed --out --device --dtype --threads --nproc --provider
        --manifest-sha256
        --public-key --json --help""",
    "gate": """TARGET --policy --baseline --inconclusive --out --junit --sarif --summary --live
        --samples --max-seconds --data --device --threads --plan --assume --json --help""",
    "export": """RUN_PATH --format --precision --trt --half --int8 --batch --static --opset
        --uint8-input --calibration-method --calibration-images --calibration-samples --keep-float
        --max-robust-drop --max-clean-drop --samples --qat --workspace-mib --optimization-level
        --tf32 --version-compatible --hardware-compatible --compute-capability --timing-cache
        --bundle --signing-key --data --dry-run --threads --json --help""",
    "bench": """TARGETS --batch-sizes --threads --rounds --seconds --report --image-shape --provider
        --manifest-sha256 --out --json --help""",
    "compare": """FILE --methods --seeds --reference --samples --cascade-samples --clean-samples
        --data --set --out --retry --dry-run --device --dtype --threads --memory-mib --workers
        --download --accept-teachers --json --help""",
    "doctor": "--json --help",
    "teacher": "--help",
    "teacher train": f"RECIPE_PATH --role --data {TRAINING}",
    "teacher rank": """TEACHERS --data --samples --choose --transfer-weight --epsilon --norm --steps
        --out --device --threads --download --json --help""",
    "recipe": "--help",
    "recipe check": "RECIPE_PATH --set --json --help",
}
"""Every option and argument of every command. A change here is a change for users: it belongs
into the changelog, and a removal needs a new major version."""

GROUPS = {"", "teacher", "recipe"}
COMMANDS = sorted(OPTIONS.keys() - GROUPS)


def call(*arguments):
    """The exit code of a command line that runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-compress", *arguments])
        try:
            cli.main.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def python(*arguments, **kwargs):
    """A process of its own that imports this very project."""
    kwargs.setdefault("cwd", Path.cwd())
    environment = {"PYTHONPATH": str(Path(cli.main.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **kwargs,
    )


def finish(process, seconds=60):
    """Exit code, stdout, stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def one_line(text):
    return " ".join(re.sub("[─-╿]", " ", text).split())


@pytest.fixture(scope="module")
def materials(tmp_path_factory, one_thread, session_cache, make_report):
    """Recipes, a teacher, a run made from them; a policy and a report that passes it."""
    folder = tmp_path_factory.mktemp("materials")
    with contextlib.chdir(folder):
        Path("plain.toml").write_text(PLAIN)
        Path("recipe.toml").write_text(RECIPE)
        longer = ("--set", "training.epochs=4", "--set", "training.batch_size=64")
        assert call("teacher", "train", "plain.toml", "--out", "t", "--threads", "1", *longer) == 0
        Path("t/model.safetensors").rename("teacher.safetensors")
        Path("gate.toml").write_text(POLICY)
        Path("live.toml").write_text(f'{POLICY}[threat]\nnorm = "linf"\nepsilon = "120/255"\n')
        write_report(make_report((None,) * 40), Path("good.json"))
        quick = ("--threads", "1", "--no-export")
        assert call("distill", "recipe.toml", "--out", "run", *quick) == 0
    return folder


@pytest.fixture
def folder(materials, monkeypatch):
    monkeypatch.chdir(materials)
    return materials


# Options and help


def commands():
    """Every command that there is, by its words."""
    found = {}
    waiting = [("", typer.main.get_command(cli.main.app))]
    while waiting:
        words, command = waiting.pop()
        found[words] = command
        for name, inner in getattr(command, "commands", {}).items():
            waiting.append((f"{words} {name}".strip(), inner))
    return found


def test_options_there_are_no_other_commands():
    assert commands().keys() == OPTIONS.keys()


@pytest.mark.parametrize("words", OPTIONS)
def test_options_are_these(words):
    command = commands()[words]
    names = ["--help"]
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        names += [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name]
    shown = {name if name.startswith("-") else name.upper() for name in names}
    assert shown == set(OPTIONS[words].split())


@pytest.mark.parametrize("words", OPTIONS)
def test_help_ends_well(words, capsys):
    assert call(*words.split(), "--help") == 0
    assert re.search(f"Usage: .*robust-compress {words}", one_line(capsys.readouterr().out))


@pytest.mark.parametrize("words", COMMANDS)
def test_help_has_an_example(words, capsys):
    call(*words.split(), "--help")
    text = one_line(capsys.readouterr().out)
    introduction = text.partition("Options")[0]
    assert "xample" in introduction
    assert f"robust-compress {words}" in introduction.partition("xample")[2]


@pytest.mark.parametrize("words", ["", "teacher", "recipe"])
def test_help_is_shown_where_nothing_is_asked(words, capsys):
    assert call(*words.split()) == ExitCode.USAGE
    text = one_line("".join(capsys.readouterr()))
    assert re.search(f"Usage: .*robust-compress {words}", text)


@pytest.mark.parametrize("words", OPTIONS)
def test_help_is_fast(words):
    """Best of three, in seconds of the processor: on an idle machine those of the clock."""
    measure = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'cli.main', *sys.argv[1:], '--help'],\n"
        "               check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    seconds = []
    while len(seconds) < 3 and not (seconds and min(seconds) < 0.5):
        code, out, err = finish(python("-c", measure, *words.split()))
        assert code == 0, err
        seconds.append(float(out))
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'torchvision', 'onnx', 'onnxruntime', 'matplotlib', 'pydantic'}"
    script = f"import sys, cli.main; print(sorted({heavy} & sys.modules.keys()))"
    assert finish(python("-c", script)) == (0, "[]\n", "")


def test_verification_does_not_load_what_compiles():
    """torchvision loads torch's compiler, which takes longer than all else but torch itself."""
    heavy = "{'torchvision', 'torch._dynamo'}"
    script = f"import sys, compressor.verification_workflow; print({heavy} & sys.modules.keys())"
    assert finish(python("-c", script)) == (0, "set()\n", "")


def test_version(capsys):
    assert call("--version") == 0
    assert re.fullmatch(r"robust-compress \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# JSON

ONE_THREAD = ("--threads", "1")
LIVE = ("--live", "--samples", "20", *ONE_THREAD)
JSON_RESULTS = {
    "recipe check": (("recipe", "check", "recipe.toml"), {"recipe_id", "recipe"}),
    "doctor": (("doctor",), {"python", "packages", "devices", "tensorrt", "overwritten_files"}),
    "compare": (
        ("compare", "plain.toml", "--methods", "cross_entropy", "--dry-run", *ONE_THREAD),
        {"name", "reference", "methods", "runs", "test_images", "estimated_seconds"},
    ),
    "teacher train": (
        ("teacher", "train", "plain.toml", "--out", "taught", *ONE_THREAD),
        {"run", "model"},
    ),
    "teacher rank": (
        ("teacher", "rank", "run", "--data", "digits", "--samples", "20", *ONE_THREAD),
        {"schema_version", "teachers", "transfer", "chosen", "notes", "files"},
    ),
    "distill": (
        ("distill", "recipe.toml", "--out", "distilled", "--no-verify", *ONE_THREAD),
        {"run", "model", "onnx"},
    ),
    "verify": (
        ("verify", "run", "--samples", "20", "--attacks", "fgsm", *ONE_THREAD),
        {"schema_version", "status", "target", "clean", "attacks", "worst_case", "cost"},
    ),
    "gate": (
        ("gate", "good.json", "--policy", "gate.toml"),
        {"schema_version", "verdict", "exit_code", "rules", "checks", "num_images"},
    ),
    "gate, live": (
        ("gate", "run", "--policy", "live.toml", "--inconclusive", "warn", *LIVE),
        {"schema_version", "verdict", "exit_code", "rules", "checks", "num_images"},
    ),
    "gate, planned": (("gate", "--policy", "gate.toml", "--plan"), {"rules", "cost_per_image"}),
    "export": (("export", "run", "--samples", "100", *ONE_THREAD), {"files"}),
    "export, planned": (("export", "run", "--half", "--dry-run"), {"would_write", "formats"}),
}


@pytest.mark.parametrize(("arguments", "keys"), JSON_RESULTS.values(), ids=JSON_RESULTS)
def test_json_is_one_object(folder, arguments, keys, capfd):
    assert call(*arguments, "--json") == 0
    out, err = capfd.readouterr()
    assert keys <= json.loads(out).keys()
    assert err == ""


def test_distilling_ends_with_the_attacks_of_the_papers_only(folder):
    """The whole cascade takes as long as training, so it is a command, and `report.json` its."""
    names = {path.name for path in Path("run").iterdir()}
    assert {f"report-papers.{kind}" for kind in ("json", "md", "html")} <= names
    assert "samples-papers.csv" in names
    assert not {"report.json", "samples.csv"} & names
    report = read_report(Path("run/report-papers.json"))
    assert report.protocol == "worst of fgsm, pgd_sat, pgd_trades, cw_inf"
    assert report.clean.num_total == 497


JSON_ERRORS = {
    "known error": (("verify", "nowhere"), "RunError", "nowhere is not a run", 4),
    "our usage error": (("export", "run", "--format", "x"), "UsageError", "--format 'x'", 2),
    "unknown option": (("export", "run", "--fast"), "UsageError", "--fast", 2),
    "missing argument": (("verify",), "UsageError", "TARGET", 2),
    "value out of range": (("verify", "run", "--threads", "0"), "UsageError", "--threads", 2),
}


@pytest.mark.parametrize("row", JSON_ERRORS.values(), ids=JSON_ERRORS)
def test_json_of_an_error(folder, row, capsys):
    arguments, kind, text, code = row
    assert call(*arguments, "--json") == code
    out, err = capsys.readouterr()
    error = json.loads(out)
    assert error.keys() == {"error", "message", "exit_code"}
    assert (error["error"], error["exit_code"]) == (kind, code)
    assert text in error["message"]
    assert err == ""


# Exit codes


def raising(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    "kind", [RobustCompressError, *RobustCompressError.__subclasses__()], ids=lambda k: k.__name__
)
def test_exit_code_of_a_known_error(monkeypatch, capsys, kind):
    monkeypatch.setattr(RunDirectory, "open", raising(kind("the reason")))
    assert call("verify", "run") == kind.exit_code
    assert capsys.readouterr().err == "Error: the reason\n"


def test_exit_code_of_a_bug(monkeypatch, capsys):
    monkeypatch.setattr(RunDirectory, "open", raising(ZeroDivisionError("the reason")))
    assert call("verify", "run") == ExitCode.BUG
    err = capsys.readouterr().err
    assert "ZeroDivisionError: the reason" in err
    assert err.endswith("\nThis is a bug in robust-compress; please report the lines above.\n")


def test_exit_code_of_a_bug_as_json(monkeypatch, capsys):
    monkeypatch.setattr(RunDirectory, "open", raising(ZeroDivisionError("the reason")))
    assert call("verify", "run", "--json") == ExitCode.BUG
    out, err = capsys.readouterr()
    error = json.loads(out)
    assert error["exit_code"] == ExitCode.BUG
    assert "ZeroDivisionError" in error["message"]
    assert "please report" in err


def test_exit_code_of_an_interruption_outside_training(monkeypatch):
    monkeypatch.setattr(RunDirectory, "open", raising(KeyboardInterrupt()))
    assert call("verify", "run") == ExitCode.INTERRUPTED


def test_exit_code_of_a_reader_that_left(folder):
    """`robust-compress recipe check recipe.toml | head -1` is no bug."""
    command = "import sys; from cli.main import main; main()"
    process = python("-c", command, "recipe", "check", "recipe.toml")
    process.stdout.close()
    process.stdout = None
    _, _, err = finish(process)
    assert "Traceback" not in err


def test_brackets_in_names_are_not_markup(folder, capsys):
    """The terminal library has a markup in brackets."""
    Path("[red].toml").write_text(RECIPE)
    assert call("recipe", "check", "[red].toml") == 0
    assert "distill [red].toml" in capsys.readouterr().out


# Signals

LONG = ("--set", "training.epochs=2", "--set", "method.attack.num_steps=20", "--threads", "1")


def chance_teacher(folder):
    """As the good one, with a last layer that says nothing."""
    with safe_open(folder / "teacher.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    tensors["fc.weight"] = torch.zeros_like(tensors["fc.weight"])
    save_file(tensors, folder / "chance.safetensors", metadata=metadata)


def stop_in_training(process, run, signal_number):
    """Send the signal once training has begun."""
    while not (run / "checkpoints").is_dir() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal_number)
    return finish(process)


SIGNALS = {
    "SIGINT": (signal.SIGINT, ExitCode.INTERRUPTED, ()),
    "SIGTERM with --json": (signal.SIGTERM, ExitCode.TERMINATED, ("--json",)),
}


@pytest.mark.workflow
@pytest.mark.parametrize(("signal_number", "code", "options"), SIGNALS.values(), ids=SIGNALS)
def test_signal_ends_with_a_command_that_resumes(folder, signal_number, code, options):
    """The command works as it is printed, whatever the name of the run and the other options."""
    chance_teacher(folder)
    run = Path(f"my run {code}")
    chance = ("--robust-teacher", "chance.safetensors", "--accept-teachers")
    arguments = ("recipe.toml", "--out", str(run), *chance, *LONG, *options)
    process = python("-m", "cli.main", "distill", *arguments, "--no-verify", "--no-export")
    found, out, err = stop_in_training(process, run, signal_number)
    assert found == code, err
    message = json.loads(out)["message"] if options else err
    assert "everything is saved" in message
    command = shlex.split(message.splitlines()[-1])
    assert command[:2] == ["robust-compress", "distill"]

    found, _, err = finish(python("-m", "cli.main", *command[1:], "--no-verify", "--no-export"))
    assert found == 0, err
    assert (run / "model.safetensors").is_file()

"""What the documents tell people to type exists."""

import re
import shlex
from pathlib import Path

import pytest

from cli.main import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs/from-checkpoint-to-jetson.md",
    ROOT / "docs/choosing-teachers.md",
    ROOT / "docs/comparing-methods.md",
    *(ROOT / "examples/recipes").iterdir(),
]


def commands() -> list[str]:
    """Every `robust-compress ...` line of the documents, continued lines joined."""
    found = []
    for path in DOCUMENTS:
        text = re.sub(r"^# ?", "", path.read_text(), flags=re.MULTILINE)
        text = re.sub(r"\\\n\s*", "", text)
        found += re.findall(r"^\s*(robust-compress .*)$", text, flags=re.MULTILINE)
        found += re.findall(r"^\| `(robust-compress [^`]*)` \|", text, flags=re.MULTILINE)
    return sorted({line.partition("#")[0].strip() for line in found})


def test_documents_hold_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_documented_command_parses(command, monkeypatch, capsys):
    words = shlex.split(command.replace("[", "").replace("]", "").replace("\\|", "|"))
    monkeypatch.setattr("sys.argv", [*words, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
def test_linked_files_exist(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_named_files_of_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(
        r"`((?:compressor|cli|exporters|tests|examples)/[\w./]+)(?:::\w+)?`", text
    ):
        assert (ROOT / name).exists(), name


def test_exit_codes_of_the_readme_are_those_of_the_code():
    from compressor.errors import ExitCode

    text = (ROOT / "README.md").read_text()
    cells = re.findall(r"^\| ([\d, ]+) \| ", text, flags=re.MULTILINE)
    codes = {int(number) for cell in cells for number in cell.split(",")}
    assert codes == {int(code) for code in ExitCode}

"""The README is true: its map names every file and nothing else, and every command on it is accepted."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT

from taylorvit.config_loading import build_parser, load_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def map_entries(text: str) -> list[str]:
    """Return the paths at the start of the map's columns; a line may hold two."""
    (block,) = re.findall(r"## Map\n\n```\n(.*?)```", text, re.DOTALL)
    columns = [column for line in block.splitlines() for column in re.split(r"\s{3,}", line)]
    return [column for column in columns if re.fullmatch(r"[\w./-]+\.\w+|[\w./-]+/|Makefile|\.ci/run", column)]


def unmapped(files: list[str], entries: list[str]) -> list[str]:
    """Return the files that neither the map nor a folder on it covers."""
    folders = tuple(entry for entry in entries if entry.endswith("/"))
    assert not any(folder.startswith("taylorvit") for folder in folders), "the package is mapped file by file"
    return [file for file in files if file not in entries and not file.startswith(folders)]


def test_every_file_is_on_the_map_and_every_entry_exists() -> None:
    files = subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).split()
    entries = map_entries(README)
    assert len(entries) > 30
    assert [entry for entry in entries if not (ROOT / entry).exists()] == []
    assert unmapped(files, [*entries, "README.md", ".gitignore"]) == []


def test_the_map_check_can_fail() -> None:
    assert unmapped(["taylorvit/new.py", "tests/new.py"], ["tests/", "taylorvit/old.py"]) == ["taylorvit/new.py"]
    assert map_entries("## Map\n\n```\na.py   text        b.txt   more text\n```") == ["a.py", "b.txt"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train.py" in command])
def test_train_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    arguments = words[words.index("train.py") + 1 :]
    for option, value in itertools.pairwise(words):
        assert option != "--config_file" or Path(value).is_file()
    parser = build_parser()
    parser.add_argument("--dry_run", action="store_true")
    load_config(arguments, parser)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "eval.py" in command])
def test_eval_commands_are_accepted(command: str) -> None:
    import eval as program

    words = shlex.split(command)
    _, options = load_config(words[words.index("eval.py") + 1 :], program.build_eval_parser())
    assert options["checkpoints"]


def load_program(file: Path) -> ModuleType:
    """Import a program by its path."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", [command for command in COMMANDS if not re.search(r"train\.py|eval\.py", command)])
def test_other_commands_name_what_exists(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[1] == "-m":
        importlib.import_module(f"{words[2]}.__main__").build_parser().parse_args(words[3:])
        return
    assert (ROOT / words[1]).is_file()
    if words[1].endswith(".py") and hasattr(program := load_program(ROOT / words[1]), "build_parser"):
        program.build_parser().parse_args(words[2:])


def test_the_python_examples_run() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})

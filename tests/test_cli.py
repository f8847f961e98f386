"""How programs end: one `error:` line for what the user can mend, a traceback for what is our fault, and the exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taylorvit import cli
from taylorvit.cli import NON_FINITE_EXIT_CODE, run_program

ROOT = Path(__file__).resolve().parents[1]


def raising(error: BaseException) -> int:
    raise error


def end_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """Return the exit code and what was said on stderr, where stdout stays empty."""
    with pytest.raises(SystemExit) as left:
        run_program(lambda: raising(error))
    output = capsys.readouterr()
    assert output.out == ""
    return left.value.code, output.err


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("code", [0, 143])
def test_the_code_of_main_is_the_exit_code(code: int) -> None:
    with pytest.raises(SystemExit) as left:
        run_program(lambda: code)
    assert left.value.code == code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("optim.lr: -1 is not allowed"), 2, "error: optim.lr: -1 is not allowed\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: [Errno 2] No such file or directory: 'x'\n"),
        (FloatingPointError("loss nan at update 7"), NON_FINITE_EXIT_CODE, "error: loss nan at update 7\n"),
        (ValueError("first\n  second\n"), 2, "error: first second\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
            2,
            "error: 'utf-8' codec can't decode byte 0xff in position 0: bad\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(error, capsys) == (code, line)


def test_every_process_says_which_one_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert end_of(ValueError("x"), capsys) == (2, "error: x\n")
    monkeypatch.setenv("RANK", "3")
    assert end_of(ValueError("x"), capsys) == (2, "error (process 3): x\n")
    assert end_of(FloatingPointError("x"), capsys) == (5, "error (process 3): x\n")


def test_debug_keeps_the_traceback_and_is_hidden_from_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug", "--seed=1"])
    with pytest.raises(ValueError, match="x"):
        run_program(lambda: raising(ValueError("x")))
    assert sys.argv == ["train.py", "--seed=1"]


def test_of_a_loader_worker_only_its_own_words_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    assert end_of(ValueError(f"{text}ValueError: bad.png: cut"), capsys) == (2, "error: bad.png: cut\n")


@pytest.mark.parametrize("error", [RuntimeError("ours"), AssertionError("ours"), KeyboardInterrupt(), TypeError("ours")])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_program(lambda: raising(error))


def test_other_errors_keep_their_traceback() -> None:
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("cli", {cli.__file__!r})
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)
def main():
    assert False, "a fault of ours"
cli.run_program(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "in main" in done.stderr


def test_train_answers_a_misspelt_key_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--run_dir", str(tmp_path / "run"), "--optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'optim.lrr'; did you mean 'optim.lr'?\n"
    assert not (tmp_path / "run").exists()

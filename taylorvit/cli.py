"""How the programs end: one line for an error that the user can mend, and an exit code."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable

NON_FINITE_EXIT_CODE = 5
LOST_EXIT_CODE = 6
ONE_LINE = (ValueError, OSError, FloatingPointError)  # what the user can mend, or what happened to the machine
MOST = 10**9  # of any number on the command line of a tool
MOST_THREADS = 1024


def run_program(main: Callable[[], int]) -> None:
    """Call `main` and exit with its code; an error of the types in ONE_LINE becomes one `error:` line and `exit_code_of` it.

    Each process of a distributed run says which one it is. Anything else keeps its traceback: it is a fault of ours. With
    `--debug` on the command line these errors keep theirs too.
    """
    debug = "--debug" in sys.argv
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    try:
        code = main()
    except ONE_LINE as error:
        if debug:
            raise
        print(f"error{where}: {one_line(error)}", file=sys.stderr, flush=True)
        code = exit_code_of(error)
    sys.exit(code)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an error of the types in ONE_LINE."""
    if isinstance(error, ConnectionError):
        return LOST_EXIT_CODE
    return NON_FINITE_EXIT_CODE if isinstance(error, FloatingPointError) else 2


def one_line(error: BaseException) -> str:
    """Return an error's message in one line; of an error that a loader worker passed on, only what the worker said."""
    text = str(error)
    if " worker process " in text and "Traceback" in text:  # PyTorch puts the worker's whole traceback into the message
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def need_matplotlib() -> None:
    """Raise ValueError, before any work, if a picture cannot be drawn."""
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError("the picture needs matplotlib: pip install -r requirements-dev.txt")


def need_device(device: str) -> None:
    """Raise ValueError, before any work, for a GPU that is asked for and not there."""
    import torch  # here: this module itself needs only the standard library

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")


def positive_int(text: str) -> int:
    """Read a whole number above 0 from the command line; beyond MOST, sizes leave the range of what can be addressed."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, got {text!r}")
    if int(text) > MOST:
        raise argparse.ArgumentTypeError(f"at most {MOST:,} is possible, got {text!r}")
    return int(text)


def thread_count(text: str) -> int:
    """Read a number of threads, at most MOST_THREADS, from the command line."""
    if positive_int(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"at most {MOST_THREADS} threads are possible, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Read a finite number above 0 from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, got {text!r}")
    if number > MOST:
        raise argparse.ArgumentTypeError(f"at most {MOST:,} is possible, got {text!r}")
    return number

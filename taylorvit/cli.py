"""How the programs end: one line for an error that the user can mend, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

NON_FINITE_EXIT_CODE = 5


def run_program(main: Callable[[], int]) -> None:
    """Call `main` and exit with its code; a ValueError or OSError becomes one `error:` line and code 2.

    Each process of a distributed run says which one it is. Anything else keeps its traceback: it is a fault of ours.
    """
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    try:
        code = main()
    except (ValueError, OSError, FloatingPointError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error{where}: {message}", file=sys.stderr, flush=True)
        code = NON_FINITE_EXIT_CODE if isinstance(error, FloatingPointError) else 2
    sys.exit(code)

"""Where a result comes from: commit, machine and versions, which every run and every result file carries."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Return command line, commit, date, machine and versions, as JSON types.

    `git` is None outside of a checkout of this package; `dirty` says whether the package differs from the commit. `cores` are
    those that this process may use, `threads` what PyTorch takes of them now.
    """
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git": git_state(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def git_state() -> dict[str, Any] | None:
    """Return the commit of this package's checkout and whether it was changed since; None outside of a checkout."""
    package = Path(__file__).resolve().parent
    if not _git(package, "ls-files", "__init__.py"):  # installed inside somebody else's repository
        return None
    return {"commit": _git(package, "rev-parse", "HEAD"), "dirty": bool(_git(package, "status", "--porcelain", "--", "."))}


def cpu_name() -> str:
    """Return the processor's model name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()

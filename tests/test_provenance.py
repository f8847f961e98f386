"""Where results come from: the commit, or none, the machine and the versions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from taylorvit import provenance


def test_where_a_number_comes_from() -> None:
    found = provenance.provenance()
    assert found.keys() == {"command", "git", "date", "cpu", "cores", "threads", "gpu", "torch", "python", "system"}
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    json.dumps(found)


def test_commit_and_its_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package" / "provenance.py"))
    git("init")
    assert provenance.git_state() is None  # in a checkout that does not track the package
    git("add", ".")
    git("commit", "-m", "x")
    found = provenance.git_state()
    assert found
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (tmp_path / "package" / "__init__.py").write_text("changed")
    changed = provenance.git_state()
    assert changed
    assert changed["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))  # no git program
    assert provenance.git_state() is None

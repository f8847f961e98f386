"""timm's scripts see our models: run a stand-in that creates a model by name, as train.py, validate.py and benchmark.py do."""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "timm_script.py"

STAND_IN = """
import argparse
import timm
from timm.utils import ParseKwargs
from helper import SIDE

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
args = parser.parse_args()
model = timm.create_model(args.model, img_size=SIDE, depth=1, device="meta", **args.model_kwargs)
print(__name__, type(model).__name__, type(model.blocks[0].attn).__name__, getattr(model.blocks[0].attn, "form", None))
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_script_creates_our_model_by_name(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("SIDE = 32\n")
    (tmp_path / "benchmark.py").write_text(STAND_IN)
    result = run(
        tmp_path,
        "benchmark.py",
        "--model",
        "taylorvit_tiny_patch16_224",
        "--model-kwargs",
        "attention=taylorshift",
        "attention_options={'form': 'direct'}",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["__main__", "TaylorViT", "TaylorShift", "direct"]


def test_a_missing_script_is_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "nowhere.py")
    assert result.returncode == 1
    assert result.stderr == "error: the first argument must be the path of a timm script, got nowhere.py\n"

"""Run one of timm's own scripts (train.py, validate.py, benchmark.py, ...) with the TaylorViT models registered.

timm's scripts are not part of its package: take them from its repository. Example:

    python tools/timm_script.py path/to/benchmark.py --model taylorvit_tiny_patch16_224 --model-kwargs attention=softmax
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Register the models, then run the script named by the first argument with the rest of the arguments."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        sys.exit(f"error: the first argument must be the path of a timm script, got {given}")
    sys.argv = sys.argv[1:]
    script = Path(sys.argv[0]).resolve()
    # As if Python ran the script itself, plus this repository, so that the package need not be installed.
    sys.path[0:1] = [str(script.parent), str(Path(__file__).resolve().parents[1])]
    import taylorvit  # noqa: F401  registers the models

    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()

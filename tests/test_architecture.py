"""Who may import whom, read from the imports of every module with `ast`, and what no module may call.

The table is the one of the README's map: programs -> engine -> session, evaluation, report -> components -> attention -> ops ->
complexity. A new module needs a place in it.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a part imports its own layer and the ones below, never one above.
LAYERS: list[set[str]] = [
    {"complexity", "provenance", "suggest"},
    {"ops"},
    {"attention", "benchmark"},
    {"config", "randomness"},
    {
        "adaptation",
        "bad_samples",
        "checkpoint",
        "cli",
        "config_loading",
        "data",
        "distributed",
        "export",
        "logger",
        "metrics",
        "models",
        "optim",
    }
    | {"original", "run_folder", "signals", "training_state", "weights"},
    {"evaluation", "report", "saving", "session"},
    {"engine", "studies"},
]
PROGRAMS = len(LAYERS)
LEAVES = {"complexity", "config", "randomness", "suggest"}  # import nothing of ours
LIFTABLE = {"complexity", "ops", "attention"}  # can be moved into another project
FOREIGN_TO_LIFTABLE = {"timm", "accelerate", "yaml", "jsonargparse"}
SOFTMAX = "taylorvit.attention.softmax"  # is timm's own Attention
ARITHMETIC = {"__future__", "math", "typing"}  # all that the cost formulas need
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUN_CODE = {"eval", "exec", "__import__", "torch.jit.load", "torch.hub.load", "os.system", "os.popen"}
RUN_CODE |= {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"}


def read_sources() -> dict[str, str]:
    """Return the source of every module of ours by its dotted name; a package goes by the name of its folder."""
    files = [*(ROOT / "taylorvit").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *ROOT.glob("*.py")]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: file.read_text(encoding="utf-8") for name, file in sorted(named.items())}


def imported(source: str, module: str, modules: set[str]) -> set[str]:
    """Return the dotted names that a module imports anywhere; `from package import part` names the part if that is a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*_package(module, node.level, modules), *filter(None, [node.module])])
            parts = {f"{base}.{alias.name}" for alias in node.names}
            names |= parts & modules
            if parts - modules:
                names.add(base)
    return names


def _package(module: str, level: int, modules: set[str]) -> list[str]:
    """Return the path that a relative import of so many dots starts from; an absolute one, of level 0, starts from nothing."""
    path = module.split(".")
    own = len(path) if any(other.startswith(f"{module}.") for other in modules) else len(path) - 1
    return path[: own - level + 1] if level else []


def layer_of(module: str) -> int | None:
    """Return the layer's number; the bare package counts as its models, which is all that importing it imports."""
    if not is_package(module):
        return PROGRAMS
    part = part_of(module) or "models"
    return next((number for number, layer in enumerate(LAYERS) if part in layer), None)


def part_of(module: str) -> str:
    """Return "ops" for "taylorvit.ops.reference"."""
    return [*module.split("."), ""][1]


def is_package(module: str) -> bool:
    """Whether the module belongs to the package and is not a program."""
    return module.split(".")[0] == "taylorvit"


def import_violations(sources: dict[str, str]) -> list[str]:
    """Return one line for every import that the table forbids."""
    modules, found = set(sources), []
    for module, source in sources.items():
        layer = layer_of(module)
        if layer is None:
            found.append(f"{module} is not in the table of layers")
            continue
        names = imported(source, module, modules)
        own = {name for name in names if is_package(name) or name in modules}
        for name in sorted(own):
            target = layer_of(name)
            if target is None or target > layer or (target == layer == PROGRAMS):
                found.append(f"{module} imports {name}, which is not below it")
            if part_of(module) in LEAVES and is_package(module) and part_of(name) != part_of(module):
                found.append(f"{module} imports {name}, but is a leaf")
        if is_package(module) and part_of(module) in LIFTABLE and module != SOFTMAX:
            foreign = {name for name in names if name.split(".")[0] in FOREIGN_TO_LIFTABLE}
            found += [f"{module} imports {name}" for name in sorted(foreign)]
        if module == "taylorvit.complexity" and (foreign := names - ARITHMETIC):
            found.append(f"{module} imports {', '.join(sorted(foreign))}; it needs math alone")
    return found


def import_cycle(sources: dict[str, str]) -> list[str]:
    """Return the modules of one circle of imports, or nothing. A part of a package may import it, as the package imports it."""
    modules = set(sources)
    graph = {module: imported(source, module, modules) & modules - {module} for module, source in sources.items()}
    for module, targets in graph.items():
        graph[module] = {target for target in targets if not module.startswith(f"{target}.")}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def unsafe_calls(source: str) -> Iterator[str]:
    """Yield what in a module could run code that comes with data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: import of {name}" for name in names if name.split(".")[0] in PICKLES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in RUN_CODE:
            yield f"line {node.lineno}: {called}"
        if given.get("shell", "False") != "False":
            yield f"line {node.lineno}: {called} through a shell"
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if given.get("allow_pickle", "False") != "False":
            yield f"line {node.lineno}: allow_pickle in {called}"


def test_imports_follow_the_layers() -> None:
    sources = read_sources()
    assert {"taylorvit", "taylorvit.ops.reference", "taylorvit.engine", "train", "tools.timm_script"} <= sources.keys()
    assert import_violations(sources) == []


def test_imports_make_no_circle() -> None:
    assert import_cycle(read_sources()) == []


def test_every_place_in_the_table_is_taken() -> None:
    parts = {part_of(module) for module in read_sources() if is_package(module)} - {""}
    assert set().union(*LAYERS) == parts


@pytest.mark.fault("E5")
def test_nothing_runs_code_from_data() -> None:
    found = {module: list(unsafe_calls(source)) for module, source in read_sources().items()}
    assert {module: lines for module, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("module", "source", "blamed"),
    [
        ("taylorvit.ops.bad", "from taylorvit.attention import TaylorShift", "taylorvit.attention"),
        ("taylorvit.ops.bad", "from taylorvit.config import Config", "taylorvit.config"),
        ("taylorvit.ops.bad", "from ..config import Config", "taylorvit.config"),
        ("taylorvit.ops.bad", "from .. import engine", "taylorvit.engine"),
        ("taylorvit.ops.bad", "def f():\n    import timm.layers", "timm.layers"),
        ("taylorvit.attention.bad", "from timm.layers import Attention", "timm.layers"),
        ("taylorvit.attention.bad", "import yaml", "yaml"),
        ("taylorvit.complexity", "import torch", "torch"),
        ("taylorvit.data.bad", "from taylorvit import engine", "taylorvit.engine"),
        ("taylorvit.metrics", "import taylorvit.session", "taylorvit.session"),
        ("taylorvit.config", "from taylorvit.randomness import seed_all", "leaf"),
        ("taylorvit.session", "if True:\n    from taylorvit.engine import train", "taylorvit.engine"),
        ("taylorvit.engine", "import train", "train"),
        ("tools.bad", "from train import main", "train"),
        ("taylorvit.novelty", "", "not in the table"),
        ("taylorvit.models", "from taylorvit.novelty import x", "taylorvit.novelty"),
    ],
)
def test_a_forbidden_import_is_reported(module: str, source: str, blamed: str) -> None:
    healthy = {"taylorvit.engine": "", "taylorvit.randomness": "", "train": "from taylorvit import engine"}
    assert import_violations(healthy) == []
    found = import_violations({**healthy, module: source})
    assert len(found) == 1
    assert module in found[0]
    assert blamed in found[0]


def test_a_circle_is_reported() -> None:
    sources = {"taylorvit.metrics": "import taylorvit.optim", "taylorvit.optim": "from taylorvit import metrics"}
    assert set(import_cycle(sources)) == set(sources)


@pytest.mark.fault("E5")
@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "torch.jit.load(path)",
        "os.system(line)",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=flag)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_an_unsafe_call_is_reported(source: str) -> None:
    assert len(list(unsafe_calls(source))) == 1


def test_a_safe_call_is_not_reported() -> None:
    source = "model.eval()\nyaml.safe_load(text)\ntorch.load(path, weights_only=True)\nsafetensors.torch.load(content)\n"
    source += "subprocess.run(words, shell=False)\nos.path.join(folder)\ntorch.jit.script(function)"
    assert list(unsafe_calls(source)) == []

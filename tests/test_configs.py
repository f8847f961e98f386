"""The shipped files that start runs: configs load, build and train a step; recipes, twins and launch files keep their word."""

from __future__ import annotations

import gzip
import itertools
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, write_digit_folder

from taylorvit import engine
from taylorvit.attention import ATTENTIONS
from taylorvit.complexity import flops_crossover
from taylorvit.config import Config
from taylorvit.config_loading import config_to_dict, flatten, load_config
from taylorvit.data import epoch_updates
from taylorvit.data.listops import Shape
from taylorvit.distributed import split_batch
from taylorvit.models import SequenceEncoder, attention_forms, build_model
from taylorvit.optim import build_optimizer, build_scheduler, current_learning_rate
from taylorvit.run_folder import RunFolder
from taylorvit.studies.comparison import arguments_of, find_task
from taylorvit.studies.published import SYSTEMS, TASKS

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
IMAGENET = [name for name in CONFIGS if name.startswith("imagenet")]
FROM_SCRATCH = [name for name in IMAGENET if "_ft" not in name]
FINE_TUNING = [name for name in IMAGENET if "_ft" in name]
TAYLORVIT_WITH_TWIN = ["imagenet_taylorvit_tiny", "imagenet_taylorvit_small", "fashion_mnist_taylorvit"]
SYSTEM_LAYERS = sorted(path.stem for path in (ROOT / "configs" / "attentions").glob("*.yaml"))
SBATCH = ROOT / "configs" / "slurm" / "train_multi_node.sbatch"

# The authors' configuration; the number of epochs is an assumption.
RECIPE = {
    "optim.name": "lamb",
    "optim.lr": 3e-3,
    "optim.lr_scaling": "none",
    "optim.eps": 1e-7,
    "optim.weight_decay": 0.02,
    "optim.decay_temperature": False,
    "optim.layer_decay": None,
    "optim.max_grad_norm": 1.0,
    "schedule.name": "cosine",
    "schedule.epochs": 300,
    "schedule.warmup_epochs": 5.0,
    "schedule.warmup_lr": 1e-6,
    "schedule.min_lr": 1e-5,
    "train.global_batch_size": 2048,
    "train.mixed_precision": "bf16",
    "train.loss": "cross_entropy",
    "train.compile": True,
    "train.ema_decay": None,
    "augment.crop": "simple",
    "augment.crop_padding": 4,
    "augment.hflip": 0.5,
    "augment.three_augment": True,
    "augment.color_jitter": 0.3,
    "augment.auto_augment": None,
    "augment.random_erasing": 0.0,
    "augment.mixup_alpha": 0.0,
    "augment.cutmix_alpha": 1.0,
    "augment.mix_prob": 1.0,
    "augment.label_smoothing": 0.1,
    "model.drop_path_rate": 0.05,
    "model.drop_rate": 0.0,
    "model.img_size": 224,
    "data.interpolation": "bicubic",
    "data.crop_pct": 1.0,
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
}
PARAMETERS = {
    "taylorvit_tiny": 5_721_868,
    "softmax_tiny": 5_721_832,
    "taylorvit_small": 22_059_568,
    "softmax_small": 22_059_496,
}


def load(name: str, *overrides: str) -> Config:
    """Load a shipped config with overrides of the form key=value."""
    return load_config(["--config", str(ROOT / "configs" / f"{name}.yaml"), *(f"--{override}" for override in overrides)])[0]


def head_of(name: str) -> str:
    """Return the comment that a shipped config opens with."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    return "".join(re.match(r"(#.*\n)*", text)[0].replace("# ", " "))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_loads_and_builds(name: str) -> None:
    config = load(name)
    assert config.run_dir == f"runs/{name}"
    model = build_model(config.model, device="meta")
    kind = "softmax" if "softmax" in name else "direct"  # all have fewer than N0 tokens
    assert attention_forms(model) == [kind] * len(model.blocks)
    is_sequence = isinstance(model, SequenceEncoder)
    tokens = model.num_tokens if is_sequence else model.patch_embed.num_patches + model.num_prefix_tokens
    assert tokens <= flops_crossover(model.embed_dim // model.blocks[0].attn.num_heads)
    if name in FROM_SCRATCH:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name.removeprefix("imagenet_")]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_opens_with_its_record(name: str) -> None:
    head = head_of(name)
    entries = ("Command:",) if name == "quickstart" else ("Command:", "Hardware:", "Time:", "Result:", "Source:")
    assert [entry for entry in entries if entry not in head] == []
    assert f"configs/{name}.yaml" in head
    for file in re.findall(r"configs/[\w/]+\.yaml", head):
        assert (ROOT / file).is_file()


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_imagenet_configs_hold_the_recipe(name: str) -> None:
    values = flatten(config_to_dict(load(name)))
    assert {key: values[key] for key in RECIPE} == RECIPE
    assert all(type(values[key]) is type(value) for key, value in RECIPE.items())
    assert "ASSUMPTION" in head_of(name)


@pytest.mark.parametrize("name", TAYLORVIT_WITH_TWIN)
def test_softmax_twin_differs_in_attention_only(name: str) -> None:
    first, second = (flatten(config_to_dict(load(name.replace("taylorvit", kind)))) for kind in ("taylorvit", "softmax"))
    assert {key for key in first if first[key] != second[key]} == {"run_dir", "model.attention"}


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize(("img_size", "tokens"), [(384, 577), (512, 1025)])
def test_fine_tuning_continues_its_base(size: str, img_size: int, tokens: int) -> None:
    base, config = load(f"imagenet_taylorvit_{size}"), load(f"imagenet_taylorvit_{size}_ft{img_size}")
    assert config.train.finetune == base.run_dir
    assert (config.model.name, config.model.attention) == (base.model.name, base.model.attention)
    assert config.data == base.data
    model = build_model(config.model, device="meta")
    assert model.patch_embed.num_patches + model.num_prefix_tokens == tokens
    head = head_of(f"imagenet_taylorvit_{size}_ft{img_size}").replace(",", "")
    assert f"{tokens} tokens" in head
    assert f"{img_size} px" in head


@pytest.mark.parametrize("name", IMAGENET)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_imagenet_batch_divides_over_the_processes_it_names(name: str, world_size: int) -> None:
    train = load(name).train
    split = split_batch(train.global_batch_size, train.micro_batch_size, rank=0, world_size=world_size)
    assert split.world_size * split.micro_batch_size * split.accumulation == train.global_batch_size


@pytest.mark.parametrize(
    ("name", "samples", "warmup", "updates"), [("listops", 96_000, 1_000, 5_000), ("imdb_bytes", 22_500, 8_000, 20_000)]
)
def test_text_tasks_hold_the_training_of_long_range_arena(name: str, samples: int, warmup: int, updates: int) -> None:
    config = load(name)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config.optim, global_batch_size=config.train.global_batch_size)
    assert type(optimizer) is torch.optim.AdamW
    settings = {(group["betas"], group["eps"]) for group in optimizer.param_groups}
    assert (settings, config.train.global_batch_size, config.optim.max_grad_norm) == ({((0.9, 0.98), 1e-9)}, 32, None)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
    updates_per_epoch = epoch_updates(samples, 32, config.schedule.updates_per_epoch)
    assert updates_per_epoch * config.schedule.epochs == updates
    scheduler = build_scheduler(optimizer, config.schedule, updates_per_epoch=updates_per_epoch)
    for update in (0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, 2 * warmup, updates - 1, updates):
        scheduler.step_update(update)
        expected = 0.05 * min(1, update / warmup) / math.sqrt(max(update, warmup))
        assert current_learning_rate(optimizer) == pytest.approx(expected, rel=1e-4), update


def write_idx(folder: Path, stem: str, count: int) -> None:
    """Write the two files of a Fashion-MNIST split with `count` grey images; labels 0..9 in turn."""
    pixels = bytes(value % 251 for value in range(count * 28 * 28))
    for kind, header in (("images-idx3", (0x0803, count, 28, 28)), ("labels-idx1", (0x0801, count))):
        content = pixels if kind.startswith("images") else bytes(number % 10 for number in range(count))
        with gzip.open(folder / f"{stem}-{kind}-ubyte.gz", "wb") as file:
            file.write(struct.pack(f">{len(header)}I", *header) + content)


def write_listops(folder: Path, *, train: int, val: int) -> None:
    """Write short expressions, all different, as the program does."""
    from tools.make_listops import draw_samples, write_split

    folder.mkdir()
    samples = draw_samples(0, Shape(min_length=5, max_length=20), jobs=1)
    for split, count in (("train", train), ("val", val)):
        write_split(folder / f"basic_{split}.tsv", samples, count)


def write_reviews(folder: Path, count: int) -> None:
    """Write `count` training reviews, half of each class."""
    for number, name in itertools.product(range(count // 2), ("neg", "pos")):
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
        (folder / "train" / name / f"{number}_1.txt").write_text(f"{name} " * (number + 1))


def shrunken(name: str, *layers: str) -> Config:
    """Return a shipped config cut down to one update of 8 images: fewer tokens, narrower, shallower, not compiled, on CPU.

    `layers` are arguments that follow it on the command line, such as `--config FILE`.
    """
    config = load(name)
    heads = build_model(config.model, device="meta").blocks[0].attn.num_heads
    side = config.model.img_size // 112 if name in IMAGENET else config.model.img_size // (config.model.patch_size or 16) // 2
    dataset = config.data.dataset.replace("digits", "folder").replace("torch/cifar10", "folder")  # which they are, only larger
    is_sequence = config.model.max_length is not None
    size = (
        {"model.max_length": min(config.model.max_length, 784)}
        if is_sequence
        else {"model.img_size": side * (config.model.patch_size or 16)}
    )
    changes = {
        **size,
        "model.embed_dim": 8 * heads,
        "model.depth": 2,
        "model.num_classes": 2 if dataset == "imdb" else 10,
        "data.dataset": dataset,
        "data.root": dataset.removeprefix("pixels/"),
        "data.train_split": "train",  # parts of ten images would be empty
        "data.val_split": "train" if dataset == "imdb" else "val",
        "data.num_workers": 0,
        "schedule.epochs": 1,
        "schedule.updates_per_epoch": "null",
        "schedule.warmup_epochs": 0.5,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.compile": False,
        "evaluate.batch_size": 8,
        "device": "cpu",
    }
    file = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    return load_config([*file, *layers, *(f"--{key}={value}" for key, value in changes.items())])[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with ten training and ten validation images for every kind of data set that the configs name."""
    folder = tmp_path_factory.mktemp("runs_of_every_config")
    write_digit_folder(folder / "folder", train=10, val=10)
    (folder / "fashion_mnist").mkdir()
    for stem in ("train", "t10k"):
        write_idx(folder / "fashion_mnist", stem, 10)
    write_listops(folder / "listops", train=10, val=10)
    write_reviews(folder / "imdb", 10)
    return folder


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", [*(name for name in CONFIGS if name not in FINE_TUNING), *FINE_TUNING])
def test_config_trains_one_shrunken_step(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)  # run_dir and finetune stay as shipped: fine-tuning finds what its base wrote
    config = shrunken(name)
    if config.train.finetune and not Path(config.train.finetune).exists():
        pytest.skip("its base did not run in this session")
    assert engine.train(config) == 0
    run = RunFolder(config.run_dir)
    assert run.read_status()["state"] == "finished"
    assert [record["update"] for record in run.read_metrics() if record["kind"] == "train"] == [1]
    assert (run.path / "export" / "model.safetensors").is_file()


def extra_parameters(system: str, tokens: int, width: int, heads: int) -> int:
    """Return how many parameters more a layer has than softmax attention."""
    head_dim = width // heads
    return {
        "taylorshift": heads,  # temperatures
        "linformer": 2 * tokens * 256,  # E and F
        "rfa": width,  # sigma
        "reformer": -width * (width + 1),  # queries are keys
        "eva": 2 * head_dim * (head_dim + 1),  # two projections of means
    }.get(system, 0)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("task", TASKS)
def test_every_system_builds_on_every_task(task: str, system: str) -> None:
    model, twin = (
        build_model(load_config(arguments_of(find_task(task), name, [], []))[0].model, device="meta")
        for name in (system, "softmax")
    )
    assert all(isinstance(block.attn, ATTENTIONS[system]) for block in model.blocks)
    tokens = twin.num_tokens if isinstance(twin, SequenceEncoder) else twin.patch_embed.num_patches + twin.num_prefix_tokens
    extra = extra_parameters(system, tokens, twin.embed_dim, twin.blocks[0].attn.num_heads)
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, twin)]
    assert counts[0] - counts[1] == len(twin.blocks) * extra


@pytest.mark.parametrize("name", SYSTEM_LAYERS)
def test_system_layer_holds_a_system_and_no_more(name: str) -> None:
    text = (ROOT / "configs" / "attentions" / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert text.startswith("# ")
    assert content.keys() == {"model"}
    assert content["model"]["attention"] == name.removesuffix("_sequence")
    extra = {"kwargs"} if name == "linformer_sequence" else set()  # it cannot leave out padding
    assert content["model"].keys() == {"attention", "attention_options"} | extra
    assert {layer.removesuffix("_sequence") for layer in SYSTEM_LAYERS} == set(SYSTEMS)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_softmax_layer_gives_the_softmax_twin(size: str) -> None:
    layered, _ = load_config(arguments_of(find_task(f"imagenet_taylorvit_{size}"), "softmax", [], []))
    first, second = (flatten(config_to_dict(config)) for config in (layered, load(f"imagenet_softmax_{size}")))
    assert {key for key in first if first[key] != second[key]} == {"run_dir"}


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", SYSTEM_LAYERS)
def test_system_trains_one_shrunken_step(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = "imagenet_taylorvit_tiny" if f"{name}_sequence" in SYSTEM_LAYERS else "listops_short"  # whose sequences are padded
    monkeypatch.chdir(workplace)
    layer = str(ROOT / "configs" / "attentions" / f"{name}.yaml")
    config = shrunken(task, "--config", layer, f"--run_dir=runs/system_{name}")
    assert engine.train(config) == 0
    records = [record for record in RunFolder(config.run_dir).read_metrics() if record["kind"] == "train"]
    assert [record["update"] for record in records] == [1]
    assert records[0]["grad_norm"] > 0


def accelerate_arguments(file: str, *more: str):
    """Return what accelerate makes of a launch file, and the loaded file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = ["--config_file", str(ROOT / "configs" / "accelerate" / file), *more, "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[:2]


@pytest.mark.parametrize(
    ("file", "machines", "processes"),
    [("one_gpu.yaml", 1, 1), ("one_node.yaml", 1, 8), ("multi_node.yaml", 2, 16), ("cpu.yaml", 1, 2)],
)
def test_launch_file_starts_what_it_says(file: str, machines: int, processes: int) -> None:
    arguments, loaded = accelerate_arguments(file)
    assert (arguments.num_machines, arguments.num_processes) == (machines, processes)
    assert arguments.multi_gpu == (processes > 1)  # otherwise accelerate starts one process, whatever the count
    assert arguments.dynamo_backend == "no"
    assert arguments.gradient_accumulation_steps in (None, 1)
    assert loaded.mixed_precision is None  # train.mixed_precision says it
    assert set(yaml.safe_load((ROOT / "configs" / "accelerate" / file).read_text())) <= set(vars(loaded)) | {"dynamo_backend"}


def test_cpu_launch_file_starts_two_processes(tmp_path: Path) -> None:
    launch_file = ROOT / "configs" / "accelerate" / "cpu.yaml"
    program = [str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "quickstart.yaml"), "--device", "cpu", "--dry_run"]
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_file), *program],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"\b2 process", result.stdout), result.stdout
    assert "= 2 process(es) x" in result.stdout


def run_batch_script(folder: Path, *arguments: str, status: str, srun_code: int) -> tuple[int, list[str]]:
    """Run the Slurm script with stand-ins for Slurm's programs; return its exit code and what they were called with."""
    calls = folder / "calls"
    programs = {
        "scontrol": f'echo "scontrol $*" >> {calls}\nif [ "$1" = show ]; then echo first; echo second; fi',
        "srun": f'echo "srun $*" >> {calls}\necho "timeout $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >> {calls}\nexit {srun_code}',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "run").mkdir()
    RunFolder(folder / "run").write_status(status, update=3, epoch=0, message="SIGTERM")
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    environment = os.environ | slurm | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python"}
    code = subprocess.run(["bash", str(SBATCH), *arguments], cwd=folder, env=environment, timeout=60, check=False).returncode
    return code, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(("status", "srun_code", "queued_again"), [("preempted", 1, 1), ("failed", 1, 0), ("finished", 0, 0)])
def test_slurm_script_queues_a_preempted_job_again(tmp_path: Path, status: str, srun_code: int, queued_again: int) -> None:
    code, calls = run_batch_script(tmp_path, "--run_dir", "run", "--seed=1", status=status, srun_code=srun_code)
    assert code == srun_code
    assert calls.count("scontrol requeue 77") == queued_again
    (started,) = [call for call in calls if call.startswith("srun")]
    assert "--nnodes=2 --nproc_per_node=8" in started
    assert "--rdzv_endpoint=first:" in started
    assert started.endswith("train.py --run_dir run --seed=1 --resume auto")
    assert int(next(call for call in calls if call.startswith("timeout")).split()[1]) > 30


def test_slurm_script_wants_a_run_dir(tmp_path: Path) -> None:
    assert run_batch_script(tmp_path, "--seed", "1", status="running", srun_code=0) == (2, [])


@pytest.mark.parametrize("target", ["help", "quickstart", "test", "test-gpu", "check", "format", "clean"])
def test_make_knows_its_targets(target: str) -> None:
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    for program in re.findall(r"(?<![\w*])([\w/]+\.py)\b", result.stdout):
        assert (ROOT / program).is_file()

"""Splitting the global batch, and refusing launches that would train something else than what was asked for."""

from __future__ import annotations

import itertools
import re
import socket
from typing import Any

import pytest
import torch

from taylorvit import distributed
from taylorvit.distributed import LostProcessError, Peers, build_accelerator, check_launch, split_batch

LAUNCHER_VARIABLES = (
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU",
    "TORCHELASTIC_USE_AGENT_STORE",
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None) -> None:
    """Run as one process that no launcher started."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


# ---- the global batch


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), list(itertools.product((1, 2, 3, 8), (1, 2, 5, 16), (1, 2, 3, 7)))
)
def test_micro_batches_tile_the_global_batch(world_size: int, micro: int, accumulation: int) -> None:
    total = world_size * micro * accumulation
    seen: list[int] = []
    for step, rank in itertools.product(range(accumulation), range(world_size)):
        split = split_batch(total, micro, rank=rank, world_size=world_size)
        assert (split.accumulation, split.micro_batch_size, split.global_batch_size) == (accumulation, micro, total)
        seen += range(split.offset(step), split.offset(step) + split.micro_batch_size)
    assert seen == list(range(total))


def test_no_micro_batch_size_takes_a_process_share_at_once() -> None:
    split = split_batch(96, None, rank=2, world_size=4)
    assert (split.micro_batch_size, split.accumulation, split.offset(0)) == (24, 1, 48)


@pytest.mark.fault("B6")
@pytest.mark.parametrize(
    ("total", "micro", "world_size"),
    [
        (10, None, 4),
        (2, None, 4),
        (1000, None, 3),
        (2048, 100, 8),
        (64, 128, 1),
        (7, 2, 1),
        (1, 3, 5),
        (33, 16, 2),
        (48, 32, 1),
    ],
)
def test_an_impossible_split_names_a_size_that_works(total: int, micro: int | None, world_size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^train\.global_batch_size: {total} cannot be split over {world_size} process"
    ) as caught:
        split_batch(total, micro, rank=0, world_size=world_size)
    proposed = int(re.search(r"(\d+) could", str(caught.value))[1])  # type: ignore[index]
    split = split_batch(proposed, micro, rank=0, world_size=world_size)
    assert split.accumulation * split.micro_batch_size * world_size == proposed
    unit = world_size * (micro or max(total // world_size, 1))
    assert proposed == unit or abs(proposed - total) <= unit / 2


# ---- launches


def check(**changes: Any) -> None:
    """Check a launch of one process that asks for nothing, but for the changes."""
    plain = {"mixed_precision": "no", "num_processes": 1, "gradient_accumulation_steps": 1}
    check_launch(**(plain | {"dynamo_backend": "NO", "distributed_type": "NO"} | changes))


@pytest.mark.fault("E7")
def test_more_processes_than_accelerate_sees_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: two launched processes that each believe to be alone, and write the same folder."""
    check()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE is 2 but accelerate started 1 process: .*torchrun"):
        check()
    check(num_processes=2, distributed_type="MULTI_CPU")
    check(num_processes=2, distributed_type="MULTI_GPU")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps to 4; set train.micro_batch_size instead"),
        ({"dynamo_backend": "INDUCTOR"}, "dynamo_backend to INDUCTOR; set train.compile instead"),
        ({"distributed_type": "FSDP"}, "distributed_type to FSDP"),
        ({"distributed_type": "DEEPSPEED"}, "distributed_type to DEEPSPEED"),
    ],
)
def test_settings_of_the_run_that_the_launcher_makes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^the launcher sets {message}"):
        check(**changes)


def test_one_process_on_the_cpu() -> None:
    accelerator = build_accelerator(device="cpu", mixed_precision="bf16", timeout_seconds=5)
    assert (accelerator.device, accelerator.num_processes, accelerator.mixed_precision) == (torch.device("cpu"), 1, "bf16")
    assert accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3", "gradient_accumulation_steps to 3"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend to INDUCTOR"),
    ],
)
def test_the_launcher_speaks_through_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        build_accelerator(device="cpu", mixed_precision="no", timeout_seconds=5)


def test_the_config_decides_the_precision_and_a_launcher_that_disagrees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate launch says when nobody asked for anything
    assert build_accelerator(device="cpu", mixed_precision="bf16", timeout_seconds=5).mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check(mixed_precision="bf16")
    with pytest.raises(ValueError, match="^the launcher sets mixed_precision to bf16, but train.mixed_precision is no$"):
        check(mixed_precision="no")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^2 processes were started on a machine with 1 GPU"):
        build_accelerator(device="auto", mixed_precision="no", timeout_seconds=5)


def test_fp16_without_a_gpu_is_refused() -> None:
    """accelerate takes it and then computes in fp32 without a word."""
    with pytest.raises(ValueError, match=r"^train.mixed_precision: 'fp16' needs a GPU; use bf16 or no"):
        build_accelerator(device="cpu", mixed_precision="fp16", timeout_seconds=5)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device: 'cuda' was asked for, but torch sees no GPU"):
        build_accelerator(device="cuda", mixed_precision="no", timeout_seconds=5)
    with pytest.raises(ValueError, match="needs a GPU"):
        build_accelerator(device="auto", mixed_precision="fp16", timeout_seconds=5)
    assert build_accelerator(device="auto", mixed_precision="no", timeout_seconds=5).device.type == "cpu"


# ---- processes that are lost


class Store(dict):
    """The launcher's store, in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key] for key in keys]

    def add(self, key: str, count: int) -> int:
        self[key] = self.get(key, 0) + count
        return self[key]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[Peers]:
    """Three processes of one run."""
    monkeypatch.setattr(Peers, "SETTLE_SECONDS", 0.0)
    alone = build_accelerator(device="cpu", mixed_precision="no", timeout_seconds=5)
    store, peers = Store(), [Peers(alone) for _ in range(3)]
    for rank, peer in enumerate(peers):
        peer.rank, peer.world_size, peer._store = rank, 3, store  # type: ignore[assignment]
        peer.note("update 7")
    return peers


GLOO = "[/x/gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:1. This is typically caused by a crash. GLHF!"


@pytest.mark.fault("A10")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 10000ms for recv operation to complete"),
        torch.distributed.DistBackendError("NCCL error"),
    ],
)
def test_a_survivor_names_who_is_gone_and_where_all_stood(three: list[Peers], error: RuntimeError) -> None:
    first, second, third = three
    third.note("update 8, loading images")
    second.explain(error)
    lost = first.explain(error)
    assert isinstance(lost, LostProcessError)
    assert str(lost).startswith("lost process 2 (update 8, loading images); process 0 waited in update 7: ")
    assert "GLHF" not in str(lost)
    assert "gloo/" not in str(lost)
    assert first.explain(lost) is lost


def test_one_error_is_said_once_by_all_processes(three: list[Peers]) -> None:
    first, second, third = three
    own = ValueError("bad image")
    assert second.explain(own) is own
    assert second.is_first_to_say(own)
    assert not third.is_first_to_say(ValueError("bad image"))
    lost = first.explain(RuntimeError(GLOO))
    assert "lost process 1 (update 7: ValueError: bad image) and process 2 (update 7)" in str(lost)
    assert not first.is_first_to_say(lost)
    assert first.is_first_to_say(ValueError("another one"))


def test_faults_of_ours_stay_what_they_are(three: list[Peers]) -> None:
    error = RuntimeError("shapes do not match")
    assert three[0].explain(error) is error


@pytest.mark.fault("A1")
def test_a_launcher_that_takes_no_notes_is_gone_and_disturbs_nothing(
    three: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.distributed.DistNetworkError("Broken pipe")

    assert not three[0].cut_off
    monkeypatch.setattr(Store, "set", refuse)
    three[0].note("update 8")
    assert (three[0].cut_off, three[0].where) == (True, "update 8")


@pytest.mark.fault("A1")
def test_a_process_whose_launcher_died_while_it_started_leaves_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store is not there, and is not waited for as long as the run's timeout."""
    monkeypatch.setattr(distributed, "STORE_SECONDS", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "WORLD_SIZE": "2", "RANK": "0"}
        for name, value in (values | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LostProcessError, match=r"^lost the launcher at 127\.0\.0\.1, port \d+: .*refused"):
            build_accelerator(device="cpu", mixed_precision="no", timeout_seconds=20)

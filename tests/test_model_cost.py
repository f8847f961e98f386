"""What whole models cost: candidates and their check, one pass, speed, memory, the best batch, and what becomes of failures."""

from __future__ import annotations

import dataclasses
import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taylorvit.benchmark.memory import can_measure_on_cpu
from taylorvit.benchmark.timing import CandidateError, Comparison
from taylorvit.config import ModelConfig
from taylorvit.metrics import forward_flops
from taylorvit.ops import IMPLEMENTATIONS, form_table, reference
from taylorvit.studies import model_cost, model_passes
from taylorvit.studies.model_candidates import VARIANTS, Candidate, Verdict, candidate_from_dict, check_logits, inspect_model
from taylorvit.studies.model_cost import BestBatch, best_batch_size, enter_memory, measure_speed, new_row, peak_memory
from taylorvit.studies.model_passes import Pass, Settings, build_pass, make_inputs

IMAGES = ModelConfig(num_classes=5, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
POOLED = dataclasses.replace(IMAGES, kwargs={"global_pool": "avg"})  # no class token, which is nothing but attention
TOKENS = ModelConfig("taylorvit_sequence", num_classes=3, vocab_size=7, max_length=20, embed_dim=32, depth=1, num_heads=2)
QUICK = Settings(seconds=0.001, min_rounds=1, threads=1)


def wrong_direct(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """TaylorShift that forgot to halve the square."""
    unit_q, unit_k = reference.unit_vectors(q.float()), reference.unit_vectors(k.float())
    x = temperature[:, None, None] * unit_q @ unit_k.transpose(-2, -1)
    w = 1 + x + x * x
    y = (q.shape[-2] / q.shape[-1]) ** 0.5 * (w @ v.float()) / w.sum(dim=-1, keepdim=True)
    return y.to(v.dtype)


# Candidates


def test_a_variant_replaces_the_attention_and_keeps_the_other_options() -> None:
    model = dataclasses.replace(IMAGES, attention_options={"form": "efficient", "temperature_init": 2.0})
    configs = {name: Candidate(name, model, name).config for name in VARIANTS}
    assert configs["config"] == model
    assert configs["taylorshift"].attention_options == {"form": "auto", "temperature_init": 2.0}
    assert configs["taylorshift_direct"].attention_options == {"form": "direct", "temperature_init": 2.0}
    assert {configs[name].attention for name in ("softmax", "softmax_unfused")} == {"softmax"}
    baseline = dataclasses.replace(IMAGES, attention="softmax")
    assert Candidate("a", baseline, "taylorshift_efficient").config.attention_options == {"form": "efficient"}


def test_unfused_softmax_is_the_same_function_without_the_fused_kernel() -> None:
    fused, unfused = (Candidate(name, IMAGES, name).build().eval() for name in ("softmax", "softmax_unfused"))
    assert [block.attn.fused_attn for block in (*fused.blocks, *unfused.blocks)] == [True, True, False, False]
    inputs, _ = make_inputs(IMAGES, 2, "cpu", 0)
    torch.testing.assert_close(fused(inputs), unfused(inputs))


def test_candidates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'sofmax'; did you mean 'softmax'"):
        Candidate("a", IMAGES, "sofmax")
    with pytest.raises(ValueError, match="'resnet18' has no layer of timm's Attention"):
        Candidate("a", ModelConfig("resnet18", attention="softmax"), "softmax_unfused").build("meta")


def test_a_candidate_survives_the_way_to_another_process() -> None:
    candidate = Candidate("a", TOKENS, "softmax_unfused")
    assert candidate_from_dict(dataclasses.asdict(candidate)) == candidate


def test_the_structure_is_that_of_the_model_that_runs() -> None:
    structure = inspect_model(Candidate("a", IMAGES, "taylorshift_efficient"), training=False, device="cpu")
    assert (structure.form, structure.num_tokens, structure.num_heads, structure.head_dim) == ("efficient", 17, 2, 16)
    assert (structure.embed_dim, structure.img_size) == (32, 16)
    assert structure.weight_bytes == 4 * structure.parameters
    config = dataclasses.replace(IMAGES, attention_options={"form": "efficient", "impl": "cpu"})
    assert structure.flops_per_sample == forward_flops(Candidate("b", config).build("meta"), (3, 16, 16))
    sequence = inspect_model(Candidate("a", TOKENS, "softmax"), training=False, device="cpu")
    assert (sequence.form, sequence.num_tokens, sequence.img_size) == ("softmax", 21, None)
    convolutional = inspect_model(Candidate("a", ModelConfig("resnet18", attention="softmax")), training=False, device="cpu")
    assert (convolutional.form, convolutional.num_tokens, convolutional.head_dim) == ("", None, None)
    assert convolutional.flops_per_sample > 3e9


# The check


@pytest.mark.parametrize(
    ("model", "precision"),
    [(IMAGES, "no"), (IMAGES, "bf16"), (TOKENS, "no"), (TOKENS, "bf16"), (TOKENS, "fp16"), (POOLED, "no")],
)
def test_right_logits_pass_and_wrong_ones_do_not(model: ModelConfig, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = Candidate("a", model, "taylorshift_direct")
    assert check_logits(candidate, precision=precision) == Verdict(True)
    monkeypatch.setitem(IMPLEMENTATIONS["cpu"], "direct", wrong_direct)
    verdict = check_logits(candidate, precision=precision)
    assert not verdict.passed
    assert "off the reference's" in verdict.note
    assert check_logits(Candidate("a", model, "softmax"), precision=precision).passed


def test_logits_that_are_no_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS["cpu"], "direct", lambda q, k, v, temperature: v * float("nan"))
    assert not check_logits(Candidate("a", IMAGES, "taylorshift_direct")).passed


def test_the_form_that_only_training_takes_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted(form_table.crossover(16, "cpu", training) for training in (False, True))
    num_tokens = round((first + second) / 2)
    assert first < num_tokens < second
    candidate = Candidate("a", dataclasses.replace(TOKENS, max_length=num_tokens - 1), "taylorshift")
    assert check_logits(candidate).passed
    monkeypatch.setitem(IMPLEMENTATIONS["cpu"], "direct", wrong_direct)
    assert not check_logits(candidate).passed
    monkeypatch.undo()
    monkeypatch.setitem(IMPLEMENTATIONS["cpu"], "efficient", wrong_direct)
    assert not check_logits(candidate).passed


# One pass


def test_a_training_pass_ends_without_gradients_and_an_inference_pass_has_none() -> None:
    call = build_pass(Candidate("a", TOKENS), 3, True, QUICK)
    reached: list[tuple[int, ...]] = []
    call.model.head.weight.register_hook(lambda gradient: reached.append(tuple(gradient.shape)))
    inputs = make_inputs(TOKENS, 5, "cpu", 0)
    assert call(*inputs).shape == ()
    assert reached == [(3, 32)]
    assert all(parameter.grad is None for parameter in call.model.parameters())
    logits = build_pass(Candidate("a", TOKENS), 3, False, QUICK)(*inputs)
    assert (logits.shape, logits.requires_grad) == ((3, 3), False)


def test_a_pass_runs_in_the_precision_asked_for() -> None:
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        settings = dataclasses.replace(QUICK, precision=precision)
        assert build_pass(Candidate("a", IMAGES), 1, False, settings)(*make_inputs(IMAGES, 1, "cpu", 0)).dtype == dtype


# Speed


def test_a_row_for_each_candidate_of_images_and_of_tokens() -> None:
    for model in (IMAGES, TOKENS):
        candidates = [Candidate(name, model, name) for name in ("taylorshift", "softmax")]
        for training in (False, True):
            rows = measure_speed(candidates, 2, training=training, settings=QUICK)
            assert [(row.candidate, row.status, row.batch_size) for row in rows] == [
                ("taylorshift", "ok", 2),
                ("softmax", "ok", 2),
            ]
            assert {row.pass_name for row in rows} == {"training" if training else "inference"}
            assert all(row.samples_per_second == pytest.approx(2 / row.seconds) for row in rows)
            assert (rows[1].speedup, rows[1].baseline) == (1, "softmax")


def test_the_ratio_counts_samples_where_batches_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cost, "compare", lambda *args, **kwargs: Comparison({"a": [1.0, 3.0], "b": [2.0, 6.0]}, {}))
    candidates = [Candidate(name, TOKENS, "softmax") for name in "ab"]
    a, b = measure_speed(candidates, {"a": 1, "b": 4}, training=False, settings=QUICK, baselines={"a": "b", "b": "b"})
    assert (a.seconds, a.samples_per_second, b.samples_per_second) == (2, 1 / 2, 4 / 4)
    assert (a.speedup, b.speedup, a.batch_size, b.batch_size) == (1 / 2, 1, 1, 4)
    assert a.samples_per_second_low == 1 / a.seconds_high
    assert a.samples_per_second_high == 1 / a.seconds_low


def test_a_wrong_candidate_gets_no_time_and_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS["cpu"], "direct", wrong_direct)
    candidates = [Candidate(name, IMAGES, name) for name in ("taylorshift_direct", "softmax")]
    wrong, right = measure_speed(candidates, 1, training=False, settings=QUICK)
    assert (wrong.status, wrong.seconds, right.status) == ("wrong", None, "ok")
    assert wrong.is_fault
    believed = {"taylorshift_direct": Verdict(True, "checked before")}
    assert measure_speed(candidates, 1, training=False, settings=QUICK, verdicts=believed)[0].note == "checked before"


def test_what_does_not_fit_is_marked_and_the_others_go_on() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    candidates = [Candidate(name, IMAGES, "softmax") for name in ("large", "small")]
    settings = dataclasses.replace(QUICK, memory_limit_bytes=2**27)
    large, small = measure_speed(candidates, {"large": 8192, "small": 1}, training=True, settings=settings)
    assert (large.status, large.seconds, large.num_tokens, large.is_fault) == ("out of memory", None, 17, False)
    assert (small.status, small.batch_size, small.seconds is not None) == ("ok", 1, True)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_weights_that_do_not_fit_are_out_of_memory_too() -> None:
    settings = dataclasses.replace(QUICK, memory_limit_bytes=2**20)
    wide = Candidate("wide", dataclasses.replace(IMAGES, embed_dim=2048), "softmax")
    (row,) = measure_speed([wide], 1, training=False, settings=settings)
    assert row.status == "out of memory"


def test_a_candidate_that_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise TypeError("no such kernel\nat line 3")

    def build(candidate: Candidate, batch_size: int, training: bool, settings: Settings) -> Pass:
        call = build_pass(candidate, batch_size, training, settings)
        return dataclasses.replace(call, model=Broken()) if candidate.name == "broken" else call

    monkeypatch.setattr(model_cost, "build_pass", build)
    candidates = [Candidate(name, TOKENS, "softmax") for name in ("fine", "broken")]
    fine, broken = measure_speed(candidates, 1, training=False, settings=QUICK)
    assert (broken.status, broken.note) == ("failed", "TypeError: no such kernel")
    assert (fine.status, fine.seconds is not None, fine.speedup) == ("ok", True, None)


def test_models_that_take_other_inputs_are_not_compared() -> None:
    larger = dataclasses.replace(IMAGES, img_size=32)
    with pytest.raises(ValueError, match=r"a: \(3, 16, 16\) float32, b: \(3, 32, 32\) float32"):
        measure_speed([Candidate("a", IMAGES), Candidate("b", larger)], 1, training=False, settings=QUICK)
    with pytest.raises(ValueError, match="no model"):
        measure_speed([], 1, training=False, settings=QUICK)


# Memory


@pytest.mark.skipif(not can_measure_on_cpu(), reason="this system does not tell the peak of resident memory")
def test_peak_memory_tells_the_matrix_of_unfused_softmax_and_the_gradients() -> None:
    model = dataclasses.replace(TOKENS, max_length=1500, vocab_size=200_000)
    matrix, embedding = 4 * 2 * 1501**2, 4 * 32 * 200_000
    unfused = peak_memory(Candidate("a", model, "softmax_unfused"), 1, training=False, settings=QUICK)
    training = peak_memory(Candidate("a", model, "softmax"), 1, training=True, settings=QUICK)
    assert unfused is not None
    assert training is not None
    assert matrix < unfused < 4 * matrix
    assert 0.98 * embedding < training < embedding + matrix


@pytest.mark.skipif(not can_measure_on_cpu(), reason="this system does not tell the peak of resident memory")
def test_memory_that_runs_out_while_it_is_measured_is_noted() -> None:
    candidate = Candidate("a", IMAGES)
    row = new_row(candidate, 2048, training=True, settings=QUICK)
    enter_memory(row, candidate, dataclasses.replace(QUICK, memory_limit_bytes=2**26))
    assert (row.peak_bytes, row.note) == (None, "memory not measured: out of memory")


def test_memory_is_not_measured_of_what_could_not_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cost, "peak_memory", lambda *args, **kwargs: pytest.fail("measured"))
    row = dataclasses.replace(new_row(Candidate("a", IMAGES), 1, training=False, settings=QUICK), status="out of memory")
    enter_memory(row, Candidate("a", IMAGES), QUICK)


# The best batch


@pytest.mark.parametrize(
    ("rates", "most", "expected"),
    [
        ({1: 10, 2: 15, 4: 15.2, 8: 99}, 64, BestBatch(2, 15, "batch size 4 gives 1.01 times the samples a second")),
        ({1: 10, 2: 15, 4: 20}, 7, BestBatch(4, 20, "the limit of 7 is reached")),
        ({1: 10, 2: 15}, 64, BestBatch(2, 15, "out of memory at batch size 4")),
        ({}, 64, BestBatch(None, None, "out of memory at batch size 1")),
    ],
)
def test_the_batch_doubles_until_it_does_not_pay(
    rates: dict[int, float], most: int, expected: BestBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(candidates: dict[str, Pass], *args: Any, **kwargs: Any) -> Comparison:
        if missing := [name for name, call in candidates.items() if call.batch_size not in rates]:
            raise CandidateError(missing[0], MemoryError())
        return Comparison({name: [call.batch_size / rates[call.batch_size]] for name, call in candidates.items()}, {})

    monkeypatch.setattr(model_cost, "compare", compare)
    found = best_batch_size(Candidate("a", TOKENS), training=False, settings=QUICK, most=most)
    assert (found.batch_size, found.reason) == (expected.batch_size, expected.reason)
    assert found.samples_per_second == pytest.approx(expected.samples_per_second)


def test_the_search_ends_where_real_memory_does() -> None:
    settings = dataclasses.replace(QUICK, memory_limit_bytes=2**27)
    found = best_batch_size(Candidate("a", IMAGES), training=True, settings=settings, start=8192)
    assert found == BestBatch(None, None, "out of memory at batch size 8192")


@pytest.mark.gpu
def test_on_a_gpu_events_time_and_the_allocator_counts() -> None:
    settings = dataclasses.replace(QUICK, device="cuda", precision="bf16")
    candidate = Candidate("a", IMAGES)
    (row,) = measure_speed([candidate], 4, training=True, settings=settings)
    enter_memory(row, candidate, settings)
    assert row.status == "ok"
    assert row.weight_bytes is not None
    assert row.peak_bytes is not None
    assert row.peak_bytes > row.weight_bytes  # the gradients alone
    too_large = 2 * torch.cuda.get_device_properties(0).total_memory // (4 * 17 * 32)
    (row,) = measure_speed([candidate], too_large, training=False, settings=settings)
    assert row.status == "out of memory"


def test_no_limit_is_set_where_the_system_does_not_tell_what_is_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(model_passes, "STATUS", tmp_path / "missing")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with model_passes.memory_limited(QUICK):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before

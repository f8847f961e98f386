"""What every attention of our own has to do, as checks for the test files of the attentions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.utils import AttentionExtract
from torch import Tensor, nn

import taylorvit  # noqa: F401  registers the models
from taylorvit.attention import get_attention
from taylorvit.models import SequenceEncoder
from taylorvit.randomness import seed_all

Operation = Callable[..., Tensor]


def heads(B: int = 2, H: int = 2, N: int = 11, D: int = 4, *, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Return q, k, v (B, H, N, D) in fp64, the queries and keys `scale` times normal."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, N, D, generator=generator, dtype=torch.float64) for _ in range(3))
    return [scale * q, scale * k, v]


def tokens(B: int = 2, N: int = 13, C: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The oracle: softmax attention with the scale 1 / sqrt(D), written out."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1) @ v


def relative_error(y: Tensor, truth: Tensor) -> float:
    return float(((y - truth).norm() / truth.norm()).detach())


def build(name: str, C: int = 16, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_attention(name)(C, num_heads=4, qkv_bias=True, **options).eval()


def check_samples_do_not_meet(name: str, **options: Any) -> None:
    """The output of a sample is the same bits whatever else is in the batch."""
    attention = build(name, **options)
    x, other = tokens(), tokens()
    other[1] *= 30.0
    for training in (False, True):
        attention.train(training)
        torch.manual_seed(3)
        first = attention(x)
        torch.manual_seed(3)
        second = attention(other)
        assert torch.equal(first[0], second[0])
        assert not torch.equal(first[1], second[1])


def check_half_precision(name: str, dtype: torch.dtype, tolerance: float, **options: Any) -> None:
    """Under autocast the output has the half dtype, is near to that in fp32, and all gradients are finite."""
    attention = build(name, **options)
    x = 3 * tokens()
    wanted = attention(x)
    with torch.autocast("cpu", dtype=dtype):
        y = attention(x)
    assert y.dtype == dtype
    assert relative_error(y.float(), wanted) < tolerance
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def check_core_is_full_precision(operation: Operation, tolerance: float = 1e-5) -> None:
    """Autocast does not reach the operation: fp32 inputs under it give what they give without, and fp64 stays fp64."""
    q, k, v = (x.float() for x in heads())
    wanted = operation(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operation(q, k, v)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    assert operation(*heads()).dtype == torch.float64
    assert operation(q.half(), k.half(), v.half()).dtype == torch.float16


def check_evaluation_is_deterministic(name: str, **options: Any) -> None:
    """Evaluation neither depends on the global generator nor moves it, and a second module of the same weights agrees."""
    attention, twin = build(name, **options), build(name, **options)
    x = tokens()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = attention(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(attention(x), first)
    assert torch.equal(twin(x), first)


def check_building_draws_like_softmax(name: str, **options: Any) -> None:
    """Random extras have a generator of their own, so that what follows starts from the weights it would start from anyway."""
    torch.manual_seed(0)
    get_attention("softmax")(16, num_heads=4, qkv_bias=True)
    wanted = torch.get_rng_state()
    build(name, **options)
    assert torch.equal(torch.get_rng_state(), wanted)


def check_copies(name: str, **options: Any) -> None:
    attention = build(name, **options)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(tokens()), attention(tokens()))


def check_compiles(name: str, **options: Any) -> None:
    """One graph, in evaluation and in training, with and without a mask."""
    attention = build(name, **options)
    mask = torch.ones(2, 1, 1, 13, dtype=torch.bool)
    mask[..., 9:] = False
    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for attn_mask in (None, mask):
        torch.testing.assert_close(compiled(tokens(), attn_mask=attn_mask), attention(tokens(), attn_mask=attn_mask))
    attention.train()
    compiled(tokens()).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def check_a_traced_graph_draws(name: str, **options: Any) -> None:
    """Traced in training, what is random stays so: no draw of the tracing becomes a constant of the graph."""
    traced = torch.fx.symbolic_trace(build(name, **options).train())
    assert not torch.equal(traced(tokens()), traced(tokens()))


def vit(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 4, "depth": 2, "num_classes": 5, "init_values": 0.0}
    model = timm.create_model("taylorvit_tiny_patch16_224", attention=name, attention_options=options, **sizes)
    nn.init.normal_(model.head.weight)
    return model


def check_vision_transformer(name: str, **options: Any) -> None:
    """A whole model: gradients everywhere, the same ones with recomputed activations, FX, export, and a start on `meta`."""
    model = vit(name, **options).train()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    model.set_grad_checkpointing(False)
    for left, right in zip(*gradients):
        assert left.isfinite().all()
        assert torch.equal(left, right)
    model.eval()
    wanted = model(x)
    (feature,) = AttentionExtract(model, names=["blocks.1.attn.proj"], method="fx")(x).values()
    assert feature.shape == (2, 17, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), wanted)
    empty = timm.create_model(
        "taylorvit_tiny_patch16_224", attention=name, attention_options=options, depth=1, device="meta"
    ).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.fill_(torch.nan)
    empty.init_weights(needs_reset=True)
    assert all(tensor.isfinite().all() for tensor in (*empty.parameters(), *empty.buffers()))


def encoder(name: str, **options: Any) -> SequenceEncoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "max_length": 24, "num_classes": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}
    model = SequenceEncoder(attention=name, attention_options=options, padding_idx=0, **sizes)
    nn.init.normal_(model.head.weight)
    return model.eval()


def check_padding_in_the_sequence_model(name: str, exact: bool, **options: Any) -> None:
    """What stands at the padding changes nothing; where the attention is `exact`, neither does how much padding there is."""
    model = encoder(name, **options)
    x = torch.randint(1, 20, (3, 24), generator=torch.Generator().manual_seed(0))
    x[:, 15:] = 0
    wanted = model(x)
    with torch.no_grad():
        model.embedding.weight[0] = 50.0
    torch.testing.assert_close(model(x), wanted)
    if exact:
        torch.testing.assert_close(model(x[:, :15]), wanted, rtol=1e-4, atol=1e-5)
    model.train()
    model(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (model.embedding.weight.grad[0] == 0).all()


def check_resume(name: str, **options: Any) -> None:
    """Four updates are two updates, a state dict in a model of another seed, and two more, bit for bit, as the engine seeds."""
    x = tokens(4)

    def updates(attention: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
        for position in which:
            seed_all("step", 0, position)
            attention.train()
            optimizer.zero_grad()
            (attention(x) - x).square().mean().backward()
            optimizer.step()
            attention.eval()(x)  # an evaluation in between leaves no trace

    def start(**changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        attention = build(name, **(options | changes))
        return attention, torch.optim.AdamW(attention.parameters(), lr=0.01)

    whole, optimizer = start()
    updates(whole, optimizer, range(4))
    first, optimizer = start()
    updates(first, optimizer, range(2))
    second, resumed = start()
    with torch.no_grad():
        for tensor in (*second.parameters(), *second.buffers()):
            tensor.fill_(7.0)  # nothing may survive but what the state dict holds
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    updates(second, resumed, range(2, 4))
    assert torch.equal(second(x), whole(x))
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key

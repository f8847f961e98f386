"""The operators inside what PyTorch does to operators: opcheck, compile, export, checkpointing, DDP, functorch.

Those of the GPU run in Triton's interpreter where there is no GPU, which has fp16 and fp32 only.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from taylorvit.ops import taylor_attention

Shape = tuple[int, int, int, int]

each_operator = pytest.mark.parametrize(
    ("impl", "form"), [(impl, form) for impl in ("cpu", "triton") for form in ("direct", "efficient")]
)
DEVICE = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
HALF = {"cpu": torch.bfloat16, "triton": torch.bfloat16 if torch.cuda.is_available() else torch.float16}  # the interpreter's
DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "triton": (HALF["triton"], torch.float32),
}
SHAPE: dict[str, Shape] = {"cpu": (2, 3, 11, 6), "triton": (2, 1, 5, 4)}  # the interpreter takes its time
OPCHECKS: list[tuple[str, Shape, torch.dtype]] = [
    ("cpu", (2, 3, 11, 6), torch.float32),
    ("cpu", (1, 2, 9, 5), torch.float64),
    ("cpu", (3, 1, 8, 4), torch.bfloat16),
    ("cpu", (1, 1, 1, 1), torch.float16),
    ("cpu", (2, 3, 0, 4), torch.float32),
    ("triton", (1, 2, 5, 4), HALF["triton"]),
    ("triton", (2, 3, 0, 4), torch.float32),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(impl: str, shape: Shape | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Draw q, k, v as a packed projection gives them, and a temperature a head, where the implementation runs."""
    batch, num_heads, num_tokens, head_dim = shape or SHAPE[impl]
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, num_tokens, 3, num_heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    temperature = torch.linspace(0.5, 3.0, num_heads, dtype=torch.promote_types(dtype, torch.float32))
    qkv = qkv.to(DEVICE[impl])
    return [*qkv.permute(2, 0, 3, 1, 4).unbind(0), temperature.to(DEVICE[impl])]


def attention(impl: str, form: str) -> Callable[..., Tensor]:
    return partial(taylor_attention, form=form, impl=impl)


def outcome(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Return what the function gives and the gradients of a weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves)
    weights = torch.linspace(-1.0, 1.0, y.numel(), device=y.device).view(y.shape)
    (y.float() * weights).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(computed: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(computed, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["direct", "efficient"])
@pytest.mark.parametrize(("impl", "shape", "dtype"), OPCHECKS, ids=str)
def test_opcheck(impl: str, form: str, shape: Shape, dtype: torch.dtype) -> None:
    """Schema (nothing is modified or aliased), shapes and strides of the fake kernels, autograd, tracing with dynamic sizes."""
    training = (True,) if impl == "triton" else ()
    forward, backward = (getattr(torch.ops.taylorvit, name).default for name in (f"{impl}_{form}", f"{impl}_{form}_backward"))
    packed = inputs(impl, shape, dtype)
    torch.library.opcheck(forward, (*packed, *(False for _ in training)))
    for tensors in (packed, [x.contiguous() for x in packed]):
        torch.library.opcheck(forward, (*(x.detach().requires_grad_() for x in tensors), *training))
        y, *saved = forward(*tensors, *training)
        torch.library.opcheck(backward, (torch.randn(y.shape).to(y), *tensors, *saved))


@each_operator
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_is_bit_identical(impl: str, form: str, autocast: bool, around: bool) -> None:
    """Autocast inside the compiled function, or around it and around its backward pass."""

    def attend(*tensors: Tensor) -> Tensor:
        with torch.autocast(DEVICE[impl], dtype=HALF[impl], enabled=autocast):
            return attention(impl, form)(*tensors)

    function = attention(impl, form) if around else attend
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted = outcome(attend, inputs(impl))
    with torch.autocast(DEVICE[impl], dtype=HALF[impl], enabled=autocast and around):
        assert_same(outcome(compiled, inputs(impl)), wanted)


@each_operator
def test_one_graph_serves_all_sizes(impl: str, form: str) -> None:
    compiled = torch.compile(attention(impl, form), fullgraph=True, dynamic=True, backend="aot_eager")
    first, *others = [(2, 3, 11, 6), (4, 3, 17, 6), (3, 5, 8, 10)] if impl == "cpu" else [(2, 3, 5, 6), (3, 2, 7, 8)]
    outcome(compiled, inputs(impl, first))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in others:
            assert_same(outcome(compiled, inputs(impl, shape)), outcome(attention(impl, form), inputs(impl, shape)))


@pytest.mark.slow
@each_operator
def test_inductor(impl: str, form: str) -> None:
    """What stands around the operator is compiled with it: storage orders are what the fake kernels say."""

    def attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        y = attention(impl, form)(2 * q, k + 1, v, temperature.exp())
        return y.transpose(1, 2).flatten(2) * 3

    compiled = torch.compile(attend, fullgraph=True)
    for ours, theirs in zip(outcome(compiled, inputs(impl)), outcome(attend, inputs(impl)), strict=True):
        torch.testing.assert_close(ours, theirs)


class Attend(nn.Module):
    """A layer without projections."""

    def __init__(self, impl: str, form: str) -> None:
        super().__init__()
        self.impl, self.form = impl, form
        self.temperature = nn.Parameter(torch.linspace(0.5, 3.0, SHAPE[impl][1], device=DEVICE[impl]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(self.impl, self.form)(q, k, v, self.temperature)


@each_operator
@pytest.mark.parametrize("dynamic", [False, True])
def test_export_keeps_one_node_a_call(impl: str, form: str, dynamic: bool) -> None:
    batch, tokens = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "tokens"))
    sizes: Any = tuple({0: batch, 2: tokens} for _ in range(3)) if dynamic else None
    module = Attend(impl, form)
    program = torch.export.export(module, tuple(inputs(impl)[:3]), dynamic_shapes=sizes)
    for exported in (program, program.run_decompositions()):
        called = [str(node.target) for node in exported.graph.nodes if "taylorvit" in str(node.target)]
        assert called == [f"taylorvit.{impl}_{form}.default"]
        _, num_heads, num_tokens, head_dim = SHAPE[impl]
        shape = (3, num_heads, num_tokens + 2, head_dim) if dynamic else SHAPE[impl]
        *tensors, _ = inputs(impl, shape, seed=1)
        assert torch.equal(exported.module()(*tensors), module(*tensors))


@each_operator
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(impl: str, form: str, use_reentrant: bool) -> None:
    def recomputed(*tensors: Tensor) -> Tensor:
        return checkpoint(attention(impl, form), *tensors, use_reentrant=use_reentrant)

    assert_same(outcome(recomputed, inputs(impl)), outcome(attention(impl, form), inputs(impl)))


@each_operator
def test_distributed_data_parallel(impl: str, form: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        alone = Attend(impl, form)
        model = DistributedDataParallel(copy.deepcopy(alone))
        *tensors, _ = inputs(impl)
        for module in (model, alone):
            module(*tensors).square().sum().backward()
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
        assert ours.grad is not None


def right_or_refused(call: Callable[[], Tensor], wanted: Tensor) -> None:
    """Let PyTorch, or this package, say that it cannot do it, but never return another number."""
    result = None
    with contextlib.suppress(RuntimeError, NotImplementedError):
        result = call()
    if result is not None:
        torch.testing.assert_close(result, wanted)


@each_operator
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_right_or_refused(impl: str, form: str) -> None:
    q, k, v, temperature = inputs(impl)
    many = [torch.stack([x, 2 * x + 1]) for x in (q, k, v)]
    wanted = torch.stack([attention(impl, form)(*(x[i] for x in many), temperature) for i in range(2)])
    right_or_refused(lambda: torch.vmap(attention(impl, form), in_dims=(0, 0, 0, None))(*many, temperature), wanted)


@each_operator
def test_functional_gradients_are_right_or_refused(impl: str, form: str) -> None:
    tensors = inputs(impl)
    leaves = [x.detach().requires_grad_() for x in tensors]
    (wanted,) = torch.autograd.grad(attention(impl, form)(*leaves).square().sum(), leaves[1])
    right_or_refused(lambda: torch.func.grad(lambda *x: attention(impl, form)(*x).square().sum(), argnums=1)(*tensors), wanted)


@each_operator
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forward_mode_is_right_or_refused(impl: str, form: str) -> None:
    tensors = inputs(impl, dtype=DTYPES[impl][-1])
    tangents = [torch.randn_like(x) for x in tensors]
    reference = partial(taylor_attention, form=form, impl="reference")
    wanted = torch.func.jvp(reference, tuple(tensors), tuple(tangents))[1]
    right_or_refused(lambda: torch.func.jvp(attention(impl, form), tuple(tensors), tuple(tangents))[1], wanted)


@each_operator
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(impl: str, form: str) -> None:
    tensors = [x.contiguous() for x in inputs(impl)]
    wanted = outcome(attention(impl, form), tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for fake, real in zip(outcome(attention(impl, form), [mode.from_tensor(x) for x in tensors]), wanted, strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@each_operator
def test_the_flop_counter_sees_the_matrix_products(impl: str, form: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(impl, (2, 3, 50, 8))]
    with FlopCounterMode(display=False) as counter:
        y = attention(impl, form)(*tensors)
    features = {"cpu": 8 * (8 // 2 + 1), "triton": 16**2}[impl]
    rows = features + 8 + 8  # with the linear term and the Gram matrix
    forward = 2 * 3 * 50 * 8 * 4 * (50 if form == "direct" else rows)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == forward * (2.5 if form == "direct" else 2)


@each_operator
def test_an_explicit_impl_counts_on_the_meta_device(impl: str, form: str) -> None:
    tensors = [x.to("meta") for x in inputs(impl, (2, 3, 50, 8))]
    assert attention(impl, form)(*tensors).shape == (2, 3, 50, 8)


@each_operator
def test_second_derivatives_are_refused(impl: str, form: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(impl, (1, 3, 5, 6))]
    y = attention(impl, form)(*leaves)
    for gradient in torch.autograd.grad(y.square().sum(), leaves, create_graph=True):
        with pytest.raises(NotImplementedError, match=f"impl '{impl}' has no second derivative: use impl='reference'"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True, allow_unused=True)

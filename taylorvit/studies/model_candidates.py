"""Whole models to compare: a configured network with a way to run its attention, what it consists of, and whether it is right.

A candidate that computes TaylorShift is compared with the plain PyTorch reference with the same weights before it gets a time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from taylorvit.attention import Softmax, TaylorShift
from taylorvit.benchmark.memory import is_out_of_memory
from taylorvit.config import ModelConfig
from taylorvit.models import attention_forms, build_model, random_inputs
from taylorvit.ops import resolve_impl
from taylorvit.suggest import nearest

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = {"taylorshift": "auto", "taylorshift_direct": "direct", "taylorshift_efficient": "efficient"}
BACKENDS = {
    "softmax_flash": SDPBackend.FLASH_ATTENTION,
    "softmax_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "softmax_cudnn": SDPBackend.CUDNN_ATTENTION,
}
VARIANTS = ("config", *FORMS, "softmax", "softmax_unfused", *BACKENDS)
MAX_LOGIT_ERROR = 2e-5  # of the largest logit; both are fp32 and a dozen layers deep, and 1e-6 apart as a rule
CHECK_TEMPERATURE = 4.0  # at 1 and with small cosines the weights are all about 1, whatever the polynomial


@dataclass(frozen=True)
class Candidate:
    """A network whose attention runs in one of several ways.

    Args:
        name: what it is called in results.
        model: the network; its own attention is replaced unless `attention` is "config".
        attention: "config", the network's own; "taylorshift", "taylorshift_direct" or "taylorshift_efficient", by form;
            "softmax", timm's fused attention; "softmax_unfused", the same that forms the N x N matrix; "softmax_flash",
            "softmax_efficient" or "softmax_cudnn", the fused one by that backend of PyTorch's, instead of PyTorch's own choice.

    Raises:
        ValueError: there is no such attention.
    """

    name: str
    model: ModelConfig
    attention: str = "config"

    def __post_init__(self) -> None:
        if self.attention not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"attention must be one of {known}, got {self.attention!r}{nearest(self.attention, VARIANTS)}")

    @property
    def config(self) -> ModelConfig:
        """The network's configuration with this attention; options of TaylorShift other than the form are kept."""
        if self.attention == "config":
            return self.model
        if self.attention not in FORMS:
            return dataclasses.replace(self.model, attention="softmax", attention_options={})
        kept = self.model.attention_options if self.model.attention == "taylorshift" else {}
        return dataclasses.replace(
            self.model, attention="taylorshift", attention_options={**kept, "form": FORMS[self.attention]}
        )

    def around(self) -> AbstractContextManager[object]:
        """Return the context that the network is to run in."""
        return sdpa_kernel(BACKENDS[self.attention]) if self.attention in BACKENDS else nullcontext()

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """Return the network with fresh weights: drawn with seed 0, so those of two attentions agree where their names do.

        Raises:
            ValueError: the network cannot be built so, or has no softmax attention to run unfused.
            MemoryError: there is no room for the weights.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _build(self.config, device)
        if self.attention == "softmax_unfused":
            layers = [module for module in model.modules() if isinstance(module, Softmax)]
            if not layers:
                raise ValueError(f"model {self.model.name!r} has no layer of timm's Attention: softmax_unfused needs one")
            for layer in layers:
                layer.fused_attn = False
        return model


@dataclass(frozen=True)
class Structure:
    """What a network consists of. `form` is what its attention layers compute, joined by "+" where they differ.

    `head_dim` and the other figures of the attention are the first layer's, None without such layers; `img_size` is None where
    the input is no image. `weight_bytes` are parameters and buffers. `flops_per_sample` counts the forward pass: the matrix
    products of the implementations that run on the device, a multiply-add as two.
    """

    form: str
    embed_dim: int | None
    num_heads: int | None
    head_dim: int | None
    num_tokens: int | None
    img_size: int | None
    parameters: int
    weight_bytes: int
    flops_per_sample: int


class Verdict(NamedTuple):
    """Whether a candidate's logits are the reference's, and what is to be said about it."""

    passed: bool
    note: str = ""


def _build(config: ModelConfig, device: torch.device | str) -> nn.Module:
    try:
        return build_model(config, device="meta" if str(device) == "meta" else None).to(device)
    except ValueError as error:  # build_model makes one of every refusal
        if is_out_of_memory(error):
            raise MemoryError(f"no room for the weights of {config.name}") from error
        raise


def source_name(name: str, attention: str) -> str:
    """Return what the candidates of one network have in common in their names, which end with their attention's name."""
    return name if attention == "config" else name.removesuffix(attention).strip()


def candidate_from_dict(values: Mapping[str, Any]) -> Candidate:
    """Rebuild a candidate from what `dataclasses.asdict` made of it."""
    return Candidate(**{**values, "model": ModelConfig(**values["model"])})


def inspect_model(candidate: Candidate, *, training: bool, device: str) -> Structure:
    """Describe the network that would run on `device`, by one pass on the meta device, which computes nothing.

    Raises:
        ValueError: the network cannot be built so.
    """
    model = candidate.build("meta").eval()
    seen: list[tuple[nn.Module, int]] = []

    def resolve(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append((layer, arguments[0].shape[1]))
        if isinstance(layer, TaylorShift):
            layer.impl = resolve_impl(torch.device(device).type, layer.impl)
            layer.form = layer.resolved_form(seen[-1][1], training=training)

    for module in model.modules():
        if isinstance(module, (TaylorShift, Softmax)):
            module.register_forward_pre_hook(resolve)
    inputs = random_inputs(candidate.config, 1, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    first, num_tokens = seen[0] if seen else (None, None)
    num_heads, head_dim = getattr(first, "num_heads", None), getattr(first, "head_dim", None)
    weights = [*model.parameters(), *model.buffers()]
    return Structure(
        form="+".join(dict.fromkeys(attention_forms(model, num_tokens, training=training))) if seen else "",
        embed_dim=num_heads * head_dim if num_heads and head_dim else None,
        num_heads=num_heads,
        head_dim=head_dim,
        num_tokens=num_tokens,
        img_size=inputs.shape[-1] if inputs.ndim == 4 else None,
        parameters=sum(weight.numel() for weight in model.parameters()),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        flops_per_sample=counter.get_total_flops(),
    )


def check_logits(candidate: Candidate, *, device: str = "cpu", precision: Precision = "no", seed: int = 0) -> Verdict:
    """Compare a TaylorShift candidate's logits of one input with those of the plain reference with the same weights.

    The error against the fp32 reference may be twice that of the reference in this precision, and MAX_LOGIT_ERROR: in half
    precision a fault smaller than its rounding is not seen. The forms of
    the forward pass alone and of a training step are both checked where they differ. LayerScale and temperatures are set to
    values that let the attention matter, as freshly drawn weights hide it. Another attention passes without a check; so does a
    candidate whose reference needs too much memory, with a note.
    """
    if candidate.config.attention != "taylorshift":
        return Verdict(True)
    forms = {inspect_model(candidate, training=training, device=device).form for training in (False, True)}
    try:
        error, budget = _logit_error(candidate, sorted(forms), device, precision, seed)
    except (MemoryError, RuntimeError) as failure:
        if is_out_of_memory(failure):
            return Verdict(True, "logits not checked: the reference needs too much memory")
        raise
    if error <= budget:
        return Verdict(True)
    return Verdict(False, f"logits are {error:.1e} off the reference's, at most {budget:.1e} is rounding")


def _logit_error(candidate: Candidate, forms: list[str], device: str, precision: Precision, seed: int) -> tuple[float, float]:
    """Return the largest error of the logits over the forms, relative to the largest logit, and what it may be."""
    config = copy.deepcopy(candidate.config)
    config.attention_options = {**config.attention_options, "form": "auto", "impl": "reference"}
    model, plain = candidate.build(device).eval(), _build(config, device).eval()
    _let_attention_matter(model)
    plain.load_state_dict(model.state_dict())
    inputs = random_inputs(config, 1, device=device, generator=torch.Generator(device).manual_seed(seed))
    with torch.no_grad():
        truth = plain(inputs)
        scale = truth.abs().max()
        with autocast(device, precision):
            rounding = ((plain(inputs) - truth).abs().max() / scale).item() if precision != "no" else 0.0
            errors = []
            for form in forms:
                for layer in model.modules():
                    if isinstance(layer, TaylorShift):
                        layer.form = form
                errors.append(((model(inputs) - truth).abs().max() / scale).item())
    return torch.tensor(errors).max().item(), 2 * rounding + MAX_LOGIT_ERROR


def autocast(device: str, precision: Precision) -> torch.autocast:
    """Return the context in which a pass of this precision runs; "no" is fp32."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "no")


def _let_attention_matter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LayerScale):
                module.gamma.fill_(1.0)
            elif isinstance(module, TaylorShift):
                module.temperature.fill_(CHECK_TEMPERATURE)
            elif isinstance(module, nn.Linear) and not module.weight.any():  # a classifier that starts at 0
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))

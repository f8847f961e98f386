"""The attention modules by name, all with timm's constructor and forward signature; each may have options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from taylorvit.attention import eva, linear, linformer, nystrom, performer, reformer, rfa, softmax, taylor_order, taylorshift
from taylorvit.attention.eva import EVA
from taylorvit.attention.linear import LinearAttention
from taylorvit.attention.linformer import Linformer
from taylorvit.attention.nystrom import Nystrom
from taylorvit.attention.performer import Performer
from taylorvit.attention.reformer import Reformer
from taylorvit.attention.rfa import RFA
from taylorvit.attention.softmax import Softmax
from taylorvit.attention.taylor_order import TaylorOrder
from taylorvit.attention.taylorshift import TaylorShift
from taylorvit.suggest import nearest

__all__ = [
    "ATTENTIONS",
    "EVA",
    "RFA",
    "LinearAttention",
    "Linformer",
    "Nystrom",
    "Performer",
    "Reformer",
    "Softmax",
    "TaylorOrder",
    "TaylorShift",
    "bind_options",
    "check_attention_options",
    "get_attention",
]

ATTENTIONS: dict[str, type[nn.Module]] = {
    "taylorshift": TaylorShift,
    "softmax": Softmax,
    "taylor_order": TaylorOrder,
    "linear": LinearAttention,
    "linformer": Linformer,
    "nystrom": Nystrom,
    "performer": Performer,
    "rfa": RFA,
    "reformer": Reformer,
    "eva": EVA,
}
# One checker per attention: its keyword arguments are the options, and it raises ValueError on a value that is not valid.
OPTION_CHECKS: dict[str, Callable[..., None]] = {
    "taylorshift": taylorshift.check_options,
    "softmax": softmax.check_options,
    "taylor_order": taylor_order.check_options,
    "linear": linear.check_options,
    "linformer": linformer.check_options,
    "nystrom": nystrom.check_options,
    "performer": performer.check_options,
    "rfa": rfa.check_options,
    "reformer": reformer.check_options,
    "eva": eva.check_options,
}


def get_attention(name: str) -> type[nn.Module]:
    """Return the attention class of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {name!r}{nearest(name, ATTENTIONS)}")
    return ATTENTIONS[name]


def check_attention_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless `options` are valid for the attention of that name."""
    get_attention(name)
    known = inspect.signature(OPTION_CHECKS[name]).parameters
    for key in options:
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(f"attention {name!r} has no option {key!r}{nearest(key, known)} (options: {allowed})")
    OPTION_CHECKS[name](**options)


def bind_options(name: str, options: Mapping[str, Any], num_tokens: int | None = None) -> type[nn.Module]:
    """Return a class that builds the attention of that name with these options already given.

    timm passes a fixed set of keywords to `attn_layer` and insists on a class. What the class builds is a plain instance of
    the attention, so models stay picklable and `type(block.attn)` is what one expects. Without options it is that class itself.

    num_tokens is the most tokens that the attention will see. An attention whose constructor has an argument of that name is
    given it; the others do not depend on it.

    Raises:
        ValueError: the name or an option is not valid, or num_tokens is missing.
    """
    check_attention_options(name, options)
    attention = get_attention(name)
    bound = dict(options)
    if "num_tokens" in inspect.signature(attention).parameters:
        if num_tokens is None:
            raise ValueError(f"attention {name!r} has parameters for every token: num_tokens must be given, got None")
        bound["num_tokens"] = num_tokens
    if not bound:
        return attention

    def build(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
        return attention(*args, **kwargs, **bound)

    return type(attention.__name__, (attention,), {"__new__": build})

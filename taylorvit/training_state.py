"""What a checkpoint holds: model, averaged weights, optimizer and gradient scaler as named tensors plus plain JSON.

`pack_state` takes them apart, `unpack_state` puts them back bit for bit. Optimizers keep more than tensors per parameter:
tuples, exact floats, None, nested lists, and (LAMB) a tensor inside a parameter group. `encode` turns all of that into JSON and
names, `decode` reverses it; no pickle is needed.

Tensor names: `model.<key>`, `ema.<key>`, `optimizer.<parameter>.<entry>`, `optimizer.group.<group>.<entry>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

Store = Callable[[Tensor, str], dict[str, Any]]

# What optimizers keep of a parameter in its shape, or as one number; factored moments and matrices have shapes of their own.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message names the path and the reason."""


def pack_state(
    model: nn.Module, ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer, scaler: Any | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take a training state apart into named tensors and a JSON value.

    The tensors are the live ones, not copies: write them before the next update. Only at update boundaries is this the whole
    state, because gradients are not part of it.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in named_state(model).items()}
    if ema is not None:
        tensors.update({f"ema.{name}": value for name, value in named_state(ema.module).items()})
    state = {
        "ema": ema is not None,
        "optimizer": _pack_optimizer(model, _inner(optimizer), tensors),
        "scaler": None if scaler is None else encode(scaler.state_dict(), "scaler"),
    }
    return tensors, state


def unpack_state(
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    scaler: Any | None,
) -> None:
    """Put a packed state back in place, bit for bit, on whatever device the model is.

    Raises:
        CheckpointError: the state belongs to another model, optimizer or precision; nothing has been changed then.
    """
    for part, here, there in (
        ("EMA weights", ema, state["ema"]),
        ("gradient scaler values", scaler, state["scaler"] is not None),
    ):
        if (here is not None) != there:
            raise CheckpointError(
                f"the checkpoint {'has' if there else 'lacks'} {part}, this run {'lacks' if there else 'has'} them"
            )
    modules = {"model": model} if ema is None else {"model": model, "ema": ema.module}
    for part, module in modules.items():
        _check_tensors(part, named_state(module), _select(tensors, part))
    _check_optimizer(state["optimizer"], model, _inner(optimizer))
    unused = {f"optimizer.{name}" for name in _select(tensors, "optimizer")} - _references(state["optimizer"])
    if unused:
        raise CheckpointError(f"the checkpoint has the tensor {min(unused)}, but its optimizer's state does not")
    _check_moments(state["optimizer"], tensors, _inner(optimizer))
    for part, module in modules.items():
        _copy_tensors(named_state(module), _select(tensors, part))
    _unpack_optimizer(state["optimizer"], tensors, _inner(optimizer))
    if scaler is not None:
        scaler.load_state_dict(decode(state["scaler"]))


def clean_name(name: str) -> str:
    """Return a parameter name without the prefixes of DistributedDataParallel and torch.compile."""
    return name.removeprefix("module.").replace("_orig_mod.", "").removeprefix("module.")


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state dict, its tensors shared with the module, under clean names."""
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} in the state of {type(module).__name__} is a {type(value).__name__}, not a tensor")
        state[clean_name(name)] = value.detach()
    return state


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper, which adds no state of its own."""
    return getattr(optimizer, "optimizer", optimizer)


def _select(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = part + "."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_tensors(part: str, here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    for name in sorted(here.keys() | there.keys()):
        ours, saved = _describe(here.get(name)), _describe(there.get(name))
        if ours != saved:
            raise CheckpointError(f"{part} tensor {name} is {saved} in the checkpoint and {ours} in this run")


def _describe(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@torch.no_grad()
def _copy_tensors(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    for name, value in here.items():
        value.copy_(there[name])


def _group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of each group's parameters, in the optimizer's order."""
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    return [
        [names.get(id(parameter), "(not in the model)") for parameter in group["params"]] for group in optimizer.param_groups
    ]


def _pack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the optimizer's JSON value; its tensors are added to `tensors`."""

    def store(tensor: Tensor, name: str) -> dict[str, Any]:
        assert name not in tensors, name
        tensors[name] = tensor.detach()
        return _reference(name, tensor)

    packed = optimizer.state_dict()
    groups = [encode(group, f"optimizer.group.{number}", store) for number, group in enumerate(packed["param_groups"])]
    state = {str(index): encode(entries, f"optimizer.{index}", store) for index, entries in packed["state"].items()}
    return {"class": type(optimizer).__name__, "names": _group_names(model, optimizer), "groups": groups, "state": state}


def _reference(name: str, tensor: Tensor) -> dict[str, Any]:
    """Return the JSON stand-in of a tensor; strides are kept because a reduction's rounding follows memory order."""
    reference: dict[str, Any] = {"__tensor__": name}
    dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    if dense and not tensor.is_contiguous():
        reference["stride"] = list(tensor.stride())
    return reference


def _references(value: Any) -> set[str]:
    """Return the names of the tensors that an encoded value stands for."""
    if isinstance(value, Mapping) and isinstance(name := value.get("__tensor__"), str):
        return {name}
    below = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_references, below))


def _check_optimizer(packed: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if packed["class"] != type(optimizer).__name__:
        raise CheckpointError(f"the checkpoint holds the state of {packed['class']}, this run uses {type(optimizer).__name__}")
    here, there = _group_names(model, optimizer), packed["names"]
    if len(here) != len(there):
        raise CheckpointError(f"the checkpoint has {len(there)} parameter groups, this run's optimizer has {len(here)}")
    for number, (ours, saved) in enumerate(zip(here, there, strict=True)):
        if ours != saved:
            only = sorted(set(ours) ^ set(saved)) or ["the order alone"]
            raise CheckpointError(
                f"parameter group {number} has {len(saved)} parameters in the checkpoint and {len(ours)} here; "
                f"they differ in {', '.join(only[:3])}"
            )


def _check_moments(packed: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in packed["state"].items():
        parameter = parameters[int(index)]
        for name, value in decode(entries, tensors).items():
            fits = not isinstance(value, Tensor) or value.numel() == 1 or value.shape == parameter.shape
            if name in MOMENTS and not fits:
                here = _describe(parameter)
                raise CheckpointError(
                    f"optimizer tensor {index}.{name} is {_describe(value)} in the checkpoint, its parameter {here}"
                )


def _unpack_optimizer(packed: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    state = {int(index): decode(entries, tensors) for index, entries in packed["state"].items()}
    groups = [decode(group, tensors) for group in packed["groups"]]
    for saved, current in zip(groups, optimizer.param_groups, strict=True):
        for key, value in saved.items():
            if isinstance(value, Tensor) and isinstance(current.get(key), Tensor):
                saved[key] = value.to(current[key].device)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    live = optimizer.state_dict()["state"]  # the optimizer's own dictionaries, by index
    for index, entries in state.items():
        live[index].update({key: _exact(live[index][key], value) for key, value in entries.items()})


def _exact(restored: Any, saved: Any) -> Any:
    """Undo the cast to the parameter's dtype that `load_state_dict` makes, keeping the device that it chose."""
    if isinstance(saved, Tensor):
        return restored if restored.dtype == saved.dtype else saved.to(restored.device)
    if isinstance(saved, dict):
        return {key: _exact(restored[key], value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_exact(ours, value) for ours, value in zip(restored, saved, strict=True))
    return saved


def encode(value: Any, where: str, store: Store | None = None) -> Any:
    """Return `value` in strict JSON types that `decode` turns back exactly; `store` keeps a tensor and returns its stand-in.

    JSON has no tuples, no NaN or infinity, no dtypes and no tensors: each becomes a one-key object. Encoded values pass.

    Raises:
        CheckpointError: `value` holds something else; `where` names it.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"__float__": repr(float(value))}
    if isinstance(value, Tensor) and store is not None:
        return store(value, where)
    if isinstance(value, torch.dtype):
        return {"__dtype__": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{where}.{position}", store) for position, item in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: encode(item, f"{where}.{key}", store) for key, item in value.items()}
    raise CheckpointError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: {str(value)[:80]}")


def decode(value: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """Reverse `encode`; tensors come back as copies, or stay stand-ins where `tensors` is not given.

    Raises:
        CheckpointError: `value` is nothing that `encode` returns, or a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if isinstance(value, tuple):
        return tuple(decode(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), None)
    if tag in ("__tuple__", "__float__", "__dtype__"):
        return _decode_tagged(tag, value[tag], tensors)
    if tag == "__tensor__":
        return value if tensors is None else _copy(tensors, value)
    return {key: decode(item, tensors) for key, item in value.items()}


def _decode_tagged(tag: str, value: Any, tensors: Mapping[str, Tensor] | None) -> Any:
    if tag == "__tuple__" and isinstance(value, list):
        return tuple(decode(item, tensors) for item in value)
    if tag == "__float__" and value in ("nan", "inf", "-inf"):
        return float(value)
    if tag == "__dtype__" and isinstance(value, str) and isinstance(found := getattr(torch, value, None), torch.dtype):
        return found
    raise CheckpointError(f"{str(value)[:80]!r} is no value of the kind {tag}")


def _copy(tensors: Mapping[str, Tensor], reference: Mapping[str, Any]) -> Tensor:
    name = reference["__tensor__"]
    if name not in tensors:
        raise CheckpointError(f"the checkpoint lacks the tensor {name}")
    saved = tensors[name]
    if "stride" not in reference:
        return saved.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(saved.shape, reference["stride"], dtype=saved.dtype, device=saved.device).copy_(saved)

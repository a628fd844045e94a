"""Where the modules of a native model go: device maps as accelerate reads them, made from the bytes that are held, and what encoded experts cannot follow.

transformers makes a map for the dense model before it loads. Here the experts are in place already, so that "auto" counts what they take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moeglot.errors import UsageError
from moeglot.nn.module import experts_in

PLACING = ("device_map", "max_memory", "offload_folder", "offload_buffers")
"""Arguments of `from_pretrained` that say where a model goes."""
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
OFFLOADED = ("cpu", "disk")
"""Places that accelerate computes nothing on, if there is another device: it brings the weights from there for each forward pass."""
STATEFUL = ["past_key_values", "cache"]
"""Arguments of a layer, in 5.23 and in 5.24, that stay where they are: each layer's part of the cache is on its device already."""


def check(wanted: Any, experts: Iterable[str], tensors: Iterable[str]) -> None:
    """Before anything is read: raises `UsageError` for a map that names places where these modules, by name, cannot be, or none for one of these tensors."""
    if isinstance(wanted, Mapping):
        _check(wanted, experts)
        for name in tensors:
            place_of(name, wanted)
    elif wanted not in STRATEGIES:
        _device(wanted)


def place(model: Any, device: str | torch.device | int | None, given: Mapping[str, Any]) -> None:
    """Move a native model to `device`, or where `given["device_map"]` says; raises `UsageError` where encoded experts would be offloaded."""
    if "device_map" not in given:
        model.to(device if device is not None else "cpu")
        return
    from accelerate import dispatch_model

    found = _map_of(model, given["device_map"], given.get("max_memory"))
    _check(found, experts_in(model))
    dispatch_model(model, found, offload_dir=given.get("offload_folder"), offload_buffers=bool(given.get("offload_buffers")), skip_keys=STATEFUL)


def _map_of(model: torch.nn.Module, wanted: Any, max_memory: Any) -> dict[str, Any]:
    """Module -> place. For a strategy, as accelerate divides the bytes that the model holds now."""
    if isinstance(wanted, Mapping):
        return dict(wanted)
    if wanted not in STRATEGIES:
        return {"": _device(wanted)}
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    whole = blocks(model)
    if wanted == "sequential":
        room = get_max_memory(max_memory)
    else:
        room = get_balanced_memory(model, max_memory, whole, low_zero=wanted == "balanced_low_0")
    found: dict[str, Any] = infer_auto_device_map(model, room, no_split_module_classes=whole)
    return found


def blocks(model: torch.nn.Module) -> list[str]:
    """The classes of what a model repeats, which add to their own input and so are never divided."""
    return sorted({type(child).__name__ for module in model.modules() if isinstance(module, torch.nn.ModuleList) for child in module})


def _device(wanted: Any) -> torch.device:
    try:
        return torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"device_map={wanted!r} is no place", str(error).split("\n")[0], f"pass a device, a dict, or one of {', '.join(STRATEGIES)}"
        ) from error


def _check(found: Mapping[str, Any], experts: Iterable[str]) -> None:
    places = ", ".join(sorted({repr(str(where)) for where in found.values()}))
    if "meta" in {str(where) for where in found.values()}:
        raise UsageError("device_map puts modules on 'meta'", "nothing has numbers there", "name devices that compute")
    for name in experts:
        if inside := [key for key in found if key.startswith(name + ".")]:
            raise UsageError(f"device_map divides {name}: it names {inside[0]}", "a layer's experts are one module when they are native", f"name {name} alone")
        if is_offloaded(name, found):
            raise UsageError(
                f"device_map offloads {name} to {str(place_of(name, found))!r}",
                f"encoded experts stay where they compute; the map names {places}",
                "name more devices, raise max_memory, pass device='cpu' for the whole model, or leave native out",
            )


def is_offloaded(name: str, found: Mapping[str, Any]) -> bool:
    """A tensor or module of this name is brought to another device for each forward pass, and has no numbers between; never where there is no map."""
    where = str(place_of(name, found)) if found else ""
    return where == "disk" or (where == "cpu" and any(str(other) not in OFFLOADED for other in found.values()))


def place_of(name: str, found: Mapping[str, Any]) -> Any:
    """The place of a module: that of the longest name in the map which it is, or lies in; raises `UsageError` if there is none."""
    holding = [key for key in found if key == "" or name == key or name.startswith(key + ".")]
    if not holding:
        raise UsageError(f"device_map names no place for {name}", f"it names {', '.join(found) or 'nothing'}", "name every module, or one that holds it")
    return found[max(holding, key=len)]

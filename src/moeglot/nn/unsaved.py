"""What an adapter would leave out without a word: what trains and is no part of it, and weights that are no longer those of the base that it names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from moeglot.adapters.config import PREFIX
from moeglot.adapters.parts import INPUT, OUTPUT
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.dense import DenseTensor
from moeglot.errors import UsageError
from moeglot.factors import aliases
from moeglot.nn.lora import Lora

KNOWN = "an adapter is LoRA of the experts, and what PEFT has on other modules"
DO = "name the module in modules_to_save=[...] of PEFT's LoraConfig, or write all of the model with moeglot.save"
HALVES = (torch.bfloat16, torch.float16)
"""A model may have been loaded in one of these and cast since, as PEFT does to train on a quantized one."""


def check_saved(model: torch.nn.Module, written: Iterable[torch.Tensor], base: Checkpoint) -> None:
    """Raises `UsageError` for such a tensor; `written`: what of PEFT's is saved. Weights are compared if the model was loaded from the base itself."""
    loras = check_whole(model)
    mine = {id(parameter) for lora in loras for parameter in lora.parameters()}
    theirs = {tensor.data_ptr() for tensor in written}
    training = any(parameter.requires_grad for lora in loras for parameter in lora.parameters())
    for name, parameter in model.named_parameters():
        if training and parameter.requires_grad and id(parameter) not in mine and parameter.data_ptr() not in theirs:
            raise UsageError(f"{name} trains, and an adapter would not hold it", KNOWN, DO)
    if getattr(getattr(model, "config", None), "name_or_path", None) != base.source.reference:
        return
    stored = {alias: tensor for name, tensor in base.decoded("F32").items() for alias in aliases(name, base.format.family)}
    for name, live in _own(model, theirs):
        tensor = stored.get(name) or (next((stored[of] for of in stored if of.endswith(INPUT)), None) if name.endswith(OUTPUT) else None)
        if tensor is not None and not _holds(live, tensor, name.endswith((INPUT, OUTPUT))):
            raise UsageError(f"{name} is not what the base has under that name", f"the adapter would name {base.source.name} as its base; {KNOWN}", DO)


def check_whole(model: torch.nn.Module) -> Sequence[Lora]:
    """The adapters of a model's experts; raises `UsageError` for parameters that FSDP has divided among processes."""
    loras = [module for module in model.modules() if isinstance(module, Lora)]
    parts = [name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor")]
    if parts or any(lora.a.ndim != 3 for lora in loras):
        raise UsageError(
            f"{next(iter(parts), 'the adapter')} is divided among processes",
            "FSDP holds a part of each parameter, and an adapter is written whole",
            "on all processes call unshard() of every FSDPModule (FSDP1: be within summon_full_params), then save_adapter on one",
        )
    return loras


def _own(model: torch.nn.Module, theirs: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name without PEFT's wrappers, tensor) of what was loaded and is not saved; not where PEFT has its adapter merged for a while."""
    merged = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "merged", False))
    for name, live in (*model.named_parameters(), *model.named_buffers()):
        if live.data_ptr() not in theirs and not name.startswith(merged) and live.is_floating_point() and not live.is_meta:
            yield name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", "."), live.detach()


def _holds(live: torch.Tensor, stored: DenseTensor, resizable: bool) -> bool:
    """The same numbers, in the type that the model has or had; modules of some releases have other shapes, and are not compared."""
    if tuple(live.shape) != tuple(stored.shape):
        return not resizable
    live, read = live.cpu(), stored.read()
    return any(torch.equal(live.to(dtype), read.to(dtype)) for dtype in (live.dtype, *HALVES))

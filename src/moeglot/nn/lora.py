"""LoRA on experts that stay encoded: one pair of factors for gate and up, which have one input, and one for down."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from moeglot.adapters.config import AdapterConfig
from moeglot.errors import UnsupportedAdapter, UsageError

if TYPE_CHECKING:
    from moeglot.nn.module import Experts

TARGETS = ("gate", "up", "down")


class Lora(torch.nn.Module):
    """a [e, r, in] and b [e, p out, r] in float32 for `roles` in turn; the change of expert e is scale × b a, scale = alpha / r.

    gate and up share `a`, as they do in every adapter of a fused gate_up_proj. A role that is not in `targets` keeps rows of zeros in b.
    """

    def __init__(self, roles: tuple[str, ...], targets: Sequence[str], shape: tuple[int, int, int], rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        experts, out, inner = shape
        self.roles, self.targets, self.rank, self.alpha, self.dropout = roles, tuple(role for role in roles if role in targets), rank, alpha, dropout
        self.trains = False
        """It was put here to train: PEFT freezes it when it wraps the model later."""
        self.beside = ""
        """The name of PEFT's adapter that it was put beside; it is left out where that is not active. Empty: PEFT had none."""
        self.copied: set[str] = set()
        """Names of PEFT's adapters that were copies of that one while this was not zero."""
        self.a = torch.nn.Parameter(torch.empty(experts, rank, inner, dtype=torch.float32, device="cpu"))
        self.b = torch.nn.Parameter(torch.zeros(experts, len(roles) * out, rank, dtype=torch.float32, device="cpu"))
        bound = 1 / math.sqrt(inner)  # as torch.nn.Linear starts, and PEFT with it
        torch.nn.init.uniform_(self.a, -bound, bound)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def extra_repr(self) -> str:
        return f"{' and '.join(self.targets)}, rank {self.rank}, scale {self.scale:g}, dropout {self.dropout:g}"


def experts_of(model: torch.nn.Module) -> dict[str, Experts]:
    """Name -> the native experts of a model; raises `UsageError` if there are none."""
    from moeglot.nn.module import experts_in

    found = experts_in(model)
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no experts that moeglot holds",
            "LoRA goes on moeglot.nn.Experts; other modules are PEFT's business",
            "load the model with moeglot.load(path, native=True)",
        )
    return found


def add_lora(
    model: torch.nn.Module, r: int = 8, alpha: float | None = None, targets: str | Sequence[str] = TARGETS, dropout: float = 0.0
) -> list[torch.nn.Parameter]:
    """Put a LoRA adapter on every native experts module of a model, freeze what is no adapter, and return the new parameters (float32).

    `r`: rank; `alpha`: the changes are multiplied by alpha / r, twice the rank by default. `targets`: among gate, up and down. Adapters that PEFT put on
    other modules stay trainable. Raises `UsageError` for values that mean nothing, or where an adapter is already, and `UnsupportedAdapter` beside one of
    PEFT's that could not be saved together with this.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    check(r, alpha, targets, dropout)
    configs = peft_configs(model)
    for config in configs.values():
        _check_beside(config)
    found = experts_of(model)
    if busy := [name or "it" for name, module in found.items() if module.lora]:
        raise UsageError(f"{busy[0]} has an adapter", "one adapter at a time", "remove_lora(model) takes it off, save_adapter keeps it")
    added: list[torch.nn.Parameter] = []
    beside = next(iter(peft_active(model)), "")
    for name, module in found.items():
        if module.post_expert_norm is not None:
            raise UsageError(f"{name}: no gradient goes through these experts", "their family has a norm after each expert", "leave the experts frozen")
        for place, lora in make(module, r, alpha if alpha is not None else 2 * r, targets, dropout).items():
            module.lora[place] = lora.to(module.lines[0].device)
            lora.trains, lora.beside = True, beside
            added += lora.parameters()
    if not added:
        raise UsageError(f"no expert has {' or '.join(targets)}", f"the family is {next(iter(found.values())).family}", "choose other targets")
    if not configs:  # else PEFT has said what trains
        freeze(model, added)
    return added


def _check_beside(config: Any) -> None:
    """Raises `UnsupportedAdapter` for what PEFT could not save in one folder with an adapter of experts."""
    AdapterConfig(plain(config.to_dict())).check()
    if getattr(config, "lora_bias", False):
        known = "PEFT trains biases of modules alone, and the experts' adapter is one of parameters in the same folder"
        raise UnsupportedAdapter("PEFT's adapter has lora_bias", known, "make it without lora_bias")


def check(r: int, alpha: float | None, targets: Sequence[str], dropout: float) -> None:
    """Raises `UsageError` for values that mean nothing."""
    if unknown := sorted(set(targets) - set(TARGETS)):
        do = "attention is PEFT's business: use get_peft_model for it, or `moeglot tune --modules`"
        raise UsageError(f"{unknown[0]!r} is no matrix of an expert", f"known: {', '.join(TARGETS)}", do)
    if not isinstance(r, int) or r < 1 or not 0 <= dropout < 1 or not targets or not (alpha is None or (alpha and math.isfinite(alpha))):
        told = f"r = {r}, alpha = {alpha}, dropout = {dropout}, targets = {targets}"
        known = "a rank is a whole number of at least 1, alpha is finite and not 0, dropout is at least 0 and below 1, and targets name a matrix"
        raise UsageError(told, known, "check them")


def freeze(model: torch.nn.Module, but: Iterable[torch.nn.Parameter]) -> None:
    """Parameters train, and no others do."""
    mine = {id(parameter) for parameter in but}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in mine)


def peft_configs(model: torch.nn.Module) -> dict[str, Any]:
    """Name -> config of what PEFT has on a model, wrapped or not."""
    return next((dict(configs) for module in model.modules() if (configs := getattr(module, "peft_config", None))), {})


def peft_layers(model: torch.nn.Module) -> dict[str, bool]:
    """Name of a module that PEFT adapted -> whether its adapter is left out now."""
    return {name: module.disable_adapters for name, module in model.named_modules() if isinstance(getattr(module, "disable_adapters", None), bool)}


def peft_active(model: torch.nn.Module) -> list[str]:
    """Names of PEFT's adapters that are active on some module, the first one first."""
    layers: list[Any] = [model.get_submodule(name) for name in peft_layers(model)]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def plain(config: Any) -> Any:
    """What a config says, as JSON has it."""
    return json.loads(json.dumps(config, default=lambda value: sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))))


def make(module: Experts, r: int, alpha: float, targets: Sequence[str], dropout: float) -> dict[str, Lora]:
    """Place -> a fresh adapter, if any of its roles is wanted."""
    found = {place: (roles, (module.num_experts, out, inner)) for place, (roles, out, inner) in module.places.items() if set(roles) & set(targets)}
    return {place: Lora(roles, targets, shape, r, alpha, dropout) for place, (roles, shape) in found.items()}


def remove_lora(model: torch.nn.Module) -> None:
    """Take the adapter off every native experts module."""
    for module in experts_of(model).values():
        module.lora = torch.nn.ModuleDict()

"""What PEFT says of its adapters on a native model, asked before the model computes: whether the experts' adapter is left out too, or cannot be right."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from moeglot.errors import HalfAdapter, UsageError
from moeglot.nn.lora import Lora, peft_active, peft_layers
from moeglot.nn.module import experts_in

WRAPPED = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What wrappers of torch's add to the names of parameters, in a module or in its state dict."""


def follow(model: torch.nn.Module) -> None:
    """Have the experts of a model ask PEFT whenever it computes, and forget the answer afterwards."""
    body: Any = model.base_model
    body.register_forward_pre_hook(_AsPeftSays(model))
    body.register_forward_hook(_forget, always_call=True)
    for module in {body, model}:
        module.register_load_state_dict_pre_hook(_check_loaded)


class _AsPeftSays:
    """A hook of the body of a model, since PEFT before 0.21 calls none of the whole model's; it asks whichever of both PEFT is on.

    It keeps nothing alive. A copy of the whole model has a hook that asks the copy; one of the body alone asks the body.
    """

    def __init__(self, whole: Any) -> None:
        self.whole: Callable[[], Any] = (lambda: None) if whole is None else weakref.ref(whole)

    def __call__(self, body: Any, *_: Any) -> None:
        whole = self.whole()
        as_peft_says(whole if getattr(whole, "peft_config", None) else body)

    def __deepcopy__(self, memo: dict[int, Any]) -> _AsPeftSays:
        return _AsPeftSays(memo.get(id(self.whole())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _AsPeftSays, (None,), (self.whole(),)

    def __setstate__(self, state: tuple[Any]) -> None:
        self.whole = _AsPeftSays(*state).whole


def _forget(body: torch.nn.Module, *_: Any) -> None:
    """What was left out of this pass is there again: backward computes checkpointed layers of an earlier pass once more, and asks nobody."""
    for module in experts_in(body).values():
        module.muted = False


def _check_loaded(body: torch.nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raises `UsageError` where something is loaded and not all of the experts' adapter, which trains: torch leaves it as it is if it is not `strict`.

    Trainer loads so, and its checkpoints of a PEFT model hold PEFT's half alone. Nothing is missed of what is another adapter of PEFT's.
    """
    loras = [lora for module in experts_in(body).values() for lora in module.adapters.values() if lora.trains]
    mine = {id(parameter) for lora in loras for parameter in lora.parameters()}
    layers = [body.get_submodule(name) for name in peft_layers(body)]
    named = {name for layer in layers for held in (_scales(layer), getattr(layer, "modules_to_save", ())) for name in held}
    others = named - {lora.beside or "default" for lora in loras}
    given = {WRAPPED.sub("", key) for key in state if others.isdisjoint(key.split("."))}
    wanted = [name for name, parameter in body.named_parameters(prefix.removesuffix(".")) if id(parameter) in mine]
    missing = [name for name in wanted if WRAPPED.sub("", name) not in given]
    if given and missing:
        what = "nothing" if len(missing) == len(wanted) else f"no {missing[0]} ({len(missing)} such)"
        raise UsageError(
            f"{next((key for key in state if 'lora_' in key), next(iter(state)))} is loaded, and {what} for the adapter of the experts, which trains",
            "PEFT saves its own alone, and Trainer's checkpoints of a PEFT model hold no more; others were written before add_lora, or under other names",
            "keep both with moeglot.nn.save_adapter, and load them with load_adapter(model, path, trainable=True); load what is no adapter before add_lora",
        )


def as_peft_says(model: Any) -> None:
    """Before a native model computes: adapters of experts are left out where PEFT leaves out its own (`disable_adapter`), as a reference model is computed,
    and where the one that they were put beside is not active (`set_adapter`).

    An adapter that PEFT has in its config for experts, and that is on none, is an error: PEFT itself only warns.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return
    layers = peft_layers(model)
    if any(module.lora for module in experts_in(model).values()):
        _check_asked(model, configs, layers)
    muted = bool(layers) and all(layers.values())
    if not muted and any(layers.values()) and any(module.lora for module in experts_in(model).values()):
        some = next(name for name, disabled in layers.items() if disabled)
        raise UsageError(f"{some} has its adapter disabled, and others have not", "adapters of experts follow PEFT's", "use model.disable_adapter()")
    muted = muted or _is_another(model, configs, layers)
    for module in experts_in(model).values():
        module.muted = muted
    model.adapted_by_peft = True
    if model.training and torch.is_grad_enabled() and not muted:
        _check_trained(model, layers)
    for config in configs.values():
        paths = {target.rpartition(".")[0] for target in getattr(config, "target_parameters", None) or ()}
        for name, module in experts_in(model).items() if paths else ():
            if not module.lora and any(f".{name}".endswith(f".{path}") for path in paths):
                raise HalfAdapter(
                    f"{name} has no adapter, and PEFT's config says that it has one",
                    "PEFT knows no parameters of encoded experts, and left its factors out with a warning",
                    "load it with moeglot.nn.load_adapter(model, path)",
                )


def _learns(lora: Lora) -> bool:
    """Some of it; with b alone it is LoRA-FA."""
    return any(parameter.requires_grad for parameter in lora.parameters())


def _scales(layer: Any) -> Mapping[str, float]:
    """adapter -> its scale in a layer of PEFT's; none where PEFT keeps a copy of the module, whose own `scaling` shows through."""
    found = getattr(layer, "scaling", None)
    return found if isinstance(found, Mapping) else {}


def _check_asked(model: torch.nn.Module, configs: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Raises `UsageError` where PEFT's adapter is asked for in a way that the experts' does not follow: for some rows alone, or at another scale."""
    for name in layers:
        layer: Any = model.get_submodule(name)
        if any(isinstance(hook, partial) and "adapter_names" in hook.keywords for hook in layer._forward_pre_hooks.values()):
            raise UsageError(
                "adapter_names gives each row an adapter of its own",
                "the experts' adapter has the tokens of all rows, and PEFT itself refuses this on parameters",
                "load the model again, since PEFT's hooks stay after an error, and compute the rows of each adapter by themselves",
            )
        for adapter, scale in _scales(layer).items():
            r, alpha = layer.r.get(adapter), layer.lora_alpha.get(adapter)
            if not r or adapter not in configs:
                continue
            usual = alpha / (math.sqrt(r) if getattr(configs[adapter], "use_rslora", False) else r)
            if not math.isclose(scale, usual, rel_tol=1e-6, abs_tol=1e-12):
                raise UsageError(
                    f"{name}: PEFT's adapter {adapter!r} has the scale {scale:g}, and its config says {usual:g}",
                    "the experts' adapter has no part in what set_scale or rescale_adapter_scale changed",
                    "use model.disable_adapter() for a scale of 0; for another, save_adapter, change lora_alpha in its adapter_config.json, and load that",
                )


# --- several adapters of PEFT's ----------------------------------------------------------------------------------------------------------


def _is_another(model: torch.nn.Module, configs: Mapping[str, Any], layers: Iterable[str]) -> bool:
    """Another adapter of PEFT's is active than the one that the experts' was put beside: theirs is no part of it.

    TRL copies an adapter to "ref" and computes its reference with that. Where the experts' change was zero then, it is left out. Where it was not, it belongs
    to the copy until one of both has moved; after that there is no right answer, and `UsageError` is raised.
    """
    loras = [lora for module in experts_in(model).values() for lora in module.adapters.values()]
    active = peft_active(model)
    mine = {lora.beside or next(iter(configs)) for lora in loras}
    if layers and not active:
        return True
    if not mine - set(active):
        return False
    name = sorted(mine - set(active))[0]
    if name not in configs:
        raise UsageError(
            f"PEFT's adapter {name!r} is gone, and that of the experts was put beside it",
            f"PEFT has {', '.join(map(repr, configs))}",
            "remove_lora(model) takes it off the experts",
        )
    copies = [other for other in active if _is_copy(model, layers, name, other)]
    if copies and any(bool(lora.b.any()) for lora in loras):
        for lora in loras:
            lora.copied.update(copies)
        return False
    if moved := sorted(set(active) & {other for lora in loras for other in lora.copied} - set(copies)):
        raise UsageError(
            f"PEFT's adapter {moved[0]!r} began as a copy of {name!r}, and of the experts' adapter there is no copy",
            "it was not zero then, and has been trained since",
            "compute the reference before training (TRL: precompute_ref_log_probs=True), or merge first and train a new adapter",
        )
    return True


def _is_copy(model: torch.nn.Module, layers: Iterable[str], name: str, other: str) -> bool:
    """PEFT's two adapters hold the same numbers."""
    found = False
    for layer in layers:
        parameters = dict(model.get_submodule(layer).named_parameters())
        for key, parameter in parameters.items():
            kind, _, rest = key.partition(".")
            if rest.split(".")[0] == name:
                copy = parameters.get(f"{kind}.{other}{rest.removeprefix(name)}")
                found = copy is not None and copy.shape == parameter.shape and torch.equal(copy, parameter)
                if not found:
                    return False
    return found


def _check_trained(model: torch.nn.Module, layers: Iterable[str]) -> None:
    """Raises `UsageError` where PEFT's adapter trains and the one of the experts does not, though it was put there to train."""
    frozen = [name for name, module in experts_in(model).items() if any(lora.trains and not _learns(lora) for lora in module.adapters.values())]
    if frozen and any(parameter.requires_grad for name in layers for parameter in model.get_submodule(name).parameters()):
        raise UsageError(
            f"{frozen[0]}: its adapter is frozen, and PEFT's trains",
            "PEFT freezes what it finds when it wraps a model",
            "call get_peft_model first and add_lora after it, or requires_grad_(True) on what add_lora returned",
        )

"""An adapter of encoded experts on disk: one PEFT folder in a stated convention, together with what PEFT has on other modules, and back onto a live model."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moeglot.adapters.adapter import Adapter, open_adapter
from moeglot.adapters.config import CONFIG, PREFIX, TENSORS, AdapterConfig
from moeglot.adapters.convert import convert_adapter
from moeglot.adapters.parts import EMBEDDING, LINEAR
from moeglot.adapters.proof import LIMIT, difference
from moeglot.adapters.written import Module, module_name, whole_name, written_config
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.checkpoint import open as open_checkpoint
from moeglot.conventions import PEFT, target
from moeglot.errors import AdapterError, HalfAdapter, NotVerified, OutputExists, UsageError
from moeglot.factors import Place, holds, join, lay, places, stacked_form
from moeglot.files import newfile
from moeglot.nn.lora import Lora, experts_of, freeze, peft_active, peft_configs, peft_layers, plain
from moeglot.nn.module import Experts
from moeglot.nn.unsaved import check_saved, check_whole

READER = "transformers-5"
FIRST = tuple(f".{first}" for first, _ in (LINEAR, EMBEDDING))
"""How PEFT's keys of the first factors of other modules end: [r, in] of either."""


def save_adapter(model: torch.nn.Module, out: str | Path, *, to: str = READER, base: Checkpoint | str | Path | None = None) -> Path:
    """Write the adapter of a model's native experts, and PEFT's on its other modules, as one PEFT folder that stock PEFT loads on the dense model.

    `to`: a reader or a convention, as in `moeglot.convert_adapter`; `base`: the checkpoint, by default the folder that the model was loaded from.
    The folder is re-read and every change compared with the live one. Raises `AdapterError` where nothing is adapted, `OutputExists`, `NotVerified`.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise OutputExists(f"{out} exists", "moeglot overwrites nothing", "choose another name, or remove it yourself")
    checkpoint = _base(model, base)
    live = {module.layer: module for module in experts_of(model).values() if module.adapters}
    if not live:
        raise AdapterError("no expert has an adapter", "PEFT's own save_pretrained writes what it put on other modules", "call moeglot.nn.add_lora first")
    check_whole(model)
    said, tensors = _of_peft(model)
    check_saved(model, tensors.values(), checkpoint)
    said["task_type"] = said.get("task_type") or _task(model)
    family = checkpoint.format.family
    with newfile.folder(out) as work:
        _write(work, live, checkpoint, said, tensors)
        adapter = open_adapter(work, checkpoint)
        _prove(adapter, live, out)
        if to == READER and target(to, stacked_form(family))[0] is PEFT:
            work.rename(out)
        else:
            convert_adapter(adapter, to, out)
    return out


def _write(work: Path, live: Mapping[int, Experts], base: Checkpoint, said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A PEFT folder of what PEFT has on other modules, and of the experts' adapters."""
    modules = [_module(name, tensor, said) for name, tensor in tensors.items() if name.endswith(FIRST)]
    for place, lora, pair in _of_experts(live, base):
        tensors |= {PREFIX + place.a: pair[0], PREFIX + place.b: pair[1]}
        modules.append(Module(place.name, lora.rank, lora.scale, True))
    whole = [name.removeprefix(PREFIX) for name in tensors if "lora_" not in name]
    said = {"bias": "none", **said, "inference_mode": True, "base_model_name_or_path": base.source.reference}
    config = written_config(said, base, PEFT, modules, whole)
    places = Counter(tensor.data_ptr() for tensor in tensors.values())  # what PEFT ties is stored twice
    copies = {name: tensor.detach().clone() if places[tensor.data_ptr()] > 1 else tensor.detach() for name, tensor in tensors.items()}
    with newfile.by_library(work / TENSORS):
        save_file({name: tensor.contiguous().cpu() for name, tensor in copies.items()}, work / TENSORS, {"format": "pt"})
    (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _base(model: torch.nn.Module, base: Checkpoint | str | Path | None) -> Checkpoint:
    if isinstance(base, Checkpoint):
        return base
    path = base or getattr(getattr(model, "config", None), "name_or_path", None)
    if not path:
        raise UsageError("which checkpoint is this adapter for?", "the model does not say where it was loaded from", "pass base=PATH")
    return open_checkpoint(path)


def _task(model: torch.nn.Module) -> str | None:
    """What PEFT is to wrap the base as; as a classifier it would want a head in the adapter, so as a model of no task."""
    can_generate = getattr(model, "can_generate", None)
    return "CAUSAL_LM" if can_generate is None or can_generate() else None


def _of_peft(model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What PEFT would write: adapter_config.json and tensors; nothing where PEFT has nothing on the model."""
    configs, layers = peft_configs(model), peft_layers(model)
    if not configs or not layers:
        if configs or any(getattr(module, "adapted_by_peft", False) for module in model.modules()):
            told = "if it was merged, the rest of the model is another base now"
            raise UsageError("PEFT's adapter is no longer on the model", told, "save the adapter before it is merged, or all of the model by moeglot.save")
        return {}, {}
    from peft import get_peft_model_state_dict

    if len(configs) > 1:
        raise UsageError(f"PEFT has {len(configs)} adapters on the model", f"they are {', '.join(configs)}", "delete all but the one to save")
    ((name, config),) = configs.items()
    said = plain(config.to_dict())
    AdapterConfig(said).check()
    live = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors = get_peft_model_state_dict(model, state_dict=live, adapter_name=name)  # model.state_dict() would have FSDP2 divide them again
    return said, {key if key.startswith(PREFIX) else PREFIX + key: tensor for key, tensor in tensors.items()}


def _module(key: str, tensor: torch.Tensor, said: Mapping[str, Any]) -> Module:
    name = next(key.removeprefix(PREFIX).removesuffix(first) for first in FIRST if key.endswith(first))
    return Module(name, len(tensor), AdapterConfig(said).scale(name, len(tensor)), False)


def _of_experts(live: Mapping[int, Experts], base: Checkpoint) -> Iterator[tuple[Place, Lora, tuple[torch.Tensor, ...]]]:
    """(place, the adapter there, its two tensors as PEFT has them)."""
    family = base.format.family
    if not holds(PEFT, family):
        raise AdapterError(f"{PEFT.name} has no place for experts of {family.name}", PEFT.about, "train the attention alone")
    for layer, module in live.items():
        roles = [role for lora in module.adapters.values() for role in lora.roles]
        for place in places(PEFT, family, layer, base.sizes["e"], roles):
            lora = next(lora for lora in module.adapters.values() if set(place.roles) <= set(lora.roles))
            if module.num_experts != base.sizes["e"]:
                raise HalfAdapter(f"{place.name}: {module.num_experts} of {base.sizes['e']} experts are here", "the others live elsewhere", "gather them first")
            lefts = [join(place, [_left(lora, role, expert) for role in place.roles]) for expert in range(module.num_experts)]
            yield place, lora, lay(PEFT, lefts, list(lora.a.detach()))


def _left(lora: Lora, role: str, expert: int) -> torch.Tensor:
    """[out, r] of one role."""
    return lora.b.detach()[expert].chunk(len(lora.roles))[lora.roles.index(role)]


def _prove(adapter: Adapter, live: Mapping[int, Experts], out: Path) -> None:
    for layer, module in live.items():
        for lora in module.adapters.values():
            for role in lora.roles:
                for expert in range(module.num_experts):
                    mine = (_left(lora, role, expert).float().cpu() * lora.scale, lora.a.detach()[expert].float().cpu())
                    off = difference(mine, adapter.factors(layer, role, expert))
                    if not off <= LIMIT:
                        what = f"{out}: layer {layer}, {role} of expert {expert} is off by {off:.1e}"
                        raise NotVerified(what, "the change was re-read from disk", "keep the model, and report this")


# --- back onto a model -----------------------------------------------------------------------------------------------------------------


def load_adapter(
    model: torch.nn.Module,
    path: str | Path,
    *,
    convention: str | None = None,
    base: Checkpoint | str | Path | None = None,
    trainable: bool = False,
    dropout: float = 0.0,
) -> torch.nn.Module:
    """Put an adapter in any convention on a model with native experts -> the model, wrapped by PEFT if the adapter changes other modules too.

    Raises as `moeglot.open_adapter` does, and `HalfAdapter` for experts that the model does not hold: nothing is left out.
    """
    adapter = open_adapter(path, _base(model, base), convention)
    live = {module.layer: module for module in experts_of(model).values()}
    if (adapter.dense or adapter.replaced) and peft_configs(model):
        raise UsageError("PEFT has an adapter on the model", f"{path} changes modules that are no experts, too", "load the model anew, then this adapter")
    with tempfile.TemporaryDirectory() as folder:
        if adapter.pairs and adapter.convention is not PEFT:
            convert_adapter(adapter, PEFT.name, Path(folder) / "peft")
            adapter = open_adapter(Path(folder) / "peft", adapter.base)
        for layer in adapter.layers:
            if layer not in live:
                raise HalfAdapter(f"layer {layer} is adapted, and its experts are none that moeglot holds", adapter.known, "load the model with native=True")
            _put(adapter, layer, live[layer], dropout)
        if adapter.dense or adapter.replaced:
            model = _with_peft(adapter, model, Path(folder) / "dense", trainable)
    beside = next(iter(peft_active(model)), "")
    mine = [parameter for module in live.values() for parameter in module.lora.parameters()]
    for module in live.values():
        for lora in module.adapters.values():
            lora.trains, lora.beside = trainable, beside
    if trainable and not peft_configs(model):
        freeze(model, mine)
    for parameter in mine:
        parameter.requires_grad_(trainable)
    return model


def _put(adapter: Adapter, layer: int, module: Experts, dropout: float) -> None:
    if module.lora:
        raise UsageError(f"layer {layer} has an adapter", "one adapter at a time", "remove_lora(model) takes it off, save_adapter keeps it")
    for name, (roles, out, inner) in module.places.items():
        wanted = [role for role in roles if role in adapter.roles(layer)]
        if not wanted:
            continue
        pairs = [adapter.pairs[layer, role, 0] for role in wanted]
        if len({id(pair) for pair in pairs}) > 1:
            raise HalfAdapter(f"layer {layer}: gate and up have pairs of their own", adapter.known, "merge it with moeglot merge")
        lora = Lora(roles, roles, (module.num_experts, out, inner), pairs[0].rank, pairs[0].scale * pairs[0].rank, dropout)
        with torch.no_grad():
            for expert in range(module.num_experts):
                sides = {role: pairs[0].raw(role, expert) for role in wanted}
                lora.a[expert].copy_(sides[wanted[0]][1])
                none = torch.zeros(out, lora.rank, dtype=torch.float32, device="cpu")
                lora.b[expert].copy_(torch.cat([sides[role][0] if role in sides else none for role in roles]))
        parts = dict(zip(roles, lora.b.detach().chunk(len(roles), 1), strict=True))
        lora.targets = tuple(role for role in roles if role in wanted and bool(parts[role].any())) or tuple(wanted)  # zeros: it was no target
        module.lora[name] = lora.to(module.lines[0].device)


def _with_peft(adapter: Adapter, model: torch.nn.Module, folder: Path, trainable: bool) -> torch.nn.Module:
    """The modules that are no experts, by PEFT itself, from a folder that holds these alone."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError("the adapter changes modules that are no experts", f"those are PEFT's business, and {error}", "pip install peft") from error
    folder.mkdir()
    family, modules = adapter.base.format.family, []
    tensors: dict[str, torch.Tensor] = {}
    for name, dense in adapter.dense.items():
        alias = module_name(name, PEFT, family)
        tensors |= {key: entry.read().clone() for key, entry in dense.stored(alias)}
        modules.append(Module(alias, dense.rank, dense.scale, False))
    whole = {whole_name(replaced, PEFT, family): replaced.entry.read().clone() for replaced in adapter.replaced.values()}
    tensors |= {PREFIX + name: tensor for name, tensor in whole.items()}
    with newfile.by_library(folder / TENSORS):
        save_file(tensors, folder / TENSORS, {"format": "pt"})
    said = {**adapter.config.raw, "target_parameters": None}
    (folder / CONFIG).write_text(json.dumps(written_config(said, adapter.base, PEFT, modules, list(whole))), encoding="utf-8")
    wrapped: torch.nn.Module = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    return wrapped

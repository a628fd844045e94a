"""A live transformers model as a checkpoint: its state dict as the tensors of a source, its config as config.json, so that `convert` can write it.

`save_pretrained` loses gpt-oss' experts after an MXFP4 load (5.5.4, 5.23) and raises for FP8; `state_dict()` is whole, under the modules' own names.
Experts that stay encoded are taken from `moeglot.nn.Experts`, which holds them under their keys on disk.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.config import hub_config
from moeglot.checkpoints.identify import Identification, identify
from moeglot.checks import Progress
from moeglot.codings import CODINGS
from moeglot.codings.coding import WEIGHT, leaves_alone
from moeglot.conversion.convert import convert
from moeglot.dtypes import dtype_of
from moeglot.errors import NotVerified, UsageError
from moeglot.files.foreign import HELD
from moeglot.files.shards import Entry
from moeglot.files.source import Source
from moeglot.format import Format
from moeglot.formats import by_name
from moeglot.integrations.transformers_load import INSTALLED, layouts
from moeglot.layout import Stored
from moeglot.nn.held import Held
from moeglot.nn.module import Experts, experts_in
from moeglot.verification.certificate import Certificate


class HeldEntry(Entry):
    """A tensor in memory in place of one in a file."""

    held: torch.Tensor

    def read(self, first: int = 0, rows: int | None = None) -> torch.Tensor:
        whole = self.held.reshape(self.shape)
        found = whole if rows is None else whole[first : first + rows]
        return found.cpu().contiguous()

    def _replace(self, /, **fields: Any) -> HeldEntry:
        found = super()._replace(**fields)
        found.held = self.held
        return found


def hold(name: str, tensor: torch.Tensor) -> HeldEntry:
    """A tensor of a state dict; raises `NotVerified` for one without numbers."""
    if tensor.is_meta:
        raise NotVerified(
            f"{name} is a placeholder without numbers (meta device)", f"the model's state dict, {INSTALLED}", "load the model without offloading, then save it"
        )
    if hasattr(tensor, "to_local"):
        raise UsageError(f"{name} is divided among processes", "this one has a part of it", "load the model without ep_size, then save it")
    found = HeldEntry(name, dtype_of(tensor).name, tuple(tensor.shape), Path("state_dict"), 0, tensor.nbytes)
    found.held = tensor.detach()
    return found


def save(
    model: Any,
    out: str | Path,
    to: str | Format,
    encode: str | None,
    allow_loss: bool,
    shard_size: int | str,
    workers: int | None,
    progress: Progress | None,
    device: str | None,
) -> Certificate:
    """See `moeglot.save`."""
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint_of(model, Path(folder))
        return convert(source, to, out, encode=encode, allow_loss=allow_loss, shard_size=shard_size, workers=workers, progress=progress, device=device)


def checkpoint_of(model: Any, folder: Path) -> Checkpoint:
    """The model as a checkpoint; `folder` gets what lies beside the weights. Raises `FormatError` if its tensors are in no format that we know.

    Native experts are the bytes that they hold now, under their keys on disk; all other tensors, as in any live model, are those of the state dict.
    """
    _require_merged(model)
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(f"{type(model).__name__} is no model of transformers", "its state dict has other names", "merge or unload what wraps the model first")
    _write_beside(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    native = experts_in(model)
    within = {f"{name}.{key}" for name, module in native.items() for key, _ in module.relative()} | _tied(model)
    entries = {name: hold(name, tensor) for name, tensor in model.state_dict().items() if name not in within}
    entries |= {key: hold(key, tensor) for module in native.values() for key, tensor in module.stored()}
    source = Source(f"the live {type(model).__name__}", folder, (), entries, config, ())
    found = _declared(model, native, config) if native else _identified(source)
    checkpoint = _quantized(Checkpoint(source, found.settled(source.name), found), native)
    for problem in checkpoint.problems():
        raise problem
    return checkpoint


def _write_beside(model: Any, folder: Path) -> None:
    """config.json and generation_config.json, as `save_pretrained` says them; it would refuse some of the latter that many a model on the Hub has."""
    model.config.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if HELD in (said.get("quantization_config") or {}):
        del said["quantization_config"]
    said["architectures"] = [type(model).__name__]
    said["torch_dtype" if "torch_dtype" in said else "dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    if model.can_generate() and model.generation_config is not None:
        (folder / "generation_config.json").write_text(model.generation_config.to_json_string(), encoding="utf-8")


def _tied(model: Any) -> set[str]:
    """The output embedding's name where it is the input embedding."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if first is None or last is None or getattr(last, "weight", None) is not getattr(first, "weight", None):
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is last}


def _identified(source: Source) -> Identification:
    """Where names and shapes fit several layouts, the modules' own: the one that `load` gives them."""
    found = identify(source)
    if found.format or not found.candidates:
        return found
    ours = next((form for form in layouts(found.candidates[0]) if form in found.candidates), None)
    return replace(found, format=ours, evidence=(*found.evidence, f"it is a live model of {INSTALLED}"))


# --- experts that stay encoded ---------------------------------------------------------------------------------------------------------


def _require_merged(model: Any) -> None:
    """Raises `UsageError` for an adapter that is applied as the model computes, and is not in its weights."""
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        ours = isinstance(module, Experts) and bool(module.lora)
        if ours or isinstance(getattr(module, "base_layer", None), torch.nn.Module):
            raise UsageError(
                f"{name} has an adapter that is not merged",
                f"{'moeglot.nn.add_lora' if ours else 'PEFT'} put it beside the weights, and a checkpoint has weights alone",
                "moeglot.nn.save_adapter(model, DIR), or PEFT's save_pretrained where no expert has one; then moeglot merge BASE DIR OUT",
            )


def _declared(model: Any, native: Mapping[str, Experts], config: Mapping[str, Any]) -> Identification:
    """The format of a model with native experts, as `moeglot.load` said it: their own lines, and one layout's names for everything else."""
    form = _live_format(native)
    count = form.family.read_sizes(hub_config(config, form))["e"]
    for name, module in native.items():
        if module.num_experts != count:
            raise UsageError(
                f"{name} is divided among processes", f"this one has {module.num_experts} of {count} experts", "load the model without ep_size, then save it"
            )
    return Identification(form, (f"moeglot.load(native=True) read {model.config.name_or_path} into {INSTALLED}",), (form,), {})


def _live_format(native: Mapping[str, Experts]) -> Format:
    """The layout of the other tensors with the lines that the experts hold; where a layer's are others than those that are encoded, that is said too."""
    by_hand = next((name for name, module in native.items() if not module.beside), None)
    if by_hand is not None:
        raise UsageError(
            f"nobody says which format's names stand beside {by_hand}", "moeglot.load does; these experts were put there by other means",
            "moeglot convert the checkpoint that they come from",
        )  # fmt: skip
    chief = _chief(native)
    lines = {module.layer: tuple(_as_held(line) for line in module.lines) for module in native.values()}
    stored = lines[chief.layer]
    return replace(
        by_name(chief.beside).holding(stored),
        name=chief.form if chief.form == chief.beside else f"{chief.beside} with experts of {chief.form}",
        unlike={layer: mine for layer, mine in lines.items() if mine != stored},
        coding=next((coding for coding in CODINGS if coding.name == chief.form.partition("+")[2]), None),
    )


def _chief(native: Mapping[str, Experts]) -> Experts:
    """The first that is quantized, whose lines are the format's; if none is, the first."""
    return next((module for module in native.values() if module.is_encoded), next(iter(native.values())))


def _quantized(checkpoint: Checkpoint, native: Mapping[str, Experts]) -> Checkpoint:
    """With the file's own quantization_config, if that can say that all matrices which are no experts are plain now; else a target's producer words it."""
    coding, said = checkpoint.format.coding, _chief(native).declared if native else {}
    if not (coding and coding.kept and said):
        return checkpoint
    plain = [name.removesuffix(WEIGHT) for name, tensor in checkpoint.dense.items() if name.endswith(WEIGHT) and len(tensor.shape) == 2]
    kept = {coding.kept: [*(said.get(coding.kept) or ()), *(module for module in plain if not leaves_alone(said, module))]}
    if not all(leaves_alone({**said, **kept}, module) for module in plain):
        return checkpoint
    config = {**checkpoint.source.config, "quantization_config": {**said, **kept}}
    return replace(checkpoint, source=replace(checkpoint.source, config=config))


def _as_held(held: Held) -> Stored:
    return held.line if held.line.is_plain else replace(held.line, encoding=held.encoding)

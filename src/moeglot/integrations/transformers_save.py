"""A live transformers model as a checkpoint: its state dict as the tensors of a source, its config as config.json, so that `convert` can write it.

`save_pretrained` loses gpt-oss' experts after an MXFP4 load (5.5.4, 5.23) and raises for FP8; `state_dict()` is whole, under the modules' own names.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from moeglot.certificate import Certificate
from moeglot.checkpoint import Checkpoint, problems
from moeglot.checks import Progress
from moeglot.convert import carry_out
from moeglot.dtypes import dtype_of
from moeglot.errors import NotVerified, UsageError
from moeglot.identify import Identification, identify
from moeglot.integrations.transformers_load import INSTALLED, layouts
from moeglot.nn.module import Experts
from moeglot.plan import plan
from moeglot.shards import Entry
from moeglot.source import Source


class HeldEntry(Entry):
    """A tensor in memory in place of one in a file."""

    held: torch.Tensor

    def read(self, first: int = 0, rows: int | None = None) -> torch.Tensor:
        found = self.held if rows is None else self.held[first : first + rows]
        return found.cpu().contiguous()


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


def save(model: Any, out: Path, to: str, encode: str | None, allow_loss: bool, shard_size: int, workers: int | None, progress: Progress | None) -> Certificate:
    """See `moeglot.save`."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_of(model, Path(folder))
        return carry_out(plan(checkpoint, to, encode=encode, shard_size=shard_size), out, allow_loss, workers, False, progress)


def checkpoint_of(model: Any, folder: Path) -> Checkpoint:
    """The model as a checkpoint; `folder` gets what lies beside the weights. Raises `FormatError` if its tensors are in no format that we know."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(f"{type(model).__name__} is no model of transformers", "its state dict has other names", "merge or unload what wraps the model first")
    if held := next((name for name, module in model.named_modules() if isinstance(module, Experts)), None):
        raise UsageError(
            f"{held} holds what is on disk already", f"the model was loaded with native=True from {model.config.name_or_path}",
            "moeglot convert that checkpoint; moeglot.nn.save_adapter writes what was trained",
        )  # fmt: skip
    _write_beside(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries = {name: hold(name, tensor) for name, tensor in model.state_dict().items() if name not in _tied(model)}
    source = Source(f"the live {type(model).__name__}", folder, (), entries, config, ())
    found = _identified(source)
    checkpoint = Checkpoint(source, found.settled(source.name), found)
    for problem in problems(checkpoint):
        raise problem
    return checkpoint


def _write_beside(model: Any, folder: Path) -> None:
    """config.json and generation_config.json, as `save_pretrained` says them."""
    model.config.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said["architectures"] = [type(model).__name__]
    said["torch_dtype" if "torch_dtype" in said else "dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


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

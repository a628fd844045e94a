"""Folders that hold no safetensors that we may read, or too much: what they are instead, and what to pass in their place."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from moeglot.errors import AmbiguousFormat, BrokenFile, CheckpointError, PickleRefused, UnknownFormat
from moeglot.files.remote import Location, Remote
from moeglot.files.torch_dist.reading import DESCRIPTION, METADATA

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MEGATRON_RANK = re.compile(r"mp_rank_\d+(_\d+)*")
"""What Megatron-LM calls the folder of one process, in checkpoints of its older form."""
TRACKER = "latest_checkpointed_iteration.txt"
"""What Megatron-LM has beside the folders of its iterations: the number of the last one, or "release"."""
NOT_RUN = "loading a pickle runs the code in it; moeglot never does"
SAVE_SAFELY = "save the model as safetensors first, with the framework that wrote it: save_pretrained(..., safe_serialization=True)"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT calls an adapter's config and tensors."""
HELD = "moeglot"
"""The key of quantization_config that says, in the config of a native model, what its experts are. There is no `quant_method` beside it, so that transformers
refuses a folder that `save_pretrained` made: it passes over a method that it does not know, and would give the experts random numbers."""
SAVE_AGAIN = "have Megatron load it and save it with --ckpt-format torch_dist, which moeglot reads"


def check_root(name: str, folder: Location) -> None:
    """Raises `CheckpointError` for a folder that is no checkpoint and has some of Megatron's in its own."""
    inner, said = sorted(path.name for path in folder.iterdir() if path.is_dir() and (path / METADATA).is_file()), ""
    if (folder / TRACKER).is_file():
        with (folder / TRACKER).open("rb") as file:
            said = file.read(40).decode(errors="replace").strip()
    if said or inner:
        which = f"iter_{int(said):07}" if re.fullmatch("[0-9]+", said) else said or inner[-1]
        known = f"{TRACKER} says {said}" if said else f"{METADATA} is in {', '.join(inner[:3])}"
        raise CheckpointError(f"{name}: a folder of Megatron's checkpoints, and none itself", known, f"pass {name}/{which}, with the model's config.json in it")


def check_adapter(name: str, folder: Location, files: Collection[str]) -> None:
    """Raises `CheckpointError` for an adapter, or a folder of some, that is passed as a model. `files`: the names of the safetensors files in the folder."""
    config, tensors = ADAPTER
    inside: list[Location] = sorted(folder.iterdir(), key=lambda path: path.name) if not files else []
    if any(path.suffix in PICKLES for path in inside):
        return
    found = [path for path in [folder, *inside] if {*files} <= {tensors} and (path / config).is_file()]
    if found:
        where = str(found[0])
        do = f"pass the model that it is for; `moeglot merge MODEL {where} OUT` folds it in, `moeglot adapter inspect {where} --base MODEL` says what it is"
        raise CheckpointError(f"{name}: a LoRA adapter, and no checkpoint", f"{config} is in {where}, and no weights of a model", do)


def check_held(name: str, config: Mapping[str, Any]) -> None:
    """Raises `UnknownFormat` for what `save_pretrained`, or a trainer's checkpoint, keeps of a native model."""
    declared = config.get("quantization_config")
    if isinstance(declared, Mapping) and HELD in declared:
        raise UnknownFormat(
            f"{name}: the state of a native model, and no checkpoint of others",
            f"config.json says quantization_config.{HELD} = {declared[HELD]}",
            "resume the trainer from it; or moeglot.load(BASE, native=True), load_state_dict of these tensors, then moeglot.save(model, OUT, to=...)",
        )


def refuse_two(name: str, other: str) -> AmbiguousFormat:
    """A torch_dist checkpoint, and safetensors beside it."""
    known = f"{METADATA} is that of a torch_dist checkpoint, {other} holds tensors too, and nothing says which is meant"
    return AmbiguousFormat(f"{name}: two checkpoints in one folder, {METADATA} and {other}", known, f"pass {name}/{other}, or a folder without it")


def refuse_none(name: str, folder: Location, index: str) -> CheckpointError:
    """There is nothing that we read. `index`: the name of the file that was looked for."""
    names = sorted(path.name for path in folder.iterdir())
    if (backend := _backend(folder)) == "torch_dist":
        known = f"{DESCRIPTION} says sharded_backend = torch_dist, and {METADATA} says where its tensors are"
        return BrokenFile(f"{name}: {METADATA} is missing", known, "copy the folder again with its hidden files: `cp -r FOLDER OUT`, not `cp FOLDER/* OUT`")
    if backend:
        return CheckpointError(f"{name}: a checkpoint of Megatron-Core in an older form", f"{DESCRIPTION} says sharded_backend = {backend}", SAVE_AGAIN)
    if pickles := [one for one in names if one.endswith(PICKLES)]:
        do = SAVE_AGAIN if MEGATRON_RANK.fullmatch(folder.name) else SAVE_SAFELY
        return PickleRefused(f"{name}: only pickle files are here: {', '.join(pickles[:3])}", NOT_RUN, do)
    return CheckpointError(f"{name}: no safetensors file is here", f"looked for {index} and *.safetensors", "pass the folder that holds them")


def refuse_file(path: Location) -> CheckpointError:
    """A file that is not a safetensors file."""
    if path.suffix in PICKLES:
        return PickleRefused(f"{path.name}: never loaded", f"it is a pickle, and {NOT_RUN}", "save it as safetensors first, with the framework that wrote it")
    if isinstance(path, Remote) and re.match("https?://", path.url):
        known = "over http there are no folders that could be listed, and its name does not end in .safetensors"
        return CheckpointError(f"{path}: not a safetensors file", known, "pass the address of one file, config.json beside it, or copy the folder here first")
    return CheckpointError(f"{path.name}: not a safetensors file", f"its name ends in {path.suffix or 'nothing'}", "pass a .safetensors file or its folder")


def _backend(folder: Location) -> str:
    """How Megatron-Core says that it keeps the tensors of a folder; "" where it does not."""
    if not (folder / DESCRIPTION).is_file():
        return ""
    try:
        said = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return ""
    return str(said.get("sharded_backend", "")) if isinstance(said, dict) else ""

"""adapter_config.json: where an adapter lies, what its config says of targets, ranks and scales, and what we refuse by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from moeglot.errors import AdapterError, BrokenFile, PickleRefused, UnsupportedAdapter
from moeglot.files import hub
from moeglot.files.foreign import ADAPTER
from moeglot.files.remote import here, location, on_disk
from moeglot.files.shards import Entry, read_header
from moeglot.files.source import read_json

CONFIG, TENSORS = ADAPTER
PREFIX = "base_model.model."
MARK = "moeglot_convention"
"""Key of our mark in adapter_config.json."""
UNSLOTH_MARK = "lora_B_layout"
"""unsloth_zoo's mark (from 2026.9.6): rank_major or grouped_by_expert."""

REFUSED = {
    "use_dora": "DoRA scales each row anew, which is no low-rank change",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "BD-LoRA has blocks of its own",
    "alora_invocation_tokens": "activated LoRA applies to some tokens only",
    "arrow_config": "Arrow routes between adapters for each token",
    "kasa_config": "KaSA scales by singular values",
    "velora_config": "VeLoRA has factors of its own",
    "monteclora_config": "MonteCLoRA samples its factors",
    "layer_replication": "replicated layers are another model",
    "trainable_token_indices": "single rows of the embedding were trained",
    "megatron_config": "Megatron's parallel layers were adapted",
    "fan_in_fan_out": "the adapted modules are stored [in, out]",
}
"""Key of adapter_config.json -> why it is more than LoRA. https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/config.py"""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that also change the base, so that the adapter fits a base that nobody has."""


TYPES: Mapping[str, type | tuple[type, ...]] = {
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "auto_mapping": dict,
    "target_parameters": list,
    "modules_to_save": list,
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
}
"""What we read, where it is not null."""


_DOT = re.compile(r"\.")


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says."""

    raw: Mapping[str, Any] = field(repr=False)

    @cached_property
    def alpha(self) -> float:
        """Raises `AdapterError` if it says none: without it there is no scale."""
        alpha = self.raw.get("lora_alpha")
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            raise AdapterError(
                f"{CONFIG} has no lora_alpha", "the scale is lora_alpha / rank, and no default is right for every writer", "ask its writer and add it"
            )
        return float(alpha)

    @property
    def rslora(self) -> bool:
        return bool(self.raw.get("use_rslora"))

    @property
    def modules(self) -> str | tuple[str, ...]:
        """target_modules: names, or one regular expression, or "all-linear"."""
        found = self.raw.get("target_modules") or ()
        return found if isinstance(found, str) else tuple(map(str, found))

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(map(str, self.raw.get("target_parameters") or ()))

    @property
    def saved(self) -> tuple[str, ...]:
        """modules_to_save: modules that are replaced as a whole."""
        return tuple(map(str, self.raw.get("modules_to_save") or ()))

    @property
    def biases(self) -> str:
        """Which biases were trained: "none", "all", or "lora_only", those of the modules that are adapted."""
        return str(self.raw.get("bias") or "none")

    def since(self, minor: int) -> bool | None:
        """PEFT 0.`minor` or a later one wrote it. None: it does not say, or was between two releases ("0.18.1.dev0" has some of what became 0.19)."""
        found = re.fullmatch(r"(\d+)\.(\d+)\.(.+)", str(self.raw.get("peft_version")))
        if not found:
            return None
        release = int(found[1]), int(found[2])
        return None if "dev" in found[3] and release == (0, minor - 1) else release >= (0, minor)

    def scale(self, name: str, rank: int) -> float:
        """The scale of a module or parameter, from the rank that its tensors have."""
        alpha = float(self._pattern("alpha_pattern", name, self.alpha))
        return alpha / (sqrt(rank) if self.rslora else rank)

    def rank(self, name: str) -> int | None:
        """The rank that the config says, which decides nothing."""
        r = self._pattern("rank_pattern", name, self.raw.get("r"))
        return r if isinstance(r, int) else None

    def _pattern(self, key: str, name: str, default: Any) -> Any:
        """As PEFT does: the first pattern that matches the end of the name, which is the weight's own where target_parameters names that."""
        name = f"{name}.weight" if self.names_parameter(f"{name}.weight") else name
        for pattern, value in (self.raw.get(key) or {}).items():
            if _compiled(rf"(.*\.)?({pattern})").fullmatch(name):
                return value
        return default

    def names_parameter(self, name: str) -> bool:
        """target_parameters has this parameter."""
        return _ends_in(self._parameters, name)

    def saves(self, name: str) -> bool:
        """modules_to_save has a module that this tensor is in; PEFT compares how the modules' names end, to the letter."""
        parts = name.split(".")[:-1]
        return any(".".join(parts[: n + 1]).endswith(self.saved) for n in range(len(parts))) if self.saved else False

    def names_module(self, name: str, leaf_is_output: bool = False) -> bool:
        """target_modules has this module, and neither exclude_modules nor layers_to_transform leave it out; "all-linear" spares the output layer."""
        if _named(self._excluded, name):
            return False
        if isinstance(self._modules, str) and self._modules.lower() == "all-linear":
            return not leaf_is_output and self._in_layers(name)
        return _named(self._modules, name) and self._in_layers(name)

    # A list may have a name for each expert, and is asked for each expert.

    @cached_property
    def _excluded(self) -> str | frozenset[str]:
        return _targets(self.raw.get("exclude_modules") or ())

    @cached_property
    def _modules(self) -> str | frozenset[str]:
        return _targets(self.modules)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(self.parameters)

    def _in_layers(self, name: str) -> bool:
        """As PEFT has it: the number behind a name of layers_pattern, or behind any; before 0.20 the last such number, which may be an expert's."""
        only, patterns = self.raw.get("layers_to_transform"), self.raw.get("layers_pattern") or [r"[^.]*"]
        if only is None or only == []:
            return True
        before = ".*?" if self.since(20) else ".*"
        found = [_compiled(rf"{before}\.{pattern}\.(\d+)\.").match(f".{name}") for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
        number = next((match[1] for match in found if match), None)
        return number is not None and int(number) in (only if isinstance(only, list) else [only])

    def check(self) -> None:
        """Raises `UnsupportedAdapter` for what is more than LoRA, and `BrokenFile` for values of the wrong type."""
        for key, kinds in TYPES.items():
            value = self.raw.get(key)
            numbers = value.values() if isinstance(value, dict) and key.endswith("_pattern") else ()
            if (value is not None and not isinstance(value, kinds)) or not all(isinstance(number, (int, float)) for number in numbers):
                raise BrokenFile(f"{CONFIG}: {key} = {str(value)[:80]}", "PEFT's LoraConfig writes another type there", "fetch it again from its writer")
            if not all(map(isfinite, numbers)):
                raise BrokenFile(
                    f"{CONFIG}: {key} has a number that is not finite", "it is a rank, or what scales the factors", "fetch it again from its writer"
                )
        if isinstance(alpha := self.raw.get("lora_alpha"), float) and not isfinite(alpha):
            raise BrokenFile(f"{CONFIG}: lora_alpha = {alpha}", "the scale is lora_alpha / rank", "fetch it again from its writer")
        if (kind := self.raw.get("peft_type", "LORA")) != "LORA":
            raise _unsupported(f"peft_type is {kind}", "moeglot reads LoRA")
        for key, why in REFUSED.items():
            if self.raw.get(key):
                raise _unsupported(f"{key} = {self.raw[key]}", why)
        if self.raw.get("ensure_weight_tying") and (tied := [name for name in self.saved if name.endswith(("embed_tokens", "lm_head"))]):
            raise _unsupported(f"ensure_weight_tying, and {tied[0]} in modules_to_save", "that replaces two uses of one tensor")
        init = self.raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
            raise _unsupported(f"init_lora_weights = {init}", "that start also changes the base, so the adapter belongs to a base that is not stored")


def _unsupported(what: str, why: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"this adapter is more than LoRA: {what}",
        f"{CONFIG} says so; {why}",
        "merge it with the library that trained it, into a 16-bit base, and convert the result",
    )


def _targets(told: Any) -> str | frozenset[str]:
    """Names, or one regular expression."""
    return told if isinstance(told, str) else frozenset(map(str, told))


def _named(targets: str | frozenset[str], name: str) -> bool:
    return bool(_compiled(targets).fullmatch(name)) if isinstance(targets, str) else _ends_in(targets, name)


def _ends_in(targets: frozenset[str], name: str) -> bool:
    """It is one of these, or ends in a dot and one of these."""
    return name in targets or any(name[found.end() :] in targets for found in _DOT.finditer(name))


@cache  # re's own holds 512, and there may be one for each expert
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BrokenFile(f"{CONFIG}: {pattern!r} is no regular expression", str(error), "fetch it again from its writer") from error


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter: its tensors by name, without PEFT's prefix, and its config."""

    name: str
    folder: Path
    entries: Mapping[str, Entry] = field(repr=False)
    config: AdapterConfig


def read_files(path: str | Path, adapter: str | None = None) -> AdapterFiles:
    """A folder or a Hub id -> its headers and config. `adapter` names one of several in a folder; "default" is the one in the folder itself.

    Raises `BrokenFile`, `PickleRefused`, `UnsupportedAdapter`, and `AdapterError` if it is not said which of several.
    """
    there = on_disk(here(location(path)), "an adapter's reader")
    if there.is_file():
        raise AdapterError(f"{path}: a file", f"an adapter is a folder, with {CONFIG} and {TENSORS}", f"pass the folder that it is in: {there.parent}")
    folder = _choose(there if there.is_dir() else hub.fetch(str(path)), adapter)
    if not (folder / TENSORS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise PickleRefused(
                f"{path}: only adapter_model.bin is here", "loading a pickle runs the code in it; moeglot never does", "save it as safetensors first"
            )
        raise AdapterError(f"{path}: no {TENSORS}", f"looked in {folder}", "pass the folder that PEFT's save_pretrained wrote")
    config = AdapterConfig(read_json(folder / CONFIG))
    config.check()
    entries, _ = read_header(folder / TENSORS)
    found = {key.removeprefix(PREFIX): entry for key, entry in entries.items()}
    if len(found) != len(entries):
        raise BrokenFile(f"{TENSORS}: a name stands with and without {PREFIX}", f"{len(entries)} tensors, {len(found)} names", "fetch it again from its writer")
    if magnitude := next((key for key in found if "lora_magnitude_vector" in key), None):
        raise _unsupported(f"{magnitude} is there", REFUSED["use_dora"])
    return AdapterFiles(str(path), folder, found, config)


def _choose(folder: Path, adapter: str | None) -> Path:
    found = {"default": folder} if (folder / CONFIG).is_file() else {}
    found |= {sub.name: sub for sub in sorted(folder.iterdir()) if sub.is_dir() and (sub / CONFIG).is_file()}
    if adapter is None and "default" in found:  # those that a trainer left beside its last
        found = {name: one for name, one in found.items() if not re.fullmatch(r"checkpoint-\d+", name)}
    if adapter is not None and adapter in found:
        return found[adapter]
    if not found:
        raise AdapterError(f"{folder}: no {CONFIG}", "it says how the factors are scaled", "pass the folder that PEFT's save_pretrained wrote")
    if adapter is not None or len(found) > 1:
        wrong = f"{folder} has no adapter {adapter!r}" if adapter is not None else f"{folder} holds {len(found)} adapters"
        raise AdapterError(wrong, f"they are {', '.join(found)}", f"pass the folder {next(iter(found.values()))} (or that of another)")
    return next(iter(found.values()))

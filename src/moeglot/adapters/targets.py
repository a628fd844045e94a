"""What adapter_config.json says is adapted, against what the adapter holds: every tensor has a place and every place its tensors, or nothing is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from moeglot.adapters.config import CONFIG, AdapterConfig, AdapterFiles
from moeglot.adapters.parts import Dense, Replaced
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.conventions import PEFT, PER_EXPERT, Convention
from moeglot.errors import HalfAdapter, UnsupportedAdapter
from moeglot.factors import WRAP, Place, aliases, holds, lines_of, places, stacked_form
from moeglot.family import Family
from moeglot.formats import of_family
from moeglot.layout import Stored

FETCH = "pass the base that it was trained on, or fetch the adapter again from its writer; an adapter is never half applied"
Wrapped = Mapping[int, tuple[Stored, ...]]
"""Layer -> the parameters that are wrapped there, in the order in which their module registers them."""


def expert_keys(files: AdapterFiles, family: Family) -> list[str]:
    """The keys of tensors under a path that belongs to a family's experts, in any of its formats."""
    stems = {line.key.partition("experts.")[0] + "experts" for form in of_family(family) for line in form.stored if "experts." in line.key}
    pattern = re.compile(rf"(?:{'|'.join(re.escape(stem) for stem in sorted(stems))})\..+".replace(re.escape("{layer}"), r"\d+"))
    return [key for key in files.entries if pattern.fullmatch(key)]


def wrapped_lines(files: AdapterFiles, base: Checkpoint, keys: Sequence[str]) -> Wrapped:
    """Which parameters are wrapped; the keys say how many, and target_parameters which. Raises `HalfAdapter` where they disagree."""
    lines, found = lines_of(PEFT, base.format.family), {}
    module = lines[0].key.rpartition(".")[0]
    for layer in base.layers:
        stem = module.format(layer=layer)
        depths = {depth for key in keys if (depth := _depth(stem, key)) is not None}
        named = tuple(line for line in lines if files.config.names_parameter(line.key.format(layer=layer)))
        if not named and len(depths) == len(lines) and not files.config.parameters:
            named = lines
        if depths != set(range(len(named))):
            told = f"{CONFIG} names {', '.join(line.short for line in named) or 'none of its parameters'}"
            wrong = f"{stem}: {len(named)} parameters are adapted, and the tensors are those of {len(depths)}"
            raise HalfAdapter(wrong, told, "add target_parameters as its writer had them" if not named else FETCH)
        if named:
            found[layer] = named
    _check_layers(base, keys)
    _check_biases(files.config, base)
    return found


def _depth(stem: str, key: str) -> int | None:
    found = re.fullmatch(rf"{re.escape(stem)}((?:{re.escape(WRAP)})*)\.lora_[AB]\.weight", key)
    return len(found[1]) // len(WRAP) if found else None


def _check_layers(base: Checkpoint, keys: Sequence[str]) -> None:
    for key in keys:
        found = re.search(r"\.(?:layers|blocks?)\.(\d+)\.", f".{key}")
        if not found or int(found[1]) not in base.layers:
            raise HalfAdapter(
                f"{key}: the base has no experts there", f"they are in layers {base.layers}", "check that the base is the one that it was trained on"
            )


def _check_biases(config: AdapterConfig, base: Checkpoint) -> None:
    form = stacked_form(base.format.family)
    for line in form.stored if form else ():
        if not line.is_matrix and config.names_parameter(line.key.format(layer=base.layers[0])):
            raise UnsupportedAdapter(f"{line.short}: LoRA on a bias", f"{CONFIG} says so in target_parameters", "train the adapter without it")


def expected_places(files: AdapterFiles, base: Checkpoint, convention: Convention, keys: Sequence[str], wrapped: Wrapped) -> Iterator[Place]:
    """The places that must hold tensors: what the config names, and what is there; where it names nothing, whatever is in one layer is in all."""
    family, experts = base.format.family, base.sizes["e"]
    if convention.wraps:
        for layer, lines in wrapped.items():
            yield from places(convention, family, layer, experts, [role for line in lines for role in line.roles])
        return
    _check_layers(base, keys)
    every = [place for layer in base.layers for place in places(convention, family, layer, experts, family.roles)]
    there, named = set(keys), {place for place in every if files.config.names_module(place.name)}
    leaves = {place.roles for place in every if place.a in there or place.b in there}
    for place in every:
        if place in named or place.a in there or place.b in there or (not named and place.roles in leaves):
            yield place


def check_experts_there(files: AdapterFiles, base: Checkpoint) -> None:
    """For an adapter without tensors of experts; raises `HalfAdapter` if its config says that there are some."""
    family, config = base.format.family, files.config
    for convention in (PEFT, PER_EXPERT):
        if not holds(convention, family) or (convention is PER_EXPERT and config.modules == "all-linear"):
            continue
        for place in places(convention, family, base.layers[0], base.sizes["e"], family.roles):
            named = config.names_parameter(place.name) if convention.wraps else config.names_module(place.name)
            if named:
                raise HalfAdapter(
                    f"{place.name}: {CONFIG} says that it is adapted, and the adapter has no tensor of experts",
                    f"target_{'parameters' if convention.wraps else 'modules'} names it",
                    "fetch the adapter again; if it was trained where this name means nothing, remove it from the config",
                )


def check_dense_there(files: AdapterFiles, base: Checkpoint, dense: Mapping[str, Dense], replaced: Mapping[str, Replaced]) -> None:
    """Raises `HalfAdapter` for a module that the config names and the adapter does not hold. "all-linear" names the leaves that it holds somewhere."""
    config, family = files.config, base.format.family
    loose = isinstance(config.modules, str) and config.modules.lower() == "all-linear"
    leaves = {name.rpartition(".")[2] for name in dense}
    for key, tensor in base.decoded("F32").items():
        name, _, leaf = key.rpartition(".")
        if key in replaced or family.is_carried(key, base.config):
            continue
        if any(config.saves(alias) for alias in aliases(key, family)):
            raise _missing(key, "trained as a whole", "modules_to_save names it")
        if leaf == "bias" and (config.biases == "all" or (config.biases == "lora_only" and name in dense)):
            raise _missing(key, "trained", f"bias = {config.biases!r}")
        if leaf != "weight" or len(tensor.shape) != 2:
            continue
        if name in dense:
            if config.raw.get("lora_bias") and not dense[name].bias_entry and not dense[name].embedding:
                raise _missing(f"{name}.lora_B.bias", "trained", "lora_bias is on")
        elif any(config.names_parameter(alias) for alias in aliases(key, family)):
            raise _missing(name, "adapted", "target_parameters names it")
        elif loose and name.rpartition(".")[2] not in leaves:
            continue
        elif any(config.names_module(alias.removesuffix(".weight"), name == "lm_head") for alias in aliases(key, family)):
            raise _missing(name, "adapted", "target_modules names it")


def _missing(name: str, what: str, known: str) -> HalfAdapter:
    return HalfAdapter(f"{name}: {CONFIG} says that it is {what}, and the adapter has no tensor for it", known, FETCH)

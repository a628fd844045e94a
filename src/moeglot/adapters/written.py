"""The adapter_config.json that a target's reader understands: names, ranks and scales of what is adapted, and the convention in so many words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeglot.adapters.config import MARK, UNSLOTH_MARK, AdapterConfig
from moeglot.adapters.parts import EMBEDDINGS, Replaced
from moeglot.conventions import Convention
from moeglot.errors import UnsupportedAdapter
from moeglot.factors import WRAP, aliases, places
from moeglot.family import Family

if TYPE_CHECKING:
    from moeglot.checkpoints.checkpoint import Checkpoint

TAKEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names in target_modules that PEFT >= 0.19 takes for the router and the experts of transformers 4, whatever else has them; in target_parameters it does not.
https://github.com/huggingface/peft/blob/v0.19.1/src/peft/utils/transformers_weight_conversion.py"""
DROPPED = ("layers_to_transform", "layers_pattern", "exclude_modules", "peft_version", "auto_mapping", UNSLOTH_MARK, MARK)
"""Keys that speak of the source's names or of its writer."""
NO_TARGET = "dummy-target-modules"
"""What PEFT wants in target_modules where nothing is adapted: it takes an empty list for an error.
https://github.com/huggingface/peft/blob/v0.19.1/src/peft/utils/constants.py"""


@dataclass(frozen=True)
class Module:
    """A module or parameter as the reader calls it, its rank and its scale. `expert`: it holds experts."""

    name: str
    rank: int
    scale: float
    expert: bool


def written_config(said: Mapping[str, Any], base: Checkpoint, to: Convention, modules: Sequence[Module], replaced: Sequence[str] = ()) -> dict[str, Any]:
    """adapter_config.json for a convention's readers; `said`: the writer's own, of which the rest is kept. `replaced`: what the reader calls tensors that are
    replaced as a whole. Raises `UnsupportedAdapter` for what PEFT has for modules alone.
    """
    if to.wraps:
        modules = [_parameter(module, said) for module in modules]
    rank, scale = Counter((module.rank, module.scale) for module in modules).most_common(1)[0][0] if modules else (1, 1.0)
    experts = {module.name for module in modules if module.expert and to.wraps}
    others = {module.name for module in modules if not module.expert and module.name.endswith(".weight")}
    parameters = experts | others
    if parameters and said.get("lora_bias"):
        raise UnsupportedAdapter(
            f"lora_bias, and {min(parameters)} is a parameter", "PEFT trains biases of modules alone", "train the adapter without lora_bias"
        )
    config: dict[str, Any] = {key: value for key, value in said.items() if key not in DROPPED}
    config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "use_rslora": False,
        "rank_pattern": _pattern({module.name: module.rank for module in modules}, rank),
        "alpha_pattern": _pattern({module.name: _number(module.scale * module.rank) for module in modules}, _number(scale * rank)),
        "target_modules": _brief([m.name for m in modules if m.name not in parameters], _every_module(base, to), 1) or (NO_TARGET if not parameters else []),
        "target_parameters": [*_brief(experts, _every_place(base, to), 3), *sorted(others)] if parameters else None,
        "modules_to_save": _saved(said, replaced),
        MARK: to.name,
    }
    if parameters:
        config["lora_dropout"] = 0.0
    if to.wraps:
        config[UNSLOTH_MARK] = "grouped_by_expert" if to.grouped else "rank_major"
    return config


def whole_name(replaced: Replaced, to: Convention, family: Family) -> str:
    """What it calls a tensor that is replaced; PEFT keeps an adapted embedding's own under its wrapper."""
    module, _, leaf = reader_name(replaced.name, to, family).rpartition(".")
    return f"{module}{WRAP if f'{WRAP}.' in replaced.alias else ''}.{leaf}"


def reader_name(name: str, to: Convention, family: Family) -> str:
    """What the target's reader calls a tensor of this Hub name: as in the memory of transformers 5 where experts are stacked, else as on the Hub."""
    return aliases(name, family)[-1 if to.wraps else 0]


def module_name(name: str, to: Convention, family: Family) -> str:
    """The same of a module of this Hub name."""
    return reader_name(f"{name}.weight", to, family).removesuffix(".weight")


def _parameter(module: Module, said: Mapping[str, Any]) -> Module:
    """A module that is no expert as its weight, where target_modules would not mean it."""
    weight = f"{module.name}.weight"
    if module.expert or (module.name.rpartition(".")[2] not in TAKEN and not AdapterConfig(said).names_parameter(weight)):
        return module
    return Module(weight, module.rank, module.scale, False)


def _saved(said: Mapping[str, Any], replaced: Sequence[str]) -> list[str] | None:
    """modules_to_save, with the reader's own names of modules where the writer's do not mean them."""
    config = AdapterConfig(said)
    names = [name.replace(WRAP, "") for name in replaced]  # PEFT keeps a copy of embeddings, asked for or not
    others = [name for name in names if not name.endswith(EMBEDDINGS) and not (name.endswith("bias") and config.biases != "none")]
    whole = {name.rpartition(".")[0] for name in others if not config.saves(name)}
    return sorted({*config.saved, *whole}) or None


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Name -> what is not usual, by the last part of the name where that says it."""
    leaves: dict[str, set[float]] = {}
    for name, value in values.items():
        leaves.setdefault(_end(name, 1), set()).add(value)
    found = {}
    for name, value in values.items():
        if len(leaves[_end(name, 1)]) > 1:
            found[name] = value
        elif value != usual:
            found[_end(name, 1)] = value
    return {name: value for name, value in found.items() if value != usual}


def _brief(names: Iterable[str], every: Iterable[str], parts: int) -> list[str]:
    """The last parts of names where they mean these and no others, else the whole names."""
    names = set(names)
    others = {_end(name, parts) for name in every if name not in names}
    return sorted({_end(name, parts) if _end(name, parts) not in others else name for name in names})


def _end(name: str, parts: int) -> str:
    """The last parts of a name; a number says nothing alone."""
    pieces = name.split(".")
    return ".".join(pieces[-parts - pieces[-1].isdigit() :])


def _every_place(base: Checkpoint, to: Convention) -> list[str]:
    return [place.name for layer in base.layers for place in places(to, base.format.family, layer, base.sizes["e"], base.format.family.roles)]


def _every_module(base: Checkpoint, to: Convention) -> list[str]:
    """Every module that a name in target_modules could mean to the reader."""
    names = [
        reader_name(key, to, base.format.family).removesuffix(".weight")
        for key, tensor in base.decoded("F32").items()
        if key.endswith(".weight") and len(tensor.shape) == 2
    ]
    return names if to.wraps else names + _every_place(base, to)

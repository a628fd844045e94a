"""The adapter_config.json that a target's reader understands: names, ranks and scales of what is adapted, and the convention in so many words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeglot.adapter_config import MARK, UNSLOTH_MARK
from moeglot.adapter_parts import aliases
from moeglot.conventions import Convention
from moeglot.factors import places

if TYPE_CHECKING:
    from moeglot.checkpoint import Checkpoint

DROPPED = ("layers_to_transform", "layers_pattern", "exclude_modules", "peft_version", "auto_mapping", UNSLOTH_MARK, MARK)
"""Keys that speak of the source's names or of its writer."""


@dataclass(frozen=True)
class Module:
    """A module or parameter as the reader calls it, its rank and its scale."""

    name: str
    rank: int
    scale: float
    expert: bool


def written_config(said: Mapping[str, Any], base: Checkpoint, to: Convention, modules: Sequence[Module]) -> dict[str, Any]:
    """adapter_config.json for a convention's readers; `said`: the writer's own, of which the rest is kept."""
    rank, scale = Counter((module.rank, module.scale) for module in modules).most_common(1)[0][0]
    parameters = {module.name for module in modules if module.expert and to.wraps}
    config: dict[str, Any] = {key: value for key, value in said.items() if key not in DROPPED}
    config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "use_rslora": False,
        "rank_pattern": _pattern({module.name: module.rank for module in modules}, rank),
        "alpha_pattern": _pattern({module.name: _number(module.scale * module.rank) for module in modules}, _number(scale * rank)),
        "target_modules": _brief([m.name for m in modules if m.name not in parameters], _every_module(base, to), 1),
        "target_parameters": _brief(parameters, _every_place(base, to), 3) if parameters else None,
        MARK: to.name,
    }
    if to.wraps:
        config[UNSLOTH_MARK] = "grouped_by_expert" if to.grouped else "rank_major"
    return config


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
        aliases(key, base.format.family)[-1 if to.wraps else 0].removesuffix(".weight")
        for key, tensor in base.decoded("F32").items()
        if key.endswith(".weight") and len(tensor.shape) == 2
    ]
    return names if to.wraps else names + _every_place(base, to)

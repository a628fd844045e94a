"""How Megatron-Core names what is stacked: a layer's and an expert's number in our names are places along the first axes of one tensor there.

Layouts, by megatron.core.transformer: of equal layers all are stacked; `moe_layer_freq` as a list (`non_homogeneous_layers`) leaves each layer its name;
`singleton_local_shards` leaves each expert its name too, and cuts gate from up as X_w and X_v, in an MLP without experts as well.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LAYERS = "decoder.layers."
EXPERTS = "experts.experts."
HALVES = ("_w", "_v")
"""What follows a key that holds gate alone, and one that holds up alone."""
_NAMED = re.compile(r"(?P<layers>decoder\.layers\.)(?P<layer>\d+\.)(?P<rest>.*)")
_GATED = re.compile(r".*\.linear_fc1\.(weight|bias)")
_HALF = re.compile(_GATED.pattern + "_[wv]")
_EXPERT = re.compile(r"(?P<before>.*experts\.experts\.)(?P<expert>\d+\.)(?P<after>.*)")


class Stack(NamedTuple):
    """Which numbers in a name are places along an axis: those of `depth` layers, those of experts. Where experts keep theirs, gate is cut from up, too."""

    depth: int
    layers: bool = True
    experts: bool = True


class Keyed(NamedTuple):
    """A key, and the place of what a name has of it along the axes that are stacked there."""

    key: str
    place: tuple[int, ...]


class Unstacked(NamedTuple):
    """What a key holds: a template with a `{}` for each stacked axis, and which half of the rows, None for all."""

    template: str
    axes: int
    half: int | None


def keyed(name: str, stack: Stack) -> tuple[Keyed, ...]:
    """Our name -> the keys that hold its rows in turn, each as many: one, or two where gate is cut from up."""
    index = []
    if stack.layers and (found := _NAMED.fullmatch(name)):
        name = found["layers"] + found["rest"]
        index.append(int(found["layer"][:-1]))
    if stack.experts and (found := _EXPERT.fullmatch(name)):
        name = found["before"] + found["after"]
        index.append(int(found["expert"][:-1]))
    halves = ("",) if stack.experts or not _GATED.fullmatch(name) else HALVES
    return tuple(Keyed(name + half, tuple(index)) for half in halves)


def has_expert(key: str) -> bool:
    """It is a key of one expert alone."""
    return _EXPERT.fullmatch(key) is not None


def unstacked(key: str) -> Unstacked:
    """A key -> our names."""
    axes, half = 0, None
    name = key.replace("{", "{{").replace("}", "}}")
    if name.startswith(LAYERS) and not _NAMED.fullmatch(name):
        name, axes = LAYERS + "{}." + name[len(LAYERS) :], 1
    if EXPERTS in name and not _EXPERT.fullmatch(name):
        name, axes = name.replace(EXPERTS, EXPERTS + "{}.", 1), axes + 1
    if _HALF.fullmatch(name):
        name, half = name[:-2], HALVES.index(name[-2:])
    return Unstacked(name, axes, half)

"""Where a convention keeps the factors of an expert's matrices, and how their axes move between its tensors and [out, r], [r, in]."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from moeglot.axes import parse_axes
from moeglot.conventions import Convention
from moeglot.errors import AdapterError
from moeglot.family import Family
from moeglot.format import Format
from moeglot.formats import layouts_of
from moeglot.layout import ROLES, Sizes, Stored

if TYPE_CHECKING:
    import torch

WRAP = ".base_layer"
"""What PEFT adds to a module's name for each wrapper around it."""


@dataclass(frozen=True)
class Place:
    """The two tensors of one parameter or module: their keys, whose factors they hold, and the `name` that adapter_config.json calls it by.

    `joined`: how axis y holds several roles, as `"(i p)"`; empty for one role. `expert`: None where the tensors hold all experts.
    """

    a: str
    b: str
    name: str
    roles: tuple[str, ...]
    joined: str
    layer: int
    expert: int | None

    def sizes(self, sizes: Sizes) -> dict[str, int]:
        """Sizes of the letters e, x and y of a convention."""
        y, x = (sizes[letter] for letter in ROLES[self.roles[0]].split())
        return {"e": sizes["e"], "x": x, "y": y * len(self.roles)}


def stacked_form(family: Family) -> Format | None:
    """The format in which a family's experts are stacked parameters in the memory of transformers."""
    found = [form for form in layouts_of(family) if form.is_plain and not form.closed and not any(line.per_expert for line in form.stored)]
    return next((form for form in found if form.name.partition("/")[2].startswith("transformers")), found[0] if found else None)


def aliases(name: str, family: Family) -> tuple[str, ...]:
    """Hub name of a tensor -> that, and its name in the memory of transformers 5."""
    found = [name]
    form = stacked_form(family)
    if form and (line := form.from_hub(name)):
        found.append(line[0].key.format(**line[1]))
    return tuple(found)


def per_expert_form(family: Family) -> Format | None:
    """The format in which each expert of a family is a module of its own."""
    found = [form for form in layouts_of(family) if form.is_plain and not form.closed and all(line.per_expert for line in form.stored)]
    return next((form for form in found if form.wrapped), None)


def lines_of(convention: Convention, family: Family) -> tuple[Stored, ...]:
    """The stored matrices that a convention without leaves sits on, in the order in which their module registers them; none if the family has none."""
    form = stacked_form(family) if convention.stacked else per_expert_form(family)
    return tuple(line for line in form.stored if line.is_matrix) if form else ()


def in_out(family: Family) -> bool:
    """A family's stacked parameters lie [e, in, out]."""
    form = stacked_form(family)
    return form is not None and form.is_in_out


def turns_differ(family: Family) -> bool:
    """The stacked parameters of a family lie [e, in, out] in one release of transformers and [e, out, in] in another; an adapter's file does not say which."""
    forms = [form for form in layouts_of(family) if form.is_plain and form.transformers]
    return len({form.is_in_out for form in forms if not any(line.per_expert for line in form.stored)}) > 1


def holds(convention: Convention, family: Family) -> bool:
    """The family's experts can be adapted in this convention."""
    return (not convention.families or family.name in convention.families) and bool(_experts(family) if convention.leaves else lines_of(convention, family))


def _experts(family: Family) -> str | None:
    """The path of a family's experts: `"model.layers.{layer}.mlp.experts"`."""
    if form := stacked_form(family):
        return form.stored[0].key.rpartition(".")[0]
    form = per_expert_form(family)
    return form.stored[0].key.partition(".{expert}")[0] if form else None


def _joined(line: Stored) -> str:
    return next((f"({' '.join(group)})" for group in line.expert_groups if "p" in group), "")


def recognizes(convention: Convention, family: Family) -> re.Pattern[str]:
    """What matches every key that this convention gives the factors of experts of a family."""
    stems = []
    if convention.wraps:
        stems = [re.escape(line.key.rpartition(".")[0]) + rf"(?:{re.escape(WRAP)})*" for line in lines_of(convention, family)]
    elif convention.leaves:
        joint = "." if _experts(family) else ""
        stems = [re.escape(f"{_experts(family)}{joint}{leaf}") for _, leaf in convention.leaves]
    else:
        stems = [re.escape(line.key.removesuffix(".weight")) for line in lines_of(convention, family)]
    pattern = f"(?:{'|'.join(stems)})(?:{'|'.join(map(re.escape, convention.keys))})"
    for letter in ("layer", "expert"):
        pattern = pattern.replace(re.escape("{" + letter + "}"), r"(?:0|[1-9]\d*)")
    return re.compile(pattern)


def places(convention: Convention, family: Family, layer: int, experts: int, roles: Iterable[str]) -> Iterator[Place]:
    """Where a convention keeps the factors of these roles of a layer."""
    wanted = set(roles)
    if convention.wraps:
        wrapped = [line for line in lines_of(convention, family) if wanted & set(line.roles)]
        for n, line in enumerate(wrapped):  # the first parameter is wrapped first, so it is the innermost
            name = line.key.format(layer=layer)
            stem = name.rpartition(".")[0] + WRAP * (len(wrapped) - 1 - n)
            yield _place(convention, stem, name, line.roles, _joined(line), layer, None)
        return
    slots: Sequence[tuple[tuple[str, ...], str, str]]
    if convention.leaves:
        slots = [(held, f"{_experts(family)}.{leaf}", convention.joined if len(held) > 1 else "") for held, leaf in convention.leaves]
    else:
        slots = [(line.roles, line.key.removesuffix(".weight"), _joined(line)) for line in lines_of(convention, family)]
    for held, stem, joined in slots:
        if not wanted & set(held):
            continue
        for expert in range(experts) if not convention.stacked else (None,):
            name = stem.format(layer=layer, expert=expert)
            yield _place(convention, name, name, held, joined, layer, expert)


def _place(convention: Convention, stem: str, name: str, roles: tuple[str, ...], joined: str, layer: int, expert: int | None) -> Place:
    a, b = (stem + key for key in convention.keys)
    return Place(a, b, name, roles, joined, layer, expert)


# --- shapes --------------------------------------------------------------------------------------------------------------------------


class Misfit(Exception):
    """Why two tensors cannot be what a convention says."""


def fit(convention: Convention, place: Place, sizes: Sizes, a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The rank of two tensors of these shapes; raises `Misfit`."""
    known, ranks = place.sizes(sizes), set()
    for key, axes, shape in ((place.a, convention.a, a), (place.b, convention.b, b)):
        groups = parse_axes(axes)
        refused = f'{key} is {list(shape)}; "{axes}" with {", ".join(f"{letter} = {n}" for letter, n in known.items() if letter in axes)} is another shape'
        if len(groups) != len(shape):
            raise Misfit(refused)
        for group, size in zip(groups, shape, strict=True):
            expected = prod(known[letter] for letter in group if letter != "r")
            if "r" in group and size and size % expected == 0:
                ranks.add(size // expected)
            elif size != expected and not (convention.shared and group == ("e",) and size == 1):
                raise Misfit(refused)
    if len(ranks) != 1:
        raise Misfit(f"{place.a} and {place.b} have the ranks {sorted(ranks)}")
    return ranks.pop()


def shapes(convention: Convention, place: Place, sizes: Sizes, rank: int, shared: tuple[bool, bool] = (False, False)) -> tuple[tuple[int, ...], ...]:
    """Shapes of both tensors; `shared`: which of them hold one factor for all experts."""
    known = {**place.sizes(sizes), "r": rank}
    sized = ({**known, "e": 1} if alone else known for alone in shared)
    return tuple(
        tuple(prod(of[letter] for letter in group) for group in parse_axes(axes)) for axes, of in zip((convention.a, convention.b), sized, strict=True)
    )


# --- moving axes ---------------------------------------------------------------------------------------------------------------------


def take(convention: Convention, place: Place, sizes: Sizes, tensors: tuple[torch.Tensor, torch.Tensor], role: str, expert: int) -> tuple[torch.Tensor, ...]:
    """The stored tensors -> (left [out, r], right [r, in]) of one expert and role, unscaled, as views where strides allow it."""
    from einops import rearrange

    known = place.sizes(sizes)
    found = {}
    for axes, tensor in zip((convention.a, convention.b), tensors, strict=True):
        side = "y r" if "y" in axes else "r x"
        if convention.stacked:
            count = {} if convention.shared else {"e": known["e"]}
            each = rearrange(tensor, f"{axes} -> e {side}", **count)
            found[side] = each[expert if len(each) > 1 else 0]
        else:
            found[side] = rearrange(tensor, f"{axes} -> {side}")
    left = found["y r"]
    if place.joined:
        left = rearrange(left, f"{place.joined} r -> p i r", p=len(place.roles))[place.roles.index(role)]
    return left, found["r x"]


def join(place: Place, lefts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[out, r] of each role of a place -> [y, r]; the inverse of what `take` does with them."""
    import torch
    from einops import rearrange

    return rearrange(torch.stack(list(lefts)), f"p i r -> {place.joined} r") if place.joined else lefts[0]


def lay(convention: Convention, lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """[y, r] and [r, x] of each expert (of one, where they are shared or stored alone) -> the two stored tensors."""
    import torch
    from einops import rearrange

    sides = {"y r": list(lefts), "r x": list(rights)}
    found = []
    for axes in (convention.a, convention.b):
        side = "y r" if "y" in axes else "r x"
        if convention.stacked:
            found.append(rearrange(torch.stack(sides[side]), f"e {side} -> {axes}").contiguous())
        elif len(sides[side]) == 1:
            found.append(rearrange(sides[side][0], f"{side} -> {axes}").contiguous())
        else:
            raise AdapterError(f"{convention.name} keeps one expert in a tensor", f"{len(sides[side])} were given", "choose a stacked convention")
    return tuple(found)

"""Write an adapter in another convention: which rank and scale each pair gets, what has to be folded, padded or put side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moeglot.adapters.adapter import Adapter, open_adapter
from moeglot.adapters.config import CONFIG, PREFIX, TENSORS
from moeglot.adapters.parts import Dense, Pair, Replaced
from moeglot.adapters.proof import LIMIT, changes
from moeglot.adapters.written import Module, module_name, whole_name, written_config
from moeglot.conventions import Convention, target
from moeglot.dtypes import DTYPES
from moeglot.errors import AdapterError, NotVerified, OutputExists
from moeglot.factors import Place, holds, join, lay, places, shapes, stacked_form
from moeglot.files import newfile
from moeglot.files.direct import allocate
from moeglot.files.shards import ShardPlan, Slot, tensor_bytes, write_at
from moeglot.layout import Sizes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Written:
    """The factors of one module or parameter as they will be: by which `name` the config calls it, and in which type."""

    name: str
    rank: int
    scale: float
    dtype: str


@dataclass(frozen=True)
class ExpertsWritten(Written):
    """Those of experts: whether roles with right factors of their own lie side by side, and which of a, b is one for all experts."""

    place: Place
    beside: bool
    shared: tuple[bool, bool]


W = TypeVar("W", bound=Written)


@dataclass(frozen=True)
class Conversion:
    """What will be written, before it is: every place, every other module, the config, and what a reader should know."""

    adapter: Adapter
    to: Convention
    places: tuple[ExpertsWritten, ...]
    dense: tuple[tuple[str, Dense, Written], ...]
    replaced: tuple[tuple[str, Replaced], ...]
    config: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def tensors(self) -> int:
        return sum(1 for _ in _slots(self))


def plan_conversion(adapter: Adapter, to: str) -> Conversion:
    """`to`: a convention, or a reader who needs one. Raises `AdapterError` where it cannot hold this adapter."""
    family, experts = adapter.base.format.family, adapter.base.sizes["e"]
    convention, patterns = target(to, stacked_form(family))
    if not holds(convention, family):
        raise AdapterError(f"{convention.name} cannot hold experts of {family.name}", convention.about, "`moeglot adapter conventions` says which are for all")
    found = [_place(adapter, convention, place) for layer in adapter.layers for place in places(convention, family, layer, experts, adapter.roles(layer))]
    dense = [(module_name(dense.name, convention, family), dense) for dense in adapter.dense.values()]
    others = [Written(alias, one.rank, one.scale, _common(one.a.dtype, one.b.dtype)) for alias, one in dense]
    notes = list(_notes(adapter, convention, found))
    if not patterns:
        found, others = _uniform(found, others, notes)
    modules = [Module(one.name, one.rank, one.scale, isinstance(one, ExpertsWritten)) for one in (*found, *others)]
    replaced = [(whole_name(one, convention, family), one) for one in adapter.replaced.values()]
    config = written_config(adapter.config.raw, adapter.base, convention, modules, [name for name, _ in replaced])
    if (dropout := adapter.config.raw.get("lora_dropout")) and not config["lora_dropout"]:
        notes.append(f"lora_dropout = {dropout} becomes 0, because PEFT has none for parameters")
    written = tuple((alias, one, as_) for (alias, one), as_ in zip(dense, others, strict=True))
    return Conversion(adapter, convention, tuple(found), written, tuple(replaced), config, tuple(notes))


def convert_adapter(adapter: Adapter, to: str, out: str | Path) -> Conversion:
    """Write the adapter for another convention or reader into a new folder, and compare every change with the source's, re-read from disk."""
    out = Path(out)
    if os.path.lexists(out):
        raise OutputExists(f"{out} exists", "moeglot overwrites nothing", "choose another name, or remove it yourself")
    plan = plan_conversion(adapter, to)
    with newfile.folder(out) as work:
        _write(plan, work)
        beyond = [off for off in changes(adapter, open_adapter(work, adapter.base)) if not off <= LIMIT]
        if beyond:
            what = f"{out}: the changes differ by {max(beyond):.1e}, and nothing is kept"
            raise NotVerified(what, f"at most {LIMIT:.0e} is rounding", f"keep the source, and report this with its {CONFIG}")
        work.rename(out)
    return plan


# --- planning ------------------------------------------------------------------------------------------------------------------------


def _pairs(adapter: Adapter, place: Place) -> Iterator[tuple[int, list[tuple[str, Pair | None]]]]:
    """(expert, its pair for each role) of a place."""
    for expert in range(adapter.base.sizes["e"]) if place.expert is None else (place.expert,):
        yield expert, [(role, adapter.pairs.get((place.layer, role, expert))) for role in place.roles]


def _place(adapter: Adapter, to: Convention, place: Place) -> ExpertsWritten:
    sources = dict(_pairs(adapter, place))
    used = [pair for of in sources.values() for _, pair in of if pair]
    beside = any(not _one_right(of, expert) for expert, of in sources.items())
    ranks = [[pair.rank for _, pair in of if pair] for of in sources.values()]
    rank = max(max(sum(of) if beside else max(of, default=1) for of in ranks), 1)
    same = len({id(pair) for pair in used}) == 1
    alone = (same and to.shared and _shared(used[0], "x"), same and to.shared and _shared(used[0], "y"))
    shared = alone[::-1] if to.turned else alone
    dtype = _common(*(entry.dtype for pair in used for entry in (pair.a, pair.b))) if used else "F32"
    if len({pair.scale for pair in used}) > 1:
        dtype = "F32"
    return ExpertsWritten(place.name, rank, max((pair.scale for pair in used), key=abs, default=1.0), dtype, place, beside, shared)


def _one_right(roles: list[tuple[str, Pair | None]], expert: int) -> bool:
    """Roles that are adapted have one right factor."""
    import torch

    used = [(role, pair) for role, pair in roles if pair]
    if len({id(pair) for _, pair in used}) <= 1:
        return True
    first, *others = (pair.raw(role, expert)[1] for role, pair in used)
    return all(torch.equal(first, other) for other in others)


def _shared(pair: Pair, side: str) -> bool:
    """This factor is stored once for all experts."""
    entry = pair.a if side in pair.convention.a else pair.b
    return pair.convention.shared and entry.shape[0] == 1 < pair.sizes["e"]


def _common(*dtypes: str) -> str:
    return dtypes[0] if len(set(dtypes)) == 1 and dtypes[0] in ("F32", "BF16", "F16") else "F32"


def _uniform(places: list[ExpertsWritten], others: list[Written], notes: list[str]) -> tuple[list[ExpertsWritten], list[Written]]:
    """One rank and one scale for all, because the reader knows no others."""
    every = [*places, *others]
    rank, scale = max(one.rank for one in every), max((one.scale for one in every), key=abs)
    if len({one.rank for one in every}) > 1:
        notes.append(f"ranks {sorted({one.rank for one in every})} become {rank} with zeros, because the reader knows one rank")
    if len({one.scale for one in every}) > 1:
        notes.append(f"scales are folded into the factors, in float32, because the reader knows one scale ({scale:g})")

    def unify(one: W) -> W:
        return replace(one, rank=rank, scale=scale, dtype=one.dtype if one.scale == scale else "F32")

    return [unify(one) for one in places], [unify(one) for one in others]


def _notes(adapter: Adapter, to: Convention, found: list[ExpertsWritten]) -> Iterator[str]:
    beside = [one for one in found if one.beside]
    if beside:
        rank = max(one.rank for one in beside)
        yield f"gate and up have right factors of their own: they lie side by side (block-diagonal), rank {rank} in {len(beside)} of {len(found)} places"
    pairs = {id(pair): pair for pair in adapter.pairs.values()}.values()
    if any(_shared(pair, side) for pair in pairs for side in "xy") and not to.shared:
        yield f"factors that were one for all experts are repeated {adapter.base.sizes['e']} times"
    if any(len(pair.place.roles) > 1 for pair in pairs) and all(len(one.place.roles) == 1 for one in found):
        yield "the right factor that gate and up shared is written twice"
    missing = sum(
        (layer, role, expert) not in adapter.pairs for layer in adapter.layers for role in adapter.roles(layer) for expert in range(adapter.base.sizes["e"])
    )
    if missing:
        yield f"{missing} matrices of experts that are not adapted get factors of zero"


# --- writing -------------------------------------------------------------------------------------------------------------------------


def _write(plan: Conversion, folder: Path) -> None:
    slots = list(_slots(plan))
    shard = ShardPlan(TENSORS, tuple(sorted(slots, key=lambda slot: (-DTYPES[slot.dtype].size, slot.name))), {"format": "pt"})
    allocate(folder / TENSORS, shard)
    descriptor = os.open(folder / TENSORS, os.O_WRONLY)
    try:
        for key, tensor in _tensors(plan):
            write_at(descriptor, tensor_bytes(tensor), shard.offsets[key])
    finally:
        os.close(descriptor)
    (folder / CONFIG).write_text(json.dumps(plan.config, indent=2, sort_keys=True), encoding="utf-8")


def _slots(plan: Conversion) -> Iterator[Slot]:
    for one in plan.places:
        for key, shape in zip((one.place.a, one.place.b), shapes(plan.to, one.place, plan.adapter.base.sizes, one.rank, one.shared), strict=True):
            yield Slot(PREFIX + key, one.dtype, shape)
    for alias, dense, as_ in plan.dense:
        a, b, bias = dense.keys(alias)
        yield Slot(a, as_.dtype, (as_.rank, dense.a.shape[1]))
        yield Slot(b, as_.dtype, (dense.b.shape[0], as_.rank))
        if dense.bias_entry:
            yield Slot(bias, "F32", dense.bias_entry.shape)
    for name, replaced in plan.replaced:
        yield Slot(PREFIX + name, replaced.entry.dtype, replaced.entry.shape)


def _tensors(plan: Conversion) -> Iterator[tuple[str, torch.Tensor]]:
    for one in plan.places:
        sides = [_sides(one, plan.adapter.base.sizes, expert, roles) for expert, roles in _pairs(plan.adapter, one.place)]
        lefts, rights = ([side[n] for side in sides] for n in (0, 1))
        of_x, of_y = one.shared[::-1] if plan.to.turned else one.shared
        dtype = DTYPES[one.dtype].torch
        stored = lay(plan.to, [left.to(dtype) for left in (lefts[:1] if of_y else lefts)], [right.to(dtype) for right in (rights[:1] if of_x else rights)])
        yield from zip((PREFIX + one.place.a, PREFIX + one.place.b), stored, strict=True)
    for alias, dense, as_ in plan.dense:
        a, b, bias = dense.keys(alias)
        left, right = _scaled(*dense.raw(), _ratio(dense.scale, as_.scale))
        left, right = (side.to(DTYPES[as_.dtype].torch) for side in (_pad(left, as_.rank, 1), _pad(right, as_.rank, 0)))
        yield from zip((a, b), (left.mT, right.mT) if dense.embedding else (right, left), strict=True)
        if dense.bias_entry:
            yield bias, dense.bias_entry.read().float() * _ratio(dense.scale, as_.scale)
    for name, replaced in plan.replaced:
        yield PREFIX + name, replaced.entry.read()


def _sides(one: ExpertsWritten, sizes: Sizes, expert: int, roles: list[tuple[str, Pair | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[y, r] and [r, x] of one expert of a place, padded with zeros to its rank."""
    import torch

    factors = {role: _scaled(*pair.raw(role, expert), _ratio(pair.scale, one.scale)) for role, pair in roles if pair}
    if not factors:
        sizes = one.place.sizes(sizes)
        return torch.zeros(sizes["y"], one.rank, dtype=torch.float32, device="cpu"), torch.zeros(one.rank, sizes["x"], dtype=torch.float32, device="cpu")
    some = next(iter(factors.values()))[0]
    lefts, rights = [], []
    for among in [[role] for role in factors] if one.beside else [list(factors)]:
        rank = factors[among[0]][0].shape[1]
        parts = [factors[role][0] if role in among else torch.zeros(some.shape[0], rank, dtype=some.dtype, device="cpu") for role in one.place.roles]
        lefts.append(join(one.place, parts))
        rights.append(factors[among[0]][1])
    return _pad(torch.cat(lefts, 1), one.rank, 1), _pad(torch.cat(rights), one.rank, 0)


def _ratio(scale: float, written: float) -> float:
    """What factors are multiplied by, so that the written scale stands for theirs."""
    return 1.0 if scale == written else scale / written


def _scaled(left: torch.Tensor, right: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    return (left, right) if ratio == 1 else (left.float() * ratio, right.float())


def _pad(tensor: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    import torch

    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis) if shape[axis] else tensor

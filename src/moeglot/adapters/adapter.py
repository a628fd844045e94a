"""Adapter: the LoRA factors of a base's experts in canonical form, lazily; and of the matrices that are no experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moeglot.adapters.config import CONFIG, AdapterConfig, AdapterFiles, read_files
from moeglot.adapters.evidence import Clustering, cluster
from moeglot.adapters.identify import Reading, candidates, decide
from moeglot.adapters.parts import Dense, Pair, Replaced, check_replaced, read_dense
from moeglot.adapters.targets import check_dense_there, check_experts_there, expected_places, expert_keys, wrapped_lines
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.checkpoint import open as open_checkpoint
from moeglot.conventions import Convention, by_name
from moeglot.errors import HalfAdapter, TensorMismatch, UsageError
from moeglot.factors import Misfit, Place, fit, in_out, stacked_form

if TYPE_CHECKING:
    import torch

Pairs = dict[tuple[int, str, int], Pair]
TENSORS_DECIDE = "tensors decide"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on a base: what it changes, and by how much. `convention` is None where it changes no expert.

    `pairs`: (layer, role, expert) -> the stored tensors that hold these factors. `dense`: Hub name of a module -> its factors. `replaced`: Hub name of a
    tensor -> the tensor that takes its place (modules_to_save, biases).
    """

    files: AdapterFiles
    base: Checkpoint
    convention: Convention | None
    evidence: tuple[str, ...]
    pairs: Mapping[tuple[int, str, int], Pair] = field(repr=False)
    dense: Mapping[str, Dense] = field(repr=False)
    replaced: Mapping[str, Replaced] = field(repr=False)

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def config(self) -> AdapterConfig:
        return self.files.config

    @property
    def known(self) -> str:
        """Second line of an error: what we know and from where."""
        return f"the convention is {self.convention.name}, because {', and '.join(self.evidence)}" if self.convention else "no expert is adapted"

    @cached_property
    def _roles(self) -> dict[int, tuple[str, ...]]:
        found: dict[int, set[str]] = {}
        for layer, role, _ in self.pairs:
            found.setdefault(layer, set()).add(role)
        return {layer: tuple(role for role in self.base.format.family.roles if role in found[layer]) for layer in sorted(found)}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose experts are adapted."""
        return tuple(self._roles)

    def roles(self, layer: int) -> tuple[str, ...]:
        """The roles of a layer that are adapted, for one expert at least."""
        return self._roles.get(layer, ())

    def touches(self, layer: int, role: str, expert: int) -> bool:
        """There are factors for this expert; where there are none, nothing changes."""
        return (layer, role, expert) in self.pairs

    def rank(self, layer: int, role: str, expert: int) -> int:
        """The rank, from the tensors; 0 where nothing changes."""
        return self.pairs[layer, role, expert].rank if self.touches(layer, role, expert) else 0

    def factors(self, layer: int, role: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(left [out, r], right [r, in]) in float32, the scale in left, so that left @ right is the change; r = 0 where nothing changes.

        Reads this expert's factors and no others; raises `BadNumbers` if they are not finite, and `UsageError` for an expert that the base does not have.
        """
        if found := self.pairs.get((layer, role, expert)):
            return found.factors(role, expert)
        roles, experts = self.base.format.family.roles, range(self.base.sizes["e"])
        if layer not in self.base.layers or role not in roles or expert not in experts:
            known = f"the base has layers {self.base.layers}, roles {', '.join(roles)}, experts 0 to {len(experts) - 1}"
            raise UsageError(f"layer {layer!r}, role {role!r}, expert {expert!r}: the base has no such matrix", known, "name one of these")
        import torch

        line = self.base.format.line_of(role)
        out, inner = (self.base.sizes[letter] for letter in line.role_axes.split())
        return torch.zeros(out, 0, dtype=torch.float32, device="cpu"), torch.zeros(0, inner, dtype=torch.float32, device="cpu")

    @cached_property
    def clustering(self) -> Clustering | None:
        """What column norms say about the packing; None for a convention that has none, or where they say nothing."""
        if not self.convention or not self.convention.wraps:
            return None
        return _cluster(self.files, [pair.place for pair in dict.fromkeys(self.pairs.values())], self.base.sizes["e"])


def open_adapter(path: str | Path, base: Checkpoint | str | Path, convention: str | None = None, adapter: str | None = None) -> Adapter:
    """A folder or a Hub id, and the base it is for -> Adapter: convention settled, every tensor used once, every adapted expert complete.

    `convention` names it where the file does not tell; `adapter` is one of several in a folder. Raises `AmbiguousConvention`, `HalfAdapter`,
    `UnsupportedAdapter`, `TensorMismatch` and `Contradiction`.
    """
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    if checkpoint.share:
        wrong = f"an adapter for {checkpoint.source.name}, which has what {checkpoint.share} holds alone"
        raise UsageError(wrong, f"its factors are those of the whole model; {checkpoint.known}", "merge it into the whole model, then convert that")
    if convention is not None:
        by_name(convention)
    return _on(read_files(path, adapter), checkpoint, convention)


def on(adapter: Adapter, base: Checkpoint) -> Adapter:
    """An adapter that may have been opened for another base, as if opened for this one in the convention that was settled; raises as `open_adapter` does."""
    if adapter.base is base:
        return adapter
    return replace(_on(adapter.files, base, adapter.convention.name if adapter.convention else None), evidence=adapter.evidence)


def _on(files: AdapterFiles, base: Checkpoint, convention: str | None) -> Adapter:
    keys = expert_keys(files, base.format.family)
    found, evidence, pairs = _read_experts(files, base, keys, convention) if keys else (None, (), {})
    if not keys:
        check_experts_there(files, base)
    used = {key for pair in dict.fromkeys(pairs.values()) for key in (pair.place.a, pair.place.b)}
    if unused := [key for key in keys if key not in used]:
        raise HalfAdapter(f"{unused[0]}: read by nothing ({len(unused)} such)", f"{len(used)} tensors of experts are read", "fetch it again from its writer")
    dense, replaced = read_dense(files, base, [key for key in files.entries if key not in used], found)
    check_replaced(replaced, base)
    check_dense_there(files, base, dense, replaced)
    return Adapter(files, base, found, evidence, pairs, dense, replaced)


def _read_experts(files: AdapterFiles, base: Checkpoint, keys: Sequence[str], asked: str | None) -> tuple[Convention, tuple[str, ...], Pairs]:
    family = base.format.family
    conventions = candidates(keys, family)
    if not conventions:
        unknown = next((key for key in keys if not candidates([key], family)), keys[0])
        raise HalfAdapter(
            f"{unknown}: no one convention that moeglot knows has this tensor and the others",
            f"{len(keys)} tensors of experts; the base is {family.name}",
            "`moeglot adapter conventions` says what is known; check that the base is the one that it was trained on",
        )
    wrapped = wrapped_lines(files, base, keys) if any(convention.wraps for convention in conventions) else {}
    found = {convention: [_complete(files, place) for place in expected_places(files, base, convention, keys, wrapped)] for convention in conventions}
    readings = {convention: _reading(files, base, convention, places) for convention, places in found.items()}
    chosen, evidence = decide(
        files.name, [*readings.values()], files.config, family, base.sizes["e"], asked, lambda: _cluster(files, found[conventions[0]], base.sizes["e"])
    )
    if chosen.wraps and (form := stacked_form(family)):
        evidence = (*evidence, f"parameters lie {'[e, in, out]' if in_out(family) else '[e, out, in]'} in {form.name}")
    pairs: Pairs = {}
    other: dict[str, list[str]] = defaultdict(list)
    for place, rank in zip(found[chosen], readings[chosen].ranks, strict=True):
        pair = Pair(chosen, place, files.entries[place.a], files.entries[place.b], rank, files.config.scale(place.name, rank), base.sizes)
        if (said := files.config.rank(place.name)) != rank:
            if chosen.packed:
                raise _of_other_experts(files, base, place, rank, said)
            other[f"have rank {rank}, {CONFIG} says {said or 'no rank'}; {TENSORS_DECIDE}"].append(place.name)
        for role in place.roles:
            for expert in range(base.sizes["e"]) if place.expert is None else (place.expert,):
                pairs[place.layer, role, expert] = pair
    told = (f"the tensors of {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)} {what}" for what, names in other.items())
    return chosen, (*evidence, *told), pairs


def _complete(files: AdapterFiles, place: Place) -> Place:
    for key in (place.a, place.b):
        if key not in files.entries:
            raise HalfAdapter(f"{key} is missing", f"{place.name} is adapted, and a change needs both factors", "fetch the adapter again from its writer")
    return place


def _of_other_experts(files: AdapterFiles, base: Checkpoint, place: Place, rank: int, said: int | None) -> TensorMismatch:
    """Cut at another number of experts than it was trained with, an axis of both gives factors that belong to nobody."""
    e, entry = base.sizes["e"], files.entries[place.a]
    whole = f"{e * rank // said} experts of rank {said}" if said and e * rank % said == 0 else "no whole number of experts of that rank"
    known = f"the base has {e} experts, so each would have rank {rank}; {CONFIG} says {f'r = {said}' if said else 'no rank'} there"
    return TensorMismatch(
        f"{place.a} is {list(entry.shape)}: {e * rank} rows for all ranks of all experts",
        known + (f", and {e * rank} rows are {whole}" if said else ", and a product does not tell its factors"),
        f"pass the base that it was trained on; if that is this one, have {CONFIG} say the rank that it was trained with (r, rank_pattern)",
    )


def _reading(files: AdapterFiles, base: Checkpoint, convention: Convention, places: Sequence[Place]) -> Reading:
    ranks: list[int] = []
    try:
        for place in places:
            ranks.append(fit(convention, place, base.sizes, files.entries[place.a].shape, files.entries[place.b].shape))
    except Misfit as refuted:
        return Reading(convention, tuple(ranks), str(refuted))
    return Reading(convention, tuple(ranks), None)


def _cluster(files: AdapterFiles, places: Sequence[Place], experts: int) -> Clustering | None:
    return cluster((files.entries[place.b].read() for place in places), experts)

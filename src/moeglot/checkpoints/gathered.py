"""The state dicts of all processes as one checkpoint of the whole model: which of them has what, what several have in common, and that none is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, product
from typing import Any

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.dense import HubTensor
from moeglot.checkpoints.identify import MARK, Identification
from moeglot.encoded import Encoded
from moeglot.encoding import Encoding
from moeglot.errors import CheckpointError, Contradiction, TensorMismatch
from moeglot.files.identity import SOURCE
from moeglot.files.shards import Entry
from moeglot.files.source import Source
from moeglot.files.views import copies, joined, unequal, window
from moeglot.floats import values
from moeglot.format import Dense
from moeglot.layout import Stored
from moeglot.share import SHARE, Share

AGAIN = "write them again, of one model and for one division"


@dataclass(frozen=True)
class Gathered(Checkpoint):
    """What all `ranks` hold together; each is the checkpoint of one folder. What several hold is read from each of them and compared."""

    ranks: tuple[Checkpoint, ...] = field(repr=False)

    def problems(self) -> Iterator[Exception]:
        for rank in self.ranks:
            yield from rank.problems()

    def encoding(self, line: Stored, layer: int) -> Encoding:
        rank, local = next(self._stage(layer))
        return rank.encoding(line, local)

    def stored(self, line: Stored, layer: int, expert: int, only: range | None = None) -> Encoded:
        """One expert's slice, put together of what each process of expert tensor parallelism has; raises `Contradiction` where copies differ."""
        assert only is None
        found: dict[int, list[tuple[Checkpoint, Encoded]]] = {}
        for rank, local in self._stage(layer):
            here = share_of(rank).ep.of(self.sizes["e"])
            if expert in here:
                found.setdefault(share_of(rank).etp.rank, []).append((rank, rank.stored(line, local, expert - here.start)))
        pieces = [_one_of(line, layer, expert, found[etp]) for etp in sorted(found)]
        return pieces[0] if len(pieces) == 1 else _side_by_side(line, pieces)

    def _stage(self, layer: int) -> Iterator[tuple[Checkpoint, int]]:
        """The processes that have a layer, each with the number that it has there."""
        return ((rank, layer - rank.stage.start) for rank in self.ranks if layer in rank.stage)

    @cached_property
    def others(self) -> dict[str, Entry]:
        return {f"{rank.source.folder.name}/{key}": entry for rank in self.ranks for key, entry in rank.others.items()}

    @cached_property
    def dense(self) -> dict[str, HubTensor]:
        """Hub name -> tensor that is no expert, put together; raises `Contradiction`, when it is read, where copies differ."""
        found: dict[str, list[tuple[Share, Dense, HubTensor]]] = {}
        for rank in self.ranks:
            for name, tensor in rank.dense.items():
                line, whole = _whole_name(rank, name)
                found.setdefault(whole, []).append((share_of(rank), line, tensor))
        return {name: self._together(name, held) for name, held in found.items()}

    def _together(self, name: str, held: list[tuple[Share, Dense, HubTensor]]) -> HubTensor:
        line, like = held[0][1], held[0][2]
        if len({(tensor.dtype, tensor.shape[bool(line.padded) :]) for _, _, tensor in held}) > 1:
            raise Contradiction(f"{name} is not alike in all folders", f"it is {_kinds(held)}", AGAIN)
        if not line.tp:
            return HubTensor(name, copies(name, [_rows(tensor) for *_, tensor in held]))
        ordered = sorted(held, key=lambda one: one[0].tp.rank)
        of_each = [[tensor for *_, tensor in same] for _, same in groupby(ordered, key=lambda one: one[0].tp.rank)]
        if line.heads:  # in every process queries, keys and values take turns, and so they do in the whole
            entry = joined(like.entry.name, [copies(name, [tensor.entry for tensor in same]) for same in of_each], 0)
            return HubTensor(name, entry, like.first, like.rows, line.groups(self.config))
        return HubTensor(name, joined(name, [copies(name, [_rows(tensor) for tensor in same]) for same in of_each], int(line.tp == "columns")))


def share_of(rank: Checkpoint) -> Share:
    """Whose a rank is: every one that is gathered has a share."""
    assert rank.share
    return rank.share


def _rows(tensor: HubTensor) -> Entry:
    """The rows that a tensor of the Hub has of a stored one."""
    return tensor.entry if tensor.rows is None else window(tensor.entry, 0, range(tensor.first, tensor.first + tensor.rows))


def _kinds(held: list[tuple[Share, Dense, HubTensor]]) -> str:
    return " and ".join(dict.fromkeys(f"{tensor.dtype} {list(tensor.shape)} in {tensor.entry.path.parent.name}" for *_, tensor in held))


def _whole_name(rank: Checkpoint, name: str) -> tuple[Dense, str]:
    """The line of a Hub tensor of one process, and its name in the whole model."""
    named = rank.format.from_hub(name, rank.layers)
    if not named:
        raise TensorMismatch(f"{name}: {rank.format.name} has no such tensor", rank.known, AGAIN)
    line, braces = named
    template = next(key for key in line.hub if key.format(**braces) == name)
    whole = {"layer": str(rank.number(int(braces["layer"])))} if "layer" in braces else {}
    return line, template.format(**braces | whole)


def _one_of(line: Stored, layer: int, expert: int, held: Sequence[tuple[Checkpoint, Encoded]]) -> Encoded:
    """What several processes hold alike."""
    from moeglot.kernels.bits import same

    (rank, first), *others = held
    for other, again in others:
        if not all(same(part, again.parts[name]) for name, part in first.parts.items()):
            one, two = (next(iter(r.source.entries.values())) for r in (rank, other))
            raise unequal(f"layer {layer}, expert {expert}, {line.short}", one, two)
    return first


def _side_by_side(line: Stored, pieces: Sequence[Encoded]) -> Encoded:
    """One expert's slice of floats, from slices that divide its intermediate size."""
    import torch

    roles = [line.split(piece) for piece in pieces]
    axis = line.role_axes.split().index("i")
    return line.join(lambda role: values(torch.cat([each[role].parts["value"] for each in roles], axis)))


def require_marks(source: Source) -> None:
    """Each folder of this one is that of a process; raises `CheckpointError` where one does not say so, or none does."""
    if not (strange := [rank for rank in source.ranks if not rank.share]):
        return
    some = len(strange) < len(source.ranks)
    raise CheckpointError(
        f"{strange[0].name}: no header says which process of several this is" if some else f"{source.name}: no safetensors file is here",
        f"{source.name} has {len(source.ranks)} folders; moeglot writes {SHARE} into each file of a process, and takes nothing from names and shapes",
        "pass one of its folders, if each is a model; if Megatron wrote them for its processes, have it save a torch_dist checkpoint, which needs no mark",
    )


def gather(source: Source, ranks: tuple[Checkpoint, ...]) -> Checkpoint:
    """What the folders of a folder hold together; raises `CheckpointError` where a process is missing, and `Contradiction` where they are not of one model,
    one format, one division and one source.
    """
    _require_one(source, ranks, {rank.source.name: rank.format.name for rank in ranks}, MARK)
    _require_one(source, ranks, {rank.source.name: _division(share_of(rank)) for rank in ranks}, SHARE)
    _require_one(source, ranks, {rank.source.name: rank.source.config for rank in ranks}, "config.json")
    _require_one(source, ranks, {rank.source.name: rank.source.identity or "nothing" for rank in ranks}, SOURCE, "sources")
    _require_each(source, ranks)
    one = ranks[0].source.identity
    of_one = f"{SOURCE} = {one}" if one else f"no {SOURCE}: that they were made of one source, only what several of them hold alike tells"
    evidence = (f"the safetensors headers of its {len(ranks)} folders say {MARK} = {ranks[0].format.name}, a {SHARE} each, and {of_one}",)
    first = ranks[0].identification
    found = Gathered(source, ranks[0].format, Identification(first.format, evidence, first.candidates, first.ruled_out), ranks)
    _require_alike(found)
    return found


def _division(share: Share) -> dict[str, Any]:
    return {**{f"{kind}_size": rank.size for kind, rank in share.ranks.items()}, "padded_vocab_size": share.words}


def _require_one(source: Source, ranks: Sequence[Checkpoint], said: dict[str, Any], where: str, what: str = "models") -> None:
    """All folders say the same."""
    (first, told), *others = said.items()
    if unlike := [(name, other) for name, other in others if other != told]:
        name, other = unlike[0]
        differs = (
            next(((told.get(key), other.get(key), key) for key in {**told, **other} if told.get(key) != other.get(key)), None)
            if isinstance(told, dict)
            else None
        )
        one, two = (f"{differs[2]} = {differs[0]}", f"{differs[2]} = {differs[1]}") if differs else (told, other)
        raise Contradiction(f"{source.name} has folders of different {what}", f"{where} says {one} in {first}, and {two} in {name}", AGAIN)


def _require_each(source: Source, ranks: Sequence[Checkpoint]) -> None:
    """Every process is there, once: of tensor parallelism in each stage, and of expert tensor and expert parallelism in each stage."""
    shares = {rank.source.folder.name: share_of(rank) for rank in ranks}
    names: dict[str, str] = {}
    for name, share in shares.items():
        if share.mark in names:
            wrong = f"{source.name} has {share} twice"
            raise Contradiction(wrong, f"{SHARE} says so in {names[share.mark]} and in {name}", "remove one, or write the one again that should be another")
        names[share.mark] = name
    one = next(iter(shares.values()))
    for kinds in (("pp", "tp"), ("pp", "etp", "ep")):
        there = {tuple(share.ranks[kind].rank for kind in kinds) for share in shares.values()}
        for place in product(*(range(one.ranks[kind].size) for kind in kinds)):
            if place not in there:
                missing = ", ".join(f"{kind} rank {n} of {one.ranks[kind].size}" for kind, n in zip(kinds, place, strict=True) if one.ranks[kind].size > 1)
                known = f"its folders: {'; '.join(f'{name} has {share}' for name, share in shares.items())}"
                raise CheckpointError(f"{source.name}: {missing} is missing", known, "put its folder there; moeglot convert writes it from the whole model")


def _require_alike(found: Gathered) -> None:
    """Processes of one stage have tensors of the same names and types."""
    for _, same in groupby(sorted(found.ranks, key=lambda rank: rank.stage.start), key=lambda rank: rank.stage.start):
        first, *others = same
        for other in others:
            if unlike := sorted(first.dense.keys() ^ other.dense.keys()):
                wrong = f"{unlike[0]} is in one of {first.source.name} and {other.source.name} alone"
                raise Contradiction(wrong, "both are of one stage of the pipeline", AGAIN)
            places = ((line, layer) for layer in first.layers for line in first.format.stored)
            for line, layer in places:
                one, two = first.encoding(line, layer), other.encoding(line, layer)
                if one != two:
                    told = f"{one} in {first.source.name} and {two} in {other.source.name}"
                    raise Contradiction(f"layer {layer}: {line.short} is {told}", "one tensor has one type", AGAIN)

"""Of the checkpoint of a whole model, what one process holds, as a checkpoint in which layers and experts are numbered from 0; of no other is a number read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.dense import DecodedTensor, DenseTensor, HubTensor
from moeglot.encoded import Encoded
from moeglot.encoding import Encoding
from moeglot.errors import UsageError
from moeglot.family import dig
from moeglot.files.shards import Entry
from moeglot.format import Dense, Format
from moeglot.layout import Stored
from moeglot.share import Share

T = TypeVar("T", HubTensor, DecodedTensor)


@dataclass(frozen=True)
class Divided(Checkpoint):
    """The part `mine` of `whole`, divided as the lines of the format `target` say."""

    whole: Checkpoint
    mine: Share
    target: Format

    @property
    def share(self) -> Share:
        return self.mine

    @cached_property
    def sizes(self) -> dict[str, int]:
        return self.mine.sizes(self.whole.sizes)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return tuple(n - self.stage.start for n in self.whole.layers if n in self.stage)

    @cached_property
    def numbers(self) -> range:
        """The numbers that the experts have in the whole."""
        return self.mine.ep.of(self.whole.sizes["e"])

    @cached_property
    def inner(self) -> range:
        """Which rows of an expert's gate and up, and columns of its down, are here."""
        return self.mine.etp.of(self.whole.sizes["i"])

    def line(self, line: Stored, layer: int) -> Stored:
        return self.whole.line(line, self.stage[layer])

    def encoding(self, line: Stored, layer: int) -> Encoding:
        return self.whole.encoding(line, self.stage[layer])

    def checked(self, line: Stored, layer: int, expert: int) -> Encoded:
        stored = self.stored(line, layer, expert)
        if stored.encoding.check(stored.parts):
            self.whole.checked(line, self.stage[layer], self.numbers[expert])  # which says where that is
        return stored

    def stored(self, line: Stored, layer: int, expert: int, only: range | None = None) -> Encoded:
        line = self.line(line, layer)
        place = line, self.stage[layer], self.numbers[expert]
        if self.mine.etp.size == 1:
            return self.whole.stored(*place)
        if line.per_expert and line.expert_groups[0] == ("i",):
            return self.whole.stored(*place, only=self.inner)
        roles = line.split(self.whole.stored(*place))
        return line.join(lambda role: roles[role].cut(line.role_axes.split().index("i"), self.inner))

    @cached_property
    def others(self) -> dict[str, Entry]:
        return self.whole.others

    @cached_property
    def dense(self) -> dict[str, HubTensor]:
        coded = {name: tensor for name, tensor in self.whole.dense.items() if name in self.whole.coded}
        return {**coded, **self._mine({name: tensor for name, tensor in self.whole.dense.items() if name not in coded})}

    def decoded(self, dtype: str) -> dict[str, DenseTensor]:
        found = self.whole.decoded(dtype)
        coded = {name: tensor for name, tensor in found.items() if isinstance(tensor, DecodedTensor)}
        plain = {name: tensor for name, tensor in found.items() if isinstance(tensor, HubTensor)}
        return {**self._mine(plain), **self._mine(coded)}

    @property
    def has_quantized_others(self) -> bool:
        return self.whole.has_quantized_others

    def _mine(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Hub name here -> what is here of a tensor; what the target has no place for stays as it is, to be refused by name."""
        found = {}
        for name, tensor in tensors.items():
            named = self.target.from_hub(name, self.whole.layers)
            layer = int(named[1].get("layer", -1)) if named else -1
            if not named or layer >= self.format.family.count(self.config):
                found[name] = tensor
            elif self._is_here(named[0], layer):
                line, braces = named
                template = next(key for key in line.hub if key.format(**braces) == name)
                renamed = template.format(**braces | ({"layer": str(layer - self.stage.start)} if layer >= 0 else {}))
                found[renamed] = self._cut(line, tensor, renamed)
        return found

    def _is_here(self, line: Dense, layer: int) -> bool:
        """`layer`: -1 for what is in none."""
        pp = self.mine.pp
        return layer in self.stage if layer >= 0 else not line.stage or pp.rank == (0 if line.stage == "first" else pp.size - 1)

    def _cut(self, line: Dense, tensor: T, name: str) -> T:
        tp, axis = self.mine.tp, int(line.tp == "columns")
        if line.padded:
            run = self.mine.padded_words(tensor.shape[0])
            return _part(tensor, name, 0, range(min(run.start, tensor.shape[0]), min(run.stop, tensor.shape[0])))
        if not line.tp or tp.size == 1:
            return _part(tensor, name, 0, None)
        for key in line.heads or ((line.between,) if line.between else ()):
            tp.of(dig(self.config, key), f"heads ({key})", "tp")
        return _part(tensor, name, axis, tp.of(tensor.shape[axis], f"{line.tp} of {tensor.name}", "tp"))


def _part(tensor: T, name: str, axis: int, run: range | None) -> T:
    return replace(tensor, name=name) if run is None or len(run) == tensor.shape[axis] else tensor.part(name, axis, run)


def divided(checkpoint: Checkpoint, share: Share, target: Format) -> Checkpoint:
    """What a share holds in a format; raises `UsageError` if the checkpoint has only what another does, or if it cannot be divided so."""
    if checkpoint.share == share:
        _require_alike(checkpoint, target)
        return checkpoint
    if share.is_whole and not checkpoint.share:
        return checkpoint
    if checkpoint.share:
        wrong = f"{checkpoint.source.name} has what {checkpoint.share} holds, not what {share} does"
        raise UsageError(wrong, checkpoint.known, "pass the checkpoint of the whole model")
    found = Divided(checkpoint.source, checkpoint.format, checkpoint.identification, checkpoint, share, target)
    _require_experts(found)
    _require_ends(found)
    return found


def _require_alike(checkpoint: Checkpoint, target: Format) -> None:
    """What one process has in one format is what it has in another; raises `UsageError` where tensor parallelism divides a tensor in one of them alone."""
    if checkpoint.tp == 1:
        return
    theirs = {name: line.tp for line in target.dense for name in line.hub}
    unlike = [name for line in checkpoint.format.dense for name in line.hub if theirs.get(name, line.tp) != line.tp]
    if unlike:
        name = unlike[0].format(layer=0, rest="weight")
        wrong = f"{name} is whole in one of {checkpoint.format.name} and {target.name}, and divided in the other"
        raise UsageError(wrong, f"{checkpoint.source.name} has what {checkpoint.share} holds; {target.source}", "pass the checkpoint of the whole model")


def _require_experts(found: Divided) -> None:
    """Raises `UsageError` where this process has no experts, or parts of some that cannot be cut."""
    sizes, etp = found.sizes, found.mine.etp
    if not found.layers:
        wrong = f"{found.mine} has no layer with experts"
        known = f"its layers are {found.stage.start} to {found.stage.stop - 1} of the model, experts are in {found.whole.layers[0]} and on"
        raise UsageError(wrong, known, "choose a smaller pp_size, or write a torch_dist checkpoint")
    if etp.size == 1:
        return
    name = found.format.family.name
    if any(not line.is_matrix for line in found.target.stored):
        known = "its experts have biases, and Megatron-Core has those with expert_tensor_parallel_size = 1 alone (transformer_config.py)"
        raise UsageError(f"{name} with --etp-size {etp.size}", known, "pass --etp-size 1")
    for line in found.format.stored:
        encoding, axes = found.encoding(line, found.layers[0]).upright, line.role_axes.split()
        if (
            not line.movable(encoding, found.whole.sizes)
            or encoding.is_whole
            or not all(part.cuts(len(axes), axes.index("i"), sizes["i"]) for part in encoding.parts)
        ):
            known = (
                f"each has {sizes['i']} of {found.whole.sizes['i']} along i, and some block of codes, or what lies beside them, belongs to more; {found.known}"
            )
            raise UsageError(f"{line.short} in {encoding} cannot be divided among {etp.size} processes", known, "pass --etp-size 1, or decode the model first")


def _require_ends(found: Divided) -> None:
    """Raises `UsageError` where an output that is tied to the embedding would lie on another stage."""
    outputs = [name for line in found.target.dense if line.padded and line.stage == "last" for name in line.hub]
    if found.mine.pp.size > 1 and (missing := [name for name in outputs if name not in found.whole.dense]):
        wrong = f"{missing[0]} is not there, so that the output is tied to the embedding, and --pp-size is {found.mine.pp.size}"
        known = "the one is on the last stage and the other on the first, where Megatron-Core keeps a copy of it"
        raise UsageError(wrong, known, "leave --pp-rank and --pp-size out, or write a torch_dist checkpoint")


def alongside(subject: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Of another checkpoint, what is to be compared with this one: if this is what one process holds, the same there."""
    return divided(other, subject.share, subject.format) if subject.share else other


def whole_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """The sizes of the whole model, whoever's this is."""
    sizes, share = checkpoint.sizes, checkpoint.share
    return {**sizes, "e": sizes["e"] * share.ep.size, "i": sizes["i"] * share.etp.size} if share else sizes


def numbers(checkpoint: Checkpoint) -> range:
    """The numbers that the experts of a checkpoint have in the whole model."""
    experts = whole_sizes(checkpoint)["e"]
    return checkpoint.share.ep.of(experts) if checkpoint.share else range(experts)


def share_json(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Whose this is, if not all: its place in each kind of parallelism, and its experts and layers by their first and last number in the whole model."""
    if not (share := checkpoint.share):
        return None
    mine, stage = numbers(checkpoint), checkpoint.stage
    ranks = {f"{kind}_{what}": getattr(rank, what) for kind, rank in share.ranks.items() for what in ("rank", "size")}
    return {**ranks, "experts": [mine[0], mine[-1]], "layers": [stage[0], stage[-1]], "padded_vocab_size": share.words}

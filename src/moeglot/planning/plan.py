"""What a command will do, before it does it: every step with its losses, every file with its size, every tensor that changes its name."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.checkpoints.config import write_config
from moeglot.checkpoints.dense import DenseTensor
from moeglot.checkpoints.identify import written_marks
from moeglot.codings.coding import SAID_AGAIN, said
from moeglot.encoding import Encoding
from moeglot.encodings.plain import Plain
from moeglot.errors import UsageError
from moeglot.experts import Expert
from moeglot.files.remote import Location
from moeglot.files.shards import ShardPlan, Slot, plan_shards
from moeglot.files.torch_dist.writing import DistFile, plan_files
from moeglot.format import Format
from moeglot.formats import by_name, of_family
from moeglot.layout import Stored
from moeglot.planning.dense_plan import dense_slot, dense_tensors
from moeglot.planning.dist_plan import stack, states
from moeglot.planning.loss import Loss
from moeglot.planning.merging import Change
from moeglot.planning.steps import DenseUnit, ExpertUnit, Step, Unit
from moeglot.planning.targets import (
    arranged,
    dtype_note,
    encoding_named,
    encoding_of,
    keeping,
    keeps,
    own,
    quantization,
    refuse_short,
    rounds_inputs,
    shared,
    twin,
    variant,
)
from moeglot.rounding import Rounding
from moeglot.share import Asked, Share
from moeglot.sizes import parse_size
from moeglot.survival import Survival

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from moeglot.adapters.adapter import Adapter

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Plan:
    """Everything that `convert` will write, and from what."""

    source: Checkpoint
    target: Format
    steps: tuple[Step, ...]
    dense: Mapping[str, tuple[DenseTensor, ...]]
    shards: tuple[ShardPlan | DistFile, ...]
    config: Mapping[str, Any]
    others: tuple[Location, ...]
    expected_loss: Mapping[str, Loss] = field(default_factory=dict)
    change: Change | None = None
    expected_survival: Mapping[str, Survival] = field(default_factory=dict)
    estimated: bool = False
    """Its losses and what survives were measured on a few experts."""
    measures: bool = True
    """Whether it is told what a unit loses as it is made; to compare what is written already, its bytes are enough."""
    settled: dict[tuple[str, int], Encoding] = field(default_factory=dict, compare=False, repr=False)
    """(key of a stored line, layer) -> its encoding, where that takes a look at all experts and one has been taken."""

    def __repr__(self) -> str:
        return f"Plan({self.source.source.name!r}, {self.source.format.name} to {self.target.name})"

    def merges(self, step: Step, expert: int) -> bool:
        """An adapter's change is added to this slice."""
        return self.change is not None and self.change.touches(step.line, step.layer, expert)

    def check_unchanged(self) -> None:
        """Raises `BrokenFile` unless what it reads are the files that were opened."""
        self.source.source.check_unchanged()
        if self.change:
            self.change.check_unchanged()

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def renamed(self) -> dict[str, str]:
        """New name -> the stored tensors it comes from, for tensors that are no experts and do not keep name and bytes."""
        return {key: " + ".join(dict.fromkeys(p.origin for p in parts)) for key, parts in self.dense.items() if parts[0].origin != key}

    @property
    def lossy(self) -> tuple[str, ...]:
        """Verbs of the steps that change numbers of this checkpoint, as measured on a sample of its experts."""
        return tuple(verb for verb, loss in self.expected_loss.items() if loss.changed)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        slices = [self.unit(step, expert) for step in self.steps for expert in range(self.source.sizes["e"])]
        return (*slices, *(self._dense_unit(key, parts) for key, parts in self.dense.items()))

    @cached_property
    def dense_verbs(self) -> Counter[str | None]:
        """What is done to tensors that are no experts, and to how many; None where bytes are copied."""
        return Counter(self._dense_unit(key, parts).verb for key, parts in self.dense.items())

    def unit(self, step: Step, expert: int) -> ExpertUnit:
        return ExpertUnit(step, expert, step.nbytes(self.source.sizes), self.merges(step, expert))

    def _dense_unit(self, key: str, parts: tuple[DenseTensor, ...]) -> DenseUnit:
        named = self.target.dense_line(key)
        return DenseUnit(key, parts, named and named[0], dense_slot(key, parts).nbytes)

    @cached_property
    def digest(self) -> str:
        """sha256 of all that decides the output's bytes; a resumed run must have the same."""
        told = [
            [(e.name, e.dtype, e.shape, e.path.name, e.start, e.end) for e in self.source.source.entries.values()],
            [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.source.source.shards],
            [self.source.format.name, self.target.name, self.config],
            [(str(step.target), step.line.key, step.layer) for step in self.steps],
            [(shard.file, shard.nbytes, hashlib.sha256(shard.header).hexdigest(), shard.pieces) for shard in self.shards],
            self.change.identity if self.change else None,
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def plan(
    source: Checkpoint | str | Path,
    to: str | Format | None = None,
    *,
    encode: str | None = None,
    adapter: Adapter | str | Path | None = None,
    round: str = "nearest",
    keep_touched: str | None = None,
    shard_size: int | str = SHARD_SIZE,
    **ranks: Unpack[Asked],
) -> Plan:
    """The plan of a conversion to the format named `to`, by default the source's own; raises `MoeglotError` for what cannot be done, before a byte is
    written. `adapter`: its change is added, and the sums are rounded as `round` says. `keep_touched`: in each layer, the matrices of a role that it changes
    for some expert stay in that float type, where the target can say so. `ranks`: what one process of several holds, see `convert`.
    """
    source = source if isinstance(source, Checkpoint) else open(source)
    wanted, size = None if encode is None else encoding_named(encode), parse_size(shard_size)
    target = own(source.format, wanted) if to is None else variant(by_name(to), wanted)
    share = Share.asked(**ranks)
    words = share.words if share else source.share.words if source.share else None
    change = _change(source, adapter, round, keep_touched, share or source.share)
    if target.family != source.format.family:
        names = ", ".join(form.name for form in of_family(source.format.family) if not form.coding) + "; or a quantized variant, see `moeglot formats`"
        raise UsageError(f"{target.name} stores {target.family.name}, this is {source.format.family.name}", source.known, f"pass --to one of: {names}")
    if target.alone != source.format.alone:
        reason = target.alone or source.format.alone
        raise UsageError(f"{source.format.name} cannot become {target.name}", reason, "have the library that reads both load the one and save the other")
    refuse_short(source, target)
    Expert.of(source.format.family, source.config)  # what it computes is known, or the output could not be verified
    source = shared(source, target, share)
    target, kept = arranged(source, target), None
    if keep_touched is not None and change:
        kept = _kept(keep_touched)
        target = keeping(source, target, change.touches_any)
    inputs = rounds_inputs(source, target)
    steps = tuple(
        _step(source, target, line, layer, kept if kept and line.is_plain and change and change.touches_any(line, layer) else wanted, inputs)
        for layer in source.layers
        for line in target.lines(layer)
    )
    target = target.with_encodings(
        lambda line: next((step.target for step in steps if step.line.roles == line.roles and not step.line.is_plain), line.encoding)
    )
    stays = keeps(source, target, wanted) or (kept is not None and source.format.coding is not None and source.has_quantized_others)
    dense = dense_tensors(source, target, wanted.dtype if isinstance(wanted, Plain) else None, change, stays, words)
    slots = sorted([*_expert_slots(source, steps), *(dense_slot(key, parts) for key, parts in dense.items())], key=_in_model_order)
    shards: tuple[ShardPlan | DistFile, ...]
    if target.container:
        shards = plan_files(slots, size, stack(source, target), states(source, target, dense))
    else:
        shards = plan_shards(slots, size, {"format": "pt", **written_marks(target, source.share, source.source)})
    floats = {step.target.name for step in steps if isinstance(step.target, Plain) and step.line.is_matrix}
    config = write_config({**source.config, **dtype_note(source, floats), **quantization(source, target, dense, stays)}, target)
    unchanged = said(config) == said(source.source.config)
    others = tuple(path for path in source.source.others() if path.name not in SAID_AGAIN or unchanged)
    return Plan(source, target, steps, dense, shards, config, others, change=change)


def _kept(name: str) -> Encoding:
    """The float type that changed matrices stay in; raises `UsageError` for what is none."""
    try:
        found = encoding_named(name)
    except UsageError:
        found = None
    if not isinstance(found, Plain):
        raise UsageError(f"--keep-touched {name!r} is no float type", "the changed matrices are left unquantized", "pass --keep-touched bf16, for example")
    return found


def _change(source: Checkpoint, adapter: Adapter | str | Path | None, round: str, keep_touched: str | None, share: Share | None) -> Change | None:
    rounding = Rounding.by_name(round)
    if adapter is None:
        if rounding != Rounding():
            raise UsageError(f"--round {round} without an adapter", "it says how weights with an adapter's change are rounded", "pass --adapter DIR too")
        if keep_touched is not None:
            raise UsageError(f"--keep-touched {keep_touched} without an adapter", "it is of matrices with an adapter's change", "pass --adapter DIR too")
        return None
    if share:
        raise UsageError(f"an adapter, and what {share} holds", "its factors are those of the whole model", "merge it into the whole model, then convert that")
    from moeglot.adapters.adapter import on, open_adapter

    return Change(open_adapter(adapter, source) if isinstance(adapter, str | Path) else on(adapter, source), rounding)


def _step(source: Checkpoint, target: Format, line: Stored, layer: int, wanted: Encoding | None, inputs: bool) -> Step:
    encodings = source.experts(layer)
    sources = tuple(encodings[role].encoding for role in line.roles)
    encoding = encoding_of(source, target, line, sources, wanted)
    encoding = encoding if inputs else encoding.bare_of_carried
    for part in encoding.parts:
        line.slice_shape(part, source.sizes)
    joint = encoding.is_joint and not line.per_expert
    movable = (
        not joint
        and line.movable(encoding, source.sizes)
        and all(source.line(source.format.line_of(role), layer).movable(e, source.sizes) for role, e in zip(line.roles, sources, strict=True))
    )
    return Step(line, layer, sources, encoding, movable, twin(source, line, layer, encoding))


def _expert_slots(source: Checkpoint, steps: tuple[Step, ...]) -> Iterator[Slot]:
    for step in steps:
        shapes = [(part, step.line.part_shape(part, source.sizes)) for part in step.target.parts]
        cuts = len(step.line.roles) if step.line.block or step.line.expert_groups[0][0] == "p" else 1
        for expert in range(source.sizes["e"]) if step.line.per_expert else (None,):
            for part, shape in shapes:
                yield Slot(step.line.key_of(part, step.layer, expert), part.dtypes[0], shape, cuts)


def _in_model_order(slot: Slot) -> tuple[object, ...]:
    """Numbers in a name count as numbers, so that layer 2 comes before layer 10."""
    return tuple((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in slot.name.split("."))

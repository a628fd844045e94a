"""One unit of a plan: the bytes of an expert's slice, or of another tensor, and what was lost on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING

from moeglot import scratch
from moeglot.checkpoints.dense import DecodedTensor, DenseTensor, taking_turns
from moeglot.checkpoints.profiles import spread
from moeglot.checks import Progress, workers_of_one_thread
from moeglot.dtypes import DTYPES, by_torch_name
from moeglot.encoded import Encoded
from moeglot.encoding import WHOLE, Encoding, Parts
from moeglot.encodings.plain import Plain
from moeglot.floats import exact_dtype, exactly, row_pairs, values
from moeglot.layout import Stored
from moeglot.planning import pairs
from moeglot.planning.loss import Loss, measure, of_bytes
from moeglot.planning.merging import Merged, MergedPart
from moeglot.planning.plan import Plan
from moeglot.planning.steps import DenseUnit, Step, Unit
from moeglot.survival import OTHERS, Survival, added

if TYPE_CHECKING:
    import torch


SAMPLING = "sampling"


def make(plan: Plan, unit: Unit) -> tuple[dict[str, torch.Tensor], Loss]:
    """The bytes of a unit: part -> tensor in stored axes (one expert's slice, or a tensor that is no expert), and what was lost."""
    if isinstance(unit, DenseUnit):
        found = [_dense(part) for part in unit.parts]
        groups = unit.line.groups(plan.source.config, plan.source.tp) if unit.line else 1
        return {"value": taking_turns([tensor for tensor, _ in found], groups)}, sum((loss for _, loss in found), Loss())
    if unit.step.line.per_expert:
        return _made(plan, unit.step, unit.expert)
    step = replace(unit.step, target=_settled(plan, unit.step))
    parts, loss = _made(plan, step, unit.expert)
    return dict(step.target.stacked(parts, plan.source.sizes["e"])), loss


def _made(plan: Plan, step: Step, expert: int) -> tuple[dict[str, torch.Tensor], Loss]:
    step = replace(step, target=pairs.settled(plan, step, expert))
    parts, loss = _slice(plan, step, expert)
    parts = pairs.raised(plan, step, expert, parts)
    if plan.change and plan.merges(step, expert):
        roles = cache(partial(_roles, plan, step, expert))
        parts, survived = plan.change.apply(step.line, step.layer, expert, step.target, parts, roles, step.moves_codes)
        loss = replace(loss, survived=survived)
    return dict(parts), loss


def _settled(plan: Plan, step: Step) -> Encoding:
    """The encoding of a stored tensor of several experts, after a look at all of them where it takes one: once in each process."""
    key = step.line.key, step.layer
    if not step.target.is_joint:
        return step.target
    if key not in plan.settled:
        apart = replace(step, target=step.target.apart)
        experts = range(plan.source.sizes["e"])
        looked = [plan.source.checked(step.twin, step.layer, 0).parts] if step.twin else (_made(plan, apart, expert)[0] for expert in experts)
        plan.settled[key] = step.target.settled(looked)
    return plan.settled[key]


def _roles(plan: Plan, step: Step, expert: int) -> dict[str, Encoded]:
    found: dict[str, Encoded] = {}
    for role in step.line.roles:
        if role not in found:  # each stored slice once, whatever roles it holds
            found |= plan.source.expert(plan.source.format.line_of(role), step.layer, expert)
    return {role: found[role] for role in step.line.roles}


def _slice(plan: Plan, step: Step, expert: int) -> tuple[Parts, Loss]:
    """The parts of one expert's slice of a stored tensor, in stored axes: copied, moved in the same codes, or encoded."""
    source = plan.source
    if step.twin:
        twin = source.checked(step.twin, step.layer, expert)
        if (copied := twin.encoding.recode(twin.parts, step.target)) is not None:
            return dict(copied), Loss()
    if (straight := _straight(plan, step, expert)) is not None:
        return straight
    roles = _roles(plan, step, expert)
    if step.moves_codes:
        recoded = {role: found for role, encoded in roles.items() if (found := _recoded(encoded, step.target))}
        if len(recoded) == len(roles):
            losses = [] if step.exact else [_moved(plan, roles[role], found, expert) for role, found in recoded.items()]
            return dict(step.line.join(recoded.__getitem__).parts), sum(losses, Loss())
    return _encoded(plan, step, roles, expert)


def _straight(plan: Plan, step: Step, expert: int) -> tuple[dict[str, torch.Tensor], Loss] | None:
    """A stored slice whose axes change places as a whole, decoded at once where the target has it; None if there is more to do than that."""
    source = plan.source
    line = source.line(source.format.line_of(step.line.roles[0]), step.layer)
    if not (step.exact and isinstance(step.target, Plain) and line.turns_into(step.line)):
        return None
    stored = source.checked(line, step.layer, expert)
    if not line.movable(stored.encoding, source.sizes) or _has_scales_by_role(line, stored.encoding):
        return None
    value = scratch.empty(step.line.expert_shape(source.sizes), by_torch_name(step.target.name).torch)
    stored.decode(value.dtype, line.turned(step.line, value))
    return {"value": value}, _of_bytes(plan, stored, expert)


def _has_scales_by_role(line: Stored, encoding: Encoding) -> bool:
    """Some part has one entry for the rows of each role, so that a slice of several is no one matrix."""
    blocks = [
        (group, rows) for part in encoding.parts if not part.joint for group, rows in zip(line.expert_groups, part.blocks(len(line.expert_groups)), strict=True)
    ]
    return any("p" in group and rows == WHOLE for group, rows in blocks)


def _measured(plan: Plan, before: torch.Tensor, after: Encoded) -> Loss:
    return measure(before, after) if plan.measures else Loss()


def _of_bytes(plan: Plan, encoded: Encoded, expert: int) -> Loss:
    """Of a layer's first expert alone: to look at all would take longer than the rest of a conversion."""
    return of_bytes(encoded) if plan.measures and not expert else Loss()


def _moved(plan: Plan, before: Encoded, after: Encoded, expert: int) -> Loss:
    """Of codes that are moved. Where other slices of a step may lose something, the size of this one counts in what the step loses."""
    import torch

    lost = Loss() if before.encoding.fits_in(after.encoding) else _measured(plan, before.decode(torch.float32), after)
    return lost + _of_bytes(plan, after, expert)


def _encoded(plan: Plan, step: Step, roles: Mapping[str, Encoded], expert: int) -> tuple[dict[str, torch.Tensor], Loss]:
    """The roles in the target's encoding: each by itself where it codes them so, else all together as they are stored."""
    if isinstance(step.target, Plain) and not step.exact:
        return _rounded(plan, step, roles)
    lost: list[Loss] = []
    own = step.target.upright if step.line.movable(step.target, plan.source.sizes) else step.target

    def given(role: str) -> Encoded:
        return exactly(roles[role])

    def encode(found: Encoded, near: Encoded | None = None) -> Encoded:
        coded = near or Encoded(own, own.encode(found.parts["value"]), found.shape)
        if not step.exact:
            lost.append(_measured(plan, found.parts["value"], coded) + _of_bytes(plan, coded, expert))
        return coded

    if step.exact:
        lost += (_of_bytes(plan, encoded, expert) for encoded in roles.values())
    if step.exact and isinstance(step.target, Plain):
        return {"value": step.line.decoded(roles.__getitem__, by_torch_name(step.target.name).torch)}, sum(lost, Loss())
    if step.line.movable(step.target, plan.source.sizes):
        return dict(step.line.join(lambda role: encode(given(role), _near(roles[role], step.target))).parts), sum(lost, Loss())
    return dict(encode(values(step.line.decoded(roles.__getitem__))).parts), sum(lost, Loss())


def _rounded(plan: Plan, step: Step, roles: Mapping[str, Encoded]) -> tuple[dict[str, torch.Tensor], Loss]:
    """The roles, [out, in], in a float type that does not hold all of their numbers, some rows at a time and where they belong in stored axes."""
    assert isinstance(step.target, Plain)
    dtype, lost = by_torch_name(step.target.name).torch, Loss()

    def rounded(role: str, place: Encoded) -> Encoded:
        nonlocal lost
        for before, there in row_pairs(roles[role], place):
            given = before.decode(exact_dtype(roles[role]))
            coded = Encoded(step.target, step.target.encode(given), before.shape)
            there.parts["value"].copy_(coded.parts["value"])
            lost += _measured(plan, given, coded)
        return place

    if step.line.block:  # rows that take turns in blocks have no places that strides can say
        return dict(step.line.join(lambda role: rounded(role, values(scratch.empty(roles[role].shape, dtype)))).parts), lost
    value = scratch.empty(step.line.expert_shape(plan.source.sizes), dtype)
    for role, place in step.line.split(values(value)).items():
        rounded(role, place)
    return {"value": value}, lost


def _recoded(encoded: Encoded, target: Encoding) -> Encoded | None:
    target = target.upright
    parts = encoded.encoding.recode(encoded.parts, target)
    return None if parts is None else Encoded(target, parts, encoded.shape)


def _near(encoded: Encoded, target: Encoding) -> Encoded | None:
    target = target.upright
    parts = encoded.encoding.nearest(encoded.parts, target) if encoded.encoding.recodes(target) else None
    return None if parts is None else Encoded(target, parts, encoded.shape)


def _dense(part: DenseTensor) -> tuple[torch.Tensor, Loss]:
    """A tensor that is no expert, in its shape and float type, and what decoding it lost."""
    if isinstance(part, Merged | MergedPart):
        found, survival = part.merge()
        return found, Loss(survived={OTHERS: survival})
    if not isinstance(part, DecodedTensor):
        return part.read(), Loss()
    import torch

    given = part.decode(torch.float32)
    coded = {"value": given.to(DTYPES[part.dtype].torch)}
    return coded["value"], measure(given, Encoded(Plain(part.dtype), coded, tuple(given.shape)))


def estimate(plan: Plan, progress: Progress | None = None) -> Plan:
    """The plan with the relative error of each lossy step, and what survives of an adapter's change, measured on a few of its experts; once."""
    if plan.estimated:
        return plan
    with workers_of_one_thread(1) as pool:
        return pool.submit(_estimated, plan, progress).result()


def _estimated(plan: Plan, progress: Progress | None) -> Plan:
    found: dict[str, Loss] = {}
    survived: dict[str, Survival] = {}
    samples = list(_samples(plan))
    for n, unit in enumerate(samples):
        if progress:
            progress(SAMPLING, n, len(samples))
        _, loss = make(plan, unit)
        if isinstance(unit, DenseUnit):
            found[unit.verb or ""] = loss
            continue
        step = unit.step
        found[step.verb] = found.get(step.verb, Loss()) + (Loss() if step.exact else loss)
        survived = added(survived, loss.survived)
    if progress and samples:
        progress(SAMPLING, len(samples), len(samples))
    return replace(plan, expected_loss=found, expected_survival=survived, estimated=True)


def _samples(plan: Plan) -> Iterator[Unit]:
    """One tensor that is no expert and is decoded, and in three layers an expert of each step that may lose something."""
    layers = spread(plan.source.layers, 3)
    yield from islice((unit for unit in plan.units if isinstance(unit, DenseUnit) and unit.verb), 1)
    for step in plan.steps:
        unit = plan.unit(step, step.layer % plan.source.sizes["e"])
        if step.layer in layers and (unit.merged or not step.exact):
            yield unit

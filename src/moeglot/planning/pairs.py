"""Gate and up of an expert under one global, which servers take for both: what each of the two needs to know of the other while it is made."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from moeglot.encoded import Encoded
from moeglot.encoding import Encoding, Parts
from moeglot.floats import exactly
from moeglot.planning.plan import Plan
from moeglot.planning.steps import Step

if TYPE_CHECKING:
    import torch


def settled(plan: Plan, step: Step, expert: int) -> Encoding:
    """The target of a step, with what an expert's matrices have in common there settled by all of them, with their changes."""
    roles, target = _together(plan, step), step.target
    if not roles:
        return target
    read = cache(lambda role: _matrix(plan, step, role, expert))
    if step.moves_codes and len({read(role).encoding.kind for role in roles}) == 1:
        found = read(roles[0]).encoding.common_codes([read(role).parts for role in roles], target)
        if found is not None:
            return found
    merged = not step.moves_codes and any(_touches(plan, step, role, expert) for role in roles)
    return target.common([_sum(plan, step, role, expert, read(role)) if merged else exactly(read(role)).parts["value"] for role in roles])


def raised(plan: Plan, step: Step, expert: int, parts: Parts) -> Parts:
    """The slice of a base whose codes are kept, under what is large enough for every sum of weight and change in the matrices that have it in common."""
    roles = [role for role in _together(plan, step) if _touches(plan, step, role, expert)]
    if not (roles and step.moves_codes):
        return parts
    read = {role: _matrix(plan, step, role, expert) for role in roles}
    return step.target.raised(parts, [(read[role].parts, _largest(plan, step, role, expert, read[role])) for role in roles])


def _together(plan: Plan, step: Step) -> tuple[str, ...]:
    """The roles that a line has something in common with, if the model has them all, and this layer has them coded."""
    coded = {role for line in plan.target.lines(step.layer) if not line.is_plain for role in line.roles}
    common = step.line.common
    return common if set(common) <= coded and step.line.movable(step.target, plan.source.sizes) else ()


def _matrix(plan: Plan, step: Step, role: str, expert: int) -> Encoded:
    return plan.source.expert(plan.source.format.line_of(role), step.layer, expert)[role]


def _touches(plan: Plan, step: Step, role: str, expert: int) -> bool:
    return plan.change is not None and plan.change.adapter.touches(step.layer, role, expert)


def _sum(plan: Plan, step: Step, role: str, expert: int, matrix: Encoded) -> torch.Tensor:
    """float32 [out, in]: a role's matrix with its change, where it has one."""
    import torch

    values = matrix.decode(torch.float32)
    if plan.change is None or not _touches(plan, step, role, expert):
        return values
    left, right = plan.change.adapter.factors(step.layer, role, expert)
    return values + (left @ right).view(values.shape)


def _largest(plan: Plan, step: Step, role: str, expert: int, matrix: Encoded) -> float:
    return float(_sum(plan, step, role, expert, matrix).abs().max())

"""The forward level: each expert against a second opinion, the proof that the comparison could have failed, and the cause when it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from moeglot.checkpoint import Checkpoint
from moeglot.checks import Check, Progress, each_expert
from moeglot.experts import Expert, Matrix, loudness, probe, relative_error
from moeglot.misreadings import Misreading, combined, misreadings, right

if TYPE_CHECKING:
    import torch

LIMIT = 1e-5
"""Relative error in float32 that a right reading stays under; right ones land near 1e-7."""
POWER = 100.0
"""How many times worse than the limit each wrong reading must be; otherwise the verdict is "cannot tell"."""
TOKENS = 8


class Side(Protocol):
    """A second opinion on what each expert computes."""

    @property
    def name(self) -> str: ...

    def tokens(self, layer: int, expert: int, model: Expert, matrix: Matrix, h: int) -> torch.Tensor:
        """The probe tokens [t, h] that this side answers."""

    def distance(self, layer: int, expert: int, tokens: torch.Tensor, response: torch.Tensor) -> float:
        """Relative error of a response [t, h] to these tokens, by this side's own answer."""


@dataclass(frozen=True)
class Matrices:
    """A side that computes with our reference on matrices from elsewhere."""

    name: str
    model: Expert
    matrix: Callable[[int, int], Matrix]

    def tokens(self, layer: int, expert: int, model: Expert, matrix: Matrix, h: int) -> torch.Tensor:
        return loud_tokens(layer, expert, model, matrix, h)

    def distance(self, layer: int, expert: int, tokens: torch.Tensor, response: torch.Tensor) -> float:
        return relative_error(response, self.model.forward(tokens, self.matrix(layer, expert)))


def loud_tokens(layer: int, expert: int, model: Expert, matrix: Matrix, h: int, count: int = TOKENS) -> torch.Tensor:
    """[t, h]: pseudo-random tokens, scaled so that the gate's pre-activations spread by about 3."""
    tokens = probe((layer, expert), count, h)
    return tokens * loudness(model, tokens, matrix) if "gate" in model.roles else tokens


def checkpoint_side(other: Checkpoint) -> Matrices:
    return Matrices(other.source.name, Expert.of(other.format.family, other.config), lambda layer, expert: right(other, layer, expert))


def forward(subject: Checkpoint, side: Side, *, workers: int = 1, progress: Progress | None = None) -> list[Check]:
    """Every expert on loud random tokens against the other side, then the wrong readings on one expert a layer, to prove the power."""
    model, h = Expert.of(subject.format.family, subject.config), subject.sizes["h"]

    def work(layer: int, expert: int) -> tuple[int, int, float]:
        matrix = right(subject, layer, expert)
        tokens = side.tokens(layer, expert, model, matrix, h)
        return layer, expert, side.distance(layer, expert, tokens, model.forward(tokens, matrix))

    found = list(each_expert(subject, work, "forward", workers, progress))
    layers = {layer: max(error for at, _, error in found if at == layer) for layer in subject.layers}
    worst = max(found, key=lambda row: row[2])
    wrong = [row for row in found if not row[2] <= LIMIT]
    figures: dict[str, Any] = {"relative_error": worst[2], "limit": LIMIT, "experts": len(found), "beyond": len(wrong)}
    if wrong:
        layer, expert, error = wrong[0]
        cause = diagnose(subject, side, layer, expert)
        figures["fits_if"] = cause
        known = f"fits if {cause}" if cause else "no other reading of the same bytes fits either"
        detail = f"{len(wrong)} of {len(found)} experts beyond {LIMIT:g}; layer {layer}, expert {expert}: {error:.2g}; {known}"
        return [Check("forward", "does not hold", f"against {side.name}", detail, figures, layers)]
    detail = f"{len(found)} experts, relative error at most {worst[2]:.1e} (limit {LIMIT:g})"
    return [Check("forward", "holds", f"against {side.name}", detail, figures, layers), power(subject, side, model)]


def power(subject: Checkpoint, side: Side, model: Expert) -> Check:
    """Each wrong reading must be at least 100 times worse than the limit, on one expert of each layer."""
    weakest: dict[str, float] = {}
    for misreading in misreadings(subject):
        if errors := [error for layer in subject.layers if (error := _error(subject, side, model, misreading, layer)) is not None]:
            weakest[misreading.name] = min(errors)
    blind = [name for name, error in weakest.items() if not error >= LIMIT * POWER]
    figures = {"wrong_readings": weakest, "needed": LIMIT * POWER}
    if blind:
        detail = f"this check cannot see: {', '.join(blind)}"
        return Check("forward", "cannot tell", "power of the check", detail, figures)
    least = min(weakest.values(), default=float("inf"))
    return Check("forward", "holds", "power of the check", f"{len(weakest)} wrong readings, the mildest is off by {least:.2g}", figures)


def _error(subject: Checkpoint, side: Side, model: Expert, misreading: Misreading, layer: int) -> float | None:
    """Error of a wrong reading, on one expert; None where it is no wrong reading, because the biases it drops are zero."""
    expert = layer % subject.sizes["e"]
    declared, wrong = right(subject, layer, expert), misreading.read(layer, expert)
    if misreading.line and misreading.line.role_axes in ("i", "h") and not any(bool(declared(role).any()) for role in misreading.line.roles):
        return None
    tokens = side.tokens(layer, expert, model, declared, subject.sizes["h"])
    return side.distance(layer, expert, tokens, model.forward(tokens, wrong))


def diagnose(subject: Checkpoint, side: Side, layer: int, expert: int) -> str | None:
    """The reading under which this expert fits: one change first, then several lines at once."""
    model, declared = Expert.of(subject.format.family, subject.config), right(subject, layer, expert)
    tokens = side.tokens(layer, expert, model, declared, subject.sizes["h"])
    for misreading in chain(misreadings(subject), combined(subject)):
        if side.distance(layer, expert, tokens, model.forward(tokens, misreading.read(layer, expert))) <= LIMIT:
            return misreading.name
    return None

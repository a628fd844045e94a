"""The forward level: each expert against a second opinion, the proof that the comparison could have failed, and the cause when it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checks import Check, Progress, each_expert
from moeglot.experts import Expert, Matrix, loudness, probe_tokens, relative_error
from moeglot.files.mapped import let_go
from moeglot.verification.misreadings import Misreading, combined, misreadings, right

if TYPE_CHECKING:
    import torch

LIMIT = 1e-5
"""Relative error in float32 that a right reading stays under; right ones land near 1e-7."""
POWER = 100.0
"""How many times worse than the limit each wrong reading must be; otherwise the verdict is "cannot tell"."""
TOKENS = 8


@runtime_checkable
class Side(Protocol):
    """A second opinion on what each expert computes."""

    @property
    def name(self) -> str: ...

    def tokens(self, layer: int, expert: int, model: Expert, matrix: Matrix, h: int) -> torch.Tensor:
        """The probe tokens [t, h] that this side answers."""

    def answer(self, layer: int, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """What this side says that the expert computes, as `seen` shows it."""

    def seen(self, layer: int, expert: int, response: torch.Tensor) -> torch.Tensor:
        """A response [t, h] as this side can compare it: all of it, or a projection."""


@dataclass(frozen=True)
class Matrices:
    """A side that computes with our reference on matrices from elsewhere."""

    name: str
    model: Callable[[int], Expert]
    matrix: Callable[[int, int], Matrix]

    def tokens(self, layer: int, expert: int, model: Expert, matrix: Matrix, h: int) -> torch.Tensor:
        return loud_tokens(layer, expert, model, matrix, h)

    def answer(self, layer: int, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(layer).forward(tokens, self.matrix(layer, expert))

    def seen(self, layer: int, expert: int, response: torch.Tensor) -> torch.Tensor:
        return response


def loud_tokens(layer: int, expert: int, model: Expert, matrix: Matrix, h: int, count: int = TOKENS) -> torch.Tensor:
    """[t, h]: pseudo-random tokens, scaled so that the gate's pre-activations spread by about 3."""
    tokens = probe_tokens(model, (layer, expert), count, h)
    return tokens * loudness(model, tokens, matrix)


def checkpoint_side(other: Checkpoint, matrix: Callable[[int, int], Matrix], name: str | None = None) -> Matrices:
    """What a checkpoint's experts compute with these matrices. `name`: what the side is called, else as the checkpoint."""
    return Matrices(name or other.source.name, lambda layer: Expert.of(other.format.family, other.config, other.number(layer)), matrix)


class Probe:
    """One expert, the tokens sent to it and the second opinion's answer: says how far off a reading of it is."""

    def __init__(self, subject: Checkpoint, side: Side, layer: int, expert: int) -> None:
        self.subject, self.side, self.layer, self.expert = subject, side, layer, expert
        self.model = Expert.of(subject.format.family, subject.config, subject.number(layer))
        self.declared = right(subject, layer, expert)
        self.tokens = side.tokens(layer, expert, self.model, self.declared, subject.sizes["h"])
        self.answer = side.answer(layer, expert, self.tokens)

    def error(self, misreading: Misreading | None = None) -> float:
        """Relative error of the declared reading, or of a wrong one."""
        matrix = misreading.read(self.layer, self.expert) if misreading else self.declared
        found = relative_error(self.side.seen(self.layer, self.expert, self.model.forward(self.tokens, matrix)), self.answer)
        let_go()
        return found

    def wrong(self) -> dict[str, float]:
        """Relative error of each wrong reading, by its name."""
        return {misreading.name: self.error(misreading) for misreading in misreadings(self.subject) if not self._is_moot(misreading)}

    def _is_moot(self, misreading: Misreading) -> bool:
        """It misreads biases that are all zero, or scales where there are none, so that it is no wrong reading."""
        line = misreading.line
        if line is not None and misreading.scales:
            return self.subject.line(line, self.layer).is_plain
        return line is not None and not line.is_matrix and not any(bool(self.declared(role).parts["value"].any()) for role in line.roles)


def forward(subject: Checkpoint, side: Side, *, workers: int = 1, progress: Progress | None = None) -> list[Check]:
    """Every expert on loud random tokens against the other side; and, to prove the power, one expert of each layer in every wrong reading."""

    def work(layer: int, expert: int) -> tuple[int, int, float, dict[str, float]]:
        probe = Probe(subject, side, layer, expert)
        error = probe.error()
        return layer, expert, error, probe.wrong() if error <= LIMIT and expert == layer % subject.sizes["e"] else {}

    found = list(each_expert(subject, work, "forward", workers, progress))
    layers = {layer: max(error for at, _, error, _ in found if at == layer) for layer in subject.layers}
    worst = max(found, key=lambda row: row[2])[2]
    beyond = [row for row in found if not row[2] <= LIMIT]
    figures: dict[str, Any] = {"relative_error": worst, "limit": LIMIT, "experts": len(found), "beyond": len(beyond)}
    if beyond:
        layer, expert, error, _ = beyond[0]
        cause = diagnose(subject, side, layer, expert)
        figures["fits_if"] = cause
        known = f"fits if {cause}" if cause else "no other reading of the same bytes fits either"
        detail = f"{len(beyond)} of {len(found)} experts beyond {LIMIT:g}; layer {layer}, expert {expert}: {error:.2g}; {known}"
        return [Check("forward", "does not hold", f"against {side.name}", detail, figures, layers)]
    detail = f"{len(found)} experts, relative error at most {worst:.1e} (limit {LIMIT:g})"
    return [Check("forward", "holds", f"against {side.name}", detail, figures, layers), _power([wrong for *_, wrong in found])]


def _power(wrong: Iterable[Mapping[str, float]]) -> Check:
    """Each wrong reading must be at least 100 times worse than the limit, on every expert that it was tried on."""
    weakest: dict[str, float] = {}
    for errors in wrong:
        weakest |= {name: min(error, weakest.get(name, error)) for name, error in errors.items()}
    blind = [name for name, error in weakest.items() if not error >= LIMIT * POWER]
    figures = {"wrong_readings": weakest, "needed": LIMIT * POWER}
    if blind:
        return Check("forward", "cannot tell", "power of the check", f"this check cannot see: {', '.join(blind)}", figures)
    least = min(weakest.values(), default=float("inf"))
    return Check("forward", "holds", "power of the check", f"{len(weakest)} wrong readings, the mildest is off by {least:.2g}", figures)


def diagnose(subject: Checkpoint, side: Side, layer: int, expert: int) -> str | None:
    """The reading under which this expert fits: one change first, then several lines at once."""
    probe = Probe(subject, side, layer, expert)
    return next((misreading.name for misreading in chain(misreadings(subject), combined(subject)) if probe.error(misreading) <= LIMIT), None)

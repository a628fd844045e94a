"""The known ways to read experts wrongly: they prove that a check can fail, and they name the cause when one does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from moeglot.checkpoint import Checkpoint
from moeglot.experts import Matrix
from moeglot.layout import Stored, values

if TYPE_CHECKING:
    import torch


class Misread(Protocol):
    """(layer, expert) -> the matrices that a wrong reading would compute with."""

    def __call__(self, layer: int, expert: int) -> Matrix: ...


@dataclass(frozen=True)
class Misreading:
    """`name`: what is read how. `line`: the stored line that it concerns, or None."""

    name: str
    read: Misread
    line: Stored | None = None


def misreadings(checkpoint: Checkpoint) -> Iterator[Misreading]:
    """Every wrong reading of this checkpoint that no shape refutes and that is not the same as the right one."""
    form, sizes = checkpoint.format, checkpoint.sizes
    for line in form.stored:
        for other in line.misreadings(sizes):
            order = "" if other.roles == line.roles else f", {' before '.join(other.roles)}"
            yield Misreading(f'{_short(line)} read as "{other.axes}"{order}', partial(relaid, checkpoint, {line.key: other}), line)
    if all(len(line.roles) == 1 for line in form.stored) and "gate" in form.family.roles:
        yield Misreading("gate and up swapped", partial(_swapped, checkpoint))
    if sizes["e"] > 1:
        yield Misreading("experts rolled by one", lambda layer, expert: right(checkpoint, layer, (expert + 1) % sizes["e"]))
    for line in form.stored:
        if any(role.endswith("_bias") for role in line.roles):
            yield Misreading(f"{_short(line)} dropped", partial(_dropped, checkpoint, line), line)
        if "scale" in line.names:
            yield Misreading(f"{_short(line)} with inverted scales", partial(_inverted, checkpoint, line), line)


def _short(line: Stored) -> str:
    return line.key.split(".")[-1] if line.key.split(".")[-1] != "weight" else line.key.split(".")[-2]


def right(checkpoint: Checkpoint, layer: int, expert: int) -> Matrix:
    """The declared reading, one role at a time."""
    import torch

    def matrix(role: str) -> torch.Tensor:
        return checkpoint.expert(checkpoint.format.line_of(role), layer, expert)[role].decode(torch.float32)

    return matrix


def relaid(checkpoint: Checkpoint, others: Mapping[str, Stored], layer: int, expert: int) -> Matrix:
    """The reading in which some lines, named by their key, have the axes and roles of another."""

    declared = right(checkpoint, layer, expert)

    def matrix(role: str) -> torch.Tensor:
        line = checkpoint.format.line_of(role)
        if line.key not in others:
            return declared(role)
        stored = line.join({r: values(declared(r)) for r in line.roles})
        return others[line.key].split(stored)[role].parts["value"].contiguous()

    return matrix


def _swapped(checkpoint: Checkpoint, layer: int, expert: int) -> Matrix:
    declared, swap = right(checkpoint, layer, expert), {"gate": "up", "up": "gate"}
    return lambda role: declared(swap.get(role, role))


def _dropped(checkpoint: Checkpoint, line: Stored, layer: int, expert: int) -> Matrix:
    declared = right(checkpoint, layer, expert)
    return lambda role: declared(role) * 0 if role in line.roles else declared(role)


def _inverted(checkpoint: Checkpoint, line: Stored, layer: int, expert: int) -> Matrix:
    import torch

    declared = right(checkpoint, layer, expert)

    def matrix(role: str) -> torch.Tensor:
        if role not in line.roles:
            return declared(role)
        encoded = checkpoint.expert(line, layer, expert)[role]
        return encoded.encoding.decode(encoded.encoding.inverted(encoded.parts), torch.float32)

    return matrix

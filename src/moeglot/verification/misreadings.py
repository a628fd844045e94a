"""The known ways to read experts wrongly: they prove that a check can fail, and they name the cause when one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from moeglot.axes import parse_axes, relaid
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.encoded import Encoded
from moeglot.experts import Matrix
from moeglot.floats import values
from moeglot.layout import SECOND, Stored

Read = Callable[[int, int], Matrix]
"""(layer, expert) -> the matrices that a reading computes with."""


@dataclass(frozen=True)
class Misreading:
    """`name`: what is read how. `read`: what it computes with. `line`: the stored line that it concerns, or None."""

    name: str
    read: Read
    line: Stored | None = None
    scales: bool = False
    """It misreads scales, which the layers that are not quantized do not have."""


def right(checkpoint: Checkpoint, layer: int, expert: int) -> Matrix:
    """The declared reading, one role at a time; what lies together and needs no decoding to be taken apart is read and checked once."""
    found: dict[str, Mapping[str, Encoded]] = {}

    def matrix(role: str) -> Encoded:
        line = checkpoint.format.line_of(role)
        roles = found.get(line.key) or checkpoint.expert(line, layer, expert)
        if len(line.roles) > 1 and line.is_matrix and line.movable(checkpoint.encoding(line, layer), checkpoint.sizes):
            found[line.key] = roles
        elif line.is_matrix:
            found.clear()
        return roles[role]

    return matrix


def misreadings(checkpoint: Checkpoint) -> Iterator[Misreading]:
    """Every wrong reading of this checkpoint that no shape refutes and that is not the same as the right one."""
    form, experts = checkpoint.format, checkpoint.sizes["e"]
    for line in form.stored:
        yield from _of_line(checkpoint, line)
        if line.shaped:
            yield Misreading(f'{line.short} is read by its shape, "{line.shaped}"', _replaced(checkpoint, line, _by_shape(checkpoint, line)), line)
    if all(len(line.roles) == 1 for line in form.stored) and "gate" in form.family.roles:
        yield Misreading("gate and up swapped", _swapped(checkpoint))
    for shift in sorted({1 % experts, (experts - 1) % experts} - {0}):
        yield Misreading(f"experts rolled by {shift if shift == 1 else -1}", _rolled(checkpoint, shift))
    for line in form.stored:
        if any(role.endswith("_bias") for role in line.roles):
            yield Misreading(f"{line.short} dropped", _replaced(checkpoint, line, _zeroed), line)


def combined(checkpoint: Checkpoint) -> Iterator[Misreading]:
    """Wrong readings of several stored lines at once, fewest lines first."""
    choices = [[None, *_of_line(checkpoint, line)] for line in checkpoint.format.stored]
    found = ([one for one in combination if one] for combination in product(*choices))
    for several in sorted((several for several in found if len(several) > 1), key=len):
        yield Misreading(" and ".join(one.name for one in several), _together(checkpoint, {one.line.roles: one.read for one in several if one.line}))


def _of_line(checkpoint: Checkpoint, line: Stored) -> Iterator[Misreading]:
    for other in line.misreadings(checkpoint.sizes):
        order = "" if other.roles == line.roles else f", {' before '.join(other.roles)}"
        yield Misreading(f'{line.short} is read as "{other.axes}"{order}', _replaced(checkpoint, line, _relaid(checkpoint, line, other)), line)
    if not line.is_plain:
        yield Misreading(f"{line.short} with inverted scales", _replaced(checkpoint, line, _inverted(checkpoint, line)), line, scales=True)


Change = Callable[[Matrix, int, int], Matrix]
"""(declared reading, layer, expert) -> the reading of one line's roles."""


def _replaced(checkpoint: Checkpoint, line: Stored, change: Change) -> Read:
    """The declared reading, but for the roles of one line."""

    def read(layer: int, expert: int) -> Matrix:
        declared = right(checkpoint, layer, expert)
        changed = change(declared, layer, expert)
        return lambda role: changed(role) if role in line.roles else declared(role)

    return read


def _relaid(checkpoint: Checkpoint, line: Stored, other: Stored) -> Change:
    def change(declared: Matrix, layer: int, expert: int) -> Matrix:
        def matrix(role: str) -> Encoded:
            plain = line.is_plain
            stored = checkpoint.checked(line, layer, expert) if plain else values(line.decoded(declared))
            return other.split(stored)[role]

        return matrix

    return change


def _by_shape(checkpoint: Checkpoint, line: Stored) -> Change:
    """The shape that the file declares, taken for how the numbers lie."""

    def change(declared: Matrix, layer: int, expert: int) -> Matrix:
        import torch

        sizes = checkpoint.sizes
        stored = torch.stack([checkpoint.stored(line, layer, n).parts["value"] for n in range(sizes["e"])]).view(line.shape(sizes))
        found = relaid(stored, parse_axes(line.shaped), line.groups, e=sizes["e"], p=len(line.roles))[expert]
        return line.split(values(found)).__getitem__

    return change


def _inverted(checkpoint: Checkpoint, line: Stored) -> Change:
    def change(declared: Matrix, layer: int, expert: int) -> Matrix:
        def matrix(role: str) -> Encoded:
            stored = checkpoint.checked(line, layer, expert)
            return checkpoint.split(checkpoint.line(line, layer), replace(stored, parts=stored.encoding.inverted(stored.parts)))[role]

        return matrix

    return change


def _zeroed(declared: Matrix, layer: int, expert: int) -> Matrix:
    import torch

    return lambda role: values(torch.zeros(declared(role).shape, dtype=torch.float32, device="cpu"))


def _swapped(checkpoint: Checkpoint) -> Read:
    swap = {"gate": "up", "up": "gate", SECOND + "gate": SECOND + "up", SECOND + "up": SECOND + "gate"}

    def read(layer: int, expert: int) -> Matrix:
        declared = right(checkpoint, layer, expert)
        return lambda role: declared(swap.get(role, role))

    return read


def _rolled(checkpoint: Checkpoint, shift: int) -> Read:
    return lambda layer, expert: right(checkpoint, layer, (expert + shift) % checkpoint.sizes["e"])


def _together(checkpoint: Checkpoint, reads: Mapping[tuple[str, ...], Read]) -> Read:
    def read(layer: int, expert: int) -> Matrix:
        declared = right(checkpoint, layer, expert)

        def matrix(role: str) -> Encoded:
            changed = reads.get(checkpoint.format.line_of(role).roles)
            return changed(layer, expert)(role) if changed else declared(role)

        return matrix

    return read

"""What one reading of a stored tensor shows in a few experts: how large each row and column is along i and along h, and some rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Protocol

from moeglot.encoded import Encoded
from moeglot.encodings.plain import Plain
from moeglot.floats import exactly, values
from moeglot.format import Format
from moeglot.layout import Sizes, Stored

if TYPE_CHECKING:
    import torch

LINES = 48
"""Rows of a matrix whose numbers are looked at one by one."""
KINDS = 4
"""Each half of an axis, and in it the even and the odd places."""


class Reader(Protocol):
    """A checkpoint under one format."""

    @property
    def format(self) -> Format: ...
    @property
    def sizes(self) -> Sizes: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    def line(self, line: Stored, layer: int) -> Stored: ...
    def stored(self, line: Stored, layer: int, expert: int) -> Encoded: ...


@dataclass(frozen=True)
class Profile:
    """One reading of a line, on the sample. role -> log norms [layer, expert, n] `along_i` and `along_h`, the axis that is not i.

    `rows` and `columns`: some of the matrices' rows [n, in] and columns [n, out], where they are stored as plain floats.
    """

    reading: Stored
    along_i: Mapping[str, torch.Tensor]
    along_h: Mapping[str, torch.Tensor]
    rows: torch.Tensor | None
    columns: torch.Tensor | None


def spread(of: Sequence[int], n: int) -> tuple[int, ...]:
    """At most n of these, evenly spread, the first and the last among them."""
    return tuple(of) if len(of) <= n else tuple(of[round(k * (len(of) - 1) / max(1, n - 1))] for k in range(n))


def profiles(checkpoint: Reader, line: Stored, layers: Sequence[int], experts: Sequence[int]) -> list[Profile]:
    """The declared reading of a line, then the others that no shape refutes, one for each way its axes may lie."""
    import torch

    readings = {line.axes: line}
    for other in line.misreadings(checkpoint.sizes):
        readings.setdefault(other.axes, other)
    found: dict[str, dict[tuple[str, str], list[torch.Tensor]]] = {axes: {} for axes in readings}
    for layer, expert in product(layers, experts):
        stored, own = checkpoint.stored(line, layer, expert), checkpoint.line(line, layer)
        numbers = exactly(stored)
        if own.expert_groups != line.expert_groups:  # a layer that is left alone is not turned as the coded ones are
            numbers = values(line.turned(own, numbers.parts["value"]))
        squares = values(numbers.parts["value"].to(torch.float32).square())
        for axes, reading in readings.items():
            for (role, what), tensor in _seen(reading, squares, numbers if isinstance(stored.encoding, Plain) else None).items():
                found[axes].setdefault((role, what), []).append(tensor)
    return [_profile(reading, found[axes], len(layers)) for axes, reading in readings.items()]


def _seen(reading: Stored, squares: Encoded, plain: Encoded | None) -> dict[tuple[str, str], torch.Tensor]:
    """One expert's slice -> (role, "i" or "h") -> log norms along it; and some rows and columns of numbers that are stored as they are."""
    seen = {}
    for role, matrix in reading.split(squares).items():
        for axis, letter in enumerate(reading.role_axes.split()):
            seen[role, "h" if letter == "h" else "i"] = _log(matrix.parts["value"].sum(1 - axis))
    for role, matrix in reading.split(plain).items() if plain else ():
        value = matrix.parts["value"]
        seen[role, "rows"] = value[:: max(1, len(value) // LINES)].clone()
        seen[role, "columns"] = value.mT[:: max(1, value.shape[1] // LINES)].clone()
    return seen


def _log(squares: torch.Tensor) -> torch.Tensor:
    """Sums of squares [n] -> logarithms; what is zero counts as very small."""
    return (squares + squares.mean() * 1e-6 + 1e-38).log()


def _stack(norms: Sequence[torch.Tensor], layers: int) -> torch.Tensor:
    """[n] for each expert of each layer -> [layer, expert, n]."""
    import torch

    return torch.stack(list(norms)).view(layers, -1, len(norms[0]))


def _profile(reading: Stored, found: Mapping[tuple[str, str], list[torch.Tensor]], layers: int) -> Profile:
    import torch

    along = {axis: {role: _stack(found[role, axis], layers) for role in reading.roles} for axis in "ih"}
    numbers = {what: [tensor for role in reading.roles for tensor in found.get((role, what), [])] for what in ("rows", "columns")}
    rows, columns = (torch.cat(tensors) if tensors else None for tensors in numbers.values())
    return Profile(reading, along["i"], along["h"], rows, columns)


def directions(norms: torch.Tensor) -> torch.Tensor:
    """[..., n] -> unit vectors, without the mean of each half and each parity: gate louder than up, read in the wrong arrangement, is no channel."""
    import torch

    places = torch.arange(norms.shape[-1], dtype=torch.int64, device="cpu")
    kinds = places % 2 + 2 * (places >= len(places) // 2)
    cleaned = norms.clone()
    for kind in range(KINDS):
        cleaned[..., kinds == kind] -= norms[..., kinds == kind].mean(-1, keepdim=True)
    return torch.nn.functional.normalize(cleaned, dim=-1)

"""How far apart the changes of two adapters are, and how far they may be; the products of factors are never formed."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import TYPE_CHECKING

from moeglot.adapters.adapter import Adapter

if TYPE_CHECKING:
    import torch

LIMIT = 1e-6
"""Of the relative difference of two changes: the rounding of a float32 product of scale and factor."""


def changes(a: Adapter, b: Adapter) -> Iterator[float]:
    """The relative difference of the changes that two adapters make, for every expert, module and replaced tensor; the products are never formed."""
    import torch

    for key in {**a.pairs, **b.pairs}:
        yield difference(a.factors(*key), b.factors(*key))
    for name in {**a.dense, **b.dense}:
        one, other = a.dense.get(name), b.dense.get(name)
        yield difference(one.factors(), other.factors()) if one and other else float("inf")
        yield _of_biases(one.bias() if one else None, other.bias() if other else None)
    for name in {**a.replaced, **b.replaced}:
        same = name in a.replaced and name in b.replaced and torch.equal(a.replaced[name].entry.read(), b.replaced[name].entry.read())
        yield 0.0 if same else float("inf")


def _of_biases(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    import torch

    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    unit = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    return difference((one[:, None], unit), (other[:, None], unit))


def difference(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """‖L R − L' R'‖ / ‖L R‖ from Gram matrices in float64; 0 if both are zero."""
    import torch

    def norm(left: torch.Tensor, right: torch.Tensor) -> float:
        left, right = left.double(), right.double()
        return sqrt(max(float(((left.mT @ left) * (right @ right.mT)).sum()), 0.0))

    found = norm(torch.cat([one[0], -other[0]], 1), torch.cat([one[1], other[1]]))
    size = norm(*one)
    return found / size if size else (0.0 if found == 0 else float("inf"))

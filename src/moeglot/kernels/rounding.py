"""Rounding a changed matrix to a grid: to the nearest number, by chance, or so that the error stays where it does not matter.

`delta` is GPTQ (arXiv 2210.17323) with the second moments H = εI + VVᵀ, V an orthonormal basis of the rows of the change's right factor [r, in]: the inputs
that the change was trained for. Of that H everything is known in closed form, so that no [in, in] matrix is made. `gptq` takes H from measured inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from moeglot.kernels.lattice import Grid
from moeglot.rounding import Rounding

EPSILON = 0.01
DAMP = 0.01
"""Of the mean second moment, added to each: as in GPTQ's own code."""
BLOCK = 128


def nearest(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    return grid.nearest(values)


def stochastic(values: torch.Tensor, grid: Grid, seed: int, place: tuple[object, ...]) -> torch.Tensor:
    """[out, in] -> a number of the grid on either side of each, so that its expectation is the value. `place` and `seed` decide, nothing else."""
    low, high = grid.around(values)
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    chance = torch.rand(values.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")), dtype=torch.float32, device="cpu")
    return torch.where(chance * (high - low) < values - low, high, low)


def delta(values: torch.Tensor, grid: Grid, right: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """[out, in] rounded one column after the other, each corrected for what the columns before it did to inputs in the rows of `right` [r, in].

    With the columns before j fixed at an error E, the best of column j is w_j - v_jᵀ (εI + Σ_{k ≥ j} v_k v_kᵀ)⁻¹ (E V)ᵀ.
    """
    _, weights, rows = torch.linalg.svd(right.double(), full_matrices=False)
    basis = rows[weights > 1e-6 * weights[0]].mT  # [in, r]
    pull = _pulls(basis, epsilon)
    behind = torch.zeros(len(values), basis.shape[1], dtype=torch.float64, device="cpu")
    rounded = torch.empty_like(values)
    for column in range(values.shape[1]):
        wanted = values[:, column].double()
        found = grid.nearest((wanted - behind @ pull[column]).float().unsqueeze(1), slice(column, column + 1)).squeeze(1)
        rounded[:, column] = found
        behind += torch.outer(found.double() - wanted, basis[column])
    return rounded


def _pulls(basis: torch.Tensor, epsilon: float) -> torch.Tensor:
    """[in, r]: for each column j, (εI + Σ_{k ≥ j} v_k v_kᵀ)⁻¹ v_j."""
    columns, rank = basis.shape
    pulls = torch.empty_like(basis)
    gram = epsilon * torch.eye(rank, dtype=basis.dtype, device="cpu")
    step = max(1, (1 << 20) // rank**2)
    for last in range(columns, 0, -step):
        some = basis[max(0, last - step) : last]
        grams = gram + torch.cumsum((some.unsqueeze(2) * some.unsqueeze(1)).flip(0), 0).flip(0)
        pulls[max(0, last - step) : last] = torch.linalg.solve(grams, some.unsqueeze(2)).squeeze(2)
        gram = grams[0]
    return pulls


def gptq(values: torch.Tensor, grid: Grid, moments: torch.Tensor) -> torch.Tensor:
    """[out, in] rounded one column after the other under second moments [in, in] of the inputs, damped by 1 % of their mean."""
    moments = moments.double()
    mean = moments.diagonal().mean()
    damped = moments + (DAMP * mean if mean > 0 else 1.0) * torch.eye(len(moments), dtype=torch.float64, device="cpu")
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left = values.double()
    rounded = torch.empty_like(values)
    for first in range(0, values.shape[1], BLOCK):
        last = min(first + BLOCK, values.shape[1])
        errors = torch.empty(len(values), last - first, dtype=torch.float64, device="cpu")
        for column in range(first, last):
            found = grid.nearest(left[:, column].float().unsqueeze(1), slice(column, column + 1)).squeeze(1)
            rounded[:, column] = found
            errors[:, column - first] = (left[:, column] - found) / upper[column, column]
            left[:, column + 1 : last] -= torch.outer(errors[:, column - first], upper[column, column + 1 : last])
        left[:, last:] -= errors @ upper[first:last, last:]
    return rounded


Moments = Callable[[], torch.Tensor | None]


def rounded(rounding: Rounding, values: torch.Tensor, grid: Grid, right: torch.Tensor, moments: Moments, place: tuple[object, ...]) -> torch.Tensor:
    """values float32 [out, in] on the grid, by the rounding that was asked for. `right` [r, in]: the change's right factor."""
    if rounding.kind == "stochastic":
        return stochastic(values, grid, rounding.seed, place)
    if rounding.kind == "delta" and bool(right.any()):
        return delta(values, grid, right)
    if rounding.kind == "gptq" and (measured := moments()) is not None:
        return gptq(values, grid, measured)
    return nearest(values, grid)

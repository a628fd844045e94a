"""What the numbers of an adapter say about the packing of its experts: columns of one expert resemble each other in size. To report, never to act on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Clustering:
    """How well two readings of the columns of lora_B explain their log norms: the share of the variance that lies between experts, 0 to 1.

    `agreed`: of how many tensors, out of `tensors`, the better reading on average is also the better one alone. `chance`: the margin that columns of no
    order stay below, in all but about one of 400 adapters.
    """

    rank_major: float
    grouped: float
    agreed: int
    tensors: int
    chance: float

    @property
    def margin(self) -> float:
        return abs(self.rank_major - self.grouped)

    @property
    def better(self) -> str:
        return "rank-major" if self.rank_major > self.grouped else "grouped"

    def __str__(self) -> str:
        shares = f"{self.rank_major:.2f} of the variance of column norms lies between experts if columns are rank-major, {self.grouped:.2f} if grouped"
        verdict = f"{self.better} on {self.agreed} of {self.tensors} tensors" if self.margin > self.chance else "they cannot tell"
        return f"{shares}; {verdict}: the margin is {self.margin:.2f}, chance alone gives up to {self.chance:.2f}"

    def json(self) -> dict[str, Any]:
        told = {"rank_major": self.rank_major, "grouped": self.grouped, "margin": self.margin, "chance": self.chance}
        return {**told, "better": self.better, "agreed": self.agreed, "tensors": self.tensors}


def cluster(tensors: Iterable[torch.Tensor], experts: int) -> Clustering | None:
    """lora_B [rows, e r] of several parameters -> how their columns cluster by expert; None where all columns are zero, or rank or expert is one."""
    found = [(*shares, _spread(tensor.shape[1], experts)) for tensor in tensors if (shares := _shares(tensor, experts))]
    if not found:
        return None
    rank_major, grouped, variance = (sum(values) / len(found) for values in zip(*found, strict=True))
    agreed = sum((a > b) == (rank_major > grouped) for a, b, _ in found)
    return Clustering(rank_major, grouped, agreed, len(found), 3 * sqrt(2 * variance / len(found)))


def _spread(columns: int, experts: int) -> float:
    """Variance of the share for columns of no order: that of Beta((e - 1) / 2, e (r - 1) / 2)."""
    a, b = (experts - 1) / 2, (columns - experts) / 2
    return a * b / ((a + b) ** 2 * (a + b + 1))


def _shares(tensor: torch.Tensor, experts: int) -> Sequence[float] | None:
    import torch
    from einops import rearrange

    norms = tensor.to(torch.float32).norm(dim=0)
    rank = norms.numel() // experts
    if rank < 2 or experts < 2:
        return None
    logs = norms.log()
    spread = logs.var(correction=0)
    if not spread > 0:  # NaN where a column is zero or infinite
        return None
    return [float(rearrange(logs, f"{axes} -> e r", e=experts).mean(dim=1).var(correction=0) / spread) for axes in ("(r e)", "(e r)")]

"""What the numbers of an adapter say about the packing of its experts: columns of one expert resemble each other in size. To report, never to act on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Clustering:
    """How well two readings of the columns of lora_B explain their log norms: the share of the variance that lies between experts, 0 to 1.

    `agreed`: of how many tensors, out of `tensors`, the better reading on average is also the better one alone.
    """

    rank_major: float
    grouped: float
    agreed: int
    tensors: int

    @property
    def margin(self) -> float:
        return abs(self.rank_major - self.grouped)

    @property
    def better(self) -> str:
        return "rank-major" if self.rank_major > self.grouped else "grouped"

    def __str__(self) -> str:
        shares = f"{self.rank_major:.2f} of the variance of column norms lies between experts if columns are rank-major, {self.grouped:.2f} if grouped"
        return f"{shares}; {self.better} on {self.agreed} of {self.tensors} tensors, margin {self.margin:.2f}"

    def json(self) -> dict[str, Any]:
        told = {"rank_major": self.rank_major, "grouped": self.grouped, "margin": self.margin}
        return {**told, "better": self.better, "agreed": self.agreed, "tensors": self.tensors}


def cluster(tensors: Iterable[torch.Tensor], experts: int) -> Clustering | None:
    """lora_B [rows, e r] of several parameters -> how their columns cluster by expert; None where all columns are zero, or rank or expert is one."""
    found = [shares for tensor in tensors if (shares := _shares(tensor, experts))]
    if not found:
        return None
    rank_major, grouped = (sum(values) / len(found) for values in zip(*found, strict=True))
    return Clustering(rank_major, grouped, sum((a > b) == (rank_major > grouped) for a, b in found), len(found))


def _shares(tensor: torch.Tensor, experts: int) -> Sequence[float] | None:
    import torch
    from einops import rearrange

    norms = tensor.to(torch.float32).norm(dim=0)
    rank = norms.numel() // experts
    if rank < 2 or experts < 2 or not bool((norms > 0).all()):
        return None
    logs = norms.log()
    spread = logs.var(correction=0)
    if not spread > 0:
        return None
    return [float(rearrange(logs, f"{axes} -> e r", e=experts).mean(dim=1).var(correction=0) / spread) for axes in ("(r e)", "(e r)")]

"""Grouped products in float64, token by token in plain torch: what the kernels are measured against, on whichever device they run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeglot.encodings import by_name
from moeglot.kernels.triton.gemm import Change, Matrices, Rows
from moeglot.nn.routing import Routing

KINDS = {"mxfp4": "mxfp4", "fp8": "fp8-block", "plain": "bfloat16"}


@dataclass
class Case:
    """Random matrices [e, rows, columns], their numbers in float64, and t tokens with k experts each, of which `idle` ones have none."""

    kind: str
    sizes: tuple[int, int, int]
    tokens: int
    ranks: int
    idle: tuple[int, ...] = ()
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        e, height, width = self.sizes
        torch.manual_seed(e + height + width + self.tokens)
        index = torch.stack([torch.randperm(e)[: self.ranks] for _ in range(self.tokens)])
        for expert in self.idle:
            index[index == expert] = e  # nobody's here
        encoding = by_name(KINDS[self.kind])
        given = torch.randn(e, height, width) * torch.exp2(torch.randint(-6, 0, (e, height, 1)).float())
        parts = encoding.encode(given)
        self.dense = encoding.decode(parts, torch.float32).double().to(self.device)
        parts = {name: part.to(self.device) for name, part in parts.items()}
        if self.kind == "plain":
            self.matrices = Matrices("plain", self.dense.to(self.dtype), None, self.sizes)
        else:
            self.matrices = Matrices(self.kind, parts["packed" if self.kind == "mxfp4" else "weight"], parts["scale"], self.sizes, (128, 128))
        routing = Routing.of(index.to(self.device), e)
        self.rows = Rows.of(routing.ends, routing.order, self.ranks)
        self.count = int(routing.ends[-1])
        self.ids = torch.repeat_interleave(torch.arange(e, device=self.device), torch.diff(routing.ends, prepend=routing.ends.new_zeros(1)))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape).to(self.dtype).to(self.device)

    def expected(self, x, along, *, gather=False, scatter=False, bias=None, change: Change | None = None, weights=None) -> torch.Tensor:
        """As `moeglot.kernels.triton.gemm.product`, in float64."""
        order = self.rows.order
        rows = x.double()[order // self.ranks] if gather else x.double()
        found = torch.zeros(len(order), self.sizes[1 if along else 2], dtype=torch.float64, device=x.device)
        for m in range(self.count):
            matrix = self.dense[self.ids[m]]
            row = matrix @ rows[m] if along else rows[m] @ matrix
            if bias is not None:
                row = row + bias[self.ids[m]].double()
            if change is not None:
                row = row + change.low[m].double() @ change.side[self.ids[m]].double()
            if weights is not None:
                row = row * weights[order[m]].double()
            found[order[m] if scatter else m] = row
        return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())

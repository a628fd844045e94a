"""How much of a small change survives rounding to an encoding: by its size, the encoding and the rounding, on random weights.

    python benchmarks/survival.py [--rows 1024] [--columns 1024] [--rank 16] [--results FILE]

Weights are normal numbers, first rounded to the encoding, as a quantized base is; the change is a product of normal factors. Each figure is
rec = ⟨Q(W + δ) - W, δ⟩ / ⟨δ, δ⟩ and, behind it, the cosine between Q(W + δ) - W and δ. Scales are the base's. The last column is the output error of
GPTQ with measured second moments, against rounding to the nearest, as shares of what the change does to the outputs.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moeglot.encodings import by_name
from moeglot.folding import Piece, fold
from moeglot.rounding import Rounding

SIZES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ROUNDINGS = {
    "bfloat16": ("nearest",),
    "fp8-block": ("nearest", "delta", "stochastic"),
    "mxfp4": ("nearest", "delta", "stochastic"),
    "nvfp4": ("nearest",),
    "int4:32": ("nearest",),
    "nf4": ("nearest",),
}


def change_of(weight: torch.Tensor, rank: int, size: float, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """left, right with ‖left @ right‖ = size × ‖weight‖."""
    left, right = torch.randn(len(weight), rank, generator=random), torch.randn(rank, weight.shape[1], generator=random)
    return left * float(size * weight.norm() / (left @ right).norm()), right


def survival(encoding: str, rounding: str, size: float, shape: tuple[int, int], rank: int) -> tuple[float, float]:
    random = torch.Generator().manual_seed(0)
    coded = by_name(encoding)
    parts = coded.encode(0.02 * torch.randn(shape, generator=random))
    weight = coded.decode(parts, torch.float32)
    piece = Piece(weight, *change_of(weight, rank, size, random), lambda tensor: tensor, (0,))
    _, survived = fold(coded, parts, shape, {"up": piece}, lambda of: of("up"), Rounding.by_name(rounding), lambda *_: None, True)
    return survived["up"].rec, survived["up"].cosine


def output_error(encoding: str, size: float, shape: tuple[int, int], rank: int) -> tuple[float, float]:
    """‖(Q - W - δ) X‖ / ‖δ X‖ for inputs X that are correlated as activations are: by GPTQ with their second moments, and to the nearest."""
    random = torch.Generator().manual_seed(0)
    coded = by_name(encoding)
    parts = coded.encode(0.02 * torch.randn(shape, generator=random))
    weight = coded.decode(parts, torch.float32)
    spectrum = torch.arange(1, shape[1] + 1).float() ** -0.5
    inputs = (torch.randn(4 * shape[1], shape[1], generator=random) * spectrum) @ torch.linalg.qr(torch.randn(shape[1], shape[1], generator=random))[0]
    left, right = change_of(weight, rank, size, random)
    found = []
    for rounding in (Rounding("gptq"), Rounding()):
        piece = Piece(weight, left, right, lambda tensor: tensor, (0,))
        made, _ = fold(coded, parts, shape, {"up": piece}, lambda of: of("up"), rounding, lambda *_: inputs.mT @ inputs, True)
        error = coded.decode(made, torch.float32) - weight - left @ right
        found.append(float((error @ inputs.mT).norm() / (left @ right @ inputs.mT).norm()))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 1024), ("columns", 1024), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "survival.json")
    asked = parser.parse_args()
    shape = (asked.rows, asked.columns)
    rows = [(encoding, rounding) for encoding, several in ROUNDINGS.items() for rounding in several]
    found = {f"{encoding}, {rounding}": [survival(encoding, rounding, size, shape, asked.rank) for size in SIZES] for encoding, rounding in rows}
    table = Table(title=f"recovered share (cosine) of a rank-{asked.rank} change by its size relative to the weights, {shape[0]} × {shape[1]}")
    for name in ("", *(f"{size:g}" for size in SIZES)):
        table.add_column(name)
    for name, figures in found.items():
        table.add_row(name, *(f"{rec:.2f} ({cosine:.2f})" for rec, cosine in figures))
    errors = {f"fp8-block at {size:g}": output_error("fp8-block", size, shape, asked.rank) for size in (1e-3, 1e-2)}
    console = Console(width=130)
    console.print(table)
    for name, (measured, nearest) in errors.items():
        console.print(f"output error over what the change does, {name}: gptq {measured:.2f}, nearest {nearest:.2f}")
    told = {"date": date.today().isoformat(), "shape": shape, "rank": asked.rank, "sizes": SIZES, "rec_and_cosine": found, "output_error_gptq_nearest": errors}
    asked.results.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Checkpoints of which each process of several has a part: their tensors, their marks, and how they are made."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moeglot

RANKS, EACH, LAYERS = 3, 2, 2
SIZES = {"h=i": {"e": RANKS * EACH, "h": 64, "i": 64}, "neither": {"e": RANKS * EACH, "h": 96, "i": 32}}
Tensors = dict[str, torch.Tensor]
ALONE = "tp rank 0 of 1, etp rank 0 of 1, pp rank 0 of 1, ep rank {} of 3"
"""The mark of a process of expert parallelism alone."""


def read(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def write(folder: Path, found: Tensors, marks: dict[str, str]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors", {"format": "pt", **marks})


def marks_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def of_rank(source: Path, name: str, out: Path, rank: int = 1, size: int = RANKS) -> Path:
    assert moeglot.convert(source, name, out, ep_rank=rank, ep_size=size).report.verdict == "holds"
    return out

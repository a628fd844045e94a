"""How long a conversion to each encoding takes, and one back, with all of its checks: against encoding and decoding the same matrices, and nothing else.

Experts of Qwen3-30B-A3B's shapes are encoded from BF16 and decoded again to BF16, by one worker. Counted is the processor's time, in nanoseconds for each of
the model's numbers: of writing, of the checks that read the output again, and of the encoding's own `encode` or `decode`. Medians over the rounds.

    python benchmarks/coded.py [--experts 32] [--rounds 3] [--folder DIR] [--results FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from merging import Seconds, timed, total
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from streaming import device

import moeglot
from moeglot.encodings import by_name
from moeglot.kernels import backend
from moeglot.planning.plan import plan

HIDDEN, INNER = 2048, 768
ENCODINGS = ("mxfp4", "fp8-block", "fp8-channel", "nvfp4", "int4:32", "nf4")
WRITING, CHECKS = ("writing",), ("forward", "certificate")


def write_base(folder: Path, experts: int) -> Path:
    """One layer of qwen3-moe/hub in BF16, its experts random."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    named = {f"model.layers.0.mlp.experts.{n}.{role}.weight": shape for n in range(experts) for role, shape in shapes.items()}
    named["model.layers.0.mlp.gate.weight"] = (experts, HIDDEN)
    tensors = {name: (torch.randn(shape, generator=random) * 0.02).bfloat16() for name, shape in named.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts": experts, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    config = {"model_type": "qwen3_moe", "torch_dtype": "bfloat16", "hidden_act": "silu", **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spent(call: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    began = time.process_time()
    call()
    return time.process_time() - began


def alone(folder: Path, encoding: str) -> tuple[float, float]:
    """Seconds of encoding all matrices of the checkpoint, each once, and of decoding one of them to bfloat16, times as many."""
    checkpoint = moeglot.open(folder)
    matrices = [role[n].decode(torch.bfloat16) for role in checkpoint.experts(0).values() for n in range(checkpoint.sizes["e"])]
    coded = by_name(encoding)
    parts = coded.encode(matrices[0])
    return sum(spent(partial(coded.encode, matrix)) for matrix in matrices), spent(partial(coded.decode, parts, torch.bfloat16)) * len(matrices)


def measure(base: Path, folder: Path, encoding: str, rounds: int) -> dict[str, dict[str, float]]:
    """Direction -> what -> nanoseconds of the processor for a number."""
    moeglot.convert(base, "qwen3-moe/hub", coded := folder / encoding, encode=encoding, allow_loss=True)
    takes: dict[str, list[tuple[float, Seconds]]] = {"there": [], "back": []}
    for _ in range(rounds):
        kernels = alone(base, encoding)
        made = plan(base, "qwen3-moe/hub", encode=encoding), plan(coded, "qwen3-moe/hub", encode="bfloat16")
        for (way, found), kernel, one in zip(takes.items(), kernels, made, strict=True):
            found.append((kernel, timed(one, folder / way)))
    numbers = moeglot.open(base).sizes["e"] * 3 * HIDDEN * INNER

    def middle(seconds: list[float]) -> float:
        return round(statistics.median(seconds) / numbers * 1e9, 2)

    return {
        way: {
            "kernel": middle([kernel for kernel, _ in found]),
            "writing": middle([total(one, WRITING)[0] for _, one in found]),
            "checks": middle([total(one, CHECKS)[0] for _, one in found]),
        }
        for way, found in takes.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description="Time of conversions to each encoding and back.")
    arguments.add_argument("--experts", type=int, default=32)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "coded.json")
    given = arguments.parse_args()
    told: dict[str, Any] = {"date": str(date.today()), "device": device(), "torch": torch.__version__, "kernels": backend.current()}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        base = write_base(Path(name) / "base", given.experts)
        told["nanoseconds"] = {encoding: measure(base, Path(name), encoding, given.rounds) for encoding in ENCODINGS}
    table = Table("", "kernel", "writing", "checks", title="nanoseconds of the processor for a number")
    for encoding, ways in told["nanoseconds"].items():
        for way, found in ways.items():
            table.add_row(f"bfloat16 to {encoding}" if way == "there" else "and back", *(f"{figure:.1f}" for figure in found.values()))
    Console(width=100).print(table)
    given.results.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()

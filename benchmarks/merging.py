"""How long a merge takes against a conversion of the same bytes: an adapter of rank 16 on all experts of a gpt-oss of real sizes, to the nearest MXFP4.

    python benchmarks/merging.py [--experts 8] [--rounds 3] [--results FILE]

Three jobs take turns, each from the same checkpoint, with one worker, and with either set of kernels: the merge, the conversion to BF16
(gpt-oss/transformers), and the one that moves MXFP4 as it is (gpt-oss/llm-compressor+mxfp4-pack). Each is counted in phases, in seconds of the processor,
so that other work on the machine counts little, and in seconds of the clock: "planning" makes a few experts to see what is lost, "writing" makes and writes
all, and what follows reads them again. The aim is a merge that is written in at most 2 × the clock's time of the conversion to BF16 with compiled kernels,
2.5 × with tables, on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from streaming import SIZES, device, write_gpt_oss

import moeglot
from moeglot.conversion.carrying import Carrying
from moeglot.conversion.convert import carry_out
from moeglot.kernels import backend
from moeglot.planning.plan import Plan, plan
from moeglot.planning.units import estimate

RANK, STRENGTH = 16, 0.03
"""Of the adapter: its rank, and the size of its change relative to the weights."""
SCALES = (121, 123)
LIMITS = {"numba": 2.0, "torch": 2.5}
WRITING, ALL = ("writing",), ("planning", "writing", "forward", "change", "certificate")
Seconds = dict[str, tuple[float, float]]
"""phase -> seconds of the processor, of the clock."""


def write_adapter(folder: Path, base: Path, layers: int) -> Path:
    """A PEFT adapter on gate_up and down of every expert."""
    folder.mkdir()
    random, tensors = torch.Generator().manual_seed(1), {}
    weight = next(iter(moeglot.open(base).experts(0).values()))[0].decode(torch.float32)
    size = STRENGTH * float(weight.std()) / RANK**0.5
    for layer in range(layers):
        for wrap, n_in, n_out in ((".base_layer", SIZES["h"], 2 * SIZES["i"]), ("", SIZES["i"], SIZES["h"])):
            stem = f"base_model.model.model.layers.{layer}.mlp.experts{wrap}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK * SIZES["e"], n_in, generator=random)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(n_out, RANK * SIZES["e"], generator=random) * size
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def timed(made: Plan, out: Path) -> Seconds:
    """One job, from its plan to the certificate."""
    found: Seconds = {}
    last = time.process_time(), time.monotonic()

    def tell(phase: str, *_: int) -> None:
        nonlocal last
        now, before = (time.process_time(), time.monotonic()), found.get(phase, (0.0, 0.0))
        found[phase] = before[0] + now[0] - last[0], before[1] + now[1] - last[1]
        last = now

    if made.change:
        made = estimate(made)
        tell("planning")
    carry_out(made, out, Carrying(allow_loss=True, workers=1, threshold=0), tell)
    tell("certificate")
    shutil.rmtree(out)
    return found


def ratio(some: list[Seconds], others: list[Seconds], phases: tuple[str, ...]) -> tuple[float, float]:
    """The median over the rounds of how many times as long one job takes as another: of the processor's time, of the clock's."""

    def of(clock: int) -> float:
        pairs = zip(some, others, strict=True)
        return statistics.median(total(one, phases)[clock] / total(other, phases)[clock] for one, other in pairs)

    return of(0), of(1)


def total(found: Seconds, phases: tuple[str, ...]) -> tuple[float, float]:
    seconds = [found[phase] for phase in phases if phase in found]
    return sum(one for one, _ in seconds), sum(one for _, one in seconds)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Time of a merge against that of a conversion.")
    arguments.add_argument("--experts", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "merging.json")
    given = arguments.parse_args()
    SIZES["e"] = given.experts
    told: dict[str, Any] = {"date": str(date.today()), "device": device(), "torch": torch.__version__, "rank": RANK, "experts": given.experts}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        base = write_gpt_oss(Path(name) / "base", 1, vocabulary=1024, scales=SCALES)
        adapter = write_adapter(Path(name) / "adapter", base, 1)
        opened = moeglot.open(base)
        change = moeglot.open_adapter(adapter, opened, "peft")
        jobs: dict[str, Callable[[], Plan]] = {
            "merge": lambda: plan(opened, adapter=change),
            "to BF16": lambda: plan(opened, "gpt-oss/transformers"),
            "as it is": lambda: plan(opened, "gpt-oss/llm-compressor+mxfp4-pack"),
        }
        for kernels in ("numba", "torch") if backend.installed() else ("torch",):
            found: dict[str, list[Seconds]] = {job: [] for job in jobs}
            with backend.using(kernels):
                for n in range(given.rounds + 1):  # in the first, kernels are compiled and files come from the disk
                    for job, make in jobs.items():
                        seconds = timed(make(), Path(name) / "out")
                        found[job] += [seconds] if n else []
            told[kernels] = described(found)
    show(told)
    given.results.write_text(json.dumps(told, indent=2) + "\n")
    if any(told[kernels]["writing_times_to_bf16"]["clock"] > limit for kernels, limit in LIMITS.items() if kernels in told):
        raise SystemExit(1)


def described(found: dict[str, list[Seconds]]) -> dict[str, Any]:
    def ratios(job: str, phases: tuple[str, ...]) -> dict[str, float]:
        processor, clock = ratio(found["merge"], found[job], phases)
        return {"processor": round(processor, 2), "clock": round(clock, 2)}

    def median(job: str, phase: str, clock: int) -> float:
        return round(statistics.median(one[phase][clock] for one in found[job]), 3)

    return {
        "writing_times_to_bf16": ratios("to BF16", WRITING),
        "writing_times_as_it_is": ratios("as it is", WRITING),
        "all_times_to_bf16": ratios("to BF16", ALL),
        "all_times_as_it_is": ratios("as it is", ALL),
        "seconds": {job: {phase: {"processor": median(job, phase, 0), "clock": median(job, phase, 1)} for phase in of[0]} for job, of in found.items()},
    }


def show(told: dict[str, Any]) -> None:
    for kernels in LIMITS:
        if kernels not in told:
            continue
        times = told[kernels]["writing_times_to_bf16"]["clock"]
        table = Table("processor seconds", *ALL, title=f"{kernels}: a merge is written in {times} × the time of BF16, by the clock")
        for job, phases in told[kernels]["seconds"].items():
            table.add_row(job, *(f"{phases[phase]['processor']:.2f}" if phase in phases else "" for phase in ALL))
        Console(width=140).print(table)


if __name__ == "__main__":
    main()

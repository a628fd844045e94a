"""How much memory and time a conversion takes: its peak of anonymous memory against what is promised, its speed against `cp`, and `inspect` on a large index.

Converts a random gpt-oss of real shapes, and one half as large, from MXFP4 to BF16, with one worker and with two, through the command line, verification
and certificate included. The promise: 4 × the largest stored expert matrix × workers + 200 MB, whatever the model's size. Run on an idle machine:

    python benchmarks/streaming.py [--layers 4] [--folder DIR] [--results FILE]

Anonymous memory is RssAnon of /proc/PID/status, read every 20 ms; mapped files are not in it, since the kernel drops their pages at will.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import moeglot
from moeglot.format import Format
from moeglot.formats import by_name

MATRICES, ALLOWANCE = 4, 200_000_000
SIZES = {"e": 32, "h": 2880, "i": 2880, "q": 64, "k": 8, "d": 64}
VOCABULARY = 65536
LARGEST = SIZES["h"] * 2 * SIZES["i"] * 2
"""Bytes of the largest stored expert matrix on either side: gate and up together, in BF16."""
INSPECT_LIMIT = 1.0
INTERVAL = 0.02


@dataclass(frozen=True)
class Run:
    """One conversion. Bytes, seconds; `phases`: what the command was doing -> its peak of anonymous memory and its seconds."""

    layers: int
    workers: int
    source_bytes: int
    output_bytes: int
    peak_bytes: int
    limit_bytes: int
    seconds: float
    copy_seconds: float
    phases: Mapping[str, tuple[int, float]]

    @property
    def holds(self) -> bool:
        return self.peak_bytes < self.limit_bytes

    @property
    def ratio(self) -> float:
        """How many times as long as `cp` of the same bytes."""
        return self.seconds / self.copy_seconds

    @property
    def rate(self) -> float:
        """Bytes of output per second."""
        return self.output_bytes / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds, "bytes_per_second": round(self.rate), "times_cp": round(self.ratio, 2)}


# --- synthetic checkpoints -------------------------------------------------------------------------------------------------------------


def write_gpt_oss(folder: Path, layers: int) -> Path:
    """gpt-oss/openai, a shard for each layer: random codes, scales from 118 to 126; an embedding that is larger than the memory allowed."""
    folder.mkdir()
    form = by_name("gpt-oss/openai")
    random = torch.Generator().manual_seed(0)
    weight_map = {}
    for n in range(layers + 1):
        name = f"model-{n + 1:05}-of-{layers + 1:05}.safetensors"
        tensors = _layer(form, n - 1, random) if n else {"model.embed_tokens.weight": _floats((VOCABULARY, SIZES["h"]), random)}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    config = {
        "model_type": "gpt_oss",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": layers,
        "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4"},
        **{keys[0]: SIZES[letter] for letter, keys in form.family.sizes.items()},
    }
    _write_config(folder, config, weight_map)
    return folder


def _layer(form: Format, layer: int, random: torch.Generator) -> dict[str, torch.Tensor]:
    found = {}
    for key, line, name, _, _ in form.expert_keys((layer,), SIZES):
        shape = next(part for part in line.encoding.parts if part.name == name).shape(line.shape(SIZES))
        codes = {"packed": (0, 256), "scale": (118, 127)}.get(name)
        found[key] = torch.randint(*codes, shape, dtype=torch.uint8, generator=random) if codes else _floats(shape, random)
    return found


def _floats(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random).to(torch.bfloat16)


def write_index(folder: Path, layers: int = 130, shards: int = 100) -> int:
    """A qwen3-moe/hub of more than 50 000 tensors with the shapes of the 30B; headers only, the data is a hole. Returns how many tensors."""
    folder.mkdir()
    form, sizes = by_name("qwen3-moe/hub"), {"e": 128, "h": 2048, "i": 768, "q": 32, "k": 4, "d": 128}
    shapes = {key: line.shape(sizes) for key, line, _, _, _ in form.expert_keys(tuple(range(layers)), sizes)}
    shapes |= {f"model.layers.{layer}.mlp.gate.weight": (sizes["e"], sizes["h"]) for layer in range(layers)}
    keys, weight_map = list(shapes), {}
    for n in range(shards):
        name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        held = keys[n * len(keys) // shards : (n + 1) * len(keys) // shards]
        _write_hole(folder / name, {key: shapes[key] for key in held})
        weight_map |= dict.fromkeys(held, name)
    config = {"model_type": "qwen3_moe", "torch_dtype": "bfloat16", "num_hidden_layers": layers}
    _write_config(folder, {**config, **{names[0]: sizes[letter] for letter, names in form.family.sizes.items()}}, weight_map)
    return len(keys)


def _write_hole(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, at = {}, 0
    for key, (rows, columns) in shapes.items():
        header[key] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, at + 2 * rows * columns]}
        at += 2 * rows * columns
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)


def _write_config(folder: Path, config: Mapping[str, Any], weight_map: Mapping[str, str]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- measuring -------------------------------------------------------------------------------------------------------------------------


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def convert(source: Path, out: Path, workers: int) -> tuple[float, dict[str, tuple[int, float]]]:
    """Seconds, and phase -> (peak of anonymous memory, seconds)."""
    command = [sys.executable, "-m", "moeglot.cli", "convert", str(source), str(out), "--to", "gpt-oss/transformers", "--workers", str(workers)]
    os.sync()
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        told = ["planning"]
        reader = threading.Thread(target=lambda: told.extend(line.split()[0] for line in process.stderr or () if line.strip()))
        reader.start()
        peaks: dict[str, int] = {}
        starts: dict[str, float] = {}
        while process.poll() is None:
            phase = told[-1]
            starts.setdefault(phase, time.monotonic())
            peaks[phase] = max(peaks.get(phase, 0), anonymous(process.pid))
            time.sleep(INTERVAL)
        reader.join()
    ended = time.monotonic()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    ends = [*list(starts.values())[1:], ended]
    return ended - began, {phase: (peaks[phase], end - start) for (phase, start), end in zip(starts.items(), ends, strict=True)}


def copy(folder: Path, to: Path) -> float:
    """Seconds of a plain `cp`."""
    os.sync()
    began = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", str(folder), str(to)], check=True)
    return time.monotonic() - began


def measure(source: Path, layers: int, folder: Path) -> Iterator[Run]:
    for workers in (1, 2):
        out = folder / "out"
        seconds, phases = convert(source, out, workers)
        copy_seconds = copy(out, folder / "copy")
        limit, peak = MATRICES * LARGEST * workers + ALLOWANCE, max(peak for peak, _ in phases.values())
        yield Run(layers, workers, nbytes(source), nbytes(out), peak, limit, seconds, copy_seconds, phases)
        shutil.rmtree(out)
        shutil.rmtree(folder / "copy")


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def inspect(folder: Path) -> float:
    """Seconds of `moeglot inspect`, the best of three; Python's start included."""
    command, found = [sys.executable, "-m", "moeglot.cli", "inspect", str(folder)], []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.monotonic() - began)
    return min(found)


# --- telling ---------------------------------------------------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_bytes": memory, "system": platform.platform(), "load": round(os.getloadavg()[0], 2)}


def show(runs: list[Run], tensors: int, seconds: float) -> None:
    table = Table("layers", "workers", "output", "peak", "limit", "phases: peak, time", "time", "rate", "times cp", title="gpt-oss MXFP4 to BF16, verified")
    for run in runs:
        phases = "\n".join(f"{phase}: {peak / 1e6:.0f} MB, {time:.1f} s" for phase, (peak, time) in run.phases.items())
        shown = (f"{run.output_bytes / 1e9:.2f} GB", f"{run.peak_bytes / 1e6:.0f} MB", f"{run.limit_bytes / 1e6:.0f} MB", phases)
        colour = "green" if run.holds else "red"
        table.add_row(str(run.layers), str(run.workers), *shown, f"{run.seconds:.1f} s", f"{run.rate / 1e6:.0f} MB/s", f"{run.ratio:.1f}", style=colour)
    console = Console(width=140)
    console.print(table)
    console.print(f"inspect, {tensors} tensors: {seconds:.2f} s", style="green" if seconds < INSPECT_LIMIT else "red")


def main() -> None:
    arguments = argparse.ArgumentParser(description="Memory and time of a conversion.")
    arguments.add_argument("--layers", type=int, default=4, help="of the larger model: 1.6 GB of output each (default: 4)")
    arguments.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "streaming.json")
    given = arguments.parse_args()
    needed = int(given.layers * (0.43e9 + 2 * 1.6e9) + 3 * 0.38e9)
    found: dict[str, Any] = {"date": str(date.today()), "device": device(), "torch": torch.__version__, "moeglot": moeglot.__version__}
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise SystemExit(f"{folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed; pass --folder or fewer --layers")
        for layers in (given.layers // 2, given.layers):
            source = write_gpt_oss(folder / "source", layers)
            runs += measure(source, layers, folder)
            shutil.rmtree(source)
        tensors = write_index(folder / "index")
        seconds = inspect(folder / "index")
    show(runs, tensors, seconds)
    found |= {"conversions": [run.as_json() for run in runs], "inspect": {"tensors": tensors, "seconds": round(seconds, 3), "limit_seconds": INSPECT_LIMIT}}
    given.results.parent.mkdir(exist_ok=True)
    given.results.write_text(json.dumps(found, indent=2) + "\n")
    if seconds >= INSPECT_LIMIT or not all(run.holds for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""How much memory and time a conversion takes: its peak of anonymous memory against what is promised, its speed against the disk and against transformers,
and `inspect` on a large index.

Converts a random gpt-oss of real shapes, and one half as large, from MXFP4 to BF16 and back, with one worker and with two, through the command line,
verification and certificate included. The promise: 4 × the largest stored expert matrix × workers + 200 MB, whatever the model's size. Run on an idle machine:

    python benchmarks/streaming.py [--layers 4] [--experts 32] [--rounds 3] [--peers] [--folder DIR] [--results FILE]

Three things to compare with, in the same run: `cp` of the output; the floor, which is every byte of the source read and every byte of the output written
by the same number of threads in the way that we read and write, and nothing else; and with --peers, transformers' from_pretrained(dequantize=True) and
save_pretrained, which verifies nothing. They and the conversions take turns; times are medians over the rounds, peaks the most of any. The way back, in
which the numbers are coded anew and compared with what they were, is taken once.
"writing" is the conversion proper; the phases after it re-read the output and verify it.
Anonymous memory is RssAnon of /proc/PID/status, read every 20 ms; mapped files are not in it, since the kernel drops their pages at will.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import moeglot
from moeglot import scratch
from moeglot.files.direct import Output
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
    floor_seconds: float
    peer_seconds: float | None
    peak_resident_bytes: int
    phases: Mapping[str, tuple[int, float]]
    back_seconds: float
    back_peak_bytes: int

    @property
    def holds(self) -> bool:
        return max(self.peak_bytes, self.back_peak_bytes) < self.limit_bytes

    @property
    def ratio(self) -> float:
        """How many times as long as `cp` of the same bytes."""
        return self.seconds / self.copy_seconds

    @property
    def rate(self) -> float:
        """Bytes of output per second."""
        return self.output_bytes / self.seconds

    @property
    def written(self) -> float:
        """Seconds from the start of the process to the last byte written, before it is verified."""
        return sum(self.phases[phase][1] for phase in ("planning", "writing"))

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "holds": self.holds,
            "bytes_per_second": round(self.rate),
            "times_cp": round(self.ratio, 2),
            "written_times_floor": round(self.written / self.floor_seconds, 2),
            "writing_times_floor": round(self.phases["writing"][1] / self.floor_seconds, 2),
            "peer_times_written": self.peer_seconds and round(self.peer_seconds / self.written, 2),
        }


# --- synthetic checkpoints -------------------------------------------------------------------------------------------------------------


def write_gpt_oss(folder: Path, layers: int, vocabulary: int = VOCABULARY, scales: tuple[int, int] = (118, 127)) -> Path:
    """gpt-oss/openai, a shard for each layer: random codes and scales; by default, an embedding that is larger than the memory allowed."""
    folder.mkdir()
    form = by_name("gpt-oss/openai")
    random = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for n in range(layers + 1):
        name = f"model-{n + 1:05}-of-{layers + 1:05}.safetensors"
        tensors = _layer(form, n - 1, scales, random) if n else {"model.embed_tokens.weight": _floats((vocabulary, SIZES["h"]), random)}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    config = {
        "model_type": "gpt_oss",
        "torch_dtype": "bfloat16",
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4"},
        **{keys[0]: SIZES[letter] for letter, keys in form.family.sizes.items()},
    }
    _write_config(folder, config, weight_map)
    return folder


def _layer(form: Format, layer: int, scales: tuple[int, int], random: torch.Generator) -> dict[str, torch.Tensor]:
    found = {}
    for line, part, keys in form.expert_keys((layer,), SIZES):
        shape, codes = part.shape(line.shape(SIZES)), {"packed": (0, 256), "scale": scales}.get(part.name)
        found[next(keys)] = torch.randint(*codes, shape, dtype=torch.uint8, generator=random) if codes else _floats(shape, random)
    return found


def _floats(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random).to(torch.bfloat16)


def write_index(folder: Path, layers: int = 130, shards: int = 100) -> int:
    """A qwen3-moe/hub of more than 50 000 tensors with the shapes of the 30B; headers only, the data is a hole. Returns how many tensors."""
    folder.mkdir()
    form, sizes = by_name("qwen3-moe/hub"), {"e": 128, "h": 2048, "i": 768, "q": 32, "k": 4, "d": 128}
    shapes = {key: line.shape(sizes) for line, _, keys in form.expert_keys(tuple(range(layers)), sizes) for key in keys}
    shapes |= {f"model.layers.{layer}.mlp.gate.weight": (sizes["e"], sizes["h"]) for layer in range(layers)}
    keys = list(shapes)
    weight_map: dict[str, str] = {}
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


def resident(pid: int) -> int:
    """The peak of resident memory of a process in bytes, mapped files included; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def floor(source: Path, output: Path, folder: Path, workers: int) -> float:
    """Seconds to read the source and to write as many bytes as the output has, in pieces as large as an expert's, and nothing else."""
    target = folder / "floor"
    sizes = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
    target.mkdir()
    for name, size in sizes.items():
        with (target / name).open("wb") as room:
            os.posix_fallocate(room.fileno(), 0, size)
    pieces = [(name, at, min(LARGEST, size - at)) for name, size in sizes.items() for at in range(0, size, LARGEST)]
    reads = [(path, at) for path in source.glob("*.safetensors") for at in range(0, path.stat().st_size, LARGEST)]
    files = {name: Output(target / name) for name in sizes}

    def write(piece: tuple[str, int, int]) -> None:
        name, at, count = piece
        files[name].write(scratch.empty((count,), torch.uint8), at)

    def read(piece: tuple[Path, int]) -> None:
        path, at = piece
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            file.readinto(scratch.empty((LARGEST,), torch.uint8).numpy().data)

    os.sync()
    began = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        for future in [*(pool.submit(read, piece) for piece in reads), *(pool.submit(write, piece) for piece in pieces)]:
            future.result()
    seconds = time.monotonic() - began
    for file in files.values():
        file.close()
    shutil.rmtree(target)
    return seconds


PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], save_original_format=False)
"""


def peer(source: Path, out: Path) -> float:
    """Seconds of transformers' own way to the same tensors, in a process of its own."""
    os.sync()
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", PEER, str(source), str(out)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    shutil.rmtree(out)
    return seconds


def convert(source: Path, out: Path, workers: int, to: str) -> tuple[float, int, dict[str, tuple[int, float]]]:
    """Seconds, the peak of resident memory, and phase -> (peak of anonymous memory, seconds)."""
    command = [sys.executable, "-m", "moeglot.cli.main", "convert", str(source), str(out), "--to", to, "--workers", str(workers), "--allow-loss"]
    os.sync()
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        told = ["planning"]
        reader = threading.Thread(target=lambda: told.extend(line.split()[0] for line in process.stderr or () if line.strip()))
        reader.start()
        peaks: dict[str, int] = {}
        starts: dict[str, float] = {}
        most = 0
        while process.poll() is None:
            phase = told[-1]
            starts.setdefault(phase, time.monotonic())
            peaks[phase] = max(peaks.get(phase, 0), anonymous(process.pid))
            most = max(most, resident(process.pid))
            time.sleep(INTERVAL)
        reader.join()
    ended = time.monotonic()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    ends = [*list(starts.values())[1:], ended]
    return ended - began, most, {phase: (peaks[phase], end - start) for (phase, start), end in zip(starts.items(), ends, strict=True)}


def copy(folder: Path, to: Path) -> float:
    """Seconds of a plain `cp`."""
    os.sync()
    began = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", str(folder), str(to)], check=True)
    return time.monotonic() - began


def measure(source: Path, layers: int, folder: Path, peers: bool, rounds: int) -> list[Run]:
    """One worker, and two: everything once in each round."""
    takes: dict[int, list[Run]] = {1: [], 2: []}
    for n in range(rounds):
        peer_seconds = peer(source, folder / "peer") if peers else None
        for workers, runs in takes.items():
            runs.append(_take(source, layers, folder, workers, peer_seconds, with_back=n == 0))
    return [middle(runs) for runs in takes.values()]


def _take(source: Path, layers: int, folder: Path, workers: int, peer_seconds: float | None, with_back: bool) -> Run:
    out = folder / "out"
    seconds, most, phases = convert(source, out, workers, "gpt-oss/transformers")
    back_seconds, back_peak = _back(out, folder / "back", workers) if with_back else (0.0, 0)
    copy_seconds, floor_seconds = copy(out, folder / "copy"), floor(source, out, folder, workers)
    limit, peak = MATRICES * LARGEST * workers + ALLOWANCE, max(peak for peak, _ in phases.values())
    sizes = nbytes(source), nbytes(out)
    for name in ("out", "copy"):
        shutil.rmtree(folder / name)
    return Run(layers, workers, *sizes, peak, limit, seconds, copy_seconds, floor_seconds, peer_seconds, most, phases, back_seconds, back_peak)


def _back(source: Path, out: Path, workers: int) -> tuple[float, int]:
    """Seconds and the peak of anonymous memory."""
    seconds, _, phases = convert(source, out, workers, "gpt-oss/openai")
    shutil.rmtree(out)
    return seconds, max(peak for peak, _ in phases.values())


def middle(runs: Sequence[Run]) -> Run:
    """The same run several times: medians of its times, the most of its peaks."""
    first = runs[0]
    times = {name: median(getattr(run, name) for run in runs) for name in ("seconds", "copy_seconds", "floor_seconds")}
    peaks = {name: max(getattr(run, name) for run in runs) for name in ("peak_bytes", "peak_resident_bytes")}
    phases = {phase: (max(run.phases[phase][0] for run in runs), median(run.phases[phase][1] for run in runs)) for phase in first.phases}
    peer_seconds = None if first.peer_seconds is None else median(run.peer_seconds or 0.0 for run in runs)
    return replace(first, **times, **peaks, phases=phases, peer_seconds=peer_seconds)


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def inspect(folder: Path) -> tuple[float, float]:
    """Seconds of `moeglot inspect`, and what it got of the processor in them, each the best of five; Python's start included.

    Our modules are compiled once, as those of an installed package are, also where the environment says that Python writes no bytecode.
    """
    command, found = [sys.executable, "-m", "moeglot.cli.main", "inspect", str(folder)], []
    for _ in range(5):
        began, used = time.monotonic(), _processor_seconds()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
        found.append((time.monotonic() - began, _processor_seconds() - used))
    return min(seconds for seconds, _ in found), min(processor for _, processor in found)


def _processor_seconds() -> float:
    """Of all processes that ended so far and that we waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- telling ---------------------------------------------------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_bytes": memory, "system": platform.platform(), "load": round(os.getloadavg()[0], 2)}


def show(runs: list[Run], tensors: int, seconds: float, processor: float) -> None:
    table = Table(
        "layers",
        "workers",
        "output",
        "peak",
        "limit",
        "peak back",
        "phases: peak, time",
        "time",
        "rate",
        "× cp",
        "writing × floor (with the start)",
        "transformers × written (× all)",
        title="gpt-oss MXFP4 to BF16 and back, verified",
    )
    for run in runs:
        phases = "\n".join(f"{phase}: {peak / 1e6:.0f} MB, {time:.1f} s" for phase, (peak, time) in run.phases.items())
        shown = (f"{run.output_bytes / 1e9:.2f} GB", *(f"{n / 1e6:.0f} MB" for n in (run.peak_bytes, run.limit_bytes, run.back_peak_bytes)), phases)
        colour = "green" if run.holds else "red"
        versus = f"{run.peer_seconds / run.written:.1f} ({run.peer_seconds / run.seconds:.1f})" if run.peer_seconds else ""
        table.add_row(
            str(run.layers),
            str(run.workers),
            *shown,
            f"{run.seconds:.1f} s",
            f"{run.rate / 1e6:.0f} MB/s",
            f"{run.ratio:.1f}",
            f"{run.phases['writing'][1] / run.floor_seconds:.2f} ({run.written / run.floor_seconds:.2f})",
            versus,
            style=colour,
        )
    console = Console(width=140)
    if runs:
        console.print(table)
    console.print(f"inspect, {tensors} tensors: {seconds:.2f} s, {processor:.2f} of the processor", style="green" if seconds < INSPECT_LIMIT else "red")


def main() -> None:
    arguments = argparse.ArgumentParser(description="Memory and time of a conversion.")
    arguments.add_argument("--layers", type=int, default=4, help="of the larger model: 1.6 GB of output each (default: 4); 0: inspect alone")
    arguments.add_argument("--experts", type=int, default=SIZES["e"], help="of a layer, which is 50 MB of output each (default: 32)")
    arguments.add_argument("--rounds", type=int, default=3, help="how often each thing is timed (default: 3)")
    arguments.add_argument("--peers", action="store_true", help="also time transformers on the same checkpoint; it needs all of it in memory, twice")
    arguments.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "streaming.json")
    given = arguments.parse_args()
    SIZES["e"] = given.experts
    needed = int(given.layers * (2 * 0.43e9 + 3 * 1.6e9) + 3 * 0.38e9)
    found: dict[str, Any] = {"date": str(date.today()), "device": device(), "torch": torch.__version__, "moeglot": moeglot.__version__}
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise SystemExit(f"{folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed; pass --folder or fewer --layers")
        for layers in sorted({max(1, given.layers // 2), given.layers}) if given.layers else ():
            source = write_gpt_oss(folder / "source", layers)
            runs += measure(source, layers, folder, given.peers, given.rounds)
            shutil.rmtree(source)
        tensors = write_index(folder / "index")
        seconds, processor = inspect(folder / "index")
    show(runs, tensors, seconds, processor)
    told = {"tensors": tensors, "seconds": round(seconds, 3), "processor_seconds": round(processor, 3), "limit_seconds": INSPECT_LIMIT}
    if runs:
        found |= {"conversions": [run.as_json() for run in runs], "inspect": told}
    else:
        found = {**json.loads(given.results.read_text()), "inspect": told | {"date": found["date"], "device": found["device"]}}
    given.results.parent.mkdir(exist_ok=True)
    given.results.write_text(json.dumps(found, indent=2) + "\n")
    if seconds >= INSPECT_LIMIT or not all(run.holds for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

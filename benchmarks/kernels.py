"""How fast numbers are coded and decoded: torch's tables and the compiled kernels, against the libraries that people use and against a copy of memory.

One thread, one expert's matrix of gpt-oss (5760 × 2880), every code path warm. Each round times a copy, then the peer, then ours; what is reported is the
median over the rounds and its ratio to the copy and to the peer of the same run. "copy" is the bf16 side of the operation copied into memory that was
touched before. A library that is not installed is left out, and said to be missing. What `bf16 to MXFP4` is measured against is compressed-tensors, which
pip installs; OpenAI's `downcast_to_mxfp_torch` is on no index. Run on an idle machine:

    python benchmarks/kernels.py [--rounds 9] [--rows 5760] [--only mxfp4] [--clock cpu] [--results FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from streaming import device

from moeglot.encoding import WHOLE, Encoding
from moeglot.encodings.bnb4 import BNB4
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.int4 import INT4
from moeglot.encodings.mxfp4 import mxfp4
from moeglot.encodings.nvfp4 import NVFP4
from moeglot.kernels import backend

COLUMNS = 2880
WANTED: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "MXFP4 to bf16, turned": {"torch": (12, 0.12), "numba": (35, 0.35)},
    "MXFP4 to bf16, rows": {"torch": (15, 0.20), "numba": (60, 0.8)},
    "bf16 to MXFP4": {"torch": (12, None), "numba": (70, 0.15)},
    "FP8 blocks to bf16": {"torch": (8, None), "numba": (15, 0.25)},
    "bf16 to FP8 blocks": {"torch": (5, None), "numba": (15, 0.25)},
    "bf16 to NF4": {"torch": (None, None), "numba": (25, None)},
}
"""What is aimed at: times the peer, times the copy."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operation. `peer`: package and what is called there, None where nobody has it."""

    name: str
    ours: Run
    package: str = ""
    peer: Callable[[], Run] | None = None
    called: str = ""


@dataclass(frozen=True)
class Figure:
    """Medians in seconds; extra memory in bytes, beyond operands and result."""

    name: str
    kernels: str
    seconds: float
    copy_seconds: float
    peer_seconds: float | None
    peer: str
    extra_bytes: int

    @property
    def to_copy(self) -> float:
        return self.copy_seconds / self.seconds

    @property
    def to_peer(self) -> float | None:
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "times_copy": round(self.to_copy, 3), "times_peer": self.to_peer and round(self.to_peer, 1)}


# --- the operations ----------------------------------------------------------------------------------------------------------------------


def cases(rows: int) -> Iterator[Case]:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(rows, COLUMNS, generator=random).bfloat16()
    out, turned = torch.zeros(rows, COLUMNS, dtype=torch.bfloat16), torch.zeros(COLUMNS, rows, dtype=torch.bfloat16)

    def decoding(encoding: Encoding, to: torch.Tensor = out) -> tuple[dict[str, torch.Tensor], Run]:
        parts = encoding.encode(values)
        return parts, lambda: encoding.decode(parts, torch.bfloat16, to)

    mx = mxfp4("openai")
    parts, rows_of = decoding(mx)
    packed, scale = parts["packed"], parts["scale"]
    called = "integrations.mxfp4.convert_moe_packed_tensors, which also turns"
    yield Case("MXFP4 to bf16, rows", rows_of, "transformers", lambda: _transformers_mxfp4(packed, scale), called)
    yield Case("MXFP4 to bf16, turned", lambda: mx.decode(parts, torch.bfloat16, turned.mT), "transformers", lambda: _transformers_mxfp4(packed, scale), called)
    rule = mxfp4("compressed-tensors")
    called = "compressors.mxfp4.MXFP4PackedCompressor.compress, its scales given"
    yield Case("bf16 to MXFP4", lambda: rule.encode(values), "compressed-tensors", lambda: _compressed_mxfp4(values), called)
    block = FP8(scale="F32")
    _, fp8_of = decoding(block)
    fits = rows % 128 == 0
    called = "integrations.finegrained_fp8.Fp8Dequantize, in blocks of 96 × 96, as it refuses 2880 columns in blocks of 128"
    yield Case("FP8 blocks to bf16", fp8_of, "transformers", (lambda: _transformers_fp8_decode(values)) if fits else None, called)
    called = called.replace("Dequantize", "Quantize")
    yield Case("bf16 to FP8 blocks", lambda: block.encode(values), "transformers", (lambda: _transformers_fp8_encode(values)) if fits else None, called)
    yield Case("FP8 channels to bf16", decoding(FP8((1, WHOLE), "F32"))[1])
    yield Case("bf16 to FP8 channels", lambda: FP8((1, WHOLE), "F32").encode(values))
    yield Case("NVFP4 to bf16", decoding(NVFP4())[1])
    yield Case("bf16 to NVFP4", lambda: NVFP4().encode(values))
    yield Case("INT4 to bf16", decoding(INT4(32))[1])
    yield Case("bf16 to INT4", lambda: INT4(32).encode(values))
    yield Case("NF4 to bf16", decoding(BNB4())[1], "bitsandbytes", lambda: _bitsandbytes(values, decode=True), "functional.dequantize_4bit")
    yield Case("bf16 to NF4", lambda: BNB4().encode(values), "bitsandbytes", lambda: _bitsandbytes(values, decode=False), "functional.quantize_4bit")


def _transformers_mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> Run:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return lambda: convert_moe_packed_tensors(packed.unsqueeze(0), scale.unsqueeze(0))


def _transformers_fp8_encode(values: torch.Tensor) -> Run:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[96, 96], scale_fmt=None))
    return lambda: Fp8Quantize(quantizer).convert({"w.weight": values})


def _transformers_fp8_decode(values: torch.Tensor) -> Run:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts = FP8((96, 96), "F32").encode(values)
    return lambda: Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["scale"], torch.bfloat16)


def _compressed_mxfp4(values: torch.Tensor) -> Run:
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    scale = torch.exp2(mxfp4("compressed-tensors", "packed").encode(values)["scale"].float() - 127).bfloat16()
    return lambda: MXFP4PackedCompressor.compress({"weight": values, "weight_scale": scale}, scheme)


def _bitsandbytes(values: torch.Tensor, decode: bool) -> Run:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    return (lambda: functional.dequantize_4bit(codes, state)) if decode else (lambda: functional.quantize_4bit(values, blocksize=64, quant_type="nf4"))


# --- measuring ---------------------------------------------------------------------------------------------------------------------------


CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def seconds(run: Run, clock: Callable[[], float]) -> float:
    began = clock()
    run()
    return clock() - began


def extra(run: Run) -> int:
    """Bytes that a run needs beyond what is there before it: the peak of resident memory, which Linux counts anew when told."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        kept = run()
        peak = _status("VmHWM")
    except OSError:
        return -1
    tensors = kept.values() if isinstance(kept, dict) else ()
    return max(0, peak - before - sum(tensor.nbytes for tensor in tensors))


def _status(field: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def peer_of(case: Case) -> tuple[Run | None, str]:
    """What the peer runs, and its name with its version, or why it is not there."""
    if not case.peer:
        return None, ""
    try:
        return case.peer(), f"{case.package} {version(case.package)}: {case.called}"
    except (ImportError, PackageNotFoundError) as error:
        return None, f"{case.package} is not installed ({type(error).__name__})"


def measure(case: Case, rows: int, rounds: int, clock: Callable[[], float]) -> Iterator[Figure]:
    source = torch.randn(rows, COLUMNS).bfloat16()
    to = torch.zeros_like(source)
    peer, name = peer_of(case)
    kernels = [kernel for kernel in backend.NAMES if kernel == "torch" or backend.installed()]
    times: dict[str, list[float]] = {}

    def note(key: str, run: Run) -> None:
        times.setdefault(key, []).append(seconds(run, clock))

    extras = {}
    for kernel in kernels:
        with backend.using(kernel):
            case.ours()
            extras[kernel] = extra(case.ours)
    for n in range(rounds):
        note("copy", lambda: to.copy_(source))
        if peer and n < max(3, rounds // 3):
            note("peer", peer)
        for kernel in kernels:
            with backend.using(kernel):
                note(kernel, case.ours)
    median = {key: statistics.median(found) for key, found in times.items()}
    for kernel in kernels:
        yield Figure(case.name, kernel, median[kernel], median["copy"], median.get("peer"), name, extras[kernel])


# --- telling -----------------------------------------------------------------------------------------------------------------------------


def show(figures: list[Figure]) -> None:
    table = Table("operation", "kernels", "time", "× copy", "aim", "× peer", "aim", "extra memory", "peer", title="one thread, medians of interleaved runs")
    for figure in figures:
        aim_peer, aim_copy = WANTED.get(figure.name, {}).get(figure.kernels, (None, None))
        reached = (aim_copy is None or figure.to_copy >= aim_copy) and (aim_peer is None or figure.to_peer is None or figure.to_peer >= aim_peer)
        colour = None if aim_peer is None and aim_copy is None else "green" if reached else "red"
        ratios = (f"{figure.to_copy:.2f}", f"{aim_copy or ''}", f"{figure.to_peer:.1f}" if figure.to_peer else "", f"{aim_peer or ''}")
        memory = f"{figure.extra_bytes / 1e6:.0f} MB"
        table.add_row(figure.name, figure.kernels, f"{figure.seconds * 1e3:.1f} ms", *ratios, memory, figure.peer.split(":")[0], style=colour)
    Console(width=150).print(table)


def plot(figures: list[Figure]) -> str:
    """SVG: a bar for each operation and kernel, as a share of the speed of a copy."""
    colours, width, left, bars = {"torch": "#8a8fa3", "numba": "#3949ab"}, 760, 220, []
    for n, figure in enumerate(figures):
        y, length = 34 + 22 * n, min(1.5, figure.to_copy) / 1.5 * (width - left - 60)
        peer = f", {figure.to_peer:.0f} × {figure.peer.split()[0]}" if figure.to_peer else ""
        label = f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{figure.name}</text>' if not n or figures[n - 1].name != figure.name else ""
        bars.append(f'{label}<rect x="{left}" y="{y}" width="{length:.0f}" height="16" fill="{colours[figure.kernels]}"/>')
        bars.append(f'<text x="{left + length + 6:.0f}" y="{y + 12}">{figure.to_copy:.2f}{peer}</text>')
    one = left + (width - left - 60) / 1.5
    bars.append(
        f'<line x1="{one:.0f}" x2="{one:.0f}" y1="24" y2="{34 + 22 * len(figures)}" stroke="#c62828"/><text x="{one:.0f}" y="18">a copy of memory</text>'
    )
    style = 'font-family="system-ui,sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 140} {50 + 22 * len(figures)}" {style}>{"".join(bars)}</svg>\n'


def main() -> None:
    arguments = argparse.ArgumentParser(description="Speed of encoding and decoding.")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--rows", type=int, default=5760)
    arguments.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: what this thread got of the processor, for a machine that is not idle")
    arguments.add_argument("--only", default="", help="operations whose names hold this")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for case in cases(given.rows):
        if given.only.lower() in case.name.lower():
            figures += measure(case, given.rows, given.rounds, CLOCKS[given.clock])
    show(figures)
    found = {"date": str(date.today()), "device": device(), "clock": given.clock, "torch": torch.__version__, "rows": given.rows, "columns": COLUMNS}
    if backend.installed():
        found["numba"] = version("numba")
    given.results.parent.mkdir(exist_ok=True)
    given.results.write_text(json.dumps({**found, "figures": [figure.as_json() for figure in figures]}, indent=2) + "\n")
    given.results.with_suffix(".svg").write_text(plot(figures))


if __name__ == "__main__":
    main()

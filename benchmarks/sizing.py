"""How long the largest models take: processor seconds and memory of one worker on a few of their experts, at real size, and what that is for all of them.

python benchmarks/sizing.py [--experts 6]: the results go to benchmarks/results/sizing.json. Processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from synthetic import write_checkpoint

import moeglot


@dataclass(frozen=True)
class Model:
    """The sizes that its config.json on the Hub says, and how its experts are stored there."""

    name: str
    encoding: str
    experts: int
    layers: int
    """That have experts; of DeepSeek-V3 without the one for multi-token prediction, which is carried over."""
    h: int
    i: int
    source: str

    @property
    def numbers(self) -> int:
        """Of all its experts."""
        return self.layers * self.experts * 3 * self.h * self.i


MODELS = (
    Model("DeepSeek-V3", "fp8-block", 256, 58, 7168, 2048, "https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json"),
    Model("Kimi-K2-Thinking", "int4:32", 384, 60, 7168, 2048, "https://huggingface.co/moonshotai/Kimi-K2-Thinking/blob/main/config.json"),
)
FORMAT = "deepseek-v3/hub"
PER_LAYER = ("power",)
"""Phases whose work does not grow with the experts of a layer."""


class Peak:
    """The most anonymous memory of this process while it watches, in bytes."""

    def __enter__(self) -> Peak:
        self.most, self.going = 0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.going:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.most = max(self.most, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
            time.sleep(0.005)

    def __exit__(self, *_: Any) -> None:
        self.going = False
        self.thread.join()


def convert(source: Path, out: Path) -> tuple[dict[str, float], int]:
    """Processor seconds of each phase, with one worker, and the peak of memory. What comes after the last phase is checksums and the rename."""
    starts: list[tuple[str, float]] = [("planning", time.process_time())]

    def tell(what: str, done: int, total: int) -> None:
        if what != starts[-1][0]:
            print(what, round(time.process_time(), 1), flush=True)
            starts.append((what, time.process_time()))
        if what == "power" and done == total:
            starts.append(("checksums", time.process_time()))

    with Peak() as peak:
        moeglot.convert(source, FORMAT, out, encode="bf16", allow_loss=True, workers=1, progress=tell)
    ends = [*(start for _, start in starts[1:]), time.process_time()]
    shutil.rmtree(out)
    seconds: dict[str, float] = {}
    for (name, start), end in zip(starts, ends, strict=True):
        seconds[name] = seconds.get(name, 0.0) + end - start
    return seconds, peak.most


def measure(model: Model, folder: Path, experts: int) -> dict[str, Any]:
    plain = write_checkpoint(folder / "plain", FORMAT, {"e": experts, "h": model.h, "i": model.i}, layers=1)
    moeglot.convert(plain, FORMAT, folder / "source", encode=model.encoding, allow_loss=True)
    source = sum(path.stat().st_size for path in (folder / "source").glob("*.safetensors"))
    seconds, peak = convert(folder / "source", folder / "out")
    shutil.rmtree(plain)
    shutil.rmtree(folder / "source")
    measured = 3 * model.h * model.i * experts
    scaled = {name: value * (model.layers if name in PER_LAYER else model.numbers / measured) for name, value in seconds.items() if name != "planning"}
    return {
        "model": model.name,
        "config": model.source,
        "encoding": model.encoding,
        "experts_measured": experts,
        "processor_seconds": seconds,
        "peak_bytes": peak,
        "output_bytes_a_processor_second": {name: 2 * measured / value for name, value in seconds.items() if name not in ("planning", *PER_LAYER) and value},
        "whole_model": {
            "numbers": model.numbers,
            "source_bytes": int(model.numbers * source / measured),
            "output_bytes": 2 * model.numbers,
            "core_minutes": {name: value / 60 for name, value in scaled.items()},
        },
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description="How long the largest models take.")
    arguments.add_argument("--experts", type=int, default=6, help="of one layer: 88 MB of output each")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "sizing.json")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm = write_checkpoint(folder / "warm", FORMAT, {"e": 2, "h": 1024, "i": 512}, layers=1)  # what is imported and compiled at the first use
        for encoding in {model.encoding for model in MODELS}:
            moeglot.convert(warm, FORMAT, folder / "coded", encode=encoding, allow_loss=True)
            convert(folder / "coded", folder / "warmed")
            shutil.rmtree(folder / "coded")
        found = [measure(model, folder, given.experts) for model in MODELS]
    device = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
    told = {"date": str(date.today()), "device": device, "torch": torch.__version__, "moeglot": moeglot.__version__, "workers": 1, "models": found}
    given.results.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()

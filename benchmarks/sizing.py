"""How long the largest models take: processor seconds and memory of one worker on a few of their experts, at real size, and what that is for all of them.

python benchmarks/sizing.py: the results go to benchmarks/results/sizing.json. Processor time, so that other work on the machine counts little.
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
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from synthetic import write_checkpoint

import moeglot
from moeglot.checks import keep_heap_small
from moeglot.conversion.stream import threads
from moeglot.conversion.work import Work


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
FEW, MORE = 1, 3
"""Experts of the two runs; what one more expert costs is the difference, without what a run costs once."""


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


def write(source: Path, folder: Path) -> tuple[float, int]:
    """Processor seconds to write all units with one worker, and the peak of memory."""
    plan, work = moeglot.plan(source, FORMAT, encode="bf16"), Work(folder / "written")
    with work.session(plan, resume=False), Peak() as peak:
        began = time.process_time()
        for _ in threads(1)(plan, work.files, plan.units, True):
            pass
        seconds = time.process_time() - began
    shutil.rmtree(work.folder)
    return seconds, peak.most


def convert(source: Path, folder: Path) -> tuple[float, int]:
    """Processor seconds of all of it, verified and certified, and the peak of memory."""
    with Peak() as peak:
        began = time.process_time()
        moeglot.convert(source, FORMAT, folder / "out", encode="bf16", allow_loss=True, workers=1)
        seconds = time.process_time() - began
    shutil.rmtree(folder / "out")
    return seconds, peak.most


def source_of(model: Model, folder: Path, experts: int) -> Path:
    plain = write_checkpoint(folder / "plain", FORMAT, {"e": experts, "h": model.h, "i": model.i}, layers=1)
    plan, out = moeglot.plan(plain, FORMAT, encode=model.encoding), folder / f"source-{experts}"
    moeglot.write_part(plan, out, "1/1", allow_loss=True, workers=1)
    work = Work(out)  # verified or not: it is random, and what is measured is reading it
    (work.files / "config.json").write_text(json.dumps(plan.config))
    work.files.rename(out)
    shutil.rmtree(work.folder)
    shutil.rmtree(plain)
    return out


def measure(model: Model, folder: Path) -> dict[str, Any]:
    few, more = (source_of(model, folder, experts) for experts in (FEW, MORE))
    one = 3 * model.h * model.i
    nbytes = [sum(path.stat().st_size for path in source.glob("*.safetensors")) for source in (few, more)]
    source_bytes = (nbytes[1] - nbytes[0]) / (MORE - FEW)
    (writing_few, _), (writing_more, peak_writing) = write(few, folder), write(more, folder)
    (all_few, _), (all_more, peak) = convert(few, folder), convert(more, folder)
    shutil.rmtree(few)
    shutil.rmtree(more)
    writing, everything = (writing_more - writing_few) / (MORE - FEW), (all_more - all_few) / (MORE - FEW)
    experts = model.layers * model.experts
    return {
        "model": model.name,
        "config": model.source,
        "from": model.encoding,
        "to": "bfloat16",
        "processor_seconds_an_expert": {"writing": writing, "verifying": everything - writing},
        "output_bytes_a_core_second": {"writing": 2 * one / writing, "verifying": 2 * one / (everything - writing), "all": 2 * one / everything},
        "peak_bytes": {"writing": peak_writing, "all": peak},
        "whole_model": {
            "experts": experts,
            "source_bytes": int(experts * source_bytes),
            "output_bytes": 2 * model.numbers,
            "core_minutes": {"writing": experts * writing / 60, "verifying": experts * (everything - writing) / 60},
        },
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description="How long the largest models take.")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "sizing.json")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    keep_heap_small()  # as the command line does
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in MODELS:
            small = source_of(replace(model, h=1024, i=512), folder, 2)  # what is imported and compiled at the first use
            convert(small, folder)
            shutil.rmtree(small)
            found.append(measure(model, folder))
            print(json.dumps(found[-1], indent=2), flush=True)
    device = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
    told = {"date": str(date.today()), "device": device, "torch": torch.__version__, "moeglot": moeglot.__version__, "workers": 1, "models": found}
    given.results.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()

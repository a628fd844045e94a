"""What a conversion may hold in memory, what it leaves behind in its caller's process, and what looking at a checkpoint may not even import."""

import compileall
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from synthetic import write_checkpoint

import moeglot
from moeglot.demo import BUNDLED
from moeglot.kernels import backend
from moeglot.planning.units import estimate

SIZES = {"e": 4, "h": 2880, "i": 2880, "q": 64, "k": 8, "d": 64, "v": 256}
LARGEST = 2 * SIZES["i"] * SIZES["h"] * 2
"""Bytes of the largest stored expert matrix: gate and up together, in BF16."""


def anonymous(pid: int) -> int:
    """Bytes of memory that no file stands behind; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def peak_of(*command: object, **environment: str) -> int:
    """The peak of anonymous memory of a conversion, in bytes."""
    whole = [sys.executable, "-m", "moeglot.cli.main", "convert", *map(str, command)]
    process, peak = subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment}), 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    return peak


@pytest.mark.parametrize("workers", [1, 2])
def test_a_conversion_stays_below_its_limit(workers, tmp_path):
    """4 × the largest expert matrix × workers + 200 MB, over the whole command: writing, verifying, certifying."""
    source = write_checkpoint(tmp_path / "source", "gpt-oss/openai", SIZES, layers=1)
    peak = peak_of(source, tmp_path / "out", "--to", "gpt-oss/transformers", "--workers", workers)
    assert 50e6 < peak < 4 * LARGEST * workers + 200e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize(("kernels", "workers"), [("torch", 2), *([("numba", 1)] if backend.installed() else [])])
def test_it_does_so_with_small_matrices_too(kernels, workers, tmp_path):
    """The matrices of Qwen3-30B. The first conversion compiles, which takes memory of its own; 10 MB are for libraries that are larger on another machine."""
    compileall.compile_dir(Path(moeglot.__file__).parent, quiet=1)  # as an installed package is: compiling takes some MB
    sizes = {"e": 8, "h": 2048, "i": 768, "q": 32, "k": 4, "d": 128, "v": 512}
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", sizes, layers=1)
    options = ["--to", "qwen3-moe/hub", "--encode", "fp8-block", "--allow-loss", "--workers", workers]
    if kernels == "numba":
        peak_of(source, tmp_path / "first", *options, MOEGLOT_KERNELS=kernels)
    peak = peak_of(source, tmp_path / "out", *options, MOEGLOT_KERNELS=kernels)
    assert 50e6 < peak < 4 * sizes["i"] * sizes["h"] * 2 * workers + 210e6, f"{peak / 1e6:.0f} MB"


def test_torch_computes_with_as_many_threads_as_before(tmp_path):
    """In threads that have not computed yet, which have the number that any thread set last."""
    found: list[int] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for work in (
            lambda: moeglot.verify(BUNDLED, BUNDLED),
            lambda: moeglot.compare(BUNDLED, BUNDLED),
            lambda: moeglot.write_part(moeglot.plan(BUNDLED, "gpt-oss/transformers"), tmp_path / "out", "1/1"),
            lambda: estimate(moeglot.plan(BUNDLED, "gpt-oss/transformers", encode="f16")),
        ):
            work()
            look()
    finally:
        torch.set_num_threads(before)
    assert found == [3, 3, 3, 3]


def test_inspect_of_fifty_thousand_tensors_reads_headers_only(tmp_path):
    """No torch, and with it none of its seconds; how long it takes is measured in benchmarks/."""
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", {"e": 128, "h": 2, "i": 2}, layers=130, shards=100)
    code = "import sys, moeglot; c = moeglot.open(sys.argv[1]); print(len(c.source.entries), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    count, torch_is_there = found.stdout.split()
    assert int(count) > 50_000
    assert torch_is_there == "False"

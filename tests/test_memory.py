"""What a conversion may hold in memory, and what looking at a checkpoint may not even import."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic import write_checkpoint

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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_conversion_stays_below_its_limit(workers, tmp_path):
    """4 × the largest expert matrix × workers + 200 MB, over the whole command: writing, verifying, certifying."""
    source = write_checkpoint(tmp_path / "source", "gpt-oss/openai", SIZES, layers=1)
    command = ["convert", source, tmp_path / "out", "--to", "gpt-oss/transformers", "--workers", workers]
    process = subprocess.Popen([sys.executable, "-m", "moeglot.cli", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    assert 50e6 < peak < 4 * LARGEST * workers + 200e6, f"{peak / 1e6:.0f} MB"


def test_inspect_of_fifty_thousand_tensors_reads_headers_only(tmp_path):
    """No torch, and with it none of its seconds; how long it takes is measured in benchmarks/."""
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", {"e": 128, "h": 2, "i": 2}, layers=130, shards=100)
    code = "import sys, moeglot; c = moeglot.open(sys.argv[1]); print(len(c.source.entries), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    count, torch_is_there = found.stdout.split()
    assert int(count) > 50_000
    assert torch_is_there == "False"

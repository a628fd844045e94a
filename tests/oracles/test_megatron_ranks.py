"""Megatron-Core on two processes: each loads the state dict that was written for it, strictly, and together they compute transformers' logits."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from safetensors.torch import load_file
from test_megatron import LIMIT, apart, hub_logits, hub_model, megatron

import moeglot

PROCESSES = 2
CASES = [
    ("gpt-oss", "h=i", "megatron"),
    ("gpt-oss", "neither", "megatron"),
    ("qwen3-moe", "h=i", "megatron"),
    ("qwen3-moe", "neither", "megatron"),
    ("deepseek-v3", "h=2i", "megatron"),
    ("qwen3-moe", "h=i", "megatron-grouped"),
    ("mixtral", "neither", "megatron-grouped"),
]
"""Family, sizes and format: SequentialMLP, or the legacy GroupedMLP."""


def states(source: Path, family: str, name: str, out: Path) -> Path:
    """A folder with the state dict of each process, named by its rank."""
    for rank in range(PROCESSES):
        certificate = moeglot.convert(source, f"{family}/{name}", out / str(rank), ep_rank=rank, ep_size=PROCESSES)
        assert certificate.report.verdict == "holds"
    return out


@pytest.mark.parametrize(("family", "size", "name"), CASES)
def test_each_process_loads_its_own(family: str, size: str, name: str, tmp_path: Path) -> None:
    source = hub_model(tmp_path / "hub", family, size)
    logits = hub_logits(source)
    out = states(source, family, name, tmp_path / "out")
    grouped = ["--grouped"] if name == "megatron-grouped" else []
    assert apart(megatron(out, *grouped, "--ranks", "0", "1", processes=PROCESSES), logits) <= LIMIT
    assert apart(megatron(out, *grouped, "--ranks", "0", "0", processes=PROCESSES), logits) > 1000 * LIMIT


def test_megatron_has_these_tensors_and_no_others(tmp_path: Path) -> None:
    """The state dict of a process as Megatron-Core itself names it: what one alone asks for, less the experts that it does not hold."""
    source = hub_model(tmp_path / "hub", "gpt-oss", "neither")
    megatron(source, "--random", "--dump", tmp_path / "dump.safetensors", processes=PROCESSES)
    own = {name: tensor.shape for name, tensor in load_file(tmp_path / "dump.safetensors").items()}
    for rank in range(PROCESSES):
        moeglot.convert(source, "gpt-oss/megatron", tmp_path / str(rank), ep_rank=rank, ep_size=PROCESSES)
        written = load_file(tmp_path / str(rank) / "model.safetensors")
        assert {name: tensor.shape for name, tensor in written.items()} == own

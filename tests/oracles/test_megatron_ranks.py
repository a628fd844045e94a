"""Megatron-Core on several processes: each loads the state dict that was written for it, strictly, and together they compute transformers' logits."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

import torch
from divisions import processes, ranks
from safetensors.torch import load_file
from test_megatron import HUB, LIMIT, VOCABULARY, apart, hub_logits, hub_model, told

import moeglot

EP, TP, PP = {"ep": 2}, {"tp": 2, "etp": 1, "ep": 1}, {"pp": 2}
BOTH, INNER = {"tp": 2, "etp": 1, "ep": 2}, {"tp": 2, "etp": 2, "ep": 1}
ALL = BOTH | PP
CASES = [
    ("gpt-oss", "h=i", "megatron", EP),
    ("gpt-oss", "h=i", "megatron", TP),
    ("gpt-oss", "h=i", "megatron", PP),
    ("gpt-oss", "neither", "megatron", BOTH),
    ("qwen3-moe", "h=i", "megatron", TP),
    ("qwen3-moe", "h=i", "megatron-grouped", EP),
    ("qwen3-moe", "neither", "megatron", INNER),
    ("qwen3-moe", "neither", "megatron", PP),
    ("deepseek-v3", "h=2i", "megatron", BOTH),
    ("deepseek-v3", "h=i", "megatron", INNER),
    ("deepseek-v3", "neither", "megatron", PP),
    ("deepseek-v3", "h=i", "megatron", ALL),
    ("mixtral", "neither", "megatron-grouped", BOTH),
    ("mixtral", "h=i", "megatron-grouped", INNER),
]
"""Family, sizes, format (SequentialMLP, or the legacy GroupedMLP), and among how many processes what is divided."""


def states(source: Path, name: str, division: dict[str, int], out: Path, **more: int) -> Path:
    """A folder with the state dict of each process, named by its number."""
    for process in range(processes(division)):
        certificate = moeglot.convert(source, name, out / str(process), **ranks(division, process), **more)
        assert certificate.report.verdict == "holds"
    return out


def run(out: Path, name: str, division: dict[str, int], *more: str) -> tuple[dict[str, torch.Tensor], list[dict[str, list[int]]]]:
    """What the model computes from these files, and from each other's, and what each process has."""
    count = processes(division)
    words = [word for kind, size in division.items() for word in (f"--{kind}", str(size))] + (["--grouped"] if name == "megatron-grouped" else [])
    own, others = ([str(n ^ flip) for n in range(count)] for flip in (0, 1))
    return told(out, *words, *more, "--ranks", *own, "--exchanged", *others, processes=count)


@pytest.mark.parametrize(("family", "size", "name", "division"), CASES)
def test_each_process_loads_its_own(family: str, size: str, name: str, division: dict[str, int], tmp_path: Path) -> None:
    """Strictly: a name or a shape that is not the model's own is an error. Given each other's files, they load none, or compute something else. Put
    together, their files are the model again.
    """
    more = {"num_hidden_layers": 4} if family == "deepseek-v3" and "pp" in division else {}
    source = hub_model(tmp_path / "hub", family, size, **more)
    logits, out = hub_logits(source), states(source, f"{family}/{name}", division, tmp_path / "out")
    found, own = run(out, name, division)
    assert apart(found["logits"], logits) <= LIMIT
    assert ("exchanged" in found) == (division != PP)  # a stage has other names
    assert "exchanged" not in found or apart(found["exchanged"], logits) > 1000 * LIMIT
    for process, shapes in enumerate(own):
        written = load_file(out / str(process) / "model.safetensors")
        assert {key: list(tensor.shape) for key, tensor in written.items()} == shapes
    moeglot.convert(out, HUB[family], tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert [key for key, tensor in before.items() if not torch.equal(tensor, after[key])] == []


def test_a_padded_vocabulary(tmp_path: Path) -> None:
    source, rows = hub_model(tmp_path / "hub", "qwen3-moe", "h=i", vocab_size=VOCABULARY + 1), VOCABULARY + 8
    out = states(source, "qwen3-moe/megatron", TP, tmp_path / "out", padded_vocab_size=rows)
    logits = run(out, "megatron", TP, "--words", str(rows))[0]["logits"]
    assert apart(logits[..., : VOCABULARY + 1], hub_logits(source)) <= LIMIT
    assert logits.shape[-1] == rows
    assert not logits[..., VOCABULARY + 1 :].any()

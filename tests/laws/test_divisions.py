"""Laws of dividing: one process gets what Megatron-Core's own rules cut out of the state dict of the whole; and all of them together are the model again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from divisions import DIVISIONS, HUB, cut, divide, model, processes, ranks
from safetensors.torch import load_file

import moeglot
from moeglot.formats import PLAIN

SIZES = {"h=i": {"e": 4, "h": 64, "i": 64}, "h=2i": {"e": 4, "h": 128, "i": 64}, "e=h=i": {"e": 32, "h": 32, "i": 32}}
FORMATS = [form.name for form in PLAIN if form.by_rank]


def possible(name: str, division: str) -> bool:
    return not (name.startswith("gpt-oss") and DIVISIONS[division].get("etp", 1) > 1)


WAYS = [(name, "all" if possible(name, "all") else "all but etp", "h=i") for name in FORMATS]
WAYS += [(f"{family}/megatron", division, "h=2i") for family in ("gpt-oss", "qwen3-moe") for division in DIVISIONS if possible(f"{family}/", division)]
WAYS += [("gpt-oss/megatron-te", "tp and ep", "e=h=i"), ("qwen3-moe/megatron-grouped", "tp and etp", "e=h=i"), ("mixtral/megatron-te", "etp", "e=h=i")]


@pytest.mark.parametrize(("name", "division", "size"), WAYS)
def test_megatron_would_cut_it_so_and_every_byte_returns(name: str, division: str, size: str, tmp_path: Path) -> None:
    family, _, short = name.partition("/")
    sizes, layers = SIZES[size], 4 if size == "h=i" else 2
    source = model(tmp_path / "hub", family, sizes, layers)
    moeglot.convert(source, name, tmp_path / "whole", workers=1)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    out = divide(source, name, DIVISIONS[division], tmp_path / "out")
    for process in range(processes(DIVISIONS[division])):
        wanted = cut(whole, short, ranks(DIVISIONS[division], process), layers, sizes["e"], 32 if short.endswith("glu32") else 0)
        written = load_file(out / f"rank{process}" / "model.safetensors")
        assert written.keys() == wanted.keys()
        assert [key for key, tensor in wanted.items() if not torch.equal(tensor, written[key])] == []
    assert moeglot.convert(out, HUB[family], tmp_path / "again", workers=1).report.verdict == "holds"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert [key for key, tensor in before.items() if not torch.equal(tensor, after[key]) or tensor.dtype != after[key].dtype] == []

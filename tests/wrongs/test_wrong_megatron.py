"""Known ways to corrupt experts on their way to Megatron, in torch_dist checkpoints that torch itself reads and writes again: `verify` names the reading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from synthetic import write_checkpoint
from torch.distributed.checkpoint import FileSystemReader, load, save

import moeglot

LIMIT = 1e-5
FC1, FC2 = (f"decoder.layers.mlp.experts.experts.linear_{name}.weight" for name in ("fc1", "fc2"))


def load_stacked(folder: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor of a torch_dist checkpoint, by torch's own reader."""
    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in described.items() if hasattr(one, "size")}
    load(found, checkpoint_id=folder, no_dist=True)
    return found


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, 2)
    return torch.cat([up, gate], 2)


def interleave(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, 2)
    return torch.stack([gate, up], 3).flatten(2, 3)


WRONGS: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "down turned": ("h=i", FC2, lambda rows: rows.mT, "linear_fc2", 'is read as "i h"'),
    "halves swapped": ("h=i", FC1, swap_halves, "linear_fc1", "up before gate"),
    "gate_up turned": ("h=2i", FC1, lambda rows: rows.mT, "linear_fc1", 'is read as "h (p i)"'),
    "left interleaved": ("h=i", FC1, interleave, "linear_fc1", 'is read as "(i p) h"'),
}


@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe"])
@pytest.mark.parametrize("wrong", WRONGS)
def test_verify_names_the_reading(family: str, wrong: str, tmp_path: Path) -> None:
    size, key, corrupt, line, reading = WRONGS[wrong]
    hub = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/hub"}[family]
    source = write_checkpoint(tmp_path / "source", hub, {"h": 64, "i": 32 if size == "h=2i" else 64})
    moeglot.convert(source, f"{family}/megatron-torch-dist", tmp_path / "right")
    tensors = load_stacked(tmp_path / "right")
    save(tensors, checkpoint_id=tmp_path / "same", no_dist=True)
    changed = corrupt(tensors[key]).contiguous()
    assert changed.shape == tensors[key].shape
    save({**tensors, key: changed}, checkpoint_id=tmp_path / "wrong", no_dist=True)
    for name in ("same", "wrong"):
        shutil.copy(source / "config.json", tmp_path / name)
    assert moeglot.verify(tmp_path / "same", source).verdict == "holds"
    report = moeglot.verify(tmp_path / "wrong", source)
    forward = next(check for check in report.checks if check.level == "forward")
    assert report.exit_status == 1
    assert forward.figures["relative_error"] > 100 * LIMIT
    assert line in forward.detail
    assert reading in forward.detail

"""Known ways to corrupt experts on their way to Megatron, in torch_dist checkpoints that torch itself reads and writes again: `verify` names the reading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reading import read_dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint
from torch.distributed.checkpoint import save

import moeglot

LIMIT = 1e-5
FC1, FC2 = (f"decoder.layers.mlp.experts.experts.linear_{name}.weight" for name in ("fc1", "fc2"))


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, 2)
    return torch.cat([up, gate], 2)


def interleave(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, 2)
    return torch.stack([gate, up], 3).flatten(2, 3)


SIZES = {"h=i": (64, 64), "h=2i": (64, 32), "neither": (96, 32)}
SOURCES = {"gpt-oss from MXFP4": "gpt-oss/openai", "gpt-oss from BF16": "gpt-oss/transformers", "qwen3-moe from BF16": "qwen3-moe/hub"}
WRONGS: dict[str, tuple[tuple[str, ...], str, Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "down turned": (("h=i",), FC2, lambda rows: rows.mT, "linear_fc2", 'is read as "i h"'),
    "halves swapped": (("h=i", "h=2i", "neither"), FC1, swap_halves, "linear_fc1", "up before gate"),
    "gate_up turned": (("h=2i",), FC1, lambda rows: rows.mT, "linear_fc1", 'is read as "h (p i)"'),
    "left interleaved": (("h=i", "h=2i", "neither"), FC1, interleave, "linear_fc1", 'is read as "(i p) h"'),
}
"""What is wrong -> at which sizes no shape shows it, the key, what was done to it, the line that `verify` names and the reading."""


@pytest.mark.parametrize("given", SOURCES)
@pytest.mark.parametrize("wrong", WRONGS)
def test_verify_names_the_reading(given: str, wrong: str, tmp_path: Path) -> None:
    """At the sizes where a shape shows it, the checkpoint is refused by the tensor's name."""
    hidden_at, key, corrupt, line, reading = WRONGS[wrong]
    for size, (h, i) in SIZES.items():
        folder = tmp_path / size
        source = write_checkpoint(folder / "source", SOURCES[given], {"h": h, "i": i})
        moeglot.convert(source, f"{SOURCES[given].partition('/')[0]}/megatron-torch-dist", folder / "right")
        tensors = read_dist(folder / "right")
        changed = corrupt(tensors[key]).contiguous()
        for name, found in {"same": tensors, "wrong": {**tensors, key: changed}}.items():
            save(found, checkpoint_id=folder / name, no_dist=True)
            shutil.copy(folder / "right" / "config.json", folder / name)
        assert moeglot.verify(folder / "same", source).verdict == "holds"
        assert (changed.shape == tensors[key].shape) == (size in hidden_at)
        if size not in hidden_at:
            with pytest.raises(moeglot.MoeglotError, match=line):
                moeglot.verify(folder / "wrong", source)
            continue
        report = moeglot.verify(folder / "wrong", source)
        forward = next(check for check in report.checks if check.level == "forward")
        assert report.exit_status == 1
        assert forward.figures["relative_error"] > 100 * LIMIT
        assert line in forward.detail
        assert reading in forward.detail


# --- state dicts: rows in blocks, and a shape that lies ----------------------------------------------------------------------------------

BLOCK = 32


def in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[2 i, ...], gate before up -> 32 rows of gate, as many of up, and so on: what `moe_mlp_glu_interleave_size = 32` means."""
    half = len(rows) // 2
    return torch.cat([rows[side + at : side + at + BLOCK] for at in range(0, half, BLOCK) for side in (0, half)])


def in_halves(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `in_blocks`."""
    return torch.cat([rows[at : at + BLOCK] for side in (0, BLOCK) for at in range(side, len(rows), 2 * BLOCK)])


def of_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    """The change in each expert's first matrix and its bias."""

    def changed(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp.experts.linear_fc1." in name]:
            tensors[name] = change(tensors[name]).contiguous()

    return changed


def by_its_shape(tensors: dict[str, torch.Tensor]) -> None:
    """The matrices beside each other, as `weight1`'s shape [h, e 2i] has one believe, and not one after the other."""
    for name in [name for name in tensors if name.endswith(".weight1")]:
        hidden, columns = tensors[name].shape
        tensors[name] = torch.cat(list(tensors[name].view(4, hidden, columns // 4)), 1)


def turned_in_memory(tensors: dict[str, torch.Tensor]) -> None:
    """[out, in], as every other format of Megatron has it."""
    for name in [name for name in tensors if name.endswith(".weight1")]:
        hidden, columns = tensors[name].shape
        tensors[name] = tensors[name].view(4, hidden, columns // 4).mT.reshape(hidden, columns)


STATES: dict[str, tuple[str, int, Callable[[dict[str, torch.Tensor]], None], str]] = {
    "halves where blocks are declared": ("megatron-te-glu32", 64, of_first(in_halves), 'linear_fc1 is read as "(p i) h"'),
    "blocks where halves are declared": ("megatron-te", 64, of_first(in_blocks), 'linear_fc1 is read as "(i p 32) h"'),
    "memory by the shape": ("megatron-grouped", 64, by_its_shape, 'weight1 is read by its shape, "h (e p i)"'),
    "memory turned": ("megatron-grouped", 32, turned_in_memory, 'weight1 is read as "e (p i) h"'),
}


@pytest.mark.parametrize(
    ("wrong", "family"), [(wrong, family) for wrong in STATES for family in ("gpt-oss", "qwen3-moe") if (wrong[:6], family) != ("memory", "gpt-oss")]
)
def test_verify_names_the_reading_of_a_state_dict(wrong: str, family: str, tmp_path: Path) -> None:
    name, inner, corrupt, reading = STATES[wrong]
    hub = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/hub"}[family]
    source = write_checkpoint(tmp_path / "source", hub, {"h": 64, "i": inner})
    moeglot.convert(source, f"{family}/{name}", tmp_path / "out")
    assert moeglot.verify(tmp_path / "out", source).verdict == "holds"
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        marks = opened.metadata()
    tensors = load_file(file)
    corrupt(tensors)
    save_file(tensors, file, marks)
    report = moeglot.verify(tmp_path / "out", source)
    forward = next(check for check in report.checks if check.level == "forward")
    assert report.exit_status == 1
    assert forward.figures["relative_error"] > 100 * LIMIT
    assert reading in forward.detail

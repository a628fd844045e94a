"""What is in the files of a checkpoint, read by other means than ours, and how far two things are apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file


def tree(folder: Path) -> dict[str, bytes]:
    """Path in a folder -> bytes, of every file that is anywhere below it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of all safetensors files of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def differing(a: Path, b: Path) -> list[str]:
    """The tensors of two folders that are not the same, bit for bit; both have the same keys."""
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    return [name for name in x if not same(x[name], y[name])]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, the sign of zero too."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def read_dist(folder: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor of a torch_dist checkpoint, by torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader, load

    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in described.items() if hasattr(one, "size")}
    load(found, checkpoint_id=folder, no_dist=True)
    return found


def written_by_torch(dist: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The same checkpoint, its tensors changed, as torch writes it."""
    from torch.distributed.checkpoint import save

    found = read_dist(dist)
    change(found)
    save(found, checkpoint_id=out, no_dist=True)
    shutil.copy(dist / "config.json", out)
    return out

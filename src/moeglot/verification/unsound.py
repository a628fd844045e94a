"""What makes the numbers of tensors that are no experts impossible: NaN and infinity, scales of quantized matrices, and parts that these lack."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.declared import dense_encoding
from moeglot.checkpoints.dense import DecodedTensor, HubTensor
from moeglot.codings.coding import said
from moeglot.encoding import Part
from moeglot.errors import BadNumbers, TensorMismatch
from moeglot.files.mapped import let_go


def unsound(checkpoint: Checkpoint) -> Iterator[str]:
    """Each fault, with the name of its tensor; reads every tensor that is no expert. What is coded in a way that we do not know has floats alone to look at.

    Raises `TensorMismatch` where the format cannot name a tensor, and `Contradiction` where copies of one differ.
    """
    parts = {key for _, names in checkpoint.matrices.values() for key in names.values()}
    for encoding, names in checkpoint.matrices.values():
        entries = {part: checkpoint.dense[key].entry for part, key in names.items()}
        try:
            DecodedTensor("", encoding, entries, "F32").exact()
        except (BadNumbers, TensorMismatch) as error:
            yield error.wrong
        let_go()
    for name, tensor in checkpoint.dense.items():
        if name in parts:
            continue
        if lacking := _lacking(checkpoint, name, tensor):
            yield f"{lacking}: missing, and {name} means nothing without it"
        elif not tensor.is_sound():
            yield f"{name} has NaN or infinite numbers"


def _could_be(part: Part, shape: tuple[int, ...]) -> bool:
    """Some matrix has such a part of this shape: routers have vectors that are called scale, too."""
    if part.shared or part.flat or part.bare:
        return True
    return prod(shape) == prod(part.trailing) if part.is_single else len(shape) == 2 + len(part.trailing)


def _lacking(checkpoint: Checkpoint, name: str, tensor: HubTensor) -> str | None:
    """The first part that codes or scales of this name, declared in config.json, do not have beside them."""
    for coding in checkpoint.codings:
        module, mine = coding.module(name) or ("", "")
        encoding = dense_encoding(said(checkpoint.source.config), coding, module, checkpoint.format.family) if module else None
        if encoding and any(part.name == mine and tensor.dtype in part.dtypes and _could_be(part, tensor.shape) for part in encoding.parts):
            beside = (module + coding.linear[part.name] for part in encoding.parts)
            return next((key for key in beside if key not in checkpoint.dense), None)
    return None

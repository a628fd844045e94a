"""Live models: `load` and `save`, which need transformers: it is imported when one of them is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checks import Progress
from moeglot.errors import UsageError
from moeglot.format import Format
from moeglot.planning.plan import SHARD_SIZE
from moeglot.verification.certificate import Certificate

if TYPE_CHECKING:
    import torch


def load(
    path: Checkpoint | str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | int | None = None,
    format: str | Format | None = None,
    *,
    native: bool = False,
    encode: str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    backend: str = "auto",
    ep_rank: int | None = None,
    ep_size: int | None = None,
    **options: Any,
) -> Any:
    """A stock transformers model that computes what the checkpoint says, from any format and encoding; evaluation mode.

    `path`: a folder, a safetensors file, a Hub id or a Checkpoint. `dtype`: float32, bfloat16 or float16; without it, the one that config.json declares.
    `device`: where the whole model goes, the CPU by default. `options` go to `from_pretrained`: `device_map`, `attn_implementation` and so on; a native
    model is divided as `device_map` and `max_memory` say, by the bytes that it holds.
    Experts are decoded one at a time, straight into the parameters, so that memory holds the model and little more.
    `native`: experts stay in memory as they are on disk, in `moeglot.nn.Experts`, and are decoded as they are used. `encode` ("mxfp4", "fp8-block", "nf4", ...)
    quantizes plain ones on the way, except in modules that `modules_to_not_convert` names; `backend` says how they compute: "auto" chooses by device and shape,
    "reference", "eager", "batched", "grouped" and "triton" are one way each.
    `ep_size`: the processes of torch.distributed divide the experts of each layer, and each reads the bytes of its own alone; the library's strategies bring
    them their tokens. All processes have one batch. `ep_rank`, if it is passed, must be this process's. Needs transformers 5.23.
    Raises `MoeglotError`: `FormatError` where nobody may say what the tensors mean, `CheckpointError` for broken tensors, `NotVerified` where transformers
    would leave a tensor out, unread or without numbers.
    """
    _require("load")
    kept = _names(modules_to_not_convert)
    if not native and (encode is not None or kept or backend != "auto"):
        raise UsageError("encode, modules_to_not_convert and backend are for native=True", "without it, experts are decoded", "pass native=True too")
    if ep_rank is not None and ep_size is None:
        raise UsageError(f"ep_rank={ep_rank} without ep_size", "a rank is one of several", "pass ep_size too; ep_rank may be left out")
    from moeglot.integrations import transformers_load, transformers_parallel

    how = transformers_load.Native(encode, kept, backend) if native else None
    share = transformers_parallel.share_of(ep_rank, ep_size) if ep_size is not None else None
    return transformers_load.load(path, dtype, device, format, options, how, share)


def save(
    model: Any,
    out: str | Path,
    *,
    to: str | Format,
    encode: str | None = None,
    allow_loss: bool = False,
    shard_size: int | str = SHARD_SIZE,
    workers: int | None = None,
    progress: Progress | None = None,
    device: str | None = None,
) -> Certificate:
    """Write a live transformers model to the folder `out` in the format named `to`, verify what lies there, and certify it as `convert` does.

    Tensors are taken from the model's `state_dict()`, not from `save_pretrained`. The tokenizer is no part of the model: save it yourself.
    Experts of a native model are the bytes that they hold now: in the format that they were loaded from they stay those, in others they are converted.
    `out`, `encode`, `allow_loss`, `shard_size`, `workers`, `progress` and `device` as in `convert`. There is no `resume`: nothing says that a model is still
    the one that an interrupted run wrote.
    Raises `MoeglotError`, as `convert` does; `UsageError` for an adapter that is not merged, and for experts that processes divide.
    """
    _require("save")
    from moeglot.integrations import transformers_save

    return transformers_save.save(model, out, to, encode, allow_loss, shard_size, workers, progress, device)


def _names(modules: Sequence[str] | None) -> tuple[str, ...]:
    """What `modules_to_not_convert` names; raises `UsageError` for what is no list of names."""
    found = () if modules is None else modules
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(name, str) and name for name in found):
        raise UsageError(f"modules_to_not_convert={modules!r}", "it is a list of names of modules", 'pass ["model.layers.0"], for example')
    return tuple(found)


def _require(verb: str) -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(f"moeglot.{verb} needs transformers", str(error), "pip install 'moeglot[transformers]'") from error

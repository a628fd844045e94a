"""Fold an adapter into a base, in any format and encoding, as one more step of a conversion's stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checks import Progress
from moeglot.conversion.convert import convert
from moeglot.conversion.stream import Engine
from moeglot.errors import UsageError
from moeglot.format import Format
from moeglot.planning.plan import SHARD_SIZE
from moeglot.verification.certificate import Certificate
from moeglot.verification.kept import THRESHOLD

if TYPE_CHECKING:
    from moeglot.adapters.adapter import Adapter


def merge(
    base: Checkpoint | str | Path,
    adapter: Adapter | str | Path,
    out: str | Path,
    *,
    to: str | Format | None = None,
    encode: str | None = None,
    round: str = "nearest",
    keep_touched: str | None = None,
    convention: str | None = None,
    format: str | Format | None = None,
    threshold: float = THRESHOLD,
    allow_loss: bool = False,
    shard_size: int | str = SHARD_SIZE,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: str | None = None,
    engine: Engine | None = None,
) -> Certificate:
    """Write `base` with the change of `adapter` to the folder `out`, say what of the change survived the encoding, verify and certify it.

    `base`: a folder, a safetensors file, a URL, a Hub id or a Checkpoint; `format` names what it is where it does not say so itself.
    `adapter`: a folder, a Hub id or an Adapter; `convention` says how its factors lie where it does not say so itself.
    `to` is a format and `encode` an encoding, by default the base's own. The sums are float32; `round` says how they get back on the encoding's grid:
    "nearest", "stochastic[:SEED]", "delta" or "gptq:FILE". The base's scales stay, but for blocks in which a sum lies beyond them. Matrices without a
    change are moved as `convert` moves them.
    `keep_touched`: in each layer, matrices that the adapter changes stay in that float type, where the target's config can say so.
    `allow_loss`, `shard_size`, `workers`, `resume`, `progress`, `device` and `engine` as in `convert`.
    Raises `LossRefused` if less than `threshold`, from 0 for any to 1 for all, of the change survives in some role, as what is there projects on it; and all
    that `open_adapter` and `convert` do.
    """
    if adapter is None:
        raise UsageError("merge without an adapter", "the adapter is what is folded in", "pass one, or call `convert`")
    return convert(
        base,
        to,
        out,
        encode=encode,
        adapter=adapter,
        round=round,
        keep_touched=keep_touched,
        convention=convention,
        format=format,
        threshold=threshold,
        allow_loss=allow_loss,
        shard_size=shard_size,
        workers=workers,
        resume=resume,
        progress=progress,
        device=device,
        engine=engine,
    )

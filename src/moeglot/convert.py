"""Carry out a plan: stream every unit from the source's bytes to the target's, then have the output verified and certified."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moeglot.adapter import Adapter
from moeglot.certificate import Certificate, certify, read_certificate, write_json
from moeglot.checkpoint import Checkpoint, open
from moeglot.checks import Progress, one_thread, return_large_buffers
from moeglot.direct import Output, no_space
from moeglot.errors import LossRefused, UsageError
from moeglot.identify import MARK
from moeglot.kept import THRESHOLD, refuse_lost
from moeglot.loss import Loss
from moeglot.plan import SHARD_SIZE, Plan, Unit
from moeglot.plan import plan as make_plan
from moeglot.shards import Piece
from moeglot.source import INDEX
from moeglot.torch_dist.writing import DistFile, finish
from moeglot.units import estimate, make
from moeglot.work import Work

if TYPE_CHECKING:
    import torch

WRITING = "writing"
"""The progress of this work is told in bytes, that of others in experts."""


def convert(
    source: Checkpoint | str | Path,
    to: str,
    out: str | Path,
    *,
    encode: str | None = None,
    adapter: Adapter | str | Path | None = None,
    round: str = "nearest",
    keep_touched: str | None = None,
    format: str | None = None,
    allow_loss: bool = False,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Write `source` to the folder `out` in the format named `to`, verify what lies there, and certify it. `adapter` and `round` as in `merge`.

    Raises `MoeglotError`: nothing that this run did not write is touched, and what is not verified keeps its temporary name.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open(source, format)
    plan = make_plan(checkpoint, to, encode=encode, adapter=adapter, round=round, keep_touched=keep_touched, shard_size=shard_size)
    return carry_out(plan, Path(out), allow_loss, workers, resume, progress)


def default_workers() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def carry_out(
    plan: Plan,
    out: Path,
    allow_loss: bool = False,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    threshold: float = THRESHOLD,
) -> Certificate:
    """Carry out a plan. `threshold`: the share of an adapter's change that must survive in each role."""
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", "a conversion needs at least one", "pass --workers 1 or more")
    return_large_buffers()
    threads = workers or default_workers()
    if not allow_loss or plan.change:
        expected = estimate(plan)
        if not allow_loss:
            _refuse_expected_loss(expected)
        refuse_lost(plan, expected.expected_survival, threshold, "measured on a few of its experts")
    work = Work(out)
    with work.session(plan, resume) as done:
        if work.renamed(plan):  # the output is complete and verified
            work.finish()
            return read_certificate(out)
        try:
            losses = _stream(plan, work, done, allow_loss, threads, progress)
            refuse_lost(plan, sum(losses.values(), Loss()).survived, threshold, f"measured on all that was written to {work.files}, which --resume finishes")
            _write_rest(plan, work.files)
            certificate = certify(plan, work.files, losses, threads, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise no_space(work.files, plan.nbytes) from error
        work.finish()
    return replace(certificate, out=out)


def _refuse_expected_loss(plan: Plan) -> None:
    if plan.lossy:
        verb = plan.lossy[0]
        raise LossRefused(
            f"to {verb} changes numbers: relative error about {plan.expected_error[verb]:.2g}",
            "measured on a few of its experts; their values do not lie on the target's grid",
            "pass --allow-loss if that is meant; the certificate will state the loss",
        )


def _stream(plan: Plan, work: Work, done: dict[str, Loss], allow_loss: bool, threads: int, progress: Progress | None) -> dict[str, Loss]:
    """Write every unit that is not on disk yet; returns what was lost, by unit."""
    files = {shard.file: Output(work.files / shard.file) for shard in plan.shards}
    places = {name: (files[shard.file], pieces) for shard in plan.shards for name, pieces in shard.pieces.items()}
    losses = dict(done)

    def run(unit: Unit) -> None:
        parts, loss = make(plan, unit)
        if loss.changed and not allow_loss:
            _refuse_loss(unit, loss)
        _write(unit, parts, places)
        loss = Loss(survived=loss.survived) if loss.survived else loss
        work.done(unit, loss)
        losses[unit.key] = loss

    try:
        pending = [unit for unit in plan.units if unit.key not in done]
        total = sum(unit.nbytes for unit in plan.units)
        _in_parallel(run, pending, threads, partial(_tell, progress, total - sum(unit.nbytes for unit in pending), total))
    finally:
        for file in files.values():
            file.close()
    return losses


def _tell(progress: Progress | None, before: int, total: int, written: int) -> None:
    if progress:
        progress(WRITING, before + written, total)


def _in_parallel(run: Callable[[Unit], None], units: list[Unit], threads: int, tell: Callable[[int], None]) -> None:
    """A few units under way at a time; the first error stops the rest."""
    with ThreadPoolExecutor(threads, initializer=one_thread) as pool:
        waiting, under_way, finished = iter(units), dict[Future[None], Unit](), 0
        try:
            while True:
                while len(under_way) < 2 * threads and (unit := next(waiting, None)):
                    under_way[pool.submit(run, unit)] = unit
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    future.result()
                    finished += under_way.pop(future).nbytes
                tell(finished)
        finally:
            for future in under_way:
                future.cancel()


def _refuse_loss(unit: Unit, loss: Loss) -> None:
    place = f"layer {unit.step.layer}, expert {unit.expert}" if unit.step else unit.key.removesuffix("|dense")
    raise LossRefused(
        f"{place}: to {unit.verb} changes {loss.changed} of {loss.values} values",
        f"relative error {loss.relative:.2g}; what was sampled while planning lost nothing, this does",
        "pass --resume --allow-loss if that is meant; the certificate will state the loss",
    )


def _write(unit: Unit, parts: Mapping[str, torch.Tensor], places: Mapping[str, tuple[Output, tuple[Piece, ...]]]) -> None:
    if unit.step is None:
        file, pieces = places[unit.key.removesuffix("|dense")]
        file.put(parts["value"], pieces)
        return
    line = unit.step.line
    for part in unit.step.target.parts:
        tensor = parts[part.name]
        file, pieces = places[line.key_of(part, unit.step.layer, unit.expert)]
        file.put(tensor, pieces, 0 if line.per_expert or part.shared else unit.expert * tensor.numel() * tensor.element_size())


def _write_rest(plan: Plan, folder: Path) -> None:
    """config.json, the index, and the files that are carried over."""
    write_json(folder / "config.json", plan.config)
    if plan.target.container:
        finish(folder, tuple(shard for shard in plan.shards if isinstance(shard, DistFile)))
    elif len(plan.shards) > 1:
        weight_map = {slot.name: shard.file for shard in plan.shards for slot in shard.slots}
        total = sum(slot.nbytes for shard in plan.shards for slot in shard.slots)
        write_json(folder / INDEX, {"metadata": {"total_size": total, MARK: plan.target.name}, "weight_map": dict(sorted(weight_map.items()))})
    for path in plan.others:
        shutil.copyfile(path, folder / path.name)

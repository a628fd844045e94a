"""Carry out units: the bytes of each into their places in the output's files, by threads of this process or wherever an engine runs them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moeglot.checks import Progress, workers_of_one_thread
from moeglot.errors import LossRefused
from moeglot.files.direct import Output
from moeglot.files.direct import flush as sync
from moeglot.planning.loss import Loss
from moeglot.planning.plan import Plan
from moeglot.planning.steps import DenseUnit, Unit
from moeglot.planning.units import make

if TYPE_CHECKING:
    import torch

WRITING = "writing"
"""The progress of this work is told in bytes, that of others in experts."""

OPEN = 64
"""Files of an output that are open at a time, beside those that are being written to."""

Engine = Callable[[Plan, Any, Sequence[Unit], bool], Iterator[tuple[Unit, Loss]]]
"""(plan, folder of the output's files, units, whether numbers may change) -> each unit once it is on disk, in any order, with what was lost."""


class Journal(Protocol):
    """What is told of a unit that is on disk, and where the output's files are."""

    files: Any

    def done(self, unit: Unit, loss: Loss) -> None: ...


class Files:
    """The output's files, each opened when it is written to, and few at a time: a process may have no more than so many, and a large model is cut into more."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.folder = folder
        self.places = {name: (shard.file, pieces) for shard in plan.shards for name, pieces in shard.pieces.items()}
        self._open: dict[str, Output] = {}
        self._used = Counter[str]()
        self._closed = set[str]()
        self._lock = threading.Lock()

    def write(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> None:
        """The tensors of a unit, each to its place."""
        if isinstance(unit, DenseUnit):
            self._put(unit.name, parts["value"])
            return
        for part, name in zip(unit.step.target.parts, unit.outputs, strict=True):
            tensor = parts[part.name]
            first = 0 if unit.step.line.per_expert or part.shared else unit.expert * tensor.numel() * tensor.element_size()
            self._put(name, tensor, first)

    def _put(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        file, pieces = self.places[name]
        with self._opened(file) as output:
            output.put(tensor, pieces, first)

    @contextmanager
    def _opened(self, file: str) -> Iterator[Output]:
        """A file that stays open meanwhile; those that wait longest for the next unit are closed for it."""
        with self._lock:
            self._open[file] = found = self._open.pop(file, None) or Output(self.folder / file)
            self._used[file] += 1
            if len(self._open) > OPEN:
                idle = next((one for one in self._open if not self._used[one]), None)
                if idle:
                    self._open.pop(idle).close()
                    self._closed.add(idle)
        try:
            yield found
        finally:
            with self._lock:
                self._used[file] -= 1

    def close(self, flush: bool = False) -> None:
        """`flush`: what was written is on the disk when this returns, and not only on its way."""
        for file in self._open.values():
            file.close(flush)
        for name in self._closed - self._open.keys() if flush else ():
            sync(self.folder / name)


def carry_out_unit(plan: Plan, unit: Unit, files: Files, allow_loss: bool) -> Loss:
    """Make a unit and write it; doing it again writes the same bytes to the same places. Raises `LossRefused`."""
    parts, loss = make(plan, unit)
    if loss.changed and not allow_loss:
        _refuse_loss(unit, loss)
    files.write(unit, parts)
    return Loss(survived=loss.survived) if loss.survived else loss


def threads(count: int, device: str | None = None) -> Engine:
    """A few units under way at a time, on threads of this process; the first error stops the rest. `device`: where codes are decoded."""

    def engine(plan: Plan, folder: Path, units: Sequence[Unit], allow_loss: bool) -> Iterator[tuple[Unit, Loss]]:
        from concurrent.futures import FIRST_COMPLETED, Future, wait

        from moeglot.kernels import backend

        files = Files(plan, folder)
        waiting, under_way = iter(units), dict[Future[Loss], Unit]()
        with backend.on(device), workers_of_one_thread(count) as pool:
            try:
                while True:
                    while len(under_way) < 2 * count and (unit := next(waiting, None)):
                        under_way[pool.submit(carry_out_unit, plan, unit, files, allow_loss)] = unit
                    if not under_way:
                        return
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        yield under_way.pop(future), future.result()
            finally:
                for future in under_way:
                    future.cancel()
                pool.shutdown()
                files.close()

    return engine


def stream(
    plan: Plan, work: Journal, done: Mapping[str, Loss], units: Sequence[Unit], engine: Engine, allow_loss: bool, progress: Progress | None
) -> dict[str, Loss]:
    """Carry out those of `units` that are not on disk yet, and note each in the journal; returns what was lost, by unit."""
    losses = dict(done)
    pending = [unit for unit in units if unit.key not in done]
    total = sum(unit.nbytes for unit in units)
    written = total - sum(unit.nbytes for unit in pending)
    for unit, loss in engine(plan, work.files, pending, allow_loss):
        work.done(unit, loss)
        losses[unit.key] = loss
        written += unit.nbytes
        if progress:
            progress(WRITING, written, total)
    return losses


def _refuse_loss(unit: Unit, loss: Loss) -> None:
    raise LossRefused(
        f"{unit.place}: to {unit.verb} changes {loss.changed} of {loss.values} values",
        f"relative error {loss.relative:.2g}; what was sampled while planning lost nothing, this does",
        "pass --resume --allow-loss if that is meant; the certificate will state the loss",
    )

"""How a plan is carried out: what may be lost, by how many threads, where it computes, and whether an interrupted run goes on. No byte depends on it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moeglot.checks import check_workers
from moeglot.conversion.stream import Engine
from moeglot.errors import UsageError
from moeglot.verification.kept import THRESHOLD


@dataclass(frozen=True)
class Carrying:
    """The options of a run. Raises `UsageError` for what cannot be meant."""

    allow_loss: bool = False
    workers: int | None = None
    """Threads; by default as many as `default_workers` says."""
    resume: bool = False
    threshold: float = THRESHOLD
    """The share of an adapter's change that must survive in each role."""
    device: str | None = None
    """Where MXFP4 and FP8 are decoded."""
    engine: Engine | None = None
    """What runs the units, by default threads."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_workers(self.workers)
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold <= 1:  # nothing is less than NaN
            raise UsageError(f"threshold = {self.threshold!r}", "it is the share of a change that must survive", "pass a number from 0 to 1")
        if self.engine and not callable(self.engine):
            do = "pass moeglot.integrations.ray.engine(), or none"
            raise UsageError(f"{self.engine!r} is no engine", "an engine carries out the units of a plan", do)
        if self.engine and self.device:
            raise UsageError(f"device {self.device}", "the engine decides where its tasks compute", "leave out one of the two")

    @property
    def count(self) -> int:
        """How many threads work."""
        return default_workers() if self.workers is None else self.workers


def default_workers() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


AS_USUAL = Carrying()

"""What a report is made of: checks with a verdict each; and how every expert of a checkpoint is visited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.errors import UsageError
from moeglot.files.mapped import let_go

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

FILES = 1 << 16
"""Open files that are asked for, where the system lets us have more than the usual 1024."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h

Level = Literal["structure", "values", "forward"]
Verdict = Literal["holds", "does not hold", "cannot tell"]
Progress = Callable[[str, int, int], None]
"""(what, done, of how many)."""


@dataclass(frozen=True)
class Check:
    """One line of a report. `layers`: the worst figure of each layer, for the plot."""

    level: Level
    verdict: Verdict
    what: str
    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What was checked against what. `exit_status`: 0 holds, 1 does not hold, 2 cannot tell."""

    subject: str
    against: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        verdicts = {check.verdict for check in self.checks}
        return "does not hold" if "does not hold" in verdicts else "cannot tell" if "cannot tell" in verdicts else "holds"

    @property
    def exit_status(self) -> int:
        return {"holds": 0, "does not hold": 1, "cannot tell": 2}[self.verdict]


def each_expert(
    checkpoint: Checkpoint,
    work: Callable[[int, int], Any],
    what: str,
    workers: int,
    progress: Progress | None,
    sample: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Any]:
    """`work(layer, expert)` for each expert, or for those of a sample, in order, on threads, a few at a time."""
    places = sample or [(layer, expert) for layer in checkpoint.layers for expert in range(checkpoint.sizes["e"])]

    def run(layer: int, expert: int) -> Any:
        try:
            return work(layer, expert)
        finally:
            let_go()

    with workers_of_one_thread(workers) as pool:
        window = [pool.submit(run, *place) for place in places[: 2 * workers]]
        for n in range(len(places)):
            result = window.pop(0).result()
            if n + 2 * workers < len(places):
                window.append(pool.submit(run, *places[n + 2 * workers]))
            if progress:
                progress(what, n + 1, len(places))
            yield result


@contextmanager
def workers_of_one_thread(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads under which torch starts none of its own, which would only fight for the same cores; afterwards the caller has as many as before.

    What one thread sets is torch's number for every thread that has not computed yet: the caller's next ones, and the caller's own.
    """
    from concurrent.futures import ThreadPoolExecutor

    import torch

    check_workers(count)
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=one_thread) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def check_workers(count: int) -> None:
    """Raises `UsageError` for a number of threads that is none."""
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"{count!r} workers", "at least one thread works, and an int says how many", "pass --workers 1 or more")


def one_thread() -> None:
    """For a worker of ours, or a process that is one."""
    import torch

    torch.set_num_threads(1)


def allow_many_files() -> None:
    """Have this process open as many files as the system lets it, which is more than shells ask for: a map of each shard counts as one. For processes of ours
    alone.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def keep_heap_small() -> None:
    """Have glibc give every freed buffer of 2 MB or more back to the system, and start no heap for each thread: for good, so for processes of ours alone.

    Its own threshold rises to 32 MB, and the heap then fills with holes; so does each of several heaps, and what one thread freed is no use to another.
    Some MB at the end of the heap stay, or the next run of rows would have them cleared again.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2 << 20)
        mallopt(M_TRIM_THRESHOLD, 8 << 20)
        mallopt(M_ARENA_MAX, 1)

"""Work on rows shared out among the threads that torch computes with: kernels that hold no GIL run side by side, and no row's sum depends on how many.

Threads of our own would take turns with torch's on the same cores, since those spin for a while after each operation. So it is torch's OpenMP that runs
the work, where it is called as GCC calls it: https://gcc.gnu.org/onlinedocs/libgomp/The-libgomp-ABI.html. Elsewhere, a pool does.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

WORTH = 1 << 19
"""Weights of a thread, below which handing them over costs as much as it saves."""
SHARE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

Work = Callable[[], object]


class _Team(NamedTuple):
    """OpenMP's functions: `run` calls a function on each thread of a team; the others say which of them asks, and how many there are."""

    run: Any
    number: Callable[[], int]
    size: Callable[[], int]


def shares(numbers: int) -> int:
    """Among how many threads the work on so many weights is shared out."""
    return max(1, min(torch.get_num_threads(), numbers // WORTH))


def together(works: Sequence[Work]) -> None:
    """Calls them all, the first on this thread; raises what one of them raises."""
    if len(works) == 1:
        works[0]()
    elif team := _team():
        _by_openmp(works, team)
    else:
        _by_pool(works)


def _by_openmp(works: Sequence[Work], team: _Team) -> None:
    raised: list[BaseException] = []

    def share(_: object) -> None:
        try:
            for n in range(team.number(), len(works), team.size()):  # more threads than works, or fewer: within another team, one
                works[n]()
        except BaseException as error:  # nothing is raised through C; it is, on the thread that waits
            raised.append(error)

    team.run(SHARE(share), None, 0, 0)  # 0: all of torch's, since libgomp ends the threads that a smaller team leaves over
    if raised:
        raise raised[0]


def _by_pool(works: Sequence[Work]) -> None:
    others = [_pool(os.getpid()).submit(work) for work in works[1:]]
    works[0]()
    for other in others:
        other.result()


@cache
def _team() -> _Team | None:
    """Of the OpenMP that torch was linked with; a library's names are looked up in those that it needs, too."""
    try:
        library = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        run, asked = ctypes.CDLL(library).GOMP_parallel, ctypes.PyDLL(library)
        number, size = asked.omp_get_thread_num, asked.omp_get_num_threads
    except (OSError, AttributeError):
        return None
    run.restype, run.argtypes = None, (SHARE, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return _Team(run, number, size)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: a fork has none of the threads."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "moeglot")

"""Work on rows shared out among as many threads as torch computes with: kernels that hold no GIL run side by side, and no row's sum depends on how many."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

WORTH = 1 << 19
"""Weights of a thread, below which handing them over costs as much as it saves."""


def shares(numbers: int) -> int:
    """Among how many threads the work on so many weights is shared out."""
    return max(1, min(torch.get_num_threads(), numbers // WORTH))


def together(works: Sequence[Callable[[], object]]) -> None:
    """Calls them all, the first on this thread; raises what one of them raises."""
    others = [_pool(os.getpid()).submit(work) for work in works[1:]]
    works[0]()
    for other in others:
        other.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: a fork has none of the threads."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "moeglot")

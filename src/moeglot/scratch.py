"""Memory that is used again: page-aligned buffers of a thread, each free once no tensor lies in it, so that a large result costs no new pages.

New memory costs more than decoding into it: the kernel clears every page at its first touch. A buffer is handed out as a tensor over an anonymous map;
that the map is free is told by its reference count, so that nobody has to give anything back.
"""

from __future__ import annotations

import mmap
import sys
import threading
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMALL = 1 << 20
"""Bytes below which the allocator's own memory is as good."""
ALIGNED = 1 << 21
"""Sizes are whole huge pages."""
KEPT = 16 << 20
"""Bytes of free buffers that a thread keeps when it takes a new one, the last used ones."""

_of_thread = threading.local()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose numbers are whatever was there before; large ones start at a page, in memory that this thread has used before if there is some."""
    import torch

    nbytes = prod(shape) * dtype.itemsize
    if nbytes < SMALL:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_buffer(nbytes), dtype=dtype, count=prod(shape)).view(shape)


def _buffer(nbytes: int) -> mmap.mmap:
    """The smallest free buffer that is large enough and not much larger, or a new one."""
    buffers: list[mmap.mmap] = _of_thread.__dict__.setdefault("buffers", [])
    free = [n for n in range(len(buffers)) if sys.getrefcount(buffers[n]) == _REFERENCES]
    fits = [n for n in free if nbytes <= len(buffers[n]) <= nbytes + nbytes // 4 + ALIGNED]
    if fits:
        found = buffers.pop(min(fits, key=lambda n: len(buffers[n])))
    else:
        kept = 0
        for n in reversed(free):
            kept += len(buffers[n])
            if kept > KEPT:
                del buffers[n]
        found = _new(-(-nbytes // ALIGNED) * ALIGNED)
    buffers.append(found)
    return found


def _new(nbytes: int) -> mmap.mmap:
    """Private where the system knows the difference: what is shared is no huge pages, and is counted apart."""
    found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if hasattr(mmap, "MAP_PRIVATE") else mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


def _references() -> int:
    """What `sys.getrefcount` says of an element of a list that nothing else refers to."""
    probe = [mmap.mmap(-1, 1)]
    return sys.getrefcount(probe[0])


_REFERENCES = _references()

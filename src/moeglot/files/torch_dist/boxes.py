"""Blocks of a tensor: which two have a place in common, found by cutting between them and not by comparing each with each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple


class Box(NamedTuple):
    """Along each axis, where it begins and where it ends."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]


def overlapping(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Two of the boxes that share a place, or None.

    A cut that goes through no box divides them, along one axis after the other, so that a grid falls into single boxes; what no cut divides is compared pair
    by pair.
    """
    held = [box for box in boxes if all(start < stop for start, stop in zip(*box, strict=True))]
    axes = len(held[0].starts) if held else 0
    left = [(held, 0, 0)]
    while left:
        group, axis, tried = left.pop()
        if len(group) < 2:
            continue
        if tried == axes:
            if found := next((pair for pair in combinations(group, 2) if _meet(*pair)), None):
                return found
            continue
        pieces = _cut(group, axis)
        left += [(piece, (axis + 1) % axes, tried + 1 if len(pieces) == 1 else 1) for piece in pieces]
    return None


def _cut(group: list[Box], axis: int) -> list[list[Box]]:
    """The boxes between two cuts across an axis, wherever one goes through no box."""
    pieces, end = list[list[Box]](), 0
    for box in sorted(group, key=lambda box: box.starts[axis]):
        if not pieces or box.starts[axis] >= end:
            pieces.append([])
        pieces[-1].append(box)
        end = max(end, box.stops[axis])
    return pieces


def _meet(one: Box, other: Box) -> bool:
    return all(a < d and c < b for a, b, c, d in zip(one.starts, one.stops, other.starts, other.stops, strict=True))

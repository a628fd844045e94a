"""What a string of axes says: which letters share an axis and in which order, and how many rows of gate and up take turns; and moving axes by it.

`"e (i p) h"`: experts first, then rows in which gate and up alternate, then the hidden axis. A number says that rows alternate in blocks: `"(i p 32) h"`
is 32 rows of gate, 32 of up, the next 32 of gate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from typing import TYPE_CHECKING

from moeglot.encoded import Encoded

if TYPE_CHECKING:
    import torch

Group = tuple[str, ...]
Groups = tuple[Group, ...]


@cache
def parse_axes(axes: str) -> Groups:
    """`"e (i p) h"` -> `(("e",), ("i", "p"), ("h",))`."""
    return tuple(tuple(token.strip("()").split()) for token in re.findall(r"\([^()]*\)|\S+", axes))


def written(groups: Groups) -> str:
    """The inverse of `parse_axes`."""
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


def letters(groups: Groups) -> list[str]:
    """Every letter, without the numbers."""
    return [letter for group in groups for letter in group if letter.isalpha()]


def block(groups: Groups) -> int:
    """How many rows of gate stand before as many of up; 0 if they do not take turns in blocks."""
    return next((int(number) for group in groups for number in group if number.isdecimal()), 0)


def arrangements(*starts: Groups) -> Iterator[Groups]:
    """Every order of the axes and, within each, of its letters; also without blocks, where there are some."""
    return iter(dict.fromkeys(found for groups in starts for axes in permutations(groups) for found in product(*(_orders(group) for group in axes))))


def _orders(group: Group) -> list[Group]:
    plain = [*permutations(letters((group,)))]
    return [group, *plain] if group[-1].isdecimal() else plain


def halves(groups: Groups, rows: int) -> Groups:
    """The groups where a projection has so many rows: one block of all of them is no block."""
    return tuple(("p", group[0]) if group[-1] == str(rows) else group for group in groups)


def taken_apart(tensor: torch.Tensor, groups: Groups, role: str, count: int, last: bool = False, joint: bool = False) -> torch.Tensor:
    """A tensor along `groups` -> [p, ...], each of the `count` projections along the letters of a role; other axes follow, or with `last` come before.

    A view, unless rows take turns in blocks. What is `joint` is each one's.
    """
    from einops import rearrange

    if joint:
        return tensor.expand(count, *tensor.shape)
    if count == 1:
        return rearrange(tensor, f"{_einops(groups)} ... -> {role} ...").unsqueeze(0)
    return rearrange(tensor, f"{_around(_einops(groups), last)} -> p {_around(_cut(role, groups), last)}", p=count, **_lengths(groups))


def put_together(projections: list[torch.Tensor], groups: Groups, role: str, last: bool = False) -> torch.Tensor:
    """The inverse of `taken_apart`, for several projections."""
    import torch
    from einops import rearrange

    return rearrange(torch.stack(projections), f"p {_around(_cut(role, groups), last)} -> {_around(_einops(groups), last)}", **_lengths(groups))


def exchanged(matrix: Encoded) -> Encoded:
    """A matrix of one orientation as one of the other, as views."""
    parts = {name: part.mT for name, part in matrix.parts.items()}
    return Encoded(matrix.encoding.turned or matrix.encoding, parts, matrix.shape[::-1])


def relaid(tensor: torch.Tensor, groups: Groups, into: Groups, **lengths: int) -> torch.Tensor:
    """What lies along `groups`, as a view along others; `lengths`: of the letters that share an axis."""
    from einops import rearrange

    return rearrange(tensor, f"{written(groups)} -> {written(into)}", **lengths)


def _around(axes: str, last: bool) -> str:
    return f"... {axes}" if last else f"{axes} ..."


def _einops(groups: Groups) -> str:
    """`(("i", "p", "32"), ("h",))` -> `"(i p block) h"`."""
    return written(tuple(tuple("block" if letter.isdecimal() else letter for letter in group) for group in groups))


def _cut(role: str, groups: Groups) -> str:
    """The letters of a role, the one that lies in blocks as two: `"i h"` -> `"(i block) h"`."""
    cut = next((group[0] for group in groups if group[-1].isdecimal()), None)
    return " ".join(f"({letter} block)" if letter == cut else letter for letter in role.split())


def _lengths(groups: Groups) -> dict[str, int]:
    return {"block": rows} if (rows := block(groups)) else {}

"""What the tensors of an unknown family look like: names with their numbers taken out, dtypes, shapes and counts; no meaning is read into them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moeglot.files.shards import Entry
from moeglot.files.source import Source

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Row:
    """All tensors of one name but for its numbers: `{}` stands for each number, `ranges` says from where to where it runs."""

    template: str
    ranges: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tensors: int
    nbytes: int


def outline(source: Source) -> tuple[Row, ...]:
    """Every template of names, those with most bytes first."""
    found: dict[str, list[Entry]] = {}
    for key, entry in source.entries.items():
        found.setdefault(NUMBER.sub("{}", key), []).append(entry)
    return tuple(sorted((_row(template, entries) for template, entries in found.items()), key=lambda row: -row.nbytes))


def _row(template: str, entries: Iterable[Entry]) -> Row:
    entries = list(entries)
    numbers = [[int(n) for n in NUMBER.findall(entry.name)] for entry in entries]
    ranges = tuple((min(column), max(column)) for column in zip(*numbers, strict=True))
    dtypes, shapes = dict.fromkeys(entry.dtype for entry in entries), dict.fromkeys(entry.shape for entry in entries)
    return Row(template, ranges, tuple(dtypes), tuple(shapes), len(entries), sum(entry.nbytes for entry in entries))

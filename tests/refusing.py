"""What a refusal is to look like: its kind, and three lines with their words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moeglot import (
    MoeglotError,
)

Words = str | tuple[str, ...]


@contextmanager
def refused(kind: type[MoeglotError], wrong: Words = (), known: Words = (), do: Words = ()) -> Iterator[None]:
    """The block raises exactly `kind`, in exactly three lines, each with its words, and with nothing that could move a terminal's cursor."""
    with pytest.raises(MoeglotError) as caught:
        yield
    text = str(caught.value)
    assert type(caught.value) is kind, text
    lines = text.split("\n")
    assert len(lines) == 3, text
    assert all(line.isprintable() and line.strip() for line in lines), text
    assert all(line.startswith("  ") for line in lines[1:]), text
    for line, words in zip(lines, (wrong, known, do), strict=True):
        for word in (words,) if isinstance(words, str) else words:
            assert word in line, f"{word!r} is not in {line!r}"

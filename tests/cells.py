"""Which cells of a matrix are tried: the square ones, and a few of the others that go round; all with MOEGLOT_EVERY_CELL=1, which takes hours."""

import os

EVERY = bool(os.environ.get("MOEGLOT_EVERY_CELL"))


def tried(turn: int, size: int) -> bool:
    """Of three sizes, in this turn: the first always, and one of the two others every third time."""
    return EVERY or size == 0 or turn % 6 == 3 * size - 3

"""Which cells of a matrix of families, encodings and sizes are tried: the square ones, and a few others; every size with MOEGLOT_EVERY_CELL=1."""

import os

EVERY = bool(os.environ.get("MOEGLOT_EVERY_CELL"))


def tried(turn: int, size: int) -> bool:
    """Of three sizes, in this turn: the first always, and one of the two others every third time."""
    return EVERY or size == 0 or turn % 6 == 3 * size - 3

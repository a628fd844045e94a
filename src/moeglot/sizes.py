"""Sizes in bytes as people write them: "5GB" as a number, in powers of 1000, and a number as "5.0 GB"."""

from __future__ import annotations

import re

from moeglot.errors import UsageError


def size(nbytes: float) -> str:
    """1536 -> "1.5 kB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def parse_size(size: int | str) -> int:
    """`"5GB"` -> 5_000_000_000; a number of bytes is itself. Raises `UsageError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)i?B?", str(size).strip())
    if not found or not float(found[1]):
        raise UsageError(f"{size!r} is no size", "a size is a number and kB, MB, GB or TB", "for example --shard-size 5GB")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))

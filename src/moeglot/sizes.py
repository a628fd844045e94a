"""Sizes in bytes as people write them: "5GB" as a number, in powers of 1000, "5GiB" in those of 1024, and a number as "5.0 GB"."""

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
    """`"5GB"` -> 5_000_000_000, `"5GiB"` -> 5_368_709_120; a number of bytes is itself. Raises `UsageError`."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*(?:([kKMGT])(i?))?B?", str(size).strip())
    nbytes = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index((found[2] or " ").upper())) if found else 0
    if nbytes < 1 or isinstance(size, float):
        raise UsageError(f"{size!r} is no size", "a size is a number and kB, MB, GB or TB, or kiB, MiB, GiB or TiB", "for example --shard-size 5GB")
    return nbytes

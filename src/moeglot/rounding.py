"""Which way a changed matrix gets back onto the grid of its encoding: the names that `--round` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeglot.errors import UsageError


@dataclass(frozen=True)
class Rounding:
    """`kind`; the seed of `stochastic`; the file of second moments of `gptq`."""

    kind: str = "nearest"
    seed: int = 0
    moments: str | None = None

    @classmethod
    def by_name(cls, name: str) -> Rounding:
        """`"nearest"`, `"stochastic"`, `"stochastic:7"`, `"delta"`, `"gptq:FILE"`; raises `UsageError`."""
        kind, _, rest = str(name).partition(":")
        if kind == "stochastic" and (not rest or rest.isdecimal()):
            return cls(kind, int(rest or 0))
        if kind == "gptq" and rest:
            if not Path(rest).is_file():
                raise UsageError(f"{rest}: no such file", "gptq needs the second moments of the experts' inputs", "`moeglot moments BASE TEXT -o FILE`")
            return cls(kind, moments=rest)
        if kind in ("nearest", "delta") and not rest:
            return cls(kind)
        raise UsageError(f"{name!r} is no rounding", "known: nearest, stochastic[:SEED], delta, gptq:FILE", "pass --round one of these")

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}" if self.kind == "stochastic" else self.kind

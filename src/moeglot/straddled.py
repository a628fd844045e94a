"""Roles of a slice whose blocks straddle the cut between them: each is decoded to float32 when it is asked for, some rows of blocks at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moeglot.encoded import Encoded
from moeglot.floats import values
from moeglot.layout import Stored

NUMBERS = 1 << 20
"""How many are decoded at a time."""


class Straddled(Mapping[str, Encoded]):
    """role -> float32 [out, in] of one expert's slice, anew each time: a caller that needs one role after the other never holds both."""

    def __init__(self, line: Stored, stored: Encoded) -> None:
        self._line, self._stored = line, stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._line.roles)

    def __len__(self) -> int:
        return len(self._line.roles)

    def __getitem__(self, role: str) -> Encoded:
        import torch

        if role not in self._line.roles:
            raise KeyError(role)
        if self._stored.is_flat:
            return self._line.split(values(self._stored.decode(torch.float32)))[role]
        rows, columns = self._stored.shape
        place = self._line.split(values(torch.empty(rows, columns, device="meta", dtype=torch.float32)))[role].parts["value"]
        upright = self._line.upright
        every, beside = (place.stride(0), place.stride(1)) if upright else (place.stride(1), place.stride(0))
        every, (first, left) = every // columns, divmod(int(place.storage_offset()), columns)
        found = torch.empty(place.shape, dtype=torch.float32, device="cpu")
        into, begin = found if upright else found.mT, 0
        for block in self._stored.row_blocks(NUMBERS):
            end = begin + block.shape[0]
            low, high = (min(len(into), max(0, -(-(n - first) // every))) for n in (begin, end))
            if low < high:
                numbers = block.decode(torch.float32)[first + low * every - begin :: every, left::beside]
                into[low:high] = numbers[: high - low, : into.shape[1]]
            begin = end
        return values(found)

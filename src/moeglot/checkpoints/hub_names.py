"""Which rows of a stored tensor that is no expert are which tensor of the Hub, as its format's lines, config.json and the mark of a process say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moeglot.checkpoints.dense import HubTensor
from moeglot.errors import TensorMismatch
from moeglot.family import Config, dig
from moeglot.files.shards import Entry
from moeglot.format import HEAD_DIM, Dense, Format
from moeglot.layout import Sizes
from moeglot.share import SHARE, Share

CHECK = "check config.json against the producer's"


@dataclass(frozen=True)
class HubNames:
    """The names that a format's tensors have on the Hub. `share`: whose tensors these are, if not all; `known`: second line of an error."""

    format: Format
    sizes: Sizes
    config: Config
    share: Share | None
    known: str

    def tensors(self, key: str, entry: Entry) -> Iterator[HubTensor]:
        """What a stored tensor is on the Hub; raises `TensorMismatch` for one that the format cannot name, or whose rows are not those it should have."""
        named = self.format.dense_line(key)
        if not named and (self.format.config.only or self.format.closed):
            raise TensorMismatch(
                f"{key}: {self.format.name} has no such tensor", f"its names are listed by {self.format.source}", "pass --format if the format is another"
            )
        if not named:
            yield HubTensor(key, entry, 0, None)
            return
        line, numbers = named
        if said := line.contradicted(self.config, entry.shape):
            raise TensorMismatch(f"{key}: {list(entry.shape)}, and config.json says {said}", self.known, self._check)
        yield from self._cut(line, numbers, entry)

    @property
    def _check(self) -> str:
        """What to do where a tensor has too few rows."""
        return CHECK + (f"; what one process holds is read where the safetensors header says {SHARE}" if self.format.by_rank and not self.share else "")

    @property
    def _tp(self) -> int:
        return self.share.tp.size if self.share else 1

    def _cut(self, line: Dense, numbers: Mapping[str, str], entry: Entry) -> Iterator[HubTensor]:
        if len(line.hub) == 1:
            yield HubTensor(line.hub[0].format(**numbers), entry, 0, self._meant(line, entry))
            return
        if line.heads:
            yield from self._cut_in_groups(line, numbers, entry)
            return
        counts = line.row_counts(self.sizes, self.config, self._tp)
        if entry.shape[:1] != (sum(counts),):
            wrong = f"{entry.name}: {list(entry.shape)}, its rows should be {' + '.join(map(str, counts))}"
            raise TensorMismatch(wrong, self.known, self._check)
        first = 0
        for name, rows in zip(line.hub, counts, strict=True):
            yield HubTensor(name.format(**numbers), entry, first, rows)
            first += rows

    def _meant(self, line: Dense, entry: Entry) -> int | None:
        """How many rows are not padding; None for all."""
        rows = dig(self.config, line.padded) if line.padded else None
        if rows is None:
            return None
        if self.share and isinstance(rows, int) and (self.share.words or self._tp > 1):
            here = self.share.padded_words(rows)
            if entry.shape[:1] != (len(here),):
                wrong, said = f"{entry.name}: {list(entry.shape)}, it should have {len(here)} rows", f"config.json says {line.padded} = {rows}"
                raise TensorMismatch(wrong, f"{said}; {self.known}", CHECK)
            return max(0, min(rows, here.stop) - here.start)
        if entry.shape[:1] == (rows,):
            return None
        if not isinstance(rows, int) or not entry.shape or not 0 < rows < entry.shape[0]:
            wrong = f"{entry.name}: {list(entry.shape)}, it should have at least {rows} rows"
            raise TensorMismatch(wrong, f"config.json says {line.padded} = {rows}", self._check)
        return rows

    def _cut_in_groups(self, line: Dense, numbers: Mapping[str, str], entry: Entry) -> Iterator[HubTensor]:
        shares, first = line.shares(self.config, entry.shape[0] if entry.shape else 1, self._tp), 0
        if shares is None:
            said = ", ".join(f"{key} = {dig(self.config, key)}" for key in dict.fromkeys((*line.heads, HEAD_DIM)))
            wrong = f"{entry.name}: {list(entry.shape)}, its rows are not those of its heads"
            raise TensorMismatch(wrong, f"config.json says {said}", self._check)
        for name, rows in zip(line.hub, shares, strict=True):
            yield HubTensor(name.format(**numbers), entry, first, rows, line.groups(self.config, self._tp))
            first += rows

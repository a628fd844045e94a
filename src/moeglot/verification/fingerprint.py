"""Fingerprint: the forward level frozen in a small JSON file, so that a checkpoint can be verified where its source is not.

For each layer and expert: the scale of the probe tokens and the response to them, projected to two numbers each. There are four tokens, and with ReLU
their negatives. Neither layout nor encoding shows in it; only what the experts compute does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.checkpoints.divided import numbers, whole_sizes
from moeglot.errors import Contradiction, UsageError
from moeglot.experts import Expert, Matrix, loudness, probe, probe_tokens
from moeglot.files import newfile
from moeglot.verification.misreadings import right

if TYPE_CHECKING:
    import torch

SCHEMA = "moeglot/fingerprint/1"
TOKENS = 4
NUMBERS = 2
DIGITS = 9
ROW = (1 + TOKENS * NUMBERS, 1 + 2 * TOKENS * NUMBERS)
"""How many numbers an expert has in the file: the scale of the tokens, and what is left of the response to each, or to its negative as well."""


@dataclass(frozen=True)
class Fingerprint:
    """`experts`: "layer.expert", by the numbers of the whole model -> [scale of the tokens, 8 numbers; or 16]. `first`: which of them is asked for as layer 0,
    expert 0.
    """

    name: str
    family: str
    sizes: Mapping[str, int]
    experts: Mapping[str, tuple[float, ...]]
    first: tuple[int, int] = (0, 0)

    @classmethod
    def load(cls, path: str | Path) -> Fingerprint:
        """Read a file that `moeglot fingerprint` wrote; raises `UsageError` for any other."""
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            if str(told["schema"]).startswith("moeglot/certificate/"):
                known = "it says what the files of its folder were when they were written"
                raise UsageError(f"{path}: a certificate, not a fingerprint", known, f"run `moeglot verify {Path(path).parent}`, which reads it")
            if told["schema"] != SCHEMA:
                raise ValueError(f"its schema is {told['schema']}")
            experts = {place: tuple(map(float, row)) for place, row in told["experts"].items()}
            sizes = {letter: told["sizes"][letter] for letter in "ehi"}
            if wrong := next((place for place, row in experts.items() if not _usable(place, row)), None):
                raise ValueError(f"experts[{wrong!r}] is not {' or '.join(map(str, ROW))} finite numbers of one expert")
            if not isinstance(told["family"], str) or not all(isinstance(size, int) for size in sizes.values()):
                raise ValueError("its family is no name, or its sizes are no whole numbers")
            return cls(str(path), told["family"], sizes, experts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: not a fingerprint", f"{type(error).__name__}: {error}", "write one with `moeglot fingerprint PATH -o FILE`") from error

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "family": self.family, "sizes": dict(self.sizes), "experts": {place: list(row) for place, row in self.experts.items()}}

    def save(self, path: str | Path) -> None:
        """Write it to a new file; raises `OutputExists`, and `UsageError` where there is no folder for it."""
        newfile.check(Path(path), "PATH")
        newfile.write(Path(path), json.dumps(self.as_json(), separators=(",", ":")).replace('],"', '],\n"') + "\n")

    def of(self, checkpoint: Checkpoint) -> Fingerprint:
        """What it says of a checkpoint's experts; raises `Contradiction` unless that has this family, these sizes and these experts, or one process's."""
        refuse_parts(checkpoint)
        sizes, mine = {letter: whole_sizes(checkpoint)[letter] for letter in self.sizes}, numbers(checkpoint)
        places = {f"{checkpoint.number(layer)}.{expert}" for layer in checkpoint.layers for expert in mine}
        known = places <= self.experts.keys() if checkpoint.share else places == self.experts.keys()
        if checkpoint.format.family.name != self.family or sizes != self.sizes or not known:
            raise Contradiction(
                f"{self.name} is the fingerprint of another model",
                f"of {self.family} {dict(self.sizes)} with {len(self.experts)} experts; this is {checkpoint.format.family.name} {sizes} with {len(places)}",
                "pass the fingerprint of this model's source",
            )
        needed = 1 + NUMBERS * TOKENS * (1 + Expert.of(checkpoint.format.family, checkpoint.config).is_off_below_zero)
        if other := next((len(row) for row in self.experts.values() if len(row) != needed), None):
            raise UsageError(
                f"{self.name} has {other} numbers for an expert, and {needed} are compared",
                "where the activation is ReLU, each token is asked with its negative, too; files of an older moeglot have it once",
                "write it again with `moeglot fingerprint PATH -o FILE`",
            )
        return replace(self, first=(checkpoint.number(0), mine[0]))

    # --- a side of `verify` ----------------------------------------------------------------------------------------------------------

    def tokens(self, layer: int, expert: int, model: Expert, matrix: Matrix, h: int) -> torch.Tensor:
        place = self._place(layer, expert)
        return probe_tokens(model, place, TOKENS, h) * self._row(place)[0]

    def answer(self, layer: int, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.tensor(self._row(self._place(layer, expert))[1:], dtype=torch.float64, device="cpu")

    def seen(self, layer: int, expert: int, response: torch.Tensor) -> torch.Tensor:
        return project(*self._place(layer, expert), response)

    def _place(self, layer: int, expert: int) -> tuple[int, int]:
        return self.first[0] + layer, self.first[1] + expert

    def _row(self, place: tuple[int, int]) -> tuple[float, ...]:
        return self.experts["{}.{}".format(*place)]


def _usable(place: str, row: tuple[float, ...]) -> bool:
    """A row of a file: of "layer.expert", the scale of the tokens and what is left of the response to them."""
    return bool(re.fullmatch(r"\d+\.\d+", place)) and len(row) in ROW and all(map(isfinite, row))


def refuse_parts(checkpoint: Checkpoint) -> None:
    """Raises `UsageError` where experts are there in part: what they compute is a part of what the whole ones do."""
    if checkpoint.share and checkpoint.share.etp.size > 1:
        known = f"{checkpoint.source.name} has what {checkpoint.share} holds: a part of each expert's matrices, which computes something else"
        raise UsageError("a fingerprint is of whole experts", known, "verify --against the model itself; or the folder that holds the folders of all ranks")


def project(layer: int, expert: int, response: torch.Tensor) -> torch.Tensor:
    """response [t, h] -> float64 [t × 2], by fixed pseudo-random directions."""
    directions = probe((layer, expert, 1), NUMBERS, response.shape[-1])
    return (response.double() @ directions.double().mT).flatten()


def fingerprint(checkpoint: Checkpoint | str | Path) -> Fingerprint:
    """The fingerprint of a checkpoint in any format; reads every expert once."""
    subject = checkpoint if isinstance(checkpoint, Checkpoint) else open(checkpoint)
    refuse_parts(subject)
    h, found = subject.sizes["h"], {}
    for layer in subject.layers:
        number = subject.number(layer)
        model = Expert.of(subject.format.family, subject.config, number)
        for here, expert in enumerate(numbers(subject)):
            matrix = right(subject, layer, here)
            tokens = probe_tokens(model, (number, expert), TOKENS, h)
            scale = float(f"{loudness(model, tokens, matrix):.{DIGITS}g}")
            seen = project(number, expert, model.forward(tokens * scale, matrix))
            found[f"{number}.{expert}"] = (scale, *(float(f"{n:.{DIGITS}g}") for n in seen.tolist()))
    subject.source.check_unchanged()
    return Fingerprint(subject.source.name, subject.format.family.name, {letter: whole_sizes(subject)[letter] for letter in "ehi"}, found)

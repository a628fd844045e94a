"""Two readings of the same experts, compared bit for bit: a role when it is asked for first, so that a check of what experts compute compares them, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from moeglot import scratch
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checks import Check
from moeglot.encoded import Encoded
from moeglot.encodings.plain import Plain
from moeglot.errors import Contradiction
from moeglot.experts import Matrix
from moeglot.floats import compared_dtype, row_pairs, squares
from moeglot.planning.loss import NONE
from moeglot.verification.misreadings import right

SLAB = 1 << 20
"""Numbers of a matrix that are compared at a time."""


class Compared:
    """A second opinion of matrices whose roles are compared, bit for bit, when they are asked for first: so each is read and made once for both levels."""

    def __init__(self, subject: Checkpoint, other: Callable[[int, int], Matrix]) -> None:
        self.subject, self.other = subject, other
        self.found: dict[tuple[int, int, str], float | None] = {}
        """(layer, expert, role) -> what `difference` says."""

    def matrix(self, layer: int, expert: int) -> Matrix:
        """role -> [out, in] of the other side."""
        mine, theirs = right(self.subject, layer, expert), self.other(layer, expert)

        def role(name: str) -> Encoded:
            encoded = theirs(name)
            if (layer, expert, name) not in self.found:
                self.found[layer, expert, name] = self.compare(mine(name), encoded, (layer, expert, name))
            return encoded

        return role

    def compare(self, mine: Encoded, theirs: Encoded, place: tuple[int, int, str]) -> float | None:
        return difference(mine, theirs)

    def visit(self, layer: int, expert: int) -> None:
        """Compare every role of an expert."""
        matrix = self.matrix(layer, expert)
        for role in self.subject.format.family.roles:
            matrix(role)

    def check(self) -> Check:
        """Canonical tensors equal bit for bit, or else their relative error by role. Whatever was not asked for yet is compared now."""
        roles, sizes = self.subject.format.family.roles, self.subject.sizes
        places = [(layer, expert, role) for layer in self.subject.layers for expert in range(sizes["e"]) for role in roles]
        for layer, expert in sorted({place[:2] for place in places if place not in self.found}):
            self.visit(layer, expert)
        return self.judged({place: self.found[place] for place in places})

    def judged(self, found: Mapping[tuple[int, int, str], float | None]) -> Check:
        roles: dict[str, float] = {}
        layers: dict[int, float] = {}
        for (layer, _, role), error in found.items():
            roles[role] = max(roles.get(role, 0), error or 0)
            layers[layer] = max(layers.get(layer, 0), error or 0)
        total, unequal = len(found), sum(error is not None for error in found.values())
        if not unequal:
            return Check("values", "holds", "canonical tensors", f"{total} of {total} equal bit for bit", {"unequal": 0, "tensors": total}, layers)
        worst = ", ".join(f"{role} {error:.2g}" for role, error in roles.items() if error) or NONE
        figures = {"unequal": unequal, "tensors": total, "relative_error": roles}
        return Check("values", "does not hold", "canonical tensors", f"{unequal} of {total} differ; relative error {worst}", figures, layers)


def compared(subject: Checkpoint, other: Checkpoint) -> Compared:
    """The experts of two checkpoints of one model; raises `Contradiction`."""
    comparable(subject, other)
    return Compared(subject, partial(right, other))


def comparable(a: Checkpoint, b: Checkpoint) -> None:
    """One family, one size; raises `Contradiction`."""
    if a.share != b.share:
        wrong = f"{a.source.name} has {_which(a)}, {b.source.name} {_which(b)}"
        raise Contradiction(wrong, "moeglot compares what the first one has", f"pass {b.source.name} first")
    letters = [letter for letter in ("e", "h", "i", "j") if a.sizes.get(letter) != b.sizes.get(letter)]
    if a.format.family != b.format.family or letters or a.layers != b.layers:
        raise Contradiction(
            f"{a.source.name} and {b.source.name} are different models",
            f"{a.format.family.name} {dict(a.sizes)} and {b.format.family.name} {dict(b.sizes)}, {len(a.layers)} and {len(b.layers)} sparse layers",
            "compare checkpoints of one model",
        )


def _which(checkpoint: Checkpoint) -> str:
    return f"what {checkpoint.share} holds" if checkpoint.share else "the whole model"


def difference(mine: Encoded, theirs: Encoded) -> float | None:
    """None if the numbers are the same, bit for bit (the sign of zero too); else their relative error, 0 where signs of zero are all that differs."""
    from moeglot.kernels.bits import same

    if _same_parts(mine, theirs) or _same_in_half(mine, theirs):
        return None
    error = size = 0.0
    equal, dtype = True, compared_dtype(mine, theirs)
    for a, b in row_pairs(mine, theirs):
        x, y = a.decode(dtype), b.decode(dtype)
        equal = equal and same(x, y)
        error += squares(x - y)
        size += squares(y)
    if equal:
        return None
    ratio = (error / size) ** 0.5 if size else float("inf") if error else 0.0
    return ratio if ratio == ratio else float("inf")


def _same_parts(mine: Encoded, theirs: Encoded) -> bool:
    """The same codes and scales, so that nothing need be decoded."""
    from moeglot.kernels.bits import same

    alike = mine.encoding.name == theirs.encoding.name and mine.parts.keys() == theirs.parts.keys()
    return alike and all(same(mine.parts[name], theirs.parts[name]) for name in mine.parts)


def _same_in_half(mine: Encoded, theirs: Encoded) -> bool:
    """Both are numbers that bfloat16 holds exactly, and as such they are the same, some rows at a time."""
    import torch

    from moeglot.kernels.bits import same

    if not all(encoded.encoding.fits_in(Plain("BF16")) for encoded in (mine, theirs)):
        return False

    def decoded(block: Encoded) -> torch.Tensor:
        plain = isinstance(block.encoding, Plain)
        return block.decode(torch.bfloat16, None if plain else scratch.empty(block.shape, torch.bfloat16))

    return all(same(decoded(a), decoded(b)) for a, b in row_pairs(mine, theirs, SLAB))

"""What the numbers themselves say about their origin: which reading of the stored axes they fit, by what margin, or that they cannot tell.

Three tests, on a few experts of a few layers. Each looks at every reading of the stored tensors that no shape refutes. Readings that differ
only in which of gate and up comes first are one: no test here can tell these two apart.

- grid: numbers that were decoded from a quantized file still lie on its grid, in groups along the axis that is summed over, and on no other.
- channel: training scales channel i of an expert as a whole, so the norms of gate row i, up row i and down column i rise and fall together.
- residual stream: all experts read and write one h, each has an i of its own, so norms along h agree across experts. Experts that were copied
  from one matrix agree along i as well: this test supports the others and never contradicts a declaration alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from moeglot.axes import letters
from moeglot.checkpoints.grids import GRIDS, Grid
from moeglot.checkpoints.profiles import KINDS, Profile, Reader, directions, profiles, spread
from moeglot.errors import Contradiction
from moeglot.layout import SECOND, Stored

if TYPE_CHECKING:
    import torch

LAYERS, EXPERTS = 3, 8
"""How many are looked at, evenly spread."""
Z = 6.0
"""Standard deviations beyond chance that a reading must reach: one in 10^9."""
MARGIN = 3.0
"""How many times better than every other reading it must be, so that a weak side effect, which large matrices make significant, decides nothing."""
MISSES = 0.01
"""Along its own axis every group of a quantized tensor lies on the grid. At least this share must miss it along the other, else the grid shows no axis."""
FIRST = 8
"""Rows that must lie on a grid before all are looked at."""

Verdict = Literal["as declared", "another reading", "cannot tell"]


@dataclass(frozen=True)
class Evidence:
    """What one test says of `what`. `fits`: the other reading that it names; `turns`: the lines that lie the other way in it. `figures`: its statistic for
    every reading, and its power.
    """

    test: Literal["grid", "channel", "residual stream"]
    what: str
    verdict: Verdict
    detail: str
    fits: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weighed:
    """What all tests say together. `open`: the other readings that neither a shape nor a test excludes; which layers and experts were looked at."""

    evidence: tuple[Evidence, ...]
    open: tuple[str, ...]
    layers: tuple[int, ...]
    experts: tuple[int, ...]

    def _with(self, verdict: Verdict) -> tuple[Evidence, ...]:
        """What names a line's other orientation counts for nothing where the residual stream shows the declared one: two tests, two answers."""
        sure = {e.what for e in self.evidence if e.test == "residual stream" and e.verdict == "as declared"}
        return tuple(e for e in self.evidence if e.verdict == verdict and e.test != "residual stream" and not sure & set(e.turns))

    @property
    def against(self) -> tuple[Evidence, ...]:
        """What contradicts the declared reading."""
        return self._with("another reading")

    @property
    def verdict(self) -> Verdict:
        if self.against:
            return "another reading"
        doubted = any(e.verdict == "another reading" for e in self.evidence)
        return "as declared" if self._with("as declared") and not self.open and not doubted else "cannot tell"

    @property
    def why(self) -> str:
        """What the tests that decided for the declared reading found."""
        return "; ".join(f"{e.test} test: {e.detail}" for e in self._with("as declared"))

    @property
    def exit_status(self) -> int:
        return 1 if self.against else 0

    def contradiction(self, known: str) -> Contradiction | None:
        """The error, where the numbers decidedly fit another reading than the declared one. `known`: how the format is known."""
        if not self.against:
            return None
        fits = dict.fromkeys(e.fits for e in self.against if e.fits)
        longest = [one for one in fits if not any(one != other and one in other for other in fits)]
        return Contradiction(
            f"the numbers fit another reading: {'; '.join(longest)}",
            f"{known}; {'; '.join(f'{e.test} test: {e.detail}' for e in self.against)}",
            "ask its producer how it was written; if that is another format of this family pass --format, else fetch or convert it again",
        )


def evidence_json(weighed: Weighed, known: str) -> dict[str, Any]:
    error = weighed.contradiction(known)
    return {
        "verdict": weighed.verdict,
        "open": list(weighed.open),
        "layers": list(weighed.layers),
        "experts": list(weighed.experts),
        "tests": [{"test": e.test, "of": e.what, "verdict": e.verdict, "fits_if": e.fits, "detail": e.detail, "figures": e.figures} for e in weighed.evidence],
        "contradiction": {"wrong": error.wrong, "known": error.known, "do": error.do} if error else None,
        "exit_status": weighed.exit_status,
    }


def weigh(checkpoint: Reader, layers: int = LAYERS, experts: int = EXPERTS) -> Weighed:
    """Every test on so many layers and experts; reads their matrices once."""
    chosen = spread(checkpoint.layers, layers), spread(range(checkpoint.sizes["e"]), experts)
    lines = [line for line in checkpoint.format.stored if line.is_matrix]
    seen = {line.roles: profiles(checkpoint, line, *chosen) for line in lines}
    grids = [_grid(line, seen[line.roles]) for line in lines]
    groups = [[line for line in lines if line.roles[0].startswith(SECOND) == bool(group)] for group in checkpoint.format.family.groups]
    channels = [_channel(group, seen, chosen[0]) for group in groups]
    streams = [found for line in lines if (found := _residual(line, seen[line.roles]))]
    settled = [line.roles for group, channel in zip(groups, channels, strict=True) if channel.verdict == "as declared" for line in group]
    still = [name for line, grid in zip(lines, grids, strict=True) if line.roles not in settled for name in _open(line, seen[line.roles], grid)]
    return Weighed((*grids, *channels, *streams), tuple(still), *chosen)


def _open(line: Stored, seen: Sequence[Profile], grid: Evidence) -> list[str]:
    """The other readings of a line that its grid does not exclude: it shows the orientation, and nothing of gate and up."""
    others = [one for one in seen[1:] if grid.verdict != "as declared" or _order(one) == _order(seen[0])]
    return [_name([one.reading], [line]) for one in others]


def decide(candidates: Sequence[Reader]) -> tuple[int, str] | None:
    """Which of several formats of the same tensors the numbers fit, and why: only where they fit that one and contradict every other."""
    weighed = [weigh(candidate) for candidate in candidates]
    fitting = [n for n, found in enumerate(weighed) if found.verdict == "as declared"]
    if len(fitting) != 1 or not all(found.against for n, found in enumerate(weighed) if n != fitting[0]):
        return None
    others = " and ".join(candidate.format.name for n, candidate in enumerate(candidates) if n != fitting[0])
    return fitting[0], f"the numbers fit it and contradict {others} ({weighed[fitting[0]].why})"


# --- deciding ----------------------------------------------------------------------------------------------------------------------------

DECLARED, ACROSS = "as declared", "along the other axis"
Scores = Mapping[str, tuple[float, float]]
"""reading -> (correlation, its standard deviations from what a random order of the channels gives); the declared one first."""


def _judge(scores: Scores) -> tuple[Verdict, str]:
    """What a correlation for each reading decides, and the best reading."""
    best = max(scores, key=lambda name: scores[name][0])
    others = max((scores[name][0] for name in scores if name != best), default=0.0)
    correlation, z = scores[best]
    if not (z >= Z and correlation >= MARGIN * others):
        return "cannot tell", best
    return ("as declared" if best == DECLARED else "another reading"), best


def _evidence(
    test: Literal["channel", "residual stream"], what: str, scores: Scores, turned: Mapping[str, tuple[str, ...]] = MappingProxyType({}), **figures: Any
) -> Evidence:
    """`turned`: reading -> the lines that lie the other way in it."""
    verdict, best = _judge(scores)
    shown = sorted(scores, key=lambda name: (name != DECLARED, -scores[name][0]))[:3]
    detail = "correlation " + ", ".join(f"{scores[name][0]:.2f} {'' if name == DECLARED else 'if '}{name}" for name in shown)
    detail += f" (chance: ±{abs(scores[best][0] / scores[best][1] if scores[best][1] else 0):.2g})"
    if any(r != r for r, _ in scores.values()):
        detail = "some numbers of the sample are NaN, infinite or too large"
    told = {
        "correlation": {name: r for name, (r, _) in scores.items()},
        "z": {name: z for name, (_, z) in scores.items()},
        "needed": {"z": Z, "margin": MARGIN},
    }
    other = best if verdict == "another reading" else None
    return Evidence(test, what, verdict, detail, other, told | figures, turned.get(best, ()) if other else ())


def _name(readings: Iterable[Stored], lines: Iterable[Stored]) -> str:
    """`down_proj is read as "e h i"`: what differs from the declared lines."""
    return " and ".join(f'{line.short} is read as "{other.axes}"' for line, other in zip(lines, readings, strict=True) if other.axes != line.axes) or DECLARED


def _channel(lines: Sequence[Stored], seen: Mapping[tuple[str, ...], list[Profile]], layers: tuple[int, ...]) -> Evidence:
    """Norms of down columns against those of gate rows and of up rows, the weaker of the two, for every combination of readings.

    What experts share along an axis is taken out first. Gate against up is left out: read along h they agree a little, since both read what the expert is for.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    turned: dict[str, tuple[str, ...]] = {}
    for combination in product(*(seen[line.roles] for line in lines)):
        norms = {role: directions(along - along.mean(1, keepdim=True)) for one in combination for role, along in one.along_i.items()}
        down = norms.pop(next(role for role in norms if role.endswith("down")))
        name = _name((one.reading for one in combination), lines)
        turned[name] = tuple(line.short for line, one in zip(lines, combination, strict=True) if _order(one) != _order(seen[line.roles][0]))
        found[name] = torch.stack([(rows * down).sum(-1) for rows in norms.values()])  # [role, layer, expert]
    size, what = down.shape[-1], " and ".join(line.short for line in lines)

    def scores(chosen: slice) -> Scores:
        """With what they share taken out, one expert fewer is an independent witness."""
        return {name: _score(r[:, chosen].mean((1, 2)).min(), (size - KINDS) * r[:, chosen].shape[1] * (r.shape[2] - 1)) for name, r in found.items()}

    by_layer = {name: dict(zip(layers, r.mean(2).amin(0).tolist(), strict=True)) for name, r in found.items()}
    together = _evidence("channel", what, scores(slice(None)), turned, by_layer=by_layer)
    alone = (_evidence("channel", f"{what} of layer {layer}", scores(slice(n, n + 1)), turned) for n, layer in enumerate(layers))
    return together if together.fits else next((one for one in alone if one.fits), together)


def _score(correlation: torch.Tensor, independent: int) -> tuple[float, float]:
    """A correlation of unit vectors and its z: in a random order of the channels it has the variance 1 / independent."""
    return float(correlation), float(correlation) * max(0, independent) ** 0.5


def _residual(line: Stored, seen: Sequence[Profile]) -> Evidence | None:
    """Whether norms along what a reading calls h agree between experts; only where the shape leaves the orientation open."""
    import torch

    scores = {}
    for one in (seen[0], _turned(seen)):
        if one:
            pairs = [_agreement(directions(norms)) for norms in one.along_h.values()]
            scores[_name([one.reading], [line])] = _score(torch.stack([r for r, _ in pairs]).mean(), sum(n for _, n in pairs))
    return _evidence("residual stream", line.short, scores) if len(scores) > 1 else None


def _turned(seen: Sequence[Profile]) -> Profile | None:
    """The reading in the other orientation and the same arrangement, if the shape allows it."""
    return next((one for one in seen if _order(one) != _order(seen[0]) and _fused(one) == _fused(seen[0])), None)


def _order(one: Profile) -> list[str]:
    return [letter for letter in letters(one.reading.expert_groups) if letter != "p"]


def _fused(one: Profile) -> tuple[str, ...]:
    return next((group for group in one.reading.expert_groups if "p" in group), ())


def _agreement(norms: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Unit vectors [layer, expert, n] -> the mean correlation of two experts of a layer, and how many independent numbers are in it."""
    layers, experts, size = norms.shape
    pairs = experts * (experts - 1)
    total = norms.sum(1).square().sum(-1) - experts
    return (total / max(1, pairs)).mean(), (size - KINDS) * layers * pairs // 2


def _grid(line: Stored, seen: Sequence[Profile]) -> Evidence:
    """On which grid the numbers lie: along the axis that the declared reading sums over, or along the other."""
    declared, turned = seen[0], _turned(seen)
    if declared.rows is None or declared.columns is None:
        return Evidence("grid", line.short, "cannot tell", "still encoded: the format says how its blocks lie")
    other = _name([turned.reading], [line]) if turned else ACROSS
    rows = {DECLARED: declared.rows, other: turned.rows if turned and turned.rows is not None else declared.columns}
    likely = [grid for grid in GRIDS if 1 in _shares(grid, {name: some[:FIRST] for name, some in rows.items()}).values()]
    grid, shares = next(((grid, shares) for grid in likely if 1 in (shares := _shares(grid, rows)).values()), (None, {}))
    if not grid:
        return Evidence("grid", line.short, "cannot tell", "on no grid: never quantized, or changed since", figures={"grid": None})
    fits = DECLARED if shares[DECLARED] == 1 else other
    lossless = grid.exact and fits == DECLARED
    detail = f"on the grid of {grid.name}{'' if grid.exact else ', to the rounding of BF16'}: {shares[DECLARED]:.1%} of groups as declared, "
    detail += f"{shares[other]:.1%} {'' if other == ACROSS else 'if '}{other}"
    detail += f"; encoding the sample as {grid.name} again loses nothing" if lossless else ""
    verdict: Verdict = "as declared" if fits == DECLARED else "another reading"
    if min(shares.values()) > 1 - MISSES or fits == ACROSS:
        verdict = "cannot tell"
    figures = {"grid": grid.name, "share": shares, "needed": {"share": 1.0, "other": 1 - MISSES}, "lossless": lossless}
    if verdict == "another reading":
        return Evidence("grid", line.short, verdict, detail, fits, figures, (line.short,))
    return Evidence("grid", line.short, verdict, detail, None, figures)


def _shares(grid: Grid, rows: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """reading -> the share of its groups that lie on the grid."""
    counts = {name: grid.fitting(tensor) for name, tensor in rows.items()}
    return {name: fitting / max(1, groups) for name, (fitting, groups) in counts.items()}

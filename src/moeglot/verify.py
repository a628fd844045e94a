"""Verification that means something: structure, values, forward; every run proves that it could have failed, and names the cause when it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from moeglot.checkpoint import Checkpoint, open, problems
from moeglot.encoding import Encoded
from moeglot.errors import Contradiction, MoeglotError
from moeglot.experts import Expert, Matrix, loudness, probe, relative_error
from moeglot.layout import Stored
from moeglot.misreadings import Misreading, misreadings, relaid, right

if TYPE_CHECKING:
    import torch

LIMIT = 1e-5
"""Relative error in float32 that a right reading stays under; right ones land near 1e-7."""
POWER = 100.0
"""How many times worse than the limit each wrong reading must be; otherwise the verdict is "cannot tell"."""
TOKENS = 8

Level = Literal["structure", "values", "forward"]
Verdict = Literal["holds", "does not hold", "cannot tell"]
Progress = Callable[[str, int, int], None]
"""(what, done, of how many)."""


@dataclass(frozen=True)
class Check:
    """One line of a report. `layers`: the worst figure of each layer, for the plot."""

    level: Level
    verdict: Verdict
    what: str
    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What was checked against what. `exit_status`: 0 holds, 1 does not hold, 2 cannot tell."""

    subject: str
    against: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        verdicts = {check.verdict for check in self.checks}
        return "does not hold" if "does not hold" in verdicts else "cannot tell" if "cannot tell" in verdicts else "holds"

    @property
    def exit_status(self) -> int:
        return {"holds": 0, "does not hold": 1, "cannot tell": 2}[self.verdict]


class Side(Protocol):
    """A second opinion on what each expert computes."""

    @property
    def name(self) -> str: ...

    def tokens(self, layer: int, expert: int, model: Expert, matrix: Matrix, h: int) -> torch.Tensor:
        """The probe tokens [t, h] that this side answers."""

    def distance(self, layer: int, expert: int, tokens: torch.Tensor, response: torch.Tensor) -> float:
        """Relative error of a response [t, h] to these tokens, by this side's own answer."""


@dataclass(frozen=True)
class Matrices:
    """A side that computes with our reference on matrices from elsewhere."""

    name: str
    model: Expert
    matrix: Callable[[int, int], Matrix]

    def tokens(self, layer: int, expert: int, model: Expert, matrix: Matrix, h: int) -> torch.Tensor:
        return loud_tokens(layer, expert, model, matrix, h)

    def distance(self, layer: int, expert: int, tokens: torch.Tensor, response: torch.Tensor) -> float:
        return relative_error(response, self.model.forward(tokens, self.matrix(layer, expert)))


def loud_tokens(layer: int, expert: int, model: Expert, matrix: Matrix, h: int, count: int = TOKENS) -> torch.Tensor:
    """[t, h]: pseudo-random tokens, scaled so that the gate's pre-activations spread by about 3."""
    tokens = probe((layer, expert), count, h)
    return tokens * loudness(model, tokens, matrix) if "gate" in model.roles else tokens


def verify(
    checkpoint: Checkpoint | str | Path, against: Checkpoint | str | Path | Side | None = None, *, workers: int = 1, progress: Progress | None = None
) -> Report:
    """Structure and numbers of a checkpoint; with `against`, its values and forward as well.

    `against`: another checkpoint, a fingerprint (.json), a `Side`, or "transformers" for the modules of the installed library.
    """
    subject = checkpoint if isinstance(checkpoint, Checkpoint) else open(checkpoint)
    other = _side(subject, against)
    checks = [structure(subject)]
    if isinstance(other, Checkpoint):
        checks.append(values(subject, other, workers=workers, progress=progress))
    elif other is None:
        checks.append(numbers(subject, workers=workers, progress=progress))
    if other is not None:
        side = checkpoint_side(other) if isinstance(other, Checkpoint) else other
        checks += forward(subject, side, workers=workers, progress=progress)
    return Report(subject.source.name, "itself" if other is None else side_name(other), tuple(checks))


def _side(subject: Checkpoint, against: Checkpoint | str | Path | Side | None) -> Checkpoint | Side | None:
    from moeglot.fingerprint import Fingerprint

    if isinstance(against, str) and against == "transformers":
        from moeglot.integrations.transformers import live

        return live(subject)
    if isinstance(against, (str, Path)) and Path(against).suffix == ".json":
        return Fingerprint.load(against)
    return open(against) if isinstance(against, (str, Path)) else against


def side_name(other: Checkpoint | Side) -> str:
    return other.source.name if isinstance(other, Checkpoint) else other.name


def checkpoint_side(other: Checkpoint) -> Matrices:
    return Matrices(other.source.name, Expert.of(other.format.family, other.config), lambda layer, expert: right(other, layer, expert))


def structure(checkpoint: Checkpoint) -> Check:
    """Every key once, shapes as derived from config.json, nothing left over."""
    found: list[Exception] = list(problems(checkpoint))
    if not found:
        try:
            tensors = len(checkpoint.source.entries) - len(checkpoint.dense)
        except MoeglotError as error:
            found = [error]
    if found:
        first = found[0]
        wrong = first.wrong if isinstance(first, MoeglotError) else str(first)
        return Check("structure", "does not hold", "keys, dtypes and shapes", f"{wrong} ({len(found)} problems)", {"problems": len(found)})
    experts = len(checkpoint.layers) * checkpoint.sizes["e"]
    return Check("structure", "holds", "keys, dtypes and shapes", f"{tensors} tensors of {experts} experts, each once", {"experts": experts})


def each_expert(checkpoint: Checkpoint, work: Callable[[int, int], Any], what: str, workers: int, progress: Progress | None) -> Iterator[Any]:
    """`work(layer, expert)` for each expert, in order, on threads, a few at a time."""
    places = [(layer, expert) for layer in checkpoint.layers for expert in range(checkpoint.sizes["e"])]
    with ThreadPoolExecutor(workers, initializer=one_thread) as pool:
        window = [pool.submit(work, *place) for place in places[: 2 * workers]]
        for n in range(len(places)):
            result = window.pop(0).result()
            if n + 2 * workers < len(places):
                window.append(pool.submit(work, *places[n + 2 * workers]))
            if progress:
                progress(what, n + 1, len(places))
            yield result


def one_thread() -> None:
    """Each worker of ours is one thread; torch's own threads under it would only fight for the same cores."""
    import torch

    torch.set_num_threads(1)


def numbers(checkpoint: Checkpoint, *, workers: int = 1, progress: Progress | None = None) -> Check:
    """Read every expert: no NaN, no scale that is zero, NaN or a placeholder."""

    def work(layer: int, expert: int) -> str | None:
        for line in checkpoint.format.stored:
            stored = checkpoint.stored(line, layer, expert)
            if problem := stored.encoding.check(stored.parts):
                return f"{next(iter(line.keys(layer, expert).values()))}, expert {expert}: {problem}"
        return None

    bad = [found for found in each_expert(checkpoint, work, "reading", workers, progress) if found]
    if bad:
        return Check("values", "does not hold", "finite numbers and scales", f"{bad[0]} ({len(bad)} experts)", {"problems": len(bad)})
    return Check("values", "holds", "finite numbers and scales", "every expert was read")


# --- values --------------------------------------------------------------------------------------------------------------------------

Expected = Callable[[int, int], Mapping[str, Encoded]]


def values(subject: Checkpoint, other: Checkpoint, *, workers: int = 1, progress: Progress | None = None) -> Check:
    """Canonical tensors equal bit for bit, or else their relative error by role."""
    comparable(subject, other)

    def work(layer: int, expert: int) -> tuple[int, dict[str, float]]:
        return layer, {role: _difference(role, layer, expert) for role in subject.format.family.roles}

    def _difference(role: str, layer: int, expert: int) -> float:
        mine = subject.expert(subject.format.line_of(role), layer, expert)[role]
        theirs = other.expert(other.format.line_of(role), layer, expert)[role]
        return difference(mine, theirs)

    return _worst(subject, each_expert(subject, work, "values", workers, progress))


def _worst(subject: Checkpoint, found: Iterator[tuple[int, dict[str, float]]]) -> Check:
    roles: dict[str, float] = {}
    layers: dict[int, float] = {}
    unequal = total = 0
    for layer, errors in found:
        for role, error in errors.items():
            roles[role] = max(roles.get(role, 0), error)
            layers[layer] = max(layers.get(layer, 0), error)
            total, unequal = total + 1, unequal + (error > 0)
    if not unequal:
        return Check("values", "holds", "canonical tensors", f"{total} of {total} equal bit for bit", {"unequal": 0, "tensors": total}, layers)
    worst = ", ".join(f"{role} {error:.2g}" for role, error in roles.items() if error)
    figures = {"unequal": unequal, "tensors": total, "relative_error": roles}
    return Check("values", "does not hold", "canonical tensors", f"{unequal} of {total} differ; relative error {worst}", figures, layers)


def comparable(a: Checkpoint, b: Checkpoint) -> None:
    """One family, one size; raises `Contradiction`."""
    letters = [letter for letter in ("e", "h", "i") if a.sizes.get(letter) != b.sizes.get(letter)]
    if a.format.family != b.format.family or letters or a.layers != b.layers:
        raise Contradiction(
            f"{a.source.name} and {b.source.name} are different models",
            f"{a.format.family.name} {dict(a.sizes)} and {b.format.family.name} {dict(b.sizes)}, {len(a.layers)} and {len(b.layers)} sparse layers",
            "compare checkpoints of one model",
        )


def difference(mine: Encoded, theirs: Encoded) -> float:
    """0 if the numbers are the same, bit for bit (the sign of zero too); else their relative error, never 0."""
    import torch

    if mine.encoding.name == theirs.encoding.name and all(_same_bits(mine.parts[name], theirs.parts[name]) for name in mine.parts):
        return 0.0
    a, b = mine.decode(torch.float32), theirs.decode(torch.float32)
    return 0.0 if _same_bits(a, b) else max(relative_error(a, b), 1e-45)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))


def others(subject: Checkpoint, other: Checkpoint) -> Check:
    """Every tensor that is no expert, byte for byte, under its Hub name."""
    mine, theirs = subject.dense, other.dense
    if mine.keys() != theirs.keys():
        names = sorted(mine.keys() ^ theirs.keys())
        return Check("values", "does not hold", "other tensors", f"{len(names)} are on one side only, first {names[0]}")
    changed = [name for name, tensor in mine.items() if not _same_bits(tensor.read(), theirs[name].read())]
    if changed:
        return Check("values", "does not hold", "other tensors", f"{len(changed)} of {len(mine)} differ, first {changed[0]}")
    return Check("values", "holds", "other tensors", f"{len(mine)} equal byte for byte")


def compare(a: Checkpoint | str | Path, b: Checkpoint | str | Path, *, workers: int = 1, progress: Progress | None = None) -> Report:
    """Canonical values of two checkpoints, in whichever formats, and their other tensors."""
    mine, theirs = (x if isinstance(x, Checkpoint) else open(x) for x in (a, b))
    checks = (values(mine, theirs, workers=workers, progress=progress), others(mine, theirs))
    return Report(mine.source.name, theirs.source.name, checks)


# --- forward -------------------------------------------------------------------------------------------------------------------------


def forward(subject: Checkpoint, side: Side, *, workers: int = 1, progress: Progress | None = None) -> list[Check]:
    """Every expert on loud random tokens against the other side, then the wrong readings on one expert a layer, to prove the power."""
    model, h = Expert.of(subject.format.family, subject.config), subject.sizes["h"]

    def work(layer: int, expert: int) -> tuple[int, int, float]:
        matrix = right(subject, layer, expert)
        tokens = side.tokens(layer, expert, model, matrix, h)
        return layer, expert, side.distance(layer, expert, tokens, model.forward(tokens, matrix))

    found = list(each_expert(subject, work, "forward", workers, progress))
    layers = {layer: max(error for at, _, error in found if at == layer) for layer in subject.layers}
    worst = max(found, key=lambda row: row[2])
    wrong = [row for row in found if not row[2] <= LIMIT]
    figures: dict[str, Any] = {"relative_error": worst[2], "limit": LIMIT, "experts": len(found), "beyond": len(wrong)}
    if wrong:
        layer, expert, error = wrong[0]
        cause = diagnose(subject, side, layer, expert)
        figures["fits_if"] = cause
        known = f"fits if {cause}" if cause else "no other reading of the same bytes fits either"
        detail = f"{len(wrong)} of {len(found)} experts beyond {LIMIT:g}; layer {layer}, expert {expert}: {error:.2g}; {known}"
        return [Check("forward", "does not hold", f"against {side.name}", detail, figures, layers)]
    detail = f"{len(found)} experts, relative error at most {worst[2]:.1e} (limit {LIMIT:g})"
    return [Check("forward", "holds", f"against {side.name}", detail, figures, layers), power(subject, side, model)]


def power(subject: Checkpoint, side: Side, model: Expert) -> Check:
    """Each wrong reading must be at least 100 times worse than the limit, on one expert of each layer."""
    weakest: dict[str, float] = {}
    for misreading in misreadings(subject):
        if errors := [error for layer in subject.layers if (error := _error(subject, side, model, misreading, layer)) is not None]:
            weakest[misreading.name] = min(errors)
    blind = [name for name, error in weakest.items() if not error >= LIMIT * POWER]
    figures = {"wrong_readings": weakest, "needed": LIMIT * POWER}
    if blind:
        detail = f"this check cannot see: {', '.join(blind)}"
        return Check("forward", "cannot tell", "power of the check", detail, figures)
    least = min(weakest.values(), default=float("inf"))
    return Check("forward", "holds", "power of the check", f"{len(weakest)} wrong readings, the mildest is off by {least:.2g}", figures)


def _error(subject: Checkpoint, side: Side, model: Expert, misreading: Misreading, layer: int) -> float | None:
    """Error of a wrong reading, on one expert; None where it is no wrong reading, because the biases it drops are zero."""
    expert = layer % subject.sizes["e"]
    declared, wrong = right(subject, layer, expert), misreading.read(layer, expert)
    if misreading.line and misreading.line.role_axes in ("i", "h") and not any(bool(declared(role).any()) for role in misreading.line.roles):
        return None
    tokens = side.tokens(layer, expert, model, declared, subject.sizes["h"])
    return side.distance(layer, expert, tokens, model.forward(tokens, wrong))


def diagnose(subject: Checkpoint, side: Side, layer: int, expert: int) -> str | None:
    """The reading under which this expert fits: fewest changes first, several lines at once if need be."""
    model, declared = Expert.of(subject.format.family, subject.config), right(subject, layer, expert)
    tokens = side.tokens(layer, expert, model, declared, subject.sizes["h"])
    for misreading in misreadings(subject):
        if side.distance(layer, expert, tokens, model.forward(tokens, misreading.read(layer, expert))) <= LIMIT:
            return misreading.name
    for others in _combinations(subject):
        matrix = relaid(subject, {line.key: line for line in others}, layer, expert)
        if side.distance(layer, expert, tokens, model.forward(tokens, matrix)) <= LIMIT:
            return " and ".join(f'{line.key.split(".")[-1]} read as "{line.axes}", {" before ".join(line.roles)}' for line in others)
    return None


def _combinations(subject: Checkpoint) -> list[tuple[Stored, ...]]:
    choices = [[line, *line.misreadings(subject.sizes)] for line in subject.format.stored]
    changed = [tuple(line for line, first in zip(combination, choices, strict=True) if line != first[0]) for combination in product(*choices)]
    return sorted((lines for lines in changed if len(lines) > 1), key=len)

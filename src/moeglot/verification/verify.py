"""Verification that means something: structure, values, forward; every run proves that it could have failed, and names the cause when it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.checkpoints.config import against_default, alone, differing
from moeglot.checkpoints.dense import DecodedTensor, DenseTensor, HubTensor
from moeglot.checkpoints.divided import alongside
from moeglot.checkpoints.gathered import Gathered
from moeglot.checks import Check, Progress, Report, each_expert
from moeglot.codings.coding import said
from moeglot.codings.served import has_cache, is_of_cache
from moeglot.errors import BadNumbers, Contradiction, MoeglotError, TensorMismatch
from moeglot.verification.certified import as_certified
from moeglot.verification.compared import compared
from moeglot.verification.fingerprint import Fingerprint
from moeglot.verification.forward import Side, checkpoint_side, forward
from moeglot.verification.unsound import unsound

SHOWN = 4
"""Keys of config.json that a line names."""


def verify(
    checkpoint: Checkpoint | str | Path, against: Checkpoint | str | Path | Side | None = None, *, workers: int = 1, progress: Progress | None = None
) -> Report:
    """Structure and numbers of a checkpoint; with `against`, its values and forward as well.

    `checkpoint`: a Checkpoint, or what `open` takes.
    `against`: another checkpoint, of which the tensors that are no experts and config.json are compared, too; a fingerprint (.json), a `Side`, or
    "transformers" for the modules of the installed library, which loads the whole model in float32.
    `workers`: threads. `progress`: told (what is checked, how many experts, of how many).
    The report's `verdict` is "holds", "does not hold" or "cannot tell"; what is wrong with the numbers is a line of it. Raises what `open` raises,
    `Contradiction` where `against` is of another model, and with `against` `BadNumbers`, which names the side that has numbers no expert can have.
    """
    subject = checkpoint if isinstance(checkpoint, Checkpoint) else open(checkpoint)
    other = _side(subject, against)
    if isinstance(other, Fingerprint):
        other = other.of(subject)
    checks = [structure(subject), *([copies(subject)] if isinstance(subject, Gathered) else [])]
    if isinstance(other, Checkpoint):
        other = alongside(subject, other)
        both = compared(subject, other)
        computed = forward(subject, checkpoint_side(other, both.matrix), workers=workers, progress=progress)
        checks += [both.check(), others(subject, other), settings(subject, other), *computed]
    elif other is None:
        checks.append(numbers(subject, workers=workers, progress=progress))
        checks += as_certified(subject)
    else:
        checks += forward(subject, other, workers=workers, progress=progress)
    _check_unchanged(subject, other)
    return Report(subject.source.name, "itself" if other is None else side_name(other), tuple(checks))


def _side(subject: Checkpoint, against: Checkpoint | str | Path | Side | None) -> Checkpoint | Side | None:
    if isinstance(against, str) and against == "transformers":
        from moeglot.integrations.transformers import live

        return live(subject)
    if isinstance(against, (str, Path)) and Path(against).suffix == ".json":
        return Fingerprint.load(against)
    if against is None or isinstance(against, (Checkpoint, Fingerprint, Side)):
        return against
    return open(against)


def side_name(other: Checkpoint | Side) -> str:
    return other.source.name if isinstance(other, Checkpoint) else other.name


def structure(checkpoint: Checkpoint) -> Check:
    """Every key once, shapes as derived from config.json, nothing left over."""
    found: list[Exception] = list(checkpoint.problems())
    if not found:
        try:
            tensors = len(checkpoint.source.entries) - len(checkpoint.others)
            checkpoint.dense  # noqa: B018  # raises for a tensor that the format cannot name
        except MoeglotError as error:
            found = [error]
    if found:
        first = found[0]
        wrong = first.wrong if isinstance(first, MoeglotError) else str(first)
        return Check("structure", "does not hold", "keys, dtypes and shapes", f"{wrong} ({len(found)} problems)", {"problems": len(found)})
    experts = len(checkpoint.layers) * checkpoint.sizes["e"]
    whose = f", what {checkpoint.share} holds" if checkpoint.share else ""
    return Check("structure", "holds", "keys, dtypes and shapes", f"{tensors} tensors of {experts} experts, each once{whose}", {"experts": experts})


def copies(subject: Gathered) -> Check:
    """What several processes hold whole and is no expert has the same bytes in all; copies of experts are compared wherever one is read."""
    wrong = []
    for tensor in subject.dense.values():
        try:
            tensor.same(tensor)
        except Contradiction as error:
            wrong.append(error.wrong)
    if wrong:
        return Check("values", "does not hold", "copies", f"{wrong[0]} ({len(wrong)} tensors)", {"unequal": len(wrong)})
    return Check("values", "holds", "copies", f"{len(subject.ranks)} folders agree in what they have in common", {"unequal": 0})


def numbers(checkpoint: Checkpoint, *, workers: int = 1, progress: Progress | None = None) -> Check:
    """Read every expert: no NaN, no scale that is zero, NaN or a placeholder."""

    def work(layer: int, expert: int) -> str | None:
        try:
            for line in checkpoint.format.stored:
                checkpoint.checked(line, layer, expert)
        except BadNumbers as error:
            return error.wrong
        return None

    bad = [found for found in each_expert(checkpoint, work, "reading", workers, progress) if found]
    try:
        others = list(unsound(checkpoint))
    except (TensorMismatch, Contradiction):  # where the format cannot name a tensor, or copies differ, other checks say so
        others = []
    if bad:
        return Check("values", "does not hold", "finite numbers and scales", f"{bad[0]} ({len(bad)} experts)", {"problems": len(bad)})
    if others:
        detail = f"{others[0]} ({len(others)} tensors that are no experts)"
        return Check("values", "does not hold", "finite numbers and scales", detail, {"problems": len(others)})
    return Check("values", "holds", "finite numbers and scales", "every expert was read, and every other weight")


# --- against another checkpoint ------------------------------------------------------------------------------------------------------


def others(subject: Checkpoint, other: Checkpoint, changed: Callable[[Mapping[str, DenseTensor]], Mapping[str, DenseTensor]] = dict) -> Check:
    """Every tensor that is no expert, byte for byte, under its Hub name. `changed`: what the other's are to become."""
    mine, theirs = dict[str, DenseTensor](subject.dense), dict[str, DenseTensor](other.dense)
    undeclared = _of_one_cache(subject, other)
    if (mine.keys() ^ theirs.keys()) - undeclared:  # one is quantized, the other is not
        mine, theirs = subject.decoded("F32"), other.decoded("F32")
        floats = {mine[name].dtype for name, tensor in theirs.items() if isinstance(tensor, DecodedTensor) and isinstance(mine.get(name), HubTensor)}
        theirs = other.decoded(floats.pop()) if len(floats) == 1 else theirs  # what is added to them is rounded to that type, too
    theirs = dict(changed(theirs))
    mine, theirs = ({name: tensor for name, tensor in one.items() if name not in undeclared} for one in (mine, theirs))
    if mine.keys() != theirs.keys():
        names = sorted(mine.keys() ^ theirs.keys())
        return Check("values", "does not hold", "other tensors", f"{len(names)} are on one side only, first {names[0]}")
    unequal = [name for name, tensor in mine.items() if not _same(tensor, theirs[name])]
    if unequal:
        here, there = mine[unequal[0]].dtype, theirs[unequal[0]].dtype
        types = f", which is {here} here and {there} there" if here != there else ""
        return Check("values", "does not hold", "other tensors", f"{len(unequal)} of {len(mine)} differ, first {unequal[0]}{types}")
    decoded = sum(isinstance(tensor, DecodedTensor) != isinstance(theirs[name], DecodedTensor) for name, tensor in mine.items())
    told = f"{len(mine) - decoded} equal byte for byte" + (f", {decoded} as decoded and rounded" if decoded else "")
    told += f"; {len(undeclared)} scales of keys and values are on the one side alone that declares such" if undeclared else ""
    return Check("values", "holds", "other tensors", told)


def _of_one_cache(*both: Checkpoint) -> set[str]:
    """The scales of keys and values of which one checkpoint has some and declares them, and the other has none and declares none."""
    declaring = [one for one in both if has_cache(said(one.source.config))]
    names = [{name for name in one.dense if is_of_cache(name)} for one in both]
    return names[0] ^ names[1] if len(declaring) == 1 and not all(names) else set()


def _same(a: DenseTensor, b: DenseTensor) -> bool:
    """The same bytes; or, if one is a quantized matrix, its values as the other's float type rounds them."""
    from moeglot.kernels.bits import same

    if isinstance(a, HubTensor) and isinstance(b, HubTensor):
        return a.same(b)
    x, y = a.read(), b.read()
    if isinstance(a, DecodedTensor) != isinstance(b, DecodedTensor):
        x, y = (x.to(y.dtype), y) if isinstance(a, DecodedTensor) else (x, y.to(x.dtype))
    return same(x, y)


def settings(subject: Checkpoint, other: Checkpoint) -> Check:
    """What both config.json say, under the Hub's keys, is the same, and what experts compute with is the other's default where only one says it.

    Of other keys that only one has nobody here knows the default: they are told, and do no harm.
    """
    both, family = (subject.config, other.config), subject.format.family
    found = [f"{key} is {here!r}, there {there!r}" for key, here, there in (*differing(*both), *against_default(*both, family))]
    if found:
        return Check("structure", "does not hold", "config.json", f"{found[0]} ({len(found)} key{'s' * (len(found) > 1)})", {"unequal": len(found)})
    keys = sorted(alone(*both))
    told = f"; {len(keys)} that one alone says are taken for the other's defaults: {', '.join(keys[:SHOWN])}{' …' * (len(keys) > SHOWN)}" if keys else ""
    return Check("structure", "holds", "config.json", f"what both say is the same{told}", {"unequal": 0, "alone": keys})


def compare(a: Checkpoint | str | Path, b: Checkpoint | str | Path, *, workers: int = 1, progress: Progress | None = None) -> Report:
    """Canonical values of two checkpoints, in whichever formats, their other tensors, and what both config.json say.

    `workers` and `progress` as in `verify`.
    """
    mine, theirs = (x if isinstance(x, Checkpoint) else open(x) for x in (a, b))
    theirs = alongside(mine, theirs)
    both = compared(mine, theirs)
    for _ in each_expert(mine, both.visit, "values", workers, progress):
        pass
    checks = (both.check(), others(mine, theirs), settings(mine, theirs))
    _check_unchanged(mine, theirs)
    return Report(mine.source.name, theirs.source.name, checks)


def _check_unchanged(*compared: Checkpoint | Side | None) -> None:
    for one in compared:
        if isinstance(one, Checkpoint):
            one.source.check_unchanged()

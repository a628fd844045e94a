"""What of an adapter's change is in a merged checkpoint: by expert and role, as it was stored, as it is read again, and in what the experts compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from moeglot import scratch
from moeglot.certified import stated
from moeglot.checkpoint import Checkpoint
from moeglot.checks import Check, Progress, each_expert
from moeglot.digests import CERTIFICATE, sha256
from moeglot.encoded import Encoded
from moeglot.encodings.plain import Plain
from moeglot.errors import LossRefused
from moeglot.experts import Expert, Matrix
from moeglot.floats import row_pairs, values
from moeglot.forward import LIMIT, loud_tokens
from moeglot.loss import Loss
from moeglot.merging import Change
from moeglot.misreadings import right
from moeglot.plan import Plan
from moeglot.remote import Location
from moeglot.steps import DenseUnit, ExpertUnit
from moeglot.survival import OTHERS, Survival, added
from moeglot.targets import in_floats

if TYPE_CHECKING:
    import torch

    from moeglot.adapter import Adapter

Survived = Mapping[tuple[int, int, str] | str, Survival]
"""(layer, expert, role), or the stored name of a tensor that is no expert -> what is left of its change."""
THRESHOLD = 0.9
AMPLIFIED = 20.0
"""How much larger the relative error of an output may be than that of the weights; loud tokens and clamps amplify it by up to about 5."""
AGREEMENT = 1e-3
"""Of what is read again with what was measured while writing: sums of float32 in another order."""


def survived(plan: Plan, losses: Mapping[str, Loss]) -> dict[tuple[int, int, str] | str, Survival]:
    found: dict[tuple[int, int, str] | str, Survival] = {}
    for unit in plan.units:
        for role, survival in losses[unit.key].survived.items():
            place = unit.name if isinstance(unit, DenseUnit) else (unit.step.layer, unit.expert, role)
            found[place] = survival
    return found


def role_of(place: tuple[int, int, str] | str) -> str:
    return OTHERS if isinstance(place, str) else place[2]


def sums(found: Survived, places: Iterable[tuple[int, int, str] | str] | None = None) -> dict[str, Survival]:
    """Role -> the sum over these places, by default over all."""
    total: dict[str, Survival] = {}
    for place in found if places is None else places:
        total = added(total, {role_of(place): found[place]})
    return total


def by_layer(found: Survived) -> dict[int, dict[str, Survival]]:
    layers = sorted({place[0] for place in found if not isinstance(place, str)})
    return {layer: sums(found, [place for place in found if not isinstance(place, str) and place[0] == layer]) for layer in layers}


def refuse_lost(plan: Plan, found: Mapping[str, Survival], threshold: float, written: Location | None = None) -> None:
    """Raises `LossRefused` if less than `threshold` of the change survives in some role. `written`: the folder that holds all of it, if not a sample."""
    lost = {role: survival for role, survival in found.items() if survival.change and survival.rec < threshold}
    if not lost or plan.change is None:
        return
    role, worst = min(lost.items(), key=lambda item: item[1].rec)
    steps = [step for step in plan.steps if role in step.line.roles or (role == OTHERS and not step.line.is_plain)]
    encodings = sorted({str(step.target) for step in steps}) or ["their float type"]
    ways = "; ".join(_ways_out(plan, all(isinstance(step.target, Plain) for step in steps), plan.change.rounding.kind))
    meant = "a lower --threshold, if that is meant"
    raise LossRefused(
        f"{worst.rec:.1%} of the adapter's change in {role} survives rounding to {' and '.join(encodings)}; {threshold:.0%} is the least that passes",
        f"measured on {'all that was written' if written else 'a few of its experts'}; the change is {worst.rho:.2g} of the weights",
        f"remove {written}, then {ways}; or keep it, and pass --resume with {meant}" if written else f"{ways}; or {meant}",
    )


def _ways_out(plan: Plan, plain: bool, rounding: str) -> Iterator[str]:
    exact = all(source.fits_in(Plain("BF16")) for step in plan.steps for source in step.sources)
    yield "pass --encode float32" if plain else f"pass --to {' or '.join(in_floats(plan.target))} --encode bf16{'' if exact else ' --allow-loss'}"
    if not plain and plan.target.coding and plan.target.coding.kept:
        yield "or --keep-touched bf16"
    yield "or --round " + ", ".join(kind for kind in ("stochastic", "delta", "gptq:FILE") if not kind.startswith(rounding))
    yield "or serve the adapter apart"


# --- read again ----------------------------------------------------------------------------------------------------------------------


def applied(written: Checkpoint, source: Checkpoint, adapter: Adapter, measured: Mapping[str, Survival], threads: int, progress: Progress | None) -> Check:
    """What of the change is in the output's canonical matrices, against what was measured while writing; so no wrong axis can hide in the rounding."""

    def work(layer: int, expert: int) -> dict[str, Survival]:
        before, after = right(source, layer, expert), right(written, layer, expert)
        touched = [role for role in adapter.roles(layer) if adapter.touches(layer, role, expert)]
        return {role: _between(before(role), after(role), *adapter.factors(layer, role, expert)) for role in touched}

    places = [(layer, expert) for layer in adapter.layers for expert in range(source.sizes["e"])]
    layers: dict[int, float] = {}
    total: dict[str, Survival] = {}
    for (layer, _), found in zip(places, each_expert(written, work, "change", threads, progress, places), strict=True):
        total = added(total, found)
        layers[layer] = max([layers.get(layer, 0.0), *(abs(1 - survival.rec) for survival in found.values())])
    wrong = [role for role, survival in total.items() if not abs(survival.rec - measured[role].rec) <= AGREEMENT * max(1.0, abs(measured[role].rec))]
    figures = {role: survival.as_json() for role, survival in total.items()}
    shares = ", ".join(f"{role} {survival.rec:.1%}" for role, survival in total.items())
    if wrong:
        told = ", ".join(f"{role} {measured[role].rec:.1%}" for role in total)
        return Check("values", "does not hold", "the adapter's change", f"{shares} of it is in the output; while writing it was {told}", figures, layers)
    return Check("values", "holds", "the adapter's change", f"of it is in the output: {shares}", figures, layers)


def _between(before: Encoded, after: Encoded, left: torch.Tensor, inner: torch.Tensor) -> Survival:
    """What of the change left [out, r] @ inner [r, in] lies between two matrices, some rows at a time."""
    import torch

    found, first = Survival(), 0
    for pair in row_pairs(before, after):
        w, q = (some.decode(torch.float32, scratch.empty(some.shape, torch.float32)) for some in pair)
        found += Survival.of(w, left[first : first + len(w)] @ inner, q)
        first += len(w)
    return found


def rounding(plan: Plan, losses: Mapping[str, Loss]) -> dict[tuple[int, int], float]:
    """(layer, expert) -> how far its matrices were rounded while writing, that of the worst: those that the adapter leaves alone, too."""
    found: dict[tuple[int, int], float] = {}
    for unit in plan.units:
        if isinstance(unit, ExpertUnit):
            place, loss = (unit.step.layer, unit.expert), losses[unit.key]
            found[place] = max(found.get(place, 0.0), loss.relative, *(survival.noise for survival in loss.survived.values()))
    return found


def live(written: Checkpoint, source: Checkpoint, adapter: Adapter, rounded: Mapping[tuple[int, int], float], threads: int, progress: Progress | None) -> Check:
    """What each expert of the output computes, against the base with the adapter applied beside it, unrounded.

    It may be off by what the rounding of its weights, as measured while writing, can do to an output. `rounded`: see `rounding`.
    """

    def work(layer: int, expert: int) -> tuple[float, Survival]:
        model = Expert.of(source.format.family, source.config, layer)
        base = right(source, layer, expert)
        with_adapter = _beside(adapter, layer, expert, base)
        tokens = loud_tokens(layer, expert, model, with_adapter, source.sizes["h"])
        before, wanted, found = (model.forward(tokens, matrix) for matrix in (base, with_adapter, right(written, layer, expert)))
        return float((found - wanted).norm() / wanted.norm()), Survival.of(before, wanted - before, found)

    places = [(layer, expert) for layer in adapter.layers for expert in range(source.sizes["e"])]
    layers: dict[int, float] = {}
    total, beyond = Survival(), 0
    for place, (error, survival) in zip(places, each_expert(written, work, "live", threads, progress, places), strict=True):
        layers[place[0]] = max(layers.get(place[0], 0.0), error)
        beyond += not error <= LIMIT + AMPLIFIED * rounded[place]
        total += survival
    worst = max(layers.values())
    figures = {"relative_error": worst, "rec_of_the_response": total.rec, "cosine_of_the_response": total.cosine, "beyond_rounding": beyond}
    if beyond:
        detail = f"{beyond} of {len(places)} experts are further off than rounding explains; relative error up to {worst:.2g}"
        return Check("forward", "does not hold", "against the base with the adapter beside it", detail, figures, layers)
    detail = f"relative error at most {worst:.2g}; of what the adapter does to the experts' outputs, {total.rec:.1%} is there (cosine {total.cosine:.3f})"
    return Check("forward", "holds", "against the base with the adapter beside it", detail, figures, layers)


def _beside(adapter: Adapter, layer: int, expert: int, base: Matrix) -> Matrix:
    """role -> [out, in] of the base; where the adapter touches it, float32 with the change added."""

    def matrix(role: str) -> Encoded:
        import torch

        encoded = base(role)
        if not adapter.touches(layer, role, expert):
            return encoded
        left, right = adapter.factors(layer, role, expert)
        return values(encoded.decode(torch.float32, scratch.empty(encoded.shape, torch.float32)).addmm_(left, right))

    return matrix


# --- told ----------------------------------------------------------------------------------------------------------------------------


def notes(change: Change) -> list[str]:
    """What a user must hear before a merge: doubts of whose adapter it is, and matrices that are rounded otherwise than was asked."""
    from moeglot.adapter import TENSORS_DECIDE

    adapter, said = change.adapter, change.adapter.config.raw.get("base_model_name_or_path")
    found = [reason for reason in adapter.evidence if reason.endswith(TENSORS_DECIDE)]
    if said and PurePath(str(said)).name != PurePath(adapter.base.source.name).name:
        found.append(f"the adapter says that its base is {said}, this is {adapter.base.source.name}; every tensor fits, and no file tells more")
    if _digest(adapter) in _merged_before(adapter.base):
        found.append(f"{adapter.name} is in this base already, as {CERTIFICATE} beside it says; merged again, its change is there twice")
    if missing := change.unmeasured:
        experts = sorted({(layer, expert) for layer, _, expert in missing})
        first = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:4]) + " …" * (len(experts) > 4)
        found.append(f"{len(experts)} experts were reached by no token of the measured text, and are rounded to the nearest: {first}")
    if change.rounding.kind == "gptq" and adapter.dense:
        found.append(f"{len(adapter.dense)} matrices that are no experts have no second moments, and are rounded to the nearest")
    return found


def _digest(adapter: Adapter) -> str:
    """sha256 of the file that holds its factors."""
    return sha256(next(iter(adapter.files.entries.values())).path)


def _merged_before(base: Checkpoint) -> list[str]:
    """The digests of the adapters that a base's own certificate says are in it; [] where there is none that says any."""
    try:
        adapters = stated(base.source.home, "merge").get("adapters")
    except (OSError, ValueError):
        return []
    return adapters if isinstance(adapters, list) else []


def merge_json(change: Change, found: Survived) -> dict[str, Any]:
    """The machine-readable form of a merge: what it added, and what of it survived, whole."""
    adapter = change.adapter
    experts = {place: survival for place, survival in found.items() if not isinstance(place, str)}
    return {
        "adapter": adapter.name,
        "adapters": [*_merged_before(adapter.base), _digest(adapter)],
        "base_named_by_adapter": adapter.config.raw.get("base_model_name_or_path"),
        "convention": adapter.convention.name if adapter.convention else None,
        "evidence": list(adapter.evidence),
        "notes": notes(change),
        "fell_back_to_nearest": [list(place) for place in change.unmeasured],
        "rounding": str(change.rounding),
        "survived": {role: survival.as_json() for role, survival in sums(found).items()},
        "layers": {str(layer): {role: one.as_json() for role, one in of.items()} for layer, of in by_layer(found).items()},
        "experts": [{"layer": layer, "expert": expert, "role": role, **one.as_json()} for (layer, expert, role), one in experts.items()],
        "others": {place: one.as_json() for place, one in found.items() if isinstance(place, str)},
    }

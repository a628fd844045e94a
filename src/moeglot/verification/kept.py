"""What of an adapter's change is in a merged checkpoint, by expert and role, as it was stored; what is refused for it, and what is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.encodings.plain import Plain
from moeglot.errors import LossRefused
from moeglot.files.digests import CERTIFICATE, sha256
from moeglot.files.remote import Location
from moeglot.planning.loss import Loss
from moeglot.planning.merging import Change
from moeglot.planning.plan import Plan
from moeglot.planning.steps import DenseUnit
from moeglot.planning.targets import in_floats
from moeglot.survival import OTHERS, Survival, added, percent
from moeglot.verification.certified import stated

if TYPE_CHECKING:
    from moeglot.adapters.adapter import Adapter

Survived = Mapping[tuple[int, int, str] | str, Survival]
"""(layer, expert, role), or the stored name of a tensor that is no expert -> what is left of its change."""
THRESHOLD = 0.9


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
    """Raises `LossRefused` if less than `threshold` of the change survives in some role; 0 lets everything pass.

    `written`: the folder that holds all of it, if not a sample.
    """
    lost = {role: survival for role, survival in found.items() if survival.change and max(survival.rec, 0.0) < threshold}
    if not lost or plan.change is None:
        return
    role, worst = min(lost.items(), key=lambda item: item[1].rec)
    steps = [step for step in plan.steps if role in step.line.roles or (role == OTHERS and not step.line.is_plain)]
    encodings = sorted({str(step.target) for step in steps}) or ["their float type"]
    ways = "; ".join(_ways_out(plan, all(isinstance(step.target, Plain) for step in steps), plan.change.rounding.kind))
    meant = "a lower --threshold, if that is meant"
    raise LossRefused(
        f"{percent(worst.rec)} of the adapter's change in {role} survives rounding to {' and '.join(encodings)}; {threshold:.0%} is the least that passes",
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


# --- told ----------------------------------------------------------------------------------------------------------------------------


def notes(change: Change) -> list[str]:
    """What a user must hear before a merge: doubts of whose adapter it is, and matrices that are rounded otherwise than was asked."""
    from moeglot.adapters.adapter import TENSORS_DECIDE

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

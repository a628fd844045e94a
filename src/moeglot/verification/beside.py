"""A merged checkpoint read again beside its base and the adapter, each expert once: what of the change is in its matrices, and in what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeglot import scratch
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.dense import DecodedTensor, DenseTensor
from moeglot.checks import Check, Progress, each_expert, workers_of_one_thread
from moeglot.encoded import Encoded
from moeglot.experts import SLAB, Expert, as_it_lies, relative_error
from moeglot.files.mapped import let_go
from moeglot.floats import row_pairs, values
from moeglot.planning.loss import Loss
from moeglot.planning.plan import Plan
from moeglot.planning.steps import ExpertUnit
from moeglot.survival import OTHERS, Survival, added, percent
from moeglot.verification.forward import LIMIT, loud_tokens
from moeglot.verification.kept import Survived
from moeglot.verification.misreadings import right

if TYPE_CHECKING:
    import torch

    from moeglot.adapters.adapter import Adapter

AMPLIFIED = 20.0
"""How much larger the relative error of an output may be than that of the weights; loud tokens and clamps amplify it by up to about 5."""
AGREEMENT = 1e-3
"""Of what is read again with what was measured while writing: sums of float32 in another order."""


def rounding(plan: Plan, losses: Mapping[str, Loss]) -> dict[tuple[int, int], float]:
    """(layer, expert) -> how far its matrices were rounded while writing, that of the worst: those that the adapter leaves alone, too."""
    found: dict[tuple[int, int], float] = {}
    for unit in plan.units:
        if isinstance(unit, ExpertUnit):
            place, loss = (unit.step.layer, unit.expert), losses[unit.key]
            found[place] = max(found.get(place, 0.0), loss.relative, *(survival.noise for survival in loss.survived.values()))
    return found


def read_again(
    written: Checkpoint,
    source: Checkpoint,
    adapter: Adapter,
    measured: Survived,
    rounded: Mapping[tuple[int, int], float],
    threads: int,
    progress: Progress | None,
) -> list[Check]:
    """Whether the change is in the output's matrices, and in what its experts compute. `measured`: while writing; `rounded`: see `rounding`."""

    def work(layer: int, expert: int) -> Kept:
        return Beside(written, source, adapter, layer, expert).compared()

    places = [(layer, expert) for layer in adapter.layers for expert in range(source.sizes["e"])]
    found = list(each_expert(written, work, "change", threads, progress, places))
    return [applied(found, measured), live(found, rounded)]


@dataclass(frozen=True)
class Kept:
    """Of one expert of the output: `survived`, role -> what of its change is in the canonical matrix; `error` of what it computes, relative to the base
    with the adapter beside it, unrounded; `response`, what is there of the adapter's effect on that.
    """

    layer: int
    expert: int
    survived: Mapping[str, Survival]
    error: float
    response: Survival


class Beside:
    """One expert of the base, the same with the adapter beside it, and that of the output; each matrix is decoded once for all three."""

    def __init__(self, written: Checkpoint, source: Checkpoint, adapter: Adapter, layer: int, expert: int) -> None:
        self.layer, self.expert = layer, expert
        self.source, self.adapter = source, adapter
        self.base, self.output = right(source, layer, expert), right(written, layer, expert)
        self.survived: dict[str, Survival] = {}

    def compared(self) -> Kept:
        """What all three give for the same tokens, and what was seen of the matrices on the way."""
        model = Expert.of(self.source.format.family, self.source.config, self.layer)
        tokens = loud_tokens(self.layer, self.expert, model, self.changed, self.source.sizes["h"])
        before, wanted, found = model.through(tokens.repeat(3, 1), self.linear).chunk(3)
        return Kept(self.layer, self.expert, self.survived, relative_error(found, wanted), Survival.of(before, wanted - before, found))

    def linear(self, x: torch.Tensor, role: str) -> torch.Tensor:
        """x [3 t, in]: the base's tokens, those of the base with the adapter, the output's -> [3 t, out]."""
        import torch

        _, beside, output = x.chunk(3)
        left, inner = self.adapter.factors(self.layer, role, self.expert)
        touched, survived, first = self.adapter.touches(self.layer, role, self.expert), Survival(), 0
        products: list[torch.Tensor] = []
        for pair in row_pairs(self.base(role), self.output(role), SLAB):
            w, q = map(as_it_lies, pair)
            products.append(torch.cat([x[: -len(output)] @ w.mT, output @ q.mT]))
            if touched:
                survived += Survival.of(w, left[first : first + len(w)] @ inner, q)
            first += len(w)
        if touched:
            self.survived[role] = survived
        out = torch.cat(products, -1)
        out[len(beside) : -len(output)] += (beside @ inner.mT) @ left.mT
        if (bias := f"{role}_bias") in self.source.format.family.roles:
            out[: -len(output)] += self.base(bias).decode(torch.float32)
            out[-len(output) :] += self.output(bias).decode(torch.float32)
        return out

    def changed(self, role: str) -> Encoded:
        """[out, in] of the base, with its change added in float32."""
        import torch

        encoded = self.base(role)
        left, inner = self.adapter.factors(self.layer, role, self.expert)
        return values(encoded.decode(torch.float32, scratch.empty(encoded.shape, torch.float32)).addmm_(left, inner))


def applied(found: Sequence[Kept], measured: Survived) -> Check:
    """What of the change is in each of the output's canonical matrices, against what was measured while writing; so no wrong axis can hide in the rounding."""
    layers: dict[int, float] = {}
    total: dict[str, Survival] = {}
    wrong: list[str] = []
    for one in found:
        total = added(total, one.survived)
        layers[one.layer] = max([layers.get(one.layer, 0.0), *(abs(1 - survival.rec) for survival in one.survived.values())])
        for role, survival in one.survived.items():
            if told := _otherwise(survival, measured.get((one.layer, one.expert, role))):
                wrong.append(f"layer {one.layer}, expert {one.expert}, {role}: {told}")
    figures = {role: survival.as_json() for role, survival in total.items()}
    if wrong:
        detail = f"{wrong[0]} ({len(wrong)} of {sum(len(one.survived) for one in found)} matrices)"
        return Check("values", "does not hold", "the adapter's change", detail, figures, layers)
    shares = ", ".join(f"{role} {percent(survival.rec)}" for role, survival in total.items())
    return Check("values", "holds", "the adapter's change", f"of it is in the output: {shares}", figures, layers)


def applied_to_others(written: Checkpoint, source: Checkpoint, adapter: Adapter, measured: Survived, threads: int) -> Check:
    """The same of each stored tensor that is no expert and that factors change."""
    before, after = source.decoded("F32"), written.decoded("F32")

    def work(module: str) -> dict[str, Survival]:
        found: dict[str, Survival] = {}
        for name, factors in adapter.dense[module].changes(module):
            base = values(adapter.replaced[name].entry.read()) if name in adapter.replaced else _exact(before[name])
            found = added(found, {_stored_name(after[name]): _between(base, _exact(after[name]), *factors)})
        let_go()
        return found

    stored: dict[str, Survival] = {}
    with workers_of_one_thread(threads) as pool:
        for found in pool.map(work, adapter.dense):
            stored = added(stored, found)
    wrong = [f"{name}: {told}" for name, survival in stored.items() if (told := _otherwise(survival, measured.get(name)))]
    total = sum(stored.values(), Survival())
    if wrong:
        detail = f"{wrong[0]} ({len(wrong)} of {len(stored)} tensors)"
        return Check("values", "does not hold", "the adapter's change in other modules", detail, {OTHERS: total.as_json()})
    return Check("values", "holds", "the adapter's change in other modules", f"of it is in the output: {percent(total.rec)}", {OTHERS: total.as_json()})


def _stored_name(tensor: DenseTensor) -> str:
    """Under which a change of it was measured: of the parts of a quantized matrix, that of the first."""
    return tensor.parts[tensor.encoding.parts[0].name].name if isinstance(tensor, DecodedTensor) else tensor.origin


def _exact(tensor: DenseTensor) -> Encoded:
    return tensor.exact() if isinstance(tensor, DecodedTensor) else values(tensor.read())


def _between(before: Encoded, after: Encoded, left: torch.Tensor, inner: torch.Tensor) -> Survival:
    """What of the change left [out, r] @ inner [r, in] lies between two matrices, or vectors with `in` = 1, some rows at a time."""
    import torch

    found, first = Survival(), 0
    for pair in row_pairs(before, after):
        w, q = (some.decode(torch.float32, scratch.empty(some.shape, torch.float32)) for some in pair)
        found += Survival.of(w, left[first : first + len(w)] @ inner, q)
        first += len(w)
    return found


def _otherwise(found: Survival, measured: Survival | None) -> str | None:
    """What to say of a change that is not there as it was measured while writing."""
    if measured is None:
        return "none of it was added" if found.change else None
    if abs(found.rec - measured.rec) <= AGREEMENT * max(1.0, abs(measured.rec)):
        return None
    return f"{percent(found.rec)} of it is in the output; while writing it was {percent(measured.rec)}"


def live(found: Sequence[Kept], rounded: Mapping[tuple[int, int], float]) -> Check:
    """What each expert of the output computes, against the base with the adapter applied beside it, unrounded.

    It may be off by what the rounding of its weights, as measured while writing, can do to an output. `rounded`: see `rounding`.
    """
    layers: dict[int, float] = {}
    total, beyond = Survival(), 0
    for one in found:
        layers[one.layer] = max(layers.get(one.layer, 0.0), one.error)
        beyond += not one.error <= LIMIT + AMPLIFIED * rounded[one.layer, one.expert]
        total += one.response
    worst = max(layers.values())
    figures = {"relative_error": worst, "rec_of_the_response": total.rec, "cosine_of_the_response": total.cosine, "beyond_rounding": beyond}
    if beyond:
        detail = f"{beyond} of {len(found)} experts are further off than rounding explains; relative error up to {worst:.2g}"
        return Check("forward", "does not hold", "against the base with the adapter beside it", detail, figures, layers)
    detail = f"relative error at most {worst:.2g}; of what the adapter does to the experts' outputs, {percent(total.rec)} is there (cosine {total.cosine:.3f})"
    return Check("forward", "holds", "against the base with the adapter beside it", detail, figures, layers)

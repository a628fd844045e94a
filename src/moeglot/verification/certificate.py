"""The certificate of an output: re-read from disk, verified at three levels against its source, hashed, and said in moeglot.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.checkpoints.divided import share_json
from moeglot.checks import Check, Progress, Report
from moeglot.encoded import Encoded
from moeglot.errors import BadNumbers, Contradiction, NotVerified
from moeglot.experts import Matrix
from moeglot.files.digests import CERTIFICATE, digests
from moeglot.files.remote import Location
from moeglot.files.source import TEMPLATES
from moeglot.floats import compared_dtype, row_pairs, squares
from moeglot.planning.dense_plan import left_aside
from moeglot.planning.loss import Loss
from moeglot.planning.plan import Plan
from moeglot.planning.steps import Step
from moeglot.planning.undeclared import undeclared
from moeglot.planning.units import make
from moeglot.verification.beside import AGREEMENT, applied_to_others, read_again, rounding
from moeglot.verification.certified import edited_rank, source_files
from moeglot.verification.compared import Compared, compared
from moeglot.verification.forward import checkpoint_side, forward
from moeglot.verification.kept import Survived, merge_json, survived
from moeglot.verification.misreadings import right
from moeglot.verification.unsound import unsound
from moeglot.verification.verify import others, settings, structure
from moeglot.version import __version__

SCHEMA = "moeglot/certificate/1"


@dataclass(frozen=True)
class Certificate:
    """What was converted, what it cost, and the report of its verification; written beside the output as moeglot.json."""

    out: Location
    document: Mapping[str, Any]
    report: Report
    losses: Mapping[str, Loss] = field(default_factory=dict)
    survived: Survived = field(default_factory=dict)


def certify(plan: Plan, folder: Location, losses: Mapping[str, Loss], threads: int, progress: Progress | None) -> Certificate:
    """Re-read the output from disk, verify it at all three levels, and write moeglot.json; raises `NotVerified`, or `BadNumbers`
    for what was broken before. `losses`: by unit."""
    steps, found = by_verb(plan, losses), survived(plan, losses)
    report = _verify(plan, folder, losses, steps, found, threads, progress)
    plan.check_unchanged()
    if report.exit_status == 1:
        failed = next(check for check in report.checks if check.verdict == "does not hold")
        raise NotVerified(
            f"the output does not hold: {failed.level}: {failed.detail}",
            f"it was re-read from {folder} and compared with the source",
            "report this as a bug; the folder keeps its temporary name",
        )
    document = _document(plan, folder, steps, found, report, threads)
    plan.check_unchanged()  # what was hashed is what was read
    write_json(folder / CERTIFICATE, document)
    return Certificate(folder, document, report, steps, found)


def by_verb(plan: Plan, losses: Mapping[str, Loss]) -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    for unit in plan.units:
        if unit.verb:
            found[unit.verb] = found.get(unit.verb, Loss()) + losses[unit.key]
    return found


def _verify(
    plan: Plan, folder: Location, losses: Mapping[str, Loss], steps: Mapping[str, Loss], found: Survived, threads: int, progress: Progress | None
) -> Report:
    written = open(str(folder))
    if written.format.name != plan.target.name:
        raise NotVerified(f"the output reads as {written.format.name}", f"it was written as {plan.target.name}", "report this as a bug")
    rounded = Rounded(plan, steps, losses)
    source = plan.source
    both = AsRounded(written, rounded) if rounded.steps else compared(written, source)
    side = checkpoint_side(source, both.matrix, "the source, rounded" if rounded.steps else "the source")
    computed = forward(written, side, workers=threads, progress=progress)
    dense = others(written, source, plan.change.dense if plan.change else dict)
    checks = [structure(written), both.check(), dense, settings(written, source), *computed]
    if plan.change and plan.change.adapter.layers:
        adapter = plan.change.adapter
        checks += read_again(written, source, adapter, found, rounding(plan, losses), threads, progress)
    if plan.change and plan.change.adapter.dense:
        checks.append(applied_to_others(written, source, plan.change.adapter, found, threads))
    if fault := next(unsound(written), None):
        known = f"re-read from {folder}; what is no expert is as in {plan.source.source.name}"
        raise BadNumbers(fault, known, "fetch the file again from its producer; a model with it computes nothing")
    return Report(folder.name, plan.source.source.name, tuple(checks))


class Rounded:
    """The source as the plan's encodings round it: where nothing was lost, the source itself."""

    def __init__(self, plan: Plan, verbs: Mapping[str, Loss], losses: Mapping[str, Loss]) -> None:
        self.plan = replace(plan, measures=False)
        self.lossy = {verb for verb, loss in verbs.items() if loss.changed}
        self.steps = {(step.layer, role): step for step in plan.steps if self._rounds(step) for role in step.line.roles}
        self.stated = sum((verbs[verb] for verb in self.lossy & {step.verb for step in self.steps.values()}), Loss()).relative
        self.losses = losses

    def _rounds(self, step: Step) -> bool:
        return step.verb in self.lossy or any(self.plan.merges(step, expert) for expert in range(self.plan.source.sizes["e"]))

    def matrix(self, layer: int, expert: int) -> Matrix:
        """role -> [out, in] of one expert, as the target must hold it; the roles of a stored slice are made once, if they are asked for one after the other."""
        declared = right(self.plan.source, layer, expert)
        made: Mapping[str, Encoded] = {}

        def role(name: str) -> Encoded:
            nonlocal made
            step = self.steps.get((layer, name))
            merged = step is not None and self.plan.merges(step, expert)
            if step is None or not (merged or step.verb in self.lossy):
                return declared(name)
            if name not in made:
                made = {}
                made = self._made(step, expert)
            return made[name]

        return role

    def _made(self, step: Step, expert: int) -> Mapping[str, Encoded]:
        parts, _ = make(self.plan, self.plan.unit(step, expert))
        stored = Encoded(step.target, parts, step.line.expert_shape(self.plan.source.sizes))
        return self.plan.source.split(step.line, stored)

    def otherwise(self, apart: Mapping[tuple[int, int, str], Loss]) -> list[str]:
        """The slices that lie further from the source, or closer to it, than was measured as they were written. `apart`: how far each role lies from it."""
        found: dict[tuple[str, str], Loss] = {}
        for (layer, expert, role), loss in apart.items():
            unit = self.plan.unit(self.steps[layer, role], expert)
            found[unit.place, unit.key] = found.get((unit.place, unit.key), Loss()) + loss
        told = [(place, loss.relative, self.losses[key].relative) for (place, key), loss in found.items()]
        return [f"{place}: {now:.3g}, and while writing it was {then:.3g}" for place, now, then in told if not abs(now - then) <= AGREEMENT * then]

    def only_rounded(self, role: str, layer: int, expert: int) -> bool:
        """Whether a role is the source's own numbers but for a rounding."""
        step = self.steps.get((layer, role))
        return step is not None and step.verb in self.lossy and not self.plan.merges(step, expert)


class AsRounded(Compared):
    """An output beside its source as rounded: equal to it bit for bit, and as far from the source as the certificate states."""

    def __init__(self, written: Checkpoint, rounded: Rounded) -> None:
        super().__init__(written, rounded.matrix)
        self.rounded = rounded
        self.apart: dict[tuple[int, int, str], Loss] = {}

    def compare(self, mine: Encoded, theirs: Encoded, place: tuple[int, int, str]) -> float | None:
        layer, expert, role = place
        if self.rounded.only_rounded(role, layer, expert):
            self.apart[place] = self._distance(mine, role, layer, expert)
        return super().compare(mine, theirs, place)

    def judged(self, found: Mapping[tuple[int, int, str], float | None]) -> Check:
        rounded = self.rounded
        off = [error for error in found.values() if error is not None]
        lies = {place: self.apart[place] for place in found if place in self.apart}
        worst, apart, otherwise = max(off, default=0.0), sum(lies.values(), Loss()).relative, rounded.otherwise(lies)
        rounding = ", ".join(sorted({str(step.target) for step in rounded.steps.values()}))
        of = "the source with the adapter's change" if rounded.plan.change else "the source"
        figures = {"relative_error_beyond_rounding": worst, "rounding": rounding, "relative_error": apart}
        if off or otherwise:
            detail = f"off {of} as {rounding} rounds it by {worst:.2g}; {apart:.3g} from the source, where rounding alone costs {rounded.stated:.3g}"
            detail += f"; {otherwise[0]} ({len(otherwise)} matrices)" if otherwise else ""
            return Check("values", "does not hold", "canonical tensors", detail, figures)
        detail = f"{of} as {rounding} rounds it, bit for bit" + (f"; relative error {apart:.3g}" if rounded.lossy else "")
        return Check("values", "holds", "canonical tensors", detail, figures)

    def _distance(self, written: Encoded, role: str, layer: int, expert: int) -> Loss:
        """How far a role lies from the source as it was, by canonical axes, so that no wrong axis can hide in the rounding."""
        source = self.rounded.plan.source
        declared, found = source.expert(source.format.line_of(role), layer, expert)[role], Loss()
        dtype = compared_dtype(declared, written)
        for before, after in row_pairs(declared, written):
            given = before.decode(dtype)
            found += Loss(error=squares(after.decode(dtype) - given), size=squares(given))
        return found


# --- the document --------------------------------------------------------------------------------------------------------------------


def write_json(path: Location, value: Mapping[str, Any]) -> None:
    """What UTF-8 does not hold, as a byte of a file's name or half a pair of surrogates, is an escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    path.write_text(text + "\n", encoding="utf-8")


def report_json(report: Report) -> dict[str, Any]:
    """The machine-readable form of a report."""
    checks = [
        {
            "level": c.level,
            "what": c.what,
            "verdict": c.verdict,
            "detail": c.detail,
            "figures": dict(c.figures),
            "layers": {str(n): x for n, x in c.layers.items()},
        }
        for c in report.checks
    ]
    return {"against": report.against, "verdict": report.verdict, "checks": checks}


def _document(plan: Plan, folder: Location, steps: Mapping[str, Loss], found: Survived, report: Report, threads: int) -> dict[str, Any]:
    source = plan.source
    files = source_files(source)
    templates = folder / TEMPLATES
    written = {path.name: path for path in folder.iterdir() if path.is_file() and path.name != CERTIFICATE}
    written |= {f"{TEMPLATES}/{path.name}": path for path in (templates.iterdir() if templates.is_dir() else ())}
    hashes = digests([*files.values(), *written.values()], threads)
    if edited := edited_rank(source, hashes):
        known = "it was changed after it was written; what one process holds alone, nothing else can tell"
        do = f"write its folder again; or, if the change is meant, remove {CERTIFICATE} from that folder"
        raise Contradiction(f"{edited} is not as {CERTIFICATE} beside it certifies it", known, do)
    return {
        "schema": SCHEMA,
        "moeglot": __version__,
        "source": {"format": source.format.name, "evidence": list(source.evidence), "sha256": {name: hashes[path] for name, path in files.items()}},
        "output": {
            "format": plan.target.name,
            **({"share": share_json(source)} if source.share else {}),
            "sha256": {name: hashes[path] for name, path in sorted(written.items())},
        },
        "steps": {verb: loss.as_json() for verb, loss in steps.items() if not loss.survived},
        **({"left_aside": aside} if (aside := left_aside(source)) else {}),
        **({"undeclared": gone} if (gone := list(undeclared(plan))) else {}),
        **({"merge": merge_json(plan.change, found)} if plan.change else {}),
        "verification": {**report_json(report), "against": "the source"},
    }


def read_certificate(out: Location) -> Certificate:
    """The certificate beside an output."""
    document = json.loads((out / CERTIFICATE).read_text(encoding="utf-8"))
    checks = tuple(Check(c["level"], c["verdict"], c["what"], c["detail"], c["figures"], c["layers"]) for c in document["verification"]["checks"])
    return Certificate(out, document, Report(out.name, document["verification"]["against"], checks))

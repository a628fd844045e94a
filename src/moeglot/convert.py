"""Carry out a plan: stream every unit from the source's bytes to the target's, survive being killed, verify what lies on disk, certify it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeglot.checkpoint import Checkpoint, open
from moeglot.encoding import Encoded
from moeglot.errors import LossRefused, NotVerified, OutputExists, UsageError
from moeglot.experts import Expert, Matrix
from moeglot.identify import MARK
from moeglot.layout import values as plain
from moeglot.plan import SHARD_SIZE, Plan, Step, Unit
from moeglot.plan import plan as make_plan
from moeglot.shards import allocate, forget_mappings, no_space, tensor_bytes, write_at
from moeglot.source import INDEX
from moeglot.verify import Check, Matrices, Progress, Report, difference, each_expert, forward, one_thread, others, structure, values
from moeglot.version import __version__

if TYPE_CHECKING:
    import torch

SCHEMA = "moeglot/certificate/1"
CERTIFICATE = "moeglot.json"
CHUNK = 1 << 24


@dataclass(frozen=True)
class Loss:
    """What a step did to the numbers: `changed` of `values`, their squared error and size; blocks whose bytes the values do not determine."""

    values: int = 0
    changed: int = 0
    error: float = 0.0
    size: float = 0.0
    blocks: int = 0
    undetermined: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(*(a + b for a, b in zip(self.row(), other.row(), strict=True)))

    def row(self) -> tuple[Any, ...]:
        return self.values, self.changed, self.error, self.size, self.blocks, self.undetermined

    @property
    def relative(self) -> float:
        """‖changed - original‖ / ‖original‖."""
        return float((self.error / self.size) ** 0.5) if self.size else 0.0


@dataclass(frozen=True)
class Certificate:
    """What was converted, what it cost, and the report of its verification; written beside the output as moeglot.json."""

    out: Path
    document: Mapping[str, Any]
    report: Report
    losses: Mapping[str, Loss] = field(default_factory=dict)


# --- one unit ------------------------------------------------------------------------------------------------------------------------


def make(plan: Plan, unit: Unit) -> tuple[dict[str, torch.Tensor], Loss]:
    """The bytes of a unit: part -> tensor in stored axes (one expert's slice, or a tensor that is no expert), and what was lost."""
    import torch

    if unit.step is None:
        tensors = [part.read() for part in unit.parts]
        return {"value": tensors[0] if len(tensors) == 1 else torch.cat(tensors)}, Loss()
    step, source = unit.step, plan.source
    roles = {role: source.expert(source.format.line_of(role), step.layer, unit.expert)[role] for role in step.line.roles}
    if step.moves_codes:
        return dict(step.line.join(roles).parts), Loss()
    if step.exact:
        blocks = sum(_blocks(encoded) for encoded in roles.values())
        undetermined = sum(encoded.encoding.undetermined(encoded.parts) for encoded in roles.values())
        decoded = {role: plain(encoded.decode(_dtype(step))) for role, encoded in roles.items()}
        return dict(step.target.encode(step.line.join(decoded).parts["value"])), Loss(blocks=blocks, undetermined=undetermined)
    stored = step.line.join({role: plain(_exactly(encoded)) for role, encoded in roles.items()}).parts["value"]
    coded = step.target.encode(stored)
    return coded, _loss(stored, Encoded(step.target, coded, tuple(stored.shape)))


def _dtype(step: Step) -> torch.dtype:
    from moeglot.dtypes import by_torch_name

    return by_torch_name(step.target.name).torch


def _exactly(encoded: Encoded) -> torch.Tensor:
    """Values in a float type that holds all of them: as they are if they are plain, else float32."""
    import torch

    return encoded.parts["value"] if "value" in encoded.parts else encoded.decode(torch.float32)


def _blocks(encoded: Encoded) -> int:
    scale = encoded.parts.get("scale")
    return scale.numel() if scale is not None else 0


def _loss(stored: torch.Tensor, coded: Encoded) -> Loss:
    """Compare what was given with what will be read, row block by row block."""
    import torch

    changed, error, size = 0, 0.0, 0.0
    rows = max(1, (1 << 20) // max(1, stored.shape[-1]))
    for at in range(0, stored.shape[0], rows):
        # Every encoding that loses codes whole rows, so a slice of rows is a matrix of its own.
        part = {name: tensor[at : at + rows] for name, tensor in coded.parts.items()}
        given = stored[at : at + rows].to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
        read = coded.encoding.decode(part, given.dtype)
        integer = torch.int64 if given.dtype == torch.float64 else torch.int32
        changed += int((read.view(integer) != given.contiguous().view(integer)).sum())
        error += float((read - given).square().sum(dtype=torch.float64))
        size += float(given.square().sum(dtype=torch.float64))
    return Loss(stored.numel(), changed, error, size, _blocks(coded), coded.encoding.undetermined(coded.parts))


def estimate(plan: Plan) -> Plan:
    """The plan with the relative error of each lossy step, measured on a few of its experts."""
    found: dict[str, Loss] = {}
    experts = plan.source.sizes["e"]
    layers = {plan.source.layers[n] for n in (0, len(plan.source.layers) // 2, -1)}
    for step in plan.steps:
        if not step.exact and step.layer in layers:
            _, loss = make(plan, Unit("sample", step, step.layer % experts))
            # Signs of zero and the like change bits without changing the error; what is no error at all must stay distinguishable.
            found[step.verb] = found.get(step.verb, Loss()) + loss
    return replace(plan, expected_error={verb: loss.relative or (1e-45 if loss.changed else 0.0) for verb, loss in found.items()})


# --- the work folder: OUT.partial/{journal, checkpoint/...} ----------------------------------------------------------------------------


class Work:
    """The temporary folder of one conversion; its journal says which units are on disk, so that a killed run can go on."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.files = self.folder / "checkpoint"
        self.journal = self.folder / "journal"
        self._lock = threading.Lock()

    @contextmanager
    def session(self, plan: Plan, resume: bool) -> Iterator[dict[str, Loss]]:
        """The units that are already done; holds the journal's lock while it lasts."""
        if self.out.exists() and not (resume and self.journal.exists()):
            raise OutputExists(f"{self.out} exists", "moeglot overwrites nothing", "choose another OUT, or remove it yourself")
        if self.folder.exists() and not resume:
            raise OutputExists(
                f"{self.folder} exists", "an earlier conversion to the same place did not finish", "pass --resume to go on with it, or remove it yourself"
            )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _check_space(self.folder, plan)
        self.files.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.journal, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            self._take_lock()
            done = self._read(plan)
            yield done
        finally:
            os.close(self._descriptor)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputExists(f"{self.folder} is being written", "another moeglot holds its journal", "wait for it") from error

    def _read(self, plan: Plan) -> dict[str, Loss]:
        text = self.journal.read_text(encoding="utf-8")
        lines = text.split("\n")[:-1]  # what follows the last newline was torn by a kill
        if text and not text.endswith("\n"):
            os.truncate(self.journal, len("".join(line + "\n" for line in lines).encode()))
        if not lines:
            if any(self.files.iterdir()):
                raise OutputExists(f"{self.folder} was not written by this conversion", "it has files and no journal", "remove it yourself")
            self._note({"plan": plan.digest})
            lines = [json.dumps({"plan": plan.digest})]
        if json.loads(lines[0]).get("plan") != plan.digest:
            raise OutputExists(
                f"{self.folder} belongs to another conversion", "its journal has another source, target or shard size", "repeat the first command, or remove it"
            )
        told = [json.loads(line) for line in lines[1:]]
        if {"allocated": True} not in told:
            for shard in plan.shards:
                allocate(self.files / shard.file, shard)
            self._note({"allocated": True})
        return {line["unit"]: Loss(*line["loss"]) for line in told if "unit" in line}

    def _note(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            os.write(self._descriptor, (json.dumps(line) + "\n").encode())

    def done(self, unit: Unit, loss: Loss) -> None:
        self._note({"unit": unit.key, "loss": loss.row()})

    def finish(self) -> None:
        """Give the output its name. Killed in between, a resumed run finds the journal and only cleans up."""
        forget_mappings()
        if self.files.exists():
            os.rename(self.files, self.out)
        self.journal.unlink()
        self.folder.rmdir()


def _check_space(folder: Path, plan: Plan) -> None:
    if folder.exists():
        return
    free = shutil.disk_usage(folder.parent).free
    if free < plan.nbytes:
        raise no_space(folder, plan.nbytes)


# --- a conversion ----------------------------------------------------------------------------------------------------------------------


def convert(
    source: Checkpoint | str | Path,
    to: str,
    out: str | Path,
    *,
    encode: str | None = None,
    format: str | None = None,
    allow_loss: bool = False,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Write `source` to the folder `out` in the format named `to`, verify what lies there, and certify it.

    Raises `MoeglotError`: nothing that this run did not write is touched, and what is not verified keeps its temporary name.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open(source, format)
    return carry_out(make_plan(checkpoint, to, encode=encode, shard_size=shard_size), Path(out), allow_loss, workers, resume, progress)


def default_workers() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def carry_out(
    plan: Plan, out: Path, allow_loss: bool = False, workers: int | None = None, resume: bool = False, progress: Progress | None = None
) -> Certificate:
    """Carry out a plan."""
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", "a conversion needs at least one", "pass --workers 1 or more")
    threads = workers or default_workers()
    if not allow_loss:
        _refuse_expected_loss(estimate(plan))
    work = Work(out)
    with work.session(plan, resume) as done:
        if not work.files.exists():  # killed after the rename: the output is complete and verified
            work.finish()
            return _read_certificate(out)
        try:
            losses = _stream(plan, work, done, allow_loss, threads, progress)
            _write_rest(plan, work.files)
            certificate = _certify(plan, work, losses, threads, progress)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise no_space(work.files, plan.nbytes) from error
        work.finish()
    return replace(certificate, out=out)


def _refuse_expected_loss(plan: Plan) -> None:
    if plan.lossy:
        verb = plan.lossy[0]
        raise LossRefused(
            f"to {verb} changes numbers: relative error about {plan.expected_error[verb]:.2g}",
            "measured on a few of its experts; their values do not lie on the target's grid",
            "pass --allow-loss if that is meant; the certificate will state the loss",
        )


def _stream(plan: Plan, work: Work, done: dict[str, Loss], allow_loss: bool, threads: int, progress: Progress | None) -> dict[str, Loss]:
    """Write every unit that is not on disk yet; returns what was lost, by verb."""
    files = {shard.file: os.open(work.files / shard.file, os.O_RDWR) for shard in plan.shards}
    places = {name: (files[shard.file], offset) for shard in plan.shards for name, offset in shard.offsets.items()}
    losses = dict(done)

    def run(unit: Unit) -> None:
        parts, loss = make(plan, unit)
        if loss.changed and not allow_loss:
            _refuse_loss(unit, loss)
        _write(unit, parts, places)
        work.done(unit, loss)
        losses[unit.key] = loss

    try:
        pending = [unit for unit in plan.units if unit.key not in done]
        _in_parallel(run, pending, threads, partial(_tell, progress, len(plan.units) - len(pending), len(plan.units)))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    total: dict[str, Loss] = {}
    for unit in plan.units:
        if unit.step:
            total[unit.step.verb] = total.get(unit.step.verb, Loss()) + losses[unit.key]
    return total


def _tell(progress: Progress | None, before: int, total: int, count: int) -> None:
    if progress:
        progress("writing", before + count, total)


def _in_parallel(run: Callable[[Unit], None], units: list[Unit], threads: int, tell: Callable[[int], None]) -> None:
    """A few units under way at a time; the first error stops the rest."""
    with ThreadPoolExecutor(threads, initializer=one_thread) as pool:
        waiting, under_way, finished = iter(units), set[Future[None]](), 0
        try:
            while True:
                while len(under_way) < 2 * threads and (unit := next(waiting, None)):
                    under_way.add(pool.submit(run, unit))
                if not under_way:
                    return
                ready, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in ready:
                    future.result()
                finished += len(ready)
                tell(finished)
        finally:
            for future in under_way:
                future.cancel()


def _refuse_loss(unit: Unit, loss: Loss) -> None:
    assert unit.step
    raise LossRefused(
        f"layer {unit.step.layer}, expert {unit.expert}: to {unit.step.verb} changes {loss.changed} of {loss.values} values",
        f"relative error {loss.relative:.2g}; the experts sampled while planning lost nothing, this one does",
        "pass --resume --allow-loss if that is meant; the certificate will state the loss",
    )


def _write(unit: Unit, parts: Mapping[str, torch.Tensor], places: Mapping[str, tuple[int, int]]) -> None:
    if unit.step is None:
        descriptor, offset = places[unit.key.removesuffix("|dense")]
        write_at(descriptor, tensor_bytes(parts["value"]), offset)
        return
    line = unit.step.line
    for name, key in line.keys(unit.step.layer, unit.expert).items():
        data = tensor_bytes(parts[name])
        descriptor, offset = places[key]
        write_at(descriptor, data, offset if line.per_expert else offset + unit.expert * len(data))


def _write_rest(plan: Plan, folder: Path) -> None:
    """config.json, the index, and the files that are carried over."""
    _write_json(folder / "config.json", plan.config)
    if len(plan.shards) > 1:
        weight_map = {slot.name: shard.file for shard in plan.shards for slot in shard.slots}
        total = sum(slot.nbytes for shard in plan.shards for slot in shard.slots)
        _write_json(folder / INDEX, {"metadata": {"total_size": total, MARK: plan.target.name}, "weight_map": dict(sorted(weight_map.items()))})
    for path in plan.others:
        shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- verification and certificate --------------------------------------------------------------------------------------------------------


def _certify(plan: Plan, work: Work, losses: Mapping[str, Loss], threads: int, progress: Progress | None) -> Certificate:
    """Re-read the output from disk, verify it at all three levels, and write moeglot.json; raises `NotVerified`."""
    report = _verify_output(plan, work.files, losses, threads, progress)
    document = _document(plan, work.files, losses, report)
    if report.exit_status == 1:
        failed = next(check for check in report.checks if check.verdict == "does not hold")
        raise NotVerified(
            f"the output does not hold: {failed.level}: {failed.detail}", f"it was re-read from {work.files} and compared with the source", "report this as a bug; the folder keeps its temporary name"
        )
    _write_json(work.files / CERTIFICATE, document)
    return Certificate(work.files, document, report, losses)


def _verify_output(plan: Plan, folder: Path, losses: Mapping[str, Loss], threads: int, progress: Progress | None) -> Report:
    written = open(folder)
    if written.format != plan.target:
        raise NotVerified(f"the output reads as {written.format.name}", f"it was written as {plan.target.name}", "report this as a bug")
    rounded = Rounded(plan, losses)
    side = Matrices("the source, rounded" if rounded.steps else "the source", Expert.of(plan.source.format.family, plan.source.config), rounded.matrix)
    checks = [structure(written), rounded.values(written, threads, progress), *forward(written, side, workers=threads, progress=progress), others(written, plan.source)]
    return Report(folder.name, plan.source.source.name, tuple(checks))


class Rounded:
    """The source as the plan's encodings round it: where nothing was lost, the source itself."""

    def __init__(self, plan: Plan, losses: Mapping[str, Loss]) -> None:
        self.plan = plan
        self.steps = {(step.layer, role): step for step in plan.steps if losses[step.verb].changed for role in step.line.roles}
        self.stated = sum((loss for loss in losses.values() if loss.changed), Loss()).relative

    def role(self, role: str, layer: int, expert: int) -> Encoded:
        import torch

        source = self.plan.source
        step = self.steps.get((layer, role))
        if step is None:
            return source.expert(source.format.line_of(role), layer, expert)[role]
        parts, _ = make(self.plan, Unit("again", step, expert))
        stored = Encoded(step.target, parts, step.line.expert_shape(source.sizes))
        return step.line.split(plain(stored.decode(torch.float32)))[role]

    def matrix(self, layer: int, expert: int) -> Matrix:
        import torch

        return lambda role: self.role(role, layer, expert).decode(torch.float32)

    def values(self, written: Checkpoint, threads: int, progress: Progress | None) -> Check:
        """Bit for bit equal to the source; where numbers were lost, equal to the source as rounded, and as far from it as the certificate states."""
        if not self.steps:
            return values(written, self.plan.source, workers=threads, progress=progress)

        def work(layer: int, expert: int) -> tuple[float, Loss]:
            found = {role: written.expert(written.format.line_of(role), layer, expert)[role] for role in written.format.family.roles}
            worst = max(difference(encoded, self.role(role, layer, expert)) for role, encoded in found.items())
            return worst, sum((self._distance(encoded, role, layer, expert) for role, encoded in found.items() if (layer, role) in self.steps), Loss())

        rows = list(each_expert(written, work, "values", threads, progress))
        worst, apart = max(worst for worst, _ in rows), sum((loss for _, loss in rows), Loss()).relative
        rounding = ", ".join(sorted({str(step.target) for step in self.steps.values()}))
        figures = {"relative_error_beyond_rounding": worst, "rounding": rounding, "relative_error": apart}
        if worst or not abs(apart - self.stated) <= 1e-3 * self.stated:
            detail = f"off the source as {rounding} rounds it by {worst:.2g}; {apart:.3g} from the source, where rounding alone costs {self.stated:.3g}"
            return Check("values", "does not hold", "canonical tensors", detail, figures)
        detail = f"the source as {rounding} rounds it, bit for bit; relative error {apart:.3g}"
        return Check("values", "holds", "canonical tensors", detail, figures)

    def _distance(self, written: Encoded, role: str, layer: int, expert: int) -> Loss:
        """How far a role lies from the source as it was, by canonical axes, so that no wrong axis can hide in the rounding."""
        import torch

        source = self.plan.source
        given = source.expert(source.format.line_of(role), layer, expert)[role].decode(torch.float32)
        apart = (written.decode(torch.float32) - given).square().sum(dtype=torch.float64)
        return Loss(error=float(apart), size=float(given.square().sum(dtype=torch.float64)))


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def report_json(report: Report) -> dict[str, Any]:
    """The machine-readable form of a report."""
    checks = [
        {"level": c.level, "what": c.what, "verdict": c.verdict, "detail": c.detail, "figures": dict(c.figures), "layers": dict(c.layers)} for c in report.checks
    ]
    return {"against": report.against, "verdict": report.verdict, "checks": checks}


def _document(plan: Plan, folder: Path, losses: Mapping[str, Loss], report: Report) -> dict[str, Any]:
    source = plan.source
    files = [*source.source.shards, *(p for p in [source.source.folder / "config.json"] if p.exists())]
    written = sorted(path for path in folder.iterdir() if path.name != CERTIFICATE)
    return {
        "schema": SCHEMA,
        "moeglot": __version__,
        "source": {"format": source.format.name, "evidence": list(source.evidence), "sha256": {path.name: sha256(path) for path in files}},
        "output": {"format": plan.target.name, "sha256": {path.name: sha256(path) for path in written}},
        "steps": {verb: loss_json(loss) for verb, loss in losses.items()},
        "verification": {**report_json(report), "against": "the source"},
    }


def loss_json(loss: Loss) -> dict[str, Any]:
    return {
        "exact": loss.changed == 0,
        "relative_error": loss.relative,
        "changed_values": loss.changed,
        "blocks": loss.blocks,
        "blocks_whose_scale_the_values_do_not_show": loss.undetermined,
    }


def _read_certificate(out: Path) -> Certificate:
    document = json.loads((out / CERTIFICATE).read_text(encoding="utf-8"))
    checks = tuple(Check(c["level"], c["verdict"], c["what"], c["detail"], c["figures"], c["layers"]) for c in document["verification"]["checks"])
    return Certificate(out, document, Report(out.name, document["verification"]["against"], checks))


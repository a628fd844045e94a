"""Carry out a plan: its units, here or elsewhere, all at once or in parts; then finalize, which has the output verified, certified and named."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.checkpoints.identify import written_marks
from moeglot.checks import Progress
from moeglot.conversion.carrying import AS_USUAL, Carrying
from moeglot.conversion.parts import Part, parted
from moeglot.conversion.store import Store
from moeglot.conversion.stream import Engine, stream, threads
from moeglot.conversion.work import Work
from moeglot.errors import LossRefused, MoeglotError, NotVerified, Unfinished, UsageError
from moeglot.files.direct import no_space
from moeglot.files.remote import Location, Remote, location
from moeglot.files.source import INDEX, TEMPLATES
from moeglot.files.torch_dist.writing import DistFile, finish
from moeglot.format import Format
from moeglot.planning.loss import Loss
from moeglot.planning.plan import SHARD_SIZE, Plan
from moeglot.planning.plan import plan as make_plan
from moeglot.planning.units import estimate
from moeglot.verification.certificate import Certificate, certify, read_certificate, write_json
from moeglot.verification.certified import as_certified
from moeglot.verification.kept import THRESHOLD, refuse_lost

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from moeglot.adapters.adapter import Adapter
    from moeglot.share import Asked

EVERY = 2.0
"""Seconds between two looks at the journals of all parts."""


def convert(
    source: Checkpoint | str | Path,
    to: str | Format | None,
    out: str | Path,
    *,
    encode: str | None = None,
    adapter: Adapter | str | Path | None = None,
    round: str = "nearest",
    keep_touched: str | None = None,
    convention: str | None = None,
    format: str | Format | None = None,
    threshold: float = THRESHOLD,
    allow_loss: bool = False,
    shard_size: int | str = SHARD_SIZE,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: str | None = None,
    engine: Engine | None = None,
    **ranks: Unpack[Asked],
) -> Certificate:
    """Write `source` to the folder `out` in the format named `to`, or in its own for None, verify what lies there, and certify it.

    `source`: a folder, a safetensors file, a URL, a Hub id or a Checkpoint; `format` names what it is where it does not say so itself.
    `out`: a folder that is not there yet, or the URL of one in a store.
    `encode`: how the experts' matrices [out, in] are coded there: a float type ("float32", "bfloat16", "float16"), or "mxfp4", "fp8-block", "nf4" and others
    that the page on formats lists. Without it, as the target stores them: a target in floats has the source's float type, or the one that config.json declares.
    `adapter`, `round`, `keep_touched`, `convention` and `threshold` as in `merge`; without an adapter, the others are refused.
    `allow_loss`: steps may change numbers, by as much as the certificate then states.
    `shard_size`: how many bytes of tensors a file has at most, as a number or as text in powers of 1000 ("5GB"); a larger tensor has a file of its own.
    `workers`: threads, by default one for each CPU and 8 at most; the bytes are the same with any number.
    `resume`: go on with what an interrupted run of the same arguments left in OUT.partial.
    `progress`: told (what is done, how much, of how much), in bytes while it writes, in experts while it verifies.
    `device`: where MXFP4 and FP8 are decoded, a GPU such as "cuda"; what was written is verified on the CPU all the same.
    `engine`: what carries out the units, such as `moeglot.integrations.ray.engine()`; by default threads of this process.
    `ranks`: `tp_rank`, `tp_size`, `etp_rank`, `etp_size`, `pp_rank`, `pp_size`, `ep_rank`, `ep_size` (int): what that process loads, where `to` is a state dict
    of Megatron's: of experts, layers, heads, words and rows of other matrices [rank * N / size, (rank + 1) * N / size), experts and layers numbered from 0;
    no others are read, but for a sample that tells one source from another. `padded_vocab_size`: how many rows the whole embedding has there; those beyond
    the words are zeros.

    Raises `MoeglotError`: `UsageError` for a name that is not known or what the target cannot hold, `LossRefused`, `OutputExists`, `NoSpace`, `NotVerified`,
    and what `open` raises. Nothing that this run did not write is touched, and what is not verified keeps its temporary name.
    """
    refuse_without_adapter(adapter, convention, threshold)
    checkpoint = source if isinstance(source, Checkpoint) else open(source, format)
    if isinstance(adapter, str | Path):
        from moeglot.adapters.adapter import open_adapter

        adapter = open_adapter(adapter, checkpoint, convention)
    plan = make_plan(checkpoint, to, encode=encode, adapter=adapter, round=round, keep_touched=keep_touched, shard_size=shard_size, **ranks)
    return carry_out(plan, out, Carrying(allow_loss, workers, resume, threshold, device, engine), progress)


def refuse_without_adapter(adapter: Adapter | str | Path | None, convention: str | None, threshold: float) -> None:
    """Raises `UsageError` for what says something of an adapter where there is none."""
    if adapter is None and (convention is not None or threshold != THRESHOLD):
        raise UsageError("--convention or --threshold without --adapter", "they are of an adapter that is folded in", "pass --adapter too, or leave them out")


def carry_out(plan: Plan, out: str | Path, how: Carrying = AS_USUAL, progress: Progress | None = None) -> Certificate:
    """Carry out a plan. `out`: a folder, or the URL of one in a store."""
    place = location(out)
    _refuse_inside(plan, place)
    if how.engine and isinstance(place, Remote):
        raise UsageError(
            f"OUT {place} is a URL, and other machines do the work", "shards for a store are made on the disk of this one", "name a folder that all of them see"
        )
    if plan.target.container and isinstance(place, Remote):
        raise UsageError(f"OUT {place} is a URL", "torch_dist is written in place, which a store cannot do", "write it to a disk, and copy the folder")
    if how.device:
        from moeglot.kernels import backend

        with backend.on(how.device):
            pass  # or it is refused before anything is touched
    work = Store(place) if isinstance(place, Remote) else Work(place)
    _begin(plan, how, progress)
    run = how.engine or threads(how.count, how.device)
    with work.session(plan, how.resume) as done:
        if work.renamed(plan):
            return _named(work)
        with _full_disk_told(plan, work):
            losses = stream(plan, work, done, plan.units, work.engine(run), how.allow_loss, progress)
            return _finalize(plan, work, losses, how, progress, resumed=bool(done))


def write_part(
    plan: Plan,
    out: str | Path,
    part: Part | str,
    *,
    allow_loss: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    threshold: float = THRESHOLD,
) -> Part:
    """Carry out one part of a plan, such as `"1/8"`, and nothing more: other processes write the others, at the same time or not, and then one `finalize`s.

    All of them see one file system. What an earlier run of the part has written is not written again. `progress` is told of all parts together.
    Raises as `convert` does.
    """
    part = part if isinstance(part, Part) else Part.of(part)
    work = Work(out)
    _refuse_inside(plan, work.out)
    how = Carrying(allow_loss, workers, threshold=threshold)
    _begin(plan, how, progress)
    with work.part_session(plan, part) as done, _full_disk_told(plan, work):
        stream(plan, work, done, part.units(plan), threads(how.count), allow_loss, progress and _of_all_parts(plan, work, progress))
    return part


def _of_all_parts(plan: Plan, work: Work, progress: Progress) -> Progress:
    """What is told of one part becomes what is to be told of all, by their journals."""
    nbytes = {unit.key: unit.nbytes for unit in plan.units}
    total, again = sum(nbytes.values()), 0.0

    def tell(what: str, done: int, of: int) -> None:
        nonlocal again
        if time.monotonic() >= again or done == of:
            progress(what, sum(nbytes.get(key, 0) for key in work.named()), total)
            again = time.monotonic() + EVERY

    return tell


def finalize(plan: Plan, out: str | Path, *, workers: int | None = None, progress: Progress | None = None, threshold: float = THRESHOLD) -> Certificate:
    """Once all parts of a plan are written: re-read the output, verify and certify it, and give it its name. Raises `Unfinished`, naming parts that are not."""
    work, how = Work(out), Carrying(workers=workers, threshold=threshold)
    if not work.folder.exists():
        raise Unfinished(f"no part of {out} is written", f"there is no {work.folder}", "pass --part 1/N and so on first, or neither --part nor --finalize")
    with work.session(plan, resume=True) as done:
        if work.renamed(plan):
            return _named(work)
        _refuse_unfinished(plan, work, done)
        with _full_disk_told(plan, work):
            return _finalize(plan, work, done, how, progress, resumed=True)


def _refuse_inside(plan: Plan, out: Location) -> None:
    """A folder beside those of the ranks would be taken for that of one more."""
    source = plan.source.source
    inside, folder = (place.resolve() if isinstance(place, Path) else place for place in (out.parent, source.folder))
    if source.ranks and inside == folder:
        raise UsageError(f"OUT {out} lies in the source", f"each folder in {source.name} is what one process holds", "choose an OUT elsewhere")


def _begin(plan: Plan, how: Carrying, progress: Progress | None) -> None:
    """Before a byte is written: refuse what is expected to be lost."""
    plan.check_unchanged()
    if not how.allow_loss or plan.change:
        expected = estimate(plan, progress)
        if not how.allow_loss:
            _refuse_expected_loss(expected)
        refuse_lost(plan, expected.expected_survival, how.threshold)


def _finalize(plan: Plan, work: Work | Store, losses: Mapping[str, Loss], how: Carrying, progress: Progress | None, *, resumed: bool) -> Certificate:
    losses = {unit.key: losses[unit.key] for unit in plan.units}  # in one order, so that sums of them are the same whoever wrote what
    refuse_lost(plan, sum(losses.values(), Loss()).survived, how.threshold, work.folder)
    _write_rest(plan, work.files)
    try:
        certificate = certify(plan, work.files, losses, how.count, progress)
    except NotVerified as error:
        if not resumed:
            raise
        do = f"an earlier run wrote a part of it: if its machine stopped, remove {work.folder} and begin again; else report this as a bug"
        raise NotVerified(error.wrong, error.known, do) from error
    work.give_name()
    work.clean_up()
    return replace(certificate, out=work.out)


def _named(work: Work | Store) -> Certificate:
    """Of an output that an earlier run verified, and was killed before it had cleaned up. Raises `NotVerified` unless its files are still those."""
    work.give_name()
    try:
        wrong = next((check.detail for check in as_certified(open(str(work.out))) if check.verdict != "holds"), None)
    except MoeglotError as error:
        wrong = error.wrong
    if wrong:
        raise NotVerified(
            f"{work.out} is not what was verified: {wrong}",
            "an earlier run certified it and was killed before it had cleaned up; it was changed since then, or not all of it had reached its disk",
            f"remove {work.out} and {work.folder}, and begin again",
        )
    work.clean_up()
    return read_certificate(work.out)


def _refuse_unfinished(plan: Plan, work: Work, done: Mapping[str, Loss]) -> None:
    of_each = parted(plan, work.parts_begun() or 1)
    missing = [f"{n}/{len(of_each)}" for n, units in enumerate(of_each, 1) if any(unit.key not in done for unit in units)]
    if missing:
        written = sum(unit.key in done for unit in plan.units)
        raise Unfinished(
            f"part{'s' * (len(missing) > 1)} {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not finished",
            f"the journals in {work.folder} name {written} of {len(plan.units)} units",
            f"run the command with --part {missing[0]}{' and so on' * (len(missing) > 1)}, then with --finalize; or with --resume, which does the rest here",
        )


@contextmanager
def _full_disk_told(plan: Plan, work: Work | Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise no_space(work.files, plan.nbytes) from error


def _refuse_expected_loss(plan: Plan) -> None:
    if plan.lossy:
        verb = plan.lossy[0]
        raise LossRefused(
            f"to {verb} changes numbers: {plan.expected_loss[verb].told}",
            "measured on a few of its experts; their values do not lie on the target's grid",
            "pass --allow-loss if that is meant; the certificate will state the loss",
        )


def _write_rest(plan: Plan, folder: Location) -> None:
    """config.json, the index, and the files that are carried over."""
    write_json(folder / "config.json", plan.config)
    if plan.target.container:
        assert isinstance(folder, Path)
        finish(folder, tuple(shard for shard in plan.shards if isinstance(shard, DistFile)))
    elif len(plan.shards) > 1:
        weight_map = {slot.name: shard.file for shard in plan.shards for slot in shard.slots}
        total = sum(slot.nbytes for shard in plan.shards for slot in shard.slots)
        marks = written_marks(plan.target, plan.source.share, plan.source.source)
        write_json(folder / INDEX, {"metadata": {"total_size": total, **marks}, "weight_map": dict(sorted(weight_map.items()))})
    for path in plan.others:
        into = folder / TEMPLATES if path.parent.name == TEMPLATES else folder
        if isinstance(path, Path) and isinstance(into, Path):
            into.mkdir(exist_ok=True)
            shutil.copyfile(path, into / path.name)
        else:
            (into / path.name).write_bytes(path.read_bytes())

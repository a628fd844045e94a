"""Whether what lies at OUT is the output of a plan, on a disk or in a store; and the refusals of what lies at OUT or in OUT.partial."""

from __future__ import annotations

from moeglot.errors import OutputExists
from moeglot.files.digests import CERTIFICATE, sha256
from moeglot.files.remote import Location
from moeglot.planning.plan import Plan
from moeglot.verification.certified import made_of


def is_output_of(plan: Plan, out: Location, noted: str | None) -> bool:
    """`noted`: the sha256 of its certificate, if a journal of this plan has that. If none does, the certificate says of what `out` was made; what was
    merged, it does not say well enough.
    """
    if noted:
        certificate = out / CERTIFICATE
        return certificate.is_file() and sha256(certificate) == noted
    return plan.change is None and made_of(plan.source, out, {shard.file: shard.header for shard in plan.shards})


def there_already(out: Location) -> OutputExists:
    return OutputExists(f"{out} exists", "moeglot overwrites nothing", "choose another OUT, or remove it yourself")


def not_finished(folder: Location, locked: bool = True) -> OutputExists:
    """A work folder, and nobody said --resume. `locked`: had somebody been writing it, a lock would have said so."""
    known = "an earlier conversion to the same place did not finish" + ("" if locked else ", or goes on now: a store has no locks that would tell")
    return OutputExists(f"{folder} exists", known, "pass --resume to go on with it, or remove it yourself" + ("" if locked else "; if it goes on, wait for it"))


def being_written(folder: Location, held: str) -> OutputExists:
    """A work folder in which another process holds the lock of this journal, which it loses when it ends, however it ends."""
    known = f"another moeglot holds its {held}, so it works there now"
    return OutputExists(f"{folder} is being written", known, "wait for it, or choose another OUT")


def of_another(folder: Location) -> OutputExists:
    """A work folder whose journal has the digest of another plan."""
    known = "its journal has another source, target, adapter, rounding or shard size"
    return OutputExists(f"{folder} belongs to another conversion", known, "repeat the first command, or remove it")


def damaged(path: Location, why: object) -> OutputExists:
    """A file of the work folder does not say what we write there."""
    return OutputExists(f"{path}: this journal is damaged", str(why), "remove the folder that it lies in, and begin again")

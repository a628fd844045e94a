"""An output in a store, which takes files whole: each shard is made on this machine's disk and uploaded, and what lies in OUT.partial gets its name at the end.

As on a disk, OUT.partial/journal says what is there: one object for each shard that was uploaded, with the losses of its units. OUT.partial/plan is there
before anything else, and says whose all that is. A store has no locks.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeglot.conversion.outputs import damaged, is_output_of, not_finished, of_another, there_already
from moeglot.conversion.stream import Engine
from moeglot.conversion.work import losses
from moeglot.errors import OutputError, OutputExists
from moeglot.files.digests import CERTIFICATE, sha256
from moeglot.files.direct import allocate
from moeglot.files.remote import Remote
from moeglot.planning.loss import Loss
from moeglot.planning.plan import Plan
from moeglot.planning.steps import Unit


class Store:
    """The temporary folder of one conversion in a store; used as `Work` is."""

    def __init__(self, out: Remote) -> None:
        self.out = Remote(out.url.rstrip("/"))
        self.folder = Remote(self.out.url + ".partial")
        self.files, self.journal, self.begun = self.folder / "checkpoint", self.folder / "journal", self.folder / "plan"
        self._verified: bool | None = None

    def renamed(self, plan: Plan) -> bool:
        """An earlier run of this plan had its output verified, and was killed while it gave it its name."""
        if self._verified is None:
            self._verified = self.folder.exists() and self._certified(plan)
        return self._verified

    def _certified(self, plan: Plan) -> bool:
        """Journals of this plan say that the certificate that waits is its own; of one that has its name, see `is_output_of`."""
        told, noted = bool(self._told()), self._noted().get("certified")
        if self.files.files():
            return told and (self.files / CERTIFICATE).exists()
        if plan.change and not noted:  # an older moeglot noted none
            return told and (self.out / CERTIFICATE).exists()
        return is_output_of(plan, self.out, noted)

    @contextmanager
    def session(self, plan: Plan, resume: bool) -> Iterator[dict[str, Loss]]:
        """The units all of whose shards are uploaded."""
        self._digest = plan.digest
        if self.folder.exists():
            if not resume:
                raise not_finished(self.folder, locked=False)
            self._check_ours(plan)
        if self.out.exists() and not self.renamed(plan):
            raise there_already(self.out)
        self._losses = {} if self.renamed(plan) else self._read()
        shards = shards_of(plan)
        yield {key: loss for key, loss in self._losses.items() if shards[key] <= self._uploaded}

    def _told(self) -> dict[str, dict[str, Any]]:
        """Shard -> what its journal says."""
        if not self.journal.exists():
            return {}
        return {path.name.removesuffix(".json"): _said(path) for path in self.journal.iterdir()}

    def _check_ours(self, plan: Plan) -> None:
        said = [*self._told().values(), *filter(None, [self._noted()])]
        if not said and self.files.files():
            raise OutputExists(f"{self.folder} has files and no journal", "it may be somebody else's", "remove it yourself, or choose another OUT")
        if any(one["plan"] != plan.digest for one in said):
            raise of_another(self.folder)

    def _noted(self) -> dict[str, str]:
        """Whose the folder is, and the digest of the certificate once files get their names; nothing in a folder that an older moeglot began."""
        if not self.begun.exists():
            return {}
        try:
            found = json.loads(self.begun.read_text())
            return {"plan": str(found["plan"]), "certified": str(found.get("certified", ""))}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise damaged(self.begun, f"{type(error).__name__}: {error}") from error

    def _note(self, certified: str = "") -> None:
        self.begun.write_text(json.dumps({"plan": self._digest, "certified": certified}))

    def _read(self) -> dict[str, Loss]:
        found: dict[str, Loss] = {}
        self._uploaded: set[str] = set()
        for file, said in self._told().items():
            found |= losses(self.journal / f"{file}.json", said["units"].items())
            self._uploaded.add(file)
        return found

    def done(self, unit: Unit, loss: Loss) -> None:
        """Noted when its shard is uploaded."""

    def engine(self, inner: Engine) -> Engine:
        """An engine that has another one make the shards on a disk, in their order, and uploads each; a unit in two shards is made once, and a file stays until
        it is whole.
        """

        def run(plan: Plan, folder: Path | Remote, units: Sequence[Unit], allow_loss: bool) -> Iterator[tuple[Unit, Loss]]:
            touched, made = shards_of(plan), dict(self._losses)
            here, noted = set[str](), bool(self._uploaded or self._noted())
            with tempfile.TemporaryDirectory(prefix="moeglot-") as name:
                disk, allocated = Path(name), set[str]()
                for shard in plan.shards:
                    if shard.file in self._uploaded:
                        continue
                    mine = [unit for unit in units if shard.file in touched[unit.key] and unit.key not in here]
                    needed = {file for unit in mine for file in touched[unit.key]} | {shard.file}
                    for one in plan.shards:
                        if one.file in needed - allocated:
                            allocate(disk / one.file, one)
                            allocated.add(one.file)
                    for unit, loss in inner(plan, disk, mine, allow_loss):
                        made[unit.key] = loss
                        here.add(unit.key)
                        yield unit, loss
                    if not noted:
                        self._note()
                        noted = True
                    (self.files / shard.file).upload(disk / shard.file)
                    rows = {unit.key: made[unit.key].row() for unit in plan.units if shard.file in touched[unit.key]}
                    (self.journal / f"{shard.file}.json").write_text(json.dumps({"plan": plan.digest, "units": rows}))
                    (disk / shard.file).unlink()

        return run

    def give_name(self) -> None:
        """To each file, the certificate last. Killed in between, a resumed run goes on with that."""
        if (waiting := self.files / CERTIFICATE).exists():
            self._note(sha256(waiting))
        for path in sorted(self.files.files(), key=lambda path: path.name == CERTIFICATE):
            path.move(self.out / path.url.removeprefix(f"{self.files.url}/"))
        if left := self.files.files():
            raise OutputError(f"{left[0]} was not moved to {self.out}", f"so says the store, of {len(left)} files", "pass --resume to go on")

    def clean_up(self) -> None:
        self.folder.remove()


def _said(path: Remote) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return {"plan": str(found["plan"]), "units": dict(found["units"])}
    except (ValueError, TypeError, LookupError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def shards_of(plan: Plan) -> dict[str, set[str]]:
    """Unit -> the files that have some of its bytes."""
    file_of = {name: shard.file for shard in plan.shards for name in shard.pieces}
    return {unit.key: {file_of[name] for name in unit.outputs} for unit in plan.units}

"""The work folder of one conversion, OUT.partial/{journal, checkpoint/...}: its journals say what is on disk, so that a killed run can go on, and parts add up.

Whoever does all of it holds `journal` alone. Parts hold it together, have a journal of their own each, `journal-1-of-8`, and prepare the folder one at a time,
under the lock of `parts`, which says how many they are.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeglot.conversion.outputs import being_written, damaged, is_output_of, not_finished, of_another, there_already
from moeglot.conversion.parts import Part
from moeglot.conversion.stream import Engine
from moeglot.errors import OutputError, OutputExists, UsageError
from moeglot.files.digests import CERTIFICATE, sha256
from moeglot.files.direct import File, allocate, flush, no_space
from moeglot.files.mapped import forget_mappings
from moeglot.files.remote import Location, local_only
from moeglot.planning.loss import Loss
from moeglot.planning.plan import Plan
from moeglot.planning.steps import Unit
from moeglot.verification.certified import begins

JOURNAL = re.compile(r"journal-\d+-of-\d+")
HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
"""How the system says that another process has a lock."""


class Work:
    """The temporary folder of one conversion; its journal says which units are on disk, so that a killed run can go on."""

    def __init__(self, out: str | Path) -> None:
        self.out = out = local_only(out, "OUT")
        if out.name in ("", ".."):
            raise OutputExists(f"{out} exists", "moeglot overwrites nothing", "name a folder that is not there yet")
        self.folder = out.with_name(out.name + ".partial")
        self.files = self.folder / "checkpoint"
        self.journal = self.folder / "journal"
        self.parts = self.folder / "parts"
        self._lock = threading.Lock()
        self._made: bool | None = None

    def renamed(self, plan: Plan) -> bool:
        """An earlier run of this plan gave the output its name and was killed before it had cleaned up."""
        if self.files.exists() or not (self.folder.is_dir() and os.path.lexists(self.out)):
            return False
        told = _lines(self.journal) if self.journal.is_file() else []
        if not told:  # killed at its very end; or the folder is anybody's, and so is OUT
            if self._made is None:
                self._made = is_output_of(plan, self.out, None)
            return self._made
        noted = [line["certified"] for line in told if "certified" in line]
        return bool(noted) and is_output_of(plan, self.out, noted[-1])

    @contextmanager
    def session(self, plan: Plan, resume: bool) -> Iterator[dict[str, Loss]]:
        """The units that are already done; holds the journal's lock while it lasts."""
        if os.path.lexists(self.folder):
            if not resume:
                self._refuse_written()
                raise not_finished(self.folder)
            self._check_ours(plan)
        if not self.renamed(plan):
            self._refuse_output()
            self._make_folder(plan)
        with self._journal(self.journal, fcntl.LOCK_EX) as self._descriptor:
            yield {} if self.renamed(plan) else self._prepare(plan) | self._of_parts()

    @contextmanager
    def part_session(self, plan: Plan, part: Part) -> Iterator[dict[str, Loss]]:
        """The units that are already done, by whichever part; other parts may have theirs at the same time."""
        if os.path.lexists(self.folder):
            self._check_ours(plan)
        self._refuse_output()
        self._make_folder(plan)
        with self._journal(self.journal, fcntl.LOCK_SH) as self._descriptor:
            with _locked(self.parts) as said:
                self._check_ours(plan)
                self._refuse_output()  # it may have got its name meanwhile
                if said and self.parts_begun() != part.count:
                    raise OutputExists(
                        f"{self.folder} was begun in {said} parts", f"this is part {part}", f"pass --part i/{said}, or --resume for all the rest"
                    )
                done = self._prepare(plan)
                self.parts.write_text(str(part.count))
            own = self.folder / f"journal-{part.number}-of-{part.count}"
            with self._journal(own, fcntl.LOCK_EX) as self._descriptor:
                _whole(own)
                yield done | self._of_parts()

    @contextmanager
    def _journal(self, path: Path, how: int) -> Iterator[int]:
        """A journal, open and locked."""
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            self._hold(descriptor, how, path.name)
            yield descriptor
        finally:
            os.close(descriptor)

    def _hold(self, descriptor: int, how: int, name: str) -> None:
        """Raises `OutputExists` where another process has it, and `OutputError` where nobody can."""
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise being_written(self.folder, name) from error
            known = f"without one, two runs may write the same files; the system says: {error.strerror}"
            raise OutputError(f"{self.folder} lies where no file can be locked", known, "choose an OUT on another disk, and copy it from there") from error

    def _refuse_written(self) -> None:
        """Raises `OutputExists` where another process writes all of it or a part; each journal is locked for a moment, beside others who only look."""
        for path in (self.journal, *sorted(self.folder.glob("journal-*"))):
            if path.is_file():
                with path.open("rb") as file:
                    self._hold(file.fileno(), fcntl.LOCK_SH, path.name)

    def parts_begun(self) -> int | None:
        """How many parts the work was divided into; None if it was not."""
        said = self.parts.read_text(errors="replace") if self.parts.exists() else ""
        if said and not said.isdecimal():
            raise damaged(self.parts, f"it should be the number of parts, and says {said[:40]!r}")
        return int(said or 0) or None

    def named(self) -> set[str]:
        """The units that some journal names by now."""
        return {*_units(self.journal, _lines(self.journal)), *self._of_parts()}

    def _of_parts(self) -> dict[str, Loss]:
        """What the journals of the parts name; a line that is being written is no line yet."""
        return {unit: loss for path in sorted(self.folder.glob("journal-*")) for unit, loss in _units(path, _lines(path)).items()}

    def _check_ours(self, plan: Plan) -> None:
        """Touches nothing; raises `OutputExists` unless the folder is what a run of this plan leaves when it is killed."""

        def foreign(why: str) -> OutputExists:
            return OutputExists(f"{self.folder} was not written by moeglot", why, "remove it yourself, or choose another OUT")

        if self.folder.is_symlink() or not self.folder.is_dir():
            raise foreign("it is no folder")
        ours = {self.journal.name, self.files.name, self.parts.name}
        if others := sorted(name for path in self.folder.iterdir() if (name := path.name) not in ours and not JOURNAL.fullmatch(name)):
            raise foreign(f"it holds {others[0]}")
        text = self.journal.read_text(encoding="utf-8", errors="replace") if self.journal.is_file() else ""
        if not text and self.files.exists() and any(self.files.iterdir()):
            raise foreign("it has files and no journal")
        if "\n" not in text:  # killed before the first line was whole
            if text and not json.dumps({"plan": plan.digest}).startswith(text):
                raise foreign("its journal is not one of ours")
            return
        try:
            said = json.loads(text.split("\n")[0])["plan"]
        except (ValueError, TypeError, KeyError) as error:
            raise foreign("its journal is not one of ours") from error
        if said != plan.digest:
            raise of_another(self.folder)

    def _refuse_output(self) -> None:
        if os.path.lexists(self.out):
            raise there_already(self.out)

    def _make_folder(self, plan: Plan) -> None:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.out.parent} cannot be made", str(error), "choose another OUT") from error
        free = shutil.disk_usage(self.out.parent).free
        if free < plan.nbytes and not self.folder.exists():
            raise no_space(self.folder, plan.nbytes, started=False)
        self.folder.mkdir(exist_ok=True)

    def _prepare(self, plan: Plan) -> dict[str, Loss]:
        """Have the journal begin as it must, and the files at their full size; returns the units that it names."""
        told = _whole(self.journal)
        self.files.mkdir(exist_ok=True)
        if not told:
            self._note({"plan": plan.digest})
        if {"allocated": True} not in told:
            for shard in plan.shards:
                allocate(self.files / shard.file, shard)
            self._note({"allocated": True})
        elif lost := next((path for shard in plan.shards if not _whole_file(path := self.files / shard.file, shard)), None):
            known = "its journal says that all files were there at their full size; what else is gone from it, nothing says"
            raise OutputExists(f"{lost} is missing, or is not as long as it was", known, f"remove {self.folder} and begin again")
        return _units(self.journal, told)

    def _note(self, line: Mapping[str, Any]) -> None:
        data = memoryview((json.dumps(line) + "\n").encode())
        with self._lock:
            while data:  # a nearly full disk takes a part
                data = data[os.write(self._descriptor, data) :]

    def engine(self, run: Engine) -> Engine:
        """It writes into the output's files as they lie here."""
        return run

    def done(self, unit: Unit, loss: Loss) -> None:
        self._note({"unit": unit.key, "loss": loss.row()})

    def give_name(self) -> None:
        """To the output, of which every byte is on the disk by then. Killed after it, a resumed run finds the journal, and only looks and cleans up."""
        forget_mappings()
        if not self.files.exists():
            return
        if os.path.lexists(self.out):
            raise OutputExists(
                f"{self.out} exists",
                f"it appeared meanwhile; the verified output waits in {self.files}",
                "remove it and pass --resume, or choose another OUT",
            )
        for path in (*self.files.rglob("*"), self.files):
            flush(path)
        self._note({"certified": sha256(self.files / CERTIFICATE)})
        os.fsync(self._descriptor)
        os.rename(self.files, self.out)
        flush(self.out.parent)

    def clean_up(self) -> None:
        for path in sorted(self.folder.iterdir(), key=lambda path: path == self.journal):  # it goes last: it says whose the folder is
            path.unlink()
        self.folder.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[str]:
    """What a file says, while nobody else who asks may; waits for whoever has it."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file.read()


def _whole_file(path: Path, shard: File) -> bool:
    return begins(path, shard.header) and path.stat().st_size == shard.nbytes


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; what follows the last newline was torn by a kill, or is being written."""
    try:
        text = path.read_text(encoding="utf-8")
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise damaged(path, error) from error
    if strange := [line for line in found if not isinstance(line, dict)]:
        raise damaged(path, f"it says {strange[0]}")
    return found


def _whole(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal whose lock we hold; what a kill tore is cut off."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    return _lines(path)


def _units(path: Path, lines: list[dict[str, Any]]) -> dict[str, Loss]:
    return losses(path, [(line["unit"], line.get("loss")) for line in lines if "unit" in line])


def losses(path: Location, rows: Iterable[tuple[str, Any]]) -> dict[str, Loss]:
    """What a journal at `path` says of units."""
    try:
        return {unit: Loss.of_row(row) for unit, row in rows}
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise damaged(path, f"of a unit, {type(error).__name__}: {error}") from error

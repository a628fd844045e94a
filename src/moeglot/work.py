"""The work folder of one conversion, OUT.partial/{journal, checkpoint/...}: its journal says what is on disk, so that a killed run can go on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeglot.direct import allocate, no_space
from moeglot.errors import OutputExists
from moeglot.loss import Loss
from moeglot.plan import Plan, Unit
from moeglot.shards import forget_mappings


class Work:
    """The temporary folder of one conversion; its journal says which units are on disk, so that a killed run can go on."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.files = self.folder / "checkpoint"
        self.journal = self.folder / "journal"
        self._lock = threading.Lock()

    def renamed(self, plan: Plan) -> bool:
        """An earlier run of this plan gave the output its name and was killed before it had cleaned up."""
        if self.files.exists() or not (self.folder.is_dir() and os.path.lexists(self.out)):
            return False
        return self.journal.is_file() or all(_begins(self.out / shard.file, shard.header) for shard in plan.shards)

    @contextmanager
    def session(self, plan: Plan, resume: bool) -> Iterator[dict[str, Loss]]:
        """The units that are already done; holds the journal's lock while it lasts."""
        if os.path.lexists(self.folder):
            if not resume:
                raise OutputExists(
                    f"{self.folder} exists", "an earlier conversion to the same place did not finish", "pass --resume to go on with it, or remove it yourself"
                )
            self._check_ours(plan)
        if os.path.lexists(self.out) and not self.renamed(plan):
            raise OutputExists(f"{self.out} exists", "moeglot overwrites nothing", "choose another OUT, or remove it yourself")
        if not self.renamed(plan):
            self._make_folders(plan)
        self._descriptor = os.open(self.journal, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            self._take_lock()
            yield {} if self.renamed(plan) else self._read(plan)
        finally:
            os.close(self._descriptor)

    def _check_ours(self, plan: Plan) -> None:
        """Touches nothing; raises `OutputExists` unless the folder is what a run of this plan leaves when it is killed."""

        def foreign(why: str) -> OutputExists:
            return OutputExists(f"{self.folder} was not written by moeglot", why, "remove it yourself, or choose another OUT")

        if self.folder.is_symlink() or not self.folder.is_dir():
            raise foreign("it is no folder")
        if others := sorted({path.name for path in self.folder.iterdir()} - {self.journal.name, self.files.name}):
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
            raise OutputExists(
                f"{self.folder} belongs to another conversion", "its journal has another source, target or shard size", "repeat the first command, or remove it"
            )

    def _make_folders(self, plan: Plan) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.out.parent).free
        if free < plan.nbytes and not self.folder.exists():
            raise no_space(self.folder, plan.nbytes, started=False)
        self.files.mkdir(parents=True, exist_ok=True)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputExists(f"{self.folder} is being written", "another moeglot holds its journal", "wait for it") from error

    def _read(self, plan: Plan) -> dict[str, Loss]:
        text = self.journal.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # what follows the last newline was torn by a kill
        if whole != text:
            os.truncate(self.journal, len(whole.encode()))
        if not whole:
            self._note({"plan": plan.digest})
        told = [json.loads(line) for line in whole.splitlines()[1:]]
        if {"allocated": True} not in told:
            for shard in plan.shards:
                allocate(self.files / shard.file, shard)
            self._note({"allocated": True})
        return {line["unit"]: Loss.of_row(line["loss"]) for line in told if "unit" in line}

    def _note(self, line: Mapping[str, Any]) -> None:
        data = memoryview((json.dumps(line) + "\n").encode())
        with self._lock:
            while data:  # a nearly full disk takes a part
                data = data[os.write(self._descriptor, data) :]

    def done(self, unit: Unit, loss: Loss) -> None:
        self._note({"unit": unit.key, "loss": loss.row()})

    def finish(self) -> None:
        """Give the output its name. Killed in between, a resumed run finds the journal and only cleans up."""
        forget_mappings()
        if self.files.exists():
            if os.path.lexists(self.out):
                raise OutputExists(
                    f"{self.out} exists",
                    f"it appeared meanwhile; the verified output waits in {self.files}",
                    "remove it and pass --resume, or choose another OUT",
                )
            os.rename(self.files, self.out)
        self.journal.unlink()
        self.folder.rmdir()


def _begins(path: Path, header: bytes) -> bool:
    """The file is there and has this header."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header

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

from moeglot.errors import OutputExists
from moeglot.loss import Loss
from moeglot.plan import Plan, Unit
from moeglot.shards import allocate, forget_mappings, no_space


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

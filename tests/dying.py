"""A moeglot that kills itself with SIGKILL at its n-th effect on the disk: before a file is made, renamed or removed, in the middle of a write.

Run as a script it reads {"argv": [...], "under": folder, "at": n or null} line by line and answers each with {"status": ..., "effects": ...}: the return
code of a fresh process that ran the command line on argv (-9: killed), and how many effects it had on what lies in `under`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

EVENTS = {"os.mkdir": 0, "os.rename": 0, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0, "shutil.copyfile": 1}
"""Audit event -> which of its arguments is the path, for what Python announces before it does it."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Effects:
    """Counts what this process does to the files under a folder; dies at number `at`."""

    def __init__(self, under: str, at: int | None) -> None:
        self.under, self.at, self.count = under, at, 0
        self._lock = threading.Lock()
        sys.addaudithook(self._announced)
        for name in ("write", "pwrite"):
            setattr(os, name, self._torn(getattr(os, name)))
        os.posix_fallocate = self._dies_first(os.posix_fallocate)

    def _is_last(self) -> bool:
        with self._lock:
            self.count += 1
            return self.count == self.at

    def _announced(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & WRITING:
            path = arguments[0]
        elif event in EVENTS:
            path = arguments[EVENTS[event]]
        else:
            return
        if os.path.abspath(path).startswith(self.under) and self._is_last():
            _die()

    def _torn(self, write: Callable[..., int]) -> Callable[..., int]:
        def half(descriptor: int, data: bytes, *offset: int) -> int:
            if self._is_last():
                write(descriptor, data[: len(data) // 2], *offset)
                _die()
            return write(descriptor, data, *offset)

        return half

    def _dies_first(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def last(*arguments: Any) -> Any:
            if self._is_last():
                _die()
            return function(*arguments)

        return last


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _child(job: dict[str, Any], answer: int) -> None:
    from moeglot.cli import main as cli

    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    sys.argv = ["moeglot", *job["argv"]]
    report = os.fdopen(answer, "w")
    effects, status = Effects(job["under"], job["at"]), 0
    try:
        cli.main()
    except SystemExit as error:
        status = int(error.code or 0)
    report.write(str(effects.count))
    report.close()
    os._exit(status)


def _serve() -> None:
    """Everything is imported once and no thread is started, so that a fork is a fresh process that need not import torch again."""
    for name in ("torch", "einops", "moeglot.cli.main", "moeglot.kernels.mxfp4"):
        importlib.import_module(name)
    for line in sys.stdin:
        reading, writing = os.pipe()
        if not (process := os.fork()):
            os.close(reading)
            _child(json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading) as report:
            effects = int(report.read() or 0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps({"status": status, "effects": effects}), flush=True)


if __name__ == "__main__":
    _serve()

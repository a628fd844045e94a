"""The command line as tests call it: in a process of its own, or here for its JSON."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

RUN = [sys.executable, "-m", "moeglot.cli.main"]


def run(*arguments, status: int = 0) -> subprocess.CompletedProcess:
    found = subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True)
    assert found.returncode == status, (found.stdout, found.stderr)
    return found


def told(*arguments, status: int = 0) -> dict:
    """What --json prints, in this process: a new one imports torch anew."""
    from moeglot.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["moeglot", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code or 0) == status, (out.getvalue(), err.getvalue())
    return json.loads(out.getvalue())

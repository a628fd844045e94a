"""No number depends on what torch's default dtype or default device happens to be, in this process or in another thread of it: bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import default_steps
import pytest

OTHERS = ("bfloat16", "float16", "float64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("default")
    default_steps.prepare(found)
    return found


@cache
def under(folder: Path, default: str, *steps: str) -> dict[str, dict[str, str]]:
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, default_steps.__file__, str(folder), default, *steps], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{default}, {' '.join(steps)}: exit {done.returncode}\n{done.stderr[-2000:]}"
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("default", [*OTHERS, "changing", "meta"])
def test_a_default_changes_no_bit(default, folder):
    """While it is another, and what is kept for the life of the process once it is torch's own again: one process a default, whatever step asks first."""
    expected, found = (under(folder, one, "coded", "files", "modules") for one in ("float32", default))
    for when in ("during", "after"):
        assert expected[when]
        assert not [name for name, bits in expected[when].items() if "Error" in bits]
        wrong = {name: found[when][name] for name, bits in expected[when].items() if found[when][name] != bits}
        assert not wrong, f"{when}: {len(wrong)} of {len(expected[when])}: {wrong}"

"""What a process that has another default of torch's makes of the same steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import default_steps


def under(folder: Path, default: str, *steps: str) -> dict[str, dict[str, str]]:
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, default_steps.__file__, str(folder), default, *steps], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{default}, {' '.join(steps)}: exit {done.returncode}\n{done.stderr[-2000:]}"
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found

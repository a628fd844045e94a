"""What a command shows on a terminal: a pseudo-terminal of Linux's, read to its end."""

import os
import pty
import subprocess
from collections.abc import Sequence
from pathlib import Path


def shown(command: Sequence[str | Path], kind: str, columns: int, errors: bool = True) -> bytes:
    """Both outputs of a command that must end well, or without `errors` standard output alone. `kind`: what TERM says."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": kind, "COLUMNS": str(columns)}
    process = subprocess.Popen(command, stdout=follower, stderr=follower if errors else subprocess.DEVNULL, env=environment)
    os.close(follower)
    found = b""
    try:
        while chunk := os.read(leader, 4096):
            found += chunk
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    return found

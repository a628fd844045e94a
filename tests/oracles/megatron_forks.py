"""Runs `megatron_cpu.main` as a program would, in forks of one process that has imported megatron-core already: its import takes longer than what is asked."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
TOGETHER = 300
"""Seconds for all processes of a run."""


def run(arguments: list[str | Path], processes: int, told: Path) -> None:
    """As torchrun starts `processes` of them; raises with the end of what they said, which goes to `told`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_cpu"])
    places = [str(HERE), *(path for path in sys.path if path)]
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(places), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}):
        multiprocessing.forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = [context.Process(target=_become, args=(rank, processes, port, [*map(str, arguments)], str(told))) for rank in range(processes)]
    for process in found:
        process.start()
    for process in found:
        process.join(TOGETHER)
        process.kill()
    assert [process.exitcode for process in found] == [0] * processes, told.read_text()[-4000:]


def _become(rank: int, processes: int, port: int, arguments: list[str], told: str) -> None:
    file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    import megatron_cpu

    megatron_cpu.main(arguments)

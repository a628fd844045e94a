"""What Ray costs: its start, and the same conversion on threads of one process and as tasks of a cluster, with and without a worker that is killed.

python benchmarks/ray.py [--experts 16] [--workers 2]: a gpt-oss layer of real size in MXFP4 to BF16; the results go to benchmarks/results/ray.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent / "tests"), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]  # this file is called as the library is

import ray  # noqa: E402
import torch  # noqa: E402
from synthetic import write_checkpoint  # noqa: E402

import moeglot  # noqa: E402
from moeglot.conversion.convert import threads  # noqa: E402
from moeglot.conversion.stream import Engine  # noqa: E402
from moeglot.conversion.work import Work  # noqa: E402
from moeglot.integrations.ray import engine, memory_of  # noqa: E402

TO = "gpt-oss/transformers"
ROUNDS = 3


def write(plan: moeglot.Plan, out: Path, how: Engine) -> float:
    """Seconds to write all units, which is what an engine does; verifying is the same for all."""
    work = Work(out)
    os.sync()
    with work.session(plan, resume=False):
        began = time.monotonic()
        for _ in how(plan, work.files, plan.units, True):
            pass
        seconds = time.monotonic() - began
    shutil.rmtree(work.folder)
    return seconds


def kill_one() -> None:
    """The first worker that has a task."""
    while True:
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdecimal() and (folder / "cmdline").read_bytes().startswith(b"ray::_carry_out"):
                    os.kill(int(folder.name), signal.SIGKILL)
                    return
            except OSError:
                continue
        time.sleep(0.01)


def measure(folder: Path, experts: int, workers: int) -> dict[str, Any]:
    source = write_checkpoint(folder / "source", "gpt-oss/openai", {"e": experts, "h": 2880, "i": 2880, "q": 64, "k": 8, "d": 64, "v": 256}, layers=1)
    plan = moeglot.plan(source, TO)
    found: dict[str, Any] = {"output_bytes": plan.nbytes, "memory_of_a_task": memory_of(plan)}
    write(plan, folder / "warm", threads(workers))
    began = time.monotonic()
    ray.init(num_cpus=workers, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False, logging_level="error")
    found["ray_start_seconds"] = time.monotonic() - began
    tasks = engine(task=1 << 26)
    found["ray_first_seconds"] = write(plan, folder / "first", tasks)
    rounds: dict[str, list[float]] = {"threads": [], "ray": [], "ray_with_a_worker_killed": []}
    for _ in range(ROUNDS):  # in turn, so that what else the machine does falls on all of them
        rounds["threads"].append(write(plan, folder / "out", threads(workers)))
        rounds["ray"].append(write(plan, folder / "out", tasks))
        killer = threading.Thread(target=kill_one)
        killer.start()
        rounds["ray_with_a_worker_killed"].append(write(plan, folder / "out", tasks))
        killer.join()
    ray.shutdown()
    return found | {f"{name}_seconds": sorted(seconds) for name, seconds in rounds.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description="What Ray costs.")
    arguments.add_argument("--experts", type=int, default=16, help="of the layer: 50 MB of output each")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "ray.json")
    given = arguments.parse_args()
    device = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory() as folder:
        found = {**measure(Path(folder), given.experts, given.workers), "workers": given.workers}
    told = {"date": str(date.today()), "device": device, "ray": ray.__version__, "torch": torch.__version__, "moeglot": moeglot.__version__, **found}
    given.results.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()

"""How fast the Triton kernels are on a GPU, as ratios within one run: to the rate at which memory is copied, and to layers that are resident in bfloat16.

What is measured against what: `gpu_cases.py`. Each case runs in a process of its own and the results are written anew after each, so that one that fails, or
leaves the device in a state in which nothing works, costs its own figures alone: it is a row with its error. Within LIMIT seconds; what no time is left for is
a row too. Without a GPU that can, nothing is measured and that is what it prints. Run on an idle GPU:

    python benchmarks/gpu.py [--rounds 20] [--only CASE] [--results FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from moeglot.kernels.backend import has_triton

if TYPE_CHECKING:
    from gpu_cases import Figure

LIMIT = 330.0
"""Seconds for all cases."""
A_CASE = 120.0
"""Seconds that one case may take."""
Results = dict[str, Any]
Command = Callable[[str, Path], list[str]]
"""(case, file for its results) -> what to run."""


def write(path: Path, results: Results) -> None:
    """All at once: whoever reads it finds these or those before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(beside, path)


def here() -> Results:
    """Where it was measured."""
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "date": str(date.today())}


def one(name: str, figures: Iterable[Figure], path: Path, where: Results) -> None:
    """Measures a case in this process; what it gave before an error is kept."""
    rows: list[Results] = []
    try:
        for figure in figures:
            rows.append({"case": name} | asdict(figure) | {"holds": figure.holds})
            write(path, where | {"figures": rows})
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        rows.append({"case": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]})
        write(path, where | {"figures": rows})


def every(names: Iterable[str], command: Command, path: Path, limit: float = LIMIT) -> Results:
    """Each case by a command of its own; `path` holds after each what there is by then, which is returned at last."""
    results: Results = {"figures": []}
    until = time.monotonic() + limit
    for name in names:
        found: Results = {"figures": []}
        left = min(A_CASE, until - time.monotonic())
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            error = _run(command(name, part), left) if left > 1 else "no time was left for it"
            if part.exists():
                found = json.loads(part.read_text())
        rows = [*results["figures"], *found["figures"], *([{"case": name, "failed": error}] if error else [])]
        results = found | results | {"figures": rows}
        write(path, results)
    return results


def _run(command: list[str], seconds: float) -> str | None:
    """How it failed, if it did."""
    try:
        done = subprocess.run(command, timeout=seconds, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"it took longer than {seconds:.0f} s"
    if not done.returncode:
        return None
    print(done.stderr, file=sys.stderr)
    return f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing was said'])[-1]}"


def show(console: Console, results: Results) -> None:
    table = Table("case", "what", "against", "ours, µs", "ratio", "wanted", "error", "usual", "")
    for row in results["figures"]:
        if "failed" in row:
            table.add_row(row["case"], row["failed"], *[""] * 6, "failed")
            continue
        wanted = "" if row["wanted"] is None else f"{'≥' if row['more'] else '≤'} {row['wanted']}"
        numbers = f"{row['ours_us']:.1f}", f"{row['ratio']:.2f}", wanted, f"{row['error']:.1e}", f"{row['usual']:.1e}"
        table.add_row(row["case"], row["name"], row["against"], *numbers, "holds" if row["holds"] else "does not hold")
    console.print(table)
    console.print(", ".join(f"{name} {results.get(name, 'unknown')}" for name in ("device", "torch", "triton")))


def missing() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "There is no GPU here: nothing was measured, and there are no GPU figures."
    if not has_triton():
        return "Triton is not installed here: nothing was measured. Install moeglot[triton]."
    from moeglot.kernels.triton.tiles import table

    if table(torch.cuda.get_device_capability()) is None:
        return "This GPU is older than sm_80, for which there are no kernels that multiply: nothing was measured."
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", metavar="CASE", help="one case, in this process")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results") / "gpu.json")
    options, console = parser.parse_args(), Console()
    if why := missing():
        console.print(why)
        return
    from gpu_cases import CASES

    if options.only and options.only not in CASES:
        parser.error(f"{options.only!r} is no case; known are {', '.join(CASES)}")
    if options.only:
        one(options.only, CASES[options.only](options.rounds), options.results, here())
        show(console, json.loads(options.results.read_text()))
        return
    start = [sys.executable, __file__, "--rounds", str(options.rounds)]
    show(console, every(CASES, lambda name, part: [*start, "--only", name, "--results", str(part)], options.results))


if __name__ == "__main__":
    main()

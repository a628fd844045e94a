"""Ray as an engine: tasks of a few units each, with what they ask for of a node, and what happens when a worker or a node dies.

https://docs.ray.io/en/latest/ray-core/tasks.html. All nodes have moeglot installed and see the file system of source and output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from moeglot.checks import keep_heap_small, one_thread
from moeglot.conversion.stream import Engine, Files, carry_out_unit
from moeglot.errors import MoeglotError, Unfinished, UsageError
from moeglot.planning.loss import Loss
from moeglot.planning.plan import Plan
from moeglot.planning.steps import Unit

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as missing:
    raise UsageError("--engine ray needs Ray", str(missing), "pip install 'moeglot[ray]'") from missing

TASK = 1 << 28
"""Bytes of output of one task: some seconds, against some milliseconds to schedule it."""
RETRIES = 8
"""How often a task is run again if its worker or its node dies."""
AHEAD = 3
"""Tasks that are submitted for each processor of the cluster, so that none waits for the driver."""
PATIENCE = 30
"""Seconds to wait, in a cluster that lives on, for tasks under way when another was given up. Cancelling them may abort the driver, as the end of a task that
is being cancelled is an error of Ray's own: https://github.com/ray-project/ray/pull/54798."""
PROCESS, MATRICES = 300_000_000, 4
"""Anonymous memory of a worker, Ray's own part included: bytes, and how many of the largest matrices of an expert in float32 (`benchmarks/sizing.py`)."""

Ref = Any  # ray types no references


def engine(address: str | None = None, task: int = TASK, retries: int = RETRIES, memory: int | None = None, **options: Any) -> Engine:
    """Carries out units as tasks of a cluster: that of `address`, else the one that this process is connected to, else as `ray.init` finds or starts one.

    `task`: bytes of output of one task. `memory`: bytes that a task asks a node for, by default what a worker needs. `options` go to `ray.init`.
    A task whose worker or node dies is run again, `retries` times at most; what it wrote before is written again to the same places.
    """

    def run(plan: Plan, folder: Path, units: Sequence[Unit], allow_loss: bool) -> Iterator[tuple[Unit, Loss]]:
        mine = not ray.is_initialized()
        if mine:
            ray.init(address=address, **{"log_to_driver": False, "logging_level": "error", **options})
        try:
            asked = memory_of(plan) if memory is None else memory
            _refuse_small_nodes(asked)
            remote = ray.remote(_carry_out).options(num_cpus=1, memory=asked, max_retries=retries)
            shared = [ray.put(plan)]  # in a list, or each task would be given a copy
            place = {unit.key: n for n, unit in enumerate(plan.units)}
            waiting = iter(batches([place[unit.key] for unit in units], plan, task))
            yield from _gather(plan, waiting, lambda some: remote.remote(shared, str(folder), os.getcwd(), some, allow_loss), 0 if mine else PATIENCE)
        finally:
            if mine:
                ray.shutdown()

    return run


def _refuse_small_nodes(asked: int) -> None:
    """A task that fits nowhere would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= 1 and node.get("memory", 0) >= asked for node in nodes):
        most = max((int(node.get("memory", 0)) for node in nodes), default=0)
        raise UsageError(
            f"no node of the cluster has a processor and {asked:,} bytes of memory for a task",
            f"it has {len(nodes)} nodes, of which the largest offers {most:,} bytes",
            "start larger nodes, or convert without Ray, with --workers 1",
        )


def memory_of(plan: Plan) -> int:
    """Bytes that a task asks a node for, so that no node is given more of them than it can hold."""
    largest = max(prod(step.line.expert_shape(plan.source.sizes)) for step in plan.steps)
    return PROCESS + MATRICES * 4 * largest


def batches(numbers: Sequence[int], plan: Plan, task: int) -> Iterator[tuple[int, ...]]:
    """Units that follow each other, up to `task` bytes of output, at least one."""
    some, nbytes = list[int](), 0
    for number in numbers:
        if some and nbytes + plan.units[number].nbytes > task:
            yield tuple(some)
            some, nbytes = [], 0
        some.append(number)
        nbytes += plan.units[number].nbytes
    if some:
        yield tuple(some)


def _gather(plan: Plan, waiting: Iterator[tuple[int, ...]], submit: Callable[[tuple[int, ...]], Ref], patience: int) -> Iterator[tuple[Unit, Loss]]:
    under_way: list[Ref] = []
    try:
        while True:
            while len(under_way) < AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))) and (some := next(waiting, None)):
                under_way.append(submit(some))
            if not under_way:
                return
            (ready, *_), under_way = ray.wait(under_way, num_returns=1)
            for number, loss in _result(ready):
                yield plan.units[number], loss
    finally:
        if under_way:
            ray.wait(under_way, num_returns=len(under_way), timeout=patience)


def _result(ref: Ref) -> list[tuple[int, Loss]]:
    try:
        found: list[tuple[int, Loss]] = ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, (MoeglotError, OSError)):
            raise error.cause from error
        raise
    except RayError as error:
        reason = str(error).strip().split("\n")[0]
        raise Unfinished(
            "a task of Ray was given up", f"{type(error).__name__}: {reason}", "look at the nodes' memory; --resume goes on with the rest"
        ) from error
    return found


# --- in a worker -----------------------------------------------------------------------------------------------------------------------

_plans: dict[str, Plan] = {}
"""The plan that this process works on, by its reference."""


def _carry_out(shared: list[Ref], folder: str, here: str, numbers: tuple[int, ...], allow_loss: bool) -> list[tuple[int, Loss]]:
    """Some units of a plan: number and loss of each, once their bytes are on the disk. `here`: what the paths of the plan may be relative to."""
    key = shared[0].hex()
    if key not in _plans:
        keep_heap_small()
        one_thread()
        os.chdir(here)
        _plans.clear()
        _plans[key] = ray.get(shared[0])
    plan = _plans[key]
    files = Files(plan, Path(folder))
    try:
        return [(number, carry_out_unit(plan, plan.units[number], files, allow_loss)) for number in numbers]
    finally:
        files.close(flush=True)

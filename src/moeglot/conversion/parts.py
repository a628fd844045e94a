"""Part i of N of a conversion: which units it is, and where a launcher says which one this process is to do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moeglot.errors import UsageError
from moeglot.planning.plan import Plan
from moeglot.planning.steps import Unit

AUTO = "auto"


@dataclass(frozen=True)
class Part:
    """Part `number`, counted from 1, of `count`; raises `UsageError` for one that is not among them."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise _no_part(str(self), "; with --part auto RANK and WORLD_SIZE, or the numbers of a SLURM array, say which one this process is")

    @classmethod
    def of(cls, text: object, environment: Mapping[str, str] = os.environ) -> Part:
        """`"2/8"`, or `"auto"` for what the launcher of this process says; raises `UsageError`."""
        if text == AUTO:
            return _launched(environment)
        found = re.fullmatch(r"(\d+)/(\d+)", str(text))
        if not found:
            raise _no_part(str(text))
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def units(self, plan: Plan) -> tuple[Unit, ...]:
        """Its units: one run of the output's bytes, so that two parts meet in one place of one file and nowhere else."""
        return parted(plan, self.count)[self.number - 1]


def _no_part(text: str, known: str = "") -> UsageError:
    do = "for example --part 1/8; or --part auto under torchrun or in a SLURM array"
    return UsageError(f"{text or repr(text)} is no part", f"a part is i/N, i from 1 to N{known}", do)


def parted(plan: Plan, count: int) -> tuple[tuple[Unit, ...], ...]:
    """The units of each of `count` parts: in the order of the output's files, cut where a part has its share of the bytes."""
    total, before = sum(unit.nbytes for unit in plan.units), 0
    found: list[list[Unit]] = [[] for _ in range(count)]
    for unit in in_file_order(plan):
        found[min(count - 1, count * before // max(1, total))].append(unit)
        before += unit.nbytes
    return tuple(map(tuple, found))


def in_file_order(plan: Plan) -> list[Unit]:
    """All units, by the place where their first bytes go."""
    places = {name: (n, pieces[0].offset) for n, shard in enumerate(plan.shards) for name, pieces in shard.pieces.items()}
    return sorted(plan.units, key=lambda unit: places[unit.outputs[0]])  # the experts of one tensor are in their order already


def _launched(environment: Mapping[str, str]) -> Part:
    """From RANK and WORLD_SIZE (https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables), else from those of a SLURM array
    (https://slurm.schedmd.com/job_array.html#env_vars).
    """
    told = {name: int(value) for name, value in environment.items() if name in _KNOWN and value.isdecimal()}
    if {"RANK", "WORLD_SIZE"} <= told.keys():
        return Part(told["RANK"] + 1, told["WORLD_SIZE"])
    if told.keys() >= {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX"}:
        first, count = told["SLURM_ARRAY_TASK_MIN"], told["SLURM_ARRAY_TASK_COUNT"]
        if told["SLURM_ARRAY_TASK_MAX"] - first + 1 != count:
            raise UsageError("the SLURM array has gaps", f"it has {count} tasks, from {first} to {told['SLURM_ARRAY_TASK_MAX']}", "pass --part i/N")
        return Part(told["SLURM_ARRAY_TASK_ID"] - first + 1, count)
    raise UsageError(
        "--part auto, and no launcher says which part", "neither RANK and WORLD_SIZE nor SLURM_ARRAY_TASK_ID and _COUNT are set", "pass --part i/N"
    )


_KNOWN = ("RANK", "WORLD_SIZE", *(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX")))

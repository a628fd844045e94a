"""Where the units of a plan run: on threads here, one part of them here, or on Ray; and what a part reports when it is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Optional

import typer

from moeglot.cli.options import console, print_json
from moeglot.conversion.carrying import Carrying
from moeglot.conversion.convert import carry_out, finalize, write_part
from moeglot.conversion.parts import Part
from moeglot.conversion.stream import Engine
from moeglot.errors import UsageError
from moeglot.planning.plan import Plan
from moeglot.sizes import size
from moeglot.verification.certificate import Certificate

Bar = Callable[[bool], AbstractContextManager[Any]]

PartOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--part", metavar="i/N", help="Write part i of N and stop; 'auto' asks torchrun or a SLURM array. Other processes write the others."),
]
FinalizeOption = Annotated[bool, typer.Option("--finalize", help="All parts are written: verify, certify, and give the output its name.")]
EngineOption = Annotated[str, typer.Option("--engine", metavar="local|ray", help="What runs the work: threads here, or tasks of a Ray cluster.")]
RayAddressOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--ray-address", metavar="ADDRESS", help="Of the cluster; else Ray finds one, or starts one here."),
]
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Where:
    """What the options say."""

    part: str | None = None
    finalize: bool = False
    engine: str = "local"
    ray_address: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(f"--engine {self.engine}", f"known: {', '.join(ENGINES)}", "leave it out for threads on this machine")
        if self.ray_address and self.engine != "ray":
            raise UsageError("--ray-address without --engine ray", "it is where Ray's cluster is", "pass --engine ray too")
        if self.engine == "ray" and (self.part is not None or self.finalize):
            raise UsageError("--engine ray in parts", "Ray divides the work itself, and the output is verified at its end", "leave out --part and --finalize")
        if self.device and (self.part is not None or self.finalize or self.engine != "local"):
            raise UsageError(f"--device {self.device} in parts or by Ray", "it is for one process", "leave it out: each process decodes on its CPU")
        if self.part is not None and self.finalize:
            raise UsageError(
                "--part and --finalize", "a part writes, --finalize verifies what all parts have written", "run --finalize once, after the last part"
            )

    def run(self, plan: Plan, out: str, how: Carrying, bar: Bar, *, json: bool) -> Certificate | None:
        """Carry out a plan, or a part of it, which has no certificate."""
        if self.part is None:
            with bar(json) as progress:
                if self.finalize:
                    return finalize(plan, out, workers=how.workers, progress=progress, threshold=how.threshold)
                return carry_out(plan, out, replace(how, device=self.device, engine=self._engine()), progress)
        part = Part.of(self.part)
        with bar(json or part.number > 1) as progress:  # one bar for the whole job
            write_part(plan, out, part, allow_loss=how.allow_loss, workers=how.workers, progress=progress, threshold=how.threshold)
        _tell(plan, out, part, json)
        return None

    def _engine(self) -> Engine | None:
        if self.engine == "local":
            return None
        from moeglot.integrations import ray

        return ray.engine(self.ray_address)


def _tell(plan: Plan, out: str, part: Part, json: bool) -> None:
    units = part.units(plan)
    nbytes = sum(unit.nbytes for unit in units)
    if json:
        print_json({"schema": "moeglot/part/1", "part": part.number, "of": part.count, "units": len(units), "bytes": nbytes, "out": str(out)})
    else:
        console().print(f"part {part} is written: {len(units)} units, {size(nbytes)}; --finalize after the last", highlight=False)

"""The certificate of an output: re-read from disk, verified at three levels against its source, hashed, and said in moeglot.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeglot.checkpoint import open
from moeglot.checks import Check, Progress, Report
from moeglot.errors import NotVerified
from moeglot.experts import Expert
from moeglot.forward import Matrices
from moeglot.loss import Loss
from moeglot.plan import Plan
from moeglot.version import __version__

SCHEMA = "moeglot/certificate/1"
CERTIFICATE = "moeglot.json"
CHUNK = 1 << 24


@dataclass(frozen=True)
class Certificate:
    """What was converted, what it cost, and the report of its verification; written beside the output as moeglot.json."""

    out: Path
    document: Mapping[str, Any]
    report: Report
    losses: Mapping[str, Loss] = field(default_factory=dict)


def certify(plan: Plan, folder: Path, losses: Mapping[str, Loss], threads: int, progress: Progress | None) -> Certificate:
    """Re-read the output from disk, verify it at all three levels, and write moeglot.json; raises `NotVerified`."""
    report = _verify_output(plan, folder, losses, threads, progress)
    document = _document(plan, folder, losses, report)
    if report.exit_status == 1:
        failed = next(check for check in report.checks if check.verdict == "does not hold")
        raise NotVerified(
            f"the output does not hold: {failed.level}: {failed.detail}",
            f"it was re-read from {folder} and compared with the source",
            "report this as a bug; the folder keeps its temporary name",
        )
    write_json(folder / CERTIFICATE, document)
    return Certificate(folder, document, report, losses)


def _verify_output(plan: Plan, folder: Path, losses: Mapping[str, Loss], threads: int, progress: Progress | None) -> Report:
    written = open(folder)
    if written.format != plan.target:
        raise NotVerified(f"the output reads as {written.format.name}", f"it was written as {plan.target.name}", "report this as a bug")
    rounded = Rounded(plan, losses)
    side = Matrices("the source, rounded" if rounded.steps else "the source", Expert.of(plan.source.format.family, plan.source.config), rounded.matrix)
    checks = [
        {
            "level": c.level,
            "what": c.what,
            "verdict": c.verdict,
            "detail": c.detail,
            "figures": dict(c.figures),
            "layers": {str(n): x for n, x in c.layers.items()},
        }
        for c in report.checks
    ]
    return {"against": report.against, "verdict": report.verdict, "checks": checks}


def _document(plan: Plan, folder: Path, losses: Mapping[str, Loss], report: Report) -> dict[str, Any]:
    source = plan.source
    files = [*source.source.shards, *(p for p in [source.source.folder / "config.json"] if p.exists())]
    written = sorted(path for path in folder.iterdir() if path.name != CERTIFICATE)
    return {
        "schema": SCHEMA,
        "moeglot": __version__,
        "source": {"format": source.format.name, "evidence": list(source.evidence), "sha256": {path.name: sha256(path) for path in files}},
        "output": {"format": plan.target.name, "sha256": {path.name: sha256(path) for path in written}},
        "steps": {verb: loss.as_json() for verb, loss in losses.items()},
        "verification": {**report_json(report), "against": "the source"},
    }


def read_certificate(out: Path) -> Certificate:
    document = json.loads((out / CERTIFICATE).read_text(encoding="utf-8"))
    checks = tuple(Check(c["level"], c["verdict"], c["what"], c["detail"], c["figures"], c["layers"]) for c in document["verification"]["checks"])
    return Certificate(out, document, Report(out.name, document["verification"]["against"], checks))

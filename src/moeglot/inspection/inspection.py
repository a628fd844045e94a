"""What `inspect` shows: what a checkpoint is and how that is known, what the numbers say, what is worth knowing, and an unknown family's outline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.divided import numbers, share_json, whole_sizes
from moeglot.checkpoints.evidence import Weighed, evidence_json
from moeglot.checkpoints.gathered import Gathered
from moeglot.checkpoints.outline import Row
from moeglot.family import dig
from moeglot.inspection.lint import Finding
from moeglot.layout import Stored
from moeglot.reports.report import COLOURS, table, verdict
from moeglot.sizes import size


def inspect_json(checkpoint: Checkpoint, findings: Iterable[Finding] = (), deep: Weighed | None = None) -> dict[str, Any]:
    c, experts = checkpoint, _expert_bytes(checkpoint)
    return {
        "schema": "moeglot/inspect/1",
        "path": c.source.name,
        "format": c.format.name,
        "family": c.format.family.name,
        "evidence": list(c.evidence),
        "ruled_out": {form: str(refutation) for form, refutation in c.identification.ruled_out.items() if refutation.by != "family"},
        "sizes": dict(c.sizes),
        "share": share_json(c),
        **({"ranks": [{"folder": rank.source.folder.name, **(share_json(rank) or {})} for rank in c.ranks]} if isinstance(c, Gathered) else {}),
        "layers": list(c.layers),
        "stored": [_stored_json(c, line) for line in c.format.all_lines],
        "not_quantized": sorted(c.format.unlike),
        "unverified": c.format.family.unverified or None,
        "findings": [{"about": f.about, "what": f.what, "figures": dict(f.figures)} for f in findings],
        "tensors": len(c.source.entries),
        "shards": len(c.source.shards),
        "bytes": {"experts": experts, "other": c.source.nbytes - experts},
        **({"deep": evidence_json(deep, c.known)} if deep else {}),
    }


def _stored_json(c: Checkpoint, line: Stored) -> dict[str, Any]:
    layer = next((layer for layer in c.layers if line in c.format.lines(layer)), c.layers[0])
    encoding = c.encoding(line, layer)
    return {"key": line.key, "roles": list(line.roles), "axes": line.axes, "shape": list(line.shape(c.sizes)), "encoding": encoding.name}


def _expert_bytes(c: Checkpoint) -> int:
    return c.source.nbytes - sum(entry.nbytes for entry in c.others.values())


def show_inspect(console: Console, checkpoint: Checkpoint, findings: Iterable[Finding] = ()) -> None:
    told, c = inspect_json(checkpoint), checkpoint
    rows = [
        ("format", f"{c.format.name}: {c.format.about}"),
        *(("because" if not n else "", reason) for n, reason in enumerate(c.evidence)),
        *([("unverified", c.format.family.unverified)] if c.format.family.unverified else []),
        *([("as they were", f"the experts of layers {', '.join(map(str, c.format.unlike))}, in whole or in part")] if c.format.unlike else []),
        *([("share", _share(c))] if c.share else []),
        *((("ranks" if not n else "", f"{rank.source.folder.name}: {_share(rank)}") for n, rank in enumerate(c.ranks)) if isinstance(c, Gathered) else ()),
        ("sizes", ", ".join(f"{letter} {n}" for letter, n in c.sizes.items() if letter in "ehi")),
        ("layers", f"{len(c.layers)} with experts of {len(c.stage) if c.share else dig(c.config, c.format.family.sparse.count)}"),
        (
            "experts",
            f"{size(told['bytes']['experts'])} in {len(c.source.shards)} file{'s' * (len(c.source.shards) > 1)}; other tensors {size(told['bytes']['other'])}",
        ),
    ]
    table(console, c.source.name, ("", ""), rows)
    lines = [(s["key"], " ".join(s["roles"]), s["axes"], " × ".join(map(str, s["shape"])), s["encoding"]) for s in told["stored"]]
    table(console, "how the experts are stored", ("key", "roles", "axes", "shape", "encoding"), lines)
    if found := list(findings):
        table(console, "worth knowing", ("about", ""), [(f.about, f.what) for f in found])


def _share(c: Checkpoint) -> str:
    """Whose this is: which experts and layers, and what else is divided."""
    mine, stage, all_layers = numbers(c), c.stage, dig(c.config, c.format.family.sparse.count)
    layers = f", layers {stage[0]} to {stage[-1]} of {all_layers}" if len(stage) < all_layers else ""
    return f"{c.share}: experts {mine[0]} to {mine[-1]} of {whole_sizes(c)['e']}{layers}, numbered from 0"


def show_outline(console: Console, rows: Iterable[Row], most: int = 40) -> None:
    """The names, shapes and dtypes of a folder whose format is not known."""
    rows = list(rows)
    shown = [
        (row.template, ", ".join(f"{a} to {b}" for a, b in row.ranges), " ".join(row.dtypes), _shapes(row), str(row.tensors), size(row.nbytes))
        for row in rows[:most]
    ]
    more = f", {len(rows) - most} more kinds of names are not shown" if len(rows) > most else ""
    table(console, f"what is there; {{}} stands for a number{more}", ("name", "numbers", "dtypes", "shapes", "tensors", "bytes"), shown)


def _shapes(row: Row) -> str:
    return ", ".join(" × ".join(map(str, shape)) or "one number" for shape in row.shapes[:3]) + (", …" if len(row.shapes) > 3 else "")


def show_evidence(console: Console, deep: Weighed) -> None:
    rows = [(e.test, verdict(e.verdict), e.what, e.detail) for e in deep.evidence]
    sampled = f"layers {', '.join(map(str, deep.layers))}, experts {', '.join(map(str, deep.experts))}"
    table(console, f"what the numbers say ({sampled})", ("test", "verdict", "of", "detail"), rows)
    told = {
        "as declared": "the numbers fit the declared reading; which of gate and up is which they cannot tell",
        "another reading": "the numbers fit another reading",
        "cannot tell": "the numbers cannot tell" + (f"; not excluded: {', '.join(deep.open)}" if deep.open else ""),
    }
    console.print(told[deep.verdict], style=COLOURS[deep.verdict], highlight=False, markup=False)

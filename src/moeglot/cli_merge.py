"""`moeglot merge`: fold an adapter into a base, and show what of it survived the encoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from moeglot import report
from moeglot.kept import THRESHOLD, by_layer, sums
from moeglot.survival import OTHERS, Survival

Names = Mapping[str, Survival]


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint: a folder, a safetensors file or a Hub id.", show_default=False)],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder that PEFT or another writer saved, or a Hub id.", show_default=False)],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.", show_default=False)],
    to: Annotated[Optional[str], typer.Option("--to", metavar="FORMAT", help="The format to write; by default the base's own.")] = None,  # noqa: UP045
    encode: Annotated[Optional[str], typer.Option("--encode", metavar="ENCODING", help="The encoding to write; by default the base's own.")] = None,  # noqa: UP045
    round: Annotated[str, typer.Option("--round", metavar="HOW", help="nearest, stochastic[:SEED], delta or gptq:FILE.")] = "nearest",
    threshold: Annotated[float, typer.Option("--threshold", min=0.0, max=1.0, help="The share of the change that must survive in each role.")] = THRESHOLD,
    convention: Annotated[Optional[str], typer.Option("--convention", metavar="NAME", help="How the adapter's factors lie.")] = None,  # noqa: UP045
    name: Annotated[Optional[str], typer.Option("--adapter", metavar="NAME", help="Which of several in the adapter's folder.")] = None,  # noqa: UP045
    format: Annotated[Optional[str], typer.Option("--format", metavar="FORMAT", help="What BASE is, if it does not say so itself.")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what would survive, and write nothing.")] = False,
    allow_loss: Annotated[bool, typer.Option("--allow-loss", help="Allow what changes numbers, and a change of which little survives.")] = False,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Largest file, such as 5GB or 500MB.")] = "5GB",
    workers: Annotated[Optional[int], typer.Option("--workers", min=1, help="Threads; by default one for each core, at most 8.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge that was interrupted.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON with a versioned schema instead of tables.")] = False,
    html: Annotated[Optional[Path], typer.Option("--html", metavar="FILE", help="Also write the report to FILE, with plots.")] = None,  # noqa: UP045
) -> None:
    """Add an adapter's change to a base in any format and encoding; say what of it survived, verify and certify the result."""
    import sys

    from moeglot.adapter import open_adapter
    from moeglot.checkpoint import open as open_checkpoint
    from moeglot.cli import bar, check_folder, parse_size, print_json
    from moeglot.convert import carry_out
    from moeglot.plan import plan as make_plan
    from moeglot.units import estimate

    check_folder(html, "--html")
    checkpoint = open_checkpoint(base, format)
    change = open_adapter(adapter, checkpoint, convention, name)
    plan = estimate(make_plan(checkpoint, to, encode=encode, adapter=change, round=round, shard_size=parse_size(shard_size)))
    console = Console(soft_wrap=not sys.stdout.isatty())
    if dry_run:
        if json:
            print_json(report.plan_json(plan))
        else:
            report.show_plan(console, plan)
        return
    if not json:
        report.show_plan(console, plan)
    with bar(json) as progress:
        certificate = carry_out(plan, out_folder, allow_loss, workers, resume, progress, threshold)
    if json:
        print_json({**certificate.document, "out": str(certificate.out)})
    else:
        show_survival(console, certificate.document["merge"])
        report.show_certificate(console, certificate)
    if html:
        recorded = report.recorder()
        show_survival(recorded, certificate.document["merge"])
        report.show_report(recorded, certificate.report, f"verified: {certificate.out}")
        report.write_html(html, f"moeglot merge {base} + {adapter}: {certificate.report.verdict}", recorded, plots(certificate.document["merge"]))
    raise typer.Exit(certificate.report.exit_status)


HEADER = ("", "role", "recovered", "cosine", "size of the change", "changed", "new scales")


def show_survival(console: Console, merge: Mapping[str, Any]) -> None:
    """What of the change is in the output, as a table: in all, and by layer."""
    rows = [("all", *_row(role, one)) for role, one in merge["survived"].items()]
    rows += [(layer, *_row(role, one)) for layer, of in merge["layers"].items() for role, one in of.items()]
    report.table(console, f"what survived of {merge['adapter']}, rounded {merge['rounding']}", HEADER, rows)


def _row(role: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    much = " (more than there was)" if one["rec"] > 1.1 else ""
    changed = one["changed"] / one["values"] if one["values"] else 0.0
    return role, f"{one['rec']:.1%}{much}", f"{one['cosine']:.3f}", f"{one['rho']:.2g} of the weights", f"{changed:.1%}", f"{one['clipped']:,} numbers"


def plots(merge: Mapping[str, Any]) -> Iterator[str]:
    """SVG: for each role, the recovered share by layer."""
    roles = dict.fromkeys(role for of in merge["layers"].values() for role in of)
    for role in roles:
        shares = {layer: of[role]["rec"] for layer, of in merge["layers"].items() if role in of}
        yield report.share_bars(f"{role}: share of the change that was recovered, by layer", shares, THRESHOLD)

"""`moeglot merge`: fold an adapter into a base, and show what of it survived the encoding; and how a plan is shown, carried out and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from moeglot.checks import keep_heap_small
from moeglot.cli.options import (
    AllowLossOption,
    ConventionOption,
    DecodeOption,
    DryRunOption,
    EncodeOption,
    FormatOption,
    HtmlOption,
    JsonOption,
    KeepTouchedOption,
    OutArgument,
    ResumeOption,
    RoundOption,
    ShardSizeOption,
    ThresholdOption,
    WorkersOption,
    console,
    print_json,
)
from moeglot.cli.where import EngineOption, FinalizeOption, PartOption, RayAddressOption, Where
from moeglot.conversion.carrying import Carrying
from moeglot.errors import UsageError
from moeglot.files import newfile
from moeglot.planning.plan import Plan
from moeglot.reports import report
from moeglot.verification.kept import THRESHOLD


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint: a folder, a safetensors file or a Hub id.", show_default=False)],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder that PEFT or another writer saved, or a Hub id.", show_default=False)],
    out_folder: OutArgument,
    to: Annotated[Optional[str], typer.Option("--to", metavar="FORMAT", help="The format to write; by default the base's own.")] = None,  # noqa: UP045
    encode: EncodeOption = None,
    round: RoundOption = "nearest",
    keep_touched: KeepTouchedOption = None,
    threshold: ThresholdOption = THRESHOLD,
    convention: ConventionOption = None,
    name: Annotated[Optional[str], typer.Option("--adapter", metavar="NAME", help="Which of several in the adapter's folder.")] = None,  # noqa: UP045
    format: FormatOption = None,
    dry_run: DryRunOption = False,
    allow_loss: AllowLossOption = False,
    shard_size: ShardSizeOption = "5GB",
    workers: WorkersOption = None,
    resume: ResumeOption = False,
    device: DecodeOption = None,
    part: PartOption = None,
    finalize: FinalizeOption = False,
    engine: EngineOption = "local",
    ray_address: RayAddressOption = None,
    json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Add an adapter's change to a base in any format and encoding; say what of it survived, verify and certify the result."""
    check_html(html, dry_run, part)
    from moeglot.adapters.adapter import open_adapter
    from moeglot.checkpoints.checkpoint import open as open_checkpoint
    from moeglot.planning.plan import plan as make_plan

    where = Where(part, finalize, engine, ray_address, device)
    checkpoint = open_checkpoint(base, format)
    change = open_adapter(adapter, checkpoint, convention, name)
    plan = make_plan(checkpoint, to, encode=encode, adapter=change, round=round, keep_touched=keep_touched, shard_size=shard_size)
    how = Carrying(allow_loss, workers, resume, threshold)
    raise typer.Exit(show_and_carry_out(plan, out_folder, how, where, dry_run=dry_run, json=json, html=html))


def check_html(html: Path | None, dry_run: bool, part: str | None) -> None:
    """Before the work: raises `UsageError` where no report will be made, and as `newfile.check` does."""
    if html and (dry_run or part is not None):
        known = "it reports what was verified, and " + ("--dry-run writes nothing" if dry_run else "a part is verified by --finalize, which takes --html too")
        raise UsageError(f"--html {html} with {'--dry-run' if dry_run else f'--part {part}'}", known, "leave one of the two out")
    newfile.check(html, "--html")


def show_and_carry_out(plan: Plan, out: str, how: Carrying, where: Where, *, dry_run: bool, json: bool, html: Path | None = None) -> int:
    """Show a plan, carry it out, and report; returns the exit status."""
    from moeglot.cli.progress import bar
    from moeglot.planning.units import estimate

    keep_heap_small()
    out_console = console()
    with bar(json) as progress:
        plan = estimate(plan, progress)
    if json and dry_run:
        print_json(report.plan_json(plan))
    elif not json:
        report.show_plan(out_console, plan)
    if dry_run:
        return 0
    certificate = where.run(plan, out, how, bar, json=json)
    if certificate is None:
        return 0
    if json:
        print_json({**certificate.document, "out": str(certificate.out)})
    else:
        report.show_certificate(out_console, certificate)
    if html:
        from moeglot.reports.plots import of_checks

        recorded = report.recorder()
        report.show_certificate(recorded, certificate)
        merged, drawn = certificate.document.get("merge"), of_checks(certificate.report.checks)
        done = f"merge {plan.source.source.name} {merged['adapter']}" if merged else f"convert {plan.source.source.name}"
        title = f"moeglot {done} {certificate.out}: {certificate.report.verdict}"
        report.write_html(html, title, recorded, plots(merged, how.threshold) if merged else drawn)
    return certificate.report.exit_status


def plots(merge: dict[str, Any], threshold: float) -> list[str]:
    """How much of the change survived, by role and layer."""
    from moeglot.reports.plots import shares

    roles = dict.fromkeys(role for of in merge["layers"].values() for role in of)
    found = {role: {int(layer): of[role]["rec"] for layer, of in merge["layers"].items() if role in of} for role in roles}
    return [shares("share of the adapter's change that was recovered, by layer", found, threshold)] if found else []

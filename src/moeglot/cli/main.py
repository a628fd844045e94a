"""The command line: each verb is one function of the library, its report as a table, plain lines or JSON, and an exit status."""

from __future__ import annotations

import atexit
import gc
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import moeglot
from moeglot.checkpoints.outline import outline
from moeglot.checks import allow_many_files
from moeglot.cli import adapter as cli_adapter
from moeglot.cli import ending as cli_ending
from moeglot.cli.merge import check_html, merge, show_and_carry_out
from moeglot.cli.moments import moments
from moeglot.cli.options import (
    AllowLossOption,
    ConventionOption,
    DecodeOption,
    DryRunOption,
    EncodeOption,
    EpRankOption,
    EpSizeOption,
    EtpRankOption,
    EtpSizeOption,
    FormatOption,
    HtmlOption,
    JsonOption,
    KeepTouchedOption,
    OutArgument,
    PathArgument,
    PpRankOption,
    PpSizeOption,
    ResumeOption,
    RoundOption,
    ShardSizeOption,
    ThresholdOption,
    TpRankOption,
    TpSizeOption,
    WordsOption,
    WorkersOption,
    console,
    print_json,
)
from moeglot.cli.run import run
from moeglot.cli.tune import tune
from moeglot.cli.where import EngineOption, FinalizeOption, PartOption, RayAddressOption, Where
from moeglot.conversion.carrying import Carrying, default_workers
from moeglot.conversion.convert import refuse_without_adapter
from moeglot.errors import UnknownFormat, UsageError
from moeglot.files import newfile
from moeglot.files.source import read_source
from moeglot.inspection import inspection
from moeglot.inspection.lint import lint
from moeglot.reports import report
from moeglot.share import Asked
from moeglot.sizes import size
from moeglot.verification.kept import THRESHOLD

app = typer.Typer(
    help="Reads, writes, converts, runs, fine-tunes, merges and verifies the expert weights of Mixture-of-Experts models in every dialect they are\n"
    "stored in.\n\n"
    "Exit status: 0 done and holds, 1 does not hold, 2 cannot tell or wrong use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cli_adapter.app, name="adapter")

out = console()


def _bar(quiet: bool) -> AbstractContextManager[Any]:
    from moeglot.cli.progress import bar

    return bar(quiet)


def _version(value: bool) -> None:
    if value:
        print(f"moeglot {moeglot.__version__}")
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command()
def inspect(
    path: PathArgument,
    format: FormatOption = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also ask the numbers of a few experts whether they fit what is declared.")] = False,
    json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Say what a checkpoint is and how that is known. Reads headers only (of a Hub id it fetches no more), and with --deep a few experts."""
    from moeglot.checkpoints.evidence import weigh

    gc.disable()  # millions of small objects and no garbage: looking for some takes a fifth of the time,
    atexit.register(gc.freeze)  # at the end too
    newfile.check(html, "--html")
    try:
        checkpoint = moeglot.open(path, format, headers_only=not deep)
    except UnknownFormat:
        if not json:
            inspection.show_outline(out, outline(read_source(path, headers_only=True)))
        raise
    weighed, findings = weigh(checkpoint) if deep else None, lint(checkpoint, sample=deep)
    for shown in ([] if json else [out]) + ([recorder := report.recorder()] if html else []):
        inspection.show_inspect(shown, checkpoint, findings)
        if weighed:
            inspection.show_evidence(shown, weighed)
    if html:
        from moeglot.reports.plots import plots

        report.write_html(html, f"moeglot inspect {path}", recorder, plots(checkpoint, weighed))
    if json:
        print_json(inspection.inspect_json(checkpoint, findings, weighed))
        raise typer.Exit(weighed.exit_status if weighed else 0)
    if weighed and (contradiction := weighed.contradiction(checkpoint.known)):
        raise contradiction


@app.command()
def formats(json: JsonOption = False) -> None:
    """List the formats that moeglot reads and writes."""
    if json:
        print_json(report.formats_json(moeglot.formats()))
    else:
        report.show_formats(out, moeglot.formats())


@app.command()
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A folder, a safetensors file, a URL or a Hub id.", show_default=False)],
    out_folder: OutArgument,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The format to write; see `moeglot formats`.", show_default=False)],
    encode: EncodeOption = None,
    adapter: Annotated[Optional[str], typer.Option("--adapter", metavar="DIR", help="Fold this adapter in, as `moeglot merge` does.")] = None,  # noqa: UP045
    convention: ConventionOption = None,
    threshold: ThresholdOption = THRESHOLD,
    round: RoundOption = "nearest",
    keep_touched: KeepTouchedOption = None,
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
    tp_rank: TpRankOption = None,
    tp_size: TpSizeOption = None,
    etp_rank: EtpRankOption = None,
    etp_size: EtpSizeOption = None,
    pp_rank: PpRankOption = None,
    pp_size: PpSizeOption = None,
    ep_rank: EpRankOption = None,
    ep_size: EpSizeOption = None,
    padded_vocab_size: WordsOption = None,
    json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Write a checkpoint in another format, verify what lies on disk, and certify it."""
    check_html(html, dry_run, part)
    where = Where(part, finalize, engine, ray_address, device)
    refuse_without_adapter(adapter, convention, threshold)
    checkpoint = moeglot.open(src, format)
    ranks: Asked = {
        "tp_rank": tp_rank,
        "tp_size": tp_size,
        "etp_rank": etp_rank,
        "etp_size": etp_size,
        "pp_rank": pp_rank,
        "pp_size": pp_size,
        "ep_rank": ep_rank,
        "ep_size": ep_size,
        "padded_vocab_size": padded_vocab_size,
    }
    change = moeglot.open_adapter(adapter, checkpoint, convention) if adapter is not None else None
    plan = moeglot.plan(checkpoint, to, encode=encode, adapter=change, round=round, keep_touched=keep_touched, shard_size=shard_size, **ranks)
    how = Carrying(allow_loss, workers, resume, threshold)
    raise typer.Exit(show_and_carry_out(plan, out_folder, how, where, dry_run=dry_run, json=json, html=html))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A folder, a safetensors file, a URL or a Hub id.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    json: JsonOption = False,
    workers: WorkersOption = None,
) -> None:
    """Compare the values of two checkpoints of one model, in any two formats."""
    with _bar(json) as progress:
        found = moeglot.compare(a, b, workers=workers or default_workers(), progress=progress)
    _finish(found, "compare", f"{a} against {b}", json, None)


@app.command()
def verify(
    path: PathArgument,
    against: Annotated[Optional[str], typer.Option("--against", metavar="PATH|FINGERPRINT|transformers", help="A second opinion.")] = None,  # noqa: UP045
    format: FormatOption = None,
    json: JsonOption = False,
    html: HtmlOption = None,
    workers: WorkersOption = None,
) -> None:
    """Check structure and numbers; against another checkpoint, a fingerprint or transformers, also values and what each expert computes."""
    newfile.check(html, "--html")
    with _bar(json) as progress:
        found = moeglot.verify(moeglot.open(path, format), against, workers=workers or default_workers(), progress=progress)
    if not against and not json:
        out.print("forward: not checked; pass --against for a second opinion on what each expert computes", highlight=False)
    _finish(found, "verify", path + (f" against {against}" if against else ""), json, html)


def _finish(found: moeglot.Report, command: str, title: str, json: bool, html: Path | None) -> None:
    if json:
        print_json(report.verify_json(found, command))
    else:
        report.show_report(out, found, title)
        out.print(found.verdict, style=report.COLOURS[found.verdict])
    if html:
        from moeglot.reports.plots import of_checks

        recorded = report.recorder()
        report.show_report(recorded, found, title)
        report.write_html(html, f"moeglot {command} {title}: {found.verdict}", recorded, of_checks(found.checks))
    raise typer.Exit(found.exit_status)


@app.command()
def fingerprint(
    path: PathArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .json file to write.", show_default=False)],
    format: FormatOption = None,
    json: JsonOption = False,
) -> None:
    """Freeze what each expert computes in a small file, so that a copy can be verified where its source is not."""
    if output.suffix != ".json":
        raise UsageError(f"{output}: not named .json", "verify knows a fingerprint by that ending", f"pass -o {output.with_suffix('.json')}")
    newfile.check(output, "-o")
    found = moeglot.fingerprint(moeglot.open(path, format))
    found.save(output)
    told = {"schema": "moeglot/fingerprint-written/1", "file": str(output), "experts": len(found.experts), "bytes": output.stat().st_size}
    print_json(told) if json else out.print(f"{output}: {len(found.experts)} experts, {size(output.stat().st_size)}", highlight=False, markup=False)


@app.command()
def demo(keep: Annotated[Optional[Path], typer.Option("--keep", metavar="DIR", help="Leave the checkpoints of the demo in DIR.")] = None) -> None:  # noqa: UP045
    """The whole story on a bundled trained model, in a minute."""
    from moeglot.demo import tell

    raise typer.Exit(tell(out, keep))


app.command()(merge)
app.command()(moments)
app.command()(run)
app.command()(tune)


def main() -> None:
    """Run the command line; every refusal, ours or the system's, is three lines on standard error (or JSON on standard output) and an exit status."""
    allow_many_files()
    with cli_ending.told():
        app(standalone_mode=True)


if __name__ == "__main__":
    main()

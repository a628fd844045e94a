"""What the verbs of the command line share: their arguments and options, and JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from moeglot.reports import report

PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="A folder, a safetensors file, a URL or a Hub id (owner/name).", show_default=False)]
OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="The folder to write, or the URL of one; it must not exist.", show_default=False)]
FormatOption = Annotated[Optional[str], typer.Option("--format", metavar="FORMAT", help="What the model is, if it does not say so; see `moeglot formats`.")]  # noqa: UP045
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON with a versioned schema instead of tables.")]
HtmlOption = Annotated[Optional[Path], typer.Option("--html", metavar="FILE", help="Also write the report to FILE, with plots by layer.")]  # noqa: UP045
WorkersOption = Annotated[Optional[int], typer.Option("--workers", min=1, help="Threads; by default one for each core, at most 8.")]  # noqa: UP045
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
AllowLossOption = Annotated[bool, typer.Option("--allow-loss", help="Allow steps that change numbers.")]
ShardSizeOption = Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Largest file, such as 5GB or 500MB.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")]
EncodeOption = Annotated[Optional[str], typer.Option("--encode", metavar="ENCODING", help="Such as bfloat16, mxfp4, fp8-block or nf4.")]  # noqa: UP045
RoundOption = Annotated[str, typer.Option("--round", metavar="HOW", help="With an adapter: nearest, stochastic[:SEED], delta or gptq:FILE.")]
KeepTouchedOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--keep-touched", metavar="DTYPE", help="With an adapter: leave the changed matrices in this float type."),
]
DtypeOption = Annotated[Optional[str], typer.Option("--dtype", help="bfloat16, float16 or float32; by default what config.json declares.")]  # noqa: UP045
DeviceOption = Annotated[Optional[str], typer.Option("--device", help="Where the model goes, such as cuda; by default the CPU.")]  # noqa: UP045
QuantizeOption = Annotated[Optional[str], typer.Option("--encode", help="Quantize plain experts in memory: mxfp4, fp8-block, nf4, ...")]  # noqa: UP045
DecodeOption = Annotated[Optional[str], typer.Option("--device", help="Where MXFP4 and FP8 are decoded, such as cuda; by default the CPU.")]  # noqa: UP045
ConventionOption = Annotated[Optional[str], typer.Option("--convention", metavar="NAME", help="How the adapter's factors lie.")]  # noqa: UP045
ThresholdOption = Annotated[float, typer.Option("--threshold", min=0.0, max=1.0, help="The share of an adapter's change that must survive in each role.")]

Number = Optional[int]  # noqa: UP045
TpRankOption = Annotated[Number, typer.Option("--tp-rank", metavar="R", help="Write what process R, from 0, of --tp-size loads: a state dict of Megatron's.")]
TpSizeOption = Annotated[Number, typer.Option("--tp-size", metavar="N", help="How many processes divide attention, words and other layers' rows.")]
EtpRankOption = Annotated[Number, typer.Option("--etp-rank", metavar="R", help="As --tp-rank, of those that divide each expert's matrices.")]
EtpSizeOption = Annotated[Number, typer.Option("--etp-size", metavar="N", help="How many processes divide each expert's matrices.")]
PpRankOption = Annotated[Number, typer.Option("--pp-rank", metavar="R", help="As --tp-rank, of those that divide the layers.")]
PpSizeOption = Annotated[Number, typer.Option("--pp-size", metavar="N", help="How many processes divide the layers.")]
EpRankOption = Annotated[Number, typer.Option("--ep-rank", metavar="R", help="As --tp-rank, of those that divide the experts of each layer.")]
EpSizeOption = Annotated[Number, typer.Option("--ep-size", metavar="N", help="How many processes divide the experts of each layer.")]
WordsOption = Annotated[Number, typer.Option("--padded-vocab-size", metavar="N", help="Rows of Megatron's whole embedding; those beyond the words are zeros.")]


def console() -> Console:
    """Lines of any length where they are not for a terminal."""
    return Console(soft_wrap=not (sys.stdout and sys.stdout.isatty()))  # it is None where it was closed, as by `>&-`


def print_json(value: dict[str, Any]) -> None:
    """Where standard output is no UTF-8, with the escapes that JSON has for everything else."""
    sys.stdout.write(report.dump(value, ascii=(getattr(sys.stdout, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")) + "\n")

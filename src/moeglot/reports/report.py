"""How results are shown: tables for a terminal, plain lines for a pipe, JSON with a versioned schema, one HTML file with what is drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeglot.checkpoints.divided import share_json
from moeglot.checks import Report
from moeglot.codings import CODINGS
from moeglot.files import newfile
from moeglot.format import Format
from moeglot.planning.dense_plan import left_aside
from moeglot.planning.loss import Loss
from moeglot.planning.plan import Plan
from moeglot.planning.undeclared import undeclared
from moeglot.reports import svg
from moeglot.sizes import size
from moeglot.survival import percent
from moeglot.verification.certificate import Certificate, report_json
from moeglot.verification.kept import notes
from moeglot.version import __version__

COLOURS = {"holds": "green", "does not hold": "bold red", "cannot tell": "yellow", "as declared": "green", "another reading": "bold red"}


def table(console: Console, title: str, header: Iterable[str], rows: Iterable[Iterable[str | Text]]) -> None:
    """A rich table on a terminal; tab-separated lines in a pipe, title and header behind a #. Text is shown as it is: names may hold markup of rich."""
    if not console.is_terminal and not console.record:
        above = [f"# {title}", *([f"# {named}"] if (named := "\t".join(header).strip("\t")) else [])]
        console.file.write("".join(f"{line}\n" for line in (*above, *("\t".join(map(str, row)) for row in rows))))
        return
    shown = Table(title=Text(title), title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        shown.add_column(Text(name), overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(shown)
    console.print()


# --- formats ---------------------------------------------------------------------------------------------------------------------------


def formats_json(formats: Iterable[Format]) -> dict[str, Any]:
    return {
        "schema": "moeglot/formats/1",
        "formats": [
            {
                "name": form.name,
                "family": form.family.name,
                "about": form.about,
                "source": form.source,
                "read_by": form.reads,
                "unverified": form.family.unverified or None,
                "stored": [{"key": s.key, "roles": list(s.roles), "axes": s.axes, "encoding": s.encoding.name, "parts": s.suffixes} for s in form.stored],
            }
            for form in formats
        ],
    }


def show_formats(console: Console, formats: Iterable[Format]) -> None:
    variants = [(coding.name, coding.about) for coding in CODINGS]
    rows = [
        (form.name if not n else "", line.key.split("{layer}.")[-1], " ".join(line.roles), line.axes, line.encoding.name)
        for form in formats
        if not form.coding
        for n, line in enumerate(form.stored)
    ]
    table(console, "formats (e expert, h hidden, i intermediate, p which of the roles)", ("format", "tensor", "roles", "axes", "encoding"), rows)
    table(console, "quantized variants of layouts whose matrices lie [out, in], as in qwen3-moe/hub+fp8-block", ("variant", "what it is"), variants)


# --- plan and certificate --------------------------------------------------------------------------------------------------------------


def plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "schema": "moeglot/plan/1",
        "source": {"path": plan.source.source.name, "format": plan.source.format.name, "evidence": list(plan.source.evidence)},
        "target": plan.target.name,
        **({"share": share_json(plan.source)} if plan.source.share else {}),
        "steps": [*({"do": verb, "tensors": n, **_expected(plan, verb)} for verb, n in _verbs(plan).items()), *_others(plan)],
        **({"undeclared": gone} if (gone := list(undeclared(plan))) else {}),
        "renamed": plan.renamed,
        **({"left_aside": aside} if (aside := left_aside(plan.source)) else {}),
        "config": dict(plan.config),
        "files": {shard.file: shard.nbytes for shard in plan.shards},
        "carried_over": [path.name for path in plan.others],
        "needs_allow_loss": bool(plan.lossy),
        **({"expected_survival": {role: one.as_json() for role, one in plan.expected_survival.items()}} if plan.change else {}),
    }


def _verbs(plan: Plan) -> Counter[str]:
    return Counter(step.verb for step in plan.steps)


def _others(plan: Plan) -> list[dict[str, Any]]:
    """What is done to the numbers of tensors that are no experts."""
    found = [(verb, n) for verb, n in plan.dense_verbs.items() if verb]
    return [{"do": verb, "tensors": n, "loss": "measured", "expected_relative_error": plan.expected_loss.get(verb, Loss()).relative} for verb, n in found]


def _expected(plan: Plan, verb: str) -> dict[str, Any]:
    exact = all(step.exact for step in plan.steps if step.verb == verb)
    return {"loss": "none, whatever the numbers" if exact else "measured", "expected_relative_error": plan.expected_loss.get(verb, Loss()).relative}


def show_plan(console: Console, plan: Plan) -> None:
    aside = left_aside(plan.source)
    rows, whose = [], f", what {plan.source.share} holds alone" if plan.source.share else ""
    for verb, count in _verbs(plan).items():
        lost = plan.expected_loss.get(verb)
        told = "exact" if lost is None else f"loses: {lost.told}" if lost.changed else "exact on the sample; every tensor is checked"
        rows.append((verb, f"{count} tensors", told))
    for role, one in plan.expected_survival.items():
        rows.append(("add the adapter's change", role, f"about {percent(one.rec)} of it survives, as measured on a few experts"))
    for done, count in plan.dense_verbs.items():
        if done:
            lost = plan.expected_loss.get(done, Loss())
            rows.append((done, f"{count} tensors", f"loses: {lost.told}" if lost.changed else "every tensor is measured as it is written"))
            continue
        less = f", but for what is left aside of {len(aside)}" if aside else ""
        rows.append(("copy other tensors", f"{count} tensors", f"byte for byte{less}" + (f", {len(plan.renamed)} renamed or joined" if plan.renamed else "")))
    rows += [("leave aside", told, "config.json counts no word there") for told in _aside(aside)]
    rows += [(f"leave out {gone['what']}", f"{gone['tensors']} tensors", gone["why"]) for gone in undeclared(plan)]
    rows.append(("write", f"{len(plan.shards)} file{'s' * (len(plan.shards) > 1)}", size(plan.nbytes)))
    rows.append(("carry over", f"{len(plan.others)} file{'s' * (len(plan.others) != 1)}", ", ".join(path.name for path in plan.others)))
    table(console, f"plan: {plan.source.format.name} to {plan.target.name}{whose}", ("step", "of", "loss"), rows)
    if plan.change:
        console.print(f"{plan.change.adapter.name}: {plan.change.adapter.known}", highlight=False, markup=False)
        for note in notes(plan.change):
            console.print(note, style="yellow", highlight=False, markup=False)
    if plan.lossy:
        console.print("This plan changes numbers: it needs --allow-loss.", style="yellow", highlight=False)


def _aside(found: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [f"{one['rows']} of {one['of']} rows of {key}" for key, one in found.items()]


def show_certificate(console: Console, certificate: Certificate) -> None:
    if "merge" in certificate.document:
        show_survival(console, certificate.document["merge"])
    for verb, loss in certificate.losses.items():
        for line in _loss_lines(loss):
            console.print(f"{verb}: {line}", highlight=False, markup=False, soft_wrap=True)
    for told in _aside(certificate.document.get("left_aside", {})):
        console.print(f"left aside: {told}", highlight=False, markup=False, soft_wrap=True)
    show_report(console, certificate.report, f"verified: {certificate.out}")
    console.print(certificate.report.verdict, style=COLOURS[certificate.report.verdict])


def show_survival(console: Console, merge: Mapping[str, Any]) -> None:
    """What of an adapter's change is in the output, in all and by layer."""
    rows = [("all", *_survival_row(role, one)) for role, one in merge["survived"].items()]
    rows += [(layer, *_survival_row(role, one)) for layer, of in merge["layers"].items() for role, one in of.items()]
    header = ("layers", "role", "recovered", "cosine", "change / weights", "numbers changed", "beyond their scale")
    table(console, f"what survived of {merge['adapter']}, rounded {merge['rounding']}", header, rows)


def _survival_row(role: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    more = " (more than there was)" if one["rec"] > 1.05 else ""
    changed = one["changed"] / one["values"] if one["values"] else 0.0
    return role, f"{percent(one['rec'])}{more}", f"{one['cosine']:.3f}", f"{one['rho']:.2g}", f"{changed:.1%}", f"{one['clipped']:,}"


def _loss_lines(loss: Loss) -> Iterable[str]:
    if loss.changed:
        yield f"{loss.changed:,} of {loss.values:,} values changed, relative error {loss.relative:.3g}"
    elif loss.values:
        yield f"no value of {loss.values:,} changed"
    if loss.undetermined:
        of = f"{loss.undetermined:,} of {loss.blocks:,} blocks of the first experts of all layers"
        yield f"{of} have values that other codes and scales give as well, so their bytes may not return"


# --- reports ---------------------------------------------------------------------------------------------------------------------------


def show_report(console: Console, report: Report, title: str) -> None:
    rows = [(c.level, verdict(c.verdict), c.what, c.detail) for c in report.checks]
    table(console, title, ("level", "verdict", "what", "detail"), rows)


def verdict(verdict: str) -> Text:
    return Text(verdict, COLOURS[verdict])


def verify_json(report: Report, command: str) -> dict[str, Any]:
    return {"schema": f"moeglot/{command}/1", "subject": report.subject, **report_json(report), "exit_status": report.exit_status}


def dump(value: Mapping[str, Any], ascii: bool = False) -> str:
    """JSON; what is no finite number is written as null, so that every parser reads it, and what UTF-8 does not hold of a file's name as an escape."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=ascii).encode("utf-8", "backslashreplace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def recorder() -> Console:
    """A console whose output becomes a part of a page."""
    import io

    return Console(record=True, width=120, file=io.StringIO(), force_terminal=True)


def write_html(path: Path, title: str, recorded: Console, plots: Iterable[str]) -> None:
    """The recorded tables and some SVG plots as one file."""
    body = recorded.export_html(inline_styles=True, code_format='<pre style="font-family:ui-monospace,monospace;line-height:1.4;overflow-x:auto">{code}</pre>')
    made = f"<p>moeglot {__version__}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC</p>"
    newfile.write(path, svg.page(title, made, body, *plots))

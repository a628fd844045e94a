"""`moeglot adapter`: what an adapter is and how that is known, the conventions, and writing one in another convention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from moeglot.checkpoints.structure import runs
from moeglot.cli.options import ConventionOption, FormatOption, JsonOption, console, print_json
from moeglot.reports import report

if TYPE_CHECKING:
    from moeglot.adapters.adapter import Adapter

app = typer.Typer(help="Read LoRA adapters of experts, and write them in another convention.", no_args_is_help=True)

AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder that PEFT or another writer saved, or a Hub id.", show_default=False)]
BaseOption = Annotated[str, typer.Option("--base", metavar="PATH", help="The checkpoint that it adapts, in any format.", show_default=False)]
NameOption = Annotated[Optional[str], typer.Option("--adapter", metavar="NAME", help="Which of several in a folder; its own is default.")]  # noqa: UP045


def _open(path: str, base: str, format: str | None, convention: str | None, name: str | None) -> Adapter:
    from moeglot.adapters.adapter import open_adapter
    from moeglot.checkpoints.checkpoint import open as open_checkpoint

    return open_adapter(path, open_checkpoint(base, format), convention, name)


@app.command()
def inspect(
    path: AdapterArgument, base: BaseOption, format: FormatOption = None, convention: ConventionOption = None, name: NameOption = None, json: JsonOption = False
) -> None:
    """Say which convention an adapter is in and how that is known, and what it changes."""
    adapter = _open(path, base, format, convention, name)
    told = inspect_json(adapter)
    if json:
        print_json(told)
        return
    rows = [
        ("convention", f"{adapter.convention.name}: {adapter.convention.about}" if adapter.convention else "none: it changes no expert"),
        *(("because" if not n else "", reason) for n, reason in enumerate(adapter.evidence)),
        ("base", f"{adapter.base.source.name}: {adapter.base.format.name}"),
        *((("numbers", str(adapter.clustering)),) if adapter.clustering else ()),
        ("experts", f"{len(adapter.layers)} of {len(adapter.base.layers)} layers, {told['experts']['adapted']} matrices"),
        ("other modules", f"{len(adapter.dense)} with factors, {len(adapter.replaced)} tensors replaced"),
    ]
    report.table(console(), adapter.name, ("", ""), rows)
    shown = [(runs(one["layers"]), one["role"], ", ".join(map(str, one["ranks"])), one["scale"]) for one in told["experts"]["roles"]]
    report.table(console(), "what it changes in experts", ("layers", "role", "rank", "scale"), shown)


def inspect_json(adapter: Adapter) -> dict[str, Any]:
    return {
        "schema": "moeglot/adapter/1",
        "path": adapter.name,
        "base": adapter.base.source.name,
        "format": adapter.base.format.name,
        "convention": adapter.convention.name if adapter.convention else None,
        "evidence": list(adapter.evidence),
        "numbers": adapter.clustering.json() if adapter.clustering else None,
        "experts": {"adapted": len(adapter.pairs), "roles": [_role_json(adapter, role) for role in dict.fromkeys(role for _, role, _ in adapter.pairs)]},
        "dense": {name: {"rank": dense.rank, "scale": dense.scale} for name, dense in adapter.dense.items()},
        "replaced": list(adapter.replaced),
    }


def _role_json(adapter: Adapter, role: str) -> dict[str, Any]:
    pairs = [pair for (_, of, _), pair in adapter.pairs.items() if of == role]
    layers = [layer for layer in adapter.layers if role in adapter.roles(layer)]
    scales = sorted({pair.scale for pair in pairs})
    return {"role": role, "layers": layers, "ranks": sorted({pair.rank for pair in pairs}), "scale": ", ".join(f"{scale:g}" for scale in scales)}


@app.command()
def convert(
    path: AdapterArgument,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.", show_default=False)],
    base: BaseOption,
    to: Annotated[str, typer.Option("--to", metavar="NAME", help="A convention, or who is to read it; see `moeglot adapter conventions`.", show_default=False)],
    format: FormatOption = None,
    convention: ConventionOption = None,
    name: NameOption = None,
    json: JsonOption = False,
) -> None:
    """Write an adapter in another convention, with a config for its reader, and compare every change with the source's."""
    from moeglot.adapters.convert import convert_adapter

    done = convert_adapter(_open(path, base, format, convention, name), to, out_folder)
    told = {"schema": "moeglot/adapter-written/1", "out": str(out_folder), "convention": done.to.name, "tensors": done.tensors, "notes": list(done.notes)}
    if json:
        print_json(told)
        return
    shown = console()
    shown.print(f"{out_folder}: {done.tensors} tensors, {done.to.name}: {done.to.about}", highlight=False, markup=False)
    for note in done.notes:
        shown.print(f"  {note}", highlight=False, markup=False)


@app.command()
def conventions(json: JsonOption = False) -> None:
    """List the conventions, and who reads which."""
    from moeglot.conventions import CONVENTIONS, READERS

    if json:
        known = [{"name": c.name, "a": c.a, "b": c.b, "about": c.about, "source": c.source, "families": list(c.families)} for c in CONVENTIONS]
        readers = [{"name": r.name, "out_in": r.out_in.name, "in_out": r.in_out.name, "about": r.about} for r in READERS]
        print_json({"schema": "moeglot/conventions/1", "conventions": known, "readers": readers})
        return
    report.table(console(), "conventions (y = out, x = in)", ("name", "A", "B", "what it is"), [(c.name, c.a, c.b, c.about) for c in CONVENTIONS])
    rows = [(r.name, r.out_in.name, r.in_out.name, r.about) for r in READERS]
    report.table(console(), "readers", ("--to", "experts [out, in]", "gpt-oss [in, out]", "who"), rows)

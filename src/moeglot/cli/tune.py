"""`moeglot tune`: LoRA on the experts of any checkpoint, which stay encoded; with progress, curves, checkpoints, and the loss of text that it never saw."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from moeglot.cli.options import DeviceOption, DtypeOption, FormatOption, QuantizeOption, ResumeOption
from moeglot.cli.run import tokenizer_of
from moeglot.live import load
from moeglot.reports import curves


def tune(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder or a Hub id (owner/name).", show_default=False)],
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="JSONL (text, prompt and completion, or messages) or a text file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write; it must not exist, except with --resume.", show_default=False)],
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many steps.")] = 100,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows at a time.")] = 4,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches whose gradients make one step.")] = 1,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a row.")] = 128,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Learning rate at its highest.")] = 1e-3,
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of the adapter.")] = 8,
    alpha: Annotated[Optional[float], typer.Option("--alpha", help="Changes are multiplied by alpha / rank; by default 2.")] = None,  # noqa: UP045
    targets: Annotated[str, typer.Option("--targets", help="Which matrices of the experts.")] = "gate,up,down",
    modules: Annotated[str, typer.Option("--modules", help="Other Linear layers, adapted by PEFT, such as q_proj,o_proj.")] = "",
    dropout: Annotated[float, typer.Option("--dropout", min=0, help="Share of an adapter's inputs that are left out in a step.")] = 0.0,
    held_out: Annotated[float, typer.Option("--held-out", min=0.001, max=0.9, help="Share of the text that is not trained on.")] = 0.1,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints.")] = 50,
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Keep fewer activations and compute them again.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the adapter's start and the order of rows.")] = 0,
    encode: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    format: FormatOption = None,
    resume: ResumeOption = False,
) -> None:
    """Fine-tune the experts of a checkpoint in any format; DIR/adapter is a PEFT folder."""
    from moeglot.nn.data import read
    from moeglot.nn.tune import Recipe, check_new
    from moeglot.nn.tune import tune as train

    recipe = Recipe(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        length=length,
        rate=rate,
        warmup=min(10, max(1, steps // 10)),
        r=rank,
        alpha=alpha,
        targets=_words(targets),
        modules=_words(modules),
        dropout=dropout,
        held_out=held_out,
        save_every=save_every,
        checkpointing=checkpointing,
        seed=seed,
    )
    tokenizer = tokenizer_of(base)
    check_new(out, resume)  # and the text is read before a model, which may take minutes
    rows = read(data, tokenizer, length, held_out)
    model = load(base, dtype, device, format, native=True, encode=encode)
    with _bar() as step:
        record = train(model, tokenizer, rows, out, recipe, base=base, resume=resume, step=step)
    levels = {"held out, before": record.before, "held out, after": record.after}
    title = f"{base} on {data.name}"
    measured = f"{record.measured['rows']} of {record.measured['of']} rows"
    lines = [f"{name}: {value:.4f} nats a token ({measured})" for name, value in levels.items()]
    curves.page(out / "loss.html", f"moeglot tune {title}", record.losses, levels, lines)
    drawn = curves.png(out / "loss.png", title, record.losses, levels)
    for line in [*lines, f"adapter: {out / 'adapter'}", f"curves: {out / 'loss.html'}{' and loss.png' if drawn else ''}"]:
        print(line)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


@contextmanager
def _bar() -> Iterator[Callable[[int, int, float], None]]:
    """A bar with the loss on a terminal; a line for each tenth in a pipe; both on standard error."""
    err = Console(stderr=True)
    if not err.is_terminal:

        def line(done: int, total: int, loss: float) -> None:
            if 10 * done // total != 10 * (done - 1) // total:
                print(f"step {done} of {total}, loss {loss:.4f}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err) as progress:
        task = progress.add_task("training", total=None, loss="")

        def tell(done: int, total: int, loss: float) -> None:
            progress.update(task, completed=done, total=total, loss=f"{loss:.4f}")

        yield tell

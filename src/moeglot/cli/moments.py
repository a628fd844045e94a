"""`moeglot moments`: what a text makes of the experts' inputs, for `merge --round gptq:FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeglot.cli.options import FormatOption, JsonOption, print_json
from moeglot.cli.run import tokenizer_of
from moeglot.errors import UsageError
from moeglot.files import newfile


def moments(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint: a folder or a Hub id.", show_default=False)],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A text file, or JSONL.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="How many tokens to read at most.")] = 65536,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a row; what fills no row is left out.")] = 512,
    format: FormatOption = None,
    json: JsonOption = False,
) -> None:
    """Gather the second moments of the experts' inputs over a text; the experts stay encoded in memory."""
    newfile.check(output, "-o")
    if output.suffix != ".safetensors":
        raise UsageError(f"{output}: not named .safetensors", "that is what is written", f"pass -o {output.with_suffix('.safetensors')}")
    from moeglot.cli.progress import bar
    from moeglot.live import load
    from moeglot.nn import data
    from moeglot.nn.moments import gather

    tokenizer = tokenizer_of(base)
    model = load(base, "float32", format=format, native=True)
    length = min(length, tokens)
    rows = data.read(text, tokenizer, length, 0.0, prompts=True).train.tokens[: tokens // length]
    with bar(json) as progress:
        found = gather(model, rows, output, progress)
    if not found.sums:
        raise UsageError(f"{base}: no expert was reached", f"{rows.numel()} tokens were read", "pass a longer text")
    told = {"schema": "moeglot/moments/1", "file": str(output), "inputs": len(found.sums), "tokens": rows.numel(), "fewest": min(found.tokens.values())}
    if json:
        print_json(told)
    else:
        print(f"{output}: {told['inputs']} inputs over {told['tokens']} tokens; the expert that saw fewest saw {told['fewest']}")

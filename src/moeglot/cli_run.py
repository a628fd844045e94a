"""`moeglot run`: text from a checkpoint in any format, each token printed as soon as it is there."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from moeglot.errors import UsageError
from moeglot.live import load
from moeglot.remote import on_disk
from moeglot.source import read_source


def run(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder or a Hub id (owner/name).", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the text begins with.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens to add at most.")] = 64,
    dtype: Annotated[Optional[str], typer.Option("--dtype", help="bfloat16, float16 or float32; by default what config.json declares.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option("--device", help="Where the model goes, such as cuda; by default the CPU.")] = None,  # noqa: UP045
    format: Annotated[Optional[str], typer.Option("--format", metavar="FORMAT", help="What PATH is, if it does not say so itself.")] = None,  # noqa: UP045
    adapter: Annotated[Optional[str], typer.Option("--adapter", metavar="DIR", help="LoRA of its experts, in any convention.")] = None,  # noqa: UP045
    native: Annotated[bool, typer.Option("--native", help="Keep the experts encoded in memory; an adapter needs it.")] = False,
) -> None:
    """Continue a text with a checkpoint in any format, by transformers; greedy."""
    tokenizer = tokenizer_of(path)
    model = load(path, dtype, device, format, native=native or adapter is not None)
    if adapter is not None:
        from moeglot.nn import load_adapter

        model = load_adapter(model, adapter).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.shape[-1]:
        raise UsageError("the prompt is empty", "the tokenizer makes no token of it", 'pass --prompt "Some words"')
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), streamer=streamer, **options)


def tokenizer_of(path: str) -> Any:
    """The one beside the weights; asked for first, since it is small."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError("moeglot run needs transformers", str(error), "pip install 'moeglot[transformers]'") from error
    source = read_source(path)
    try:
        return AutoTokenizer.from_pretrained(on_disk(source.folder, "its tokenizer"))
    except (OSError, ValueError, ImportError) as error:  # the last where it then looks for a tokenizer of another kind
        raise UsageError(f"{path}: no tokenizer is here", str(error).strip().split("\n")[0], "put the producer's tokenizer files beside the tensors") from error

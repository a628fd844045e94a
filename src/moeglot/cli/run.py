"""`moeglot run`: text from a checkpoint in any format, each token printed as soon as it is there."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from moeglot.cli.options import ConventionOption, DeviceOption, DtypeOption, FormatOption, QuantizeOption
from moeglot.errors import UsageError
from moeglot.files.remote import on_disk
from moeglot.files.source import read_json, read_source
from moeglot.live import load

ONE_TEXT: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "token_healing": False,
    "is_assistant": False,
    **dict.fromkeys(("penalty_alpha", "dola_layers", "force_words_ids", "assistant_early_exit")),
}
"""One text is streamed, token by token, by the model alone: ways to generate that do otherwise, or that are code on the Hub, are not taken from
generation_config.json."""
COLDEST = 1e-30
"""The smallest temperature but 0: logits, divided by it, are finite in float32."""


def run(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder or a Hub id (owner/name).", show_default=False)],
    prompt: Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="What the text begins with.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens to add at most.")] = 64,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    format: FormatOption = None,
    adapter: Annotated[Optional[str], typer.Option("--adapter", metavar="DIR", help="LoRA of its experts, in any convention.")] = None,  # noqa: UP045
    convention: ConventionOption = None,
    native: Annotated[bool, typer.Option("--native", help="Keep the experts encoded in memory; an adapter and --encode need it.")] = False,
    encode: QuantizeOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="The text is what a user says: it is put into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="Of the distribution that tokens are drawn from; 0: the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the tokens that are drawn.")] = 0,
) -> None:
    """Continue a text, or answer it, with a checkpoint in any format, by transformers."""
    if len(prompt) > 1:
        raise UsageError(f"{len(prompt)} prompts", "a run continues one text", "run the command once for each --prompt")
    if convention is not None and adapter is None:
        raise UsageError(f"--convention {convention} without --adapter", "it says how an adapter's factors lie", "pass --adapter too, or leave it out")
    tokenizer = tokenizer_of(path)
    from moeglot.nn.data import check_ids, check_seed

    check_seed(seed)
    if 0 < temperature < COLDEST:
        known = f"logits divided by it may be more than float32 has; {COLDEST:g} takes the likeliest token, as 0 does"
        raise UsageError(f"temperature = {temperature}", known, "pass --temperature 0 for the likeliest tokens, or 0.8, for example")
    ids = _ids(tokenizer, prompt[0], chat)
    model = load(path, dtype, device, format, native=native or adapter is not None or encode is not None, encode=encode)
    check_ids(model, ids)
    if adapter is not None:
        from moeglot.nn import load_adapter

        model = load_adapter(model, adapter, convention=convention).eval()
    import torch
    from transformers import TextStreamer

    ids, streamer = ids.to(model.device), TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature, **_cut(path)} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    options |= {**ONE_TEXT, "tokenizer": tokenizer}
    model.generate(
        input_ids=ids, attention_mask=ids.new_ones(ids.shape), streamer=streamer, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id, **options
    )


def _cut(path: str) -> dict[str, Any]:
    """How many of the likeliest tokens are drawn from: what the checkpoint says, or all; transformers would take 50, and 5.x reads no config.json."""
    source = read_source(path)
    beside = source.home / "generation_config.json"
    declared = read_json(beside) if not source.single and beside.is_file() else source.config
    return {"top_k": declared.get("top_k") or 0}


def _ids(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """int64 [1, t]; raises `UsageError` where there is no token, or no template."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("the prompt is no text in UTF-8", f"it is {prompt!a}", "pass it in UTF-8")
    if chat and not tokenizer.chat_template:
        raise UsageError("--chat, and the model has no chat template", "its tokenizer's files have none", "leave --chat out: the text is then continued")
    if chat:
        from moeglot.nn.data import REFUSES

        said = [{"role": "user", "content": prompt}]
        try:
            return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        except REFUSES as error:
            raise UsageError("the chat template does not take the prompt", str(error), "leave --chat out: the text is then continued") from error
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.shape[-1]:
        raise UsageError("the prompt is empty", "the tokenizer makes no token of it", 'pass --prompt "Some words"')
    return ids


def tokenizer_of(path: str) -> Any:
    """The one beside the weights; asked for first, since it is small."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError("moeglot run needs transformers", str(error), "pip install 'moeglot[transformers]'") from error
    source = read_source(path)
    do = "put the producer's tokenizer files beside the tensors"
    try:
        tokenizer = AutoTokenizer.from_pretrained(on_disk(source.folder, "its tokenizer"))
    except (OSError, ValueError, ImportError) as error:  # the last where it then looks for a tokenizer of another kind
        raise UsageError(f"{path}: no tokenizer is here", " ".join(str(error).split()), do) from error
    if len(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}) < 2:  # every text would be end-of-text tokens
        known = f"transformers makes a {type(tokenizer).__name__} of config.json alone, and it knows no word"
        raise UsageError(f"{path}: no tokenizer is here", known, do)
    return tokenizer

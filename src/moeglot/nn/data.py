"""What a file of text becomes for training: rows of tokens and which of them are learned, some of them held out, and which rows each step sees."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError  # torch requires it

from moeglot.errors import BrokenFile, UsageError

KEYS = ("text", "prompt and completion", "messages")
READ = -100
"""The label of a token that is read and not learned, as torch and transformers have it."""
HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape in JSON that is half of a pair, and no character without the other half."""
REFUSES = (TemplateError, TypeError, ValueError, ArithmeticError)
"""What a chat template raises that does not take what it is given."""
Document = tuple[list[int], int]
"""Tokens, and how many of the first are read and not learned."""


@dataclass(frozen=True, eq=False)
class Rows:
    """`tokens` int64 [n, length]; `labels`: the same, or READ where no loss is taken."""

    tokens: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, which: list[int] | slice) -> Rows:
        return Rows(self.tokens[which], self.labels[which])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def learned(self) -> int:
        """How many tokens a loss is taken of: the first of a row has nothing before it."""
        return int((self.labels[:, 1:] != READ).sum())

    def split(self, size: int) -> Iterator[Rows]:
        return (Rows(*parts) for parts in zip(torch.split(self.tokens, size), torch.split(self.labels, size), strict=True))


@dataclass(frozen=True, eq=False)
class Data:
    """Rows to train on, and rows that are held out; `digest`: sha256 of the file."""

    train: Rows
    held_out: Rows
    digest: str

    def batch(self, step: int, size: int, seed: int) -> Rows:
        """[size, length]: the rows of a step, the same whenever it is asked; every epoch is in an order of its own."""
        return self.train[[self._row(n, seed) for n in range(step * size, (step + 1) * size)]]

    def sample(self, most: int) -> Rows:
        """At most so many of the rows that are held out, evenly spread over them."""
        rows = len(self.held_out)
        count = min(most, rows)
        return self.held_out[[(2 * n + 1) * rows // (2 * count) for n in range(count)]]

    def _row(self, n: int, seed: int) -> int:
        epoch, place = divmod(n, len(self.train))
        return int(_order(len(self.train), seed * 1_000_003 + epoch)[place])


@lru_cache(maxsize=2)
def _order(rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed % (1 << 64)), dtype=torch.int64, device="cpu")


def check_seed(seed: int) -> None:
    """Raises `UsageError` for one that torch does not take."""
    if not -(1 << 63) <= seed < 1 << 64:
        raise UsageError(f"seed = {seed}", "torch takes whole numbers from -2^63 to 2^64 - 1", "pass --seed 1, for example")


def check_ids(model: Any, tokens: torch.Tensor) -> None:
    """Raises `UsageError` for tokens that the model has no embedding of."""
    rows = len(model.get_input_embeddings().weight)
    if tokens.numel() and (most := int(tokens.max())) >= rows:
        raise UsageError(
            f"the tokenizer makes token {most}", f"the model has embeddings of tokens 0 to {rows - 1}", "put the tokenizer beside it that it was trained with"
        )


def check_fits(model: Any, *parts: torch.Tensor) -> None:
    """parts [n, length]: raises `UsageError` for tokens, and for rows, that the model does not take."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for tokens in parts:
        check_ids(model, tokens)
        if isinstance(most, int) and 0 < most < tokens.shape[-1]:
            known = f"config.json says max_position_embeddings = {most}"
            raise UsageError(f"rows of {tokens.shape[-1]} tokens are longer than the model reads", known, f"pass --length {most}, or less")


def read(path: str | Path, tokenizer: Any, length: int, share: float, *, prompts: bool = False) -> Data:
    """A JSONL file (an object a line, with "text", with "prompt" and "completion", or with "messages") or any other text file -> Data.

    Documents are the tokens that TRL's SFTTrainer makes of a row. They follow each other and are cut into rows, without those that are too few for one at the
    end; the last `share` of the rows is held out. Of a prompt no loss is taken, and rows that have nothing else are left out, unless `prompts` keeps them.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text", str(error), "pass a text file in UTF-8, or JSONL") from error
    if "\0" in text:
        raise UsageError(f"{path}: has NUL characters", "no text has; UTF-16 read as UTF-8 does", "pass a text file in UTF-8, or JSONL")
    lines = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    if whole := _is_one_value(text):
        raise BrokenFile(f"{path}: the whole file is {whole}", "JSONL has one object in each line", f"write one object a line, with {' or '.join(KEYS)}")
    if not lines and _is_object(first := next((line for line in text.split("\n") if line.strip()), "")):
        raise UsageError(f"{path}: its first line is a JSON object: {first[:60]}", "by its name it is plain text", "name it .jsonl, .ndjson or .json")
    ids: list[int] = []
    labels: list[int] = []
    for tokens, asked in _documents(path, text, tokenizer) if lines else [(tokenizer(text)["input_ids"], 0)]:
        ids += tokens
        labels += [READ] * asked + tokens[asked:]
    rows = len(ids) // length
    both = torch.tensor([ids, labels], dtype=torch.int64, device="cpu")[:, : rows * length].view(2, rows, length)
    every = Rows(*(both if prompts else both[:, (both[1, :, 1:] != READ).any(-1)]))
    kept = max(1, round(len(every) * share)) if share else 0
    if len(every) - kept < 1:
        what = f"{path}: {len(ids)} tokens are {rows} rows of {length}" + (f", of which {len(every)} have more than prompts" if len(every) < rows else "")
        needed = "one row must train and one be held out" if share else "one row is the least"
        raise UsageError(what, needed, f"pass --length {len(ids) // 4}, or more text" if len(ids) >= 8 else "pass more text")
    last = len(every) - kept
    return Data(every[:last], every[last:], hashlib.sha256(text.encode()).hexdigest())


def _is_one_value(text: str) -> str:
    """What JSON a file is that is not JSONL: a list of objects, or an object over several lines."""
    begin = text.lstrip()[:1]
    if begin == "[" or (begin == "{" and not _is_object(text.lstrip().partition("\n")[0])):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return ""
        if isinstance(found, dict):
            return "one JSON object over several lines"
        if isinstance(found, list) and found and all(isinstance(one, dict) for one in found):
            return f"one JSON list of {len(found)} objects"
    return ""


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _documents(path: Path, text: str, tokenizer: Any) -> Iterator[Document]:
    for n, line in enumerate(text.split("\n"), 1):  # other ends of lines may stand in a JSON string
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        try:
            row = json.loads(line)
            if HALF.search(line):
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BrokenFile(f"{where}: a surrogate alone, half a character", str(error), "write it whole, or leave the line out") from error
        except (ValueError, RecursionError) as error:
            told = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)  # to json, every line is line 1
            raise BrokenFile(f"{where}: no JSON", told, "JSONL has one object in each line") from error
        if not isinstance(row, dict):
            raise BrokenFile(f"{where}: {type(row).__name__}", "JSONL has one object in each line", f"give each line {' or '.join(KEYS)}")
        yield _document(where, row, tokenizer)


def _document(where: str, row: dict[str, Any], tokenizer: Any) -> Document:
    asked, answered = row.get("prompt"), row.get("completion")
    if isinstance(asked, str) and isinstance(answered, str):
        return _answer(tokenizer(asked)["input_ids"], _ended(asked + answered, tokenizer))
    if isinstance(asked, list) and isinstance(answered, list):
        return _answer(_chat(where, asked, row, tokenizer, prompt=True), _chat(where, [*asked, *answered], row, tokenizer))
    if isinstance(row.get("messages"), list) and row["messages"]:
        return _chat(where, row["messages"], row, tokenizer), 0
    if isinstance(row.get("text"), str):
        return _ended(row["text"], tokenizer), 0
    if isinstance(row.get("conversations"), list):
        raise _shared(where, "conversations")
    raise _no_text(where, row)


NAMES = {"str": "text", "list": "a list", "dict": "an object", "NoneType": "null", "bool": "true or false", "int": "a number", "float": "a number"}


def _no_text(where: str, row: dict[str, Any]) -> BrokenFile:
    """Says of known keys what they hold, and of Alpaca's what they are called here."""
    held = {key: NAMES[type(row[key]).__name__] for key in ("text", "prompt", "completion", "messages") if key in row}
    if held:
        told = " and ".join(f"{key} is {kind}" for key, kind in held.items())
        known = "text is text; prompt and completion are both text, or both lists of messages; messages is a list that is not empty"
        return BrokenFile(f"{where}: no text: {told}", known, "write the line so, or leave it out")
    do = "rename the keys, or leave the line out"
    if row.keys() >= {"instruction", "output"}:
        do = "rename instruction to prompt and output to completion; what stands in input, put at the end of prompt"
    return BrokenFile(f"{where}: no text in keys {', '.join(row)}", f"known are {' or '.join(KEYS)}", do)


def _ended(text: str, tokenizer: Any) -> list[int]:
    """With the special tokens that the tokenizer adds, and its end-of-text."""
    ids: list[int] = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _answer(asked: list[int], both: list[int]) -> Document:
    """The answer begins where the tokens of the prompt alone and of both differ: a token may span their border, and a template may end a prompt otherwise."""
    same = next((n for n, (one, other) in enumerate(zip(asked, both, strict=False)) if one != other), min(len(asked), len(both)))
    return both, same


def _chat(where: str, said: list[Any], row: dict[str, Any], tokenizer: Any, *, prompt: bool = False) -> list[int]:
    """What the chat template makes of messages, with the row's "tools" and "chat_template_kwargs"; special tokens are its own alone."""
    if not tokenizer.chat_template:
        raise UsageError(f"{where}: messages, and the model has no chat template", "its tokenizer's files have none", 'give each line "text"')
    for message in said:
        if isinstance(message, dict) and "from" in message and "role" not in message:
            raise _shared(where, "from and value")
        if not isinstance(message, dict) or "role" not in message:
            told = f"keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
            raise UsageError(f"{where}: a message is {told}", 'a message is an object with "role" and "content"', "write each message so")
    if not said:
        raise UsageError(f"{where}: no message", "a list of messages is empty", "leave the line out")
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        options |= {"add_generation_prompt": prompt, "tokenize": True, "return_dict": True, "return_tensors": None}
        found: list[int] = tokenizer.apply_chat_template(said, **options)["input_ids"]
    except REFUSES as error:
        raise UsageError(f"{where}: the chat template does not take this", str(error), "change the line, or leave it out") from error
    return found


def _shared(where: str, keys: str) -> UsageError:
    known = 'chat templates read "messages": [{"role": "user", "content": "..."}, ...]'
    return UsageError(
        f"{where}: {keys} are ShareGPT's keys", known, "rename conversations to messages, from to role (human is user, gpt assistant), value to content"
    )

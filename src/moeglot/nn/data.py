"""What a file of text becomes for training: runs of tokens, some of them held out, and which of them each step sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moeglot.errors import BrokenFile, UsageError

KEYS = ("text", "prompt and completion", "messages")


@dataclass(frozen=True, eq=False)
class Data:
    """`train` and `held_out` int64 [n, length]: rows of tokens; `digest`: sha256 of the file."""

    train: torch.Tensor
    held_out: torch.Tensor
    digest: str

    def batch(self, step: int, size: int, seed: int) -> torch.Tensor:
        """[size, length]: the rows of a step, the same whenever it is asked; every epoch is in an order of its own."""
        return self.train[[self._row(n, seed) for n in range(step * size, (step + 1) * size)]]

    def _row(self, n: int, seed: int) -> int:
        epoch, place = divmod(n, len(self.train))
        return int(_order(len(self.train), seed * 1_000_003 + epoch)[place])


@lru_cache(maxsize=2)
def _order(rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def read(path: str | Path, tokenizer: Any, length: int, share: float) -> Data:
    """A JSONL file (an object a line, with "text", with "prompt" and "completion", or with "messages") or any other text file -> Data.

    Documents follow each other, the tokenizer's end-of-text between them, and are cut into rows; the last `share` of the rows is held out.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text", str(error), "pass a text file in UTF-8, or JSONL") from error
    documents = list(_documents(path, text, tokenizer)) if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else [text]
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if len(documents) > 1 and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    rows = len(ids) // length
    kept = max(1, round(rows * share)) if share else 0
    if rows - kept < 1:
        what = f"{path}: {len(ids)} tokens are {rows} rows of {length}"
        needed = "one row must train and one be held out" if share else "one row is the least"
        raise UsageError(what, needed, f"pass --length {len(ids) // 4}, or more text" if len(ids) >= 8 else "pass more text")
    every = torch.tensor(ids[: rows * length]).view(rows, length)
    return Data(every[: rows - kept], every[rows - kept :], hashlib.sha256(text.encode()).hexdigest())


def _documents(path: Path, text: str, tokenizer: Any) -> Iterator[str]:
    for n, line in enumerate(text.split("\n"), 1):  # other ends of lines may stand in a JSON string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BrokenFile(f"{path}, line {n}: no JSON", str(error), "JSONL has one object in each line") from error
        if not isinstance(row, dict):
            raise BrokenFile(f"{path}, line {n}: {type(row).__name__}", "JSONL has one object in each line", f"give each line {' or '.join(KEYS)}")
        if said := _messages(row):
            if not tokenizer.chat_template:
                raise UsageError(f"{path}, line {n}: messages, and the model has no chat template", "its tokenizer's files have none", 'give each line "text"')
            yield str(tokenizer.apply_chat_template(said, tokenize=False))
        elif isinstance(row.get("text"), str):
            yield row["text"]
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            yield row["prompt"] + row["completion"]
        else:
            raise BrokenFile(f"{path}, line {n}: keys {', '.join(row)}", f"known are {' or '.join(KEYS)}", "rename the keys")


def _messages(row: dict[str, Any]) -> list[Any]:
    """What was said: "messages", or "prompt" and "completion" where these are lists of messages, as TRL has them; nothing where there are none."""
    if isinstance(row.get("messages"), list):
        return list(row["messages"])
    asked, answered = row.get("prompt"), row.get("completion")
    return [*asked, *answered] if isinstance(asked, list) and isinstance(answered, list) else []

"""docs/json.md against documents that the commands print: every key stands on the page, in the section of its schema or in one that the section names."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from adapters import WRITERS, Job
from synthetic import write_checkpoint

from moeglot.cli.main import main
from moeglot.layout import ROLES

SECTION = re.compile(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
DATA = {"by_layer", "config", "correlation", "dense", "files", "parts", "renamed", "ruled_out", "sha256", "sizes", "steps", "takes", "wrong_readings", "z"}
"""Fields whose own keys are names of files, tensors, steps or readings, as the page says by an arrow."""

COMMANDS = (
    "inspect base --deep",
    "formats",
    "convert base fp8 --to qwen3-moe/hub --encode fp8-block --dry-run",
    "convert base fp8 --to qwen3-moe/hub --encode fp8-block --allow-loss",
    "inspect fp8",
    "convert fp8 back --to qwen3-moe/hub --allow-loss",
    "convert base part --to qwen3-moe/hub --part 1/2",
    "merge base peft merged --convention peft --dry-run",
    "merge base peft merged --convention peft",
    "merge fp8 peft coded --convention peft --threshold 0",
    "compare base fp8",
    "verify fp8",
    "verify back --against base",
    "verify base --against fp8",
    "fingerprint base -o print.json",
    "adapter inspect peft --base base --convention peft",
    "adapter convert peft vllm --base base --convention peft --to vllm",
    "adapter conventions",
    "inspect nowhere",
)


def sections(page: str) -> dict[str, str]:
    """Schema -> its section, and those that it names."""
    found = {schema: text for title, text in SECTION.findall(page) for schema in re.findall(r"moeglot/[\w-]+/1", title)}
    return {schema: text + "".join(found[other] for other in re.findall(r"`(moeglot/[\w-]+/1)`", text) if other != schema) for schema, text in found.items()}


def keys(value: object, named: bool = True) -> Iterator[str]:
    """The keys of a document that are fields; roles, and numbers of layers and experts, are none."""
    if isinstance(value, list):
        for one in value:
            yield from keys(one, named)
    elif isinstance(value, dict):
        for key, inner in value.items():
            field = named and key not in ROLES and not re.fullmatch(r"[\d.]+", key)
            if field:
                yield key
            if key not in DATA:
                yield from keys(inner)
            elif key == "steps":
                yield from keys(list(inner.values()) if isinstance(inner, dict) else inner)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> dict[str, dict]:
    """Command -> what it prints with --json."""
    folder, found = tmp_path_factory.mktemp("json"), {}
    write_checkpoint(folder / "base", "qwen3-moe/hub", {"e": 4, "h": 128, "i": 128}, dtype=torch.bfloat16)
    WRITERS["PEFT"][2](Job("qwen3-moe", 4, 128, 128, 3)).save(folder / "peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            found[command] = printed(command)
    return found | {"print.json": json.loads((folder / "print.json").read_text())}


def printed(command: str) -> dict:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["moeglot", *command.split(), "--json"])
        with pytest.raises(SystemExit):
            main()
    return json.loads(out.getvalue())


@pytest.mark.parametrize("command", [*COMMANDS, "print.json"])
def test_every_key_stands_on_the_page(command, documents):
    document = documents[command]
    assert document["schema"].endswith("error/1") == (command == "inspect nowhere"), document
    page = sections((Path(__file__).parents[1] / "docs" / "json.md").read_text())[document["schema"]]
    words = {word for code in re.findall(r"`([^`]*)`", page) for word in re.findall(r"\w+", code)}
    assert sorted({*keys(document)} - words) == []


def test_what_is_ruled_out_is_of_the_family(documents):
    assert {name.partition("/")[0] for name in documents["inspect base --deep"]["ruled_out"]} == {"qwen3-moe"}

"""The whole story on the bundled model: convert, verify, return every byte, and let real transformers show what a wrong axis does."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.checks import Report
from moeglot.conversion.convert import convert
from moeglot.errors import OutputExists, UsageError
from moeglot.files.shards import tensor_bytes
from moeglot.inspection import inspection
from moeglot.layout import Stored
from moeglot.reports import report
from moeglot.verification.verify import verify

BUNDLED = Path(__file__).parent / "bundled" / "king-james"
PROMPT = "And God said"
WRONG_AXES = "e h i"


def tell(console: Console, keep: Path | None = None) -> int:
    """The story on the console; exit status 0 if everything came out as it must."""
    if keep is not None and keep.exists():
        raise OutputExists(f"{keep} exists", "moeglot overwrites nothing", "choose another folder for --keep")
    with tempfile.TemporaryDirectory() as folder:
        return _tell(console, keep or Path(folder))


def _say(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}[/]" if console.is_terminal else f"\n{number}. {text}", highlight=False)


def _tell(console: Console, folder: Path) -> int:
    _say(console, 1, "A trained gpt-oss model as openai stores one: MXFP4, square matrices (H = I), so no shape shows which way one lies")
    source = open(BUNDLED)
    inspection.show_inspect(console, source)
    _say(console, 2, "Convert it to BF16 for transformers; the output is re-read from disk and verified")
    there = convert(source, "gpt-oss/transformers", folder / "bf16")
    report.show_certificate(console, there)
    _say(console, 3, "Convert back to MXFP4: does every byte return?")
    back = convert(folder / "bf16", "gpt-oss/openai", folder / "mxfp4")
    returned = _same_tensors(source, open(folder / "mxfp4"))
    whole = (folder / "mxfp4" / "model.safetensors").read_bytes() == (BUNDLED / "model.safetensors").read_bytes()
    console.print(
        f"{returned} of {len(source.source.entries)} tensors returned byte for byte; the files are {'the same' if whole else 'different'}", highlight=False
    )
    _say(console, 4, f'A copy whose down_proj is written as "{WRONG_AXES}": same names, same shapes, same dtype')
    write_turned(folder / "bf16", folder / "turned")
    turned = verify(folder / "turned", source)
    report.show_report(console, turned, "the copy against the original")
    _say(console, 5, f'Real transformers continues "{PROMPT}", with no error and no warning from any of the three')
    return _continue(
        console,
        source,
        {"original": BUNDLED, "converted": folder / "bf16", "turned": folder / "turned"},
        turned,
        returned,
        whole and not back.report.exit_status,
    )


def _continue(console: Console, source: Checkpoint, folders: Mapping[str, Path], turned: Report, returned: int, bytes_hold: bool) -> int:
    try:
        from moeglot.integrations.transformers import continue_text
    except ImportError as error:
        raise UsageError("the last step of the demo needs transformers", str(error), "pip install 'moeglot[transformers]'") from error
    texts = {name: continue_text(open(path), PROMPT) for name, path in folders.items()}
    parity = {name: verify(open(path), "transformers").verdict for name, path in folders.items() if name != "turned"}
    rows = [
        ("original", texts["original"], f"transformers computes what we read: {parity['original']}"),
        (
            "converted",
            "identical" if texts["converted"] == texts["original"] else texts["converted"],
            f"transformers computes what we read: {parity['converted']}",
        ),
        ("turned", texts["turned"], f"against the original: {turned.verdict}"),
    ]
    for name, text, verdict in rows:
        console.print(f"\n{name} ({verdict})", highlight=False, style="bold" if console.is_terminal else "")
        console.print(textwrap.indent(textwrap.fill(text, 100), "    "), highlight=False, markup=False)
    holds = texts["original"] == texts["converted"] != texts["turned"] and set(parity.values()) == {"holds"} and turned.exit_status == 1
    holds = holds and bytes_hold and returned == len(source.source.entries)
    console.print("\nAs it must be." if holds else "\nNot as it must be: please report this.", highlight=False)
    return 0 if holds else 1


def _same_tensors(a: Checkpoint, b: Checkpoint) -> int:
    theirs = b.source.entries
    return sum(name in theirs and tensor_bytes(entry.read()) == tensor_bytes(theirs[name].read()) for name, entry in a.source.entries.items())


def write_turned(source: Path, out: Path) -> None:
    """A copy of a gpt-oss/transformers folder whose `down_proj` has its last two axes exchanged, as several released tools have written it."""
    import torch
    from safetensors.torch import save_file

    checkpoint = open(source)
    right = checkpoint.format.line_of("down")
    wrong: Stored = replace(right, axes=WRONG_AXES)
    tensors = {name: entry.read().clone() for name, entry in checkpoint.source.entries.items()}
    for layer in checkpoint.layers:
        experts = [checkpoint.expert(right, layer, expert)["down"] for expert in range(checkpoint.sizes["e"])]
        joined = [wrong.join({"down": expert}.__getitem__).parts["value"] for expert in experts]
        tensors[right.keys(layer)["value"]] = torch.stack(joined)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(checkpoint.source.config))
    for path in checkpoint.source.others():
        (out / path.name).write_bytes(path.read_bytes())

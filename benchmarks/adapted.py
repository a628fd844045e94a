"""An adapter of the bundled model, merged into every encoding by every rounding: what of it survives, and what a text that nobody trained on makes of it.

    apt-get download dict-devil && dpkg-deb -x dict-devil_*.deb devil        # The Devil's Dictionary, by Ambrose Bierce, 1911, in the public domain
    python benchmarks/adapted.py devil/usr/share/dictd/devil.dict.dz [--steps 400] [--rate 2e-3] [--rank 8] [--results FILE]

The base knows the King James Bible. The adapter is trained over its MXFP4 experts as `moeglot tune` does; a tenth of the text is held out. Losses are in nats
a token, computed by transformers in float32 of what each checkpoint holds; recovered is the share of the change that the merge reports, over all experts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import moeglot
from moeglot.demo import BUNDLED
from moeglot.nn import load_adapter
from moeglot.nn.data import Data, read
from moeglot.nn.moments import gather
from moeglot.nn.tune import Recipe, tune
from moeglot.survival import Survival

OPENAI, PLAIN, PACKED = "gpt-oss/openai", "gpt-oss/transformers", "gpt-oss/llm-compressor"
HELD_OUT = 96
"""Rows of 128 tokens."""
MERGES = {
    "MXFP4, nearest": (OPENAI, "nearest"),
    "MXFP4, stochastic": (OPENAI, "stochastic:0"),
    "MXFP4, delta": (OPENAI, "delta"),
    "MXFP4, gptq": (OPENAI, "gptq:{moments}"),
    "FP8 in blocks, nearest": (PACKED + "+fp8-block", "nearest"),
    "FP8 in blocks, delta": (PACKED + "+fp8-block", "delta"),
    "FP8 by channel, nearest": (PACKED + "+fp8-channel", "nearest"),
    "BF16": (PLAIN, "nearest"),
}


def plain_text(path: Path, out: Path) -> Path:
    """The dictionary without dictd's own entries and line breaks."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8") if path.suffix in (".dz", ".gz") else path.read_text(encoding="utf-8")
    out.write_text("\n".join(" ".join(entry.split()) for entry in text.split("\n\n")), encoding="utf-8")
    return out


@torch.no_grad()
def loss(model: torch.nn.Module, data: Data) -> float:
    """Nats a token of the first rows of what is held out."""
    rows = data.held_out.tokens[:HELD_OUT]
    found = [model(input_ids=some, use_cache=False).logits[:, :-1].float().log_softmax(-1) for some in rows.split(32)]
    return -float(torch.cat(found).gather(-1, rows[:, 1:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "adapted.json")
    asked = parser.parse_args()
    recipe = Recipe(steps=asked.steps, batch=8, r=asked.rank, rate=asked.rate, save_every=asked.steps)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        text, tokenizer = plain_text(asked.text, folder / "text.txt"), AutoTokenizer.from_pretrained(BUNDLED)
        data = read(text, tokenizer, recipe.length, recipe.held_out)
        found: dict[str, tuple[float, float | None]] = {"base": (loss(moeglot.load(BUNDLED, "float32"), data), None)}
        tune(moeglot.load(BUNDLED, "float32", native=True), tokenizer, text, folder / "tuned", recipe, base=str(BUNDLED))
        live = load_adapter(moeglot.load(BUNDLED, "float32", native=True), folder / "tuned" / "adapter").eval()
        found["base and adapter, live"] = (loss(live, data), None)
        gather(live, data.train.tokens[:256], folder / "moments")
        for name, (to, rounding) in MERGES.items():
            out = folder / name
            certificate = moeglot.merge(
                BUNDLED, folder / "tuned" / "adapter", out, to=to, round=rounding.format(moments=folder / "moments"), threshold=0, allow_loss=True
            )
            found[name] = (loss(moeglot.load(out, "float32"), data), sum(certificate.survived.values(), Survival()).rec)
    table = Table("", "held-out loss", "gained by the adapter", "recovered")
    base, best = found["base"][0], found["base and adapter, live"][0]
    for name, (nats, rec) in found.items():
        table.add_row(name, f"{nats:.4f}", f"{(base - nats) / (base - best):.1%}", "" if rec is None else f"{rec:.1%}")
    Console(width=110).print(table)
    told = {"date": date.today().isoformat(), "steps": asked.steps, "rate": asked.rate, "rank": asked.rank, "held_out_loss_and_recovered": found}
    asked.results.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()

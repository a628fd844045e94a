"""How fast experts compute: moeglot's against transformers' eager, batched_mm and grouped_mm, and a LoRA step against PEFT's, as ratios within one run.

One layer of experts with random weights in bfloat16, the same for all. Contestants take turns, round after round, and the fastest round of each counts, so
that what slows the machine slows all. "stock" is transformers' own module, with its implementations and with `experts_implementation="moeglot"`; "native" is
moeglot.nn.Experts, which decodes as it computes. Forward + backward goes to the weights for "stock" and to the tokens alone for "native", whose weights are
frozen. Run on an idle machine, with transformers 5.23 and, for the LoRA step, PEFT:

    python benchmarks/experts.py [--family gpt-oss] [--e 32 --h 2880 --i 2880 --k 4] [--tokens 1,8,512,2048] [--rounds 5] [--results FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

import moeglot
from moeglot.encoding import Encoded, Encoding
from moeglot.encodings import by_name as encoding_by_name
from moeglot.encodings.plain import Plain
from moeglot.experts import Expert
from moeglot.format import Format
from moeglot.formats import by_name
from moeglot.integrations.transformers import register
from moeglot.integrations.transformers_native import lines_of
from moeglot.layout import Stored, values
from moeglot.nn import Experts, add_lora
from moeglot.nn.held import Held, encode

STOCK = ("eager", "batched_mm", "grouped_mm", "moeglot")
ENCODINGS = ("bfloat16", "mxfp4", "fp8-block", "nf4")
SHAPES = {"gpt-oss": {"e": 32, "h": 2880, "i": 2880, "k": 4}, "qwen3-moe": {"e": 128, "h": 2048, "i": 768, "k": 8}}
FORMATS = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/transformers-5"}
MEMORY = 6_000_000_000
"""Bytes that gathered matrices may take; batched_mm is left out beyond them."""
Work = Callable[[], Any]


def stock(family: str, e: int, h: int, i: int, k: int) -> torch.nn.Module:
    """transformers' own experts of one layer."""
    small = {"num_hidden_layers": 1, "vocab_size": 32, "hidden_size": h, "num_experts_per_tok": k, "num_attention_heads": 1, "num_key_value_heads": 1}
    if family == "gpt-oss":
        config = GptOssConfig(intermediate_size=i, num_local_experts=e, head_dim=16, **small)
    else:
        config = Qwen3MoeConfig(moe_intermediate_size=i, num_experts=e, head_dim=16, **small)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def native(family: str, module: torch.nn.Module, name: str, sizes: Mapping[str, int]) -> Experts:
    """The same numbers as moeglot holds them."""
    form, plain = by_name(FORMATS[family]), encoding_by_name("bfloat16")
    lines = form.stored if name == "bfloat16" else lines_of(form, encoding_by_name(name))
    config = {keys[0]: sizes[letter] for letter, keys in form.family.sizes.items() if letter in sizes}
    held = [_held(form, line, plain if isinstance(line.encoding, Plain) else line.encoding, module, sizes) for line in lines]
    return Experts(Expert.of(form.family, config), held, 0, form.family.name)


def _held(form: Format, line: Stored, encoding: Encoding, module: torch.nn.Module, sizes: Mapping[str, int]) -> Held:
    def read(expert: int) -> Encoded:
        roles: dict[str, Encoded] = {}
        for theirs in form.stored:
            if set(theirs.roles) & set(line.roles):
                roles |= theirs.split(values(getattr(module, theirs.short).detach()[expert]))
        return encode(line, encoding, roles, sizes)

    return Held(line, encoding, sizes, 0, read)


def measured(contestants: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Name -> seconds of its fastest round; all take turns."""
    found = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def contestants(module: Any, ours: Mapping[str, Experts], tokens: int, sizes: Mapping[str, int], backward: bool) -> dict[str, Work]:
    hidden = torch.randn(tokens, sizes["h"]).bfloat16()
    index = torch.stack([torch.randperm(sizes["e"])[: sizes["k"]] for _ in range(tokens)])
    weights = torch.softmax(torch.randn(tokens, sizes["k"]), -1).bfloat16()
    gathered = tokens * sizes["k"] * 3 * sizes["h"] * sizes["i"] * 2 * (3 if backward else 1)

    def of(one: Any, way: str | None) -> Work:
        def work() -> None:
            if way:
                one.config._experts_implementation = way
            given = hidden.clone().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                out = one(given, index, weights)
            if backward:
                out.sum().backward()
                one.zero_grad(set_to_none=True)

        return work

    found = {f"stock {way}": of(module, way) for way in STOCK if way != "batched_mm" or gathered <= MEMORY}
    return found | {f"native {name}": of(one, None) for name, one in ours.items()}


def lora_contestants(module: Any, ours: Mapping[str, Experts], tokens: int, sizes: Mapping[str, int], rank: int) -> dict[str, Work]:
    """A training step of an adapter of that rank: PEFT's ParamWrapper on the stock module, and moeglot's on encoded experts."""
    import copy

    from peft import LoraConfig, inject_adapter_in_model

    hidden = torch.randn(tokens, sizes["h"]).bfloat16()
    index = torch.stack([torch.randperm(sizes["e"])[: sizes["k"]] for _ in range(tokens)])
    weights = torch.softmax(torch.randn(tokens, sizes["k"]), -1).bfloat16()

    def step(one: Any, inner: Any, way: str | None) -> Work:
        def work() -> None:
            if way:
                inner.config._experts_implementation = way
            one(hidden.clone().requires_grad_(), index, weights).sum().backward()
            one.zero_grad(set_to_none=True)

        return work

    found: dict[str, Work] = {}
    box = torch.nn.ModuleDict({"experts": copy.deepcopy(module)})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    wrapped = inject_adapter_in_model(config, box)["experts"]
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in name)
    inner = next(part for part in wrapped.modules() if hasattr(part, "is_transposed"))
    for way in ("eager", "grouped_mm"):
        found[f"PEFT {way}"] = step(wrapped, inner, way)
    for name, one in ours.items():
        add_lora(one, rank)
        found[f"native {name}"] = step(one, None, None)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--family", choices=list(SHAPES), default="gpt-oss")
    for letter in "ehik":
        options.add_argument(f"--{letter}", type=int)
    options.add_argument("--tokens", default="1,8,512,2048")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "experts.json")
    given = options.parse_args()
    sizes = {letter: getattr(given, letter) or size for letter, size in SHAPES[given.family].items()}
    torch.manual_seed(0)
    register()
    module = stock(given.family, **sizes)
    counts, rows = [int(n) for n in given.tokens.split(",")], []
    for what in ("forward", "forward + backward", "LoRA step"):
        ours = {name: native(given.family, module, name, sizes) for name in ENCODINGS}
        for tokens in counts:
            if what == "LoRA step":
                try:
                    found = lora_contestants(module, ours, tokens, sizes, given.rank)
                except ImportError as error:
                    print(f"no LoRA step: {error}")
                    break
            else:
                found = contestants(module, ours, tokens, sizes, what != "forward")
            rows.append({"what": what, "tokens": tokens, "seconds": measured(found, given.rounds)})
            for one in ours.values():
                one.lora = torch.nn.ModuleDict()
            show(rows[-1])
    told = {
        "date": date.today().isoformat(),
        "device": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moeglot": moeglot.__version__,
        "family": given.family,
        "sizes": sizes,
        "rank": given.rank,
        "rounds": given.rounds,
        "rows": rows,
    }
    given.results.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def show(row: Mapping[str, Any]) -> None:
    """Seconds, and how many times as long as the fastest of the others' own."""
    theirs = min(seconds for name, seconds in row["seconds"].items() if not name.startswith("native") and name != "stock moeglot")
    table = Table("", "ms", "of the fastest other", title=f"{row['what']}, {row['tokens']} tokens")
    for name, seconds in row["seconds"].items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / theirs:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

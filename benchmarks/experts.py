"""How fast experts compute: moeglot's against transformers' eager, batched_mm and grouped_mm, and a LoRA step against PEFT's, as ratios within one run.

One layer of experts with random weights, the same for all: in bfloat16 where the CPU has products of it, else in float32, since transformers' own would take
minutes. Contestants take turns of some steps in a row, as training and generation are, and the fastest step of each counts: the first one of a turn finds the
caches and the memory of another contestant. What slows the machine slows all; one that needs more than SLOW seconds has a single step. "stock" is
transformers' own module, with its implementations and with `experts_implementation="moeglot"`; "native" is moeglot.nn.Experts, which decodes as it computes.
Forward + backward goes to the weights for "stock" and to the tokens alone for "native", whose weights are frozen. A LoRA step goes to tokens and factors for
all; "over forward + backward" is how many times as long it takes as that of the same experts without an adapter, the same contestant in the same turns. The
sizes are a quarter of gpt-oss-20b's: a few minutes on two idle cores. With transformers 5.23 and, for the LoRA step, PEFT:

    python benchmarks/experts.py [--family gpt-oss] [--e 32 --h 768 --i 768 --k 4] [--dtype float32] [--tokens 1,8,512,2048]
                                 [--rounds 3] [--clock wall] [--results FILE]

On a machine that is busy, OMP_NUM_THREADS=1 and --clock cpu count what one thread got of a processor.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from streaming import device
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

import moeglot
from moeglot.encoded import Encoded
from moeglot.encoding import Encoding
from moeglot.encodings import by_name as encoding_by_name
from moeglot.encodings.plain import Plain
from moeglot.experts import Expert
from moeglot.floats import values
from moeglot.format import Format
from moeglot.formats import by_name
from moeglot.integrations.transformers import register
from moeglot.integrations.transformers_native import format_of
from moeglot.layout import Stored
from moeglot.nn import Experts, add_lora
from moeglot.nn.grouped import has_kernels
from moeglot.nn.held import Held, encode

STOCK = ("eager", "batched_mm", "grouped_mm", "moeglot")
CODED = ("mxfp4", "fp8-block", "nf4")
SHAPES = {"gpt-oss": {"e": 32, "h": 768, "i": 768, "k": 4}, "qwen3-moe": {"e": 128, "h": 768, "i": 256, "k": 8}}
FORMATS = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/transformers-5"}
MEMORY = 4_000_000_000
"""Bytes that gathered matrices may take; batched_mm is left out beyond them."""
SLOW = 4.0
"""Seconds of the first turn, beyond which a contestant has no other."""
STEPS = 3
"""In a turn."""
PHASES = ("forward", "forward + backward", "LoRA step")
FROZEN = "native, no LoRA: "
Work = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def stock(family: str, dtype: torch.dtype, e: int, h: int, i: int, k: int) -> torch.nn.Module:
    """transformers' own experts of one layer."""
    small = {"num_hidden_layers": 1, "vocab_size": 32, "hidden_size": h, "num_experts_per_tok": k, "num_attention_heads": 1, "num_key_value_heads": 1}
    if family == "gpt-oss":
        config = GptOssConfig(intermediate_size=i, num_local_experts=e, head_dim=16, **small)
    else:
        config = Qwen3MoeConfig(moe_intermediate_size=i, num_experts=e, head_dim=16, **small)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    module = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def native(family: str, module: torch.nn.Module, name: str, sizes: Mapping[str, int]) -> Experts:
    """The same numbers as moeglot holds them."""
    form, plain = by_name(FORMATS[family]), encoding_by_name(str(next(module.parameters()).dtype).removeprefix("torch."))
    lines = form.stored if name not in CODED else format_of(form, encoding_by_name(name)).stored
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


def measured(contestants: Mapping[str, Work], rounds: int, clock: Callable[[], float]) -> tuple[dict[str, float], dict[str, str]]:
    """(name -> seconds of its fastest step, name -> why it has none); all take turns. The first round warms up, and counts for those that are slow."""
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, work in contestants.items():
        try:
            first[name] = timed(work, clock)
        except (RuntimeError, ValueError) as error:  # what a library cannot do is a finding
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    found = {name: seconds if seconds > SLOW else float("inf") for name, seconds in first.items()}
    for _ in range(rounds):
        for name in [name for name in first if first[name] <= SLOW]:
            found[name] = min(found[name], *(timed(contestants[name], clock) for _ in range(STEPS)))
    return found, failed


def timed(work: Work, clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def contestants(module: Any, ours: Mapping[str, Experts], tokens: int, sizes: Mapping[str, int], dtype: torch.dtype, backward: bool) -> dict[str, Work]:
    hidden = torch.randn(tokens, sizes["h"]).to(dtype)
    index = torch.stack([torch.randperm(sizes["e"])[: sizes["k"]] for _ in range(tokens)])
    weights = torch.softmax(torch.randn(tokens, sizes["k"]), -1).to(dtype)
    gathered = tokens * sizes["k"] * 3 * sizes["h"] * sizes["i"] * dtype.itemsize * (3 if backward else 1)

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


def lora_contestants(
    module: Any, bare: Mapping[str, Experts], ours: Mapping[str, Experts], tokens: int, sizes: Mapping[str, int], dtype: torch.dtype, rank: int
) -> dict[str, Work]:
    """A training step of an adapter of that rank: PEFT's ParamWrapper on the stock module, moeglot's on encoded experts, and what that takes without one."""
    from peft import LoraConfig, inject_adapter_in_model

    hidden = torch.randn(tokens, sizes["h"]).to(dtype)
    index = torch.stack([torch.randperm(sizes["e"])[: sizes["k"]] for _ in range(tokens)])
    weights = torch.softmax(torch.randn(tokens, sizes["k"]), -1).to(dtype)

    def step(one: Any, inner: Any, way: str | None) -> Work:
        def work() -> None:
            if way:
                inner.config._experts_implementation = way
            one(hidden.clone().requires_grad_(), index, weights).sum().backward()
            one.zero_grad(set_to_none=True)

        return work

    found: dict[str, Work] = {f"{FROZEN}{name}": step(one, None, None) for name, one in bare.items()}
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
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if has_kernels(torch.bfloat16) else "float32")
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "experts.json")
    options.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: what the process got of a busy machine; for one thread")
    given = options.parse_args()
    sizes = {letter: getattr(given, letter) or size for letter, size in SHAPES[given.family].items()}
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    register()
    dtype = getattr(torch, given.dtype)
    module = stock(given.family, dtype, **sizes)
    told = {
        "date": date.today().isoformat(),
        "device": device(),
        "threads": torch.get_num_threads(),
        "clock": given.clock,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moeglot": moeglot.__version__,
        "family": given.family,
        "sizes": sizes,
        "rank": given.rank,
        "rounds": given.rounds,
    }
    rows: list[dict[str, Any]] = []
    phases: tuple[str, ...] = PHASES
    if importlib.util.find_spec("peft"):
        told["peft"] = version("peft")
    else:
        phases = PHASES[:-1]
        Console().print("no LoRA step: PEFT is not installed")
    for what in phases:
        ours = {name: native(given.family, module, name, sizes) for name in (given.dtype, *CODED)}
        bare = {name: copy.deepcopy(one) for name, one in ours.items()} if what == "LoRA step" else {}
        for tokens in [int(n) for n in given.tokens.split(",")]:
            if what == "LoRA step":
                found = lora_contestants(module, bare, ours, tokens, sizes, dtype, given.rank)
            else:
                found = contestants(module, ours, tokens, sizes, dtype, what != "forward")
            seconds, failed = measured(found, given.rounds, CLOCKS[given.clock])
            for one in ours.values():
                one.lora = torch.nn.ModuleDict()
            rows.append({"what": what, "tokens": tokens, "seconds": seconds, "failed": failed})
            if what == "LoRA step":
                rows[-1]["over forward + backward"] = {name: seconds[f"native {name}"] / seconds[f"{FROZEN}{name}"] for name in ours}
            show(rows[-1])
            given.results.parent.mkdir(exist_ok=True)  # what is measured is kept, if the next is interrupted
            given.results.write_text(json.dumps({**told, "rows": rows}, indent=2) + "\n", encoding="utf-8")
            given.results.with_suffix(".svg").write_text(plot(rows), encoding="utf-8")


# --- telling -----------------------------------------------------------------------------------------------------------------------------


def is_ours(name: str) -> bool:
    return name.startswith("native") or name == "stock moeglot"


def fastest_other(row: Mapping[str, Any]) -> float:
    return min(seconds for name, seconds in row["seconds"].items() if not is_ours(name))


def show(row: Mapping[str, Any]) -> None:
    """Seconds, and how many times as long as the fastest of the others' own."""
    over = {f"native {name}": f"{times:.2f}" for name, times in row.get("over forward + backward", {}).items()}
    table = Table("", "ms", "of the fastest other", *(["over forward + backward"] if over else []), title=f"{row['what']}, {row['tokens']} tokens")
    for name, seconds in row["seconds"].items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / fastest_other(row):.2f}", *([over.get(name, "")] if over else []))
    for name, why in row["failed"].items():
        table.add_row(name, why, "")
    Console().print(table)


def plot(rows: list[dict[str, Any]]) -> str:
    """SVG: a bar for each contestant, its speed as a share of that of the fastest other."""
    width, left, y, shapes = 760, 260, 30, []
    one = left + (width - left - 60) / 2
    for row in rows:
        shapes.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end" font-weight="bold">{row["what"]}, {row["tokens"]} tokens</text>')
        y += 20
        for name, seconds in row["seconds"].items():
            speed = fastest_other(row) / seconds
            length = min(2.0, speed) / 2 * (width - left - 60)
            shapes.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{name}</text>')
            shapes.append(f'<rect x="{left}" y="{y}" width="{length:.0f}" height="14" fill="{"#3949ab" if is_ours(name) else "#8a8fa3"}"/>')
            shapes.append(f'<text x="{left + length + 6:.0f}" y="{y + 11}">{speed:.2f}</text>')
            y += 18
        y += 8
    shapes.append(f'<line x1="{one:.0f}" x2="{one:.0f}" y1="22" y2="{y}" stroke="#c62828"/><text x="{one:.0f}" y="16">the fastest other</text>')
    style = 'font-family="system-ui,sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 60} {y + 16}" {style}>{"".join(shapes)}</svg>\n'


if __name__ == "__main__":
    main()

"""What `gpu.py` measures, by name: each case one layer and what it is measured against. A case gives its figures one after the other, the cheap ones first.

"floor" is the bytes that a step cannot do without over the measured copy rate. "resident" is the same layer in bfloat16 by
`torch.nn.functional.grouped_mm`, "decoded" decodes it first in every step. Each round takes all contestants in turn; medians count; the cache is emptied before
each. Steps of few tokens are replayed from a CUDA graph, so that what the host does is left out, except "resident" where grouped_mm is a loop that waits for
the device and cannot be captured: the table says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from moeglot.encoding import Encoded, Encoding
from moeglot.encodings.plain import Plain
from moeglot.experts import Expert
from moeglot.formats import by_name
from moeglot.layout import Stored
from moeglot.nn import Experts, add_lora
from moeglot.nn.grouped import is_native
from moeglot.nn.held import Held
from moeglot.nn.routing import Routing

FLUSHED = 1 << 28
"""Bytes written between runs, more than any cache holds."""
Work = Callable[[], Any]
SIZES = {"e": 32, "h": 2880, "i": 2880, "k": 4}
"""Of gpt-oss-20b."""


@dataclass(frozen=True)
class Figure:
    """`ratio` is ours over the other's time (or bytes), or the other's over ours where `more` is better; `wanted` its bound."""

    name: str
    against: str
    ours_us: float
    ratio: float
    wanted: float
    more: bool = False

    @property
    def holds(self) -> bool:
        return self.ratio >= self.wanted if self.more else self.ratio <= self.wanted


def layer(sizes: Mapping[str, int], device: str) -> Experts:
    """Random experts of gpt-oss in MXFP4."""
    form, random = by_name("gpt-oss/openai"), torch.Generator().manual_seed(0)

    def held(line: Stored) -> Held:
        encoding: Encoding = Plain("BF16") if isinstance(line.encoding, Plain) else line.encoding
        shape = line.expert_shape(sizes)

        def read(expert: int) -> Encoded:
            if isinstance(encoding, Plain):
                return Encoded(encoding, {"value": torch.randn(shape, generator=random).bfloat16()}, shape)
            groups = (shape[0], shape[1] // 32)
            packed = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=random)
            return Encoded(encoding, {"packed": packed, "scale": torch.randint(115, 120, groups, dtype=torch.uint8, generator=random)}, shape)

        return Held(line, encoding, sizes, 0, read)

    config = {keys[0]: sizes[letter] for letter, keys in form.family.sizes.items() if letter in sizes}
    return Experts(Expert.of(form.family, config), [held(line) for line in form.stored], 0, form.family.name, backend="triton").to(device)


class Resident:
    """The same layer with its matrices in bfloat16, by grouped_mm; `decode` makes them again in every step."""

    def __init__(self, module: Experts, dtype: torch.dtype, decode: bool = False) -> None:
        self.module, self.dtype, self.decode = module, dtype, decode
        self.lines = {line.line.short: line for line in module.lines}
        self.dense = {} if decode else {name: self.decoded(name) for name in self.lines}

    def decoded(self, name: str) -> torch.Tensor:
        return self.lines[name].dense(range(self.module.num_experts), self.dtype)

    def product(self, name: str, x: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor, factors: Any) -> torch.Tensor:
        matrix, bias = (self.decoded(part) if self.decode else self.dense[part] for part in (name, f"{name}_bias"))
        found = functional.grouped_mm(x, matrix.mT, offs=ends) + bias[ids]
        if factors:
            low = functional.grouped_mm(x, factors.a.to(self.dtype).mT, offs=ends) * factors.scale
            change = factors.roles_of(factors.b.to(self.dtype).mT)
            found = found + functional.grouped_mm(low, self.lines[name].line.together(change), offs=ends)
        return found

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routing = Routing.of(index, self.module.num_experts)
        places = torch.arange(len(routing.order), device=hidden.device, dtype=torch.int32)
        ids = torch.searchsorted(routing.ends, places, right=True)
        x = hidden[routing.order // routing.ranks]
        given = self.product("gate_up_proj", x, ids, routing.ends, self.module.factors(self.module.expert.first))
        inner = self.module.expert.activate(self.lines["gate_up_proj"].line.apart(given))
        out = self.product("down_proj", inner, ids, routing.ends, self.module.factors(("down",)))
        out = out * weights.reshape(-1)[routing.order].unsqueeze(-1)
        return torch.zeros_like(out).index_copy(0, routing.order, out).view(*index.shape, -1).sum(1)


def inputs(sizes: Mapping[str, int], tokens: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.stack([torch.randperm(sizes["e"])[: sizes["k"]] for _ in range(tokens)])
    weights = torch.softmax(torch.randn(tokens, sizes["k"]), -1)
    return torch.randn(tokens, sizes["h"]).to(dtype).to(device), index.to(device), weights.to(dtype).to(device)


def timed(contestants: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Name -> microseconds, the median."""
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for n in range(rounds + 3):
        for name, work in contestants.items():
            flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if n >= 3:
                found[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def captured(work: Work) -> Work:
    """The same work, replayed from a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copying(nbytes: int) -> Work:
    """A copy that reads and writes so many bytes together."""
    source, out = (torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: out.copy_(source)


def dequantizing(module: Experts, rounds: int) -> Figure:
    from moeglot.kernels.triton import dequant

    line = module.lines[0]
    packed, scale = line.get_buffer("part_packed"), line.get_buffer("part_scale")
    out = torch.empty(line.experts, *line.shape, dtype=torch.bfloat16, device="cuda")
    moved = packed.nbytes + scale.nbytes + out.nbytes
    found = timed({"ours": lambda: dequant.mxfp4(packed, scale, out), "copy": copying(moved)}, rounds)
    return Figure("MXFP4 to bf16, a layer's gate_up", "copy of as many bytes", found["ours"], found["ours"] / found["copy"], 1.15)


@torch.no_grad()
def few_tokens(module: Experts, sizes: Mapping[str, int], tokens: int, rounds: int) -> list[Figure]:
    given = inputs(sizes, tokens, "cuda", torch.bfloat16)
    share = len(given[1].unique()) / sizes["e"]
    resident = Resident(module, torch.bfloat16)
    native, step = is_native(given[0].device, torch.bfloat16), lambda: resident(*given)
    works = {"ours": captured(lambda: module(*given)), "resident": captured(step) if native else step, "floor": copying(int(module.nbytes * share))}
    found = timed(works, rounds)
    name = f"{tokens} tokens"
    return [
        Figure(name, "floor", found["ours"], found["ours"] / found["floor"], 1.5),
        Figure(name, "resident" if native else "resident, in a loop", found["ours"], found["resident"] / found["ours"], 2.3, more=True),
    ]


@torch.no_grad()
def many_experts(rounds: int) -> Figure:
    """gpt-oss-120b's shape at 128 rows an expert."""
    sizes = {"e": 128, "h": 2880, "i": 2880, "k": 4}
    module, given = layer(sizes, "cuda"), inputs(sizes, 128 * 128 // 4, "cuda", torch.bfloat16)
    decoded = Resident(module, torch.bfloat16, decode=True)
    found = timed({"ours": lambda: module(*given), "decoded": lambda: decoded(*given)}, rounds)
    return Figure("120b's shape, 128 rows an expert", "decoded", found["ours"], found["decoded"] / found["ours"], 2.5, more=True)


def training(sizes: Mapping[str, int], rounds: int) -> list[Figure]:
    """Forward and backward of a layer with an adapter of rank 16, 8192 tokens; the time, and the most memory that is in use."""
    module = layer(sizes, "cuda")
    add_lora(module, 16)
    given = inputs(sizes, 8192, "cuda", torch.bfloat16)

    def step(one: Any) -> Work:
        def work() -> None:
            one(given[0].clone().requires_grad_(), *given[1:]).sum().backward()
            module.zero_grad(set_to_none=True)

        return work

    def peak(work: Work) -> int:
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    ours = peak(step(module))
    resident = Resident(module, torch.bfloat16)
    theirs = peak(step(resident)) - module.nbytes
    found = timed({"ours": step(module), "resident": step(resident)}, rounds)
    name = "LoRA step, 8192 tokens, r = 16"
    return [
        Figure(name, "resident", found["ours"], found["ours"] / found["resident"], 1.35),
        Figure(f"{name}: memory", "resident", found["ours"], ours / theirs, 0.4),
    ]


def few(rounds: int) -> Iterator[Figure]:
    module = layer(SIZES, "cuda")
    for tokens in (1, 8, 64):
        yield from few_tokens(module, SIZES, tokens, rounds)


CASES: dict[str, Callable[[int], Iterable[Figure]]] = {
    "decoding": lambda rounds: [dequantizing(layer(SIZES, "cuda"), rounds)],
    "gpt-oss-20b": few,
    "gpt-oss-120b": lambda rounds: [many_experts(rounds)],
    "training": lambda rounds: training(SIZES, rounds),
}
"""Name -> from how many rounds, its figures; in the order in which they are measured: what is cheap comes first."""

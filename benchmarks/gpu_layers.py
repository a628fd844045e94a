"""The layers that `gpu_cases.py` measures: random experts in their codes, the same experts resident in bfloat16, and how the time of either is taken."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from moeglot.encoded import Encoded
from moeglot.encoding import Encoding
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.plain import Plain
from moeglot.experts import Expert
from moeglot.formats import by_name
from moeglot.kernels import backend
from moeglot.layout import Stored
from moeglot.nn import Experts, coded
from moeglot.nn.held import Held
from moeglot.nn.routing import Routing

FLUSHED = 1 << 28
"""Bytes written between runs, more than any cache holds."""
ROUNDS_BEFORE = 3
"""Not counted."""
Sizes = Mapping[str, int]
Work = Callable[[], Any]
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def layer(name: str, sizes: Sizes, device: str) -> Experts:
    """Random experts of a format, made on the device. `Held` puts them into memory of the CPU, wherever they come from, so that each line is sent there."""
    form, random = by_name(name), torch.Generator(device).manual_seed(0)

    def held(line: Stored) -> Held:
        encoding: Encoding = Plain("BF16") if isinstance(line.encoding, Plain) else line.encoding
        return Held(line, encoding, sizes, 0, lambda _: some(encoding, line.expert_shape(sizes), random)).to(device)

    config = {keys[0]: sizes[letter] for letter, keys in form.family.sizes.items() if letter in sizes}
    return Experts(Expert.of(form.family, config), [held(line) for line in form.stored], 0, form.family.name, backend="triton")


def some(encoding: Encoding, shape: tuple[int, ...], random: torch.Generator) -> Encoded:
    """Of one expert. Sums of their products with tokens are about 1."""
    if isinstance(encoding, Plain):
        return Encoded(encoding, {"value": torch.randn(shape, generator=random, device=random.device).bfloat16()}, shape)
    shapes = {part.name: part.shape(shape) for part in encoding.parts}
    if isinstance(encoding, MXFP4):
        numbers = {"packed": (0, 256), "scale": (117, 120)}
        return Encoded(encoding, {n: torch.randint(*numbers[n], shapes[n], dtype=torch.uint8, generator=random, device=random.device) for n in numbers}, shape)
    weight = torch.randn(shapes["weight"], generator=random, device=random.device).to(torch.float8_e4m3fn)
    return Encoded(encoding, {"weight": weight, "scale": torch.rand(shapes["scale"], generator=random, device=random.device) * 0.04}, shape)


class Resident:
    """The same layer with its matrices in bfloat16, gate and up as one, by grouped_mm; `decode`: made anew in each step, which waits for nothing."""

    def __init__(self, module: Experts, dtype: torch.dtype, decode: bool = False) -> None:
        self.module, self.dtype = module, dtype
        self.stages = [self._lines(module.expert.first), self._lines(("down",))]
        self.biases = [self._lines(tuple(f"{role}_bias" for role in roles)) for roles in (module.expert.first, ("down",))]
        self.dense = None if decode else [self.decoded(lines) for lines in self.stages]

    def _lines(self, roles: tuple[str, ...]) -> list[Held]:
        return [line for line in self.module.lines if set(line.line.roles) & set(roles)]

    def decoded(self, lines: list[Held]) -> torch.Tensor:
        """[e, out, in], the rows of several lines one after the other."""
        rows = [line.shape[0] for line in lines]
        dense = torch.empty(lines[0].experts, sum(rows), lines[0].shape[1], dtype=self.dtype, device=lines[0].device)
        for line, place in zip(lines, dense.split(rows, 1), strict=True):
            assert line.line.upright
            codes = coded.matrices(line, self.dtype)
            assert codes
            coded.decode(codes, place)
        return dense

    def product(self, n: int, x: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor) -> dict[str, torch.Tensor]:
        matrix = self.dense[n] if self.dense else self.decoded(self.stages[n])
        found = functional.grouped_mm(x, matrix.mT, offs=ends)
        for line in self.biases[n]:
            found = found + line.get_buffer("part_value").to(self.dtype)[ids]
        if factors := self.module.factors("down" if n else "first"):
            low = functional.grouped_mm(x, factors.a.to(self.dtype).mT, offs=ends) * factors.scale
            change = factors.roles_of(factors.b.to(self.dtype).mT)
            found = found + functional.grouped_mm(low, torch.cat([line.line.together(change) for line in self.stages[n]], -1), offs=ends)
        roles: dict[str, torch.Tensor] = {}
        for line, part in zip(self.stages[n], found.split([line.shape[0] for line in self.stages[n]], -1), strict=True):
            roles |= line.line.apart(part)
        return roles

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routing = Routing.of(index, self.module.num_experts)
        places = torch.arange(len(routing.order), device=hidden.device, dtype=torch.int32)
        ids = torch.searchsorted(routing.ends, places, right=True)
        x = hidden[routing.order // routing.ranks]
        inner = self.module.expert.activate(self.product(0, x, ids, routing.ends))
        out = self.product(1, inner, ids, routing.ends)["down"]
        out = out * weights.reshape(-1)[routing.order].unsqueeze(-1)
        return torch.zeros_like(out).index_copy(0, routing.order, out).view(*index.shape, -1).sum(1)


def reference(module: Experts, given: Given) -> torch.Tensor:
    """What the layer gives for these tokens in float32, one expert after the other, decoded by torch's tables."""
    before, module.backend = module.backend, "reference"
    try:
        with backend.using("torch"):
            return module(given[0].float(), given[1], given[2].float())
    finally:
        module.backend = before


def inputs(sizes: Sizes, tokens: int, device: str, dtype: torch.dtype) -> Given:
    random = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, sizes["e"], generator=random).topk(sizes["k"], sorted=False).indices
    weights = torch.softmax(torch.randn(tokens, sizes["k"], generator=random), -1)
    return torch.randn(tokens, sizes["h"], generator=random).to(dtype).to(device), index.to(device), weights.to(dtype).to(device)


def timed(contestants: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Name -> microseconds, the median."""
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for n in range(rounds + ROUNDS_BEFORE):
        for name, work in contestants.items():
            flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if n >= ROUNDS_BEFORE:
                found[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def in_kernels(work: Work) -> float:
    """Microseconds of one run that the device spends in kernels, however long the host takes to start them."""
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    return float(sum(each.self_device_time_total for each in found.key_averages()))


def captured(work: Work) -> Work:
    """The same work, replayed from a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copying(nbytes: int) -> Work:
    """A copy that reads and writes so many bytes together."""
    source, out = (torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: out.copy_(source)

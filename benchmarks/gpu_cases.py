"""What `gpu.py` measures, by name: each case one layer and what it is measured against. A case gives its figures one after the other, the cheap ones first.

"floor" is the bytes that a step cannot do without over the measured copy rate. "resident" is the same layer in bfloat16 by
`torch.nn.functional.grouped_mm`; "decoded" decodes it first in every step, by our kernels. Each round takes all contestants in turn; medians count; the cache
is emptied before each. Forward steps are replayed from a CUDA graph on both sides, so that what the host does is left out, except where grouped_mm is a loop
that waits for the device and cannot be captured: the table says so. A step that trains is not captured; the time in its kernels stands beside it.
Each figure has the relative error of what was timed, in float32 against the reference with matrices decoded by torch's tables, and that of the other side:
a fast wrong kernel does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_layers import Given, Resident, Sizes, Work, captured, copying, in_kernels, inputs, layer, reference, timed

from moeglot.experts import relative_error
from moeglot.kernels import backend
from moeglot.kernels.triton.gemm import Rows
from moeglot.nn import Experts, add_lora, coded
from moeglot.nn.grouped import is_native
from moeglot.nn.routing import Routing

ERROR = 2.0
"""Times the error of the other side: more is not rounding."""
DEVICE, DTYPE = "cuda", torch.bfloat16
TOKENS = 8192
"""Of a step that trains."""
ROWS = (512, 1024, 2048)
"""An expert's, where the crossover may be."""


@dataclass(frozen=True)
class Figure:
    """`ratio` is ours over the other's time (or bytes), or the other's over ours where `more` is better; `wanted` its bound, None where there is none.

    `error` is ours, `usual` that of the layer in bfloat16.
    """

    name: str
    against: str
    ours_us: float
    ratio: float
    wanted: float | None
    error: float
    usual: float
    more: bool = False

    @property
    def holds(self) -> bool:
        return self.error <= ERROR * self.usual + 1e-6 and (self.wanted is None or (self.ratio >= self.wanted if self.more else self.ratio <= self.wanted))


Shape = tuple[str, Sizes]
"""A format, and its sizes."""
SMALL: Shape = ("gpt-oss/openai", {"e": 32, "h": 2880, "i": 2880, "k": 4})
LARGE: Shape = ("gpt-oss/openai", {"e": 128, "h": 2880, "i": 2880, "k": 4})
QWEN: Shape = ("qwen3-moe/hub+fp8-block", {"e": 128, "h": 2048, "i": 768, "k": 8})
DEEPSEEK: Shape = ("deepseek-v3/hub+fp8-block", {"e": 256, "h": 7168, "i": 2048, "k": 8})


def fitting(shape: Shape) -> Shape:
    """With fewer experts where the codes and the same in bfloat16 would take more than half of the memory that is free."""
    name, sizes = shape
    experts, free = sizes["e"], torch.cuda.mem_get_info()[0]
    while 9 * experts * sizes["h"] * sizes["i"] > free // 2:
        experts //= 2
    return name, {**sizes, "e": experts}


def decoding(shape: Shape, rounds: int) -> Iterator[Figure]:
    """The first line of a layer to bfloat16."""
    line = layer(*shape, DEVICE).lines[0]
    codes, out = coded.matrices(line, DTYPE), torch.empty(line.experts, *line.shape, dtype=DTYPE, device=DEVICE)
    assert codes
    assert codes.scale is not None
    found = timed({"ours": lambda: coded.decode(codes, out), "copy": copying(codes.codes.nbytes + codes.scale.nbytes + out.nbytes)}, rounds)
    with backend.using("torch"):
        error = max(relative_error(out[n].float(), line.dense(range(n, n + 1), DTYPE)[0].float()) for n in range(0, line.experts, 16))
    yield Figure(f"{line.encoding} to bf16, {list(out.shape)}", "copy of as many bytes", found["ours"], found["ours"] / found["copy"], 1.15, error, 0.0)


def steps(module: Experts, given: Given, other: Resident, native: bool) -> tuple[Work, Work, float, float]:
    """Ours and the other's forward, captured where that can be, and the error of each."""
    expected = reference(module, given)
    errors = [relative_error(one(*given).float(), expected) for one in (module, other)]
    return captured(partial(module, *given)), captured(partial(other, *given)) if native else partial(other, *given), errors[0], errors[1]


@torch.no_grad()
def few(shape: Shape, rounds: int) -> Iterator[Figure]:
    name, sizes = fitting(shape)
    module, native = layer(name, sizes, DEVICE), is_native(torch.device(DEVICE), DTYPE)
    resident = Resident(module, DTYPE)
    for tokens in (1, 8, 64):
        given = inputs(sizes, tokens, DEVICE, DTYPE)
        ours, theirs, error, other = steps(module, given, resident, native)
        share = len(given[1].unique()) / sizes["e"]
        found = timed({"ours": ours, "resident": theirs, "floor": copying(int(module.nbytes * share))}, rounds)
        told = f"{tokens} tokens, {sizes['e']} × {sizes['h']} × {sizes['i']}"
        yield Figure(told, "floor", found["ours"], found["ours"] / found["floor"], 1.5, error, other)
        against = "resident" if native else "resident, in a loop"
        yield Figure(told, against, found["ours"], found["resident"] / found["ours"], 2.3, error, other, more=True)


@torch.no_grad()
def many(shape: Shape, rounds: int) -> Iterator[Figure]:
    """128 rows an expert."""
    name, sizes = shape
    module, given = layer(name, sizes, DEVICE), inputs(sizes, 128 * sizes["e"] // sizes["k"], DEVICE, DTYPE)
    native = is_native(torch.device(DEVICE), DTYPE)
    ours, theirs, error, other = steps(module, given, Resident(module, DTYPE, decode=True), native)
    found = timed({"ours": ours, "decoded": theirs}, rounds)
    yield Figure("128 rows an expert", "decoded", found["ours"], found["decoded"] / found["ours"], 2.5, error, other, more=True)


@torch.no_grad()
def crossover(shape: Shape, rounds: int) -> Iterator[Figure]:
    """Products with a line's codes against decoding it first, forward and backward: where `coded.CROSSOVER` should be."""
    name, sizes = shape
    module, usual = layer(name, sizes, DEVICE), coded.CROSSOVER
    line = module.lines[0]
    for rows in ROWS:
        routing = Routing.of(inputs(sizes, rows * sizes["e"] // sizes["k"], DEVICE, DTYPE)[1], sizes["e"])
        runs = Rows.of(routing.ends, routing.order, routing.ranks)
        for back in (False, True):
            x = torch.randn(len(routing.order), line.shape[0 if back else 1], device=DEVICE, dtype=DTYPE)

            def work(most: int, x: torch.Tensor = x, runs: Rows = runs, back: bool = back) -> torch.Tensor:
                coded.CROSSOVER = most
                try:
                    return coded.product(line, x, runs, back)
                finally:
                    coded.CROSSOVER = usual

            expected = _by_loop(line, x, routing.ends, back)
            errors = [relative_error(work(most).float(), expected) for most in (1 << 30, 0)]
            found = timed({"codes": captured(partial(work, 1 << 30)), "decoded": captured(partial(work, 0))}, rounds)
            told = f"{rows} rows an expert, {'backward' if back else 'forward'}"
            yield Figure(told, "decoded first", found["codes"], found["codes"] / found["decoded"], None, errors[0], errors[1])


def _by_loop(line: Any, x: torch.Tensor, ends: torch.Tensor, back: bool) -> torch.Tensor:
    """In float32, one expert after the other."""
    found, start = [], 0
    with backend.using("torch"):
        for n, end in enumerate(ends.tolist()):
            matrix = line.dense(range(n, n + 1), torch.float32)[0]
            found.append(x[start:end].float() @ (matrix if back else matrix.mT))
            start = end
    return torch.cat(found)


def training(shape: Shape, rounds: int) -> Iterator[Figure]:
    """Forward and backward of a layer with an adapter of rank 16; the time, the time in kernels, and the most memory that is in use."""
    name, sizes = shape
    module = layer(name, sizes, DEVICE)
    add_lora(module, 16)
    for lora in module.adapters.values():
        torch.nn.init.normal_(lora.b, std=0.01)
    given = inputs(sizes, TOKENS, DEVICE, DTYPE)

    def step(one: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        hidden = given[0].clone().requires_grad_()
        out = one(hidden, *given[1:])
        out.backward(given[0].to(out.dtype))
        found = [out.detach(), *(each.grad for each in (hidden, *module.parameters()) if each.grad is not None)]
        module.zero_grad(set_to_none=True)
        return found

    def peak(one: Callable[..., torch.Tensor]) -> int:
        step(one)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(one)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    ours = peak(module)
    resident = Resident(module, DTYPE)
    theirs = peak(resident) - module.nbytes
    expected = step(lambda hidden, index, weights: reference(module, (hidden, index, weights)))
    error, other = (max(relative_error(got.float(), each.float()) for got, each in zip(step(one), expected, strict=True)) for one in (module, resident))
    del expected
    works = {"ours": partial(step, module), "resident": partial(step, resident)}
    found = timed(works, rounds)
    told = f"LoRA step, {TOKENS} tokens, r = 16"
    yield Figure(f"{told}: memory", "resident", found["ours"], ours / theirs, 0.4, error, other)
    yield Figure(told, "resident", found["ours"], found["ours"] / found["resident"], 1.35, error, other)
    kernels = {one: in_kernels(work) for one, work in works.items()}
    yield Figure(f"{told}: in kernels", "resident", kernels["ours"], kernels["ours"] / kernels["resident"], 1.35, error, other)


CASES: dict[str, Callable[[int], Iterable[Figure]]] = {
    "decoding-mxfp4": partial(decoding, SMALL),
    "decoding-fp8": partial(decoding, QWEN),
    "gpt-oss-20b": partial(few, SMALL),
    "qwen3-30b-fp8": partial(few, QWEN),
    "gpt-oss-120b": partial(many, LARGE),
    "training": partial(training, SMALL),
    "crossover": partial(crossover, SMALL),
    "deepseek-v3-fp8": partial(few, DEEPSEEK),
}
"""Name -> from how many rounds, its figures; in the order in which they are measured: what is cheap comes first."""

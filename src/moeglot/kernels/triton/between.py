"""What stands between the products and after them: an expert's activation, and the sum over a token's slots; one kernel each, in float32, rounded once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from moeglot.kernels.triton.launch import beside, check, check_dtype, jit

KINDS = ("swiglu", "ungated", "clamped-swiglu", "limited-swiglu", "capped-swiglu", "softcapped-swiglu")
FUNCTIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu", "relu2": "relu2"}
COLUMNS = 512
"""Of a program."""
ALL = tl.constexpr(tl.PropagateNan.ALL)
"""A NaN stays one, as in torch."""


def activated(kind: str, function: str, numbers: Mapping[str, float], given: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """role -> [n, i] of any strides, to [n, i], as `moeglot.experts.Expert.activate`; None for what the kernel does not know."""
    gate, up = given.get("gate"), given["up"]
    if function not in FUNCTIONS or kind not in KINDS or (gate is None) != (kind == "ungated"):
        return None
    check(up.device)
    check_dtype(up.dtype)
    rows, columns = up.shape
    out = up.new_empty(rows, columns)
    if kind == "softcapped-swiglu":
        first, second = numbers["gate_cap"], numbers["up_cap"]
    else:
        first, second = numbers.get("limit", float("inf")), numbers.get("alpha", 1.0)
    known = {"WIDTH": columns, "KIND": kind, "FUNCTION": FUNCTIONS[function], "COLUMNS": COLUMNS}
    other = up if gate is None else gate
    if rows:
        with beside(up):
            _activated[(rows * triton.cdiv(columns, COLUMNS),)](other, up, out, *other.stride(), *up.stride(), first, second, **known, num_warps=4)
    return out


def summed(slots: torch.Tensor, tokens: int) -> torch.Tensor:
    """[t k, h], each slot in its place -> [t, h]: the sum over a token's slots, one after the other."""
    check(slots.device)
    check_dtype(slots.dtype)
    out = slots.new_empty(tokens, slots.shape[1])
    if tokens:
        with beside(slots):
            _summed[(tokens * triton.cdiv(slots.shape[1], COLUMNS),)](
                slots.contiguous(), out, RANKS=len(slots) // tokens, WIDTH=slots.shape[1], COLUMNS=COLUMNS, num_warps=4
            )
    return out


@jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Near zero by its series, where one minus nearly one would lose digits."""
    square = x * x
    return tl.where(square < 0.01, x * (1 - square * (1 / 3 - square * (2 / 15))), 2 * tl.sigmoid(2 * x) - 1)


@jit
def _function(x: tl.tensor, FUNCTION: tl.constexpr) -> tl.tensor:
    if FUNCTION == "silu":
        found = x * tl.sigmoid(x)
    elif FUNCTION == "gelu":
        found = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        found = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        found = tl.maximum(x, 0.0, propagate_nan=ALL)
        if FUNCTION == "relu2":
            found = found * found
    return found


@jit
def _capped(x: tl.tensor, most: float) -> tl.tensor:
    return tl.minimum(x, most, propagate_nan=ALL)


@jit
def _activated(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_row: int,
    gate_column: int,
    up_row: int,
    up_column: int,
    first: float,
    second: float,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    FUNCTION: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """`first` and `second`: the caps of gate and up where they are soft, else the limit of both and what the gate is multiplied by in the sigmoid."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // across).to(tl.int64)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    u = tl.load(up + row * up_row + c * up_column, mask=c < WIDTH, other=0.0).to(tl.float32)
    if KIND == "ungated":
        found = _function(u, FUNCTION)
    else:
        g = tl.load(gate + row * gate_row + c * gate_column, mask=c < WIDTH, other=0.0).to(tl.float32)
        if KIND == "softcapped-swiglu":
            found = first * _tanh(g / first) * tl.sigmoid(g) * (second * _tanh(u / second))
        else:
            if KIND != "swiglu":
                u = tl.maximum(_capped(u, first), -first, propagate_nan=ALL)
            if KIND == "clamped-swiglu" or KIND == "limited-swiglu":
                g = _capped(g, first)
            if KIND == "clamped-swiglu":
                found = g * tl.sigmoid(g * second) * (u + 1)
            elif KIND == "capped-swiglu":
                found = _capped(_function(g, FUNCTION), first) * u
            else:
                found = _function(g, FUNCTION) * u
    tl.store(out + row * WIDTH + c, found.to(out.dtype.element_ty), mask=c < WIDTH)


@jit
def _summed(slots: tl.tensor, out: tl.tensor, RANKS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // across).to(tl.int64)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for rank in tl.static_range(RANKS):
        total += tl.load(slots + (token * RANKS + rank) * WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + c, total.to(out.dtype.element_ty), mask=c < WIDTH)

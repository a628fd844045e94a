"""FP8 E4M3 with torch: code × scale in float32, and back, for blocks of any size."""

from __future__ import annotations

from functools import cache

import torch

from moeglot import scratch
from moeglot.errors import BadNumbers, TensorMismatch
from moeglot.kernels import backend
from moeglot.kernels.grid import E4M3, Block, Grid, in_singles, largest, matrices, over, runs, settle, shape_of, slabs, step_of, times
from moeglot.kernels.lattice import Levels

LARGEST = 448.0  # of E4M3 "fn": no infinity, NaN is 0x7f and 0xff
NAN = 0x7F
HALF = 256
"""By how much a code's number is more than the float16 with the same bits of exponent and fraction."""
SIGN_AND_NUMBER = -0x4080  # 0xBF80 in a float16
BIAS = 127
AT_ONCE = 1 << 24  # numbers whose scales are found together; scratch is far less
DECODED = 1 << 19  # numbers that are decoded to be coded again
LEAST = 2.0**-117
"""The smallest float scale under which products with every code are normal, so that values tell their scale."""


def _nearest(quotients: torch.Tensor) -> torch.Tensor:
    codes = quotients.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return quotients.copy_(_halves(codes, torch.empty_like(codes, dtype=torch.int16))).mul_(HALF)


@cache
def _grid(dtype: str) -> Grid:
    magnitudes = torch.arange(1, NAN, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(torch.float32)
    if dtype == "F32":
        return Grid(tuple(magnitudes.flip(0).tolist()), _nearest, lambda scale: torch.ones_like(scale, dtype=torch.bool), kind=E4M3)
    return Grid(tuple(magnitudes.flip(0).tolist()), _nearest, lambda scale: scale.bfloat16().float() == scale, ulps=0, kind=E4M3)  # 4 + 8 bits are exact in 24


@cache
def levels() -> Levels:
    """All 256 codes; two are NaN."""

    def rounded(quotients: torch.Tensor) -> torch.Tensor:
        return quotients.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)

    return Levels(torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(torch.float32), rounded)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """A scale of any of the four types -> float32; U8 and E8M0 are powers of two biased by 127, 255 is NaN."""
    if scale.dtype == torch.uint8:
        return scale.view(torch.float8_e8m0fnu).to(torch.float32)
    return scale.to(torch.float32)


def scale_as(values: torch.Tensor, dtype: str) -> torch.Tensor | None:
    """The same numbers (float32) in another type, or None if it does not have all of them."""
    if dtype == "F32":
        return values
    if dtype == "BF16":
        rounded = values.to(torch.bfloat16)
        return rounded if torch.equal(rounded.to(torch.float32), values) else None
    mantissa, exponent = torch.frexp(values)
    byte = exponent - 1 + BIAS
    if bool(((mantissa != 0.5) | (byte < 0) | (byte > 254)).any()):
        return None
    return byte.to(torch.uint8) if dtype == "U8" else byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def decode(weight: torch.Tensor, scale: torch.Tensor, block: Block, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """weight F8_E4M3 [..., out, in], scale [..., ⌈out / block[0]⌉, ⌈in / block[1]⌉] -> [..., out, in], computed in float32.

    Raises `TensorMismatch` for a scale of another shape, `BadNumbers` for values that `dtype` cannot hold.
    """
    expected = shape_of(tuple(weight.shape), block)
    if tuple(scale.shape) != expected:
        raise TensorMismatch(
            f"a scale of shape {list(scale.shape)} does not belong to a weight of shape {list(weight.shape)}",
            f"blocks of {block[0] or 'all'} × {block[1] or 'all'} numbers have scales of shape {list(expected)}",
            "check weight_block_size in config.json",
        )
    factors = scale_values(scale)
    _representable(factors, dtype)
    values = backend.place(tuple(weight.shape), dtype, weight.device, out)
    if gpu := backend.on_gpu(weight, scale, values):
        found = gpu.fp8(backend.there(weight), backend.there(factors), block, backend.room(values))
        values = values if found is values else values.copy_(found)
        return _checked(values, weight, scale, factors, block)
    fast = backend.compiled("fp8", weight, values) if dtype in (torch.bfloat16, torch.float32) else None
    for codes, factor, to in zip(matrices(weight), matrices(factors), backend.places(values), strict=True):
        if fast:
            fast.decode(codes, factor, block, to)
            continue
        _multiply(codes, factor * HALF, block, to)
    return _checked(values, weight, scale, factors, block)


def _multiply(codes: torch.Tensor, large: torch.Tensor, block: Block, out: torch.Tensor) -> None:
    """F8_E4M3 [rows, columns] and HALF × float32 scale [tiles, tiles] -> out; a product in float32 and a rounded copy cost less than a rounded product."""
    halves = backend.working((min(len(codes), step_of(codes.shape[1])), codes.shape[1]), torch.int16, codes.device)
    for rows, some in in_singles(codes):
        out[rows] = times(some.copy_(_halves(codes[rows], halves[: len(some)])), rows, large, block)


def _halves(codes: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """F8_E4M3 -> their numbers / HALF: the bits of float16, made in `into`, int16; float32 of their own where some are NaN."""
    if has_nan(codes):
        return codes.to(torch.float32).div_(HALF)
    return into.copy_(codes.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(SIGN_AND_NUMBER).view(torch.float16)


def _checked(values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, factors: torch.Tensor, block: Block) -> torch.Tensor:
    if values.dtype == torch.bfloat16 and scale.dtype not in (torch.float32, torch.bfloat16) and bool((factors < 2.0**-124).any()):
        _exact(weight, factors, block, values)
    return values


def _representable(scale: torch.Tensor, dtype: torch.dtype) -> None:
    if bool((scale * LARGEST).isfinite().all()) or not scale.numel():
        return
    raise BadNumbers(
        f"an FP8 scale of {scale.nan_to_num(nan=float('inf')).max().item():g} makes values that are not finite",
        f"a value is code × scale, and codes go to {LARGEST:g}",
        "the file is damaged or its scales are not what its format says; compare its hash with its producer's",
    )


def _exact(weight: torch.Tensor, scale: torch.Tensor, block: Block, values: torch.Tensor) -> None:
    """A power of two under 2^-124 times a small code is less than bfloat16 has."""
    for codes, factor, out in zip(matrices(weight), matrices(scale), matrices(values), strict=True):
        if any(not torch.equal(times(codes[rows].to(torch.float32), rows, factor, block), out[rows].float()) for rows in runs(*codes.shape)):
            raise BadNumbers(
                "a value is too small for bfloat16",
                f"the smallest FP8 scale here is {scale.min().item():g}, and codes go down to 2^-9",
                "decode to float32, for example with --encode float32",
            )


def encode(values: torch.Tensor, block: Block, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """values [..., out, in] of a float type -> weight F8_E4M3 [..., out, in] and its scale in `dtype`. Keeps the sign of zero."""
    weight = scratch.empty(tuple(values.shape), torch.uint8).view(torch.float8_e4m3fn)
    factors = torch.empty(shape_of(tuple(values.shape), block), dtype=torch.float32, device="cpu")
    for given, codes, factor in zip(matrices(values), matrices(weight), matrices(factors), strict=True):
        for rows, tiles in slabs(given, block, AT_ONCE):
            factor[tiles] = _scales(given[rows], block, dtype)
            _codes(given[rows], factor[tiles], block, codes[rows])
    stored = scale_as(factors, dtype)
    assert stored is not None
    return weight, stored


def _scales(values: torch.Tensor, block: Block, dtype: str) -> torch.Tensor:
    """float32 [tiles, tiles], each a number of `dtype`; 1 for blocks of zeros, as transformers' Fp8Quantize writes."""
    amax = largest(values, block)
    if not bool(amax.isfinite().all()):
        raise BadNumbers(
            "a weight is NaN or infinite, which FP8 E4M3 cannot hold beside a finite scale",
            f"its codes go to {LARGEST:g}, and there is none for infinity (arXiv 2209.05433)",
            "find where the source lost its numbers; moeglot verify PATH names the tensor",
        )
    if dtype in ("U8", "F8_E8M0"):
        mantissa, exponent = torch.frexp(amax)  # amax = mantissa × 2^exponent, 448 = .875 × 2^9
        power = (exponent - 9 + (mantissa > 0.875).int()).clamp_(-BIAS, BIAS)
        return torch.where(amax == 0, 1.0, torch.ldexp(torch.ones_like(amax), power))
    scale = (amax / LARGEST).clamp_(min=LEAST)
    if dtype == "BF16":
        scale = scale.to(torch.bfloat16).to(torch.float32)  # the largest quotient is at most 448 × (1 + 2^-8), which rounds to 448
    return settle(values, torch.where(amax == 0, 1.0, scale), block, _grid(dtype), LEAST, amax)


def _codes(values: torch.Tensor, scale: torch.Tensor, block: Block, out: torch.Tensor) -> None:
    """The quotient in float32, rounded to the nearest code, ties to even."""
    if fast := backend.compiled("fp8", values):
        fast.encode(backend.in_half_or_single(values), scale, block, out)
        return
    for rows, some in in_singles(values):
        out[rows] = over(some.copy_(values[rows]), rows, scale, block)  # none rounds to more than 448


def largest_codes(weight: torch.Tensor, block: Block) -> torch.Tensor:
    """float32 [..., tiles, tiles]: the largest magnitude of a code in each block."""
    return torch.stack([largest(codes, block) for codes in matrices(weight)]).view(shape_of(tuple(weight.shape), block))


def has_nan(weight: torch.Tensor) -> bool:
    """Of the bytes with a sign and of those without, the largest is NaN; torch finds it in a fortieth of the time that comparing each byte takes."""
    return bool(weight.numel()) and (int(weight.view(torch.int8).amax()) == NAN or int(weight.view(torch.uint8).amax()) == NAN + 128)


def changed(weight: torch.Tensor, scale: torch.Tensor, block: Block, dtype: str) -> int:
    """How many blocks have another scale, or other codes, after decoding and encoding them."""
    count = 0
    for codes, factor in zip(matrices(weight), matrices(scale), strict=True):
        for rows, tiles in slabs(codes, block, DECODED):
            again, scale_again = encode(decode(codes[rows], factor[tiles], block, torch.float32), block, dtype)
            differ = codes[rows].contiguous().view(torch.uint8) != again.view(torch.uint8)
            count += int(((largest(differ, block) > 0) | (scale_values(factor[tiles]) != scale_values(scale_again))).sum())
    return count

"""MXFP4 with torch lookup tables: a pair of bytes is four values, one multiplication applies the scale; or compiled, bit for bit the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from moeglot.errors import BadNumbers
from moeglot.kernels import backend, e2m1, threads

GROUP = 32
BIAS = 127
LAST_FINITE = 252  # 6 × 2^(253 - 127) is more than the largest bfloat16 and float32
CHUNK = 1 << 19  # values at a time: the scratch of an encode or a decode stays near 10 MB whatever the matrix
BYTES = 1 << 22  # of codes that are turned at a time


def powers(scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """scale, integers from 0 to 255 -> 2^(s - 127), subnormals included; NaN for 255, as OCP says."""
    return scale.to(torch.uint8).view(torch.float8_e8m0fnu).to(dtype)


def decode(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """packed u8 [..., n, 16], scale u8 [..., n] -> [..., 32 n] in `dtype`; exact in bfloat16, float32 and float64.

    Raises `BadNumbers` for a scale of 255 (NaN in E8M0) and for codes that are infinite under their scale.
    """
    values = backend.place((*scale.shape[:-1], scale.shape[-1] * GROUP), dtype, packed.device, out)
    if dtype not in (torch.bfloat16, torch.float32):
        return values.copy_(decode(packed, scale, torch.float32))
    if gpu := backend.on_gpu(packed, scale, values):
        factors = backend.there(scale)
        found = gpu.mxfp4(backend.there(packed), factors, backend.room(values))
        _refuse_not_finite(factors, found)
        return values if found is values else values.copy_(found)
    fast, flat = backend.compiled("mxfp4", packed, scale, values), packed.flatten(-2)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()  # bytes are taken two and eight at a time
    for codes, factors, to in zip(backend.matrices(flat), backend.matrices(scale), backend.places(values), strict=True):
        if fast:
            if bad := fast.decode(codes.unflatten(-1, (-1, GROUP // 2)), factors, to):
                raise _not_finite(bad)
            continue
        decode_here = _decode_turned if _can_turn(codes, to) else _decode_rows
        decode_here(codes, factors, to)
        _refuse_not_finite(factors, to)
    return values


def times(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """x [n, 32 g], packed u8 [rows, g, 16], scale u8 [rows, g] up to LAST_FINITE -> [n, rows] in the dtype of x, summed in float32: x times the matrix
    turned, which is never decoded as a whole. For few rows of x; None where no kernel is compiled for that.
    """
    fast = backend.compiled("mxfp4", packed) if x.device.type == "cpu" and x.dtype != torch.float64 else None
    if fast is None:
        return None
    found, wide = torch.empty(len(x), len(packed), dtype=torch.float32, device="cpu"), x.float()
    step = max(1, -(-len(packed) // threads.shares(2 * packed.numel())))
    runs = [slice(at, at + step) for at in range(0, len(packed), step)]
    threads.together([partial(fast.times, wide, packed[run], scale[run], found[:, run]) for run in runs])
    return found.to(x.dtype)


def _decode_rows(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """packed u8 [rows, 16 n], scale u8 [rows, n] -> out [rows, 32 n] of any strides."""
    columns = max(1, out.shape[1])
    step = max(1, CHUNK // columns)
    numbers = backend.working((min(step, len(out)), out.shape[1]), out.dtype, out.device)
    for some, place in backend.in_rows(out, 1 << 22):
        for at in range(0, len(place), step):
            to = place[at : at + step]
            run = slice(some.start + at, some.start + at + len(to))
            found = e2m1.unpack(packed[run], numbers[: len(to)])
            torch.mul(_grouped(found), powers(scale[run], out.dtype).unsqueeze(-1), out=_grouped(to))


def _grouped(rows: torch.Tensor) -> torch.Tensor:
    """[rows, 32 n] -> [rows, n, 32], a view."""
    return rows.view(len(rows), rows.shape[1] // GROUP, GROUP)


def _can_turn(packed: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether rows lie as columns in memory, and codes so that eight bytes can be taken at once."""
    aligned = packed.storage_offset() % 8 == 0 and packed.stride(0) % 8 == 0 and packed.stride(1) == 1
    return out.dtype == torch.bfloat16 and out.stride(0) == 1 and out.stride(1) > 1 and aligned


def _decode_turned(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """packed u8 [rows, 16 n], scale u8 [rows, n] -> out bfloat16 [rows, 32 n] whose columns have no gaps: codes are turned, and columns decoded from them."""
    whole, groups = len(packed) - len(packed) % 4, scale.shape[1]
    step = max(4, BYTES // max(1, packed.shape[1]) // 4 * 4)
    for at in range(0, whole, step):
        run = slice(at, min(at + step, whole))
        codes, factors = e2m1.across(packed[run]), powers(scale[run].mT, out.dtype).contiguous().unsqueeze(1)
        to = out[run].mT.view(groups, GROUP, run.stop - at)
        some = 1 + CHUNK // (GROUP * to.shape[2])
        numbers = backend.working((min(some, groups), GROUP, to.shape[2]), out.dtype, out.device)
        words = backend.working((8 * len(numbers), 4, codes.shape[2]), torch.int32, out.device)
        for g in range(0, groups, some):
            count = min(some, groups - g)
            for column in range(4):
                words[: 8 * count, column] = codes[column, 8 * g : 8 * (g + count)]
            found = e2m1.look_up(words[: 8 * count], numbers[:count])
            torch.mul(found, factors[g : g + count], out=to[g : g + count])
    _decode_rows(packed[whole:], scale[whole:], out[whole:])


def _refuse_not_finite(scale: torch.Tensor, out: torch.Tensor) -> None:
    if scale.numel() and int(scale.max()) > LAST_FINITE and not bool(out.isfinite().all()):
        raise _not_finite(int(scale.max()))


def _not_finite(scale: int) -> BadNumbers:
    return BadNumbers(
        f"an MXFP4 scale of {scale} makes a value that is not finite",
        "a value is code × 2^(scale - 127), and 255 is NaN (OCP MX 1.0, 5.4.1)",
        "the file is damaged or not MXFP4; compare its hash with its producer's",
    )


def exponents(amax: torch.Tensor, scale_rule: str) -> torch.Tensor:
    """int32: the power of two of each group, from its largest magnitude (float32)."""
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa × 2^exponent, mantissa in [.5, 1)
    if scale_rule == "ceil":
        bump = mantissa > 0.75  # amax × 2^-(exponent - 3) would be more than 6
    elif scale_rule == "even":
        bump = mantissa >= 0.875  # 1.75 rounds up to the next power of two
    else:
        bump = torch.zeros_like(mantissa, dtype=torch.bool)
    return torch.where(amax == 0, -BIAS, exponent - 3 + bump.int()).clamp_(-BIAS, 254 - BIAS)


def _encode_rows(values: torch.Tensor, scale_rule: str, ties: str) -> tuple[torch.Tensor, torch.Tensor]:
    """values [n, 32] -> packed u8 [n, 16], scale u8 [n]."""
    exact = values.to(torch.float32)
    amax = exact.abs().amax(-1)
    if not bool(amax.isfinite().all()):
        raise _cannot_hold()
    exponent = exponents(amax, scale_rule)
    scaled = exact * powers(BIAS - exponent).unsqueeze(-1)
    return e2m1.packed(e2m1.nearest(scaled, ties)), (exponent + BIAS).to(torch.uint8)


def _cannot_hold() -> BadNumbers:
    return BadNumbers(
        "a weight is NaN or infinite, which MXFP4 cannot hold",
        "E2M1 has no such code (OCP MX 1.0, 5.3.3)",
        "find where the source lost its numbers; moeglot verify PATH names the tensor",
    )


def encode(values: torch.Tensor, scale_rule: str, ties: str) -> tuple[torch.Tensor, torch.Tensor]:
    """values [..., 32 n] of a float type -> packed u8 [..., n, 16], scale u8 [..., n]. Keeps the sign of zero."""
    packed = torch.empty(values.numel() // GROUP, GROUP // 2, dtype=torch.uint8, device=values.device)
    scale = torch.empty(len(packed), dtype=torch.uint8, device=values.device)
    fast, at = backend.compiled("mxfp4", values), 0
    for groups in _groups(values):
        some = slice(at, at := at + len(groups))
        if fast:
            if not fast.encode(backend.in_half_or_single(groups), scale_rule, ties, packed[some], scale[some]):
                raise _cannot_hold()
            continue
        packed[some], scale[some] = _encode_rows(groups, scale_rule, ties)
    leading = (*values.shape[:-1], values.shape[-1] // GROUP)
    return packed.view(*leading, GROUP // 2), scale.view(leading)


def _groups(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """values [..., 32 n] in runs of groups [m, 32]; a matrix whose numbers do not lie in order is copied a run of rows at a time."""
    rows = values if values.dim() == 2 and not values.is_contiguous() else values.reshape(-1, GROUP)
    step = max(1, CHUNK // rows.shape[1])
    for at in range(0, len(rows), step):
        yield rows[at : at + step].reshape(-1, GROUP)


def infinite(packed: torch.Tensor, scale: torch.Tensor) -> int | None:
    """packed u8 [..., n, 16], scale u8 [..., n] below 255 -> a scale under which some code of its group is infinite; None if there is none."""
    if not scale.numel() or int(scale.amax()) <= LAST_FINITE:
        return None
    large = scale > LAST_FINITE
    some, factors = packed[large], scale[large]
    largest = torch.tensor(e2m1.E2M1, device=packed.device, dtype=torch.float32)[torch.maximum(some & 7, (some >> 4) & 7).amax(-1).int()]
    bad = (largest * powers(factors)).isinf()
    return int(factors[bad].max()) if bool(bad.any()) else None


def undetermined(packed: torch.Tensor) -> int:
    """packed u8 [n, 16]: how many groups have no code above 3 (index 5), so that their scale cannot be known from their values."""
    if fast := backend.compiled("mxfp4", packed):
        return int(fast.undetermined(packed))
    words = (packed if packed.is_contiguous() and packed.storage_offset() % 8 == 0 else packed.clone(memory_format=torch.contiguous_format)).view(torch.int64)
    large = (words << 1).bitwise_and_(words).bitwise_and_(0x4444444444444444)  # the upper two of a magnitude's three bits
    return len(large) - int(torch.count_nonzero(large[:, 0] | large[:, 1]))

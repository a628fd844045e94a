"""MXFP4 with torch lookup tables: a pair of bytes is four values, one multiplication applies the scale; or compiled, bit for bit the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch

from moeglot.errors import BadNumbers
from moeglot.kernels import backend, e2m1, threads

GROUP = 32
BIAS = 127
LAST_FINITE = 252  # 6 × 2^(253 - 127) is more than the largest bfloat16 and float32
CHUNK = 1 << 19  # values at a time: the scratch of an encode or a decode stays near 10 MB whatever the matrix


@cache
def _scales(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256]: 2^(s - 127), subnormals included; NaN for 255, as OCP says."""
    exponents = torch.arange(256, dtype=torch.float64, device=device) - BIAS
    table = torch.exp2(exponents)
    table[255] = float("nan")
    return table.to(dtype)


def powers(scale: torch.Tensor) -> torch.Tensor:
    """scale, integers from 0 to 255 -> float32: 2^(s - 127)."""
    return _scales(torch.float32, scale.device)[scale.int()]


def decode(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """packed u8 [..., n, 16], scale u8 [..., n] -> [..., 32 n] in `dtype`; exact in bfloat16, float32 and float64.

    Raises `BadNumbers` for a scale of 255 (NaN in E8M0) and for codes that are infinite under their scale.
    """
    values = backend.place((*scale.shape[:-1], scale.shape[-1] * GROUP), dtype, packed.device, out)
    if dtype not in (torch.bfloat16, torch.float32):
        return values.copy_(decode(packed, scale, torch.float32))
    if gpu := backend.on_gpu(packed, scale, values):
        powers = backend.there(scale)
        found = gpu.mxfp4(backend.there(packed), powers, backend.room(values))
        _refuse_not_finite(powers, found)
        return values if found is values else values.copy_(found)
    fast = backend.compiled("mxfp4", packed, scale, values)
    for codes, powers, to in zip(backend.matrices(packed.flatten(-2)), backend.matrices(scale), backend.places(values), strict=True):
        if fast:
            if bad := fast.decode(codes.unflatten(-1, (-1, GROUP // 2)), powers, to):
                raise _not_finite(bad)
            continue
        for some, place in backend.in_rows(to, 1 << 22):
            rows = max(1, CHUNK // max(1, place.shape[1]))
            for at in range(0, len(place), rows):
                run = slice(some.start + at, some.start + min(at + rows, len(place)))
                groups = place[at : at + rows]
                straight = groups if groups.is_contiguous() else torch.empty(groups.shape, dtype=dtype, device=groups.device)
                _decode_groups(codes[run].reshape(-1, GROUP // 2), powers[run].reshape(-1), straight.view(-1, GROUP))
                if straight is not groups:
                    groups.copy_(straight)
    return values


def times(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """x [n, 32 g], packed u8 [rows, g, 16], scale u8 [rows, g] up to LAST_FINITE -> [n, rows] in the dtype of x, summed in float32: x times the matrix
    turned, which is never decoded as a whole. For few rows of x; None where no kernel is compiled for that.
    """
    fast = backend.compiled("mxfp4", packed) if x.device.type == "cpu" and x.dtype != torch.float64 else None
    if fast is None:
        return None
    found, wide = torch.empty(len(x), len(packed)), x.float()
    step = max(1, -(-len(packed) // threads.shares(2 * packed.numel())))
    runs = [slice(at, at + step) for at in range(0, len(packed), step)]
    threads.together([partial(fast.times, wide, packed[run], scale[run], found[:, run]) for run in runs])
    return found.to(x.dtype)


def _decode_groups(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """packed u8 [n, 16], scale u8 [n] -> out [n, 32]."""
    e2m1.unpack(packed, out).mul_(_scales(out.dtype, packed.device)[scale.int()].unsqueeze(-1))
    _refuse_not_finite(scale, out)


def _refuse_not_finite(scale: torch.Tensor, out: torch.Tensor) -> None:
    if scale.numel() and int(scale.max()) > LAST_FINITE and not bool(out.isfinite().all()):
        raise _not_finite(int(scale.max()))


def _not_finite(scale: int) -> BadNumbers:
    return BadNumbers(
        f"an MXFP4 scale of {scale} makes a value that is not finite",
        "a value is code × 2^(scale - 127), and 255 is NaN (OCP MX 1.0, 5.4.1)",
        "the file is damaged or not MXFP4; compare its hash with its producer's",
    )


def _exponents(amax: torch.Tensor, scale_rule: str) -> torch.Tensor:
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
    exponent = _exponents(amax, scale_rule)
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


def undetermined(packed: torch.Tensor) -> int:
    """How many groups have no code above 3 (index 5), so that their scale cannot be known from their values."""
    if fast := backend.compiled("mxfp4", packed):
        return int(fast.undetermined(packed))
    magnitude = torch.maximum(packed & 7, (packed >> 4) & 7)
    return int((magnitude.amax(-1) <= 5).sum())

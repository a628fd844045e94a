"""bitsandbytes' 4-bit codes with torch: codebooks, blocks over the flattened matrix, and its CPU kernels' arithmetic and roundings, bit for bit.

https://github.com/bitsandbytes-foundation/bitsandbytes (backends/default/ops.py, backends/cpu/ops.py, csrc/cpu_ops.cpp, functional.py), 0.50.2.
decode: codebook × absmax in float32, then one rounding to the dtype of the quant_state; the high nibble of a byte is the first value.
encode: absmax of each block, values × (1 / absmax) (a short last block: values / absmax), the nearest code; halfway is the lower value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch

from moeglot import scratch
from moeglot.errors import BadNumbers
from moeglot.kernels import backend
from moeglot.kernels.lattice import Levels

# Normal quantiles, as the library has them to the last digit; 0.0 is code 7.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # codes 8 to 15 are the same, negative; 8 is -0
NESTED_BLOCK = 256  # scales that share a scale
SMALLEST = 1e-38  # what the library divides by instead of less, and what it stores for a short last block of zeros
POSITIONS = 65535  # its CPU kernel rounds a scale to one of these steps of [-1, 1] before it takes the nearest of the 256
CHUNK = 1 << 19  # values at a time, a multiple of every block size

FEW = 32  # blocks that are looked at first


@cache
def codebook(kind: str) -> torch.Tensor:
    """float32 [16]: the value of each code, in units of a block's absmax.

    FP4's code 8 is -0, as in the library's kernels; its fallback for matrices of odd width, and the map that it stores, have +0 there.
    """
    if kind == "nf4":
        return torch.tensor(NF4, dtype=torch.float32, device="cpu")
    positive = torch.tensor(FP4_TWELFTHS, dtype=torch.float32, device="cpu") / 12
    return torch.cat([positive, -positive])


@cache
def _nearest_table(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [15] midpoints between neighbouring values, uint8 [16] codes by value; of FP4's two zeros 0 comes before 8."""
    values, codes = codebook(kind).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, codes.to(torch.uint8)


def _nearest(scaled: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 in [-1, 1] -> u8 codes. A value at a midpoint gets the lower one, so that FP4 codes small positive numbers as its second zero."""
    midpoints, codes = _nearest_table(kind)
    return codes[torch.bucketize(scaled, midpoints, out_int32=True)]


@cache
def levels(kind: str) -> Levels:
    """The sixteen codes of a codebook."""
    return Levels(codebook(kind), lambda quotients: _nearest(quotients.clamp(-1, 1), kind))


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """u8 [k, 1] -> u8 [2 k]: one code a byte; the high nibble is the first."""
    byte = packed.reshape(-1)
    return torch.stack([byte >> 4, byte & 15], -1).flatten()


@cache
def _pairs(kind: str, device: torch.device) -> torch.Tensor:
    """int64 [256]: the two float32 of a byte, high nibble first."""
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    return torch.stack([codebook(kind)[byte >> 4], codebook(kind)[byte & 15]], -1).view(torch.int64).flatten().to(device)


def _blocks(values: torch.Tensor, blocksize: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of the first block, [b, blocksize]) for runs of whole blocks of a flat tensor, then the short block as [1, rest]."""
    whole = values.numel() // blocksize
    step = max(1, CHUNK // blocksize)
    for at in range(0, whole, step):
        yield at, values[at * blocksize : min(at + step, whole) * blocksize].view(-1, blocksize)
    if values.numel() % blocksize:
        yield whole, values[whole * blocksize :].view(1, -1)


def decode(
    packed: torch.Tensor, absmax: torch.Tensor, kind: str, blocksize: int, count: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """packed u8 [⌈n/2⌉, 1], absmax float32 [⌈n/blocksize⌉] -> [n] in `dtype`: one product in float32, then one rounding."""
    values = backend.place((count,), dtype, packed.device, out)
    flat = packed.reshape(-1)
    if dtype in (torch.bfloat16, torch.float32) and values.is_contiguous() and (fast := backend.compiled("bnb4", packed, values)):
        fast.decode(flat, absmax, codebook(kind), blocksize, values)
        return values
    for first, to in _blocks(values, blocksize):
        at = first * blocksize
        codes = flat[at // 2 : (at + to.numel() + 1) // 2].int()
        numbers = _pairs(kind, codes.device).index_select(0, codes).view(torch.float32)[: to.numel()]
        to.copy_(numbers.view(to.shape).mul_(absmax[first : first + len(to)].unsqueeze(-1)))
    return values


def encode(values: torch.Tensor, kind: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """values [...] -> packed u8 [⌈n/2⌉, 1], absmax float32 [⌈n/blocksize⌉], and the dtype that decoding rounds to.

    A matrix whose every block lies on the grid (it was decoded from such codes, whatever their absmax) is coded without loss, and values held in
    float32 that lie on it in bfloat16 or float16 get that dtype. Any other is rounded as bitsandbytes does, and has its own dtype.
    """
    values = (values if values.dtype in (torch.float32, torch.bfloat16, torch.float16) else values.to(torch.float32)).reshape(-1)
    packed, absmax = _rounded(values, kind, blocksize)
    if not bool(absmax.isfinite().all()):
        raise BadNumbers(
            "a weight is NaN or infinite, which 4-bit codes cannot hold",
            "the largest code is one absmax, and float32 holds that",
            "find where the source lost its numbers; moeglot verify PATH names the tensor",
        )
    for dtype in (values.dtype, torch.bfloat16, torch.float16) if values.dtype == torch.float32 else (values.dtype,):
        held = values.to(dtype)
        if (dtype == values.dtype or torch.equal(held.to(values.dtype), values)) and (found := _exact(held, kind, blocksize)):
            return pack(found[0], kind), found[1], dtype
    return packed, absmax, values.dtype


def _rounded(values: torch.Tensor, kind: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """flat values -> packed u8 [⌈n/2⌉, 1] and absmax [blocks], as bitsandbytes rounds; an absmax is not finite where a number of its block is not."""
    packed = scratch.empty((-(-values.numel() // 2), 1), torch.uint8)
    absmax = torch.empty(-(-values.numel() // blocksize), dtype=torch.float32, device="cpu")
    fast = backend.compiled("bnb4", values) if values.dtype in (torch.bfloat16, torch.float32) else None
    for first, block in _blocks(values, blocksize):
        start = first * blocksize // 2
        into, largest = packed[start : start + -(-block.numel() // 2)], absmax[first : first + len(block)]
        if fast and block.shape[1] == blocksize:
            fast.nearest(block, *_nearest_table(kind), into, largest)
            continue
        codes, found = _round(block, kind, short=block.shape[1] < blocksize)
        into[:], largest[:] = pack(codes.flatten(), kind), found
    return packed, absmax


def _exact(values: torch.Tensor, kind: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """flat values -> codes u8 [n], absmax [blocks] that decode to the same bits; None if there are none, which the first blocks show already."""
    if values.numel() > FEW * blocksize and not _exact(values[: FEW * blocksize], kind, blocksize):
        return None
    codes = torch.empty(values.numel(), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-values.numel() // blocksize), dtype=torch.float32, device="cpu")
    for first, block in _blocks(values, blocksize):
        found, scale = _round(block, kind, short=block.shape[1] < blocksize)
        wrong = ~_same(found, scale, block, kind)
        again = _on_grid(block[wrong], kind)
        if again is None:
            return None
        found[wrong], scale[wrong] = again
        codes[first * blocksize : first * blocksize + block.numel()] = found.flatten()
        absmax[first : first + len(block)] = scale
    return codes, absmax


def _round(block: torch.Tensor, kind: str, short: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, s] -> codes u8 [b, s], absmax [b], as bitsandbytes rounds."""
    block = block.float()
    absmax = block.abs().amax(-1)
    if short:
        absmax = absmax.clamp(min=SMALLEST)
        scaled = block / absmax.unsqueeze(-1)
    else:
        scaled = block * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(-1)
    return _nearest(scaled.clamp(-1, 1), kind), absmax


def _same(codes: torch.Tensor, absmax: torch.Tensor, block: torch.Tensor, kind: str) -> torch.Tensor:
    """bool [b]: the codes decode to these bits, the sign of zero included."""
    integer = torch.int32 if block.dtype == torch.float32 else torch.int16
    decoded = (codebook(kind)[codes.int()] * absmax.unsqueeze(-1)).to(block.dtype)
    return (decoded.view(integer) == block.contiguous().view(integer)).all(-1)


def zeros(kind: str) -> torch.Tensor:
    """The codes of -0 and 0 in a block of zeros, whose absmax is 0."""
    return _nearest(torch.tensor([-1.0, 0.0], dtype=torch.float32, device="cpu"), kind)


def _on_grid(block: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """[b, s] -> codes [b, s] and absmax [b] that decode to it exactly, or None if a block has none.

    Its largest magnitude is one of the codebook's magnitudes times the absmax (negative ones come from nested scales), rounded.
    Zeros of either sign are codes of either sign under an absmax of 0.
    """
    if bool((block.float().sort(-1).values.diff(dim=-1) != 0).sum(-1).gt(15).any()):
        return None
    codes, absmax = _nearest(-block.signbit().float(), kind), torch.zeros(len(block), dtype=torch.float32, device="cpu")
    left = (~_same(codes, absmax, block, kind)).nonzero().flatten()
    magnitudes = sorted({abs(value) for value in codebook(kind).tolist()} - {0.0}, reverse=True)
    for unit in (sign * magnitude for magnitude in magnitudes for sign in (1, -1)):
        if not len(left):
            break
        rows = block[left]
        scaled = rows.float() / (rows.float().abs().amax(-1) / unit).unsqueeze(-1)
        found = _nearest(scaled.clamp(-1, 1), kind)
        if kind == "fp4":
            found[scaled == 0] = scaled[scaled == 0].signbit().to(torch.uint8) * 8
        middle = math.copysign(1, unit) * _middle_absmax(rows, found, kind)
        for scale in (middle, torch.nextafter(middle, 2 * middle), torch.nextafter(middle, 0 * middle)):
            right = _same(found, scale, rows, kind)
            codes[left[right]], absmax[left[right]] = found[right], scale[right]
        left = left[~_same(codes[left], absmax[left], rows, kind)]
    return None if len(left) else (codes, absmax)


def _middle_absmax(block: torch.Tensor, codes: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 [b]: the middle of the magnitudes of absmax with which every code [b, s] is rounded to its value [b, s]."""
    bits = block.contiguous().view(torch.int32 if block.dtype == torch.float32 else torch.int16)
    bits = bits & torch.iinfo(bits.dtype).max  # magnitudes of floats are in the order of their bits
    below, exact, above = ((bits + step).clamp(min=0).view(block.dtype).double() for step in (-1, 0, 1))
    unit = codebook(kind)[codes.int()].abs().double()
    counts = (exact > 0) & (unit > 0)
    least = torch.where(counts, (below + exact) / 2 / unit, 0).amax(-1)
    most = torch.where(counts, (exact + above) / 2 / unit, torch.inf).amin(-1)
    return ((least + most) / 2).float()


def pack(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """u8 [n] -> [⌈n/2⌉, 1], high nibble first; a missing last value is coded as zero."""
    if codes.numel() % 2:
        codes = torch.cat([codes, _nearest(torch.zeros(1, dtype=torch.float32, device="cpu"), kind)])
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(-1)


def undetermined(packed: torch.Tensor, absmax: torch.Tensor, kind: str, blocksize: int, dtype: torch.dtype) -> int:
    """How many blocks the values do not show: no code of ±1 gives away the absmax, or it is more exact than `dtype`."""
    largest = codebook(kind).abs() == 1
    shown = torch.zeros(len(absmax), dtype=torch.bool, device="cpu")
    for first, codes in _blocks(unpacked(packed), blocksize):
        shown[first : first + len(codes)] = largest[codes.int()].any(-1)
    return int((~shown | (absmax.to(dtype).float() != absmax)).sum())


# --- double quantization: absmax = nested codebook × nested scale + offset ---------------------------------------------------------------


@cache
def nested_codebook() -> torch.Tensor:
    """float32 [256]: the signed dynamic 8-bit type. Decade d of 7 is cut in 2^d steps, whose middles are its values; 0 and 1 are added."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def decode_nested(codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, offset: float) -> torch.Tensor:
    """codes u8 [b], scale float32 [⌈b/256⌉], values float32 [256] -> absmax float32 [b]: a product, then a sum, each rounded to float32."""
    spread = scale.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return values[codes.int()] * spread + torch.tensor(offset, dtype=torch.float32, device="cpu")


def encode_nested(absmax: torch.Tensor, given: float | None = None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """absmax float32 [b] -> codes u8 [b], scale float32 [⌈b/256⌉], offset: if none is given, the mean of all, as torch adds them up.

    Of more than 32 768 absmax, its last bit depends on the number of torch's threads, here as in the library.
    """
    offset = absmax.mean() if given is None else torch.tensor(given, dtype=torch.float32, device="cpu")
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = padded.abs().amax(-1)
    scaled = (padded * (1.0 / scale).unsqueeze(-1)).nan_to_num(-1.0).clamp(-1, 1)  # of equal absmax, code 0
    position = ((scaled + 1) * (POSITIONS / 2) + 0.5).int()
    return _nested_table()[position].flatten()[: len(absmax)], scale, offset.item()


@cache
def _nested_table() -> torch.Tensor:
    """u8 [65536]: the nearest code of each position."""
    values = nested_codebook().double()
    places = torch.arange(POSITIONS + 1, dtype=torch.float64, device="cpu") * 2 / POSITIONS - 1
    return torch.bucketize(places, (values[:-1] + values[1:]) / 2).to(torch.uint8)

"""NVFP4 with torch: groups of 16 codes with a scale each, under one float32; and how both levels of scales are found again from values.

value = code × S in float32, where S = scale × global (ModelOpt) or scale / global (compressed-tensors), rounded to float32 first, as both libraries do:
https://github.com/NVIDIA/TensorRT-Model-Optimizer/blob/main/modelopt/torch/quantization/qtensor/nvfp4_tensor.py
https://github.com/vllm-project/compressed-tensors (quantization/lifecycle/forward_helpers.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from moeglot.errors import BadNumbers
from moeglot.kernels import backend, e2m1
from moeglot.kernels.grid import CHUNK, neighbours

GROUP = 16
LARGEST_CODE, LARGEST_SCALE, SMALLEST_SCALE = 6.0, 448.0, 2.0**-9
LEAST, MOST = 2.0**-110, 2.0**110
"""What a global that multiplies may be, so that no product leaves the normal numbers of float32."""
ULPS = 4  # a value is twice rounded: its global is no further from the quotient


@dataclass(frozen=True)
class Rules:
    """`divides`: the global is the reciprocal of the factor, as in compressed-tensors."""

    divides: bool

    def factor(self, scale: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """float32: the effective scale S."""
        return scale / by if self.divides else scale * by

    def whole(self, amax: torch.Tensor) -> torch.Tensor:
        """The global (0-d) for the largest magnitude of a matrix: the largest group's scale becomes 448. 1 for a matrix of zeros."""
        most = LARGEST_CODE * LARGEST_SCALE
        found = most / amax if self.divides else amax / most
        lowest, highest = (1 / MOST, 1 / LEAST) if self.divides else (LEAST, MOST)
        return torch.where(amax == 0, 1.0, found.clamp(lowest, highest))

    def group(self, amax: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """The scales of groups, as float32 numbers of E4M3, for their largest magnitudes. Each library's order of operations, and its scale for zeros."""
        if self.divides:
            scale = rounded(by * (amax / LARGEST_CODE))
            return torch.where(scale == 0, 0.125, scale)
        scale = amax / (LARGEST_CODE * by)
        return rounded(torch.where(scale == 0, 1.0, scale).clamp_(min=SMALLEST_SCALE))


def rounded(scale: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of E4M3, at most 448."""
    return scale.clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn).to(torch.float32)


def decode(packed: torch.Tensor, scale: torch.Tensor, by: torch.Tensor, rules: Rules, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """packed u8 [..., out, in / 2], scale F8_E4M3 [..., out, in / 16], by float32 [..., 1, 1] -> [..., out, in]. Raises `BadNumbers`."""
    factor = rules.factor(scale.to(torch.float32), by)
    if not bool((factor * LARGEST_CODE).isfinite().all()):
        raise BadNumbers(
            "an NVFP4 scale makes values that are not finite",
            f"the global scales here are {by.flatten()[:4].tolist()}, and a scale of a group is at most 448",
            "the file is damaged, or its global scale multiplies where its format says that it divides",
        )
    values = backend.place((*packed.shape[:-1], packed.shape[-1] * 2), dtype, packed.device, out)
    fast = backend.compiled("nvfp4", packed, values) if dtype in (torch.bfloat16, torch.float32) else None
    for codes, factors, to in zip(backend.matrices(packed), backend.matrices(factor), backend.places(values), strict=True):
        if fast:
            fast.decode(codes, factors, to)
            continue
        rows = max(1, CHUNK // max(1, to.shape[1]))
        for at in range(0, len(to), rows):
            some = slice(at, at + rows)
            found = torch.empty(factors[some].numel(), GROUP, device=to.device, dtype=torch.float32)
            e2m1.unpack(codes[some].reshape(-1, GROUP // 2), found).mul_(factors[some].reshape(-1, 1))
            to[some] = found.view(to[some].shape)
    return values


def encode(values: torch.Tensor, rules: Rules, whole: float | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values [..., out, in] of a float type -> packed u8 [..., out, in / 2], scale F8_E4M3 [..., out, in / 16], global float32 [..., 1, 1].

    `whole`: the global, where it is not to be each matrix's own.
    """
    leading = values.shape[:-2]
    found = [_encode(matrix, rules, whole) for matrix in values.reshape(prod(leading), *values.shape[-2:])]
    packed, scale, by = (torch.stack(parts) for parts in zip(*found, strict=True))
    return packed.view(*leading, *packed.shape[1:]), scale.view(*leading, *scale.shape[1:]), by.view(*leading, 1, 1)


def common(matrices: Sequence[torch.Tensor], rules: Rules) -> float:
    """The global that all of these have if they are one matrix."""
    return float(_global([matrix.reshape(-1, GROUP) for matrix in matrices], rules)[0])


def _encode(matrix: torch.Tensor, rules: Rules, whole: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = matrix.reshape(-1, GROUP)
    if whole is None:
        by, exact = _global([groups], rules)
    else:
        _largest(groups)
        by = torch.tensor(whole, dtype=torch.float32, device="cpu")
        exact = not len(_refuting([groups], by, rules))
    packed = torch.empty(len(groups), GROUP // 2, dtype=torch.uint8, device="cpu")
    scale = torch.empty(len(groups), dtype=torch.float8_e4m3fn, device="cpu")
    fast = backend.compiled("nvfp4", matrix)
    for some in _runs(groups):
        given = groups[some].to(torch.float32)
        chosen = _fit(given, by.view(1), rules)[0][:, 0] if exact else rules.group(given.abs().amax(-1), by)
        factor = rules.factor(chosen, by)
        scale[some] = chosen.to(torch.float8_e4m3fn)
        if fast:
            fast.encode(given, factor, packed[some])
            continue
        quotients = given / factor.unsqueeze(-1)
        packed[some] = e2m1.packed(e2m1.nearest(quotients, "even"))
    return packed.view(len(matrix), matrix.shape[1] // 2), scale.view(len(matrix), matrix.shape[1] // GROUP), by


def _runs(groups: torch.Tensor) -> list[slice]:
    step = CHUNK // (4 * GROUP)
    return [slice(at, at + step) for at in range(0, len(groups), step)]


# --- scales that values came from ------------------------------------------------------------------------------------------------------


@cache
def _products() -> torch.Tensor:
    """float32, falling: what the largest magnitude of a matrix may be, in units of the global; a code times a scale."""
    scales = torch.arange(1, 0x7F, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(torch.float32)
    codes = torch.tensor(e2m1.E2M1[1:], dtype=torch.float32, device="cpu")
    products: torch.Tensor = torch.unique(codes.unsqueeze(-1) * scales)
    return products.flip(0)


def _largest(groups: torch.Tensor) -> torch.Tensor:
    """float32 (0-d): the largest magnitude, 0 of no groups. Raises `BadNumbers` if it is not finite."""
    amax = torch.stack([torch.zeros((), dtype=groups.dtype, device="cpu"), *(groups[some].abs().amax() for some in _runs(groups))]).amax().to(torch.float32)
    if not bool(amax.isfinite()):
        raise BadNumbers(
            "a weight is NaN or infinite, which NVFP4 cannot hold",
            "neither E2M1 nor a scale in E4M3 has a code for infinity",
            "find where the source lost its numbers; moeglot verify PATH names the tensor",
        )
    return amax


def _global(groups: Sequence[torch.Tensor], rules: Rules) -> tuple[torch.Tensor, bool]:
    """The global (0-d) of all groups [n, 16]; and whether, under it, every group is reproduced: then the values were NVFP4 before.

    A guess that fails names groups that it does not reproduce, and these rule out nearly all of the other guesses.
    """
    amax = torch.stack([_largest(some) for some in groups]).amax()
    usual = rules.whole(amax)
    witnesses = _refuting(groups, usual, rules)
    if not len(witnesses):
        return usual, True
    guesses = neighbours(_products() / amax if rules.divides else amax / _products(), ULPS)
    factors = 1 / guesses if rules.divides else guesses
    guesses = guesses[factors.isfinite() & (factors >= LEAST) & (factors <= MOST)]
    while True:
        for witness in witnesses:
            guesses = guesses[_fit(witness.unsqueeze(0), guesses, rules)[1][0]]
            if not len(guesses):
                return usual, False
        witnesses = _refuting(groups, guesses[0], rules)
        if not len(witnesses):
            return guesses[0], True


def _refuting(groups: Sequence[torch.Tensor], by: torch.Tensor, rules: Rules) -> torch.Tensor:
    """float32 [k, 16]: up to three groups that no scale reproduces under this global; none if all can be."""
    for given in (matrix[some].to(torch.float32) for matrix in groups for some in _runs(matrix)):
        odd = given[~_reproduced(given, rules.group(given.abs().amax(-1), by), by, rules)]  # the usual scale is right for most
        wrong = odd[~_fit(odd, by.view(1), rules)[1][:, 0]] if len(odd) else odd
        if len(wrong):
            return wrong[:3]
    return torch.empty(0, GROUP, dtype=torch.float32, device="cpu")


def _fit(groups: torch.Tensor, by: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, torch.Tensor]:
    """groups float32 [n, 16], globals [k] -> scales [n, k] that reproduce a group, the usual ones where none does, and bool [n, k]: whether one does."""
    amax = groups.abs().amax(-1, keepdim=True)
    scale = rules.group(amax, by)
    done = _reproduced_among(groups, amax, scale, by, rules, None)
    for code in reversed(e2m1.E2M1[1:]):
        if bool(done.all()):
            break
        other = rounded(amax * by / code if rules.divides else amax / by / code)
        better = _reproduced_among(groups, amax, other, by, rules, ~done & (other > 0))
        scale, done = torch.where(better, other, scale), done | better
    return scale, done


def _reproduced_among(
    groups: torch.Tensor, amax: torch.Tensor, scale: torch.Tensor, by: torch.Tensor, rules: Rules, wanted: torch.Tensor | None
) -> torch.Tensor:
    """groups [n, 16], their largest magnitudes [n, 1], scale [n, k], globals [k] -> bool [n, k]; the largest alone rules out nearly all that fail."""
    factor = rules.factor(scale, by)
    likely = e2m1.rounded(amax / factor, "even").mul_(factor) == amax
    likely = likely if wanted is None else likely & wanted
    if wanted is None and bool(likely.all()):
        return _reproduced(groups.unsqueeze(1), scale, by, rules)
    group, guess = likely.nonzero().unbind(1)
    return likely if not len(group) else likely.index_put((group, guess), _reproduced(groups[group], scale[group, guess], by[guess], rules))


def _reproduced(groups: torch.Tensor, scale: torch.Tensor, by: torch.Tensor, rules: Rules) -> torch.Tensor:
    """groups [..., 16], scale [...] -> bool [...]: code × S is every number of the group."""
    factor = rules.factor(scale, by).unsqueeze(-1)
    wrong = e2m1.rounded(groups / factor, "even").mul_(factor) != groups
    eight, others = wrong.view(torch.int64).unbind(-1)  # eight at a time
    return (eight | others) == 0


def power_of(matrices: Sequence[tuple[torch.Tensor, torch.Tensor]], rules: Rules) -> float | None:
    """packed u8 [out, n, 16] and power u8 [out, n] of MXFP4 -> the global under which all become NVFP4 with the same codes; None if there is none.

    The largest power becomes the scale 2^8 under a global that is a power of two; groups of zeros do not count.
    """
    used = torch.cat([(power.int() - 127)[(packed & 0x77).amax(-1) > 0] for packed, power in matrices])
    lowest, highest = (int(used.min()), int(used.max())) if len(used) else (8, 8)
    whole = highest - 8
    if highest - lowest > 17 or not -110 <= whole <= 110:
        return None
    return 2.0 ** (-whole if rules.divides else whole)


def from_powers(packed: torch.Tensor, power: torch.Tensor, rules: Rules, whole: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """MXFP4's packed u8 [..., out, n, 16] and power u8 [..., out, n] -> the same codes as NVFP4, or None if the powers are too far apart.

    `whole`: the global, where it is not to be each matrix's own.
    """
    count = prod(power.shape[:-2])
    pairs = zip(packed.reshape(count, *packed.shape[-3:]), power.reshape(count, *power.shape[-2:]), strict=True)
    found = [power_of([pair], rules) if whole is None else whole for pair in pairs]
    if None in found:
        return None
    by, powers = torch.tensor(found, dtype=torch.float32, device="cpu").view(*power.shape[:-2], 1, 1), torch.exp2(power.float() - 127)
    scale = (powers * by if rules.divides else powers / by).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float8_e4m3fn)
    moved = (rules.factor(scale.to(torch.float32), by) != powers) & ((packed & 0x77).amax(-1) > 0)
    return None if bool(moved.any()) else (packed.flatten(-2), scale.repeat_interleave(2, -1), by)


def raised(scale: torch.Tensor, by: torch.Tensor, times: int, rules: Rules) -> tuple[torch.Tensor, torch.Tensor]:
    """scale F8_E4M3 and global -> those of the same codes under a global that reaches 2^times as far; the smallest scales may be rounded."""
    return (scale.to(torch.float32) * 2.0**-times).to(torch.float8_e4m3fn), by * 2.0 ** (-times if rules.divides else times)


def changed(packed: torch.Tensor, scale: torch.Tensor, by: torch.Tensor, rules: Rules) -> int:
    """How many groups have another scale or other codes after decoding and encoding; all of a matrix whose global has changed."""
    again, scale_again, by_again = encode(decode(packed, scale, by, rules, torch.float32), rules)
    codes = (packed != again).view(*scale.shape, GROUP // 2).any(-1)
    return int((codes | (scale.view(torch.uint8) != scale_again.view(torch.uint8)) | (by != by_again)).sum())

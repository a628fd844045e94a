"""Laws of MXFP4, and its arithmetic against a slow reference written from the OCP text with Python numbers."""

import math
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_parts

from moeglot.encodings.mxfp4 import MXFP4, RULES, mxfp4
from moeglot.errors import BadNumbers
from moeglot.kernels import mxfp4 as kernel

pytestmark = pytest.mark.usefixtures("kernels")

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP MX 1.0, table 5


def slow_decode(byte: int, scale: int) -> list[float]:
    """Two values, low nibble first, as Python floats (binary64, exact)."""
    return [math.copysign(E2M1[nibble & 7] * 2.0 ** (scale - 127), -1 if nibble & 8 else 1) for nibble in (byte & 15, byte >> 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_decode_is_exact_over_all_bytes_and_scales(dtype):
    scales = torch.arange(253, dtype=torch.uint8)  # 253 and 254 have codes that are infinite, 255 is NaN
    packed = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(253, 16, 16).contiguous()
    found = kernel.decode(packed, scales.view(253, 1).expand(253, 16), dtype).view(253, 512).double()
    expected = torch.tensor([[v for byte in range(256) for v in slow_decode(byte, s)] for s in range(253)], dtype=torch.float64)
    assert torch.equal(found.view(torch.int64), expected.view(torch.int64))  # the sign of zero too


def test_scale_255_and_infinite_codes_are_refused():
    blocks = torch.full((1, 1, 16), 0x77, dtype=torch.uint8)
    for scale in (253, 254, 255):
        with pytest.raises(BadNumbers, match=str(scale)):
            kernel.decode(blocks, torch.tensor([[scale]], dtype=torch.uint8), torch.bfloat16)
    small = torch.full((1, 1, 16), 0x11, dtype=torch.uint8)  # .5 under the same scale is finite
    assert kernel.decode(small, torch.tensor([[254]], dtype=torch.uint8), torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("container", ["blocks", "packed", "int8"])
def test_check_knows_which_codes_are_infinite(container):
    encoding = mxfp4("openai", container)
    for scale, code in ((s, c) for s in (252, 253, 254) for c in range(16)):
        parts = make_parts(encoding, (2, 64), 1).parts
        power, packed = parts["scale"].clone(), parts["packed"].clone()
        power.view(torch.uint8).fill_(120)[1, 1] = scale
        packed.view(torch.uint8).view(2, 2, 16)[1, 1] = code  # and zeros
        found = encoding.check({"packed": packed, "scale": power})
        assert (found is None) == (abs(slow_decode(code, scale)[0]) < 2.0**128), (scale, code)


@pytest.mark.parametrize("container", ["blocks", "packed", "int8"])
def test_check_names_the_cause(container):
    """One scale that is NaN, also of zeros; scales that are all zero beside codes that are not, and neither zeros of either sign nor one other scale."""
    encoding = mxfp4("openai", container)
    for scales, codes, cause in (
        ((120, 255, 120, 120), (0, 0, 0, 0), "255, which is NaN"),
        ((0, 0, 0, 0), (0, 0, 0, 1), "all zero"),
        ((0, 0, 0, 0), (0, 0x88, 8, 0), None),  # zeros of either sign
        ((0, 0, 0, 1), (0, 0, 0, 1), None),
    ):
        parts = make_parts(encoding, (2, 64), 1).parts
        power, packed = parts["scale"].clone(), parts["packed"].clone()
        power.view(torch.uint8).copy_(torch.tensor(scales, dtype=torch.uint8).view(2, 2))
        packed.view(torch.uint8).view(4, 16).copy_(torch.tensor(codes, dtype=torch.uint8).view(4, 1))
        found = encoding.check({"packed": packed, "scale": power})
        assert cause in found if cause else found is None, (scales, codes)


def slow_encode(values: list[float], scale_rule: str, ties: str) -> tuple[int, list[int]]:
    """Biased scale and 32 codes, by search over exact fractions."""
    amax = max(abs(Fraction(v)) for v in values)
    if amax == 0:
        exponent = -127
    else:
        floor_log2 = math.frexp(float(amax))[1] - 1
        if scale_rule == "ceil":
            exponent = next(k for k in range(floor_log2 - 4, floor_log2 + 3) if amax / 6 <= Fraction(2) ** k)
        elif scale_rule == "floor":
            exponent = floor_log2 - 2
        else:  # even: round amax to one bit after the point, then take the exponent
            exponent = floor_log2 - 2 + (amax / Fraction(2) ** floor_log2 >= Fraction(7, 4))
        exponent = min(max(exponent, -127), 127)
    codes = []
    for v in values:
        magnitude = abs(Fraction(v)) / Fraction(2) ** exponent
        distances = [abs(magnitude - Fraction(c)) for c in E2M1]
        best = [n for n, d in enumerate(distances) if d == min(distances)]
        code = best[0] if len(best) == 1 else max(best) if ties == "away" else next(n for n in best if n % 2 == 0)
        codes.append(code | (8 if math.copysign(1, v) < 0 else 0))
    return exponent + 127, codes


GRID = st.builds(lambda n, e: n * 2.0**e, st.integers(-48, 48), st.integers(-12, 8))
NUMBERS = st.one_of(GRID, st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -0.0, 0.25, -0.75, 1.25, 2.5, 3.5, 5.0, 7.0, -6.0, 1e-38, -1e-40]))


@given(st.lists(NUMBERS, min_size=32, max_size=32), st.sampled_from(sorted(RULES)))
def test_encode_is_the_definition(values, rule):
    scale_rule, ties = RULES[rule]
    packed, scale = kernel.encode(torch.tensor([values]), scale_rule, ties)
    codes = [nibble for byte in packed.flatten().tolist() for nibble in (byte & 15, byte >> 4)]
    assert (int(scale), codes) == slow_encode([float(numpy.float32(v)) for v in values], scale_rule, ties)


@given(st.sampled_from(sorted(RULES)), st.integers(0, 2**31), st.sampled_from([torch.bfloat16, torch.float32]))
def test_decode_encode_decode_is_decode(rule, seed, dtype):
    """Every value that came from MXFP4 is encoded to itself, whatever the rule, and its bytes return unless its group has no code above 3."""
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (64, 1, 16), dtype=torch.uint8, generator=random)
    packed[::4] &= 0xDD  # some groups with small codes only, some with zeros
    packed[::8] &= 0x99
    packed[3] = 0x08
    scale = torch.randint(2, 253, (64, 1), dtype=torch.uint8, generator=random)
    encoding = mxfp4(rule)
    values = encoding.decode({"packed": packed, "scale": scale}, dtype)
    again = encoding.encode(values)
    assert torch.equal(encoding.decode(again, torch.float32).view(torch.int32), values.float().view(torch.int32))
    same = (again["packed"] == packed).all(-1) & (again["scale"] == scale)
    small = torch.maximum(packed & 7, (packed >> 4) & 7).amax(-1) <= 5  # index 5 is the value 3
    assert same[~small].all()
    assert int(small.sum()) == encoding.undetermined({"packed": packed})


def test_rules_differ_where_they_should():
    """The power of the test above: on numbers that are not on the grid, each rule gives other bytes."""
    values = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    coded = {rule: mxfp4(rule).encode(values) for rule in RULES}
    names = sorted(RULES)
    for a in names:
        for b in names:
            if a < b:
                differ = (coded[a]["packed"] != coded[b]["packed"]).any(-1) | (coded[a]["scale"] != coded[b]["scale"])
                assert differ.float().mean() > 0.005, (a, b)


def test_not_finite_is_refused():
    values = torch.ones(1, 32)
    for bad in (float("nan"), float("inf")):
        values[0, 5] = bad
        with pytest.raises(BadNumbers, match="NaN or infinite"):
            MXFP4().encode(values)

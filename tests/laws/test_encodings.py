"""Laws of FP8, NVFP4 and INT4, and their arithmetic against slow references written from the definitions with Python fractions."""

import math
from bisect import bisect_left
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_parts

from moeglot.encoded import Encoded
from moeglot.encoding import WHOLE, Part
from moeglot.encodings import ENCODINGS
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.gptq import GPTQ
from moeglot.encodings.int4 import INT4, SAME_CODES
from moeglot.encodings.int8 import INT8
from moeglot.encodings.mxfp4 import MXFP4, mxfp4
from moeglot.encodings.nvfp4 import NVFP4
from moeglot.encodings.plain import Plain
from moeglot.errors import BadNumbers, TensorMismatch, UnknownFormat, UsageError
from moeglot.kernels import fp8 as fp8_kernel

pytestmark = pytest.mark.usefixtures("kernels")

CODED = {name: encoding.upright for name, encoding in ENCODINGS.items() if not isinstance(encoding, Plain) and not name.startswith("mxfp4:")}
CODED |= {
    "fp8-block-64x32": FP8((64, 32), "F32"),
    "fp8-block-1x16:bf16": FP8((1, 16), "BF16"),
    "fp8-tensor:u8": FP8((WHOLE, WHOLE), "U8"),
    "int4:32 in float32": INT4(32, scale="F32"),
    "int4:64 in float16": INT4(64, "kimi", "F16", "I32"),
    "int4:32:asymmetric in float32": INT4(32, scale="F32", zero=True),
    "int4:64:asymmetric in float16": INT4(64, scale="F16", zero=True),
    "int8-tensor in float32": INT8((WHOLE, WHOLE), scale="F32"),
    "int8-group:32 in float32": INT8((1, 32), scale="F32"),
    "int8-channel:asymmetric in float32": INT8(symmetric=False, scale="F32"),
    "int8-pack:64:asymmetric in float16": INT8((1, 64), "words", symmetric=False, scale="F16", shape="I32"),
    "gptq:32, down": GPTQ(32, less=True, order=True),
    "gptq:channel in bfloat16, down": GPTQ(WHOLE, scale="BF16"),
    "awq:32:asymmetric, down": GPTQ(32, packing="awq", symmetric=False),
    "mxfp8 in e8m0": FP8((1, 32), "F8_E8M0"),
    "mxfp4 in int8": MXFP4(container="int8"),
    "mxfp4 packed": MXFP4(container="packed"),
}
EACH = pytest.mark.parametrize("encoding", CODED.values(), ids=CODED)
NEGATIVE = st.sampled_from([0.0, -0.0])


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def single(value: Fraction | float) -> Fraction:
    """The nearest float32. Exact where a binary64 holds the value, as it does for products and sums here; a quotient is rounded by numpy."""
    return Fraction(float(numpy.float32(float(value))))


def quotient(a: Fraction, b: Fraction) -> Fraction:
    return Fraction(float(numpy.float32(float(a)) / numpy.float32(float(b))))


def e4m3(byte: int) -> Fraction:
    """E4M3 "fn", table 1 of arXiv 2209.05433: bias 7, no infinity; 0x7f and 0xff are NaN."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(mantissa, 8) * Fraction(2) ** -6
    return -magnitude if byte & 128 else magnitude


E4M3 = [e4m3(byte) for byte in range(0x7F)]
E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def nearest(magnitude: Fraction, levels: list[Fraction]) -> int:
    """Index of the nearest level, ties to the even index, the last for all above."""
    after = bisect_left(levels, magnitude)
    if after in (0, len(levels)):
        return min(after, len(levels) - 1)
    below, above = magnitude - levels[after - 1], levels[after] - magnitude
    return after - (below < above or (below == above and after % 2 == 1))


# --- every encoding ----------------------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("shape", [(192, 256), (3, 64, 128)], ids=str)
@pytest.mark.parametrize("few", [False, True])
def test_decode_encode_decode_is_decode(encoding, shape, few):
    """On random parts, which no producer's rule would choose, and on those with few codes; blocks that do not return are counted, each of them."""
    for seed in range(2):
        parts = dict(make_parts(encoding, shape, seed).parts)
        if few:
            name = "weight" if "weight" in parts else "packed"
            mask = 0x99 if name == "packed" or parts[name].dtype == torch.int8 else 0xB7
            parts[name] = (parts[name].view(torch.uint8) & mask).view(parts[name].dtype)
        assert encoding.check(parts) is None
        values = encoding.decode(parts, torch.float32)
        assert values.shape == shape
        again = encoding.encode(values)
        assert {name: (part.dtype, part.shape) for name, part in again.items()} == {name: (part.dtype, part.shape) for name, part in parts.items()}
        assert encoding.check(again) is None
        returned = encoding.decode(again, torch.float32)
        assert torch.equal(returned, values)
        assert torch.equal(bits(returned), bits(values)) or encoding.name.startswith(("int4", "int8"))  # whose zero has the sign of its scale
        if encoding.undetermined(parts) == 0:
            assert all(torch.equal(again[name].view(torch.uint8), parts[name].view(torch.uint8)) for name in parts)
        assert encoding.undetermined(again) <= encoding.undetermined(parts)


@EACH
def test_what_an_encoder_writes_returns(encoding):
    """Numbers that are on no grid: encoded once they are on one, and then every byte returns, even where no block was full."""
    values = torch.randn(192, 256, generator=torch.Generator().manual_seed(1))
    for given_values in (values, values.bfloat16(), values * 1e-5):
        parts = encoding.encode(given_values)
        again = encoding.encode(encoding.decode(parts, torch.float32))
        assert torch.equal(encoding.decode(again, torch.float32), encoding.decode(parts, torch.float32))
        # A group that was rounded down to half of the largest code has two powers of two; one without the lowest code has two zero points.
        if not (isinstance(encoding, MXFP4) or encoding.name == "mxfp8" or getattr(encoding, "zero", False) or not getattr(encoding, "symmetric", True)):
            assert encoding.undetermined(parts) == 0
            assert all(torch.equal(again[name].view(torch.uint8), parts[name].view(torch.uint8)) for name in parts)
        error = (encoding.decode(parts, torch.float32) - given_values.float()).norm() / given_values.float().norm()
        most = 0.012 if encoding.name.startswith("int8") else 0.04 if encoding.name.startswith(("fp8", "mxfp8")) else 0.18
        assert 1e-3 < error < (0.18 if getattr(encoding, "scale", None) == "F16" else most)  # whose smallest are few


@EACH
def test_row_blocks_are_the_whole(encoding):
    encoded = make_parts(encoding, (320, 256), 3)
    pieces = [block.decode(torch.float32) for block in encoded.row_blocks(1)]
    assert len(pieces) > 1
    assert torch.equal(torch.cat(pieces), encoded.decode(torch.float32))


@pytest.mark.parametrize("asked", [torch.int8, torch.float8_e4m3fn, "int8", "float"])
def test_values_come_in_a_float_type_or_not_at_all(asked):
    """int8 of small numbers would be zeros."""
    encoded = make_parts(MXFP4(), (128, 128), 3)
    assert torch.equal(encoded.decode("bfloat16"), encoded.decode(torch.bfloat16))
    with pytest.raises(UsageError):
        encoded.decode(asked)


@EACH
def test_experts_are_encoded_one_by_one(encoding):
    values = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    together = Encoded(encoding, encoding.encode(values), (3, 64, 128))
    for expert in range(3):
        alone = encoding.encode(values[expert])
        assert all(torch.equal(together[expert].parts[name].view(torch.uint8), alone[name].view(torch.uint8)) for name in alone)


@EACH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(encoding, bad):
    values = torch.ones(128, 128)
    values[100, 5] = bad
    with pytest.raises(BadNumbers):
        encoding.encode(values)


@EACH
def test_zeros(encoding):
    """A matrix of zeros, an expert that no token reached, has scales that are numbers; the sign of zero stays where codes have one."""
    values = torch.zeros(128, 128)
    values[::2] = -0.0
    parts = encoding.encode(values)
    assert encoding.check(parts) is None
    found = encoding.decode(parts, torch.float32)
    assert torch.equal(found, values)
    assert torch.equal(bits(found), bits(values)) is not (encoding.kind in SAME_CODES or isinstance(encoding, INT8))


@EACH
def test_inverted_scales_are_far_off(encoding):
    parts = make_parts(encoding, (128, 128), 5).parts
    values = encoding.decode(parts, torch.float32)
    wrong = encoding.decode(encoding.inverted(parts), torch.float32)
    assert (wrong - values).norm() / values.norm() > 1e-3
    assert torch.equal(encoding.decode(encoding.inverted(encoding.inverted(parts)), torch.float32).sign(), values.sign())


# --- FP8 ---------------------------------------------------------------------------------------------------------------------------------

CODES = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F8_E8M0", "U8"])
def test_fp8_decode_is_exact_over_all_codes_and_scales(kind):
    """All codes under all 246 powers of two that leave them finite, and under many floats, as the product of two fractions rounded once."""
    if kind in ("U8", "F8_E8M0"):
        scale = torch.arange(246, dtype=torch.uint8)
        factors = [Fraction(2) ** (n - 127) for n in range(246)]
        scale = scale if kind == "U8" else scale.view(torch.float8_e8m0fnu)
    else:
        random = torch.Generator().manual_seed(1)
        floats = (torch.rand(300, generator=random) + 0.5) * torch.exp2(torch.randint(-110, 110, (300,), generator=random).float())
        scale = floats if kind == "F32" else floats.bfloat16()
        factors = [Fraction(float(s)) for s in scale]
    weight = CODES.expand(len(factors), -1).contiguous().view(torch.float8_e4m3fn)
    parts = {"weight": weight, "scale": scale.view(-1, 1)}
    expected = torch.tensor([[math.copysign(float(single(abs(e4m3(b)) * f)), -1 if b & 128 else 1) for b in CODES.tolist()] for f in factors])
    ours = FP8((1, WHOLE), kind)
    assert torch.equal(bits(ours.decode(parts, torch.float32)), bits(expected))
    if kind in ("U8", "F8_E8M0"):
        large = {"weight": weight[3:], "scale": parts["scale"][3:]}
        assert torch.equal(bits(ours.decode(large, torch.bfloat16).float()), bits(expected[3:]))
        with pytest.raises(BadNumbers, match="too small for bfloat16"):
            ours.decode(parts, torch.bfloat16)


def slow_fp8(values: list[float], kind: str) -> tuple[Fraction, list[int]]:
    """Scale and codes of one block, by search: the rule's own scale, or else the first that reproduces every value."""
    exact = [Fraction(v) for v in values]
    amax = max(abs(v) for v in exact)
    if kind == "E8M0":
        scale = Fraction(1) if amax == 0 else next(Fraction(2) ** k for k in range(-127, 128) if amax <= 448 * Fraction(2) ** k)
        return scale, fp8_codes(values, scale)
    scale = Fraction(1) if amax == 0 else quotient(amax, Fraction(448))
    if not fp8_reproduces(exact, scale):
        for code in reversed(E4M3[1:]):
            middle = numpy.float32(float(quotient(amax, code)))
            for guess in (middle, numpy.nextafter(middle, numpy.float32(numpy.inf)), numpy.nextafter(middle, numpy.float32(0))):
                found = Fraction(float(guess))
                if fp8_reproduces(exact, found):
                    return found, fp8_codes(values, found)
    return scale, fp8_codes(values, scale)


def fp8_codes(values: list[float], scale: Fraction) -> list[int]:
    return [nearest(quotient(abs(Fraction(v)), scale), E4M3) | (128 if math.copysign(1, v) < 0 else 0) for v in values]


def fp8_reproduces(values: list[Fraction], scale: Fraction) -> bool:
    return all(single(E4M3[nearest(quotient(abs(v), scale), E4M3)] * scale) == abs(v) for v in values)


SCALES = st.builds(lambda m, e: float(numpy.float32(m * 2.0**e)), st.floats(1, 2, width=32), st.integers(-20, 8))
ON_GRID = st.builds(
    lambda scale, codes: [float(numpy.float32(float(e4m3(c)) * scale)) for c in codes],
    SCALES,
    st.lists(st.integers(0, 255).filter(lambda c: c & 0x7F != 0x7F), min_size=8, max_size=8),
)
OFF_GRID = st.lists(st.one_of(st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30), NEGATIVE), min_size=8, max_size=8)


@given(st.one_of(ON_GRID, OFF_GRID), st.sampled_from(["F32", "E8M0"]))
def test_fp8_encode_is_the_definition(values, kind):
    encoding = FP8((1, 8), "F32" if kind == "F32" else "F8_E8M0")
    parts = encoding.encode(torch.tensor([values]))
    scale, codes = slow_fp8([float(numpy.float32(v)) for v in values], kind)
    assert (Fraction(float(parts["scale"])), parts["weight"].view(torch.uint8).flatten().tolist()) == (scale, codes)


@given(ON_GRID)
def test_fp8_values_return(values):
    encoding = FP8((1, 8), "F32")
    given_values = torch.tensor([values])
    assert torch.equal(bits(encoding.decode(encoding.encode(given_values), torch.float32)), bits(given_values))


def test_fp8_blocks_at_sizes_that_hide_them():
    """192 rows have two scales under blocks of 128 and of 96, 576 have five under 128; a scale of another shape is refused."""
    for rows in (192, 576):
        values = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows))
        ours = FP8(scale="F32")
        parts = ours.encode(values)
        tiles = [[values[r : r + 128, c : c + 128].abs().max() / 448 for c in range(0, 200, 128)] for r in range(0, rows, 128)]
        assert torch.equal(parts["scale"], torch.tensor(tiles))
    with pytest.raises(TensorMismatch, match="weight_block_size"):
        FP8((64, 64)).decode(parts, torch.float32)


def test_fp8_scale_types_recode_where_they_can():
    powers = FP8(scale="U8").encode(torch.randn(256, 256, generator=torch.Generator().manual_seed(1)))
    values = FP8(scale="U8").decode(powers, torch.float32)
    for kind in ("F32", "BF16", "F8_E8M0"):
        moved = FP8(scale="U8").recode(powers, FP8(scale=kind))
        assert torch.equal(FP8(scale=kind).decode(moved, torch.float32), values)
        assert torch.equal(FP8(scale=kind).recode(moved, FP8(scale="U8"))["scale"], powers["scale"])
        assert FP8(scale="U8").fits_in(FP8(scale=kind))
    floats = FP8(scale="F32").encode(torch.randn(256, 256))
    for kind in ("BF16", "F8_E8M0", "U8"):
        assert FP8(scale="F32").recode(floats, FP8(scale=kind)) is None
        assert not FP8(scale="F32").fits_in(FP8(scale=kind))
    assert not FP8(scale="F32").recodes(FP8((64, 64), "F32"))


@pytest.mark.parametrize("kind", ["F32", "BF16", "F8_E8M0", "U8"])
def test_fp8_counts_the_blocks_that_do_not_return(kind):
    """Those whose largest code is at most 224 have a scale of half the size; with few codes to a block, some floats have a neighbour that does as well."""
    encoding = FP8((1, 8), kind)
    parts = dict(make_parts(encoding, (200, 64), 4).parts)
    codes = parts["weight"].view(torch.uint8)
    codes[::3] &= 0xB7
    again = encoding.encode(encoding.decode(parts, torch.float32))
    differ = (again["weight"].view(torch.uint8) != codes).view(200, 8, 8).any(-1) | (again["scale"].float() != parts["scale"].float()).view(200, 8)
    if kind == "U8":
        differ |= again["scale"] != parts["scale"]
    zero = ((codes & 0x7F) == 0).view(200, 8, 8).all(-1)
    assert int((differ & ~zero).sum()) <= encoding.undetermined(parts) <= int((differ | zero).sum())
    assert 0 < encoding.undetermined(parts) < 1600


def test_fp8_check_refuses_what_no_producer_writes():
    good = make_parts(FP8(scale="F32"), (192, 192), 1).parts
    bad = {
        "NaN in E4M3": {**good, "weight": torch.full((192, 192), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        "NaN or infinite": {**good, "scale": torch.tensor([[1, float("inf")], [1, 1]])},
        "negative": {**good, "scale": torch.tensor([[1.0, 1.0], [-1.0, 1.0]])},
        "never filled": {**good, "scale": torch.tensor([[1.0, 1.0], [1.0, 0.0]])},
        "1e-37": {**good, "scale": torch.tensor([[1.0, 1.0], [1.0, 1e-37]])},
        "placeholder": {**good, "scale": torch.empty(2, 2, device="meta")},
    }
    for message, parts in bad.items():
        assert message in FP8(scale="F32").check(parts)
    weight = good["weight"].clone()
    weight.view(torch.uint8)[128:, 128:] = 0
    assert FP8(scale="F32").check({"weight": weight, "scale": torch.tensor([[1.0, 1.0], [1.0, 0.0]])}) is None  # zeros need no scale


@pytest.mark.parametrize("encoding", [FP8(scale="F32"), FP8((1, WHOLE), "BF16"), FP8((WHOLE, WHOLE), "F32"), FP8((1, 32), "U8"), FP8(scale="F8_E8M0")], ids=str)
def test_fp8_check_knows_what_decode_refuses(encoding):
    """Scales up to the largest whose product with 448 is a float32, and beyond."""
    parts = make_parts(encoding, (128, 128), 1).parts
    for power in (119, 120, 127):
        scale = parts["scale"].clone()
        if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
            scale.view(torch.uint8).view(-1)[0] = 127 + power
        else:
            scale.view(-1)[0] = 2.0**power
        assert (encoding.check({**parts, "scale": scale}) is None) == (448 * 2.0**power < 2.0**128)


@pytest.mark.parametrize(
    "encoding", [FP8(scale="F32", carried=(Part("input_scale", ("F32",), (WHOLE, WHOLE)),)), NVFP4(carried=(Part("input_scale", ("F32",), (WHOLE, WHOLE)),))]
)
def test_a_scale_of_activations_is_a_number(encoding):
    parts = {**make_parts(replace(encoding, carried=()), (32, 64), 1).parts, "input_scale": torch.ones(1, 1)}
    assert encoding.check(parts) is None
    for bad in (float("nan"), float("inf"), -1.0):
        assert f"input_scale of {bad:g}" in encoding.check({**parts, "input_scale": torch.full((1, 1), bad)})


# --- NVFP4 -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["modelopt", "compressed-tensors"])
def test_nvfp4_decode_is_exact_over_all_codes_and_scales(convention):
    """All bytes under all scales and some globals: the inner operation rounded to float32, then the product."""
    packed = torch.arange(256, dtype=torch.uint8).expand(127, 256).contiguous()
    scale = torch.arange(127, dtype=torch.uint8).view(-1, 1).expand(127, 32).contiguous().view(torch.float8_e4m3fn)
    for whole in (1.0, 0.1, 3.7e-4, 5e6):
        parts = {"packed": packed, "scale": scale, "global": torch.tensor([[whole]])}
        found = NVFP4(convention).decode(parts, torch.float32)
        g = Fraction(float(numpy.float32(whole)))
        factors = [single(s * g) if convention == "modelopt" else quotient(s, g) for s in E4M3]
        nibbles = [nibble for byte in range(256) for nibble in (byte & 15, byte >> 4)]
        expected = [[math.copysign(float(single(E2M1[n & 7] * f)), -1 if n & 8 else 1) for n in nibbles] for f in factors]
        assert torch.equal(bits(found), bits(torch.tensor(expected)))


@given(st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32), st.sampled_from(["modelopt", "compressed-tensors"]))
def test_nvfp4_encode_is_the_definition(values, convention):
    """The producers' rule for numbers on no grid; a matrix here is one row of two groups."""
    values = [v if abs(v) > 1e-3 else 0.5 for v in values] + []
    values[3] = 99.13  # two numbers whose ratio is that of no two codes
    values[20] = 7.77
    groups = [[Fraction(float(numpy.float32(v))) for v in values[at : at + 16]] for at in (0, 16)]
    amax = max(abs(v) for group in groups for v in group)
    # compressed-tensors divides a number by a tensor, which torch computes as that number times the tensor's reciprocal.
    whole = quotient(amax, Fraction(2688)) if convention == "modelopt" else single(2688 * quotient(Fraction(1), amax))
    scales, codes = [], []
    for group in groups:
        largest = max(abs(v) for v in group)
        if convention == "modelopt":
            scale = quotient(largest, single(6 * whole))
        else:
            scale = single(whole * quotient(largest, Fraction(6)))
        index = nearest(scale, E4M3)
        factor = single(E4M3[index] * whole) if convention == "modelopt" else quotient(E4M3[index], whole)
        scales.append(index)
        codes += [nearest(quotient(abs(v), factor), E2M1) | (8 if v < 0 else 0) for v in group]
    parts = NVFP4(convention).encode(torch.tensor([values]))
    assert Fraction(float(parts["global"])) == whole
    assert parts["scale"].view(torch.uint8).flatten().tolist() == scales
    assert [n for byte in parts["packed"].flatten().tolist() for n in (byte & 15, byte >> 4)] == codes


@pytest.mark.parametrize("convention", ["modelopt", "compressed-tensors"])
def test_nvfp4_ties_go_to_even(convention):
    """Halfway between two codes, under scales that are powers of two times 448."""
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    group = torch.tensor([6.0, *middles, *(-m for m in middles), 0.1]) * 448
    parts = NVFP4(convention).encode(group.view(1, 16))
    assert (float(parts["global"]), float(parts["scale"].float())) == (1, 448)
    expected = [6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, 0]
    assert (NVFP4(convention).decode(parts, torch.float32) / 448).tolist() == [expected]


@pytest.mark.parametrize("convention", ["modelopt", "compressed-tensors"])
def test_nvfp4_in_the_other_convention(convention):
    ours = NVFP4(convention)
    other = NVFP4("compressed-tensors" if convention == "modelopt" else "modelopt")
    exact = 0
    for seed in range(40):
        values = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
        parts = ours.encode(values)
        there = other.decode(ours.nearest(parts, other), torch.float32)
        here = ours.decode(parts, torch.float32)
        assert ((there - here).abs() <= 2.0**-22 * here.abs()).all()
        moved = ours.recode(parts, other)
        assert (moved is not None) == torch.equal(there, here)
        exact += moved is not None
        power = {**parts, "global": torch.exp2(parts["global"].log2().round())}
        assert torch.equal(other.decode(ours.recode(power, other), torch.float32), ours.decode(power, torch.float32))
    assert 0 < exact < 20  # most globals have no reciprocal that keeps every value


def test_mxfp4_becomes_nvfp4_where_e4m3_spans_its_powers():
    for convention in ("modelopt", "compressed-tensors"):
        for container in ("blocks", "packed", "int8"):
            ours, other = mxfp4("openai", container), NVFP4(convention)
            parts = dict(make_parts(ours, (2, 16, 128), 1).parts)
            scale = torch.randint(100, 118, (2, 16, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
            scale[:, 0, 0], scale[:, 1, 1] = 100, 117  # 18 powers, as many as E4M3 has
            parts["scale"] = scale.view(parts["scale"].dtype)
            values = ours.decode(parts, torch.float32)
            assert torch.equal(bits(other.decode(ours.recode(parts, other), torch.float32)), bits(values))
            scale[:, 1, 1] = 118
            assert ours.recode({**parts, "scale": scale.view(parts["scale"].dtype)}, other) is None
            empty = dict(parts)
            empty["packed"] = (parts["packed"].view(torch.uint8) & 0x88).view(parts["packed"].dtype)
            assert torch.equal(bits(other.decode(ours.recode(empty, other), torch.float32)), bits(ours.decode(empty, torch.float32)))


def test_nvfp4_check_refuses_what_no_producer_writes():
    ours = NVFP4()
    good = make_parts(ours, (32, 64), 1).parts
    scale = torch.full((32, 4), 0x7F, dtype=torch.uint8)
    bad = {
        "NaN in E4M3": {**good, "scale": scale.view(torch.float8_e4m3fn)},
        "negative": {**good, "scale": (scale | 0x80).sub(1).view(torch.float8_e4m3fn)},
        "never filled": {**good, "scale": torch.zeros(32, 4, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        "global of 0": {**good, "global": torch.zeros(1, 1)},
        "global scale of nan": {**good, "global": torch.full((1, 1), float("nan"))},
        "placeholder": {**good, "scale": good["scale"].to("meta")},
    }
    for message, parts in bad.items():
        assert message in ours.check(parts)
    theirs, tiny = NVFP4("compressed-tensors"), {**good, "packed": torch.zeros(32, 32, dtype=torch.uint8), "global": torch.full((1, 1), 1e-38)}
    with pytest.raises(BadNumbers, match="not finite"):
        theirs.decode(tiny, torch.float32)
    assert "not finite" in theirs.check(tiny)  # zeros times infinity


# --- INT4 --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_int4_decode_is_the_definition(kind):
    """Sixteen nibbles in each of eight places of a word; the last word of a row is not full."""
    words = torch.tensor([[sum(((n + k) % 16) << (4 * k) for k in range(8)) for n in range(16)]], dtype=torch.int64)
    packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    ours = INT4(WHOLE, scale=kind)
    scale = torch.tensor([[0.3]]).to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind])
    parts = {"packed": packed, "scale": scale, "shape": torch.tensor([[[1, 123]]])}
    expected = [float(single(Fraction((n + k) % 16 - 8) * Fraction(float(scale)))) for n in range(16) for k in range(8)]
    assert torch.equal(bits(ours.decode(parts, torch.float32)), bits(torch.tensor([expected[:123]])))


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_int4_with_zero_points_is_the_definition(kind):
    """Nine rows, so that the second word of zero points is not full: row n has the nibble n + 3 as its zero, in the n-th place."""
    nibbles = [[(n + 5 * k) % 16 for k in range(32)] for n in range(9)]
    words = torch.tensor([[sum(row[8 * w + k] << (4 * k) for k in range(8)) for w in range(4)] for row in nibbles], dtype=torch.int64)
    zeros = torch.tensor([[sum((n + 3) << (4 * n) for n in range(8))], [11]], dtype=torch.int64)
    packed, zero = (torch.where(x >= 2**31, x - 2**32, x).to(torch.int32) for x in (words, zeros))
    ours = INT4(32, scale=kind, zero=True)
    scale = torch.full((9, 1), 0.3).to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind])
    parts = {"packed": packed, "scale": scale, "zero_point": zero, "shape": torch.tensor([[[9, 32]]])}
    expected = [[float(single(Fraction(nibble - (n + 3)) * Fraction(float(scale[n, 0])))) for nibble in row] for n, row in enumerate(nibbles)]
    assert torch.equal(ours.decode(parts, torch.float32), torch.tensor(expected))
    assert ours.check(parts) is None
    again = ours.encode(torch.tensor(expected))
    assert torch.equal(ours.decode(again, torch.float32), torch.tensor(expected))


@given(st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32), st.sampled_from([("kimi", 7.0), ("compressed-tensors", 7.5)]))
def test_int4_encode_is_the_definition(values, rule):
    values = [v if abs(v) > 1e-3 else 0.5 for v in values]
    values[3], values[20] = 99.13, 7.77
    exact = [Fraction(float(numpy.float32(v))) for v in values]
    scale = quotient(max(abs(v) for v in exact), Fraction(rule[1]))
    levels = [Fraction(n) for n in range(-8, 8)]
    codes = []
    for v in exact:
        q = quotient(v, scale)
        best = [n for n in levels if abs(q - n) == min(abs(q - m) for m in levels)]
        codes.append(int(next(n for n in best if len(best) == 1 or n % 2 == 0)) + 8)
    parts = INT4(32, rule[0], "F32").encode(torch.tensor([values]))
    assert Fraction(float(parts["scale"])) == scale
    assert [(word >> (4 * k)) & 15 for word in parts["packed"].flatten().tolist() for k in range(8)] == codes
    assert parts["shape"].tolist() == [[[1, 32]]]


@pytest.mark.parametrize("zero", [False, True])
def test_int4_check_knows_which_codes_are_infinite(zero):
    """Each nibble of a group alone, with a zero point of -7 or none, under scales near what float32 has for it."""
    for nibble, factor in product(range(16), (2.0**124, 2.0**125, 1.5 * 2.0**126)):
        values, packed = nibble - (1 if zero else 8), INT4(32, scale="F32", zero=zero)
        word = sum(nibble << (4 * k) for k in range(8))
        parts = {"packed": torch.full((8, 4), word - (word >> 31 << 32), dtype=torch.int32), "scale": torch.full((8, 1), factor)}
        parts |= {"shape": torch.tensor([[[8, 32]]])} | ({"zero_point": torch.tensor([[0x11111111]], dtype=torch.int32)} if zero else {})
        assert (packed.check(parts) is None) == (abs(values) * Fraction(factor) < 2**128), (nibble, factor)


@pytest.mark.parametrize("encoding", [INT4(32, scale="F16"), GPTQ(32, scale="F16"), GPTQ(32, packing="awq", scale="F16")], ids=str)
def test_scales_may_be_negative(encoding):
    """AutoRound has a group's largest number be the code -8, whatever its sign is. Values on either side of a number are still below and above it."""
    good = make_parts(encoding, (64, 64), 1).parts
    parts = {**good, "scale": -good["scale"]}
    assert encoding.check(parts) is None
    values = encoding.decode(parts, torch.float32)
    assert torch.equal(values, -encoding.decode(good, torch.float32))
    grid = encoding.grid(parts, (64, 64))
    assert torch.equal(grid.nearest(values), values)
    between = values + 0.3 * grid.scale.abs()
    below, above = grid.around(between)
    inside = (grid.codes > 0) & (grid.codes < 15)
    assert torch.equal(below[inside], values[inside])
    assert bool((above > between)[inside].all())


def test_int4_refuses_what_it_cannot_read():
    ours = INT4(32, scale="BF16")
    good = make_parts(ours, (16, 64), 1).parts
    for message, parts in {
        "shape part": {**good, "shape": torch.tensor([[[16, 128]]])},
        "NaN or infinite": {**good, "scale": torch.full((16, 2), float("nan"), dtype=torch.bfloat16)},
        "never filled": {**good, "scale": torch.zeros(16, 2, dtype=torch.bfloat16)},
        "scales of -1": {**good, "scale": torch.full((16, 2), -1e-39, dtype=torch.bfloat16)},
        "placeholder": {**good, "packed": good["packed"].to("meta")},
    }.items():
        assert message in ours.check(parts)
    for large in (3e38, -3e38):
        assert f"scales of {large:g}" in INT4(32, scale="F32").check({**good, "scale": torch.full((16, 2), large)})
    with pytest.raises(TensorMismatch, match="group_size"):
        INT4(64, scale="BF16").decode(good, torch.float32)
    found = {"packed": ("I32", (16, 8)), "scale": ("BF16", (16, 2)), "shape": ("I64", (2,))}
    assert ours.as_stored(found).shape == "I64"
    with pytest.raises(UnknownFormat, match="zero points"):
        ours.as_stored({**found, "zero_point": ("I32", (2, 2))})
    with pytest.raises(UnknownFormat, match="actorder"):
        ours.as_stored({**found, "order": ("I32", (64,))})
    with pytest.raises(TensorMismatch, match="whole ones only"):
        ours.encode(torch.ones(16, 48))


# --- what a file settles -----------------------------------------------------------------------------------------------------------------


def test_a_file_settles_what_a_spec_leaves_open():
    block = FP8().as_stored({"weight": ("F8_E4M3", (192, 200)), "scale": ("F8_E8M0", (2, 2))})
    assert block == FP8(scale="F8_E8M0")
    tensor = FP8((WHOLE, WHOLE)).as_stored({"weight": ("F8_E4M3", (192, 200)), "scale": ("BF16", (1,)), "input_scale": ("F32", ())})
    assert (tensor.scale, tensor.single, [part.name for part in tensor.parts]) == ("BF16", (1,), ["weight", "scale", "input_scale"])
    with pytest.raises(UsageError, match="cannot be made from weights"):
        tensor.encode(torch.ones(192, 200))
    whole = NVFP4().as_stored({"packed": ("U8", (64, 32)), "scale": ("F8_E4M3", (64, 4)), "global": ("F32", (1,))})
    assert whole.parts[2].single == (1,)
    int8 = MXFP4(container="int8").as_stored({"packed": ("I8", (64, 16)), "scale": ("U8", (64, 1))})
    assert int8.parts[1].dtypes == ("U8",)
    assert fp8_kernel.LEAST > 0

"""Laws of NF4 and FP4, and their arithmetic against a slow reference written with Python numbers."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy
import pytest
import strategies  # noqa: F401
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeglot.encoded import Encoded
from moeglot.encoding import ANY
from moeglot.encodings import by_name
from moeglot.encodings.bnb4 import BNB4, QuantState, absmax
from moeglot.encodings.plain import Plain
from moeglot.errors import BadNumbers, TensorMismatch, UsageError
from moeglot.kernels import bnb4 as kernel

pytestmark = pytest.mark.usefixtures("kernels")

F32 = numpy.float32
# Table E of the QLoRA paper, as float32; FP4: sign, then 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4.
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FP4 = [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
CODES = {"nf4": [F32(v) for v in NF4], "fp4": [F32(v) for v in FP4] + [-F32(v) for v in FP4]}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
KINDS = st.sampled_from(["nf4", "fp4"])
SHAPES = st.sampled_from([(8, 8), (16, 16), (1, 32), (3, 64), (5, 7), (9, 50), (2, 65), (1, 1), (4, 33)])


def slow_decode(packed: list[int], scales: list[float], kind: str, blocksize: int, count: int) -> list[float]:
    """High nibble first; the n-th number has the (n // blocksize)-th absmax; a product of two float32 is rounded once."""
    nibbles = [nibble for byte in packed for nibble in (byte >> 4, byte & 15)][:count]
    return [float(F32(float(CODES[kind][nibble]) * float(F32(scales[n // blocksize])))) for n, nibble in enumerate(nibbles)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def make_parts(encoding: BNB4, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Any codes under any positive absmax, as no quantizer would choose them."""
    random = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    packed = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, generator=random)
    if seed % 3 == 0:
        packed = packed & 0x66 | 0x10  # no code of ±1 in either kind
    scale = torch.rand(-(-count // encoding.blocksize), generator=random) * 10 + 0.01
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    state = QuantState(encoding.kind, encoding.blocksize, name, shape)
    return {"packed": packed, "scale": scale, "map": kernel.codebook(encoding.kind) + 0.0, "state": state.write(encoding.state_bytes)}


@given(KINDS, st.sampled_from([32, 64, 128]), SHAPES, st.integers(0, 2**31), DTYPES)
def test_decode_is_the_definition(kind, blocksize, shape, seed, dtype):
    encoding = BNB4(kind, blocksize)
    parts = make_parts(encoding, shape, seed, dtype)
    expected = slow_decode(parts["packed"].flatten().tolist(), parts["scale"].tolist(), kind, blocksize, torch.Size(shape).numel())
    assert torch.equal(bits(encoding.decode(parts, dtype)), bits(torch.tensor(expected).view(shape).to(dtype)))
    assert encoding.check(parts) is None


def test_every_code_of_a_byte():
    for kind in ("nf4", "fp4"):
        packed = torch.arange(256, dtype=torch.uint8).view(256, 1)
        found = kernel.decode(packed, torch.full((8,), 3.0), kind, 64, 512, torch.float32)
        assert found.tolist() == slow_decode(list(range(256)), [3.0] * 8, kind, 64, 512)


@given(KINDS, st.sampled_from([32, 64, 128]), SHAPES, st.integers(0, 2**31), DTYPES, st.booleans())
def test_decode_encode_decode_is_decode(kind, blocksize, shape, seed, dtype, held_in_float32):
    """Whatever the codes and absmax, and whether or not the reader holds the numbers in float32; the dtype is found again."""
    encoding = BNB4(kind, blocksize)
    parts = make_parts(encoding, shape, seed, dtype)
    values = encoding.decode(parts, dtype)
    again = encoding.encode(values.float() if held_in_float32 else values)
    assert torch.equal(bits(encoding.decode(again, dtype)), bits(values))
    if torch.equal(again["scale"], parts["scale"]) and not held_in_float32:
        assert QuantState.read(again["state"]) == QuantState.read(parts["state"])
    count = values.numel()
    same = torch.tensor(
        [
            torch.equal(a, b) and torch.equal(s, t)
            for a, b, s, t in zip(
                *(torch.stack([p.flatten() >> 4, p.flatten() & 15], -1).flatten()[:count].split(blocksize) for p in (again["packed"], parts["packed"])),
                again["scale"],
                parts["scale"],
                strict=True,
            )
        ]
    )
    assert int((~same).sum()) <= encoding.undetermined(parts)


def test_undetermined_blocks_are_counted():
    encoding = BNB4("nf4")
    parts = make_parts(encoding, (8, 64), 1, torch.float32)
    parts["packed"] |= 0x0F  # each block has a code of 1
    assert encoding.undetermined(parts) == 0
    again = encoding.encode(encoding.decode(parts, torch.float32))
    assert all(torch.equal(again[name], parts[name]) for name in parts)
    parts["packed"][:32] = 0x55  # the first has none
    assert encoding.undetermined(parts) == 1
    parts["state"] = QuantState("nf4", 64, "BF16", (8, 64)).write(256)
    assert encoding.undetermined(parts) == 8  # bfloat16 does not hold these absmax


def slow_encode(values: list[float], kind: str, blocksize: int) -> tuple[list[int], list[float]]:
    """The nearest value of the codebook in float32; halfway between two is the lower."""
    codes, scales = [], []
    for at in range(0, len(values), blocksize):
        block = [F32(v) for v in values[at : at + blocksize]]
        scale = max(abs(v) for v in block)
        short = len(block) < blocksize
        scales.append(float(max(scale, F32(1e-38)) if short else scale))
        divisor = max(scale, F32(1e-38))
        for v in block:
            scaled = v / divisor if short else v * (F32(1) / divisor)
            scaled = min(max(scaled, F32(-1)), F32(1))
            order = sorted(range(16), key=lambda code: (CODES[kind][code], code))
            place = sum(scaled > (CODES[kind][a] + CODES[kind][b]) / F32(2) for a, b in pairwise(order))
            codes.append(order[place])
    return codes, scales


@given(KINDS, st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=150), st.sampled_from([32, 64]))
def test_rounding_is_the_definition(kind, values, blocksize):
    tensor = torch.tensor(values)
    packed, scales = kernel._rounded(tensor, kind, blocksize)
    assert (kernel.unpacked(packed)[: len(values)].tolist(), scales.tolist()) == slow_encode(values, kind, blocksize)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_thresholds(kind):
    """Each midpoint belongs to the lower value, its neighbour in float32 to the higher."""
    order = sorted(range(16), key=lambda code: (CODES[kind][code], code))
    for low, high in pairwise(order):
        middle = torch.tensor(float((CODES[kind][low] + CODES[kind][high]) / F32(2)))
        block = torch.zeros(64)
        block[0], block[1], block[2] = 1.0, middle, torch.nextafter(middle, torch.tensor(2.0))
        assert kernel.unpacked(kernel._rounded(block, kind, 64)[0])[1:3].tolist() == [low, high]


@given(KINDS, SHAPES, st.integers(0, 2**31), DTYPES)
def test_nested_absmax_become_plain_ones_without_a_change(kind, shape, seed, dtype):
    """recode: the same bits, also in shorter blocks; the way back would round."""
    random = torch.Generator().manual_seed(seed)
    nested, plain = BNB4(kind, 128, nested=True), BNB4(kind, 64)
    parts = nested.encode(torch.randn(shape, generator=random).to(dtype))
    assert nested.check(parts) is None
    assert nested.recodes(plain)
    assert not plain.recodes(nested)
    recoded = nested.recode(parts, plain)
    assert plain.check(recoded) is None
    assert torch.equal(bits(plain.decode(recoded, dtype)), bits(nested.decode(parts, dtype)))
    again = plain.encode(plain.decode(recoded, dtype))
    assert torch.equal(bits(plain.decode(again, dtype)), bits(nested.decode(parts, dtype)))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_of_zeros_under_nested_absmax(kind):
    """Their absmax comes back a little off zero, to either side, and their zeros with either sign; nothing else of the matrix suffers."""
    signs = set()
    for seed in range(20):
        values = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        values[3], values[5] = 0, values[5] * 9  # the larger ones make the levels coarse
        nested, plain = BNB4(kind, nested=True), BNB4(kind)
        parts = nested.encode(values)
        signs.add(float(absmax(parts)[3].sign()))
        decoded = nested.decode(parts, torch.bfloat16)
        for coded in (nested.recode(parts, plain), plain.encode(decoded)):
            assert plain.check(coded) is None
            assert torch.equal(bits(plain.decode(coded, torch.bfloat16)), bits(decoded))
    assert {-1.0, 1.0} <= signs


def test_nested_absmax_are_close():
    """256 levels of the dynamic type: the absmax of Gaussian blocks return to a few thousandths of their spread."""
    values = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    plain, nested = BNB4().encode(values), BNB4(nested=True).encode(values)
    assert torch.equal(plain["packed"], nested["packed"])
    error = (absmax(nested) - plain["scale"]).abs()
    assert 0 < error.mean() < 0.02 * plain["scale"].std()
    without_offset = kernel.decode_nested(nested["scale"], nested["nested_scale"], nested["nested_map"], 0.0)
    assert (without_offset - plain["scale"]).abs().mean() > 100 * error.mean()
    one_scale = kernel.decode_nested(nested["scale"], nested["nested_scale"].flip(0), nested["nested_map"], QuantState.read(nested["state"]).offset)
    assert (one_scale - plain["scale"]).abs().mean() > 2 * error.mean()


@pytest.mark.parametrize("nested", [False, True])
def test_sums_in_float32_keep_the_dtype_that_decoding_rounds_to(nested):
    encoding, values = BNB4(nested=nested), torch.randn(32, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    parts, sums = encoding.encode(values), values.float() * 1.5
    for found in (encoding.encode_like(parts, sums), encoding.rescaled(parts, sums, torch.ones(32, 64, dtype=torch.bool))):
        assert QuantState.read(found["state"]).dtype == "BF16"
        assert encoding.check(found) is None


def test_wrong_readings_are_seen():
    """The power of these laws: each wrong reading is off by most of the weights, rows of very different size or not."""
    random = torch.Generator().manual_seed(0)
    given = torch.randn(40, 96, generator=random) * torch.exp(torch.randn(40, 1, generator=random))  # rows are no whole number of blocks
    for encoding in (BNB4("nf4"), BNB4("fp4"), BNB4("nf4", nested=True)):
        parts = encoding.encode(given)
        right = encoding.decode(parts, torch.float32)
        assert (right - given).norm() < 0.16 * given.norm()

        def error(wrong, right=right):
            return float((wrong - right).norm() / right.norm())

        scale = absmax(parts)
        swapped = encoding.decode({**parts, "packed": parts["packed"] >> 4 | parts["packed"] << 4}, torch.float32)
        codes = torch.tensor([float(v) for v in CODES[encoding.kind]])[torch.stack([parts["packed"] >> 4, parts["packed"] & 15], -1).flatten().int()]
        per_row = codes.view(40, 96) * scale[:40].unsqueeze(1)  # one absmax a row, as if blocks did not cross rows
        inverted = encoding.decode(encoding.inverted(parts), torch.float32)
        assert error(swapped) > 1
        assert error(per_row) > 0.5
        assert error(inverted) > 0.5
        if encoding.nested:
            dropped = QuantState.read(parts["state"])
            assert error(encoding.decode({**parts, "state": replace(dropped, offset=0.0).write(256)}, torch.float32)) > 0.5


def test_the_json_is_padded_and_read_back():
    state = QuantState("nf4", 64, "BF16", (128, 2880, 2880), 0.12345678806304932)
    text = bytes(state.write(256).tolist())
    assert len(text) == 256
    assert text.rstrip(b" ").endswith(b"}")
    assert json.loads(text)["shape"] == [128, 2880, 2880]
    assert QuantState.read(state.write(256)) == QuantState.read(state.write(ANY)) == state
    assert state.write(ANY).numel() == len(text.rstrip())


def test_a_file_settles_what_a_spec_leaves_open():
    found = {"packed": ("U8", (96, 1)), "scale": ("U8", (2,)), "state": ("U8", (77,))}
    assert BNB4("fp4").as_stored(found) == BNB4("fp4", 128, nested=True, state_bytes=ANY)
    assert BNB4("nf4", 256).as_stored({**found, "scale": ("F32", (1,))}) == BNB4("nf4", 256, state_bytes=ANY)  # one block fits many sizes
    for blocksize in (32, 64, 128):
        assert BNB4().as_stored({**found, "scale": ("F32", (-(-192 // blocksize),))}).blocksize == blocksize


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: {"scale": parts["scale"] * float("nan")}, "NaN or infinite"),
        (lambda parts: {"scale": parts["scale"] * 0}, "all zero"),
        (lambda parts: {"map": parts["map"].flip(0)}, "not the codebook of nf4"),
        (lambda parts: {"state": QuantState("fp4", 64, "F32", (4, 64)).write(256)}, "quant_state of fp4"),
        (lambda parts: {"state": QuantState("nf4", 64, "F32", (4, 64), 0.5).write(256)}, "nested nf4"),
        (lambda parts: {"state": QuantState("nf4", 64, "F32", (4, 65)).write(256)}, r"\[4, 65\]"),
        (lambda parts: {"state": QuantState("nf4", 128, "F32", (4, 64)).write(256)}, "blocks of 128"),
        (lambda parts: {"state": torch.zeros(256, dtype=torch.uint8)}, "cannot be read"),
        (lambda parts: {"packed": parts["packed"].to("meta")}, "placeholder"),
    ],
)
def test_impossible_parts_are_refused(change, message):
    parts = make_parts(BNB4(), (4, 64), 1, torch.float32)
    assert BNB4().check(parts) is None
    assert re.search(message, BNB4().check(parts | change(parts)))


def test_numbers_that_the_dtype_of_the_state_cannot_hold_are_refused():
    """float16 ends at 65504; under an absmax of 70 000 the codes up to 0.72 are finite."""
    parts = make_parts(BNB4(), (4, 64), 1, torch.float16)
    parts = {**parts, "scale": parts["scale"].clone().index_fill_(0, torch.tensor([2]), 7e4)}
    assert "infinite in the F16" in BNB4().check(parts)
    packed = parts["packed"].clone()
    packed.view(4, 32)[2] = 0x88
    assert BNB4().check({**parts, "packed": packed}) is None


def test_not_finite_is_refused():
    for bad in (float("nan"), float("inf")):
        values = torch.ones(2, 64)
        values[1, 5] = bad
        with pytest.raises(BadNumbers, match="NaN or infinite"):
            BNB4().encode(values)


def test_a_declared_shape_must_be_the_formats():
    parts = BNB4().encode(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
    assert Encoded(BNB4(), parts, (4, 32)).decode(torch.float32).shape == (4, 32)
    with pytest.raises(TensorMismatch, match=r"\[4, 32\], not \[32, 4\]"):
        Encoded(BNB4(), parts, (32, 4)).decode(torch.float32)


def test_zeros_stay_zeros():
    for kind in ("nf4", "fp4"):
        for shape in ((2, 64), (3, 50)):
            encoding = BNB4(kind, nested=False)
            assert torch.equal(encoding.decode(encoding.encode(torch.zeros(shape)), torch.float32), torch.zeros(shape))


def test_names():
    assert by_name("nf4") == BNB4("nf4")
    assert by_name("fp4:nested:128") == BNB4("fp4", 128, nested=True)
    for encoding in (BNB4("nf4"), BNB4("fp4", 256), BNB4("nf4", 32, nested=True)):
        assert by_name(encoding.name) == encoding
    for wrong in ("nf4:63", "nf4:nested:nested", "fp4:x", "nf5"):
        with pytest.raises(UsageError):
            by_name(wrong)
    assert BNB4().fits_in(Plain("F32"))
    assert not BNB4().fits_in(Plain("BF16"))

"""The Triton kernels run by Triton's interpreter on a CPU, in float32: decoding bit for bit against torch's tables, products against float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter of Triton's kernels needs TRITON_INTERPRET=1 before Python starts (make matrix-triton)", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (make matrix-triton)")

from moeglot.encodings import by_name
from moeglot.errors import BadNumbers, UsageError
from moeglot.kernels import backend, fp8, mxfp4
from moeglot.kernels.triton import dequant
from moeglot.kernels.triton.launch import check_dtype

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
BYTES = torch.arange(256, dtype=torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, the sign of zero and of NaN too."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, and NaN where the other has NaN, whatever its payload."""
    return bool((a.isnan() == b.isnan()).all()) and same(a.nan_to_num(nan=3.5), b.nan_to_num(nan=3.5))


def places(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """[rows, columns] as it may lie in memory; filled with what no decoding leaves."""
    rows, columns = shape
    found = {
        "rows": torch.empty(rows, columns, dtype=dtype),
        "turned": torch.empty(columns, rows, dtype=dtype).mT,
        "every other row, turned": torch.empty(columns, rows, 2, dtype=dtype)[..., 1].mT,
    }
    return {name: place.fill_(7.25) for name, place in found.items()}


# --- decoding --------------------------------------------------------------------------------------------------------------------------


@DTYPES
def test_mxfp4_over_all_bytes_and_scales(dtype):
    scale = BYTES[:253].view(-1, 1).expand(253, 16).contiguous()
    packed = BYTES.view(1, 16, 16).expand(253, 16, 16).contiguous()
    with backend.using("torch"):
        expected = mxfp4.decode(packed, scale, dtype)
    for name, place in places((253, 512), dtype).items():
        assert same(dequant.mxfp4(packed, scale, place), expected), name
    with backend.using("triton"):
        assert same(mxfp4.decode(packed, scale, dtype), expected)


@pytest.mark.parametrize("scale", [252, 253, 254, 255])
def test_mxfp4_refuses_what_the_tables_refuse(scale):
    for code in range(16):
        parts = torch.full((2, 1, 16), code * 17, dtype=torch.uint8), torch.full((2, 1), scale, dtype=torch.uint8)
        told = []
        for name in ("torch", "triton"):
            with backend.using(name):
                try:
                    mxfp4.decode(*parts, torch.bfloat16)
                    told.append(None)
                except BadNumbers as error:
                    told.append(str(error))
        assert told[0] == told[1], code
    assert bool(dequant.mxfp4(*parts, torch.zeros(2, 32)).isnan().all()) == (scale == 255)


@DTYPES
def test_fp8_over_all_bytes_and_many_scales(dtype):
    """All codes, the two NaN too, under scales of all sizes, subnormal ones too, so that products round and underflow; blocks with short tails."""
    exponents = torch.arange(-149, 119).float()
    factors = torch.cat([torch.exp2(exponents), torch.exp2(exponents[30:]) * 1.3371, -torch.exp2(exponents[100:120])])
    weight = BYTES.view(1, 256).expand(3 * len(factors) - 1, 256).contiguous().view(torch.float8_e4m3fn)
    scale = torch.stack([factors, factors.flip(0), factors, factors.roll(7)], -1).contiguous()
    for block in ((3, 64), (3, 80)):
        with backend.using("torch"):
            expected = fp8.decode(weight, scale, block, dtype)
        for name, place in places((len(weight), 256), dtype).items():
            assert alike(dequant.fp8(weight, scale, block, place), expected), name
        with backend.using("triton"):
            assert alike(fp8.decode(weight, scale, block, dtype), expected)


@pytest.mark.parametrize("name", ["mxfp4", "fp8-block", "fp8-block:e8m0", "fp8-channel", "fp8-tensor", "mxfp8"])
def test_encodings_of_several_experts(name):
    encoding = by_name(name)
    parts = encoding.encode(torch.randn(3, 160, 192, generator=torch.Generator().manual_seed(1)))
    expected = encoding.decode(parts, torch.bfloat16)
    turned = torch.empty(3, 192, 160, dtype=torch.bfloat16)
    with backend.using("triton"):
        assert same(encoding.decode(parts, torch.bfloat16), expected)
        assert encoding.decode(parts, torch.bfloat16, turned.mT).data_ptr() == turned.data_ptr()
    assert same(turned.mT, expected)


def test_a_wrong_bit_is_seen():
    """The power of the comparisons above: one code's sign, that of a zero too, and one scale."""
    packed, scale = BYTES.view(1, 16, 16).contiguous(), torch.full((1, 16), 127, dtype=torch.uint8)
    expected = mxfp4.decode(packed, scale, torch.float32)
    for wrong in (packed ^ (BYTES == 0).byte().view_as(packed) * 8, packed ^ (BYTES == 77).byte().view_as(packed) * 8):
        assert not same(dequant.mxfp4(wrong, scale, torch.empty(1, 512)), expected)
    assert not same(dequant.mxfp4(packed, scale + (torch.arange(16) == 5).byte(), torch.empty(1, 512)), expected)


def test_what_cannot_run_is_refused():
    with pytest.raises(UsageError, match="TRITON_INTERPRET"):
        check_dtype(torch.bfloat16)
    with pytest.raises(UsageError, match="no cuda kernels"), backend.using("cuda"):
        pass

"""MXFP4, NVFP4 and FP8 in torchao: rules of the same name give the same bytes, and each decodes what the other encoded."""

import pytest
import torch

from moeglot.encoding import WHOLE
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.mxfp4 import mxfp4
from moeglot.encodings.nvfp4 import NVFP4

pytest.importorskip("torchao", reason="installed in an environment of its own")


@pytest.mark.parametrize(("rule", "mode"), [("ocp", "FLOOR"), ("compressed-tensors", "EVEN"), ("rceil", "RCEIL")])
def test_torchao_encodes_the_same_bytes(rule, mode):
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    random = torch.Generator().manual_seed(1)
    spread = torch.exp2(torch.randint(-20, 20, (256, 1), generator=random).float())
    given = (torch.randn(256, 128, generator=random) * spread).bfloat16()
    scale, packed = to_mx(given, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[mode])
    ours = mxfp4(rule).encode(given)
    assert torch.equal(scale.view(torch.uint8), ours["scale"])
    assert torch.equal(packed, ours["packed"].flatten(-2))


def weights() -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    spread = torch.exp2(torch.randint(-4, 5, (256, 1), generator=random).float())
    return torch.randn(256, 128, generator=random) * spread


def test_nvfp4():
    """The same scales; it multiplies by a reciprocal where ModelOpt divides, so a code on a tie may differ. Each decodes the other's bytes to the same bits."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize

    given, ours = weights(), NVFP4()
    mine = ours.encode(given)
    scale, packed = nvfp4_quantize(given, 16, mine["global"].view(()))
    theirs = {"packed": packed, "scale": scale.view(mine["scale"].shape), "global": mine["global"]}
    large = mine["scale"].float() > 2.0**-6  # its scales are not smaller
    assert torch.equal(theirs["scale"].view(torch.uint8)[large], mine["scale"].view(torch.uint8)[large])
    assert (packed != mine["packed"]).view(*scale.shape, 8).any(-1)[large].float().mean() < 0.01
    for parts in (mine, theirs):
        tensor = NVFP4Tensor(parts["packed"], parts["scale"], 16, torch.float32, parts["global"].view(()))
        assert torch.equal(tensor.dequantize(torch.float32), ours.decode(parts, torch.float32))
    read = ours.decode(theirs, torch.float32)
    assert torch.equal(ours.decode(ours.encode(read), torch.float32), read)


@pytest.mark.parametrize("ours", [FP8((1, WHOLE), "F32"), FP8((WHOLE, WHOLE), "F32"), FP8((128, 128), "F32")], ids=str)
def test_fp8(ours):
    """Its affine float8 primitives: the same scales, the same codes."""
    from torchao.quantization.quant_primitives import _choose_scale_float8, _dequantize_affine_float8, _quantize_affine_float8

    given = weights()
    block = [size or n for size, n in zip(ours.block, given.shape, strict=True)]
    scale = _choose_scale_float8(given, block)
    codes = _quantize_affine_float8(given, scale)
    mine = ours.encode(given)
    assert torch.equal(mine["scale"], scale)
    assert torch.equal(mine["weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(ours.decode(mine, torch.float32), _dequantize_affine_float8(codes, scale))

"""MXFP4 in torchao: three of its scale rules, with ties to even, give the bytes that ours of the same name give."""

import pytest
import torch

from moeglot.encodings.mxfp4 import mxfp4

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

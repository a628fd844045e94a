"""FP8 and DeepSeek's FP4 in transformers: its own quantize and dequantize operations, on the CPU, both ways; and its known error with ragged blocks."""

from types import SimpleNamespace

import pytest
import torch

from moeglot.encoding import WHOLE
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.mxfp4 import MXFP4, mxfp4
from moeglot.errors import TensorMismatch

finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs transformers 5.23 or later")
if not hasattr(getattr(finegrained, "Fp8Quantize", None), "_quantize_one"):
    pytest.skip("needs transformers 5.23 or later", allow_module_level=True)


def quantizer(block: list[int] | None = None, scale_fmt: str | None = None):
    return SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))


def quantized(values: torch.Tensor, block: list[int] | None = None, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    found = finegrained.Fp8Quantize(quantizer(block, scale_fmt)).convert({"w.weight": values})
    return found["w.weight"], found["w.weight_scale_inv"]


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return finegrained.Fp8Dequantize(quantizer())._dequantize_one(weight, scale, torch.float32)


def weights(rows: int = 256, columns: int = 384, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-9, 10, (rows // 64, 1), generator=random).float()).repeat_interleave(64, 0)
    values = torch.randn(rows, columns, generator=random) * spread
    values[:128, :128] = 0
    return values


@pytest.mark.parametrize(("block", "ours"), [([128, 128], FP8(scale="F32")), ([64, 128], FP8((64, 128), "F32")), (None, FP8((WHOLE, WHOLE), "F32"))])
def test_fp8(block, ours):
    given = weights()
    weight, scale = quantized(given, block)
    parts = {"weight": weight, "scale": scale}
    assert ours.check(parts) is None
    read = ours.decode(parts, torch.float32)
    assert torch.equal(read, dequantized(weight, scale))

    mine = ours.encode(given)
    assert torch.equal(dequantized(mine["weight"], mine["scale"]), ours.decode(mine, torch.float32))
    # Its scale is 1 / (448 / amax), ours amax / 448: at most one unit in the last place apart, and zeros get 1 in both.
    assert ((mine["scale"] - scale).abs() <= 1.2e-7 * scale).all()
    assert (mine["weight"].view(torch.uint8) != weight.view(torch.uint8)).float().mean() < 1e-4

    again = ours.encode(read)  # its scales, not ours, since the numbers show them
    assert torch.equal(again["weight"].view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(again["scale"], scale)


def test_fp8_with_powers_of_two():
    ours, given = FP8(scale="F8_E8M0"), weights()
    weight, scale = quantized(given, [128, 128], "ue8m0")
    mine = ours.encode(given)
    assert torch.equal(mine["weight"].view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(mine["scale"].view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(ours.decode(mine, torch.float32), dequantized(weight, scale))
    for other in ("U8", "F32", "BF16"):
        moved = ours.recode(mine, FP8(scale=other))
        assert torch.equal(dequantized(moved["weight"], moved["scale"]), dequantized(weight, scale))
        assert torch.equal(FP8(scale=other).recode(moved, ours)["scale"].view(torch.uint8), scale.view(torch.uint8))


def test_its_error_with_ragged_blocks_is_not_ours():
    """It takes the block from the shapes: 192 rows with two scales are two blocks of 96 to it and 128 + 64 to their producer; 576 rows it refuses."""
    ours = FP8(scale="F32")
    given = torch.randn(192, 128, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 193).unsqueeze(-1)
    parts = ours.encode(given)
    read, wrong = ours.decode(parts, torch.float32), dequantized(parts["weight"], parts["scale"])
    assert (read - given).norm() / given.norm() < 0.04
    assert (wrong - given).norm() / given.norm() > 0.05
    assert torch.equal(wrong[:96], read[:96])
    with pytest.raises(TensorMismatch, match="weight_block_size"):
        FP8((32, 32)).decode(parts, torch.float32)
    ragged = ours.encode(torch.randn(576, 128))
    assert ours.decode(ragged, torch.float32).shape == (576, 128)
    with pytest.raises(ValueError, match="not divisible"):
        dequantized(ragged["weight"], ragged["scale"])


@pytest.mark.parametrize("scale", ["F8_E8M0", "U8"])
def test_deepseek_v4s_container_of_mxfp4(scale):
    """I8 holds two nibbles of E2M1; both it and we see the numbers that gpt-oss' blocks would hold."""
    given = weights().bfloat16()
    int8 = MXFP4(container="int8", scale=scale)
    parts = int8.encode(given)
    assert parts["packed"].dtype == torch.int8
    read = dequantized(parts["packed"], parts["scale"])
    assert torch.equal(read, int8.decode(parts, torch.float32))
    blocks = int8.recode(parts, MXFP4())
    assert torch.equal(read, mxfp4("openai").decode(blocks, torch.float32))
    assert torch.equal(mxfp4("openai").recode(blocks, int8)["packed"], parts["packed"])

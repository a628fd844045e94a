"""MXFP4 in compressed-tensors: it codes the same numbers in the same bytes, and decodes what we encode to the same bits."""

import pytest
import torch

from moeglot.encodings.mxfp4 import mxfp4

pytest.importorskip("compressed_tensors", reason="installed beside transformers 5.23 only")


def weights(scale: float = 1.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    spread = torch.exp2(torch.randint(-20, 20, (256, 1), generator=random).float())
    return (torch.randn(256, 128, generator=random) * spread * scale).bfloat16()


def compressed_tensors_scheme():
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8)
    return QuantizationScheme(targets=["Linear"], weights=arguments)


@pytest.mark.parametrize("rule", ["openai", "ocp", "compressed-tensors", "rceil"])
def test_compressed_tensors_decodes_what_we_encode(rule):
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor

    encoding = mxfp4(rule)
    parts = encoding.encode(weights())
    state = {"weight_packed": parts["packed"].flatten(-2), "weight_scale": parts["scale"]}
    found = MXFP4PackedCompressor.decompress(state, compressed_tensors_scheme())["weight"]
    assert torch.equal(found.float(), encoding.decode(parts, torch.float32))


def test_compressed_tensors_encodes_the_same_bytes():
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    given = weights()
    exponents = generate_mx_scales(given.view(256, 4, 32).abs().amax(-1))
    state = {"weight": given, "weight_scale": torch.exp2(exponents.float() - 127)}
    theirs = MXFP4PackedCompressor.compress(state, compressed_tensors_scheme())
    ours = mxfp4("compressed-tensors").encode(given)
    assert torch.equal(theirs["weight_scale"], ours["scale"])
    found = mxfp4("ocp").decode({"packed": theirs["weight_packed"].view(256, 4, 16), "scale": theirs["weight_scale"]}, torch.float32)
    assert torch.equal(found, mxfp4("ocp").decode(ours, torch.float32))
    # Their packing drops the sign of zero; every other code is the same byte.
    zero = found == 0
    low, high = ours["packed"] & 15, ours["packed"] >> 4
    codes = torch.stack([low, high], -1).view(256, 128)
    their_codes = torch.stack([theirs["weight_packed"] & 15, theirs["weight_packed"] >> 4], -1).view(256, 128)
    assert torch.equal(codes[~zero], their_codes[~zero])


def test_a_wrong_rule_is_seen():
    """The power of these tests: axolotl's floor(log2(amax / 6)) saturates, and no library here would agree with it."""
    given = weights()
    groups = given.float().view(256, 4, 32)
    wrong = torch.floor(torch.log2(groups.abs().amax(-1) / 6)) + 127
    for rule in ("openai", "ocp", "compressed-tensors", "rceil"):
        assert (mxfp4(rule).encode(given)["scale"].float() != wrong).float().mean() > 0.1

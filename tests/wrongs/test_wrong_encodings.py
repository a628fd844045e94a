"""Each known way to misread quantized numbers, by name and by who shipped it, and how far from the right numbers it lands: never near the limit of 1e-5.

The wrong readings are written here with plain tensor operations; the right one is our decoder's, which tests/oracles compares with the producers' own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from reading import relative

from moeglot.encoding import Encoding
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.gptq import GPTQ
from moeglot.encodings.int4 import INT4
from moeglot.encodings.int8 import INT8
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.nvfp4 import NVFP4

MARGIN = 100 * 1e-5
Parts = dict[str, torch.Tensor]


def weights(rows: int = 192, columns: int = 256) -> torch.Tensor:
    """Rows of sizes that differ as trained ones do, by a factor of 8."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=random) * torch.exp2(3 * torch.rand(rows, 1, generator=random)) * 0.02


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    bytes_ = packed.contiguous().view(torch.uint8)
    return torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(-2).int()


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = nibbles(packed)
    return torch.where(codes > 7, -1, 1) * levels[codes & 7]


def twos_complement(parts: Parts) -> torch.Tensor:
    codes = nibbles(parts["packed"])
    return torch.where(codes > 7, codes - 16, codes) * parts["scale"].float().repeat_interleave(32, -1)


def highest_first(parts: Parts) -> torch.Tensor:
    codes = nibbles(parts["packed"]).unflatten(-1, (-1, 8)).flip(-1).flatten(-2)
    return (codes - 8) * parts["scale"].float().repeat_interleave(32, -1)


def global_not_inverted(parts: Parts) -> torch.Tensor:
    return e2m1(parts["packed"]) * (parts["scale"].float() * parts["global"]).repeat_interleave(16, -1)


def global_inverted(parts: Parts) -> torch.Tensor:
    return e2m1(parts["packed"]) * (parts["scale"].float() / parts["global"]).repeat_interleave(16, -1)


def global_forgotten(parts: Parts) -> torch.Tensor:
    return e2m1(parts["packed"]) * parts["scale"].float().repeat_interleave(16, -1)


def spread(scale: torch.Tensor, high: int, wide: int, shape: tuple[int, ...]) -> torch.Tensor:
    return scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]]


def scale_inverted(parts: Parts) -> torch.Tensor:
    return parts["weight"].float() / spread(parts["scale"], 128, 128, parts["weight"].shape)


def scale_unused(parts: Parts) -> torch.Tensor:
    return parts["weight"].float()


def block_from_shapes(parts: Parts) -> torch.Tensor:
    """rows // scale rows, the last block short where that leaves a rest."""
    rows, columns = parts["weight"].shape
    high, wide = -(-rows // parts["scale"].shape[0]), -(-columns // parts["scale"].shape[1])
    return parts["weight"].float() * spread(parts["scale"], high, wide, parts["weight"].shape)


def e8m0_as_a_number(parts: Parts) -> torch.Tensor:
    return parts["weight"].float() * spread(parts["scale"].float(), 128, 128, parts["weight"].shape)


def int8_as_a_number(parts: Parts) -> torch.Tensor:
    """Two nibbles taken for one INT8; each is then two columns wide."""
    return (parts["packed"].float() * parts["scale"].float().repeat_interleave(16, -1)).repeat_interleave(2, -1)


def int8_in_offset_binary(parts: Parts) -> torch.Tensor:
    """Two's complement taken for 128 more than the number."""
    return (parts["weight"].view(torch.uint8).float() - 128) * parts["scale"].float()


def int8_words_in_twos_complement(parts: Parts) -> torch.Tensor:
    return parts["packed"].view(torch.int8).float() * parts["scale"].float()


def int8_highest_first(parts: Parts) -> torch.Tensor:
    return (parts["packed"].view(torch.uint8).unflatten(-1, (-1, 4)).flip(-1).flatten(-2).float() - 128) * parts["scale"].float()


def int8_scaled_by_input(parts: Parts) -> torch.Tensor:
    """A scale for each output taken for one of each input, where both are 192."""
    return parts["weight"].float() * parts["scale"].float().mT


def int8_turned(parts: Parts) -> torch.Tensor:
    return (parts["weight"].float() * parts["scale"].float()).mT


def int8_without_zero_points(parts: Parts) -> torch.Tensor:
    return parts["weight"].float() * parts["scale"].float()


def by_words(parts: Parts, codes: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """codes [in, out] and zero points [in / 64, out] -> numbers [in, out]."""
    return (codes - zeros.repeat_interleave(64, 0)) * parts["scale"].float().repeat_interleave(64, 0)


def along_inputs(words: torch.Tensor) -> torch.Tensor:
    """i32 [in / 8, out] -> [in, out]"""
    return nibbles(words.mT).mT


def zero_points_of_v1(parts: Parts) -> torch.Tensor:
    return by_words(parts, along_inputs(parts["packed"]), nibbles(parts["zero_point"]) + 1)


def words_from_the_top(parts: Parts) -> torch.Tensor:
    codes = along_inputs(parts["packed"]).unflatten(0, (-1, 8)).flip(1).flatten(0, 1)
    return by_words(parts, codes, nibbles(parts["zero_point"]) + 1)


def lying_on_the_side(parts: Parts) -> torch.Tensor:
    return by_words(parts, along_inputs(parts["packed"]), nibbles(parts["zero_point"]) + 1).mT


def outputs_in_order(parts: Parts) -> torch.Tensor:
    return by_words(parts, nibbles(parts["packed"]), nibbles(parts["zero_point"]))


@dataclass(frozen=True)
class Wrong:
    name: str
    source: str
    encoding: Encoding
    read: Callable[[Parts], torch.Tensor]
    least: float
    rows: int = 192
    columns: int = 256


WRONGS = [
    Wrong("INT4 as two's complement", "tinker-cookbook 0.6.1; its own round trip is exact", INT4(32, "kimi"), twos_complement, 1),
    Wrong("INT4 with the highest nibble first", "a packer that fills words from the top", INT4(32), highest_first, 1),
    Wrong("INT8's bytes in offset binary", "the reading of pack-quantized", INT8(), int8_in_offset_binary, 1),
    Wrong("INT8's words in two's complement", "the reading of int-quantized", INT8(container="words"), int8_words_in_twos_complement, 1),
    Wrong("INT8's words with the highest byte first", "a packer that fills words from the top", INT8(container="words"), int8_highest_first, 1),
    Wrong("INT8's scales by input", "a vector [out] against [in]", INT8(), int8_scaled_by_input, 0.5, columns=192),
    Wrong("INT8 on its side", "Quark's groups, which lie [in, out]", INT8(), int8_turned, 1, columns=192),
    Wrong("INT8 without its zero points", "weight_zero_point unread", INT8(symmetric=False), int8_without_zero_points, 0.05),
    Wrong("GPTQ's zero points not one more", "checkpoint_format gptq read as gptq_v2", GPTQ(64, symmetric=False), zero_points_of_v1, 0.1),
    Wrong("GPTQ with the highest nibble first", "a packer that fills words from the top", GPTQ(64, less=True), words_from_the_top, 1),
    Wrong("GPTQ's words along the outputs", "[in, out] taken for [out, in] where both are 192", GPTQ(64, less=True), lying_on_the_side, 1, columns=192),
    Wrong("AWQ's outputs in order", "nibbles of a word taken for outputs 0 to 7", GPTQ(64, packing="awq", symmetric=False), outputs_in_order, 1),
    Wrong("NVFP4's global not inverted", "ModelOpt's reading of compressed-tensors' file", NVFP4("compressed-tensors"), global_not_inverted, 1),
    Wrong("NVFP4's global inverted", "compressed-tensors' reading of ModelOpt's file", NVFP4("modelopt"), global_inverted, 1),
    Wrong("NVFP4's global forgotten", "one level of scales, as in MX", NVFP4("modelopt"), global_forgotten, 1),
    Wrong("FP8's scale inverted", "the name weight_scale_inv taken at its word", FP8(), scale_inverted, 1),
    Wrong("FP8's scale unused", "scales present and dropped: transformers 5.5.4 on a CPU", FP8(), scale_unused, 1),
    Wrong("FP8's block derived from shapes, 192 rows", "transformers 5.23: two blocks of 96 for 128 + 64", FP8(), block_from_shapes, 0.02, 192),
    Wrong("FP8's block derived from shapes, 576 rows", "⌈576 / 5⌉ = 116 rows for 128", FP8(), block_from_shapes, 0.02, 576),
    Wrong("E8M0 as a number", "U8 scales multiplied as they are", FP8(scale="U8"), e8m0_as_a_number, 1),
    Wrong("MXFP4's container as INT8", "DeepSeek-V4's I8 taken for numbers", MXFP4(container="int8"), int8_as_a_number, 1),
]


@pytest.mark.parametrize("wrong", WRONGS, ids=lambda wrong: wrong.name)
def test_a_wrong_reading_is_far_off(wrong):
    """Right parts, read wrongly."""
    given = weights(wrong.rows, wrong.columns)
    parts = wrong.encoding.encode(given)
    right = wrong.encoding.decode(parts, torch.float32)
    assert relative(right, given) < 0.15
    assert relative(wrong.read(parts), right) > max(wrong.least, MARGIN)


def test_a_round_trip_cannot_see_it():
    """Packed and unpacked as two's complement, numbers return exactly; only a second implementation shows that no one else reads them so."""
    given = weights()
    scale = given.view(192, 8, 32).abs().amax(-1) / 7
    codes = (given / scale.repeat_interleave(32, -1)).round().to(torch.int32) & 15
    words = (codes.view(192, 32, 8) << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    parts = {"packed": words, "scale": scale, "shape": torch.tensor([[[192, 256]]])}
    assert relative(twos_complement(parts), given) < 0.15
    assert relative(INT4(32, scale="F32").decode(parts, torch.float32), given) > 1


def test_axolotls_scale_rule_clips():
    """floor(log2(amax / 6)): the largest numbers of a group are over 6 under that scale. Nearly twice the error of a rule that does not clip."""
    given = weights()
    groups = given.view(192, 8, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1) / 6))
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / torch.exp2(exponent)[..., None]
    clipped = levels[(scaled.abs()[..., None] - levels).abs().argmin(-1)] * scaled.sign() * torch.exp2(exponent)[..., None]
    right = MXFP4().decode(MXFP4().encode(given), torch.float32)
    assert relative(clipped.flatten(-2), given) > 1.5 * relative(right, given)
    assert relative(clipped.flatten(-2), right) > 100 * MARGIN

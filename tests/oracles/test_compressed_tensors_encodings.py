"""FP8, NVFP4, INT4 and the container of MXFP4 in compressed-tensors: what it compresses we decode to the same bits, and it decompresses what we encode."""

import pytest
import torch

from moeglot.encoding import WHOLE
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.int4 import INT4
from moeglot.encodings.mxfp4 import MXFP4, mxfp4
from moeglot.encodings.nvfp4 import NVFP4

pytest.importorskip("compressed_tensors", reason="installed beside transformers 5.23 only")


def weights(rows: int = 192, columns: int = 256, seed: int = 1) -> torch.Tensor:
    """float32 [rows, columns] whose rows have sizes from 2^-9 to 2^9."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-9, 10, (rows, 1), generator=random).float())
    return torch.randn(rows, columns, generator=random) * spread


def scheme(**arguments):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**{"symmetric": True, **arguments}))


def parameters(groups: torch.Tensor, given, **more):
    """Their scales for the last axis of `groups`."""
    from compressed_tensors.quantization.utils import calculate_qparams

    return calculate_qparams(groups.amin(-1), groups.amax(-1), given.weights, **more)[0]


# --- FP8 -------------------------------------------------------------------------------------------------------------------------------


FP8_KINDS = {
    "block": (FP8((128, 128), "F32"), {"strategy": "block", "block_structure": [128, 128]}),
    "ragged": (FP8((128, 96), "F32"), {"strategy": "block", "block_structure": [128, 96]}),
    "channel": (FP8((1, WHOLE), "F32"), {"strategy": "channel"}),
    "tensor": (FP8((WHOLE, WHOLE), "F32"), {"strategy": "tensor"}),
}


def fp8_scales(given: torch.Tensor, kind: str, theirs) -> torch.Tensor:
    """Their scale for each block, padded with zeros as they pad."""
    block = FP8_KINDS[kind][0].block
    high, wide = block[0] or given.shape[0], block[1] or given.shape[1]
    rows, columns = -(-given.shape[0] // high), -(-given.shape[1] // wide)
    padded = torch.nn.functional.pad(given, (0, columns * wide - given.shape[1], 0, rows * high - given.shape[0]))
    tiles = padded.view(rows, high, columns, wide).transpose(1, 2).flatten(-2)
    return parameters(tiles, theirs)


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_fp8(kind):
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor as Compressor

    ours, arguments = FP8_KINDS[kind]
    theirs, given = scheme(num_bits=8, type="float", **arguments), weights()
    scale = fp8_scales(given, kind, theirs)
    state = Compressor.compress({"weight": given, "weight_scale": scale}, theirs)
    read = ours.decode({"weight": state["weight"], "scale": state["weight_scale"]}, torch.float32)
    assert torch.equal(read, Compressor.decompress(state, theirs)["weight"])

    parts = ours.encode(given)  # the same rule, the same bytes
    assert torch.equal(parts["scale"], scale)
    assert torch.equal(parts["weight"].view(torch.uint8), state["weight"].view(torch.uint8))
    written = Compressor.decompress({"weight": parts["weight"], "weight_scale": parts["scale"]}, theirs)["weight"]
    assert torch.equal(written, ours.decode(parts, torch.float32))

    again = ours.encode(read)
    assert torch.equal(again["weight"].view(torch.uint8), state["weight"].view(torch.uint8))
    assert torch.equal(again["scale"], scale)
    inverted = ours.decode(ours.inverted(parts), torch.float32)
    assert (inverted - written).norm() / written.norm() > 1e-3


def test_fp8_with_scales_in_bfloat16():
    """Their scale of a bfloat16 weight is amax / 448 rounded to bfloat16, as ours is; they divide in bfloat16, so one code in fifty differs by a step."""
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor as Compressor

    ours, theirs = FP8((1, WHOLE), "BF16"), scheme(num_bits=8, type="float", strategy="channel")
    given = weights().bfloat16()
    scale = parameters(given.unsqueeze(1), theirs)
    assert scale.dtype == torch.bfloat16
    state = Compressor.compress({"weight": given, "weight_scale": scale}, theirs)
    parts = ours.encode(given)
    assert torch.equal(parts["scale"], scale)
    read = ours.decode({"weight": state["weight"], "scale": scale}, torch.float32)
    assert torch.equal(read.bfloat16(), Compressor.decompress(state, theirs)["weight"])  # they multiply in bfloat16
    steps = (parts["weight"].view(torch.uint8).int() - state["weight"].view(torch.uint8).int()).abs()
    assert steps.max() == 1
    assert (steps == 1).float().mean() < 0.05
    again = ours.encode(read)
    assert torch.equal(again["weight"].view(torch.uint8), state["weight"].view(torch.uint8))
    assert torch.equal(again["scale"], scale)


# --- NVFP4 -----------------------------------------------------------------------------------------------------------------------------


def nvfp4_scheme():
    return scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)


def test_nvfp4():
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor as Compressor
    from compressed_tensors.quantization.utils import generate_gparam

    given, theirs, ours = weights(), nvfp4_scheme(), NVFP4("compressed-tensors")
    given[5, :32] = 0
    whole = generate_gparam(given.min(), given.max())
    scale = parameters(given.view(192, 16, 16), theirs, global_scale=whole)
    state = Compressor.compress({"weight": given.clone(), "weight_scale": scale, "weight_global_scale": whole}, theirs)
    stored = {"packed": state["weight_packed"], "scale": state["weight_scale"], "global": whole.view(1, 1)}
    read = ours.decode(stored, torch.float32)
    assert torch.equal(read.bfloat16(), Compressor.decompress(state, theirs)["weight"])

    parts = ours.encode(given)
    assert torch.equal(parts["global"].view(1), whole)
    assert torch.equal(parts["scale"].view(torch.uint8), state["weight_scale"].view(torch.uint8))
    differ = _nibbles(parts["packed"]) != _nibbles(state["weight_packed"])
    assert not bool((differ & (read != 0)).any())  # they drop the sign of a number that rounds to zero
    written = {"weight_packed": parts["packed"], "weight_scale": parts["scale"], "weight_global_scale": parts["global"].view(1)}
    assert torch.equal(Compressor.decompress(written, theirs)["weight"], ours.decode(parts, torch.bfloat16))

    again = ours.encode(read)
    assert all(torch.equal(again[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored)
    wrong = NVFP4("modelopt").decode(stored, torch.float32)  # the global not inverted
    assert (wrong - read).norm() / read.norm() > 1e-3


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def test_mxfp4_as_they_store_it():
    """Their container of MXFP4: the bytes of gpt-oss' blocks with the last two axes as one; and the way to NVFP4 keeps every value."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor

    given = weights().bfloat16()
    given[:, 64:96] = given[:, 64:96].sign()  # the powers of the rest are within a row's spread
    given = given / given.abs().amax(-1, keepdim=True)
    ours = mxfp4("compressed-tensors", "packed")
    parts = ours.encode(given)
    group = scheme(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    found = MXFP4PackedCompressor.decompress({"weight_packed": parts["packed"], "weight_scale": parts["scale"]}, group)["weight"]
    assert torch.equal(found.float(), ours.decode(parts, torch.float32))
    blocks = ours.recode(parts, MXFP4())
    assert torch.equal(blocks["packed"], mxfp4("compressed-tensors").encode(given)["packed"])

    nvfp4 = ours.recode(parts, NVFP4("compressed-tensors"))
    state = {"weight_packed": nvfp4["packed"], "weight_scale": nvfp4["scale"], "weight_global_scale": nvfp4["global"].view(1)}
    assert torch.equal(NVFP4PackedCompressor.decompress(state, nvfp4_scheme())["weight"], found)


# --- INT4 ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "columns"), [(32, 256), (64, 256), (128, 256), (WHOLE, 203)])
def test_int4(group, columns, dtype):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor

    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    ours, given = INT4(group, scale=name), weights(columns=columns)
    theirs = scheme(num_bits=4, type="int", **({"strategy": "group", "group_size": group} if group else {"strategy": "channel"}))
    scale = parameters(given.view(192, -1, group or columns), theirs).to(dtype)
    state = Compressor.compress({"weight": given, "weight_scale": scale}, theirs)
    stored = {"packed": state["weight_packed"], "scale": scale, "shape": state["weight_shape"].view(1, 1, 2)}
    assert ours.check(stored) is None
    read = ours.decode(stored, torch.float32)
    assert torch.equal(read.to(dtype), Compressor.decompress(state, theirs)["weight"])  # they multiply in the scale's type

    parts = ours.encode(given)
    assert torch.equal(parts["scale"], scale)
    assert torch.equal(parts["packed"], state["weight_packed"])
    assert torch.equal(parts["shape"].view(2), state["weight_shape"])

    again = ours.encode(read)
    assert torch.equal(again["packed"], state["weight_packed"])
    assert torch.equal(again["scale"], scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "columns"), [(32, 256), (WHOLE, 203)])
def test_int4_with_negative_scales(group, columns, dtype):
    """AutoRound's symmetric rule gives the largest magnitude the code -8, so that the scale of about half of all groups is negative."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor

    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    ours, given = INT4(group, scale=name), weights(columns=columns)
    groups = given.view(192, -1, group or columns)
    theirs = scheme(num_bits=4, type="int", **({"strategy": "group", "group_size": group} if group else {"strategy": "channel"}))
    scale = (groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8).to(dtype)
    assert 0.4 < float((scale < 0).float().mean()) < 0.6
    state = Compressor.compress({"weight": given, "weight_scale": scale}, theirs)
    stored = {"packed": state["weight_packed"], "scale": scale, "shape": state["weight_shape"].view(1, 1, 2)}
    assert ours.check(stored) is None
    read = ours.decode(stored, torch.float32)
    assert torch.equal(read.to(dtype), Compressor.decompress(state, theirs)["weight"])
    without_sign = ours.decode({**stored, "scale": scale.abs()}, torch.float32)
    assert (without_sign - read).norm() / read.norm() > 1  # the power of it

    again = ours.encode(read)  # a code of -8 under a negative scale has no other
    assert torch.equal(ours.decode(again, torch.float32), read)
    assert float((again["scale"] == scale).float().mean()) > 0.95
    written = {"weight_packed": again["packed"], "weight_scale": again["scale"], "weight_shape": again["shape"].view(2)}
    assert torch.equal(Compressor.decompress(written, theirs)["weight"], read.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("group", "columns", "rows"), [(32, 256, 192), (128, 256, 50), (WHOLE, 203, 192)])
def test_int4_with_zero_points(group, columns, rows, dtype):
    """Fifty rows: the last word of zero points is not full. Weights off zero, as asymmetric quantization is for."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization.utils import calculate_qparams

    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    ours, given = INT4(group, scale=name, zero=True), weights(rows, columns)
    given = given + 0.7 * given.abs().amax(-1, keepdim=True) * torch.linspace(-2, 2, rows).unsqueeze(-1)
    theirs = scheme(num_bits=4, type="int", symmetric=False, **({"strategy": "group", "group_size": group} if group else {"strategy": "channel"}))
    groups = given.view(rows, -1, group or columns)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), theirs.weights)
    scale = scale.to(dtype)
    state = Compressor.compress({"weight": given, "weight_scale": scale, "weight_zero_point": zero}, theirs)
    names = {"packed": "weight_packed", "scale": "weight_scale", "zero_point": "weight_zero_point"}
    stored = {part: state[key] for part, key in names.items()} | {"shape": state["weight_shape"].view(1, 1, 2)}
    assert tuple(stored["zero_point"].shape) == next(part for part in ours.parts if part.name == "zero_point").shape((rows, columns))
    assert ours.check(stored) is None
    read = ours.decode(stored, torch.float32)
    assert torch.equal(read.to(dtype), Compressor.decompress(dict(state), theirs)["weight"])
    symmetric = INT4(group, scale=name).decode({part: stored[part] for part in ("packed", "scale", "shape")}, torch.float32)
    assert (symmetric - read).norm() / read.norm() > 0.1  # the power of it

    parts = ours.encode(given)  # the same rule, the same bytes
    for part in ("packed", "scale", "zero_point"):
        assert torch.equal(parts[part], stored[part]), part
    written = {key: parts[part] for part, key in names.items()} | {"weight_shape": parts["shape"].view(2)}
    assert torch.equal(Compressor.decompress(written, theirs)["weight"], ours.decode(parts, torch.float32).to(dtype))
    again = ours.encode(read)
    assert torch.equal(ours.decode(again, torch.float32), read)


# --- MXFP8 -----------------------------------------------------------------------------------------------------------------------------


def test_mxfp8():
    """Their scale of a group may be half of ours, and then clips: their bytes we decode as they do, and they decode ours."""
    from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor as Compressor

    given, ours = weights().bfloat16(), FP8((1, 32), "U8")
    theirs = scheme(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    scale = parameters(given.view(192, 8, 32), theirs)
    state = Compressor.compress({"weight": given, "weight_scale": scale.float()}, theirs)
    stored = {"weight": state["weight"], "scale": state["weight_scale"]}
    assert (stored["scale"].dtype, stored["scale"].shape) == (torch.uint8, (192, 8))
    assert ours.check(stored) is None
    read = ours.decode(stored, torch.float32)
    assert torch.equal(read.bfloat16(), Compressor.decompress(state, theirs)["weight"])

    parts = ours.encode(given)
    written = Compressor.decompress({"weight": parts["weight"], "weight_scale": parts["scale"]}, theirs)["weight"]
    assert torch.equal(written, ours.decode(parts, torch.bfloat16))
    assert (written.float() - given.float()).norm() / given.float().norm() < 0.05
    again = ours.encode(read)
    assert torch.equal(ours.decode(again, torch.float32), read)
    inverted = ours.decode(ours.inverted(stored), torch.float32)
    assert (inverted - read).norm() / read.norm() > 1e-3


def test_kimis_grid_is_kept():
    """amax / 7 and codes from -7 to 7: their packing of it returns byte for byte, whichever rule our encoder would have used."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor

    given = weights()
    scale = (given.view(192, 8, 32).abs().amax(-1) / 7).bfloat16()
    theirs = scheme(num_bits=4, type="int", strategy="group", group_size=32)
    state = Compressor.compress({"weight": given, "weight_scale": scale}, theirs)
    for rule in ("compressed-tensors", "kimi"):
        ours = INT4(32, rule, "BF16")
        stored = {"packed": state["weight_packed"], "scale": scale, "shape": torch.tensor([[[192, 256]]])}
        again = ours.encode(ours.decode(stored, torch.float32))
        assert torch.equal(again["packed"], state["weight_packed"])
        assert torch.equal(again["scale"], scale)
        assert ours.undetermined(stored) == 0
    assert torch.equal(INT4(32, "kimi", "BF16").encode(given)["packed"], state["weight_packed"])
    assert (INT4(32, "compressed-tensors", "BF16").encode(given)["scale"] != scale).float().mean() > 0.9

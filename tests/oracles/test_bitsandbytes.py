"""NF4 and FP4 in bitsandbytes: what it encodes we decode to its bits, what we encode has its bytes, and transformers loads it."""

import pytest
import torch
from four_bits import dequantize

from moeglot.encodings.bnb4 import BNB4, QuantState, absmax, names
from moeglot.kernels import bnb4 as kernel

bitsandbytes = pytest.importorskip("bitsandbytes", reason="installed in an environment of its own")

SHAPES = [(64, 64), (48, 48), (9, 50), (3, 64), (1, 130), (300, 70)]
"""H = I, and sizes that are no whole number of blocks."""


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=random) * torch.exp(torch.randn(*shape[:-1], 1, generator=random))).to(dtype)


def quantized(given: torch.Tensor, kind: str, blocksize: int, nested: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the library stores, as our parts, and what it decodes."""
    functional = bitsandbytes.functional
    codes, state = functional.quantize_4bit(given, blocksize=blocksize, quant_type=kind, compress_statistics=nested)
    stored = {"packed": codes, **{part: state.as_dict(packed=True).get(suffix[1:]) for part, suffix in names(kind).items() if suffix}}
    return {part: tensor for part, tensor in stored.items() if tensor is not None}, dequantize(codes, state)


def dequantized(parts: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The library's reading of our parts, by way of its own loader."""
    told = {"weight" + suffix: parts[part] for part, suffix in names(kind).items() if suffix and part in parts}
    state = bitsandbytes.functional.QuantState.from_dict(told, device=torch.device("cpu"))
    return dequantize(parts["packed"], state)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def same(ours: torch.Tensor, theirs: torch.Tensor, kind: str) -> bool:
    """Bit for bit; but its kernel for AVX512 decodes FP4's code 8 to +0 instead of -0."""
    return torch.equal(ours, theirs) if AVX512 and kind == "fp4" else torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways(kind, nested, blocksize, dtype, shape):
    given, encoding = weights(*shape, dtype=dtype), BNB4(kind, blocksize, nested)
    theirs, decoded = quantized(given, kind, blocksize, nested)
    assert encoding.check(theirs) is None
    assert same(encoding.decode(theirs, dtype), decoded, kind)
    ours = encoding.encode(given)
    assert torch.equal(bits(dequantized(ours, kind)), bits(decoded))
    assert set(ours) == set(theirs)
    for part in set(ours) - {"state"}:
        assert torch.equal(bits(ours[part]), bits(theirs[part])), part
    assert bytes(ours["state"].tolist()) == bytes(theirs["state"].tolist()).ljust(256)


@pytest.mark.skipif(not AVX512, reason="a defect of its kernel for AVX512")
def test_its_kernel_goes_wrong_where_rows_are_no_whole_number_of_blocks():
    """Of 16 columns or a multiple. `inspect` says so of a checkpoint with such matrices."""
    for width, wrong in ((48, True), (96, True), (64, False), (70, False)):
        given = weights(40, width)
        codes, state = bitsandbytes.functional.quantize_4bit(given, blocksize=64, quant_type="nf4")
        theirs, ours = bitsandbytes.functional.dequantize_4bit(codes, state), BNB4().decode(BNB4().encode(given), torch.float32)
        assert float((ours - given).norm() / given.norm()) < 0.15
        assert (float((theirs - given).norm() / given.norm()) > 0.5) == wrong


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(7, 9), (5, 33)])
def test_odd_widths(kind, shape):
    """Its fallback for them decodes FP4's code 8 to +0 instead of -0; all else is the same."""
    given = weights(*shape)
    theirs, decoded = quantized(given, kind, 64, False)
    ours = BNB4(kind).encode(given)
    assert torch.equal(ours["packed"], theirs["packed"])
    assert torch.equal(BNB4(kind).decode(ours, torch.float32), decoded)


def near(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Each value and its neighbours in float32."""
    found = torch.stack([(values.view(torch.int32) + step).view(torch.float32) for step in range(-steps, steps + 1)], -1)
    return found.nan_to_num(0.0)  # there is nothing below zero's bits


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3, 3e4])
def test_thresholds(kind, scale):
    """Each threshold and 60 neighbours on either side, and both zeros, under an absmax that is exact and others that round."""
    order = kernel.codebook(kind).sort().values
    middles = (order[:-1] + order[1:]) / 2 * scale
    tries = torch.cat([near(middles, 60).flatten(), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    tries = torch.nn.functional.pad(tries, (0, -len(tries) % 63)).view(-1, 63)
    block = torch.cat([torch.full((len(tries), 1), scale), tries], 1)
    theirs, _ = quantized(block, kind, 64, False)
    assert torch.equal(BNB4(kind).encode(block)["packed"], theirs["packed"])
    nudged = torch.nextafter(block, block + 1)
    assert not torch.equal(BNB4(kind).encode(nudged)["packed"], theirs["packed"])  # the power of this: one step more is seen


def test_nested_thresholds():
    """Its CPU kernel rounds to one of 65 536 positions before it looks for the nearest level: each border and its neighbours."""
    borders = ((torch.arange(65535).double() + 0.5) * 2 / 65535 - 1).float()
    tries = near(borders, 2).flatten().clamp(-1, 1)
    tries = torch.nn.functional.pad(tries, (0, -len(tries) % 255)).view(-1, 255)
    blocks = torch.cat([torch.ones(len(tries), 1), tries], 1).flatten()
    theirs, state = bitsandbytes.functional.quantize_blockwise(blocks, blocksize=256)
    position = ((blocks + 1) * (kernel.POSITIONS / 2) + 0.5).int()
    assert torch.equal(kernel._nested_table()[position], theirs)
    assert torch.equal(bits(kernel.nested_codebook()), bits(state.code))
    exact = torch.bucketize(blocks, (state.code[:-1] + state.code[1:]) / 2).to(torch.uint8)
    assert (exact != theirs).float().mean() > 0.001  # the power of this: the truly nearest level is another one there
    given = weights(3000, 64)
    ours, theirs_parts = BNB4(nested=True).encode(given), quantized(given, "nf4", 64, True)[0]
    assert torch.equal(ours["scale"], theirs_parts["scale"])
    assert torch.equal(ours["nested_scale"], theirs_parts["nested_scale"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_decoded_returns(kind, nested, dtype):
    """Its decoded numbers, encoded again by us, are the same numbers to it; its own second encoding of nested ones is not."""
    _, decoded = quantized(weights(40, 55 + 1, dtype=dtype), kind, 64, nested)
    assert torch.equal(bits(dequantized(BNB4(kind).encode(decoded), kind)), bits(decoded))
    if nested and dtype == torch.bfloat16:
        assert not torch.equal(quantized(decoded, kind, 64, False)[1], decoded)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_made_plain(kind):
    theirs, decoded = quantized(weights(40, 60, dtype=torch.bfloat16), kind, 128, True)
    plain = BNB4(kind, 128, nested=True).recode(theirs, BNB4(kind, 64))
    assert BNB4(kind, 64).check(plain) is None
    assert torch.equal(bits(dequantized(plain, kind)), bits(decoded))


def test_wrong_encodings_are_seen():
    given = weights(40, 96)
    theirs, decoded = quantized(given, "nf4", 64, True)
    parts = BNB4(nested=True).encode(given)

    def error(changed):
        return float((dequantized(parts | changed, "nf4") - decoded).norm() / decoded.norm())

    state = QuantState.read(parts["state"])
    assert error({}) == 0
    assert error({"packed": parts["packed"] >> 4 | parts["packed"] << 4}) > 1
    assert error({"state": QuantState("nf4", 64, "F32", (40, 96), 0.0).write(256)}) > 0.3
    assert error({"scale": parts["scale"].roll(1)}) > 0.3
    assert QuantState.read(theirs["state"]) == state


@pytest.mark.parametrize("nested", [False, True])
def test_stacked_experts(nested):
    """A 3-D parameter: keys NAME, NAME.absmax …; one expert of it is a run of codes and absmax, nested ones where 256 of them are one expert's."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized

    module = torch.nn.Module()
    module.down_proj = torch.nn.Parameter(weights(3, 128, 128, dtype=torch.bfloat16), requires_grad=False)
    replace_parameter_4bit(module, "down_proj", compress_statistics=nested)
    state = module.state_dict()
    stored = {part: state["down_proj" + suffix] for part, suffix in names("nf4").items() if "down_proj" + suffix in state}
    encoding = BNB4(nested=nested)
    assert set(stored) == {part.name for part in encoding.parts}
    assert len(stored) == len(state)
    assert torch.equal(encoding.decode(stored, torch.bfloat16), module.down_proj)
    for expert in range(3):
        parts = {part.name: stored[part.name] if part.shared else stored[part.name].chunk(3)[expert] for part in encoding.parts}
        assert encoding.check(parts) is None
        assert torch.equal(encoding.decode(parts, torch.bfloat16), module.down_proj[expert])
    ours = encoding.encode(module.down_proj.detach())
    other = torch.nn.Module()
    other.down_proj = torch.nn.Parameter(ours["packed"], requires_grad=False)
    told = {suffix[1:]: ours[part] for part, suffix in names("nf4").items() if suffix and part in ours}
    replace_parameter_4bit_prequantized(other, "down_proj", told, torch.device("cpu"))
    assert torch.equal(other.down_proj, encoding.decode(ours, torch.bfloat16))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_transformers_loads_what_we_encode(tmp_path, kind, nested):
    """A dense model that transformers quantized and saved, every Linear replaced by our encoding of its weight: the JSON with blanks at its end."""
    from safetensors.torch import load_file, save_file
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 32}
    plain = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    plain.save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.bfloat16)
    LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, device_map="cpu", dtype=torch.bfloat16).save_pretrained(tmp_path / "4bit")
    path = tmp_path / "4bit" / "model.safetensors"
    tensors, weight, encoding = load_file(path), plain.state_dict(), BNB4(kind, 64, nested)
    linears = [key.removesuffix(".absmax") for key in tensors if key.endswith(".absmax") and "nested" not in key]
    assert len(linears) == 7
    for key in linears:
        parts = encoding.encode(weight[key] * 2)  # not what is there already
        tensors |= {key + names(kind)[part]: tensor for part, tensor in parts.items()}
    save_file(tensors, path, {"format": "pt"})
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "4bit", device_map="cpu", dtype=torch.bfloat16)
    for key in linears:
        module = loaded.get_submodule(key.removesuffix(".weight"))
        found = dequantize(module.weight.data, module.weight.quant_state)
        expected = encoding.decode(encoding.encode(weight[key] * 2), torch.bfloat16)
        assert same(found, expected, kind)
        assert (found.float() - weight[key].float() * 2).norm() < 0.2 * (weight[key].float() * 2).norm()
        assert module.weight.quant_state.nested == nested == (absmax(encoding.encode(weight[key])).numel() > 0 and nested)

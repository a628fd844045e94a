"""INT8 in compressed-tensors and transformers: what they compress we decode to the same bits, they read what we write, and wrong readings are far off."""

import json

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint
from test_compressed_tensors_encodings import scheme, weights
from test_quantized_models import HUB, experts_of, load, plain  # noqa: F401
from transformers import AutoModelForCausalLM

import moeglot
from moeglot.encoding import WHOLE
from moeglot.encodings.int8 import INT8
from moeglot.integrations.transformers import VERSION

pytest.importorskip("compressed_tensors", reason="installed beside transformers 5.23 only")

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STRATEGIES = {"channel": (1, WHOLE), "tensor": (WHOLE, WHOLE), "group": (1, 64)}


def compressed(given, block, symmetric, container, dtype):
    """(Our part -> what they store of it, what they decompress that to in float32, their scheme.)"""
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    compressor = IntQuantizationCompressor if container == "bytes" else PackedQuantizationCompressor
    strategy = next(name for name, one in STRATEGIES.items() if one == block)
    size = {"group_size": block[1]} if strategy == "group" else {}
    theirs = scheme(num_bits=8, type="int", strategy=strategy, symmetric=symmetric, **size)
    groups = given.flatten() if strategy == "tensor" else given.view(len(given), -1, block[1] or given.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), theirs.weights)
    state = compressor.compress({"weight": given, "weight_scale": scale.to(dtype), "weight_zero_point": zero}, theirs)
    read = compressor.decompress({**state, "weight_scale": scale.to(dtype).float()}, theirs)["weight"]
    names = {"weight": "weight", "weight_packed": "packed", "weight_scale": "scale", "weight_zero_point": "zero_point", "weight_shape": "shape"}
    parts = {names[name]: tensor for name, tensor in state.items()}
    if "shape" in parts:
        parts["shape"] = parts["shape"].view(1, 1, 2)
    return parts, read, (compressor, theirs, names)


KINDS = [(block, symmetric, container) for block in STRATEGIES.values() for symmetric in (True, False) for container in ("bytes", "words")]
KINDS = [kind for kind in KINDS if kind[0][0] == 1 or kind[1:] == (True, "bytes")]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(192, 192), (50, 256)])
@pytest.mark.parametrize(("block", "symmetric", "container"), KINDS)
def test_compressed_tensors(block, symmetric, container, rows, columns, name):
    ours, given = INT8(block, container, symmetric, scale=name), weights(rows, columns)
    given = given if symmetric else given + 0.7 * given.abs().amax(-1, keepdim=True) * torch.linspace(-2, 2, rows).unsqueeze(-1)
    stored, read, (compressor, theirs, names) = compressed(given, block, symmetric, container, TYPES[name])
    for part in ours.parts:
        assert tuple(stored[part.name].shape) == ((1,) if block[0] == WHOLE and part.name == "scale" else part.shape((rows, columns)))
    stored["scale"] = stored["scale"].view(ours.parts[1].shape((rows, columns)))
    assert ours.check(stored) is None
    assert torch.equal(ours.decode(stored, torch.float32), read)

    parts = ours.encode(given)  # the same rule, the same bytes
    for part in stored:
        assert torch.equal(parts[part], stored[part]), part
    state = {key: parts[part].view(2) if part == "shape" else parts[part] for key, part in names.items() if part in parts}
    state["weight_scale"] = state["weight_scale"].view(-1) if block[0] == WHOLE else state["weight_scale"]
    assert torch.equal(compressor.decompress(state, theirs)["weight"], ours.decode(parts, TYPES[name]))  # they multiply in the scale's type
    again = ours.encode(read)
    assert torch.equal(ours.decode(again, torch.float32), read)

    def off(wrong):
        return float((wrong - read).norm() / read.norm())

    codes = ours.numbers(stored)
    assert off(ours.decode(ours.inverted(stored), torch.float32)) > 0.1
    assert off(INT8(block, scale=name).decode({"weight": codes ^ -128, "scale": stored["scale"]}, torch.float32)) > 0.1  # the sign, or the offset
    if not symmetric:
        assert off(INT8(block, scale=name).decode({"weight": codes, "scale": stored["scale"]}, torch.float32)) > 0.1
    if (rows, block) == (columns, (1, WHOLE)):
        assert off(ours.decode(stored | ({"weight": codes.mT} if container == "bytes" else {"packed": stored["packed"].flip(1)}), torch.float32)) > 0.1
        assert off(read / stored["scale"].float() * stored["scale"].float().mT) > 0.1  # a scale for each input


# --- whole checkpoints -------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(VERSION < (5, 23), reason="the release that dequantizes experts on a CPU")
@pytest.mark.parametrize("encode", ["int8-pack:channel", "int8-pack:128"])
def test_transformers_holds_the_numbers_that_we_decode(plain, encode, tmp_path):  # noqa: F811
    moeglot.convert(plain, HUB, tmp_path / "coded", encode=encode, allow_loss=True)
    theirs = load(tmp_path / "coded").model.layers[1].mlp.experts
    gate_up, down = experts_of(tmp_path / "coded")
    assert torch.equal(theirs.gate_up_proj.data, gate_up.bfloat16())
    assert torch.equal(theirs.down_proj.data, down.bfloat16())
    given, _ = experts_of(plain)
    assert 1e-3 < float((gate_up - given).norm() / given.norm()) < 0.02


@pytest.mark.skipif(VERSION < (5, 23), reason="the release that was measured")
def test_transformers_refuses_bytes_and_we_load_them(plain, tmp_path):  # noqa: F811
    """What `inspect` says of it. Decoded or as they are, they compute what its modules do with the numbers that compressed-tensors decompresses."""
    moeglot.convert(plain, f"{HUB}+int8-channel", tmp_path / "coded", allow_loss=True)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path / "coded")
    assert any("int-quantized" in finding.what for finding in moeglot.lint(moeglot.open(tmp_path / "coded"), sample=False))
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor

    theirs, coded = scheme(num_bits=8, type="int", strategy="channel"), load_file(tmp_path / "coded" / "model.safetensors")
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        state = {"weight": coded[name], "weight_scale": coded[f"{name}_scale"].float()}
        tensors[name] = IntQuantizationCompressor.decompress(state, theirs)["weight"]
    (tmp_path / "floats").mkdir()
    (tmp_path / "floats" / "config.json").write_text((plain / "config.json").read_text())
    save_file(tensors, tmp_path / "floats" / "model.safetensors", {"format": "pt"})
    right, given = (families.logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)) for folder in (tmp_path / "floats", plain))
    for native in (False, True):
        found = families.logits(moeglot.load(tmp_path / "coded", "float32", native=native))
        assert float((found - right).norm() / right.norm()) < 1e-5
    assert float((given - right).norm() / right.norm()) > 3e-4  # the power of it
    held = moeglot.load(tmp_path / "coded", native=True)
    assert sum(buffer.nbytes for name, buffer in held.named_buffers() if buffer.dtype == torch.int8) == sum(
        tensor.nbytes for tensor in coded.values() if tensor.dtype == torch.int8
    )


@pytest.mark.parametrize("sizes", [(4, 64, 64), (3, 128, 64)], ids=["square", "h=2i"])
@pytest.mark.parametrize(("symmetric", "container"), [(True, "bytes"), (True, "words"), (False, "bytes"), (False, "words")])
def test_a_folder_as_llm_compressor_writes_it(sizes, symmetric, container, tmp_path):
    """Mixtral's release in W8A8 with activations as they come, and in W8A16: read to what compressed-tensors decompresses, and back without a decode."""
    e, h, i = sizes
    source = write_checkpoint(tmp_path / "source", "mixtral/hub", {"e": e, "h": h, "i": i}, 1)
    tensors, truth = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if ".experts." in name]:
        parts, truth[name], (_, theirs, names) = compressed(tensors.pop(name).float(), (1, WHOLE), symmetric, container, torch.bfloat16)
        parts |= {"shape": parts["shape"].view(2)} if "shape" in parts else {}
        tensors |= {name.replace("weight", key): parts[part].contiguous() for key, part in names.items() if part in parts}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True} if container == "bytes" else None
    group = {"targets": ["Linear"], "weights": theirs.model_dump(mode="json")["weights"], "input_activations": inputs}
    said = {"quant_method": "compressed-tensors", "format": "int-quantized" if container == "bytes" else "pack-quantized", "config_groups": {"group_0": group}}
    said["ignore"] = ["lm_head", "re:.*self_attn.*", "re:.*gate$"]
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": said}
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    assert moeglot.verify(source).verdict == "holds"
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    for role, lazy in moeglot.open(source).experts(0).items():
        for n in range(e):
            assert torch.equal(lazy[n].decode(torch.float32), truth[f"model.layers.0.block_sparse_moe.experts.{n}.{names[role]}.weight"])
    other = "int8-pack" if container == "bytes" else "int8-channel"
    coding = moeglot.open(source).format.name.partition("+")[2]
    assert {coding, other} == {"int8-pack", "int8-channel"}
    plan = moeglot.plan(source, f"mixtral/transformers-5+{other}")
    assert all(step.moves_codes for step in plan.steps)
    moeglot.convert(source, plan.target.name, tmp_path / "there")
    assert moeglot.convert(tmp_path / "there", f"mixtral/hub+{coding}", tmp_path / "back").report.verdict == "holds"
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert moeglot.convert(source, f"mixtral/hub+{coding}", tmp_path / "same").report.verdict == "holds"
    assert json.loads((tmp_path / "same" / "config.json").read_text())["quantization_config"] == said  # what is said of activations, too

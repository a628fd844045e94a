"""NF4 and FP4 in files that bitsandbytes wrote: we decode them to its bits and encode them to its bytes, also where it is not installed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.identify import Identification
from moeglot.dtypes import DTYPES
from moeglot.encoding import agree
from moeglot.encodings.bnb4 import BNB4, names
from moeglot.errors import MoeglotError
from moeglot.family import Activation, Family
from moeglot.files.source import read_source
from moeglot.format import Format
from moeglot.layout import Stored

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("bitsandbytes-*.safetensors"))
CASES = [(path, key.removeprefix("given.")) for path in FILES for key in load_file(path) if key.startswith("given.")]
SAFETENSORS = {dtype.torch: dtype.name for dtype in DTYPES.values()}


def stored(path: Path, name: str) -> tuple[BNB4, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The encoding as the file's dtypes and shapes settle it, the parts of a tensor, and all tensors of the file."""
    tensors = load_file(path)
    kind = "nf4" if f"{name}.quant_state.bitsandbytes__nf4" in tensors else "fp4"
    parts = {part: tensors[name + suffix] for part, suffix in names(kind).items() if name + suffix in tensors}
    found = {part: (SAFETENSORS[tensor.dtype], tuple(tensor.shape)) for part, tensor in parts.items()}
    return BNB4(kind).as_stored(found), parts, tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_the_golden_files_are_there():
    assert [path.name.split("-", 2)[2] for path in FILES] == ["fp4.safetensors", "nf4-nested.safetensors", "nf4.safetensors", "stacked.safetensors"]
    assert all(path.stat().st_size < 50_000 for path in FILES)
    assert len(CASES) == 9


@pytest.mark.parametrize(("path", "name"), CASES)
def test_decodes_to_the_bits_of_the_library(path, name):
    encoding, parts, tensors = stored(path, name)
    decoded = tensors[f"decoded.{name}"]
    for part in encoding.parts:
        assert agree(part.shape(tuple(decoded.shape)), tuple(parts[part.name].shape)), part
    assert encoding.check(parts) is None
    ours = encoding.decode(parts, decoded.dtype)
    if encoding.kind == "fp4" and decoded.shape[1] % 2:  # its kernels decode code 8 to -0, its fallback for odd widths to +0
        ours, decoded = ours + 0.0, decoded + 0.0
    assert torch.equal(bits(ours), bits(decoded))
    assert torch.equal(encoding.decode(parts, torch.float32), decoded.float())


@pytest.mark.parametrize(("path", "name"), CASES)
def test_encodes_to_the_bytes_of_the_library(path, name):
    encoding, parts, tensors = stored(path, name)
    ours = replace(encoding, state_bytes=256).encode(tensors[f"given.{name}"])
    assert set(ours) == set(parts)
    for part, tensor in parts.items():
        if part == "state":
            assert bytes(ours[part].tolist()) == bytes(tensor.tolist()).ljust(256)
        else:
            assert torch.equal(bits(ours[part]), bits(tensor)), part


@pytest.mark.parametrize(("path", "name"), CASES)
def test_wrong_readings_are_seen(path, name):
    """The power of the tests above: each wrong reading is off by more than a tenth of the weights."""
    encoding, parts, tensors = stored(path, name)
    right = tensors[f"decoded.{name}"].float()
    wrongs = {"nibbles swapped": {**parts, "packed": (parts["packed"] >> 4) | (parts["packed"] << 4)}}
    if parts["scale"].numel() > 1:
        wrongs["the next block's absmax"] = {**parts, "scale": parts["scale"].roll(1)}
    for wrong, changed in wrongs.items():
        read = encoding.decode(changed, torch.float32)
        assert (read - right).norm() > 0.1 * right.norm(), wrong


FAMILY = Family("f", ("f",), ("gate", "up", "down"), Activation("swiglu"), {"e": ("e",), "h": ("h",), "i": ("i",)})
EXPERTS = "model.layers.{layer}.mlp.experts."
STACKED = Format(
    "f/stacked",
    FAMILY,
    (
        Stored(EXPERTS + "gate_up_proj", ("gate", "up"), "e (p i) h", BNB4(), names("nf4")),
        Stored(EXPERTS + "down_proj", ("down",), "e h i", BNB4(), names("nf4")),
    ),
    source="bitsandbytes.nn.parametrize.replace_parameter_4bit",
    about="one quant_state for all experts of a layer",
)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], form: Format, **sizes: int) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_hidden_layers": 1, ' + ", ".join(f'"{k}": {v}' for k, v in sizes.items()) + "}")
    return Checkpoint(read_source(folder, False), form, Identification(form, ("a test says so",), (), {}))


def test_an_expert_of_a_stacked_parameter_is_one_run_of_bytes(tmp_path):
    tensors = load_file(FILES[-1])
    decoded = {name: tensors.pop(f"decoded.model.layers.0.mlp.experts.{name}") for name in ("gate_up_proj", "down_proj")}
    found = checkpoint(tmp_path, tensors, STACKED, e=2, h=32, i=32)
    for line in STACKED.stored:
        for part in found.encoding(line, 0).parts:
            assert agree(line.part_shape(part, found.sizes), tuple(tensors[line.key_of(part, 0, None)].shape)), part
    experts = found.experts(0)
    assert torch.equal(experts["down"][1].decode(torch.bfloat16), decoded["down_proj"])
    gate, up = decoded["gate_up_proj"].chunk(2)
    assert torch.equal(experts["gate"][1].decode(torch.bfloat16), gate)
    assert torch.equal(experts["up"][1].decode(torch.bfloat16), up)
    assert not torch.equal(experts["down"][0].decode(torch.bfloat16), decoded["down_proj"])


def test_blocks_that_run_across_experts_are_refused():
    line = STACKED.stored[1]
    packed, scale = BNB4().parts[:2]
    assert line.part_shape(scale, {"e": 3, "h": 8, "i": 8}) == (3,)
    assert line.part_shape(packed, {"e": 3, "h": 6, "i": 6}) == (54, 1)
    with pytest.raises(MoeglotError, match="no whole number of scale blocks of 64"):
        line.part_shape(scale, {"e": 3, "h": 6, "i": 6})


def test_gate_and_up_interleaved_in_one_linear_an_expert(tmp_path):
    """`experts.gate_up_projs.0.weight`, as unsloth stores gpt-oss: one codebook and one quant_state for both projections."""
    name, new = "model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.experts.gate_up_projs.0.weight"
    tensors = load_file(next(path for path in FILES if path.name.endswith("-nf4.safetensors")))
    line = Stored(EXPERTS + "gate_up_projs.{expert}.weight", ("gate", "up"), "(i p) h", BNB4(), names("nf4"))
    form = Format("f/one", Family("f", ("f",), ("gate", "up"), Activation("swiglu"), FAMILY.sizes), (line,), source="", about="")
    found = checkpoint(tmp_path, {key.replace(name, new): t for key, t in tensors.items() if key.startswith(name)}, form, e=1, h=48, i=24)
    for part in found.encoding(line, 0).parts:
        assert agree(line.part_shape(part, found.sizes), tuple(tensors[name + line.names[part.name]].shape)), part
    experts, decoded = found.experts(0), tensors[f"decoded.{name}"]
    assert torch.equal(experts["gate"][0].decode(torch.bfloat16), decoded[::2])
    assert torch.equal(experts["up"][0].decode(torch.bfloat16), decoded[1::2])


def test_a_declared_shape_that_is_not_the_formats_is_refused(tmp_path):
    """A matrix [40, 55] whose config says [55, 40] has the same number of codes and absmax."""
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    tensors = load_file(FILES[0])
    form = Format(
        "f/linear",
        Family("f", ("f",), ("down",), Activation("swiglu"), FAMILY.sizes),
        (Stored(EXPERTS + "{expert}.down_proj.weight", ("down",), "h i", BNB4("fp4"), names("fp4")),),
        source="",
        about="",
    )
    kept = {key: tensor for key, tensor in tensors.items() if key.startswith(name)}
    for h, i in ((40, 55), (55, 40)):
        (folder := tmp_path / str(h)).mkdir()
        found = checkpoint(folder, kept, form, e=1, h=h, i=i).experts(0)["down"]
        if h == 40:
            assert torch.equal(found[0].decode(torch.bfloat16), tensors[f"decoded.{name}"])
        else:
            with pytest.raises(MoeglotError, match=r"declare a tensor of shape \[40, 55\], not \[55, 40\]"):
                found[0].decode(torch.bfloat16)

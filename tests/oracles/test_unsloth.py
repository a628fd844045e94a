"""unsloth's 4-bit gpt-oss: one Linear an expert, gate and up interleaved in its rows; real bitsandbytes codes each, and real transformers computes.

unsloth itself needs a GPU. Its layout is put together here by hand from a live model, and each matrix is coded by bitsandbytes' own function.
"""

import json

import pytest
import torch
from four_bits import dequantize
from reading import relative
from safetensors.torch import save_file
from small_models import SIZES, logits, model_of

import moeglot

bitsandbytes = pytest.importorskip("bitsandbytes", reason="installed in an environment of its own")
LIMIT = 1e-5


def as_unsloth_stores_it(live, folder):
    """Every expert's matrices as Linear modules (x @ W of the live model is W turned here), coded in NF4; and the model with what the codes decode to."""
    from bitsandbytes.functional import quantize_4bit

    found = {}
    with torch.no_grad():
        for name, tensor in live.state_dict().items():
            stem, _, last = name.rpartition(".")
            if ".experts." not in name:
                found[name.replace("mlp.router.", "mlp.router.linear.")] = tensor.clone()
                continue
            for expert, one in enumerate(tensor):
                module = f"{stem}.{last.removesuffix('_bias')}s.{expert}"
                if last.endswith("_bias"):
                    found[f"{module}.bias"] = one.clone()
                    continue
                codes, state = quantize_4bit(one.T.contiguous(), blocksize=64, quant_type="nf4")
                found[f"{module}.weight"] = codes
                found |= {f"{module}.weight.{part}": value for part, value in state.as_dict(packed=True).items()}
                tensor[expert] = dequantize(codes, state).T
    folder.mkdir()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    live.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    kept = ["router", "lm_head", "embed_tokens", "self_attn"]
    declared = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": kept}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))
    return live


@pytest.mark.parametrize("size", ["square", "h=2i"])
def test_what_bitsandbytes_codes_we_read(size, tmp_path):
    before = logits(model_of("gpt-oss", *SIZES[size]))
    live = as_unsloth_stores_it(model_of("gpt-oss", *SIZES[size]), tmp_path / "unsloth")
    expected = logits(live)
    assert relative(before, expected) > 1e-2  # the codes show, so it matters that they are decoded
    source = moeglot.open(tmp_path / "unsloth")
    assert source.format.name == "gpt-oss/unsloth+nf4"
    assert relative(logits(moeglot.load(tmp_path / "unsloth", "float32")), expected) <= LIMIT
    moeglot.convert(source, "gpt-oss/transformers", tmp_path / "float32", encode="float32")
    again = moeglot.convert(tmp_path / "float32", "gpt-oss/unsloth+nf4", tmp_path / "again")
    assert again.report.verdict == "holds"
    assert moeglot.compare(tmp_path / "again", source).verdict == "holds"

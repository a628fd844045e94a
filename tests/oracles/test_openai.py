"""openai's own gpt_oss: its loader reads the `original` folder that we write, and its Transformer computes what transformers does."""

import pytest
import torch

import moeglot
from moeglot.demo import BUNDLED

pytest.importorskip("gpt_oss.torch.model", reason="installed beside transformers 5.23 only")


@torch.no_grad()
def test_openai_reads_what_we_write(tmp_path):
    from gpt_oss.torch.model import Transformer
    from transformers import AutoModelForCausalLM

    assert moeglot.convert(BUNDLED, "gpt-oss/original", tmp_path / "original").report.verdict == "holds"
    theirs = Transformer.from_checkpoint(str(tmp_path / "original"), device="cpu")
    source = moeglot.open(BUNDLED)
    for layer in source.layers:
        experts = source.experts(layer)
        mlp = theirs.block[layer].mlp
        for expert in range(source.sizes["e"]):
            assert torch.equal(mlp.mlp1_weight[expert][0::2].float(), experts["gate"][expert].decode(torch.float32))
            assert torch.equal(mlp.mlp1_weight[expert][1::2].float(), experts["up"][expert].decode(torch.float32))
            assert torch.equal(mlp.mlp2_weight[expert].float(), experts["down"][expert].decode(torch.float32))
    tokens = torch.arange(0, 60, 3)
    reference = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()(input_ids=tokens[None]).logits[0]
    found = theirs.float()(tokens)
    error = float((found - reference).norm() / reference.norm())
    assert error <= 2e-4  # attention, rope and norms of two code bases; a turned or exchanged matrix is off by more than .1
    turned = theirs.block[0].mlp.mlp2_weight
    turned.copy_(turned.clone().mT)
    assert float((theirs(tokens) - reference).norm() / reference.norm()) > 0.1


def test_what_openai_releases_returns_from_the_hub_form(tmp_path):
    """original -> openai -> original, every byte, with a config that openai's dataclass takes as it is."""
    import json

    from gpt_oss.torch.model import ModelConfig

    moeglot.convert(BUNDLED, "gpt-oss/original", tmp_path / "a")
    moeglot.convert(tmp_path / "a", "gpt-oss/openai", tmp_path / "b")
    moeglot.convert(tmp_path / "b", "gpt-oss/original", tmp_path / "c")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config == json.loads((tmp_path / "c" / "config.json").read_text())
    assert ModelConfig(**config).num_experts == 8


def test_a_config_without_the_limit_means_the_default(tmp_path):
    """transformers 4.57 and 5.5 save configs that do not say swiglu_limit."""
    import json
    import shutil

    shutil.copytree(BUNDLED, tmp_path / "source")
    told = json.loads((tmp_path / "source" / "config.json").read_text())
    assert told.pop("swiglu_limit") == 7.0
    (tmp_path / "source" / "config.json").write_text(json.dumps(told))
    moeglot.convert(tmp_path / "source", "gpt-oss/original", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["swiglu_limit"] == 7.0
    assert moeglot.compare(tmp_path / "out", BUNDLED).verdict == "holds"

"""Megatron-Core as the second implementation: its own GPTModel loads what we wrote and computes transformers' logits, and what it saved we read bit by bit.

The model runs in a process of its own (`megatron_cpu.py`), on one process or on two with half of the experts each; keys that are missing are errors there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

import torch
from megatron_forks import run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moeglot
from moeglot.files.shards import tensor_bytes

LIMIT = 1e-5
SIZES = {"h=i": (64, 64), "h=2i": (64, 32), "neither": (96, 32)}
HUB = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/hub", "mixtral": "mixtral/hub", "deepseek-v3": "deepseek-v3/hub"}
CASES = [(family, size) for family in HUB for size in SIZES]
LAYOUTS = ("stacked", "numbered", "single")
MODELS = {"gpt-oss": GptOssForCausalLM, "qwen3-moe": Qwen3MoeForCausalLM, "mixtral": MixtralForCausalLM, "deepseek-v3": DeepseekV3ForCausalLM}
LATENT = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}
"""A first layer without experts, shared experts, groups of experts, and latent attention."""
WHOLE_QUERIES = {"q_lora_rank": None}
"""Latent attention that compresses keys and values alone, as Moonlight's does."""
VOCABULARY = 96


def hub_model(folder: Path, family: str, size: str, **more: int | None) -> Path:
    """A random model of that family, as transformers saves it in BF16. `more`: of its config."""
    hidden, inner = SIZES[size]
    torch.manual_seed(len(size))
    shared = {
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        **({} if family == "deepseek-v3" else {"head_dim": 16}),
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
        **(LATENT if family == "deepseek-v3" else {}),
        **more,
    }
    if family == "gpt-oss":
        config = GptOssConfig(**shared, intermediate_size=inner, num_local_experts=4, sliding_window=8)
    elif family == "deepseek-v3":
        config = DeepseekV3Config(**shared, moe_intermediate_size=inner, intermediate_size=80)
    elif family == "mixtral":
        config = MixtralConfig(**shared, intermediate_size=inner, num_local_experts=4)
    else:
        config = Qwen3MoeConfig(**shared, moe_intermediate_size=inner, num_experts=4, decoder_sparse_step=1, norm_topk_prob=True)
    model = MODELS[family](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) / 8 + (parameter.ndim == 1 and "norm" in name))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape) / 8)
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format=True)
    return folder


def hub_logits(folder: Path) -> torch.Tensor:
    """[2, 12, v] in float32, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12) * 7 % model.config.vocab_size).logits


def megatron(checkpoint: Path, *options: str | Path, processes: int = 1) -> torch.Tensor:
    """[2, 12, v] in float32, by Megatron's GPTModel."""
    return told(checkpoint, *options, processes=processes)[0]["logits"]


def told(checkpoint: Path, *options: str | Path, processes: int = 1) -> tuple[dict[str, torch.Tensor], list[dict[str, list[int]]]]:
    """What Megatron's GPTModel computes, [2, 12, v] in float32; and the name and shape of each tensor that a process has, for each process."""
    out = checkpoint.with_name(f"{checkpoint.name}-{processes}.logits")
    run([checkpoint, out, *options], processes, out.with_suffix(".told"))
    return load_file(out), [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in range(processes)]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def written(source: Path, family: str, out: Path, name: str = "megatron-torch-dist") -> Path:
    certificate = moeglot.convert(source, f"{family}/{name}", out)
    assert certificate.report.verdict == "holds"
    return out


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("family", "size"), CASES)
def test_megatron_computes_what_transformers_does(family: str, size: str, processes: int, tmp_path: Path) -> None:
    source = hub_model(tmp_path / "hub", family, size)
    out = written(source, family, tmp_path / "out")
    assert apart(megatron(out, "--te-names", processes=processes), hub_logits(source)) <= LIMIT


@pytest.mark.parametrize("processes", [1, 2])
def test_queries_that_are_not_compressed(processes: int, tmp_path: Path) -> None:
    source = hub_model(tmp_path / "hub", "deepseek-v3", "neither", **WHOLE_QUERIES)
    out = written(source, "deepseek-v3", tmp_path / "out")
    assert apart(megatron(out, "--te-names", processes=processes), hub_logits(source)) <= LIMIT


@pytest.mark.parametrize("size", SIZES)
def test_mxfp4_and_bf16_give_the_same_megatron_checkpoint(size: str, tmp_path: Path) -> None:
    moeglot.convert(hub_model(tmp_path / "hub", "gpt-oss", size), "gpt-oss/openai", tmp_path / "mxfp4", allow_loss=True)
    moeglot.convert(tmp_path / "mxfp4", "gpt-oss/transformers", tmp_path / "bf16")
    shutil.copytree(tmp_path / "bf16", tmp_path / "not turned", ignore=shutil.ignore_patterns("moeglot.json"))
    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, tmp_path / "not turned" / "model.safetensors", {"format": "pt"})
    one = written(tmp_path / "mxfp4", "gpt-oss", tmp_path / "one", "megatron-torch-dist-local")
    for given, form in (("bf16", "gpt-oss/transformers"), ("not turned", "gpt-oss/dequantized")):
        other = tmp_path / f"from {given}"
        assert moeglot.convert(tmp_path / given, "gpt-oss/megatron-torch-dist-local", other, format=form).report.verdict == "holds"
        assert [(one / file.name).read_bytes() == file.read_bytes() for file in sorted(other.glob("*.distcp"))] == [True]
    assert apart(megatron(one, processes=2), hub_logits(tmp_path / "bf16")) <= LIMIT
    certificate = moeglot.convert(one, "gpt-oss/openai", tmp_path / "back", encode="mxfp4")
    assert certificate.report.verdict == "holds"
    mine, theirs = moeglot.open(tmp_path / "back"), moeglot.open(tmp_path / "bf16")
    assert moeglot.compare(mine, theirs).verdict == "holds"


@pytest.mark.parametrize(("family", "layout"), [(family, layout) for family in HUB for layout in LAYOUTS if family != "deepseek-v3" or layout != "stacked"])
def test_what_megatron_saved_is_read_bit_by_bit(family: str, layout: str, tmp_path: Path) -> None:
    source = hub_model(tmp_path / "hub", family, "h=2i")
    options = ("--random", "--save", tmp_path / "saved", "--dump", tmp_path / "dump.safetensors", "--layout", layout)
    logits = megatron(source, *options)
    shutil.copy(source / "config.json", tmp_path / "saved")
    moeglot.convert(tmp_path / "saved", f"{family}/megatron", tmp_path / "states")
    states, dumped = moeglot.open(tmp_path / "states").source.entries, load_file(tmp_path / "dump.safetensors")
    assert states.keys() == dumped.keys()
    assert [name for name, tensor in dumped.items() if tensor_bytes(states[name].read()) != tensor_bytes(tensor)] == []
    moeglot.convert(tmp_path / "saved", HUB[family], tmp_path / "again")
    assert apart(hub_logits(tmp_path / "again"), logits) <= LIMIT


@pytest.mark.parametrize(("family", "size"), [("qwen3-moe", "h=i"), ("mixtral", "h=2i"), ("deepseek-v3", "neither")])
def test_the_legacy_grouped_mlp_computes_what_transformers_does(family: str, size: str, tmp_path: Path) -> None:
    """Its matrices lie in memory otherwise than their shapes say; what it saves as torch_dist is what SequentialMLP does."""
    source = hub_model(tmp_path / "hub", family, size)
    logits = hub_logits(source)
    states = written(source, family, tmp_path / "states", "megatron-grouped")
    assert apart(megatron(states, "--grouped", "--states"), logits) <= LIMIT
    stacked = written(source, family, tmp_path / "stacked", "megatron-torch-dist")
    (tmp_path / "dump").mkdir()
    own = megatron(stacked, "--grouped", "--te-names", "--save", tmp_path / "saved", "--dump", tmp_path / "dump" / "model.safetensors")
    assert apart(own, logits) <= LIMIT
    for folder in ("dump", "saved"):
        shutil.copy(source / "config.json", tmp_path / folder)
    moeglot.convert(tmp_path / "saved", f"{family}/megatron-grouped", tmp_path / "again")
    again, dumped = moeglot.open(tmp_path / "again").source.entries, load_file(tmp_path / "dump" / "model.safetensors")
    assert again.keys() == dumped.keys()
    assert [name for name, tensor in dumped.items() if tensor_bytes(again[name].read()) != tensor_bytes(tensor)] == []
    moeglot.convert(tmp_path / "dump", HUB[family], tmp_path / "hub again")
    assert apart(hub_logits(tmp_path / "hub again"), logits) <= LIMIT
    tensors = load_file(states / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight1")]:
        tensors[name] = torch.cat(list(tensors[name].view(-1, *tensors[name].shape[:1], 2 * SIZES[size][1])), 1)  # as its shape has one believe
    save_file(tensors, states / "model.safetensors", {"format": "pt"})
    assert apart(megatron(states, "--grouped", "--states"), logits) > 1000 * LIMIT


@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe"])
def test_gate_and_up_in_blocks_of_32_rows(family: str, tmp_path: Path) -> None:
    source = hub_model(tmp_path / "hub", family, "h=i")
    logits = hub_logits(source)
    out = written(source, family, tmp_path / "out", "megatron-torch-dist-glu32")
    assert apart(megatron(out, "--te-names", "--glu-blocks", "32"), logits) <= LIMIT
    assert apart(megatron(out, "--te-names"), logits) > 1000 * LIMIT
    assert apart(megatron(written(source, family, tmp_path / "halves"), "--te-names", "--glu-blocks", "32"), logits) > 1000 * LIMIT
    states = written(source, family, tmp_path / "states", "megatron-te-glu32")
    assert moeglot.compare(states, out).verdict == "holds"


def _swap_halves(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "gate_proj" in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _joined_not_grouped(tensors: dict[str, torch.Tensor]) -> None:
    """What becomes all queries, then all keys, then all values, once it is taken in groups of three queries, a key and a value."""
    for name in [name for name in tensors if "q_proj" in name]:
        names = [name.replace("q_proj", other) for other in ("q_proj", "k_proj", "v_proj")]
        groups = torch.cat([tensors[name] for name in names]).view(2, 5, 16, -1)
        for name, part in zip(names, (groups[:, :3], groups[:, 3:4], groups[:, 4:]), strict=True):
            tensors[name] = part.reshape(tensors[name].shape).clone()


@pytest.mark.parametrize("damage", [_swap_halves, _joined_not_grouped])
def test_the_comparison_can_fail(damage: object, tmp_path: Path) -> None:
    source = hub_model(tmp_path / "hub", "qwen3-moe", "h=2i")
    logits = hub_logits(source)
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert apart(megatron(written(source, "qwen3-moe", tmp_path / "out"), "--te-names"), logits) > 1000 * LIMIT


def test_a_missing_key_is_an_error_there(tmp_path: Path) -> None:
    """The layers of transformer-engine and the local ones ask for another name of one norm, so that the checkpoint of the ones is none of the others'."""
    out = written(hub_model(tmp_path / "hub", "qwen3-moe", "h=2i"), "qwen3-moe", tmp_path / "out", "megatron-torch-dist-local")
    with pytest.raises(AssertionError, match="pre_mlp_layernorm"):
        megatron(out, "--te-names")


def test_the_description_is_what_megatron_writes(tmp_path: Path) -> None:
    source = hub_model(tmp_path / "hub", "qwen3-moe", "h=2i")
    megatron(source, "--random", "--save", tmp_path / "saved")
    out = written(source, "qwen3-moe", tmp_path / "out", "megatron-torch-dist-local")
    assert json.loads((out / "metadata.json").read_text()) == json.loads((tmp_path / "saved" / "metadata.json").read_text())

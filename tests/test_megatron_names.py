"""What of a Megatron model has a name on the Hub, by family and config.json; what has none is refused by its own, in both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from divisions import HUB, model
from ranked import marks_of, read, write
from reading import written_by_torch
from safetensors.torch import load_file, save_file

import moeglot
from moeglot.errors import MoeglotError

SIZES = {"e": 4, "h": 64, "i": 64}
LAYERS = 2
QKV, PROJ, ROUTER = ("decoder.layers.self_attention.linear_qkv", "decoder.layers.self_attention.linear_proj", "decoder.layers.mlp.router")


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: model(tmp_path_factory.mktemp("names") / family, family, SIZES, LAYERS) for family in HUB}


@pytest.fixture(scope="module")
def dists(hubs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp("names") / family for family in HUB}
    for family, out in found.items():
        moeglot.convert(hubs[family], f"{family}/megatron-torch-dist", out / "dist")
    return {family: out / "dist" for family, out in found.items()}


def says(folder: Path, **more: Any) -> Path:
    """config.json with other facts."""
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | more))
    return folder


STRANGERS = {
    "qwen3-moe": {f"{ROUTER}.expert_bias": (4,), f"{ROUTER}.bias": (4,), f"{QKV}.bias": (128,), f"{PROJ}.bias": (64,)},
    "mixtral": {f"{ROUTER}.expert_bias": (4,), f"{ROUTER}.bias": (4,), f"{QKV}.bias": (128,), f"{PROJ}.bias": (64,)},
    "gpt-oss": {f"{ROUTER}.expert_bias": (4,), "decoder.layers.self_attention.q_layernorm.weight": (16,)},
    "deepseek-v3": {"decoder.layers.1.mlp.router.bias": (4,), "decoder.layers.1.self_attention.linear_proj.bias": (64,)},
}
"""Family -> key -> shape in a layer: what Megatron-Core saves of a model with `moe_router_enable_expert_bias`, `add_bias_linear` and the like, and no model of
this family on the Hub has."""


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, found in STRANGERS.items() for key in found])
def test_what_no_model_of_the_hub_has_is_refused_by_name(family: str, key: str, dists: dict[str, Path], tmp_path: Path) -> None:
    """transformers drops what it does not know, and the model computes something else."""
    shape, stacked = STRANGERS[family][key], ".layers." in key and not key.split(".layers.")[1][0].isdecimal()
    more = torch.randn(LAYERS, *shape) if stacked else torch.randn(shape)
    folder = written_by_torch(dists[family], tmp_path / "more", lambda found: found.update({key: more.bfloat16()}))
    with pytest.raises(moeglot.TensorMismatch, match=key.split(".")[-2] + r"\." + key.split(".")[-1]):
        moeglot.convert(folder, HUB[family], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_biases_of_attention_go_both_ways_where_config_json_says_that_there_are_some(hubs: dict[str, Path], tmp_path: Path) -> None:
    hub = shutil.copytree(hubs["qwen3-moe"], tmp_path / "hub")
    found = load_file(hub / "model.safetensors")
    rows = {"q": 64, "k": 32, "v": 32, "o": 64}
    found |= {f"model.layers.{layer}.self_attn.{x}_proj.bias": torch.randn(n).bfloat16() for layer in range(LAYERS) for x, n in rows.items()}
    save_file(found, hub / "model.safetensors", {"format": "pt"})
    with pytest.raises(moeglot.TensorMismatch, match=r"proj\.bias.*attention_bias = None"):
        moeglot.convert(hub, "qwen3-moe/megatron-torch-dist", tmp_path / "refused")
    moeglot.convert(says(hub, attention_bias=True), "qwen3-moe/megatron-torch-dist", tmp_path / "dist")
    moeglot.convert(tmp_path / "dist", "qwen3-moe/hub", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    with pytest.raises(moeglot.TensorMismatch, match=r"linear_(qkv|proj)\.bias.*attention_bias = False"):
        moeglot.convert(says(tmp_path / "dist", attention_bias=False), "qwen3-moe/hub", tmp_path / "out")


def test_a_score_that_the_hub_does_not_have_is_refused_on_the_way_there(hubs: dict[str, Path], tmp_path: Path) -> None:
    hub = shutil.copytree(hubs["qwen3-moe"], tmp_path / "hub")
    found = load_file(hub / "model.safetensors")
    save_file(found | {f"model.layers.{n}.mlp.gate.e_score_correction_bias": torch.zeros(4) for n in range(LAYERS)}, hub / "model.safetensors")
    with pytest.raises(moeglot.TensorMismatch, match=r"mlp\.gate\.e_score_correction_bias: qwen3-moe/megatron-te has no place for it"):
        moeglot.convert(hub, "qwen3-moe/megatron-te", tmp_path / "out")


# --- sizes of heads --------------------------------------------------------------------------------------------------------------------

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
"""Half as many heads as there are: the rows of queries, keys and values are as many, if each is twice as long."""


@pytest.mark.parametrize("length", [32, None])
@pytest.mark.parametrize("to", ["megatron-torch-dist", "megatron", "hub"])
def test_heads_are_as_long_as_their_norms(to: str, length: int | None, hubs: dict[str, Path], tmp_path: Path) -> None:
    """Without `head_dim`, it is hidden_size over the number of heads."""
    folder = shutil.copytree(hubs["qwen3-moe"], tmp_path / "hub")
    if to == "hub":
        moeglot.convert(folder, "qwen3-moe/megatron-torch-dist", tmp_path / "dist")
        folder = tmp_path / "dist"
    with pytest.raises(moeglot.TensorMismatch, match=rf"norm.weight: \[16\], and config.json says head_dim = {length}, .*heads = 2"):
        moeglot.convert(says(folder, head_dim=length, **HEADS), f"qwen3-moe/{to}", tmp_path / "out")


# --- of one process, without its mark --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["megatron", "megatron-te"])
@pytest.mark.parametrize("family", HUB)
def test_without_the_mark_it_is_told_where_the_mark_stands(family: str, name: str, hubs: dict[str, Path], tmp_path: Path) -> None:
    """Its experts are whole, so that what is no expert has to tell."""
    out = tmp_path / "rank"
    moeglot.convert(hubs[family], f"{family}/{name}", out, tp_rank=1, tp_size=2, etp_size=1)
    marks = marks_of(out)
    write(out, read(out), {key: value for key, value in marks.items() if key != "moeglot.share"})
    with pytest.raises(MoeglotError, match=r"where the safetensors header says moeglot\.share"):
        moeglot.convert(out, HUB[family], tmp_path / "back")

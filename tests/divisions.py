"""Divisions of a model among processes, as a job of Megatron-Core has them; and the state dict of one cut out of that of the whole, by Megatron's own rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot

Tensors = dict[str, torch.Tensor]
Division = dict[str, int]
HUB = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/hub", "mixtral": "mixtral/hub", "deepseek-v3": "deepseek-v3/hub"}
DIVISIONS: dict[str, Division] = {
    "ep": {"ep": 2},
    "tp": {"tp": 2, "etp": 1},
    "tp and ep": {"tp": 2, "etp": 1, "ep": 2},
    "etp": {"etp": 2},
    "tp and etp": {"tp": 2, "etp": 2},
    "pp": {"pp": 2},
    "all": {"tp": 2, "etp": 2, "pp": 2, "ep": 2},
    "all but etp": {"tp": 2, "etp": 1, "pp": 2, "ep": 4},
}
COLUMNS = r"self_attention\.linear_proj\.weight|mlp\.(shared_experts\.)?linear_fc2\.weight"
ROWS = (
    r"embedding\.word_embeddings\.weight|output_layer\.weight|.*self_attention\.(linear_qkv\.(weight|bias)|core_attention\.softmax_offset|"
    r"linear_(q|q_up|kv_up)_proj\.weight)"
)
LATENT_DOWN = r".*self_attention\.linear_(q|kv)_down_proj\.weight"


def processes(division: Division) -> int:
    """How many a job has at least."""
    sizes = {"tp": 1, "etp": 1, "pp": 1, "ep": 1} | division
    return max(sizes["tp"], sizes["etp"] * sizes["ep"]) * sizes["pp"]


def ranks(division: Division, process: int) -> dict[str, int]:
    """The place of a process, as `parallel_state.RankGenerator` orders them: first by tensor parallelism, at last by the stages of the pipeline."""
    sizes = {"tp": 1, "etp": 1, "pp": 1, "ep": 1} | division
    place = {"tp": process % sizes["tp"], "etp": process % sizes["etp"], "pp": process * sizes["pp"] // processes(division)}
    place["ep"] = process // sizes["etp"] % sizes["ep"]
    return {f"{kind}_{what}": numbers[kind] for kind in sizes for what, numbers in (("rank", place), ("size", sizes))}


def model(folder: Path, family: str, sizes: dict[str, int], layers: int = 4) -> Path:
    """A random checkpoint of the Hub's; of DeepSeek-V3, the first layer has no experts."""
    source = write_checkpoint(folder, HUB[family], sizes, layers)
    if family == "deepseek-v3":
        config = json.loads((source / "config.json").read_text()) | {"first_k_dense_replace": 1, "intermediate_size": 48}
        (source / "config.json").write_text(json.dumps(config))
        found = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if not name.startswith("model.layers.0.mlp.")}
        for name, shape in {"gate": (48, sizes["h"]), "up": (48, sizes["h"]), "down": (sizes["h"], 48)}.items():
            found[f"model.layers.0.mlp.{name}_proj.weight"] = torch.randn(shape).bfloat16()
        save_file(found, source / "model.safetensors", {"format": "pt"})
    return source


def divide(source: Path, name: str, division: Division, out: Path) -> Path:
    """A folder with the folders of all processes, as moeglot writes them."""
    for process in range(processes(division)):
        assert moeglot.convert(source, name, out / f"rank{process}", **ranks(division, process), workers=1).report.verdict == "holds"
    return out


def cut(whole: Tensors, name: str, place: dict[str, int], layers: int, experts: int, blocks: int = 0) -> Tensors:
    """What a process of Megatron-Core keeps of the state dict of a whole model: of a parameter the piece along its `partition_dim`, of the layers its stage,
    of the experts its own. `blocks`: how many rows of gate stand before as many of up in each expert, 0 for all.
    """
    found = {}
    for key, tensor in whole.items():
        tensor, here = _of_tensor_parallelism(key, tensor, name, place, experts, blocks), key
        if layer := re.match(r"decoder\.layers\.(\d+)\.", key):
            each = layers // place["pp_size"]
            if int(layer[1]) // each != place["pp_rank"]:
                continue
            here = key.replace(f".{layer[1]}.", f".{int(layer[1]) % each}.", 1)
        elif place["pp_rank"] != (0 if key.startswith("embedding") else place["pp_size"] - 1):
            continue
        if expert := re.search(r"local_experts\.(\d+)\.|linear_fc\d\.(?:weight|bias)(\d+)$", here):
            each, number = experts // place["ep_size"], int(expert[1] or expert[2])
            if number // each != place["ep_rank"]:
                continue
            start, end = expert.span(1 if expert[1] else 2)
            here = f"{here[:start]}{number % each}{here[end:]}"
        found[here] = tensor
    return found


def _of_tensor_parallelism(key: str, tensor: torch.Tensor, name: str, place: dict[str, int], experts: int, blocks: int) -> torch.Tensor:
    tp, etp, ep = ((place[f"{kind}_rank"], place[f"{kind}_size"]) for kind in ("tp", "etp", "ep"))
    if key.endswith("experts.weight1"):  # GroupedMLP: the numbers lie as [e, h, 2 i]
        inner = tensor.reshape(experts, tensor.shape[0], 2, -1).chunk(ep[1])[ep[0]].chunk(etp[1], -1)[etp[0]]
        return inner.reshape(tensor.shape[0], -1)
    if key.endswith("experts.weight2"):
        return tensor.reshape(experts, -1, tensor.shape[1]).chunk(ep[1])[ep[0]].chunk(etp[1], 1)[etp[0]].reshape(-1, tensor.shape[1])
    of_expert = "experts" in key and "shared_experts" not in key
    rank, size = etp if of_expert else tp
    if "linear_fc1.weight" in key:
        if blocks and of_expert:
            return tensor.chunk(size)[rank]
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if "linear_fc2.weight" in key or re.fullmatch(rf".*({COLUMNS})", key):
        return tensor.chunk(size, 1)[rank]
    local = not name.startswith("megatron-te")
    if re.fullmatch(ROWS, key) or (local and re.fullmatch(LATENT_DOWN, key)):
        return tensor.chunk(size)[rank]
    return tensor

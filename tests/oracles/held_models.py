"""Models whose experts stay encoded: which are tried, how they are made, and what a file of them holds, decoded by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import families
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

import moeglot
from moeglot.formats import FAMILIES
from moeglot.integrations.transformers import VERSION

CODINGS = (
    *("fp8-block", "fp8-channel", "fp8-tensor", "fp8-block-compressed", "mxfp4-pack", "nvfp4-pack", "nvfp4-modelopt", "int4-pack", "nf4", "fp4"),
    *("autofp8", "mxfp4-modelopt", "mxfp4-quark", "fp8-quark", "fp8-channel-quark"),
    *("int8-channel", "int8-pack", "int8-quark"),
)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes -> [..., 2 n], low nibble first."""
    packed = packed.view(torch.uint8).long()
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def spread(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """FP8's scales: one for all, one for each row, or one for each block of 128 × 128, the last of which may be short."""
    if scale.shape == (rows,):
        return scale.float()[:, None]
    if scale.ndim < 2 or scale.shape[-2:] == (rows, 1):
        return scale.float()
    return scale.float().repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]


def matrix(file: dict[str, torch.Tensor], key: str, shape: tuple[int, int]) -> torch.Tensor:
    """The float32 matrix that a file holds as KEY (…weight), from the names and dtypes of its parts."""
    if key in file and file[key].dtype in (torch.float32, torch.bfloat16):
        return file[key].float()
    if key + ".absmax" in file:  # bitsandbytes: high nibble first, runs of 64 over the flattened matrix
        codes = file[key].flatten().long()
        codes = torch.stack([codes >> 4, codes & 15], -1).flatten()
        return (file[key + ".quant_map"][codes] * absmax(file, key).repeat_interleave(64)[: codes.numel()]).view(shape)
    packed = file.get(key + "_packed", file.get(key))
    scale = file.get(key + "_scale", file.get(key + "_scale_inv"))
    if packed.dtype == torch.float8_e4m3fn:
        return packed.float() * spread(scale, *shape[-2:])
    if packed.dtype == torch.int8:
        return packed.float() * spread(scale, *shape[-2:])
    if packed.dtype == torch.int32 and packed.shape[-1] == shape[-1] // 4:  # four bytes, the lowest first, each 128 more than its number
        codes = torch.stack([(packed.long() >> 8 * n) & 255 for n in range(4)], -1).flatten(-2) - 128
        return codes * spread(scale, *shape[-2:])
    if packed.dtype == torch.int32:  # eight nibbles, the lowest first, each 8 more than its number
        codes = torch.stack([(packed.long() >> 4 * n) & 15 for n in range(8)], -1).flatten(-2) - 8
        return codes * scale.float().repeat_interleave(32, -1)
    if scale.dtype == torch.uint8:
        return E2M1[nibbles(packed)] * torch.exp2(scale.float() - 127).repeat_interleave(32, -1)
    both = scale.float() / file[key + "_global_scale"] if key + "_global_scale" in file else scale.float() * file[key + "_scale_2"]
    return E2M1[nibbles(packed)] * both.repeat_interleave(16, -1)


def absmax(file: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """Nested ones are codes themselves, in runs of 256, around an offset that stands in the quant_state."""
    scale = file[key + ".absmax"]
    if key + ".nested_absmax" not in file:
        return scale
    state = next(tensor for name, tensor in file.items() if name.startswith(key + ".quant_state"))
    nested = file[key + ".nested_quant_map"][scale.long()] * file[key + ".nested_absmax"].repeat_interleave(256)[: len(scale)]
    return nested + json.loads(bytes(state.tolist()))["nested_offset"]


NAMES = ("gpt-oss", "qwen3-moe", "mixtral", "deepseek-v3", "glm4-moe", "llama4-text", "qwen3-vl-moe", "nemotron-h", "gemma4-text")
LAYOUTS = {"gpt-oss": None, "llama4-text": None, "qwen3-vl-moe": "transformers-5", "gemma4-text": "hub"}
"""Family -> its layout with upright matrices that producers quantize; None where there is none, so that it is quantized on the way."""
TURNED = ("gpt-oss", "llama4-text", *(("qwen3-vl-moe",) if VERSION < (5, 0) else ()))
"""In the stock module, matrices lie [in, out]."""
EACH = re.compile(r"layers\.(\d+)\..*experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight(?:_packed)?$")
STACKED = re.compile(r"layers\.(\d+)\..*experts\.(gate_up_proj|down_proj|up_proj)(?:_packed|_blocks)?$")
ROLE = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def model_of(name: str, size: str) -> torch.nn.Module:
    """A tiny random model; skips what this version does not have."""
    family = next(family for family in FAMILIES if family.name == name)
    if family.model_types[0] not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have {name}")
    if why := families.why_not(family):
        pytest.skip(why)
    live = families.model_of(family, size)
    if live.can_generate():
        live.generation_config.do_sample = True  # else 4.57 finds the config's top_k strange
    return live


def decoded(file: dict[str, torch.Tensor], e: int, h: int, i: int) -> dict[int, dict[str, torch.Tensor]]:
    """layer -> role -> float32 [e, out, in], or gate_up [e, 2i, h] where they are one tensor, by the rules of the producers."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key in file:
        if match := EACH.search(key):
            layer, expert, role = int(match[1]), int(match[2]), ROLE[match[3]]
            shape = (h, i) if role == "down" else (i, h)
            found.setdefault(layer, {}).setdefault(role, torch.zeros(e, *shape))[expert] = matrix(file, key.removesuffix("_packed"), shape)
        elif match := STACKED.search(key):
            shape = {"gate_up_proj": (e, 2 * i, h), "up_proj": (e, i, h), "down_proj": (e, h, i)}[match[2]]
            base = key.removesuffix("_packed").removesuffix("_blocks")
            if key.endswith("_blocks"):
                file = {**file, base + "_packed": file[key].flatten(-2), base + "_scale": file[base + "_scales"]}
            found.setdefault(int(match[1]), {})[match[2].removesuffix("_proj")] = matrix(file | beside(file, base, shape), base, shape)
    return found


def beside(file: dict[str, torch.Tensor], base: str, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """The scales of a stacked tensor under the names that one matrix has; those of a whole matrix, one for gate and one for up, as one for each row."""
    found = {}
    for theirs, name in (("_weight_scale", "_scale"), ("_weight_scale_2", "_scale_2"), ("_global_scale", "_global_scale")):
        if (scale := file.get(base + theirs)) is not None:
            single = theirs != "_weight_scale" or scale.ndim < 3
            found[base + name] = scale.view(shape[0], -1).repeat_interleave(shape[1] * shape[0] // scale.numel(), 1).unsqueeze(-1) if single else scale
    return found


def experts_of(live: torch.nn.Module) -> dict[int, torch.nn.Module]:
    found = ((re.search(r"layers\.(\d+)\.", name), module) for name, module in live.named_modules() if name.endswith(".experts"))
    return {int(match[1]): module for match, module in found if match}


def overwritten(live: torch.nn.Module, name: str, file: dict[str, torch.Tensor], size: str) -> torch.nn.Module:
    """The stock model with the experts that a file holds."""
    experts, done = experts_of(live), 0
    with torch.no_grad():
        for layer, roles in decoded(file, *families.SIZES[size]).items():
            module = experts[layer]
            if isinstance(module, torch.nn.ModuleList):
                for expert, one in enumerate(module):
                    for part, parameter in one.named_parameters():
                        parameter.copy_(roles[ROLE[part.split(".")[0]]][expert])
            else:
                both = roles.get("gate_up", torch.cat([roles["gate"], roles["up"]], 1) if "gate" in roles else None)
                for part, given in (("gate_up_proj", both), ("up_proj", roles.get("up")), ("down_proj", roles["down"])):
                    if given is not None and hasattr(module, part):
                        getattr(module, part).copy_(given.mT if name in TURNED else given)
            done += 1
    assert done == len(experts)
    return live


def quantized(name: str, size: str, coding: str, folder: Path, encode: str | None = None) -> tuple[torch.nn.Module, Path]:
    """A random model and a folder with its experts in a coding; skips where no producer could have written that."""
    live, layout = model_of(name, size), LAYOUTS.get(name, "hub")
    families.saved(live, folder / "saved", layout == "hub" or VERSION < (5, 0))
    moeglot.convert(folder / "saved", f"{name}/{layout}+{coding}", folder / "out", encode=encode, allow_loss=True)
    return live, folder / "out"


def native_works(name: str) -> bool:
    return VERSION >= (5, 0) or name == "gpt-oss"


FORMS = {form.name for form in moeglot.formats()}
"""Not every producer has names for stacked experts."""

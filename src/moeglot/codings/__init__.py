"""The codings that we know: what each producer calls the parts of a quantized matrix, and how its quantization_config is read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from moeglot.codings.coding import JOINED, WEIGHT, Coding
from moeglot.codings.compressed import (
    FP8_BLOCK_COMPRESSED,
    FP8_CHANNEL,
    FP8_TENSOR,
    IGNORED,
    INT4_PACK,
    INT8_CHANNEL,
    INT8_GROUP,
    INT8_PACK,
    INT8_TENSOR,
    MXFP4_PACK,
    MXFP8,
    NVFP4_PACK,
)
from moeglot.codings.gptq import AUTO_ROUND_WORDS, AWQ_WORDS, GPTQ_WORDS
from moeglot.codings.hf_quant_config import algorithm_of
from moeglot.codings.quark import FP8_CHANNEL_QUARK, FP8_QUARK, INT8_CHANNEL_QUARK, INT8_QUARK, MXFP4_QUARK
from moeglot.codings.rules import Quantization, method
from moeglot.encoding import WHOLE, Encoding
from moeglot.encodings import bnb4
from moeglot.encodings.bnb4 import BNB4
from moeglot.encodings.fp8 import FP8, MX_GROUP
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.nvfp4 import NVFP4

DEEPSEEK_4 = "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash"
AUTOFP8 = "https://github.com/neuralmagic/AutoFP8/blob/main/auto_fp8/quantize.py"
DEEPSEEK = "https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md"
BITSANDBYTES = "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py"
MODELOPT = "https://github.com/NVIDIA/Model-Optimizer/blob/main/modelopt/torch/export/unified_export_hf.py"


# --- FP8 with block scales: DeepSeek, Qwen, MiniMax, GLM; transformers' FineGrainedFP8 -------------------------------------------------


def _read_fp8_block(said: Quantization, module: str) -> Encoding | None:
    if method(said) != "fp8" or (said.get("expert_dtype") == "fp4" and ".experts." in module):
        return None
    block = said.get("weight_block_size")
    if "weight_block_size" in said and block is None:
        return FP8((WHOLE, WHOLE))  # one scale for a matrix, as Mistral has it
    if not (isinstance(block, Sequence) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        return None  # without a word on the block: no size is taken from a shape
    return FP8((block[0], block[1]))


def _write_fp8_block(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, FP8)
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if encoding.carried else "dynamic",
        "weight_block_size": list(encoding.block) if all(encoding.block) else None,
        "modules_to_not_convert": list(kept),
    }


FP8_BLOCK = Coding(
    "fp8-block",
    FP8(),
    linear={"weight": ".weight", "scale": ".weight_scale_inv", "input_scale": ".activation_scale"},
    stacked={"weight": "", "scale": "_scale_inv", "input_scale": "_activation_scale"},
    read=_read_fp8_block,
    write=_write_fp8_block,
    source=DEEPSEEK,
    about="FP8 E4M3 with a scale for each block of 128 × 128",
    judges=("transformers",),
    kept="modules_to_not_convert",
    inputs=True,
)


FP8_SCALE = replace(
    FP8_BLOCK,
    name="fp8-block-scale",
    linear={"weight": ".weight", "scale": ".scale"},
    stacked={},
    source=DEEPSEEK_4,
    about="FP8 E4M3 in blocks, with `.scale`",
    inputs=False,
)
FP8_QSCALE = replace(
    FP8_BLOCK,
    name="fp8-qscale",
    linear={"weight": ".weight", "scale": ".qscale_weight", "input_scale": ".qscale_act"},
    stacked={},
    source="https://github.com/huggingface/transformers/blob/main/src/transformers/quantizers/quantizer_finegrained_fp8.py",
    about="FP8 E4M3 with `.qscale_weight`, Mistral's name",
)


def _read_mxfp8(said: Quantization, module: str) -> Encoding | None:
    other = said.get("moe_quant_algo") and ".experts." in f"{module}."  # MiniMax-M3.1 has its experts in another way
    groups = list(said.get("weight_block_size") or (1, MX_GROUP)) == [1, MX_GROUP]  # who says nothing of them means those of the name
    return FP8((1, MX_GROUP), "U8") if method(said) == "mxfp8" and groups and not other else None


def _write_mxfp8(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    declared = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, MX_GROUP], "scale_fmt": "ue8m0"}
    return {**declared, "ignored_layers": list(kept)}


MXFP8_MINIMAX = replace(
    FP8_BLOCK,
    name="mxfp8-minimax",
    encoding=FP8((1, MX_GROUP), "U8"),
    linear={"weight": ".weight", "scale": ".weight_scale_inv"},
    stacked={"weight": "", "scale": "_scale_inv"},
    inputs=False,
    read=_read_mxfp8,
    write=_write_mxfp8,
    source="https://huggingface.co/MiniMaxAI/MiniMax-M3-MXFP8",
    about="MXFP8 with `.weight_scale_inv`, MiniMax's name",
    kept="ignored_layers",
    spelled=True,
)
MXFP8_HUNYUAN = replace(
    MXFP8_MINIMAX,
    name="mxfp8-hunyuan",
    linear=FP8_CHANNEL.linear,
    stacked={"weight": "", "scale": "_scale"},
    source="https://huggingface.co/tencent/Hy4-preview",
    about="MXFP8 with `.weight_scale`, and `_scale` beside stacked experts, Tencent's names",
    judges=("compressed-tensors",),
)


def _read_autofp8(said: Quantization, module: str) -> Encoding | None:
    declared = method(said) == "fp8" and "weight_block_size" not in said and said.get("activation_scheme") in ("static", "dynamic")
    return FP8((WHOLE, WHOLE)) if declared else None


def _write_autofp8(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "static" if encoding.carried else "dynamic", "ignored_layers": list(kept)}


AUTOFP8_TENSOR = replace(
    FP8_TENSOR,
    name="autofp8",
    stacked={},
    read=_read_autofp8,
    write=_write_autofp8,
    source=AUTOFP8,
    about="AutoFP8's and vLLM's FP8 E4M3 with one scale for a matrix",
    judges=("compressed-tensors",),
    kept="ignored_layers",
)


def _read_deepseek_fp4(said: Quantization, module: str) -> Encoding | None:
    return MXFP4(container="int8") if method(said) == "fp8" and said.get("expert_dtype") == "fp4" else None


def _write_deepseek_fp4(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    return {**_write_fp8_block(FP8(), kept), "scale_fmt": "ue8m0", "expert_dtype": "fp4"}


DEEPSEEK_FP4 = Coding(
    "fp4-experts",
    MXFP4(container="int8"),
    linear={"packed": ".weight", "scale": ".scale"},
    stacked={},
    read=_read_deepseek_fp4,
    write=_write_deepseek_fp4,
    source=DEEPSEEK_4,
    about="DeepSeek-V4's MXFP4 in I8, beside FP8 with `.scale` for what is no routed expert",
    families=("deepseek-v4",),
    others=FP8_SCALE,
    judges=("transformers",),
)


# --- ModelOpt --------------------------------------------------------------------------------------------------------------------------


def _read_nvfp4_modelopt(said: Quantization, module: str) -> Encoding | None:
    return NVFP4("modelopt") if algorithm_of(said, module) in ("NVFP4", "W4A16_NVFP4") else None


def _write_nvfp4_modelopt(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    inputs = {"input_activations": weights} if encoding.carried else {}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {**inputs, "weights": weights, "targets": ["Linear"]}},
        "ignore": list(kept),
    }


NVFP4_MODELOPT = Coding(
    "nvfp4-modelopt",
    NVFP4("modelopt"),
    linear={"packed": ".weight", "scale": ".weight_scale", "global": ".weight_scale_2", "input_scale": ".input_scale"},
    stacked={"packed": "", "scale": "_weight_scale", "global": "_weight_scale_2", "input_scale": "_input_scale"},
    read=_read_nvfp4_modelopt,
    write=_write_nvfp4_modelopt,
    source=MODELOPT,
    about="ModelOpt's NVFP4, whose second scale multiplies",
    judges=("nvidia-modelopt",),
    kept=IGNORED,
    common=JOINED,
    inputs=True,
)


def _read_modelopt_fp8(encoding: FP8, algorithm: str, said: Quantization, module: str) -> Encoding | None:
    return encoding if algorithm_of(said, module) == algorithm else None


def _write_modelopt_fp8(algorithm: str, weights: Mapping[str, Any], encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    each = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {**({"input_activations": each} if encoding.carried else {}), "weights": {**each, **weights}, "targets": ["Linear"]}
    return {"quant_method": "modelopt", "quant_algo": algorithm, "config_groups": {"group_0": group}, "ignore": list(kept)}


def _modelopt_fp8(name: str, algorithm: str, encoding: FP8, weights: Mapping[str, Any], about: str) -> Coding:
    told, judges, inputs = f"ModelOpt's {about}", ("nvidia-modelopt",), encoding.block == (WHOLE, WHOLE)
    read, write = partial(_read_modelopt_fp8, encoding, algorithm), partial(_write_modelopt_fp8, algorithm, weights)
    return Coding(name, encoding, FP8_CHANNEL.linear, FP8_CHANNEL.stacked, read, write, MODELOPT, told, judges=judges, kept=IGNORED, inputs=inputs)


FP8_MODELOPT = _modelopt_fp8("fp8-modelopt", "FP8", FP8((WHOLE, WHOLE)), {}, "FP8 E4M3 with one scale for a matrix")
MXFP8_MODELOPT = _modelopt_fp8("mxfp8-modelopt", "MXFP8", FP8((1, MX_GROUP), "U8"), {"group_size": MX_GROUP}, "MXFP8")


def _read_mxfp4_modelopt(said: Quantization, module: str) -> Encoding | None:
    return MXFP4(container="packed") if algorithm_of(said, module) == "MXFP4" else None


def _write_mxfp4_modelopt(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "mxfp4", "ignore": list(kept)}


MXFP4_MODELOPT = replace(
    NVFP4_MODELOPT,
    name="mxfp4-modelopt",
    encoding=MXFP4(container="packed"),
    linear={"packed": ".weight", "scale": ".weight_scale"},
    stacked={},
    read=_read_mxfp4_modelopt,
    write=_write_mxfp4_modelopt,
    about="ModelOpt's MXFP4",
    inputs=False,
    spelled=True,
)


# --- bitsandbytes ----------------------------------------------------------------------------------------------------------------------


def _read_bitsandbytes(kind: bnb4.Kind, said: Quantization, module: str) -> Encoding | None:
    declared = "bitsandbytes" in method(said) and bool(said.get("load_in_4bit") or said.get("_load_in_4bit"))
    return BNB4(kind, nested=None) if declared and said.get("bnb_4bit_quant_type", "fp4") == kind else None


def _write_bitsandbytes(kind: bnb4.Kind, encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, BNB4)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": bool(encoding.nested),
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(kept),
    }


def _bitsandbytes(kind: bnb4.Kind) -> Coding:
    names, read, write = bnb4.names(kind), partial(_read_bitsandbytes, kind), partial(_write_bitsandbytes, kind)
    about = f"bitsandbytes' {kind.upper()}, in runs of the flattened matrix"
    linear, judges = {part: WEIGHT + suffix for part, suffix in names.items()}, ("bitsandbytes",)
    return Coding(kind, BNB4(kind, nested=None), linear, names, read, write, BITSANDBYTES, about, judges, kept="llm_int8_skip_modules")


NF4, FP4 = _bitsandbytes("nf4"), _bitsandbytes("fp4")

CODINGS = (
    *(FP8_BLOCK, FP8_SCALE, FP8_QSCALE, MXFP8_MINIMAX, MXFP8_HUNYUAN, AUTOFP8_TENSOR, DEEPSEEK_FP4),
    *(FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK_COMPRESSED, MXFP8, MXFP4_PACK, NVFP4_PACK, INT4_PACK),
    *(INT8_CHANNEL, INT8_TENSOR, INT8_GROUP, INT8_PACK),
    *(NVFP4_MODELOPT, FP8_MODELOPT, MXFP8_MODELOPT, MXFP4_MODELOPT),
    *(MXFP4_QUARK, FP8_QUARK, FP8_CHANNEL_QUARK, INT8_QUARK, INT8_CHANNEL_QUARK, NF4, FP4),
    *(GPTQ_WORDS, AUTO_ROUND_WORDS, AWQ_WORDS),
)
"""Every known way to quantize the matrices of a layout."""

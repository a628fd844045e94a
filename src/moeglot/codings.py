"""The codings that we know: what each producer calls the parts of a quantized matrix, and how its quantization_config is read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeglot.coding import WEIGHT, Coding, Quantization, compressed, declare_compressed, method
from moeglot.encoding import WHOLE, Encoding
from moeglot.encodings import bnb4
from moeglot.encodings.bnb4 import BNB4
from moeglot.encodings.fp8 import FP8

DEEPSEEK = "https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md"
COMPRESSED = "https://github.com/vllm-project/compressed-tensors"
BITSANDBYTES = "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py"
MODELOPT = "https://github.com/NVIDIA/Model-Optimizer/blob/main/modelopt/torch/export/unified_export_hf.py"


# --- FP8 with block scales: DeepSeek, Qwen, MiniMax, GLM; transformers' FineGrainedFP8 -------------------------------------------------


def _read_fp8_block(said: Quantization, module: str) -> Encoding | None:
    if method(said) != "fp8":
        return None
    block = said.get("weight_block_size")
    if not (isinstance(block, Sequence) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        return None  # per tensor, or without a word on the block: no size is taken from a shape
    return FP8((block[0], block[1]))


def _write_fp8_block(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, FP8)
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(encoding.block),
        "modules_to_not_convert": list(kept),
    }


FP8_BLOCK = Coding(
    "fp8-block",
    FP8(),
    linear={"weight": ".weight", "scale": ".weight_scale_inv"},
    stacked={"weight": "", "scale": "_scale_inv"},
    read=_read_fp8_block,
    write=_write_fp8_block,
    source=DEEPSEEK,
    about="FP8 E4M3 with a scale for each block of 128 × 128",
)


# --- compressed-tensors ----------------------------------------------------------------------------------------------------------------


def _compressed_fp8(name: str, strategy: str, default: tuple[int, int], about: str) -> Coding:
    def read(said: Quantization, module: str) -> Encoding | None:
        weights = compressed(said, module, num_bits=8, type="float", strategy=strategy)
        if not weights or weights.get("symmetric") is False:
            return None
        block = weights.get("block_structure") if strategy == "block" else default
        return FP8((block[0], block[1])) if isinstance(block, Sequence) and len(block) == 2 and all(isinstance(n, int) for n in block) else None

    def write(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
        assert isinstance(encoding, FP8)
        block = list(encoding.block) if strategy == "block" else None
        return declare_compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": block}, kept)

    linear = {"weight": ".weight", "scale": ".weight_scale", "input_scale": ".input_scale"}
    stacked = {"weight": "", "scale": "_weight_scale", "input_scale": "_input_scale"}
    return Coding(name, FP8(default), linear, stacked, read, write, COMPRESSED, f"compressed-tensors' float-quantized, FP8 E4M3 with {about}")


FP8_CHANNEL = _compressed_fp8("fp8-channel", "channel", (1, WHOLE), "a scale for each output channel")
FP8_TENSOR = _compressed_fp8("fp8-tensor", "tensor", (WHOLE, WHOLE), "one scale for a matrix")
FP8_BLOCK_COMPRESSED = _compressed_fp8("fp8-block-compressed", "block", (128, 128), "a scale for each block")


# --- bitsandbytes ----------------------------------------------------------------------------------------------------------------------


def _bitsandbytes(kind: bnb4.Kind) -> Coding:
    names = bnb4.names(kind)

    def read(said: Quantization, module: str) -> Encoding | None:
        declared = "bitsandbytes" in method(said) and bool(said.get("load_in_4bit") or said.get("_load_in_4bit"))
        return BNB4(kind) if declared and said.get("bnb_4bit_quant_type", "fp4") == kind else None

    def write(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
        assert isinstance(encoding, BNB4)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": encoding.nested,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(kept),
        }

    about = f"bitsandbytes' {kind.upper()}, in runs of the flattened matrix"
    return Coding(kind, BNB4(kind), {part: WEIGHT + suffix for part, suffix in names.items()}, names, read, write, BITSANDBYTES, about)


NF4, FP4 = _bitsandbytes("nf4"), _bitsandbytes("fp4")

CODINGS = (FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK_COMPRESSED, NF4, FP4)
"""What quantizes the Linear modules of any family."""

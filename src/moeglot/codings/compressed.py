"""How compressed-tensors keeps quantized matrices: FP8 by block, channel and tensor, MXFP8, MXFP4, NVFP4, INT4 and INT8, and what config.json says of each.

https://github.com/vllm-project/compressed-tensors (compressors; quantization/quant_config.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from moeglot.codings.coding import JOINED, Coding, compressed, declare_compressed, group_of
from moeglot.codings.rules import Quantization
from moeglot.encoding import WHOLE, Encoding
from moeglot.encodings.fp8 import FP8, MX_GROUP
from moeglot.encodings.int4 import INT4
from moeglot.encodings.int8 import INT8
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.nvfp4 import NVFP4

CT = ("compressed-tensors", "transformers")
IGNORED = "ignore"
COMPRESSED = "https://github.com/vllm-project/compressed-tensors"


def _read_fp8(strategy: str, default: tuple[int, int], said: Quantization, module: str) -> Encoding | None:
    weights = compressed(said, module, num_bits=8, type="float", strategy=strategy)
    if not weights or weights.get("symmetric") is False:
        return None
    block = weights.get("block_structure") if strategy == "block" else default
    return FP8((block[0], block[1])) if isinstance(block, Sequence) and len(block) == 2 and all(isinstance(n, int) for n in block) else None


def _write_fp8(strategy: str, encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, FP8)
    block = list(encoding.block) if strategy == "block" else None
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False} if encoding.carried else None
    return declare_compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": block}, kept, inputs)


def _compressed_fp8(name: str, strategy: str, default: tuple[int, int], about: str) -> Coding:
    linear = {"weight": ".weight", "scale": ".weight_scale", "input_scale": ".input_scale"}
    stacked = {"weight": "", "scale": "_weight_scale", "input_scale": "_input_scale"}
    return Coding(
        name,
        FP8(default),
        linear,
        stacked,
        partial(_read_fp8, strategy, default),
        partial(_write_fp8, strategy),
        COMPRESSED,
        f"compressed-tensors' float-quantized, FP8 E4M3 with {about}",
        CT if strategy != "block" else CT[:1],
        kept=IGNORED,
        inputs=strategy != "block",
    )


FP8_CHANNEL = _compressed_fp8("fp8-channel", "channel", (1, WHOLE), "a scale for each output channel")
FP8_TENSOR = _compressed_fp8("fp8-tensor", "tensor", (WHOLE, WHOLE), "one scale for a matrix")
FP8_BLOCK_COMPRESSED = _compressed_fp8("fp8-block-compressed", "block", (128, 128), "a scale for each block")


def _read_mxfp8(said: Quantization, module: str) -> Encoding | None:
    return FP8((1, MX_GROUP), "U8") if compressed(said, module, num_bits=8, type="float", strategy="group", group_size=MX_GROUP) else None


def _write_mxfp8(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": MX_GROUP, "scale_dtype": "torch.uint8"}
    return declare_compressed("mxfp8-quantized", weights, kept)


MXFP8 = replace(
    FP8_CHANNEL,
    name="mxfp8",
    encoding=FP8((1, MX_GROUP), "U8"),
    read=_read_mxfp8,
    write=_write_mxfp8,
    about="compressed-tensors' mxfp8-quantized, FP8 E4M3 with a power of two for each 32 numbers of a row",
    judges=CT[:1],
    inputs=False,
)


def _read_mxfp4(said: Quantization, module: str) -> Encoding | None:
    weights = compressed(said, module, num_bits=4, type="float", group_size=32)
    return MXFP4(container="packed") if weights else None


def _write_mxfp4(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    return declare_compressed("mxfp4-pack-quantized", weights, kept)


MXFP4_PACK = Coding(
    "mxfp4-pack",
    MXFP4("even", "even", container="packed"),
    linear={"packed": ".weight_packed", "scale": ".weight_scale"},
    stacked={"packed": "_packed", "scale": "_scale"},
    read=_read_mxfp4,
    write=_write_mxfp4,
    source=COMPRESSED,
    about="compressed-tensors' mxfp4-pack-quantized",
    judges=CT,
    kept=IGNORED,
)


def _read_nvfp4_compressed(said: Quantization, module: str) -> Encoding | None:
    weights = compressed(said, module, num_bits=4, type="float", group_size=16)
    return NVFP4("compressed-tensors") if weights and weights.get("strategy") == "tensor_group" else None


def _write_nvfp4_compressed(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    inputs = {**weights, "symmetric": True, "dynamic": "local"} if encoding.carried else None  # each group's scale as it comes, the global from the file
    return declare_compressed("nvfp4-pack-quantized", weights, kept, inputs)


NVFP4_PACK = Coding(
    "nvfp4-pack",
    NVFP4("compressed-tensors"),
    linear={"packed": ".weight_packed", "scale": ".weight_scale", "global": ".weight_global_scale", "input_scale": ".input_global_scale"},
    stacked={"packed": "_packed", "scale": "_scale", "global": "_global_scale", "input_scale": "_input_global_scale"},
    read=_read_nvfp4_compressed,
    write=_write_nvfp4_compressed,
    source=COMPRESSED,
    about="compressed-tensors' nvfp4-pack-quantized, whose global scale divides",
    judges=("compressed-tensors",),
    kept=IGNORED,
    common=JOINED,
    inputs=True,
)


# --- whole numbers ---------------------------------------------------------------------------------------------------------------------

WORDS, BYTES = ("pack-quantized",), ("int-quantized", "naive-quantized")


def _integers(said: Quantization, module: str, bits: int, others: Sequence[str]) -> tuple[tuple[int, int], bool] | None:
    """The numbers that share a scale and whether they are symmetric, unless the format is one of the `others`, in which such numbers lie otherwise."""
    weights = compressed(said, module, num_bits=bits, type="int")
    if not weights or ((group_of(said, module) or {}).get("format") or said.get("format")) in others:
        return None
    symmetric, group = weights.get("symmetric") is not False, weights.get("group_size")
    if weights.get("strategy") == "group":
        return ((1, group), symmetric) if isinstance(group, int) and group > 0 else None
    found = {"channel": (1, WHOLE), "tensor": (WHOLE, WHOLE)}.get(str(weights.get("strategy")))
    return (found, symmetric) if found and (symmetric or found != (WHOLE, WHOLE)) else None


def _strategy(block: tuple[int, int]) -> dict[str, Any]:
    return {"strategy": "tensor"} if block[0] == WHOLE else {"strategy": "group", "group_size": block[1]} if block[1] else {"strategy": "channel"}


def _read_int4(said: Quantization, module: str) -> Encoding | None:
    found = _integers(said, module, 4, BYTES)
    return INT4(found[0][1], zero=not found[1]) if found and found[0][0] else None


def _write_int4(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, INT4)
    return declare_compressed("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": not encoding.zero, **_strategy(encoding.block)}, kept)


INT4_PACK = Coding(
    "int4-pack",
    INT4(32),
    linear={part: f".weight_{part}" for part in ("packed", "scale", "shape", "zero_point")} | {"order": ".weight_g_idx"},
    stacked={part: f"_{part}" for part in ("packed", "scale", "shape", "zero_point")} | {"order": "_g_idx"},
    read=_read_int4,
    write=_write_int4,
    source=COMPRESSED,
    about="compressed-tensors' pack-quantized INT4, offset binary; Kimi-K2's group of 32",
    judges=CT,
    kept=IGNORED,
)


def _read_int8_words(said: Quantization, module: str) -> Encoding | None:
    found = _integers(said, module, 8, BYTES)
    return INT8(found[0], "words", found[1]) if found and found[0][0] else None


def _write_int8_words(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, INT8)
    return declare_compressed("pack-quantized", {"num_bits": 8, "type": "int", "symmetric": encoding.symmetric, **_strategy(encoding.block)}, kept)


INT8_PACK = replace(
    INT4_PACK,
    name="int8-pack",
    encoding=INT8(container="words"),
    read=_read_int8_words,
    write=_write_int8_words,
    about="compressed-tensors' pack-quantized INT8 (W8A16), offset binary, in channels or groups",
)


def _read_int8(shared: str, said: Quantization, module: str) -> Encoding | None:
    found = _integers(said, module, 8, WORDS)
    return INT8(found[0], symmetric=found[1]) if found and _strategy(found[0])["strategy"] == shared else None


def _write_int8(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    """Its activations are INT8 too: under the scale that the file has, or one for each token as it comes."""
    assert isinstance(encoding, INT8)
    how: dict[str, Any] = {"strategy": "tensor", "dynamic": False} if encoding.carried else {"strategy": "token", "dynamic": True}
    inputs = {"num_bits": 8, "type": "int", "symmetric": not any(part.name == "input_zero_point" for part in encoding.carried), **how}
    weights = {"num_bits": 8, "type": "int", "symmetric": encoding.symmetric, **_strategy(encoding.block)}
    return declare_compressed("int-quantized", weights, kept, inputs)


def _compressed_int8(shared: str, block: tuple[int, int], about: str) -> Coding:
    beside = {"scale": "weight_scale", "zero_point": "weight_zero_point", "input_scale": "input_scale", "input_zero_point": "input_zero_point"}
    linear = {"weight": ".weight", **{part: f".{name}" for part, name in beside.items()}, "order": ".weight_g_idx"}
    stacked = {"weight": "", **{part: f"_{name}" for part, name in beside.items()}, "order": "_weight_g_idx"}
    return Coding(
        f"int8-{shared}",
        INT8(block),
        linear,
        stacked,
        partial(_read_int8, shared),
        _write_int8,
        COMPRESSED,
        f"compressed-tensors' int-quantized INT8 (W8A8), in two's complement, with {about}",
        CT[:1],
        kept=IGNORED,
        inputs=True,
    )


INT8_CHANNEL = _compressed_int8("channel", (1, WHOLE), "a scale for each output channel")
INT8_TENSOR = _compressed_int8("tensor", (WHOLE, WHOLE), "one scale for a matrix")
INT8_GROUP = _compressed_int8("group", (1, 128), "a scale for each group of a row")

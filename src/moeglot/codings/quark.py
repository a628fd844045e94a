"""How AMD's Quark keeps quantized matrices: MXFP4, and FP8 and INT8 with one scale for a matrix or one for each channel, and what config.json says of each.

https://github.com/amd/quark (quark/torch/export: nn/modules/realquantizer.py, nn/modules/qparamslinear_builder.py; utils/pack.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from moeglot.codings.coding import Coding
from moeglot.codings.rules import Quantization, quark
from moeglot.encoding import WHOLE, Encoding
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.int8 import INT8
from moeglot.encodings.mxfp4 import MXFP4

SOURCE = "https://github.com/amd/quark"
AXES = {"per_tensor": (None,), "per_channel": (0,), "per_group": (-1, 1)}
"""`ch_axis` of a matrix [out, in] for each `qscheme` that we read."""


def _read(mine: Encoding, weight: Mapping[str, Any], said: Quantization, module: str) -> Encoding | None:
    declared, axes = quark(said, module, **weight), AXES[weight["qscheme"]]
    return mine if declared and (axes == (None,) or declared.get("ch_axis") in axes) else None


def _write(weight: Mapping[str, Any], beside: Mapping[str, Any], encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    unsaid = dict.fromkeys(("group_size", "symmetric", "scale_type", "scale_format"))
    arguments = {**unsaid, "ch_axis": AXES[weight["qscheme"]][0], "is_dynamic": False, "round_method": "half_even", **beside, **weight}
    inputs = {**unsaid, **FP8_QUARK_TENSOR, "ch_axis": None, "is_dynamic": False, "round_method": "half_even"} if encoding.carried else None
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {"weight": arguments, "input_tensors": inputs, "output_tensors": None, "bias": None, "target_device": None},
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "kv_cache_quant_config": {},
        "exclude": list(kept),
        "export": {"weight_format": "real_quantized", "pack_method": "reorder", "kv_cache_group": [], "min_kv_scale": 0.0, "weight_merge_groups": None},
    }


def _read_int8(mine: INT8, weight: Mapping[str, Any], said: Quantization, module: str) -> Encoding | None:
    declared = _read(mine, weight, said, module) and quark(said, module)
    symmetric = bool(declared and declared.get("symmetric") is True)
    return replace(mine, symmetric=symmetric) if declared and (symmetric or mine.block[0] == 1) else None


def _write_int8(weight: Mapping[str, Any], beside: Mapping[str, Any], encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, INT8)
    return _write(weight, {**beside, "symmetric": encoding.symmetric}, encoding.bare_of_carried, kept)


def _int8(name: str, encoding: INT8, scheme: str, observer: str, about: str) -> Coding:
    """There are zero points whatever it says; activations in INT8 have one too, which others' files do not."""
    weight = {"dtype": "int8", "qscheme": scheme}
    beside = {"observer_cls": observer, "scale_type": "float", "zero_point_type": "int32"}
    linear = {**E4M3, "zero_point": ".weight_zero_point", "input_zero_point": ".input_zero_point"}
    read, write = partial(_read_int8, encoding, weight), partial(_write_int8, weight, beside)
    return Coding(name, encoding, linear, {}, read, write, SOURCE, f"AMD Quark's {about}", judges=("amd-quark",), kept="exclude", spelled=True)


def _quark(name: str, encoding: Encoding, linear: Mapping[str, str], weight: Mapping[str, Any], beside: Mapping[str, Any], about: str) -> Coding:
    """`weight`: the arguments that say how a matrix is coded; `beside`: what Quark says beside these, how it chose the codes."""
    of_inputs = "input_scale" in linear
    judges = ("amd-quark",)
    read, write = partial(_read, encoding, weight), partial(_write, weight, beside)
    return Coding(name, encoding, linear, {}, read, write, SOURCE, f"AMD Quark's {about}", judges=judges, kept="exclude", inputs=of_inputs, spelled=True)


FP8_QUARK_TENSOR = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "observer_cls": "PerTensorMinMaxObserver", "symmetric": True}
E4M3 = {"weight": ".weight", "scale": ".weight_scale", "input_scale": ".input_scale"}
MXFP4_QUARK = _quark(
    "mxfp4-quark",
    MXFP4("even", "even", container="packed"),
    {"packed": ".weight", "scale": ".weight_scale", "input_scale": ".input_scale"},
    {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"},
    {"observer_cls": "PerBlockMXObserver", "scale_type": "float", "scale_calculation_mode": "even"},
    "MXFP4",
)
FP8_QUARK = _quark(
    "fp8-quark",
    FP8((WHOLE, WHOLE)),
    E4M3,
    {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
    {"observer_cls": "PerTensorMinMaxObserver", "symmetric": True},
    "FP8 E4M3 with one scale for a matrix",
)
FP8_CHANNEL_QUARK = _quark(
    "fp8-channel-quark",
    FP8((1, WHOLE), bare=True),
    E4M3,
    {"dtype": "fp8_e4m3", "qscheme": "per_channel"},
    {"observer_cls": "PerChannelMinMaxObserver", "symmetric": True},
    "FP8 E4M3 with a scale for each output channel, in a vector",
)
INT8_QUARK = _int8(
    "int8-quark", INT8((WHOLE, WHOLE), zeros=True), "per_tensor", "PerTensorMinMaxObserver", "symmetric INT8 with one scale and a zero point of 0 for a matrix"
)
INT8_CHANNEL_QUARK = _int8(
    "int8-channel-quark",
    INT8((1, WHOLE), zeros=True, bare=True),
    "per_channel",
    "PerChannelMinMaxObserver",
    "INT8 with a scale and a zero point for each output channel, in vectors",
)

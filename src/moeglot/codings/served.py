"""What quantization_config has a server do beside the weights: round activations under scales of calibration, and keep keys and values in FP8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moeglot.codings.coding import by_compressed_tensors, group_of
from moeglot.codings.hf_quant_config import algorithm_of
from moeglot.codings.rules import Quantization, method, quark_layer

_STATIC = ("FP8", "NVFP4")
"""ModelOpt's algorithms that round activations so."""
_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}
"""One scale for all keys of a layer and one for its values, from calibration."""
_WORDS = {"compressed-tensors": {"strategy": "tensor", "symmetric": True}, "modelopt": dict[str, Any]()}
"""Producers who say `kv_cache_scheme`, and what each adds to _CACHE."""
_SCALE = re.compile(r"\.(?:(?:q|k|v|kv|prob)_scale|[kv]_zero_point|[qkv]_proj\.output_scale)$")


def is_static(quantization: Quantization, module: str, alike: bool = True) -> bool:
    """Activations are rounded to the type of the weights under one scale for a matrix, which the file holds (of NVFP4, its second scale).
    `alike`: as here; else to whichever type, as Quark rounds them to FP8 beside weights in MXFP4.

    https://github.com/vllm-project/vllm/tree/main/vllm/model_executor/layers/quantization (fp8.py, modelopt.py, compressed_tensors, quark)
    """
    if method(quantization) == "fp8":
        return quantization.get("activation_scheme") == "static"
    if by_compressed_tensors(quantization):
        said = group_of(quantization, module) or {}
        inputs, weights = (one if isinstance(one := said.get(key), Mapping) else {} for key in ("input_activations", "weights"))
        alike = bool(inputs) and all(inputs.get(key) == weights.get(key) for key in ("num_bits", "type"))
        how = inputs.get("strategy") or "tensor", inputs.get("dynamic") or False
        return alike and how == (("tensor", False) if inputs.get("num_bits") == 8 else ("tensor_group", "local"))
    if method(quantization) == "quark":
        layer = quark_layer(quantization, module)
        said, weight = (one if isinstance(one := layer.get(key), Mapping) else {} for key in ("input_tensors", "weight"))
        known = {"qscheme": "per_tensor", "is_dynamic": False}
        fits = not alike or said.get("dtype") == weight.get("dtype")
        return fits and said.get("dtype") in ("fp8_e4m3", "int8") and all(said.get(key) == value for key, value in known.items())
    return algorithm_of(quantization, module) in _STATIC


def has_cache(quantization: Quantization) -> bool:
    """Keys and values are kept in fewer bits."""
    return bool(_cache(quantization))


def _cache(quantization: Quantization) -> Any:
    inner = quantization.get("quantization")
    said = {**quantization, **inner} if isinstance(inner, Mapping) else quantization
    return said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo") or said.get("kv_cache_quant_config")


def cache_scheme(quantization: Quantization, producer: str) -> Any:
    """The `kv_cache_scheme` with which a producer says what `quantization` says of keys and values; None if it says nothing, or he has no word for it."""
    said = _cache(quantization)
    if not said or producer not in _WORDS:
        return None
    if method(quantization) == producer and said == quantization.get("kv_cache_scheme"):
        return said
    usual = said in ("static", "FP8")  # AutoFP8's word and ModelOpt's
    if isinstance(said, Mapping):
        usual = all((said.get(key) or usually) == usually for key, usually in {**_CACHE, **_WORDS["compressed-tensors"]}.items())
    return {**_CACHE, **_WORDS[producer]} if usual else None


def is_of_cache(name: str) -> bool:
    """A scale of keys or values, by its name; ModelOpt, AutoFP8 and compressed-tensors each have their own."""
    return _SCALE.search(name) is not None

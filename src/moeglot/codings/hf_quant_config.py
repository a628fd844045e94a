"""hf_quant_config.json, in which ModelOpt says again what config.json says of the quantization, or, before its release .31, says it alone.

https://github.com/NVIDIA/Model-Optimizer/blob/main/modelopt/torch/export/convert_hf_config.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from moeglot.codings.coding import MODELOPT_FILE, WEIGHT, leaves_alone, names_in, said
from moeglot.codings.rules import Quantization, method
from moeglot.dtypes import WEIGHT_DTYPES
from moeglot.errors import Contradiction

_FP8, _FP4, _INT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float"}, {"num_bits": 4, "type": "int"}
_INT8, _CHANNEL = {"num_bits": 8, "type": "int"}, {"strategy": "channel"}
_GROUPS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any] | None, int]] = {
    "FP8": (_FP8, _FP8, 0),
    "FP8_PER_CHANNEL_PER_TOKEN": ({**_FP8, **_CHANNEL}, _FP8, 0),
    "NVFP4": (_FP4, {**_FP4, "group_size": 0}, 16),
    "W4A16_AWQ": (_INT4, None, 128),
    "W4A16_NVFP4": (_FP4, None, 16),
    "NVFP4_AWQ": (_FP4, {**_FP8, "group_size": 0}, 128),
    "W4A8_AWQ": (_FP4, {**_FP8, "group_size": 0}, 128),
    "W8A16": (_INT8, None, 0),
    "W8A8_SQ_PER_CHANNEL": ({**_INT8, **_CHANNEL}, _INT8, 0),
    "W4A8_NVFP4_FP8": (_FP4, _FP8, 16),
    "W4A8_MXFP4_FP8": (_FP4, _FP8, 16),
    "MXFP8": (_FP8, {**_FP8, "group_size": 0}, 32),
}
"""ModelOpt's name of an algorithm -> what it says of weights and of activations, and its usual group; a `group_size` of 0 is that of the weights."""
_WHOLE = ("FP8", "NVFP4", "W4A16_NVFP4")
"""Those of which it writes `config_groups` where all modules have one."""


class _Stored(Protocol):
    @property
    def dtype(self) -> str: ...


def told_beside(config: Mapping[str, Any], beside: Mapping[str, Any], tensors: Mapping[str, _Stored] | None = None) -> dict[str, Any]:
    """config.json, and where it says nothing of a quantization, what MODELOPT_FILE says, in the words that ModelOpt has for it in config.json.

    Raises `Contradiction` where both speak and do not agree; of lists of modules, where that makes a difference to some of the `tensors`.
    """
    if "quantization" not in beside:
        return dict(config)
    if not isinstance(details := beside["quantization"], Mapping):
        wrong = f"{MODELOPT_FILE} says quantization = {str(details)[:80]}"
        raise Contradiction(wrong, "it is an object there that names quant_algo", f"take {MODELOPT_FILE} from the checkpoint's producer, or remove it")
    declared = {**_translated(details), **({"producer": beside["producer"]} if beside.get("producer") else {}), "quant_method": "modelopt"}
    if not (here := said(config)):
        return {**config, "quantization_config": declared}
    for one, other in _differences(here, declared, tensors or {}):
        known = "ModelOpt writes both from one quantization, and some software reads the one and some the other"
        raise Contradiction(f"config.json says {one}, and {MODELOPT_FILE} {other}", known, "take both from the checkpoint's producer, or remove the stale one")
    return dict(config)


def algorithm_of(said: Quantization, module: str) -> str:
    """ModelOpt's name of what it did to a module; where that differs between modules, `quantized_layers` lists each."""
    if "modelopt" not in method(said):
        return ""
    said = {**said, **said["quantization"]} if isinstance(said.get("quantization"), Mapping) else said
    layers = said.get("quantized_layers") if str(said.get("quant_algo")).upper() == "MIXED_PRECISION" else None
    if layers:
        said = next((layer for name, layer in layers.items() if f"{module}.".startswith(f"{name}.") and isinstance(layer, Mapping)), {})
    return str(said.get("quant_algo") or "").upper()


def _translated(details: Quantization) -> dict[str, Any]:
    """As `convert_hf_quant_config_format` has it."""
    algorithm, layers, found = details.get("quant_algo"), details.get("quantized_layers"), dict[str, Any]()
    if algorithm in _WHOLE:
        found["config_groups"] = {"group_0": {**_group(algorithm, details.get("group_size")), "targets": ["Linear"]}}
    elif algorithm == "MIXED_PRECISION" and isinstance(layers, Mapping):
        alike: dict[tuple[Any, Any], list[str]] = {}
        for name, layer in layers.items():
            how = layer if isinstance(layer, Mapping) else {}
            alike.setdefault((how.get("quant_algo"), how.get("group_size")), []).append(name)
        found["config_groups"] = {f"group_{n}": {**_group(*how), "targets": sorted(names)} for n, (how, names) in enumerate(alike.items())}
        found["quantized_layers"] = layers
    found["ignore"] = details.get("exclude_modules") or []
    if algorithm:
        found["quant_algo"] = algorithm
    if cache := details.get("kv_cache_quant_algo"):
        found["kv_cache_scheme"] = {"dynamic": False, **_FP8} if cache == "FP8" else cache
    return found


def _group(algorithm: Any, size: int | None) -> dict[str, Any]:
    if algorithm not in _GROUPS:
        return {"quant_algo": algorithm}
    weights, inputs, usual = _GROUPS[algorithm]
    group = {"group_size": size or usual} if usual else {}
    found = {"weights": {"dynamic": False, **weights, **group}}
    return found if inputs is None else {"input_activations": {"dynamic": False, **inputs, **(group if "group_size" in inputs else {})}, **found}


def _differences(here: Quantization, there: Quantization, tensors: Mapping[str, _Stored]) -> Iterator[tuple[str, str]]:
    """What config.json says, and what the file beside it says instead."""
    mine, theirs = ({**one, **inner} if isinstance(inner := one.get("quantization"), Mapping) else one for one in (here, there))
    if "modelopt" not in method(mine):
        yield f"quant_method = {mine.get('quant_method')}", f"quant_algo = {theirs.get('quant_algo')}, which is ModelOpt's"
        return
    if mine.get("quant_algo") and str(mine["quant_algo"]).upper() != str(theirs.get("quant_algo")).upper():
        yield f"quant_algo = {mine['quant_algo']}", f"{theirs.get('quant_algo')}"
    layers = [one.get("quantized_layers") for one in (mine, theirs)]
    if None not in layers and layers[0] != layers[1]:
        yield "one thing of quantized_layers", "another"
    if module := _unlike(_left_alone(mine), _left_alone(theirs), tensors):
        name, alone = module
        yield f"that {name} is {'left alone' if alone else 'quantized'}", f"that it is {'quantized' if alone else 'left alone'}"


def _left_alone(quantization: Quantization) -> frozenset[str]:
    return frozenset(name for key in ("ignore", "exclude_modules") for name in names_in(quantization, key))


def _unlike(mine: frozenset[str], theirs: frozenset[str], tensors: Mapping[str, _Stored]) -> tuple[str, bool] | None:
    """A module that one of two lists names and the other does not, by whichever pattern, and whether that is the first.

    Only kinds of modules of which some are quantized are looked at: an embedding or a router is in some lists and in others not, and never quantized.
    """
    if mine == theirs:
        return None
    modules = [name.removesuffix(WEIGHT) for name in tensors if name.endswith(WEIGHT)]
    kinds = {name[name.rfind(".") + 1 :] for name in modules if tensors[name + WEIGHT].dtype not in WEIGHT_DTYPES}
    both, *each = ({"ignore": sorted(names)} for names in (mine & theirs, mine - theirs, theirs - mine))
    for name in modules:
        here, there = (name[name.rfind(".") + 1 :] in kinds and leaves_alone(one, name) for one in each)
        if here != there and not leaves_alone(both, name):
            return name, here
    return None

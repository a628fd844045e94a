"""What the quantization_config of GPTQ, AWQ, AutoRound and Quark says of one module: settings of all, and rules that name modules by patterns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from moeglot.errors import Contradiction

Quantization = Mapping[str, Any]
"""config.json's quantization_config."""


def method(quantization: Quantization) -> str:
    """The name of the library that quantization_config is for."""
    return str(quantization.get("quant_method") or "").lower()


def mapping(said: object) -> Mapping[str, Any]:
    return said if isinstance(said, Mapping) else {}


# --- GPTQ, AWQ and AutoRound -------------------------------------------------------------------------------------------------------------
# https://github.com/ModelCloud/GPTQModel (gptqmodel/quantization/config.py: dynamic_get); https://github.com/intel/auto-round (inference/convert_model.py)

AUTO_ROUND = ("auto-round", "intel/auto-round")


def packing(quantization: Quantization) -> str:
    """Whose layout AutoRound packed into: "auto_gptq", "gptqmodel", "auto_awq", "llm_compressor", "fp8"; "" where it says nothing that we know."""
    if method(quantization) not in AUTO_ROUND:
        return ""
    name = str(quantization.get("packing_format") or "")
    return "gptqmodel" if name == "auto_round" else name.removeprefix("auto_round:")  # its own layout is that of GPTQModel


def settings(quantization: Quantization, module: str) -> Mapping[str, Any]:
    """bits, group_size, sym and so on of a module: those of all, under what the first rule that names it says otherwise."""
    return {**quantization, **(_rule(quantization, module) or {})}


LAID = ("checkpoint_format", "format", "version")
"""Keys under which GPTQModel, transformers and AutoAWQ say how words are laid out. Each reads some of them, and not in one order."""


def laid(said: Mapping[str, Any], usual: str) -> str:
    """What they say, in lower case, `usual` if none does; raises `Contradiction` where they do not agree."""
    told = {key: str(said[key]).lower() for key in LAID if said.get(key) and (key != "version" or method(said) == "awq")}
    if len(set(told.values())) > 1:
        wrong = "quantization_config says " + " and ".join(f"{key} = {value}" for key, value in told.items())
        known = "they mean the same; GPTQModel goes by format, SGLang and transformers by checkpoint_format or version"
        raise Contradiction(wrong, known, "take config.json from the checkpoint's producer")
    return next(iter(told.values()), usual)


def spared(quantization: Quantization, module: str) -> bool:
    """A rule, or a list of blocks or of modules in them, says that this module stays as it is."""
    rule = _rule(quantization, module)
    if rule is None and (blocks := _blocks(quantization)) and not any(f"{module}.".startswith(f"{block}.") for block in blocks):
        return True
    if method(quantization) == "gptq" and (inner := _flat(quantization.get("modules_in_block_to_quantize"))):
        return not module.endswith(tuple(inner))
    return rule is not None and (rule.get("spared") is True or _wide(rule))


def _wide(rule: Mapping[str, Any]) -> bool:
    """16 bits and more are none that are packed."""
    return isinstance(bits := rule.get("bits"), int) and bits >= 16


def _rule(quantization: Quantization, module: str) -> Mapping[str, Any] | None:
    """What the first rule says that names a module; None if none does."""
    if method(quantization) in ("gptq", "awq"):
        for pattern, rule in mapping(quantization.get("dynamic")).items():
            if _matches(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, module, re.match):
                return {"spared": True} if pattern.startswith("-:") else mapping(rule)
        return None
    if method(quantization) not in AUTO_ROUND:
        return None
    rules = mapping(quantization.get("extra_config"))
    if module in rules:
        return mapping(rules[module])
    return next((mapping(rule) for pattern, rule in rules.items() if rule and _matches(pattern, module, re.search)), None)


def _matches(pattern: str, module: str, how: Any) -> bool:
    try:
        return how(pattern, module) is not None
    except re.error as error:
        wrong = f"quantization_config names modules by {pattern!r}, which is no regular expression"
        raise Contradiction(wrong, str(error), "take config.json from the checkpoint's producer") from error


_LITERAL = re.compile(r"(?:[\w.-]|\\\W)*(?![*+?{])")
"""What a pattern begins with that stands for itself. A dot of a name is one, escaped or not."""


def telling_apart(quantization: Quantization, holder: str) -> Quantization | None:
    """The same with those rules alone that may name a module below `holder`; None where none of them has a number, so that it says the same of all experts."""
    key = "extra_config" if method(quantization) in AUTO_ROUND else "dynamic"
    if method(quantization) not in ("gptq", "awq", *AUTO_ROUND):
        return None
    rules = {pattern: rule for pattern, rule in mapping(quantization.get(key)).items() if _may_name(pattern, holder)}
    return {**quantization, key: rules} if any(re.search(r"[\d\[]|\\d", pattern) for pattern in rules) else None


def _may_name(pattern: str, holder: str) -> bool:
    """False only where the names that it stands for begin otherwise."""
    pattern = pattern[2:] if pattern[:2] in ("+:", "-:") else pattern
    found = _LITERAL.match(pattern)
    literal = found[0].replace("\\", "") if found else ""
    first = holder.partition(".")[0] + "."
    return "|" in pattern or not literal.startswith(first) or f"{holder}.".startswith(literal) or literal.startswith(holder)


def _blocks(quantization: Quantization) -> Sequence[str]:
    """What the names of all modules begin with that AutoRound quantized."""
    if method(quantization) not in AUTO_ROUND:
        return ()
    said = quantization.get("block_name_to_quantize") or quantization.get("to_quant_block_names")
    return said.split(",") if isinstance(said, str) else _flat(said)


def _flat(said: object) -> list[str]:
    return [said] if isinstance(said, str) else [name for one in said for name in _flat(one)] if isinstance(said, list | tuple) else []


def sparing(quantization: Quantization, key: str, modules: Sequence[str]) -> dict[str, Any]:
    """The same, and under `key`, or where its library looks instead, that these modules stay as they are too."""
    if method(quantization) == "gptq":
        return {**quantization, "dynamic": {**skipped(modules), **mapping(quantization.get("dynamic"))}}  # the first that names a module counts
    if method(quantization) in AUTO_ROUND:
        return {**quantization, "extra_config": {**mapping(quantization.get("extra_config")), **sixteen(modules)}}
    if method(quantization) == "awq":
        quantization = {**quantization, "dynamic": {**skipped(modules), **mapping(quantization.get("dynamic"))}}
    return {**quantization, key: [*(quantization.get(key) or ()), *modules]}


def skipped(modules: Sequence[str]) -> dict[str, Any]:
    """GPTQModel's rules for modules that stay as they are, with all that they hold."""
    return {rf"-:{re.escape(module)}(\..*)?$": {} for module in modules}


def sixteen(modules: Sequence[str]) -> dict[str, Any]:
    """AutoRound's."""
    return {module: {"bits": 16, "data_type": "float"} for module in modules}


def told_by_rules(quantization: Quantization, module: str) -> Iterator[tuple[str, Any]]:
    """What GPTQ, AWQ or AutoRound say of a module that decides how it is decoded."""
    if method(quantization) in ("gptq", "awq", *AUTO_ROUND):
        found = settings(quantization, module)
        keys = ("bits", "w_bit", "group_size", "q_group_size", "sym", "zero_point", "desc_act", *LAID, "pack_dtype", "backend", "packing_format", "data_type")
        yield from ((key, found[key]) for key in keys if found.get(key) is not None)


ROTATIONS = ("rotation_config", "spinquant_config", "rotation")


def rotated(quantization: Quantization) -> str | None:
    """Which key says that inputs of matrices are rotated as the model computes: AutoRound's, for any packing, or GPTQModel's; None if none does.

    https://github.com/intel/auto-round (inference/convert_model.py); https://github.com/ModelCloud/GPTQModel (gptqmodel/models/loader.py)
    """
    told = ((key, quantization[key]) for key in ROTATIONS if quantization.get(key))
    return next((f"quantization_config in config.json says {key} = {str(value)[:80]}" for key, value in told), None)


# --- AMD Quark ---------------------------------------------------------------------------------------------------------------------------
# https://github.com/amd/quark (quark/torch/quantization/config/config.py; export/main_export/quant_config_parser.py)


def quark(quantization: Quantization, module: str, **expected: Any) -> Mapping[str, Any] | None:
    """The `weight` arguments that Quark declares for a module, if they are what is expected and the file holds codes; of two levels, there are none."""
    if method(quantization) != "quark" or _quark_export(quantization).get("weight_format", "real_quantized") != "real_quantized":
        return None
    weight = quark_layer(quantization, module).get("weight")
    return weight if isinstance(weight, Mapping) and all(weight.get(key) == value for key, value in expected.items()) else None


def _quark_export(quantization: Quantization) -> Mapping[str, Any]:
    return mapping(quantization.get("export"))


def quark_layer(quantization: Quantization, module: str) -> Mapping[str, Any]:
    """What it says of a module: under the first pattern that names it, else of its class, else of all."""
    for pattern, said in mapping(quantization.get("layer_quant_config")).items():
        if fnmatchcase(module, pattern):
            return mapping(said)
    return mapping(mapping(quantization.get("layer_type_quant_config")).get("Linear") or quantization.get("global_quant_config"))


def quark_briefly(quantization: Quantization, module: str = "") -> dict[str, Any]:
    """How it codes the weights of a module; by default, of those that it does not tell apart."""
    weight = quark_layer(quantization, module).get("weight")
    keys = ("dtype", "qscheme", "group_size", "scale_format", "mx_element_dtype")
    levels = [{key: level[key] for key in keys if level.get(key) is not None} for level in (weight if isinstance(weight, list) else [mapping(weight)])]
    held = _quark_export(quantization).get("weight_format", "real_quantized")
    return {"weight": levels if len(levels) > 1 else levels[0]} | ({} if held == "real_quantized" else {"weight_format": held})


def quark_online(quantization: Quantization) -> str | None:
    """Rotations before a matrix, and branches beside it; R1 and R2 lie in the weights, R3 turns queries and keys alike."""
    algorithms = quantization.get("algo_config") or ()
    for said in map(mapping, algorithms if isinstance(algorithms, list) else [algorithms]):
        online = [key for key, usual in (("r4", True), ("online_r1_rotation", False)) if said.get(key, usual)]
        if mapping(said.get("online_config")).get("online_rotation_layers"):
            online.append("online_rotation_layers")
        if said.get("name") in ("rotation", "quarot") and online:
            return f"algo_config in config.json says {said['name']} with {' and '.join(online)}"
        if said.get("name") == "svdquant":
            return "algo_config in config.json says svdquant, whose branches of low rank stand beside the matrices"
    return None

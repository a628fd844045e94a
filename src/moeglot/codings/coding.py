"""Coding: how a producer keeps quantized matrices: their encoding, what it adds to each key, and what config.json says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any

from moeglot.axes import written
from moeglot.codings.rules import Quantization, method, quark_briefly, quark_layer, quark_online, rotated, spared, told_by_rules
from moeglot.encoding import Encoding
from moeglot.errors import Contradiction
from moeglot.layout import SECOND, Stored

WEIGHT = ".weight"
JOINED = ("gate", "up")
"""What vLLM and TensorRT-LLM make one matrix of."""

MODELOPT_FILE = "hf_quant_config.json"
"""Which file says it beside config.json, or alone: `hf_quant_config` reads it."""
SAID_AGAIN = (MODELOPT_FILE, "quantize_config.json", "quantization_config.json", "quant_config.json")
"""ModelOpt's, GPTQ's, AutoRound's and AWQ's; of no use beside matrices that are quantized no more, or otherwise."""


@dataclass(frozen=True)
class Coding:
    """One producer's way to quantize the matrices of any layout.

    `linear`: part -> what takes the place of `.weight` in a key; `stacked`: part -> what follows a key that does not end so.
    `read(quantization_config, module)` -> the encoding that it declares for a module, None if it declares none of this kind.
    `write(encoding, kept)` -> quantization_config, where `kept` are the modules that stay as they are; an encoding that carries the scale of activations has
    them rounded under it.
    """

    name: str
    encoding: Encoding
    linear: Mapping[str, str]
    stacked: Mapping[str, str]
    read: Callable[[Quantization, str], Encoding | None] = field(compare=False)
    write: Callable[[Encoding, Sequence[str]], dict[str, Any]] = field(compare=False)
    source: str = ""
    about: str = ""
    judges: tuple[str, ...] = ()
    """Packages whose own code decodes what we encode in the tests, and whose output we decode."""
    families: tuple[str, ...] = ()
    """The only families whose experts are coded so, if there are such."""
    others: Coding | None = None
    """How the same producer codes matrices that are no routed experts, if otherwise."""
    kept: str = ""
    """The key of quantization_config that lists modules which stay as they are, if it has one."""
    common: tuple[str, ...] = ()
    """The roles of an expert that servers join to one matrix, and for which they then take what one of them has one of."""
    turned: bool = False
    """The matrices lie [in, out], each in tensors of its own."""
    inputs: bool = False
    """`write` can say that activations are rounded under one scale for a matrix, which the encoding carries."""
    spelled: bool = False
    """Meant by its own name alone: where several store an encoding, `--encode` means another."""

    def codes(self, family: str, lines: Sequence[Stored]) -> bool:
        """It can code a plain layout of this family: every matrix lies upright, and alone if it is to be turned, under a key that it has names for."""
        matrices = [line for line in lines if line.is_matrix]
        if self.turned and not all(line.per_expert and len(line.roles) == 1 for line in matrices):
            return False
        named = all(self.stacked if not line.key.endswith(WEIGHT) else self.linear for line in matrices)
        return named and all(line.upright for line in matrices) and family in (self.families or (family,))

    def line(self, line: Stored) -> Stored:
        """A line of a plain layout as this producer stores it; vectors stay as they are."""
        if not line.is_plain or not line.is_matrix:
            return line
        group = SECOND if line.roles[0].startswith(SECOND) else ""
        common = tuple(group + role for role in self.common)
        coded = partial(replace, line, encoding=self.encoding, common=common if set(common) & set(line.roles) else ())
        if line.key.endswith(WEIGHT):
            axes = written(line.groups[::-1]) if self.turned else line.axes
            return coded(key=line.key.removesuffix(WEIGHT), axes=axes, names=self.linear)
        return coded(names=self.stacked)

    def declares(self, quantization: Quantization, module: str) -> Encoding | None:
        """The encoding that quantization_config declares for a module; None if it leaves the module alone, or says something else."""
        return None if leaves_alone(quantization, module) else self.read(quantization, module)

    def module(self, key: str) -> tuple[str, str] | None:
        """A key of a Linear module -> (module, part), the longest suffix first; None if no part is named so."""
        for part, suffix in self._longest_first:
            if key.endswith(suffix):
                return key.removesuffix(suffix), part
        return None

    @cached_property
    def _longest_first(self) -> list[tuple[str, str]]:
        return sorted(self.linear.items(), key=lambda item: -len(item[1]))


TOLD = ("quant_method", "quant_algo", "moe_quant_algo", "format", "weight_block_size")
"""Keys of quantization_config that say in a few words what it is about."""

BESIDE = ("expert_dtype",)
"""Keys that belong to quantization_config, and that DeepSeek-V4 has beside it; V4.1 has them in it, as transformers looks for them.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/deepseek_v4/configuration_deepseek_v4.py
"""


def said(config: Mapping[str, Any]) -> Quantization:
    """quantization_config of a config.json, wherever its producer keeps it, with what is said beside it; empty if nowhere."""
    text = config.get("text_config")
    places = (config.get("quantization_config"), config.get("compression_config"), text.get("quantization_config") if isinstance(text, Mapping) else None)
    found = next((place for place in places if isinstance(place, Mapping) and place), {})
    return {**{key: config[key] for key in BESIDE if config.get(key) is not None}, **found} if found else {}


def told_in(quantization: Quantization) -> str:
    """Which file says it, or may say it."""
    return f"config.json or {MODELOPT_FILE}" if method(quantization) == "modelopt" else "config.json"


def told(quantization: Quantization) -> str:
    """Who is named in it, and where; of Quark, that names no more than itself there, how it codes weights too."""
    how = f", and of weights {quark_briefly(quantization)}" if method(quantization) == "quark" else ""
    return f"{told_in(quantization)} says quantization_config.quant_method = {quantization['quant_method']}{how}"


def brief(quantization: Quantization, module: str = "") -> str:
    """What it says in a few words, of Quark of one module."""
    told = {key: quantization[key] for key in TOLD if quantization.get(key) is not None}
    told |= dict(told_by_rules(quantization, module))
    if method(quantization) == "quark":
        told |= quark_briefly(quantization, module)
    return str(told or "nothing")


def told_of(quantization: Quantization, module: str) -> str:
    """What it says of one module in a few words."""
    weights = groups(quantization, module) if by_compressed_tensors(quantization) else None
    asked = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
    told = {key: weights[key] for key in asked if weights.get(key) is not None} if weights else {}
    return f"{brief(quantization)}, weights {told}" if told else brief(quantization, module)


def leaves_alone(quantization: Quantization, module: str) -> bool:
    """quantization_config says that this module is not quantized: it, or one that it is in, is named or matches a pattern; or others alone are listed."""
    layers = quantization.get("quantized_layers")
    if isinstance(layers, Mapping) and str(quantization.get("quant_algo")).upper() == "MIXED_PRECISION":
        return not any(f"{module}.".startswith(f"{name}.") for name in layers)
    if by_compressed_tensors(quantization) and isinstance(quantization.get("config_groups"), Mapping) and group_of(quantization, module) is None:
        return True
    if method(quantization) == "modelopt" and not quantization.get("quant_algo") and not quantization.get("config_groups"):
        return True  # it speaks of the cache of keys and values alone
    kept = [name for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers") for name in names_in(quantization, key)]
    if any(f".{name}." in f".{module}." or ("*" in name and _names("re:" + name.replace("*", ".*"), module)) for name in kept):
        return True
    if spared(quantization, module) or (method(quantization) == "quark" and quark_layer(quantization, module).get("weight") is None):
        return True
    listed = [*names_in(quantization, "ignore"), *names_in(quantization, "exclude_modules"), *names_in(quantization, "exclude")]
    return any(_names(pattern, module) or ("*" in pattern and fnmatchcase(module, pattern)) for pattern in listed)


def names_in(said: Mapping[str, Any], key: str) -> list[str]:
    """The names and patterns under a key; raises `Contradiction` where it is no list."""
    found = said.get(key) or []
    if not isinstance(found, list | tuple):
        wrong = f"quantization_config says {key} = {str(found)[:80]}"
        raise Contradiction(wrong, "it is a list of names of modules, or null", "take config.json from the checkpoint's producer")
    return [name for name in found if isinstance(name, str)]


# --- compressed-tensors ----------------------------------------------------------------------------------------------------------------
# https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/quantization/quant_config.py


def groups(quantization: Quantization, module: str) -> Mapping[str, Any] | None:
    """The `weights` arguments of the group that a module belongs to, None if it is ignored or in none."""
    if any(_names(pattern, module) for pattern in names_in(quantization, "ignore")):
        return None
    chosen = group_of(quantization, module)
    weights = chosen.get("weights") if chosen else None
    return weights if isinstance(weights, Mapping) else None


def group_of(quantization: Quantization, module: str) -> Mapping[str, Any] | None:
    """The group that a module belongs to: of targets that name it, whole names come first, then patterns in the order of the alphabet, then its class."""
    found = _groups(quantization)
    targets = [(target.startswith("re:"), target, n) for n, group in enumerate(found) for target in names_in(group, "targets")]
    named = [n for _, target, n in sorted(targets) if _names(target, module)] or [n for _, target, n in targets if target == "Linear"]
    return found[named[0]] if named else None


def by_compressed_tensors(quantization: Quantization) -> bool:
    return method(quantization) in ("compressed-tensors", "compressed_tensors")


def of_modules(quantization: Quantization) -> bool:
    """compressed-tensors, and all that it names is the class of Linear modules."""
    return by_compressed_tensors(quantization) and all(target == "Linear" for group in _groups(quantization) for target in names_in(group, "targets"))


def _groups(quantization: Quantization) -> list[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def transformed(quantization: Quantization) -> str | None:
    """What transform_config, Quark's algo_config, or a rotation of AutoRound or GPTQModel says is done to activations while the model computes, which no
    weight holds; None if nothing is.

    https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/transform/transform_args.py
    """
    if method(quantization) == "quark":
        return quark_online(quantization)
    if turns := rotated(quantization):
        return turns
    declared = quantization.get("transform_config")
    schemes = declared.get("config_groups") if isinstance(declared, Mapping) else None
    for name, scheme in (schemes or {}).items():
        for apply in (scheme.get("apply") or ()) if isinstance(scheme, Mapping) else ():
            where = apply.get("location") if isinstance(apply, Mapping) else apply
            if where not in ("weight_input", "weight_output"):
                return f"transform_config in config.json says {name}: {scheme.get('type', 'a transform')} at {where}"
    return None


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error as error:
            wrong = f"quantization_config names modules by {pattern!r}, which is no regular expression"
            raise Contradiction(wrong, str(error), "take config.json from the checkpoint's producer") from error
    return pattern == module


def compressed(quantization: Quantization, module: str, **expected: Any) -> Mapping[str, Any] | None:
    """The `weights` arguments that compressed-tensors declares for a module, if they are what is expected."""
    if not by_compressed_tensors(quantization):
        return None
    weights = groups(quantization, module)
    return weights if weights and all(weights.get(key) == value for key, value in expected.items()) else None


def declare_compressed(format: str, weights: Mapping[str, Any], kept: Sequence[str], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """quantization_config of a folder that compressed-tensors reads; without `inputs`, activations are left as they are."""
    arguments = {"dynamic": False, "symmetric": True, "actorder": None, "observer": None, "block_structure": None, "group_size": None, **weights}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": inputs, "output_activations": None, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }

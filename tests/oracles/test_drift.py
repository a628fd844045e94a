"""What the installed transformers says of each family (its conversion mapping, its experts modules' flags) against our specs; and which families we lack."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from families import model_of, why_not
from transformers import CONFIG_MAPPING

from moeglot.axes import letters, written
from moeglot.formats import FAMILIES, PLAIN
from moeglot.integrations.transformers import VERSION, experts_of
from moeglot.layout import Stored

if VERSION < (5, 23):
    pytest.skip("the flags and the mapping are those of transformers 5.23", allow_module_level=True)

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, ErnieFuseAndSplitTextVisionExperts, Interleave, MergeModulelist, Transpose, WeightConverter

MISSING: dict[str, str] = {}
"""Folder among transformers' models -> why we have no spec of its experts."""
MODELS = Path(transformers.__file__).parent / "models"
KNOWN = [family for family in FAMILIES if family.model_types[0] in CONFIG_MAPPING and not why_not(family)]


def folders() -> set[str]:
    """Every folder of models that defines a class of experts."""
    experts = re.compile(r"^@use_experts_implementation|^class \w*Experts\w*\(", re.MULTILINE)
    return {path.parent.name for path in MODELS.glob("*/modeling_*.py") if experts.search(path.read_text(encoding="utf-8"))}


def test_every_family_with_experts_is_known_or_its_absence_explained():
    ours = {match[1] for family in FAMILIES if (match := re.search(r"/models/(\w+)/modeling", family.source))} | {f.model_types[0] for f in FAMILIES}
    assert len(folders()) > 60, "the scan sees next to nothing"
    assert folders() - ours == MISSING.keys(), "write a spec, or say in MISSING why not"


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_every_name_that_the_class_has_for_a_size_is_known(family):
    """What its config class takes for another name of the same fact, in the part of config.json that holds it."""
    part = CONFIG_MAPPING[family.model_types[0]]
    for name in family.sizes["e"][0].split(".")[:-1]:
        part = part.sub_configs[name] if isinstance(part.sub_configs[name], type) and part.sub_configs[name].__name__ != "AutoConfig" else None
        if part is None:
            pytest.skip("which class reads that part, the config decides")
    for keys in [keys for letter, keys in family.sizes.items() if letter in "ehi"]:
        names = [key.rpartition(".")[2] for key in keys]
        assert {alias for alias, name in part.attribute_map.items() if name == names[0]} <= {*names}


def defaults(family):
    """(config key, what we take where config.json lacks it, what its config class takes); the class leaves out of the file what is its default."""
    config = CONFIG_MAPPING[family.model_types[0]]()

    def theirs(path):
        found = config
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else getattr(found, key, None)
        return found

    told = [family.activation.function, *family.activation.numbers.values(), *([family.sparse.first] if family.sparse.first else [])]
    for key, ours in told:
        if key is not None and (value := theirs(key)) is not None:
            yield key, ours, value
        elif (key, ours) == family.sparse.first and (kinds := theirs("mlp_layer_types")) is not None:
            yield key, ours, [kind == "sparse" for kind in kinds].index(True)


def test_what_a_config_does_not_say_is_what_its_class_takes():
    found = [(family.name, *told) for family in FAMILIES if family.model_types[0] in CONFIG_MAPPING for told in defaults(family)]
    assert len(found) > 100
    assert [told for told in found if told[2] != told[3]] == []


def formats_of(family):
    """Those of the Hub and of transformers itself."""
    return [form for form in PLAIN if form.family == family and not form.closed and not form.asked]


def unlike_flags(module, forms) -> list[str]:
    """How the flags of an experts module contradict the format that describes memory."""
    memory, found = next((form for form in reversed(forms) if not form.stored[0].per_expert), None), []
    if memory and getattr(module, "is_transposed", False) != memory.says_transposed:
        found.append(f"is_transposed is said: {memory.says_transposed}")
    if not hasattr(module, "has_gate"):
        return found  # it has no flags
    roles = memory.family.roles
    if module.has_gate != ("gate" in roles):
        found.append(f"has_gate is {module.has_gate}")
    if module.has_bias != ("down_bias" in roles):
        found.append(f"has_bias is {module.has_bias}")
    down = memory.line_of("down")
    if module.is_transposed != (written(down.expert_groups) == "i h"):
        found.append(f"is_transposed is {module.is_transposed}, down is {down.axes}")
    if module.has_gate and module.is_concatenated != ("(p i)" in memory.line_of("gate").axes):
        found.append(f"is_concatenated is {module.is_concatenated}, gate and up are {memory.line_of('gate').axes}")
    return found


def unlike_mapping(model, forms) -> list[str]:
    """How the library's conversions of experts contradict our lines: names, order of the roles, arrangement, orientation."""
    found = []
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        target = _plain(conversion.target_patterns[0])
        towers = (conversion.scope_prefix or "").split(".")
        if not isinstance(conversion, WeightConverter) or not re.search(r"experts\.(gate_up_proj|up_proj|down_proj)$", target) or "vision_tower" in towers:
            continue
        memory = _line(forms, target)
        sources = [_line(forms, _plain(pattern), other=memory) for pattern in conversion.source_patterns]
        if memory is None or None in sources:
            found.append(f"{conversion.source_patterns} -> {target}: no such line of ours")
            continue
        expected = _expected(sources, memory, conversion.operations)
        if expected:
            found.append(f"{conversion.source_patterns} -> {target}: {expected}")
    return found


def _plain(pattern: str) -> str:
    return pattern.replace("\\", "").removesuffix("$").lstrip("^.")


def _line(forms, name: str, other: Stored | None = None) -> Stored | None:
    """Our line whose key ends in this name."""
    lines = [line for form in forms for line in form.stored if line is not other]
    return next((line for line in lines if ("." + line.key.replace("{expert}", "*")).endswith("." + name)), None)


def _lying(line: Stored) -> list[str]:
    return [letter for letter in letters(line.expert_groups) if letter in "hi"]


def _expected(sources: list[Stored], memory: Stored, operations) -> str | None:
    """What the operations say and our axes do not, or None."""
    kinds = [type(operation) for operation in operations]
    if ErnieFuseAndSplitTextVisionExperts in kinds:  # merges, and concatenates what it is given
        kinds += [MergeModulelist, *([Concatenate] if len(sources) > 1 else [])]
    if tuple(role for line in sources for role in line.roles) != memory.roles:
        return f"the roles are {[line.roles for line in sources]} and {memory.roles}"
    if (MergeModulelist in kinds) != sources[0].per_expert:
        return "one matrix an expert, or all in one"
    if Concatenate in kinds and "(p i)" not in memory.axes:
        return f"concatenated, and we say {memory.axes}"
    if Interleave in kinds and ("(i p)" not in sources[0].axes or "(p i)" not in memory.axes):
        return f"interleaved before, and we say {sources[0].axes} and {memory.axes}"
    turned = _lying(sources[0]) != _lying(memory)
    if (Transpose in kinds) != turned:
        return f"transposed: {Transpose in kinds}, and we say {sources[0].axes} and {memory.axes}"
    return None


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_our_spec_is_what_the_library_says(family):
    model = model_of(family, "neither")
    modules = experts_of(model, len(family.groups))
    config = model.config.to_dict()
    assert tuple(sorted(modules)) == family.layers(config)
    assert {len(group) for group in modules.values()} == {len(family.groups)}
    for module in (module for group in modules.values() for module in group):
        assert unlike_flags(module, formats_of(family)) == []
    assert unlike_mapping(model, formats_of(family)) == []


def test_a_spec_that_has_drifted_is_seen():
    """The power of this: each flag, name and operation, contradicted on purpose."""
    by_name = {family.name: family for family in KNOWN}

    def drifted(name, **wrong):
        forms = [replace(form, stored=tuple(_wrong(line, **wrong) for line in form.stored)) for form in formats_of(by_name[name])]
        model = model_of(by_name[name], "neither")
        return [*unlike_flags(next(iter(experts_of(model).values()))[0], forms), *unlike_mapping(model, forms)]

    assert drifted("gpt-oss") == []
    assert drifted("deepseek-v3") == []
    assert "is_concatenated" in str(drifted("gpt-oss", old="(i p)", new="(p i)"))
    assert "is_transposed" in str(drifted("openai-privacy-filter", old="e i h", new="e h i"))
    assert "concatenated" in str(drifted("deepseek-v3", old="(p i)", new="(i p)"))
    assert "roles" in str(drifted("deepseek-v3", swap=True))
    assert "interleaved" in str(drifted("inkling2-text", old="(i p)", new="(p i)"))
    assert "transposed" in str(drifted("qwen3-vl-moe", old="e i h", new="e h i"))
    assert "no such line" in str(drifted("mixtral", old_key="w1", new_key="w9"))
    unsaid = [replace(form, says_transposed=False) for form in formats_of(by_name["gpt-oss"])]
    assert "is_transposed is said: False" in unlike_flags(next(iter(experts_of(model_of(by_name["gpt-oss"], "neither")).values()))[0], unsaid)


def _wrong(line: Stored, old="", new="", swap=False, old_key="", new_key="") -> Stored:
    roles = {"gate": "up", "up": "gate"} if swap and line.per_expert else {}
    key = line.key.replace(old_key, new_key) if old_key else line.key
    axes = line.axes.replace(old, new) if old else line.axes
    return replace(line, key=key, axes=axes, roles=tuple(roles.get(role, role) for role in line.roles))


MLX = {"kimi-k2", "bailing-moe", "step3p5"}
"""Families that mlx-lm computes with, in an environment of its own (test_mlx.py)."""


def test_a_family_that_no_real_module_judges_says_so():
    judged = {family.name for family in KNOWN}
    assert {family.name for family in FAMILIES if not family.unverified} == judged | MLX

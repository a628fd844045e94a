"""Adapters read wrongly, as tools have shipped it: every reading but the writer's own is refused, or is another change by a wide margin."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from adapters import PREFIX, WRITERS, Adapter, Job
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.adapters.config import AdapterConfig
from moeglot.conventions import CONVENTIONS

LIMIT = 1e-5
SIZES = {"square": (4, 32, 32, 3), "h=2i": (4, 64, 32, 3), "r=e": (4, 64, 32, 4), "2h=i": (3, 32, 64, 2), "neither": (3, 32, 96, 5)}
"""e, h, i and the rank."""
BASES = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/hub", "mixtral": "mixtral/transformers-5"}
EVERY = [(writer, family) for writer, (_, families, _) in WRITERS.items() for family in families]


def make(folder: Path, writer: str, family: str, size: str) -> tuple[Path, Adapter, moeglot.Checkpoint]:
    e, h, i, rank = SIZES[size]
    base = moeglot.open(write_checkpoint(folder / "base", BASES[family], {"e": e, "h": h, "i": i}, dtype=torch.float32))
    made = WRITERS[writer][2](Job(family, e, h, i, rank))
    return made.save(folder / "adapter"), made, base


def worst(found: moeglot.Adapter, made: Adapter) -> float:
    errors = []
    for (layer, role, expert), change in made.changes.items():
        left, right = found.factors(layer, role, expert)
        errors.append(float((left.double() @ right.double() - change).norm() / change.norm()))
    return max(errors)


@pytest.mark.parametrize(("writer", "family", "size"), [(*one, size) for one, size in itertools.product(EVERY, SIZES)])
def test_the_writers_own_reading_and_no_other(writer, family, size, tmp_path):
    path, made, base = make(tmp_path, writer, family, size)
    convention = WRITERS[writer][0]
    found = moeglot.open_adapter(path, base, convention)
    assert worst(found, made) <= LIMIT
    assert len(found.pairs) == len(made.changes) == 3 * base.sizes["e"] * len(base.layers)
    for other in CONVENTIONS:
        if other.name == convention:
            continue
        try:
            wrong = moeglot.open_adapter(path, base, other.name)
        except moeglot.MoeglotError:
            continue
        assert worst(wrong, made) >= 100 * LIMIT, other.name


@pytest.mark.parametrize(("writer", "family"), EVERY)
def test_into_every_other_convention(writer, family, tmp_path):
    path, made, base = make(tmp_path, writer, family, "r=e")
    found, reached = moeglot.open_adapter(path, base, WRITERS[writer][0]), []
    for to in CONVENTIONS:
        if (to.families and family not in to.families) or (to.name == "per-expert" and family == "gpt-oss"):
            with pytest.raises(moeglot.AdapterError, match="cannot hold"):
                moeglot.convert_adapter(found, to.name, tmp_path / to.name)
            continue
        moeglot.convert_adapter(found, to.name, tmp_path / to.name)
        reached.append(to.name)
        assert worst(moeglot.open_adapter(tmp_path / to.name, base), made) <= LIMIT
    assert {"peft", "peft-turned", "grouped", "grouped-turned", "tinker", "sglang"} <= set(reached)


def test_scales_and_ranks_of_their_own_are_folded_and_padded(tmp_path):
    """alpha_pattern for one role, to a reader that knows one scale."""
    path, made, base = make(tmp_path, "PEFT", "qwen3-moe", "neither")
    change_config(path, alpha_pattern={"down_proj": 9.0})
    made.changes = {key: change * (9.0 / 6.0 if key[1] == "down" else 1) for key, change in made.changes.items()}
    found = moeglot.open_adapter(path, base, "peft")
    assert worst(found, made) <= LIMIT
    for to in ("sglang", "per-expert", "automodel", "grouped"):
        done = moeglot.convert_adapter(found, to, tmp_path / to)
        assert any("folded" in note for note in done.notes) == (to != "grouped")
        assert worst(moeglot.open_adapter(tmp_path / to, base), made) <= LIMIT


def change_config(path: Path, **values) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def only_down(path: Path) -> None:
    tensors = {key: tensor for key, tensor in load_file(path / "adapter_model.safetensors").items() if ".base_layer." not in key}
    save_file(tensors, path / "adapter_model.safetensors")
    change_config(path, target_parameters=["mlp.experts.down_proj"])


WORDS = {
    "unsloth's mark, grouped": ("unsloth_zoo before 2026.9.6", "qwen3-moe", "h=2i", {"lora_B_layout": "grouped_by_expert"}, "grouped"),
    "unsloth's mark, rank-major": ("PEFT", "qwen3-moe", "h=2i", {"lora_B_layout": "rank_major"}, "peft"),
    "unsloth's mark on gpt-oss": ("PEFT", "gpt-oss", "square", {"lora_B_layout": "rank_major"}, "peft"),
    "mark and PEFT 0.18": ("PEFT 0.18 on [e, out, in]", "qwen3-moe", "2h=i", {"lora_B_layout": "rank_major", "peft_version": "0.18.1"}, "peft-turned"),
    "mark and PEFT 0.19": ("PEFT", "qwen3-moe", "2h=i", {"lora_B_layout": "rank_major", "peft_version": "0.19.0"}, "peft"),
    "our mark": ("unsloth_zoo with PEFT 0.18", "mixtral", "neither", {"moeglot_convention": "grouped-turned"}, "grouped-turned"),
    "Megatron-Bridge's full names": ("Megatron-Bridge", "qwen3-moe", "square", {}, "grouped-turned"),
    "names": ("tinker", "gpt-oss", "square", {}, "tinker"),
    "names of SGLang": ("SGLang, shared outer", "qwen3-moe", "h=2i", {}, "sglang"),
    "names of Automodel": ("Automodel", "mixtral", "r=e", {}, "automodel"),
}


@pytest.mark.parametrize("word", WORDS)
def test_what_decides(word, tmp_path):
    writer, family, size, config, expected = WORDS[word]
    path, made, base = make(tmp_path, writer, family, size)
    change_config(path, **config)
    found = moeglot.open_adapter(path, base)
    assert found.convention.name == expected
    assert found.evidence
    assert worst(found, made) <= LIMIT


TURNS = {"peft", "peft-turned"}
OPEN = {
    "packing without a mark": ("PEFT", "qwen3-moe", "neither", {"peft_version": "0.21.2"}, False, {"peft", "grouped"}),
    "the same from PEFT 0.18": ("PEFT 0.18 on [e, out, in]", "qwen3-moe", "neither", {"peft_version": "0.18.1"}, False, {"peft-turned", "grouped-turned"}),
    "a non-square sibling decides the turn": ("PEFT", "gpt-oss", "square", {"peft_version": "0.21.2"}, False, {"peft", "grouped"}),
    "square down alone on gpt-oss": ("PEFT", "gpt-oss", "square", {"lora_B_layout": "rank_major", "peft_version": "0.21.2"}, True, TURNS),
    "square down alone, between 0.18 and 0.19": ("PEFT", "qwen3-moe", "square", {"lora_B_layout": "rank_major", "peft_version": "0.18.1.dev0"}, True, TURNS),
    "the same without any word": ("PEFT", "gpt-oss", "square", {}, True, {"peft", "peft-turned", "grouped", "grouped-turned"}),
}


@pytest.mark.parametrize("case", OPEN)
def test_what_stays_open_is_refused(case, tmp_path):
    writer, family, size, config, down, expected = OPEN[case]
    path, _, base = make(tmp_path, writer, family, size)
    if down:
        only_down(path)
    change_config(path, **config)
    with pytest.raises(moeglot.AmbiguousConvention) as refused:
        moeglot.open_adapter(path, base)
    named = refused.value.wrong.partition(" read as ")[2].partition(",")[0]
    assert set(named.split(" or ")) == expected
    assert "--convention" in refused.value.do


@pytest.mark.parametrize(("version", "last"), [(None, True), ("0.19.1", True), ("0.20.0", False), ("0.20.1.dev0", False), ("1.0.0", False)])
def test_which_number_in_a_name_is_the_layers(version, last):
    """PEFT before 0.20 took the last one, which may be an expert's."""
    config = AdapterConfig({"target_modules": ["down_proj"], "layers_to_transform": [1], "peft_version": version})
    assert config.names_module("model.layers.0.mlp.experts.1.down_proj") == last
    assert config.names_module("model.layers.1.mlp.experts.0.down_proj") != last


def test_with_rank_one_both_packings_are_the_same(tmp_path):
    base = moeglot.open(write_checkpoint(tmp_path / "base", "qwen3-moe/hub", {"e": 4, "h": 64, "i": 32}, dtype=torch.float32))
    made = WRITERS["unsloth_zoo before 2026.9.6"][2](Job("qwen3-moe", 4, 64, 32, 1))
    assert worst(moeglot.open_adapter(made.save(tmp_path / "adapter"), base), made) <= LIMIT


def test_shapes_that_the_declared_convention_cannot_have_are_a_contradiction(tmp_path):
    path, _, base = make(tmp_path, "PEFT", "qwen3-moe", "neither")
    change_config(path, peft_version="0.18.1")
    with pytest.raises(moeglot.Contradiction):
        moeglot.open_adapter(path, base)


# --- never half applied --------------------------------------------------------------------------------------------------------------


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "adapter_model.safetensors")


def drop(ending: str):
    def change(tensors):
        del tensors[next(key for key in tensors if key.endswith(ending))]

    return change


def add(key: str):
    return lambda tensors: tensors.__setitem__(PREFIX + key, torch.ones(3, 3))


HALVES = {
    "a lora_B is missing": ("PEFT", drop("lora_B.weight"), {}, moeglot.HalfAdapter),
    "a layer's down is missing": (
        "PEFT",
        lambda t: [drop("layers.1.mlp.experts.lora_A.weight")(t), drop("layers.1.mlp.experts.lora_B.weight")(t)],
        {},
        moeglot.HalfAdapter,
    ),
    "an expert is missing": (
        "vLLM's keys",
        lambda t: [drop("experts.2.up_proj.lora_A.weight")(t), drop("experts.2.up_proj.lora_B.weight")(t)],
        {},
        moeglot.HalfAdapter,
    ),
    "a layer of a 3-D adapter is missing": ("SGLang", lambda t: [t.pop(key) for key in [k for k in t if "layers.1." in k]], {}, moeglot.HalfAdapter),
    "an expert is missing and nothing is named": (
        "vLLM's keys",
        lambda t: [drop("experts.2.up_proj.lora_A.weight")(t), drop("experts.2.up_proj.lora_B.weight")(t)],
        {"target_modules": None},
        moeglot.HalfAdapter,
    ),
    "a tensor of nobody": ("PEFT", add("model.layers.0.mlp.experts.lora_C.weight"), {}, moeglot.HalfAdapter),
    "an expert too many": ("vLLM's keys", add("model.layers.0.mlp.experts.77.up_proj.lora_A.weight"), {}, moeglot.HalfAdapter),
    "a layer too many": ("PEFT", add("model.layers.7.mlp.experts.lora_A.weight"), {}, moeglot.HalfAdapter),
    "two writers' names": ("PEFT", add("model.layers.0.mlp.experts.w1.lora_A.weight"), {}, moeglot.HalfAdapter),
    "a module that the base has not": ("PEFT", add("model.layers.0.self_attn.qkv_proj.lora_A.weight"), {}, moeglot.HalfAdapter),
    "a whole tensor that nobody announced": ("PEFT", add("model.layers.0.self_attn.q_proj.weight"), {}, moeglot.HalfAdapter),
    "attention that the config names": ("PEFT", lambda t: None, {"target_modules": ["q_proj"]}, moeglot.HalfAdapter),
    "experts that the config names": (
        "PEFT",
        lambda t: [t.pop(k) for k in list(t)] and add("model.layers.0.self_attn.q_proj.lora_A.weight")(t),
        {},
        moeglot.HalfAdapter,
    ),
    "only one parameter is named": ("PEFT", lambda t: None, {"target_parameters": ["experts.down_proj"]}, moeglot.HalfAdapter),
    "a scale without end": ("PEFT", lambda t: None, {"lora_alpha": float("inf")}, moeglot.BrokenFile),
    "a scale that is none": ("PEFT", lambda t: None, {"alpha_pattern": {"down_proj": float("nan")}}, moeglot.BrokenFile),
    "no scale": ("PEFT", lambda t: None, {"lora_alpha": None}, moeglot.AdapterError),
    "DoRA": ("PEFT", lambda t: None, {"use_dora": True}, moeglot.UnsupportedAdapter),
    "DoRA without a word": ("PEFT", add("model.layers.0.self_attn.q_proj.lora_magnitude_vector"), {}, moeglot.UnsupportedAdapter),
    "patterns that are none": ("PEFT", lambda t: None, {"rank_pattern": ["q_proj"]}, moeglot.BrokenFile),
    "an alpha that is no number": ("PEFT", lambda t: None, {"alpha_pattern": {"down_proj": "4"}}, moeglot.BrokenFile),
    "targets that are no expression": ("PEFT", lambda t: None, {"target_modules": "*.q_proj"}, moeglot.BrokenFile),
    "PiSSA": ("PEFT", lambda t: None, {"init_lora_weights": "pissa_niter_4"}, moeglot.UnsupportedAdapter),
    "IA3": ("PEFT", lambda t: None, {"peft_type": "IA3"}, moeglot.UnsupportedAdapter),
    "a bias of experts": ("PEFT", lambda t: None, {"target_parameters": ["gate_up_proj", "down_proj", "gate_up_proj_bias"]}, moeglot.UnsupportedAdapter),
}


@pytest.mark.parametrize("half", HALVES)
def test_never_half_applied(half, tmp_path):
    writer, change, config, error = HALVES[half]
    family = "gpt-oss" if half == "a bias of experts" else "qwen3-moe"
    path, made, base = make(tmp_path, writer, family, "neither")
    assert worst(moeglot.open_adapter(path, base, WRITERS[writer][0]), made) <= LIMIT
    change_tensors(path, change)
    change_config(path, **config)
    with pytest.raises(error):
        moeglot.open_adapter(path, base, WRITERS[writer][0])


@pytest.mark.parametrize(
    ("whole", "half"),
    [
        ((["q_proj"], 2), (["q_proj", "gate_proj"], 2)),  # gate_proj is a module of each expert
        (("all-linear", 2), ("all-linear", 1)),
    ],
    ids=["experts by their modules", "a layer of all-linear"],
)
def test_attention_alone_is_all_that_its_config_says(whole, half, tmp_path):
    path, _, base = make(tmp_path, "PEFT", "qwen3-moe", "neither")
    rows, columns = base.dense["model.layers.0.self_attn.q_proj.weight"].shape
    for (targets, layers), holds in ((whole, True), (half, False)):
        stems = [f"{PREFIX}model.layers.{layer}.self_attn.q_proj" for layer in range(layers)]
        factors = {f"{stem}.lora_{of}.weight": torch.ones((3, columns) if of == "A" else (rows, 3)) for stem in stems for of in "AB"}
        save_file(factors, path / "adapter_model.safetensors")
        change_config(path, target_modules=targets, target_parameters=None)
        if holds:
            assert len(moeglot.open_adapter(path, base).dense) == layers
            continue
        with pytest.raises(moeglot.HalfAdapter, match="says that it is adapted"):
            moeglot.open_adapter(path, base)


def test_a_name_of_nothing_is_refused_whatever_the_adapter_holds(tmp_path):
    path, _, base = make(tmp_path, "tinker", "qwen3-moe", "neither")
    with pytest.raises(moeglot.UsageError):
        moeglot.open_adapter(path, base, "tinkr")


def test_a_word_against_the_mark_is_told(tmp_path):
    path, _, base = make(tmp_path, "PEFT", "qwen3-moe", "neither")
    change_config(path, moeglot_convention="grouped")
    assert any("against" in reason for reason in moeglot.open_adapter(path, base, "peft").evidence)


def test_an_adapter_for_another_base(tmp_path):
    path, _, _ = make(tmp_path, "PEFT", "qwen3-moe", "neither")
    for n, sizes in enumerate(({"e": 4, "h": 32, "i": 96}, {"e": 3, "h": 64, "i": 96}, {"e": 3, "h": 32, "i": 64})):
        other = write_checkpoint(tmp_path / f"other{n}", "qwen3-moe/hub", sizes, dtype=torch.float32)
        with pytest.raises((moeglot.Contradiction, moeglot.HalfAdapter)):
            moeglot.open_adapter(path, other, "peft")
    deeper = write_checkpoint(tmp_path / "deeper", "qwen3-moe/hub", {"e": 3, "h": 32, "i": 96}, layers=3, dtype=torch.float32)
    with pytest.raises(moeglot.HalfAdapter, match="pass the base that it was trained on"):
        moeglot.open_adapter(path, deeper, "peft")


@pytest.mark.parametrize("there", [2, 8])
@pytest.mark.parametrize(("writer", "family"), EVERY)
def test_an_adapter_for_a_base_with_another_number_of_experts(writer, family, there, tmp_path):
    """As one whose experts were pruned. Where an axis holds experts and ranks, 4 of rank 8 are as long as 2 of rank 16 and 8 of rank 4."""
    base = write_checkpoint(tmp_path / "base", BASES[family], {"e": 4, "h": 32, "i": 96}, dtype=torch.float32)
    other = write_checkpoint(tmp_path / "other", BASES[family], {"e": there, "h": 32, "i": 96}, dtype=torch.float32)
    convention, _, write = WRITERS[writer]
    made = write(Job(family, 4, 32, 96, 8))
    path = made.save(tmp_path / "adapter")
    assert worst(moeglot.open_adapter(path, base, convention), made) <= LIMIT
    packed = convention in ("peft", "peft-turned", "grouped", "grouped-turned")
    with pytest.raises(moeglot.TensorMismatch if packed else moeglot.MoeglotError, match="4 experts of rank 8" if packed else None):
        moeglot.open_adapter(path, other, convention)


@pytest.mark.parametrize("said", [None, 7, 99])
def test_a_rank_that_the_tensors_do_not_have_is_refused_where_they_tell_no_rank(said, tmp_path):
    path, made, base = make(tmp_path, "PEFT", "qwen3-moe", "neither")
    change_config(path, r=said)
    with pytest.raises(moeglot.TensorMismatch, match="says no rank" if said is None else f"says r = {said}"):
        moeglot.open_adapter(path, base, "peft")
    change_config(path, rank_pattern={r".*\.experts\..*": 5})  # which explains it
    assert worst(moeglot.open_adapter(path, base, "peft"), made) <= LIMIT


@pytest.mark.parametrize("said", [None, 99])
@pytest.mark.parametrize("writer", ["vLLM's keys", "tinker", "Automodel"])
def test_a_rank_that_the_tensors_do_not_have_is_told(writer, said, tmp_path):
    """They decide where they tell it, and the scale is that of their rank."""
    path, made, base = make(tmp_path, writer, "qwen3-moe", "neither")
    change_config(path, r=5)
    assert not any("tensors decide" in reason for reason in moeglot.open_adapter(path, base, WRITERS[writer][0]).evidence)
    change_config(path, r=said)
    adapter = moeglot.open_adapter(path, base, WRITERS[writer][0])
    assert worst(adapter, made) <= LIMIT
    assert any(f"adapter_config.json says {said or 'no rank'}; tensors decide" in reason for reason in adapter.evidence)


@pytest.mark.parametrize("to", ["per-expert", "tinker", "peft"])
@pytest.mark.parametrize(("config", "none"), [({"lora_alpha": 0}, ("gate", "up", "down")), ({"alpha_pattern": {"gate_proj": 0}}, ("gate",))])
def test_a_scale_of_zero_is_no_change(config, none, to, tmp_path):
    """Of all or of one role; whichever scale the target then has, the others change what they did."""
    path, made, base = make(tmp_path, "vLLM's keys", "qwen3-moe", "neither")
    change_config(path, **config)
    moeglot.convert_adapter(moeglot.open_adapter(path, base), to, tmp_path / "out")
    found = moeglot.open_adapter(tmp_path / "out", base, to)
    for (layer, role, expert), change in made.changes.items():
        left, right = found.factors(layer, role, expert)
        expected = torch.zeros_like(change) if role in none else change
        assert float((left.double() @ right.double() - expected).norm() / change.norm()) <= LIMIT


def test_factors_that_are_not_finite(tmp_path):
    path, _, base = make(tmp_path, "PEFT", "qwen3-moe", "neither")
    change_tensors(path, lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])
    adapter = moeglot.open_adapter(path, base, "peft")
    with pytest.raises(moeglot.BadNumbers):
        adapter.factors(0, "gate", 0)


@pytest.mark.parametrize("key", [(9, "gate", 0), (0, "gaet", 0), (0, "gate", 99), (0, "gate", -1)])
def test_factors_of_what_the_base_does_not_have(key, tmp_path):
    """They are refused, and not told as no change."""
    path, _, base = make(tmp_path, "PEFT", "qwen3-moe", "neither")
    with pytest.raises(moeglot.UsageError, match="no such matrix"):
        moeglot.open_adapter(path, base, "peft").factors(*key)


def test_several_adapters_in_a_folder(tmp_path):
    path, made, base = make(tmp_path, "tinker", "qwen3-moe", "neither")
    Adapter(made.tensors, made.config).save(path / "second")
    with pytest.raises(moeglot.AdapterError, match="holds 2 adapters"):
        moeglot.open_adapter(path, base)
    for name in ("default", "second"):
        assert worst(moeglot.open_adapter(path, base, adapter=name), made) <= LIMIT
    with pytest.raises(moeglot.AdapterError, match="has no adapter"):
        moeglot.open_adapter(path, base, adapter="third")

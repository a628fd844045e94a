"""Laws over all conventions: what is laid down is taken up again bit for bit, and an adapter that goes elsewhere and returns is what it was."""

import itertools
import json
from dataclasses import replace

import pytest
import strategies  # noqa: F401  (its profile)
import torch
from adapters import WRITERS, Job
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.adapters import convert as adapter_convert
from moeglot.adapters.evidence import cluster
from moeglot.adapters.proof import LIMIT, changes, difference
from moeglot.conventions import CONVENTIONS, READERS, Convention
from moeglot.errors import BadNumbers, NotVerified
from moeglot.factors import fit, holds, join, lay, places, recognizes, shapes, take
from moeglot.formats import FAMILIES

KNOWN = [(convention, family) for convention in CONVENTIONS for family in FAMILIES if holds(convention, family)]


@given(
    st.sampled_from(KNOWN),
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_what_is_laid_down_is_taken_up(known, sizes, rank, seed):
    convention, family = known
    sizes, random = dict(zip("ehi", sizes, strict=True)), torch.Generator().manual_seed(seed)
    roles = [role for role in family.roles if not role.endswith("bias")]
    seen = []
    for place in places(convention, family, 3, sizes["e"], roles):
        of = place.sizes(sizes)
        experts = range(sizes["e"]) if place.expert is None else (place.expert,)
        given = {(role, e): torch.randn(of["y"] // len(place.roles), rank, generator=random) for role in place.roles for e in experts}
        rights = {e: torch.randn(rank, of["x"], generator=random) for e in experts}
        stored = lay(convention, [join(place, [given[role, e] for role in place.roles]) for e in experts], [rights[e] for e in experts])
        assert tuple(tuple(tensor.shape) for tensor in stored) == shapes(convention, place, sizes, rank)
        assert fit(convention, place, sizes, *(tuple(tensor.shape) for tensor in stored)) == rank
        assert recognizes(convention, family).fullmatch(place.a)
        assert recognizes(convention, family).fullmatch(place.b)
        for role, e in given:
            left, right = take(convention, place, sizes, stored, role, e)
            assert torch.equal(left, given[role, e])
            assert torch.equal(right, rights[e])
            seen.append((role, e))
    assert sorted(seen) == sorted(itertools.product(roles, range(sizes["e"])))


def test_a_wrong_spec_fails_in_its_authors_hands():
    for a, b in (("(e r) x", "x (r e)"), ("(e r) x", "y r"), ("e x", "e y r"), ("r x", "y r r")):
        with pytest.raises(ValueError, match="must hold r"):
            Convention("wrong", a, b, "", "")
    with pytest.raises(ValueError, match="joined"):
        Convention("wrong", "r x", "y r", "", "", leaves=((("gate", "up"), "both"),))


def test_no_two_conventions_or_readers_have_one_name():
    names = [known.name for known in (*CONVENTIONS, *READERS)]
    assert len(set(names)) == len(names)


STACKED = ("peft", "peft-turned", "grouped", "grouped-turned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe"])
def test_there_and_back_is_the_same_file(family, dtype, tmp_path):
    """One scale and one right factor for gate and up: nothing has to be folded, so not one bit changes."""
    base = moeglot.open(write_checkpoint(tmp_path / "base", f"{family}/{'transformers' if family == 'gpt-oss' else 'hub'}", {"e": 4, "h": 64, "i": 32}))
    path = WRITERS["PEFT"][2](Job(family, 4, 64, 32, 4)).save(tmp_path / "adapter")
    first = {key: tensor.to(dtype) for key, tensor in load_file(path / "adapter_model.safetensors").items()}
    save_file(first, path / "adapter_model.safetensors")
    found = moeglot.open_adapter(path, base, "peft")
    for via in (*STACKED, "tinker", "sglang", *(["unsloth-bnb"] if family == "gpt-oss" else ["per-expert", "automodel"])):
        moeglot.convert_adapter(found, via, tmp_path / via)
        moeglot.convert_adapter(moeglot.open_adapter(tmp_path / via, base), "peft", tmp_path / f"{via}-back")
        back = load_file(tmp_path / f"{via}-back" / "adapter_model.safetensors")
        assert back.keys() == first.keys()
        assert all(back[key].dtype == dtype and torch.equal(back[key], first[key]) for key in first), via


def test_gate_and_up_of_their_own_need_twice_the_rank(tmp_path):
    base = moeglot.open(write_checkpoint(tmp_path / "base", "qwen3-moe/hub", {"e": 4, "h": 64, "i": 32}))
    for writer, rank in (("vLLM's keys", 6), ("ms-swift", 3)):
        folder = tmp_path / writer.replace("'", "")
        found = moeglot.open_adapter(WRITERS[writer][2](Job("qwen3-moe", 4, 64, 32, 3)).save(folder), base)
        done = moeglot.convert_adapter(found, "transformers-5", folder / "peft")
        assert any("side by side" in note for note in done.notes) == (rank == 6)
        back = moeglot.open_adapter(folder / "peft", base)
        assert (back.rank(0, "gate", 0), back.rank(0, "down", 0)) == (rank, 3)
        config = json.loads((folder / "peft" / "adapter_config.json").read_text())
        assert config["moeglot_convention"] == "peft"
        assert config["lora_B_layout"] == "rank_major"
        assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_a_reader_without_patterns_gets_one_rank_and_one_scale(tmp_path):
    base = moeglot.open(write_checkpoint(tmp_path / "base", "gpt-oss/openai", {"e": 4, "h": 64, "i": 64}))
    found = moeglot.open_adapter(WRITERS["tinker"][2](Job("gpt-oss", 4, 64, 64, 3)).save(tmp_path / "adapter"), base)
    for reader, patterns in (("unsloth", {"down_proj": 3}), ("vllm", {})):
        done = moeglot.convert_adapter(found, reader, tmp_path / reader)
        config = json.loads((tmp_path / reader / "adapter_config.json").read_text())
        assert (done.to.name, config["r"], config["rank_pattern"]) == ("peft", 6, patterns)
        assert moeglot.open_adapter(tmp_path / reader, base).rank(1, "down", 2) == (6 if reader == "vllm" else 3)


def test_the_config_names_what_is_adapted_and_nothing_else(tmp_path):
    base = moeglot.open(write_checkpoint(tmp_path / "base", "gpt-oss/transformers", {"e": 4, "h": 64, "i": 32}, layers=3))
    for layers, named in ((3, ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]), (2, None)):
        made = WRITERS["PEFT"][2](Job("gpt-oss", 4, 64, 32, 3, layers=layers))
        made.config["target_parameters"] = [f"layers.{n}.mlp.experts.{which}_proj" for n in range(layers) for which in ("gate_up", "down")]
        found = moeglot.open_adapter(made.save(tmp_path / f"adapter{layers}"), base, "peft")
        assert found.layers == tuple(range(layers))
        moeglot.convert_adapter(found, "grouped", tmp_path / f"grouped{layers}")
        config = json.loads((tmp_path / f"grouped{layers}" / "adapter_config.json").read_text())
        every = [f"model.layers.{n}.mlp.experts.{which}_proj" for n in range(layers) for which in ("down", "gate_up")]
        assert config["target_parameters"] == (named or every)
        moeglot.convert_adapter(found, "unsloth-bnb", tmp_path / f"bnb{layers}")
        targets = json.loads((tmp_path / f"bnb{layers}" / "adapter_config.json").read_text())["target_modules"]
        assert len(targets) == (8 if layers == 3 else 16)
        assert all(("gate_up_projs." in name) or ("down_projs." in name) for name in targets)


QUANTIZED = ["gpt-oss/openai", "gpt-oss/original"]


@pytest.mark.parametrize("base", QUANTIZED)
def test_a_base_in_any_format_names_the_same_modules(base, tmp_path):
    """The adapter speaks of transformers' modules; the base may pack q, k and v in one tensor, and its experts in MXFP4."""
    checkpoint = moeglot.open(write_checkpoint(tmp_path / "base", base, {"e": 4, "h": 64, "i": 64}))
    made = WRITERS["PEFT"][2](Job("gpt-oss", 4, 64, 64, 3))
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.k_proj"
        made.tensors |= {f"{stem}.lora_A.weight": torch.randn(3, 64), f"{stem}.lora_B.weight": torch.randn(32, 3)}
    made.config["target_modules"] = ["k_proj"]
    found = moeglot.open_adapter(made.save(tmp_path / "adapter"), checkpoint, "peft")
    assert list(found.dense) == [f"model.layers.{layer}.self_attn.k_proj" for layer in range(2)]
    for key, change in made.changes.items():
        left, right = found.factors(*key)
        assert float((left.double() @ right.double() - change).norm() / change.norm()) <= 1e-6


def test_factors_for_all_experts_are_kept_or_repeated(tmp_path):
    base = moeglot.open(write_checkpoint(tmp_path / "base", "qwen3-moe/hub", {"e": 4, "h": 64, "i": 32}))
    found = moeglot.open_adapter(WRITERS["SGLang, shared outer"][2](Job("qwen3-moe", 4, 64, 32, 3)).save(tmp_path / "adapter"), base)
    kept = moeglot.convert_adapter(found, "tinker", tmp_path / "tinker")
    assert not any("repeated" in note for note in kept.notes)
    assert load_file(tmp_path / "tinker" / "adapter_model.safetensors")["base_model.model.model.layers.0.mlp.experts.w1.lora_A.weight"].shape[0] == 1
    assert any("repeated 4 times" in note for note in moeglot.convert_adapter(found, "peft", tmp_path / "peft").notes)


WRITTEN = ("experts.w2.lora_B.weight", "k_proj.lora_A.weight", "k_proj.lora_B.bias", "lm_head.weight")


@pytest.mark.parametrize("wrong", WRITTEN)
def test_what_was_written_wrong_is_no_adapter(wrong, tmp_path, monkeypatch):
    """The proof sees each kind of tensor; scales of their own are folded into factors and biases alike."""
    base = moeglot.open(write_checkpoint(tmp_path / "base", "gpt-oss/transformers", {"e": 4, "h": 64, "i": 32}))
    made = WRITERS["tinker"][2](Job("gpt-oss", 4, 64, 32, 3))
    module = "base_model.model.model.layers.1.self_attn.k_proj."
    made.tensors |= {module + "lora_A.weight": torch.randn(3, 64), module + "lora_B.weight": torch.randn(32, 3), module + "lora_B.bias": torch.randn(32)}
    made.tensors["base_model.model.lm_head.weight"] = torch.randn(32, 64)
    made.config |= {"lora_bias": True, "modules_to_save": ["lm_head"], "alpha_pattern": {"k_proj": 2}}
    found = moeglot.open_adapter(made.save(tmp_path / "adapter"), base)
    moeglot.convert_adapter(found, "tinker", tmp_path / "right")
    tensors = adapter_convert._tensors
    monkeypatch.setattr(adapter_convert, "_tensors", lambda plan: ((key, of.roll(1, 0) if key.endswith(wrong) else of) for key, of in tensors(plan)))
    with pytest.raises(NotVerified, match="differ by"):
        moeglot.convert_adapter(found, "tinker", tmp_path / "wrong")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "right"}


def test_a_change_that_is_no_number_is_one_that_differs(tmp_path, monkeypatch):
    """NaN is larger than nothing and smaller than nothing, so that a maximum of others hides it. A bias that is NaN is told as such."""
    base = moeglot.open(write_checkpoint(tmp_path / "base", "qwen3-moe/hub", {"e": 4, "h": 64, "i": 32}))
    made = WRITERS["tinker"][2](Job("qwen3-moe", 4, 64, 32, 3))
    module = "base_model.model.model.layers.1.self_attn.k_proj."
    made.tensors |= {module + "lora_A.weight": torch.randn(3, 64), module + "lora_B.weight": torch.randn(32, 3)}
    with monkeypatch.context() as patched:
        patched.setattr(adapter_convert, "changes", lambda a, b: iter((0.0, float("nan"), 1e-9)))
        with pytest.raises(NotVerified, match="differ by nan"):
            moeglot.convert_adapter(moeglot.open_adapter(made.save(tmp_path / "adapter"), base), "tinker", tmp_path / "out")
    made.tensors[module + "lora_B.bias"] = torch.full((32,), float("nan"))
    made.config["lora_bias"] = True
    with pytest.raises(BadNumbers, match=r"k_proj: the bias .* is not finite"):
        moeglot.convert_adapter(moeglot.open_adapter(made.save(tmp_path / "biased"), base), "tinker", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_one_of_two_adapters_lacks_is_a_difference(tmp_path):
    base = moeglot.open(write_checkpoint(tmp_path / "base", "gpt-oss/transformers", {"e": 4, "h": 64, "i": 32}))
    made = WRITERS["tinker"][2](Job("gpt-oss", 4, 64, 32, 3))
    module = "base_model.model.model.layers.1.self_attn.k_proj."
    made.tensors |= {module + "lora_A.weight": torch.randn(3, 64), module + "lora_B.weight": torch.randn(32, 3), module + "lora_B.bias": torch.randn(32)}
    made.tensors["base_model.model.lm_head.weight"] = torch.randn(32, 64)
    made.config |= {"lora_bias": True, "modules_to_save": ["lm_head"]}
    found = moeglot.open_adapter(made.save(tmp_path / "adapter"), base)
    assert max(changes(found, found)) <= LIMIT
    unbiased = replace(found, dense={name: replace(module, bias_entry=None) for name, module in found.dense.items()})
    lacking = [(found, unbiased), (unbiased, replace(found, dense={})), (found, replace(found, pairs={})), (found, replace(found, replaced={}))]
    for more, less in lacking:
        assert max(changes(more, less)) >= 1
        assert max(changes(less, more)) >= 1


def test_the_difference_of_two_changes():
    left, right = torch.randn(8, 3), torch.randn(3, 5)
    assert difference((left, right), (left * 2, right / 2)) < 1e-6
    wrong = difference((left, right), (left, right.flip(0)))
    assert wrong > 0.1
    expected = float((left @ right - left @ right.flip(0)).norm() / (left @ right).norm())
    assert wrong == pytest.approx(expected, rel=1e-5)
    zero = (torch.zeros(8, 1), torch.zeros(1, 5))
    assert difference(zero, zero) == 0
    assert difference(zero, (left, right)) == float("inf")


def test_columns_cluster_by_expert():
    """Experts that were trained more have larger columns; the reading that puts their columns together explains more of the variance."""
    e, r = 8, 4
    torch.manual_seed(0)
    size = torch.randn(e).exp()
    grouped = torch.randn(64, e, r) * size[:, None]
    rank_major = torch.randn(64, r, e) * size
    assert cluster([grouped.flatten(1)], e).better == "grouped"
    assert cluster([rank_major.flatten(1)], e).better == "rank-major"
    assert cluster([rank_major.flatten(1)], e).margin > 0.5
    assert cluster([rank_major.flatten(1)], e).margin > cluster([rank_major.flatten(1)], e).chance
    noise = [cluster([torch.randn(64, e * r) for _ in range(4)], e) for _ in range(200)]
    assert sum(found.margin > found.chance for found in noise) <= 3
    assert max(found.margin for found in noise) > noise[0].chance / 3, "the bound must not be idle"
    assert "cannot tell" in str(noise[0])
    assert cluster([torch.zeros(64, e * r)], e) is None
    assert cluster([torch.randn(64, e)], e) is None


@pytest.mark.parametrize(("e", "r"), [(4, 4), (8, 4), (2, 16), (32, 2)])
@pytest.mark.parametrize("tensors", [1, 9])
def test_what_chance_gives_is_what_is_said_of_it(e, r, tensors):
    """For columns of no order the difference of both shares has a third of what is stated as its standard deviation, whatever the sizes and however many."""
    random = torch.Generator().manual_seed(e * r + tensors)
    found = [cluster([torch.randn(64, e * r, generator=random) for _ in range(tensors)], e) for _ in range(300)]
    spread = torch.tensor([one.rank_major - one.grouped for one in found]).std()
    stated = found[0].chance / 3
    assert 0.8 < float(spread) / stated < 1.25
    assert {one.chance for one in found} == {found[0].chance}


def test_one_that_lies_otherwise_is_counted():
    """Norms of experts that differ, in eight tensors by rank and in one by expert; in what dtype, and with how many rows, is the same."""
    e, r = 8, 4
    loud = torch.exp(torch.randn(e, generator=torch.Generator().manual_seed(1)))
    noise = torch.randn(16, e, r, generator=torch.Generator().manual_seed(2))
    grouped = (noise * loud[:, None]).flatten(1)
    rank_major = (noise * loud[:, None]).transpose(1, 2).flatten(1)
    for major, fewer in ((rank_major, grouped), (grouped, rank_major)):
        found = cluster([*[major] * 8, fewer], e)
        assert (found.agreed, found.tensors, found.better) == (8, 9, "rank-major" if major is rank_major else "grouped")
        assert found.json()["agreed"] == 8
        assert f"{found.better} on 8 of 9 tensors" in str(found)
    half = cluster([grouped.half()], e)
    assert half.grouped == pytest.approx(cluster([grouped], e).grouped, abs=1e-3)
    assert cluster([grouped * 1e-4], e).grouped == pytest.approx(cluster([grouped], e).grouped, abs=1e-3)  # how large they are says nothing
    dead = grouped.clone()
    dead[:, 5] = 0
    assert cluster([dead], e) is None  # a column of zeros has no size
    assert cluster([torch.randn(64, r)], 1) is None
    assert cluster([torch.full((64, e * r), float("inf"))], e) is None
    alike = cluster([torch.ones(64, e * r)], e)
    assert alike is None or "cannot tell" in str(alike)
    outlier = grouped.clone()
    outlier[:, 9] *= 1e3
    found = cluster([outlier], e)
    assert found.better == "grouped"
    assert found.margin > 0.1

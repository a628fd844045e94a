"""Real PEFT, whichever is installed, on whichever transformers: our factors are the change that it applies, and what we convert it loads and applies."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from reading import relative
from safetensors.torch import load_file
from small_models import logits, model_of

import moeglot
from moeglot.adapters.proof import changes
from moeglot.conventions import CONVENTIONS

peft = pytest.importorskip("peft")
LoraConfig, PeftModel, get_peft_model = peft.LoraConfig, peft.PeftModel, peft.get_peft_model

LIMIT = 1e-5
FAMILIES = ("gpt-oss", "qwen3-moe", "mixtral")
SIZES = {"square": (4, 32, 32, 3), "h=2i": (4, 64, 32, 3), "r=e": (4, 32, 48, 4), "neither": (3, 48, 32, 5)}
"""e, h, i and the rank."""
FUSED = int(transformers.__version__.split(".")[0]) >= 5
SWAPS = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 19)


def written_by_this_cell(family: str) -> str:
    """The convention that this PEFT writes on this transformers."""
    if family == "gpt-oss":
        return "peft" if FUSED or not SWAPS else "peft-turned"
    if not FUSED:
        return "per-expert"
    return "peft" if SWAPS else "peft-turned"


READERS = {
    (True, True): "transformers-5",
    (False, True): "transformers-4.57",
    (True, False): "peft-0.18-transformers-5",
    (False, False): "peft-0.18-transformers-4.57",
}
READER = READERS[FUSED, SWAPS]


def targets(family: str) -> dict:
    attention = ["q_proj", "o_proj"]
    if family == "gpt-oss" or FUSED:
        return {"target_modules": attention, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    return {"target_modules": attention + (["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"])}


@dataclass
class Trained:
    """A base and an adapter on disk, and what PEFT computes with both."""

    family: str
    base: Path
    adapter: Path
    sizes: tuple[int, ...]
    live: torch.Tensor
    model: torch.nn.Module

    def plain(self) -> torch.nn.Module:
        return model_of(self.family, *self.sizes)


def train(tmp_path: Path, family: str, size: tuple[int, ...], **options) -> Trained:
    *sizes, rank = size
    model = model_of(family, *sizes)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(**{"r": rank, "lora_alpha": 2 * rank + 1, **targets(family), **options}))
    torch.manual_seed(sum(size))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    return Trained(family, tmp_path / "base", tmp_path / "adapter", tuple(sizes), logits(wrapped.eval()), wrapped)


@pytest.fixture(params=itertools.product(FAMILIES, SIZES), ids="-".join)
def trained(request, tmp_path):
    family, size = request.param
    return train(tmp_path, family, SIZES[size])


def matrices(model: torch.nn.Module, family: str, layer: int) -> dict[tuple[str, int], torch.Tensor]:
    """(role, expert) -> [out, in] as views of a live model, by its modules' own axes, written down here and nowhere else."""
    block = model.model.layers[layer]
    experts = block.block_sparse_moe.experts if hasattr(block, "block_sparse_moe") else block.mlp.experts
    found = {}
    if isinstance(experts, torch.nn.ModuleList):
        names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        return {(role, e): getattr(expert, name).weight for e, expert in enumerate(experts) for role, name in zip(("gate", "up", "down"), names, strict=True)}
    for e in range(len(experts.down_proj)):
        both, down = experts.gate_up_proj[e], experts.down_proj[e]
        if family == "gpt-oss":
            found |= {("gate", e): both[:, 0::2].T, ("up", e): both[:, 1::2].T, ("down", e): down.T}
        else:
            found |= {("gate", e): both[: len(both) // 2], ("up", e): both[len(both) // 2 :], ("down", e): down}
    return found


@torch.no_grad()
def worst_against_merge(adapter: moeglot.Adapter, merged: torch.nn.Module, plain: torch.nn.Module, family: str) -> float:
    worst = 0.0
    for layer in adapter.layers:
        after, before = matrices(merged, family, layer), matrices(plain, family, layer)
        for role, expert in before:
            left, right = adapter.factors(layer, role, expert)
            change = after[role, expert].double() - before[role, expert].double()
            worst = max(worst, relative(left.double() @ right.double(), change))
    return worst


@torch.no_grad()
def apply(adapter: moeglot.Adapter, model: torch.nn.Module, family: str) -> torch.nn.Module:
    """Our factors added to the weights of a live model without PEFT."""
    for name, replaced in adapter.replaced.items():
        model.get_parameter(name).copy_(replaced.entry.read())
    for layer in adapter.layers:
        for (role, expert), weight in matrices(model, family, layer).items():
            left, right = adapter.factors(layer, role, expert)
            weight += left @ right
    for name, dense in adapter.dense.items():
        left, right = dense.factors()
        model.get_submodule(name).weight += left @ right
        if dense.bias() is not None:
            model.get_submodule(name).bias += dense.bias()
    return model


def test_our_factors_are_the_change_that_it_applies(trained):
    convention = written_by_this_cell(trained.family)
    adapter = moeglot.open_adapter(trained.adapter, trained.base, convention)
    assert adapter.convention.name == convention
    assert relative(logits(apply(adapter, trained.plain(), trained.family)), trained.live) <= LIMIT
    names = [name for name, _ in trained.model.named_modules()]
    merged, plain = trained.model.merge_and_unload(), trained.plain()
    assert worst_against_merge(adapter, merged, plain, trained.family) <= LIMIT
    for name, dense in adapter.dense.items():
        left, right = dense.factors()
        assert relative(left @ right, merged.get_submodule(name).weight - plain.get_submodule(name).weight) <= LIMIT
    assert len(adapter.dense) == sum(name.endswith("lora_A") and "experts" not in name for name in names)


def test_a_merged_checkpoint_computes_what_it_computes_live(trained, tmp_path):
    """`merge` into the base's own float32, read by transformers alone; with every other reading of the adapter it does not."""
    merged = {}
    for reading in dict.fromkeys((written_by_this_cell(trained.family), "peft", "peft-turned", "grouped", "grouped-turned")):
        try:
            adapter = moeglot.open_adapter(trained.adapter, trained.base, reading)
        except moeglot.MoeglotError:
            continue
        certificate = moeglot.merge(adapter.base, adapter, tmp_path / reading)
        assert certificate.report.verdict == "holds"
        assert {round(one["rec"], 5) for one in certificate.document["merge"]["survived"].values()} == {1}
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / reading, dtype=torch.float32, attn_implementation="eager")
        merged[reading] = relative(logits(model.eval()), trained.live)
    assert merged.pop(written_by_this_cell(trained.family)) <= LIMIT
    assert all(other >= 100 * LIMIT for other in merged.values())


def test_every_other_reading_is_refused_or_far_off(trained):
    convention = written_by_this_cell(trained.family)
    merged, plain, far = trained.model.merge_and_unload(), trained.plain(), []
    for other in CONVENTIONS:
        if other.name == convention:
            continue
        try:
            adapter = moeglot.open_adapter(trained.adapter, trained.base, other.name)
        except moeglot.MoeglotError:
            continue
        far.append(other.name)
        assert worst_against_merge(adapter, merged, plain, trained.family) >= 100 * LIMIT
    assert far or convention == "per-expert"


def test_without_a_word_it_is_refused_or_read_as_written(trained):
    """Names alone tell an adapter with one module an expert; the packing of stacked ones they do not."""
    convention = written_by_this_cell(trained.family)
    if convention == "per-expert":
        assert moeglot.open_adapter(trained.adapter, trained.base).convention.name == convention
        return
    with pytest.raises(moeglot.AmbiguousConvention) as refused:
        moeglot.open_adapter(trained.adapter, trained.base)
    assert convention in refused.value.wrong.split()


BROKEN = peft.__version__ == "0.19.1" and transformers.__version__ == "5.23.0"
"""PEFT 0.19.1 cannot load any adapter of Qwen3-MoE or Mixtral, its own included, on transformers 5.23.0."""


def load(trained: Trained, path: Path) -> torch.nn.Module:
    """By PEFT alone; not one key missing or unexpected."""
    if BROKEN and trained.family != "gpt-oss":
        with pytest.raises(TypeError, match=r"WeightConverter.__init__\(\) got an unexpected keyword argument 'distributed_operation'"):
            PeftModel.from_pretrained(trained.plain(), trained.adapter)
        return load_into_its_modules(trained, path)
    model = PeftModel.from_pretrained(trained.plain(), path)
    result = model.load_adapter(path, "default")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model.eval()


def load_into_its_modules(trained: Trained, path: Path) -> torch.nn.Module:
    """PEFT's modules as its own config makes them, filled by torch."""
    model = get_peft_model(trained.plain(), LoraConfig.from_pretrained(path))
    tensors = load_file(path / "adapter_model.safetensors")
    result = model.load_state_dict({key.removesuffix(".weight") + ".default.weight": tensor for key, tensor in tensors.items()}, strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model.eval()


VIA = ("peft", "peft-turned", "grouped", "grouped-turned", "per-expert", "unsloth-bnb", "tinker", "sglang", "automodel")


def test_what_we_convert_it_loads_and_applies(trained, tmp_path):
    """Out of every convention that the family has, into the one that this cell reads."""
    source = moeglot.open_adapter(trained.adapter, trained.base, written_by_this_cell(trained.family))
    tried = []
    for via in VIA:
        try:
            moeglot.convert_adapter(source, via, tmp_path / via)
        except moeglot.AdapterError:
            continue
        between = moeglot.open_adapter(tmp_path / via, trained.base)
        assert between.convention.name == via
        assert max(changes(source, between)) <= 1e-6
        done = moeglot.convert_adapter(between, READER, tmp_path / f"{via}-back")
        assert done.to.name == written_by_this_cell(trained.family)
        assert relative(logits(load(trained, tmp_path / f"{via}-back")), trained.live) <= LIMIT
        tried.append(via)
    assert {"peft", "peft-turned", "grouped", "grouped-turned", "tinker", "sglang"} <= set(tried)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_and_rslora(family, tmp_path):
    """Ranks and alphas of their own, and a scale of alpha / √r."""
    special = "down_proj" if family != "mixtral" or FUSED else "w2"
    for n, options in enumerate(({"rank_pattern": {special: 2}, "alpha_pattern": {special: 5, "q_proj": 3}}, {"use_rslora": True})):
        trained = train(tmp_path / str(n), family, SIZES["neither"], **options)
        adapter = moeglot.open_adapter(trained.adapter, trained.base, written_by_this_cell(family))
        assert adapter.rank(adapter.layers[0], "down", 0) == (5 if n else 2)
        assert relative(logits(apply(adapter, trained.plain(), family)), trained.live) <= LIMIT
        moeglot.convert_adapter(adapter, "sglang", tmp_path / f"{n}-sglang")
        moeglot.convert_adapter(moeglot.open_adapter(tmp_path / f"{n}-sglang", trained.base), READER, tmp_path / f"{n}-back")
        assert relative(logits(load(trained, tmp_path / f"{n}-back")), trained.live) <= LIMIT
        moeglot.convert_adapter(adapter, READER, tmp_path / f"{n}-same")
        assert relative(logits(load(trained, tmp_path / f"{n}-same")), trained.live) <= LIMIT


@pytest.mark.parametrize(
    "only", [{"layers_to_transform": [0, 2]}, {"layers_to_transform": 1}, {"layers_to_transform": [1], "layers_pattern": "layers"}], ids=str
)
def test_some_layers(only, tmp_path):
    """Where each expert is a module, PEFT before 0.20 takes the experts' numbers for the layers', if no pattern says which number is meant."""
    trained = train(tmp_path, "qwen3-moe", SIZES["neither"], **only)
    assert relative(logits(trained.plain()), trained.live) > 100 * LIMIT
    adapter = moeglot.open_adapter(trained.adapter, trained.base, written_by_this_cell("qwen3-moe"))
    assert relative(logits(apply(adapter, trained.plain(), "qwen3-moe")), trained.live) <= LIMIT


@pytest.mark.skipif(not FUSED or not SWAPS or BROKEN, reason="only PEFT >= 0.19 on transformers 5 joins the modules of an adapter from transformers 4")
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_an_adapter_of_transformers_4_that_it_joins(family, tmp_path):
    """It loads one module an expert, puts gate and up side by side and saves that; both files are one change."""
    trained = train(tmp_path, family, SIZES["neither"])
    source = moeglot.open_adapter(trained.adapter, trained.base, "peft")
    moeglot.convert_adapter(source, "per-expert", tmp_path / "v4")
    joined = load(trained, tmp_path / "v4")
    assert relative(logits(joined), trained.live) <= LIMIT
    joined.save_pretrained(tmp_path / "joined")
    found = moeglot.open_adapter(tmp_path / "joined", trained.base)
    assert found.convention.name == "peft"
    assert any("rank_pattern" in reason for reason in found.evidence)
    assert {found.rank(layer, "gate", 0) for layer in found.layers} == {2 * SIZES["neither"][3]}
    assert max(changes(source, found)) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_one_of_two_parameters(family, tmp_path):
    """With one target, the key names neither of them; target_parameters does."""
    if not FUSED and family != "gpt-oss":
        pytest.skip("transformers 4 has a module for each expert")
    for only, roles in (("down_proj", ("down",)), ("gate_up_proj", ("gate", "up"))):
        trained = train(tmp_path / only, family, SIZES["neither"], target_parameters=[f"mlp.experts.{only}"])
        adapter = moeglot.open_adapter(trained.adapter, trained.base, written_by_this_cell(family))
        assert {adapter.roles(layer) for layer in adapter.layers} == {roles}
        assert relative(logits(apply(adapter, trained.plain(), family)), trained.live) <= LIMIT
        moeglot.convert_adapter(adapter, READER, tmp_path / f"{only}-back")
        assert relative(logits(load(trained, tmp_path / f"{only}-back")), trained.live) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_adapter(family, tmp_path):
    """From PEFT's own start (B is zero, so the change is) and after real steps; by then the columns of lora_B tell how they are packed."""
    convention, size = written_by_this_cell(family), (8, 32, 64)
    model = model_of(family, *size)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **targets(family)))
    trained = Trained(family, tmp_path / "base", tmp_path / "start", size, logits(wrapped), wrapped)
    wrapped.save_pretrained(tmp_path / "start")
    start = moeglot.open_adapter(tmp_path / "start", tmp_path / "base", convention)
    assert start.clustering is None
    assert all(float((left @ right).abs().max()) == 0 for left, right in (start.factors(*key) for key in start.pairs))
    moeglot.convert_adapter(start, READER, tmp_path / "start-back")
    assert relative(logits(load(trained, tmp_path / "start-back")), trained.live) <= LIMIT

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        tokens = torch.randint(0, 96, (4, 12)) // 3
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = moeglot.open_adapter(tmp_path / "adapter", tmp_path / "base", convention)
    live = logits(wrapped)
    assert relative(live, trained.live) > 100 * LIMIT
    assert relative(logits(apply(adapter, trained.plain(), family)), live) <= LIMIT
    if convention != "per-expert":
        assert adapter.clustering.better == "rank-major"


def test_what_is_no_expert(tmp_path):
    """Attention with biases of its own, an embedding, a head that was trained as a whole; no expert."""
    options = {"target_modules": ["q_proj", "embed_tokens"], "target_parameters": None, "modules_to_save": ["lm_head"]}
    for n, more in enumerate(({}, {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]})):
        trained = train(tmp_path / str(n), "gpt-oss", SIZES["neither"], **{**options, **more})
        with torch.no_grad():
            trained.model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").mul_(1.5)
        trained.model.save_pretrained(trained.adapter)
        live = logits(trained.model)
        adapter = moeglot.open_adapter(trained.adapter, trained.base)
        assert adapter.convention is None
        assert not adapter.layers
        assert set(adapter.replaced) == {"lm_head.weight"} | ({"model.embed_tokens.weight"} if not more else set())  # PEFT adds a copy of the base's
        assert relative(logits(apply(adapter, trained.plain(), "gpt-oss")), live) <= LIMIT
        moeglot.convert_adapter(adapter, READER, tmp_path / f"{n}-back")
        assert relative(logits(load(trained, tmp_path / f"{n}-back")), live) <= LIMIT

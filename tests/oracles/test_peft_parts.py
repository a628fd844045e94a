"""Adapters of real PEFT beside the experts' factors: embeddings, routers, dense layers, norms; and what is missing of them is never overlooked."""

import json
import shutil

import pytest
import torch
import transformers
from reading import relative
from safetensors.torch import load_file, save_file
from small_models import config_of, logits

import moeglot
from moeglot.errors import HalfAdapter, UnsupportedAdapter
from moeglot.integrations.transformers import VERSION
from moeglot.nn import add_lora, load_adapter, save_adapter

peft = pytest.importorskip("peft")
if VERSION < (5, 0):
    pytest.skip("transformers 4 has a module for each expert; tests/oracles/test_peft.py has those", allow_module_level=True)

LIMIT, POWER = 1e-5, 5e-2
OLD = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21)
ATTENTION, EXPERTS = ["q_proj", "o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = "mlp.gate.weight"
DENSE = [f"layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
OPTIONS = {
    "attention": {},
    "router": {"target_parameters": [*EXPERTS, ROUTER]},
    "router, scaled by its parameter's name": {"target_parameters": [*EXPERTS, ROUTER], "alpha_pattern": {"gate.weight": 11, "gate": 5}},
    "dense layer": {"target_parameters": [*EXPERTS, *DENSE], "rank_pattern": {"layers.1.mlp.up_proj.weight": 2}},
    "embeddings": {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
    "router as a whole": {"modules_to_save": ["gate"]},
    "router as a whole, and no attention": {"target_modules": [], "modules_to_save": ["gate"]},
    "all norms": {"modules_to_save": ["norm"]},
    "attention as a whole": {"target_modules": ["lm_head"], "modules_to_save": ["self_attn"]},
    "embeddings as a whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


NEW = ("router as a whole, and no attention", "attention as a whole")
"""What PEFT 0.19 itself refuses: no target but modules_to_save, and a module there that is asked with names alone."""


def skip_what_it_refuses(options):
    if OLD and options in NEW:
        pytest.skip(f"PEFT {peft.__version__} itself refuses it")


def model_of(**options):
    """Qwen3-MoE of three layers, the second of them dense."""
    torch.manual_seed(5)
    config = config_of("qwen3-moe", 4, 48, 32)
    for name, value in {"num_hidden_layers": 3, "mlp_only_layers": [1], **options}.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
    return model


def fill(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def trained(folder, save=None, **options):
    """Base and adapter in a folder, and what PEFT computes."""
    model = model_of()
    model.save_pretrained(folder / "base")
    before = logits(model)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ATTENTION, "target_parameters": EXPERTS, **options})
    wrapped = fill(peft.get_peft_model(model, config))
    wrapped.save_pretrained(folder / "adapter", **(save or {}))
    live = logits(wrapped)
    assert relative(before, live) > POWER
    return live


def opened(folder, name="adapter"):
    return moeglot.open_adapter(folder / name, folder / "base", convention="peft")


def by_stock(folder, name="adapter"):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(base, folder / name).eval())


@pytest.mark.parametrize("options", OPTIONS)
def test_merged_loaded_and_converted(options, tmp_path):
    """Merged into the base, put on encoded experts, and written for this reader from names of single experts: PEFT's own logits each time."""
    skip_what_it_refuses(options)
    live = trained(tmp_path, **OPTIONS[options])
    adapter = opened(tmp_path)
    moeglot.merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert relative(logits(moeglot.load(tmp_path / "merged", "float32")), live) <= LIMIT
    native = load_adapter(moeglot.load(tmp_path / "base", "float32", native=True), tmp_path / "adapter", convention="peft")
    assert relative(logits(native.eval()), live) <= LIMIT
    moeglot.convert_adapter(adapter, "per-expert", tmp_path / "each")
    moeglot.convert_adapter(moeglot.open_adapter(tmp_path / "each", tmp_path / "base"), "transformers-5", tmp_path / "back")
    assert relative(by_stock(tmp_path, "back"), live) <= LIMIT


@pytest.mark.parametrize("options", [name for name in OPTIONS if name not in ("dense layer",)])
def test_saved_from_a_native_model(options, tmp_path):
    skip_what_it_refuses(options)
    model_of().save_pretrained(tmp_path / "base")
    native = moeglot.load(tmp_path / "base", "float32", native=True)
    others = {name: value for name, value in OPTIONS[options].items() if name != "target_parameters"}
    others["target_parameters"] = [name for name in OPTIONS[options].get("target_parameters", ()) if name not in EXPERTS] or None
    wanted = {"target_modules": ATTENTION, **others}
    if not wanted["target_modules"] and not wanted["target_parameters"]:
        wanted["target_modules"] = "dummy-target-modules"
    model = peft.get_peft_model(native, peft.LoraConfig(r=3, lora_alpha=7, **wanted))
    add_lora(model, r=2, alpha=3)
    live = logits(fill(model))
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert relative(by_stock(tmp_path), live) <= LIMIT


def test_a_copy_of_the_base_in_another_type_is_no_change(tmp_path):
    """PEFT writes a trained embedding under two names, and the base's own, which sorts last where it is of fewer bits, under a third."""
    live = trained(tmp_path, save={"save_embedding_layers": True}, **OPTIONS["embeddings as a whole"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.original_module.weight"] = base[f"{name}.weight"].bfloat16()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    moeglot.merge(tmp_path / "base", opened(tmp_path), tmp_path / "merged")
    assert relative(logits(moeglot.load(tmp_path / "merged", "float32")), live) <= LIMIT
    tensors["base_model.model.lm_head.modules_to_save.weight"] = 2 * tensors["base_model.model.lm_head.weight"]
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(HalfAdapter, match="two changes of one tensor"):
        opened(tmp_path)


MISSING = {
    "one router": ("router as a whole", "layers.2.mlp.gate"),
    "every router": ("router as a whole", "mlp.gate"),
    "the output": ("embeddings as a whole", "lm_head"),
    "a router's factors": ("router", "layers.2.mlp.gate"),
    "a norm": ("all norms", "layers.1.input_layernorm"),
    "a dense matrix": ("dense layer", "mlp.up_proj"),
}


@pytest.mark.parametrize("case", MISSING)
def test_half_an_adapter(case, tmp_path):
    options, gone = MISSING[case]
    trained(tmp_path, **OPTIONS[options])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(kept := {name: tensor for name, tensor in tensors.items() if f"{gone}." not in name}, path)
    assert len(kept) < len(tensors)
    with pytest.raises(HalfAdapter, match="says that it is"):
        opened(tmp_path)


@pytest.mark.parametrize("biases", ["all", "lora_only", "of factors"])
def test_half_of_the_biases(biases, tmp_path):
    torch.manual_seed(1)
    config = config_of("gpt-oss", 4, 48, 32)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    options = {"lora_bias": True} if biases == "of factors" else {"bias": biases}
    fill(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION, **options))).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "experts" not in name and "router" not in name}
    wanted = {name for name in tensors if name.endswith("bias") and "layers.1.self_attn.q_proj" in name}
    if not wanted:
        pytest.skip(f"PEFT {peft.__version__} itself saves no biases under {biases}")
    save_file({name: tensor for name, tensor in tensors.items() if name not in wanted}, path)
    assert wanted
    with pytest.raises(HalfAdapter, match="says that it is trained"):
        moeglot.open_adapter(tmp_path / "adapter", tmp_path / "base")


@pytest.mark.parametrize("options", ["embeddings", "embeddings as a whole"])
def test_embeddings_that_are_one_tensor_though_nothing_says_so(options, tmp_path):
    """transformers leaves out of config.json what is a model's default."""
    model = model_of(tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    given = {"target_modules": [*ATTENTION, "embed_tokens"]} if options == "embeddings" else {"modules_to_save": ["embed_tokens"], "target_modules": ATTENTION}
    fill(peft.get_peft_model(model, peft.LoraConfig(r=2, **given))).save_pretrained(tmp_path / "adapter")
    adapter = moeglot.open_adapter(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(UnsupportedAdapter, match="one tensor"):
        moeglot.merge(tmp_path / "base", adapter, tmp_path / "merged")


@pytest.mark.parametrize("given", [{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {"target_modules": ["embed_tokens", "lm_head"]}])
def test_what_changes_both_uses_of_one_tensor_is_refused(given, tmp_path):
    """PEFT then has two names for one tensor; before it trains where the config says so, else before anything is left behind."""
    model_of(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    native = moeglot.load(tmp_path / "base", "float32", native=True)
    model = peft.get_peft_model(native, peft.LoraConfig(r=2, **{"target_modules": ATTENTION, **given}))
    if "modules_to_save" in given:
        with pytest.raises(UnsupportedAdapter, match="ensure_weight_tying"):
            add_lora(model, r=2)
        return
    add_lora(model, r=2)
    with pytest.raises(HalfAdapter, match="one tensor"):
        save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert not list(tmp_path.glob("adapter*"))


def test_biases_of_factors_are_no_part_of_a_folder_with_experts(tmp_path):
    model_of().save_pretrained(tmp_path / "base")
    native = moeglot.load(tmp_path / "base", "float32", native=True)
    model = peft.get_peft_model(native, peft.LoraConfig(r=2, target_modules=ATTENTION, lora_bias=True))
    with pytest.raises(UnsupportedAdapter, match="lora_bias"):
        add_lora(model, r=2)


def test_the_last_adapter_beside_a_trainers_checkpoints(tmp_path):
    live = trained(tmp_path)
    shutil.copytree(tmp_path / "adapter", tmp_path / "adapter" / "checkpoint-10")
    moeglot.merge(tmp_path / "base", opened(tmp_path), tmp_path / "merged")
    assert relative(logits(moeglot.load(tmp_path / "merged", "float32")), live) <= LIMIT

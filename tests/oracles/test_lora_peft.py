"""One PEFT folder for attention (PEFT's own LoRA) and encoded experts (ours): stock PEFT loads it on the dense model and computes the same."""

import json

import pytest
import torch
import transformers
from devices import DEVICE
from reading import relative
from small_models import logits, model_of
from test_peft import READER, READERS

import moeglot
from moeglot.conventions import target
from moeglot.errors import AdapterError, HalfAdapter, NotVerified, OutputExists, UsageError
from moeglot.factors import stacked_form
from moeglot.integrations.transformers import VERSION
from moeglot.nn import adapters, add_lora, experts_of, load_adapter, remove_lora, save_adapter

peft = pytest.importorskip("peft")

LIMIT, POWER = 1e-5, 1e-2
SIZES = {"square": (4, 64, 64), "h=2i": (4, 64, 32), "neither": (4, 64, 96)}
BASES = {
    "gpt-oss": ("openai", "transformers"),
    "qwen3-moe": ("hub", "hub+fp8-block", "transformers-5+nf4") if VERSION >= (5, 0) else (),
    "mixtral": ("hub+mxfp4-pack",) if VERSION >= (5, 0) else (),
}
CELLS = [(family, to, size) for family, forms in BASES.items() for to in forms for size in SIZES]


def base_of(family, to, size, folder):
    model_of(family, *SIZES[size]).save_pretrained(folder / "saved")
    moeglot.convert(folder / "saved", f"{family}/{to}", folder / "base", allow_loss=True)
    return folder / "base"


def adapted(folder, attention=True, **options):
    """A native model with both kinds of LoRA, their factors random."""
    model = moeglot.load(folder, "float32", DEVICE, native=True)
    if attention:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"]))
    add_lora(model, **{"r": 3, "alpha": 7, **options})
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    for module in experts_of(model).values():
        for lora in module.adapters.values():
            if lora.targets != lora.roles:
                with torch.no_grad():
                    for n, role in enumerate(lora.roles):
                        lora.b.view(len(lora.b), len(lora.roles), -1, lora.rank)[:, n] *= role in lora.targets
    return model.eval()


@pytest.mark.parametrize(("family", "to", "size"), CELLS, ids=lambda value: str(value))
def test_stock_peft_computes_the_same_on_the_dense_model(family, to, size, tmp_path):
    folder = base_of(family, to, size, tmp_path)
    model = adapted(folder)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", to=READER, base=folder)
    dense = moeglot.load(folder, "float32", DEVICE)
    before = logits(dense)
    assert relative(before, expected) > POWER
    again = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
    assert relative(logits(again), expected) <= LIMIT
    native = load_adapter(moeglot.load(folder, "float32", DEVICE, native=True), tmp_path / "adapter").eval()
    assert relative(logits(native), expected) <= LIMIT


@pytest.mark.skipif(VERSION < (5, 23), reason="older releases hand PEFT no adapter of parameters")
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("to", ["gpt-oss/transformers", "qwen3-moe/hub"])
def test_stock_auto_classes_find_the_base(to, attention, tmp_path, monkeypatch):
    """By what adapter_config.json says alone, and without asking the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = base_of(*to.split("/"), "neither", tmp_path)
    model = adapted(folder, attention)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["inference_mode"], said["task_type"]) == (str(folder), True, "CAUSAL_LM")
    for auto in (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        found = auto.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
        assert not any(parameter.requires_grad for name, parameter in found.named_parameters() if "lora" in name), auto
        assert relative(logits(found), expected) <= LIMIT, auto


def test_an_adapter_of_a_classifier(tmp_path):
    """Stock PEFT wraps it as a model of no task: as one that generates it cannot, and as a classifier it wants a head in the adapter."""
    config = model_of("gpt-oss", *SIZES["neither"]).config
    config.pad_token_id = 0
    transformers.GptOssForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", attention=False)
    save_adapter(model, tmp_path / "adapter", to=READER)
    dense = moeglot.load(tmp_path / "base", dtype="float32")
    assert relative(logits(peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()), logits(model)) <= LIMIT


@pytest.mark.parametrize("targets", [("gate",), ("up",), ("down",), ("up", "down")], ids="-".join)
def test_some_targets(targets, tmp_path):
    folder = base_of("gpt-oss", "openai", "h=2i", tmp_path)
    model = adapted(folder, attention=False, targets=targets)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", to=READER)
    again = peft.PeftModel.from_pretrained(moeglot.load(folder, dtype="float32"), tmp_path / "adapter").eval()
    assert relative(logits(again), expected) <= LIMIT


def test_any_convention_is_put_on_encoded_experts(tmp_path):
    folder = base_of("gpt-oss", "openai", "neither", tmp_path)
    model = adapted(folder)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    adapter = moeglot.open_adapter(tmp_path / "adapter", folder)
    for reader in {*READERS.values(), "tinker", "sglang", "grouped"}:
        moeglot.convert_adapter(adapter, reader, tmp_path / reader)
        plain = moeglot.load(folder, dtype="float32", native=True)
        again = load_adapter(plain, tmp_path / reader, convention=target(reader, stacked_form(adapter.base.format.family))[0].name).eval()
        assert relative(logits(again), expected) <= LIMIT, reader


def test_what_was_saved_wrong_is_no_adapter(tmp_path, monkeypatch):
    folder = base_of("gpt-oss", "openai", "neither", tmp_path)
    model = adapted(folder, attention=False)
    (tmp_path / "adapter.peft.partial").mkdir()  # somebody else's
    lay = adapters.lay
    monkeypatch.setattr(adapters, "lay", lambda *given: [tensor.roll(1, 0) for tensor in lay(*given)])
    with pytest.raises(NotVerified, match="is off by"):
        save_adapter(model, tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "base", "adapter.peft.partial"}


def test_what_is_not_saved_or_loaded(tmp_path):
    folder = base_of("gpt-oss", "openai", "neither", tmp_path)
    plain = moeglot.load(folder, dtype="float32", native=True)
    with pytest.raises(AdapterError, match="no expert has an adapter"):
        save_adapter(plain, tmp_path / "adapter")
    model = adapted(folder, attention=False)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(OutputExists):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UsageError, match="has an adapter"):
        load_adapter(model, tmp_path / "adapter")
    with pytest.raises(UsageError, match="native=True"):
        load_adapter(moeglot.load(folder, dtype="float32"), tmp_path / "adapter")
    some = moeglot.load(folder, dtype="float32", native=True)
    some.model.layers[1].mlp.experts = torch.nn.Identity()
    with pytest.raises(HalfAdapter, match="layer 1"):
        load_adapter(some, tmp_path / "adapter")
    before = logits(plain)
    load_adapter(plain, tmp_path / "adapter")
    assert relative(logits(plain), before) > POWER
    remove_lora(plain)
    assert torch.equal(logits(plain), before)


def test_an_adapter_that_peft_leaves_out_is_an_error(tmp_path):
    folder = base_of("gpt-oss", "openai", "neither", tmp_path)
    save_adapter(adapted(folder), tmp_path / "adapter", to="peft")
    plain = moeglot.load(folder, dtype="float32", native=True)
    logits(plain)
    with pytest.raises((HalfAdapter, ValueError), match=r"load_adapter|target"):  # PEFT 0.18 says so itself
        logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"))


def test_the_trainer_accumulation_and_checkpointing(tmp_path):
    """transformers' Trainer trains both kinds; checkpointing and accumulation change nothing but memory."""
    pytest.importorskip("accelerate")
    folder = base_of("gpt-oss", "openai", "neither", tmp_path)
    rows = [{"input_ids": list(range(n, n + 16)), "labels": list(range(n, n + 16))} for n in range(8)]
    found = {}
    for way, options in {"plain": {}, "checkpointed": {"gradient_checkpointing": True}, "accumulated": {"gradient_accumulation_steps": 2, "batch": 2}}.items():
        model = moeglot.load(folder, dtype="float32", native=True)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
        add_lora(model, r=3)
        batch = options.pop("batch", 4)
        arguments = transformers.TrainingArguments(
            tmp_path / way, max_steps=3, per_device_train_batch_size=batch, learning_rate=0.01, save_strategy="no", report_to=[], use_cpu=True,
            logging_steps=1, disable_tqdm=True, seed=0, gradient_checkpointing_kwargs={"use_reentrant": False}, **options,
        )  # fmt: skip
        model.config.use_cache = False
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert all(lora.b.any() for module in experts_of(model).values() for lora in module.adapters.values())
        found[way] = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert relative(found["checkpointed"], found["plain"]) <= LIMIT
    assert relative(found["accumulated"], found["plain"]) <= 1e-3  # Adam divides by small numbers

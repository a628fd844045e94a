"""What `save_pretrained` and Trainer's checkpoints write of a model whose experts stay encoded: stock transformers never computes something else with it.

No code of ours runs where stock transformers reads such a folder: its own refusal is what keeps it from experts with random numbers.
"""

import json
from pathlib import Path

import families
import pytest
import torch
import transformers
from held_models import NAMES, model_of, native_works, quantized
from reading import relative
from safetensors.torch import load_file

import moeglot
from moeglot.demo import BUNDLED
from moeglot.errors import UnknownFormat
from moeglot.nn import add_lora, experts_of

LIMIT, POWER = 1e-5, 1e-2
ENCODED = [("gpt-oss", "mxfp4"), *((name, encode) for name, encode in (("qwen3-moe", "mxfp4-pack"), ("qwen3-moe", "fp8-block")) if native_works(name))]


def native(name: str, coding: str, folder: Path) -> torch.nn.Module:
    path = BUNDLED if name == "gpt-oss" else quantized(name, "square", coding, folder)[1]
    return moeglot.load(path, "float32", native=True)


@pytest.mark.parametrize(("name", "coding"), ENCODED)
def test_what_save_pretrained_writes_of_encoded_experts_is_refused_by_name(name, coding, tmp_path):
    model = native(name, coding, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="quant_method"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for ask in (moeglot.open, moeglot.verify, moeglot.load):
        with pytest.raises(UnknownFormat, match=r"load_state_dict(.|\n)*moeglot.save") as told:
            ask(tmp_path / "saved")
        assert len(str(told.value).split("\n")) == 3


def test_its_tensors_are_not_lost(tmp_path):
    """As the refusal says."""
    model = native("gpt-oss", "mxfp4", tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "saved")
    again = native("gpt-oss", "mxfp4", tmp_path)
    again.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    moeglot.save(again, tmp_path / "out", to="gpt-oss/transformers")
    assert relative(families.logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval()), families.logits(model)) <= LIMIT


def test_without_the_mark_stock_experts_are_random(tmp_path):
    """What the mark is for."""
    model = native("gpt-oss", "mxfp4", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").float().eval()
    assert relative(families.logits(stock), families.logits(model)) > POWER


@pytest.mark.parametrize("original", [True, False], ids=["hub", "module"])
@pytest.mark.parametrize("name", [name for name in NAMES if native_works(name)])
def test_plain_experts_are_what_they_were_or_refused(name, original, tmp_path):
    """Mixtral's are named block_sparse_moe on the Hub, and mlp in memory; others have one name."""
    live = model_of(name, "square")
    families.saved(live, tmp_path / "source", original)
    moeglot.load(tmp_path / "source", "float32", native=True).save_pretrained(tmp_path / "saved")
    if "quantization_config" in json.loads((tmp_path / "saved" / "config.json").read_text()):
        assert name not in ("gpt-oss", "qwen3-moe"), "stock reads these"
        with pytest.raises(ValueError, match="quant_method"):
            type(live).from_pretrained(tmp_path / "saved")
    else:
        for load in (type(live).from_pretrained, moeglot.load):
            assert relative(families.logits(load(tmp_path / "saved").float().eval()), families.logits(live)) <= LIMIT


def test_what_moeglot_writes_is_not_marked(tmp_path):
    model = moeglot.load(BUNDLED, "float32", native=True)
    moeglot.save(model, tmp_path / "encoded", to="gpt-oss/openai")
    assert json.loads((tmp_path / "encoded" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    moeglot.save(model, tmp_path / "plain", to="gpt-oss/transformers")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_checkpoint_of_the_trainer_resumes_and_is_no_model_of_others(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": list(range(n, n + 16)), "labels": list(range(n, n + 16))} for n in range(8)]

    def trained(resume: bool = False) -> dict[str, torch.Tensor]:
        model = moeglot.load(BUNDLED, "float32", native=True)
        torch.manual_seed(0)
        add_lora(model, r=2)
        arguments = transformers.TrainingArguments(
            tmp_path / "run", max_steps=4, per_device_train_batch_size=4, learning_rate=0.01, save_strategy="steps", save_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resume else None
        )
        assert all(lora.b.any() for module in experts_of(model).values() for lora in module.adapters.values())
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    whole, again = trained(), trained(resume=True)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(ValueError, match="quant_method"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")

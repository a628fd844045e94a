"""transformers' Trainer and `add_lora` alone: a run that goes on from a checkpoint is the run that nobody interrupted, in every family."""

import families
import pytest
import torch
import transformers
from devices import DEVICE

import moeglot
from moeglot.formats import FAMILIES
from moeglot.integrations.transformers import VERSION
from moeglot.nn import add_lora

pytest.importorskip("accelerate")

LIMIT, POWER = 1e-5, 1e-3
pytestmark = pytest.mark.skipif(VERSION < (5, 0), reason="4.57 undoes no names when it saves")
ROWS = [{"input_ids": (row := [(n * 5 + k * 3) % 90 + 3 for k in range(16)]), "labels": row} for n in range(16)]
RENAMED = ("mixtral", "minimax", "nemotron-h", "qwen3.5-moe-text", "qwen3-vl-moe", *(("kimi-linear",) if VERSION >= (5, 23) else ()))
"""Families whose modules or matrices are called or turned otherwise in memory than on the Hub, in 5.5.4 or in 5.23.0."""


def trained(base, out, resume=None, encode=None, rate=0.02, **options):
    model = moeglot.load(base, "float32", DEVICE, native=True, **({"encode": encode} if encode else {}))
    model.config.use_cache = False
    torch.manual_seed(0)
    add_lora(model, r=3, dropout=0.1)
    arguments = transformers.TrainingArguments(
        str(out), max_steps=6, per_device_train_batch_size=2, learning_rate=rate, save_strategy="steps", save_steps=3, report_to=[], use_cpu=DEVICE == "cpu",
        logging_steps=1, disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("encode", [None, "nf4"])
@pytest.mark.parametrize("name", RENAMED)
def test_trainer_goes_on_with_the_adapter_of_its_checkpoint(name, encode, tmp_path):
    """What `save_pretrained` writes is found again: the second half of a run is that of the run that nobody interrupted."""
    family = next(family for family in FAMILIES if family.name == name)
    if why := families.why_not(family):
        pytest.skip(why)
    families.model_of(family, "square").save_pretrained(tmp_path / "base")
    _, whole = trained(tmp_path / "base", tmp_path / "one", encode=encode)
    _, resumed = trained(tmp_path / "base", tmp_path / "two", str(tmp_path / "one" / "checkpoint-3"), encode=encode)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_trainer_loads_the_best_at_the_end(tmp_path):
    families.model_of(next(family for family in FAMILIES if family.name == "mixtral"), "square").save_pretrained(tmp_path / "base")
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer, _ = trained(tmp_path / "base", tmp_path / "out", rate=0.3, **options)
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert abs(found[0] - found[1]) > POWER
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(found), abs=LIMIT)


transformers.logging.set_verbosity_error()

"""`moeglot run`: the words of transformers' own generate, drawn or likeliest, and what a chat template makes of a prompt."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from devices import DEVICE
from typer.testing import CliRunner

import moeglot
from moeglot.cli.main import app
from moeglot.demo import BUNDLED

TEMPLATE = "{% for message in messages %}{{ message.content }}, and he said,{% endfor %}{% if add_generation_prompt %} I{% endif %}"
PROMPT = "And God said unto him"


def said(*options: str) -> str:
    found = CliRunner().invoke(app, ["run", *options, "--prompt", PROMPT, "--tokens", "12", "--dtype", "float32", "--device", DEVICE])
    assert found.exit_code == 0, (found.output, found.exception)
    return found.stdout.rstrip("\n")


def refused(what: str, *options: str) -> None:
    found = CliRunner().invoke(app, ["run", str(BUNDLED), "--prompt", PROMPT, *options])
    assert isinstance(found.exception, moeglot.UsageError)
    assert what in str(found.exception)


@pytest.fixture(scope="module")
def expected():
    """(prompt, what transformers draws after it with a seed, or the likeliest) -> all of the text, as the library decodes it."""
    model, tokenizer = moeglot.load(BUNDLED, "float32", DEVICE), transformers.AutoTokenizer.from_pretrained(BUNDLED)

    def text(prompt: str, **options) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(DEVICE)
        torch.manual_seed(3)
        found = model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=12, pad_token_id=tokenizer.eos_token_id, **options)
        return tokenizer.decode(found[0], skip_special_tokens=True)

    return text


def test_the_likeliest_words_and_drawn_ones(expected):
    assert said(str(BUNDLED)) == expected(PROMPT, do_sample=False)
    assert said(str(BUNDLED), "--native") == expected(PROMPT, do_sample=False)
    drawn = expected(PROMPT, do_sample=True, temperature=1.5, top_k=0)
    assert said(str(BUNDLED), "--temperature", "1.5", "--seed", "3") == drawn != expected(PROMPT, do_sample=False)
    assert said(str(BUNDLED), "--temperature", "1.5", "--seed", "4") != drawn


@pytest.mark.parametrize("declared", [None, {"top_k": None}, {"top_k": 50}, {"top_k": 1}], ids=str)
def test_tokens_are_drawn_from_all_that_the_checkpoint_leaves(declared, expected, tmp_path: Path):
    """transformers takes the likeliest 50 where nobody says how many."""
    shutil.copytree(BUNDLED, folder := tmp_path / "own")
    (folder / "generation_config.json").unlink()
    if declared is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **declared}))
    options = {"do_sample": True, "temperature": 1e3}
    every, some = (expected(PROMPT, **options, top_k=k) for k in (0, (declared or {}).get("top_k") or 0))
    assert said(str(folder), "--temperature", "1e3", "--seed", "3") == some
    assert (some == every) == (not (declared or {}).get("top_k"))


@pytest.mark.parametrize("temperature", ["1e-40", "1e-37"])
def test_a_temperature_by_which_nothing_can_be_divided(temperature):
    refused("float32", "--temperature", temperature)


@pytest.mark.parametrize(
    ("verb", "model_type"), [("run", "mixtral"), ("run", "switch_transformers"), ("run", "olmoe"), ("tune", "olmoe"), ("moments", "olmoe")]
)
def test_a_folder_without_a_tokenizer(verb: str, model_type: str, tmp_path: Path):
    """For some models transformers makes an empty tokenizer of config.json alone, and every line of a text would be one end-of-text token."""
    (folder := tmp_path / "model").mkdir()
    shutil.copy(BUNDLED / "model.safetensors", folder)
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    (text := tmp_path / "text.txt").write_text("In the beginning was the Word\n" * 100)
    asked = {
        "run": ["--prompt", PROMPT],
        "tune": ["--data", str(text), "--out", str(tmp_path / "out")],
        "moments": [str(text), "-o", str(tmp_path / "m.safetensors")],
    }
    found = CliRunner().invoke(app, [verb, str(folder), *asked[verb]])
    assert isinstance(found.exception, moeglot.UsageError), (found.output, found.exception)
    assert "no tokenizer is here" in found.exception.wrong
    assert not found.exception.known.endswith(":")


def test_a_chat_template(expected, tmp_path: Path):
    """The answer alone is printed; a model without a template is refused before its weights are read."""
    refused("no chat template", "--chat")
    shutil.copytree(BUNDLED, folder := tmp_path / "chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    asked = f"{PROMPT}, and he said, I"
    assert asked + said(str(folder), "--chat") == expected(asked, do_sample=False)
    assert said(str(folder)) == expected(PROMPT, do_sample=False)


WAYS = (
    *({"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}, {"token_healing": True}, {"force_words_ids": [[4]], "num_beams": 2}),
    *({"is_assistant": True}, {"assistant_early_exit": 1}),
)


@pytest.mark.parametrize("config", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"stop_strings": ["pray"]}, *WAYS], ids=str)
def test_one_text_is_streamed_whatever_generation_config_says(config, expected, tmp_path: Path):
    shutil.copytree(BUNDLED, folder := tmp_path / "own")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0, **config}))
    whole = expected(PROMPT, do_sample=False)
    end = "pray" if "stop_strings" in config else whole
    assert said(str(folder)) == whole[: whole.index(end) + len(end)]


def test_a_prompt_that_is_no_text():
    found = CliRunner().invoke(app, ["run", str(BUNDLED), "--prompt", "\udcff"])
    assert "no text in UTF-8" in str(found.exception)


def test_experts_that_are_encoded_on_the_way(tmp_path: Path):
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "bf16")
    assert said(str(tmp_path / "bf16"), "--encode", "fp8-block").startswith(PROMPT)
    refused("quantized already", "--encode", "nf4")


@pytest.mark.parametrize("seed", [-(1 << 63) - 1, 1 << 64])
def test_a_seed_that_torch_does_not_take(seed):
    refused("torch takes whole numbers", "--seed", str(seed))


@pytest.mark.parametrize("config", [{"num_return_sequences": 3}, {"compile_config": {}}], ids=str)
def test_a_generation_config_that_transformers_does_not_take(config, tmp_path: Path):
    shutil.copytree(BUNDLED, folder := tmp_path / "own")
    (folder / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must be|num_return_sequences"):
        transformers.GenerationConfig.from_pretrained(folder)
    found = CliRunner().invoke(app, ["run", str(folder), "--prompt", PROMPT])
    assert isinstance(found.exception, moeglot.UsageError)
    assert "generation_config.json" in found.exception.wrong

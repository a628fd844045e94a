"""TRL's SFTTrainer over encoded experts: the loss falls, what is trained is the adapters, and one folder holds both kinds."""

import json

import pytest
import tokenizers
import torch
import transformers
from reading import relative

import moeglot
from moeglot.demo import BUNDLED
from moeglot.nn import add_lora, experts_of, load_adapter, save_adapter
from moeglot.nn.data import read

trl = pytest.importorskip("trl", reason="in an environment of its own, tests/environments/trl.txt")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")


@pytest.mark.parametrize("attention", [False, True])
def test_sft(attention, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    model = moeglot.load(BUNDLED, "float32", native=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    if attention:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    add_lora(model, r=4)
    text = "This License does not grant permission to use the trade names, trademarks, service marks, or product names of the Licensor. "
    rows = datasets.Dataset.from_list([{"text": text[n:] + text[:n]} for n in range(0, 64, 4)])
    arguments = trl.SFTConfig(
        str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=4, learning_rate=5e-3, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        logging_steps=1, disable_tqdm=True, seed=0, max_length=64, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        gradient_accumulation_steps=2, warmup_steps=0,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5, losses
    assert all(lora.b.any() for module in experts_of(model).values() for lora in module.adapters.values())
    after = (model.get_base_model() if attention else model).state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if ".experts." in key)
    save_adapter(model, tmp_path / "adapter", base=BUNDLED)
    assert bool(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]) == attention
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    again = load_adapter(moeglot.load(BUNDLED, "float32", native=True), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert relative(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits) <= 1e-5


def test_dpo_against_a_reference_that_stays(tmp_path):
    """TRL computes it in each step with a copy of PEFT's adapter, or beforehand: the losses are the same."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    rows = datasets.Dataset.from_list([{"prompt": "In the beginning", "chosen": f" God created {n}", "rejected": f" man destroyed {n}"} for n in range(8)])
    found = {}
    for before in (False, True):
        torch.manual_seed(0)
        model = moeglot.load(BUNDLED, "float32", native=True)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        add_lora(model, r=4)
        arguments = trl.DPOConfig(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=5e-3, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
            logging_steps=1, disable_tqdm=True, seed=0, max_length=64, warmup_steps=0, precompute_ref_log_probs=before, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip
        trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        found[before] = torch.tensor([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])
    assert found[True][-1] < found[True][0] - 0.1
    assert relative(found[False], found[True]) <= 1e-4


SAID = [{"role": "user", "content": "In the beginning "}, {"role": "assistant", "content": "God created"}]
CALL = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = (
    "{% for tool in tools or [] %}[tool {{ tool.function.name }}]{% endfor %}{% if slow %}[slow]{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = {
    "text": {"text": "In the beginning God created"},
    "text that is ended": {"text": "In the beginning God created<|endoftext|>"},
    "prompt": {"prompt": "In the beginning", "completion": " God created"},
    "prompt that is ended": {"prompt": "In the beginning", "completion": " God created<|endoftext|>"},
    "prompt whose last token spans the border": {"prompt": "In the beginning ", "completion": "God created"},
    "messages": {"messages": SAID},
    "messages and tools": {"messages": SAID, "tools": CALL},
    "messages and tools as text": {"messages": SAID, "tools": json.dumps(CALL)},
    "messages and words for the template": {"messages": SAID, "chat_template_kwargs": {"slow": True}},
    "messages that ask and answer": {"prompt": SAID[:1], "completion": SAID[1:], "tools": CALL},
}


@pytest.fixture(scope="module")
def dense():
    return moeglot.load(BUNDLED, "float32")


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("first", [False, True], ids=["", "begun"])
def test_tune_trains_on_the_tokens_that_it_makes(kind, first, dense, tmp_path):
    """Token for token, and the same of them learned; `first`: a tokenizer that begins a text with a token of its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.chat_template = TEMPLATE
    if first:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[start])
    arguments = trl.SFTConfig(str(tmp_path / "run"), report_to=[], use_cpu=True, bf16=False, max_length=None, disable_tqdm=True)
    rows = [ROWS[kind]] * 2
    trainer = trl.SFTTrainer(model=dense, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    theirs = {key: [number for row in trainer.train_dataset for number in row[key]] for key in ("input_ids", "labels")}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    ours = read(tmp_path / "rows.jsonl", tokenizer, len(theirs["input_ids"]), 0.0).train
    assert ours.tokens.tolist() == [theirs["input_ids"]]
    assert ours.labels.tolist() == [theirs["labels"]]
    assert (-100 in theirs["labels"]) == ("prompt" in ROWS[kind])
    assert tokenizer.bos_token != "<s>" or (tokenizer.bos_token_id in theirs["input_ids"]) == isinstance(next(iter(ROWS[kind].values())), str)

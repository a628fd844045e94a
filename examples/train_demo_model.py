"""Train the model that moeglot bundles: a small real `GptOssForCausalLM` on the King James Bible, on a CPU in under half an hour.

    apt-get install bible-kjv bible-kjv-text
    bible -f "Genesis1:1-Revelation22:21" > kjv.txt
    python examples/train_demo_model.py kjv.txt trained
    moeglot convert trained demo --to gpt-oss/openai --encode mxfp4:compressed-tensors --allow-loss

`--family qwen3-moe` trains the smaller `Qwen3MoeForCausalLM` of tests/golden/king-james-qwen3 instead.
H = I on purpose: no shape can tell which way a matrix lies. Writes what transformers writes (BF16), plus `training.json` with the losses.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 128
HELD_OUT_EVERY = 20  # chapters


def chapters(path: Path) -> list[str]:
    """The text of each chapter, without the references that `bible -f` prints before every verse."""
    books: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        reference, _, verse = line.partition(" ")
        assert re.fullmatch(r"\w+:\d+", reference), f"not a verse: {line!r}"
        books.setdefault(reference.partition(":")[0], []).append(verse)
    return [" ".join(verses) + "\n" for verses in books.values()]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1 024 entries: every string has tokens, and every token decodes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def name_tokenizer_for_every_version(path: Path) -> None:
    """transformers 5 writes a class name that transformers 4 does not know; both know this one."""
    told = json.loads(path.read_text())
    told.pop("backend", None)
    path.write_text(json.dumps(told | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


COMMON = {
    "num_experts_per_tok": 2,
    "head_dim": 32,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    "router_aux_loss_coef": 0.01,
    "output_router_logits": True,
    "use_cache": False,
}


def make_gpt_oss(vocabulary: int) -> GptOssForCausalLM:
    config = GptOssConfig(
        vocab_size=vocabulary,
        **COMMON,
        hidden_size=192,
        intermediate_size=192,
        num_hidden_layers=4,
        num_local_experts=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=64,
    )
    return GptOssForCausalLM(config)


def make_qwen3_moe(vocabulary: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        **COMMON,
        hidden_size=96,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_hidden_layers=2,
        num_experts=8,
        norm_topk_prob=True,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config)


FAMILIES = {"gpt-oss": make_gpt_oss, "qwen3-moe": make_qwen3_moe}


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean cross-entropy in nats per token, over whole windows."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=w, labels=w, output_router_logits=False).loss.item() * len(w) for w in windows.split(32)]
    return sum(losses) / len(windows)


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int, peak: float = 3e-3) -> None:
    model.set_experts_implementation("grouped_mm")  # the default is 30 times slower in backward on a CPU
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    start = time.time()
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        at = torch.randint(len(tokens) - CONTEXT, (16,)).tolist()
        batch = torch.stack([tokens[a : a + CONTEXT] for a in at])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            speed = (step + 1) * 16 * CONTEXT / (time.time() - start)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {speed:,.0f} tokens/s  {time.time() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="gpt-oss")
    parser.add_argument("--steps", type=int, default=3500)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    texts = chapters(arguments.text)
    tokenizer = make_tokenizer(texts)
    encode = lambda part: torch.tensor([t for text in part for t in [0, *tokenizer.encode(text)]])  # noqa: E731
    held_out = encode(texts[::HELD_OUT_EVERY])
    training = encode([text for n, text in enumerate(texts) if n % HELD_OUT_EVERY])
    model = FAMILIES[arguments.family](len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(training):,} tokens to train on", flush=True)
    start = time.time()
    train(model, training, arguments.steps)
    minutes = (time.time() - start) / 60
    float32 = held_out_loss(model, held_out)
    model.to(torch.bfloat16)
    bfloat16 = held_out_loss(model, held_out)
    model.config.output_router_logits = False
    model.config.use_cache = True
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    name_tokenizer_for_every_version(arguments.out / "tokenizer_config.json")
    facts = {"family": arguments.family, "held_out_loss_float32": float32, "held_out_loss_bfloat16": bfloat16, "steps": arguments.steps, "minutes": minutes}
    (arguments.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (arguments.out / "held_out.txt").write_text("".join(texts[::HELD_OUT_EVERY]))
    prompt = tokenizer("And God said", return_tensors="pt").input_ids
    print(json.dumps(facts))
    print(tokenizer.decode(model.generate(prompt, max_new_tokens=60, do_sample=False)[0]))


if __name__ == "__main__":
    main()

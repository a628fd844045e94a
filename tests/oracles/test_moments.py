"""Second moments of experts' inputs, judged by hooks on transformers' own modules; and a merge that rounds with them."""

import json

import families
import pytest
import torch
import transformers
from adapters import WRITERS, Job
from reading import relative
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import moeglot
from moeglot.cli.main import app
from moeglot.formats import FAMILIES
from moeglot.integrations.transformers import VERSION
from moeglot.nn.data import read
from moeglot.nn.module import Experts
from moeglot.nn.moments import Moments, gather

FIVE = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(scope="module")
def bundled():
    from moeglot.demo import BUNDLED

    return BUNDLED


@pytest.fixture(scope="module")
def rows(bundled):
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    text = "And God said, Let there be light: and there was light. And the king said unto him, Go, and he went up to the city. " * 40
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:768]).view(6, 128)


@pytest.mark.skipif(not FIVE, reason="transformers 4 hands its experts other arguments")
def test_they_are_those_of_transformers_own_modules(bundled, rows, tmp_path):
    gather(moeglot.load(bundled, "float32", native=True), rows, tmp_path / "moments.safetensors")
    found = load_file(tmp_path / "moments.safetensors")
    theirs: dict[str, torch.Tensor] = {}
    model = moeglot.load(bundled, "float32")

    def hook(layer):
        def see(module, arguments, keywords):
            hidden, index = (*arguments, *keywords.values())[:2]
            hidden = hidden.reshape(-1, hidden.shape[-1])
            for expert in range(module.num_experts):
                given = hidden[(index == expert).any(-1)].double()
                both = given @ module.gate_up_proj[expert].double() + module.gate_up_proj_bias[expert].double()
                gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
                inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                for name, x in (("hidden", given), ("intermediate", inner)):
                    key = f"layers.{layer}.experts.{expert}.{name}"
                    theirs[key] = theirs.get(key, 0) + x.mT @ x

        return see

    for n, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(hook(n), with_kwargs=True)
    with torch.inference_mode():
        for row in rows:
            model(input_ids=row.unsqueeze(0))
    reached = {key: tensor for key, tensor in theirs.items() if float(tensor.norm()) > 0}
    assert found.keys() == reached.keys()
    assert len(found) > 40
    assert max(float((found[key] - tensor).norm() / tensor.norm()) for key, tensor in reached.items()) < 1e-5


@pytest.mark.skipif(VERSION < (5, 23), reason="once is enough")
def test_experts_that_llama_4_hands_zeros_saw_no_token(tmp_path):
    """Its block gives every expert every token, times the weight of the router, which is 0 for those that were not chosen."""
    model = families.model_of(next(family for family in FAMILIES if family.name == "llama4-text"), "square")
    model.config.num_experts_per_tok = 1
    routers = [module for module in model.modules() if type(module).__name__ == "Llama4Router"]
    for router in routers:
        router.top_k = 1
        router.weight.data[1] = -router.weight.data[0]
        router.weight.data[2] = 0  # of x, -x and 0, the last is never the largest
    model.save_pretrained(tmp_path / "model")
    chosen = {}
    for n, router in enumerate(routers):
        router.register_forward_hook(lambda _, __, found, n=n: chosen.setdefault(n, []).extend((found[0] > 0).nonzero()[:, 1].tolist()))
    text, native = torch.arange(40).view(2, 20) % 90, moeglot.load(tmp_path / "model", "float32", native=True)
    found = gather(native, text, tmp_path / "moments.safetensors")
    with torch.inference_mode():
        for row in text:
            wanted = model(input_ids=row[None]).logits
            assert relative(native(input_ids=row[None]).logits, wanted) < 1e-5
    layers = sorted({int(key.split(".")[1]) for key in found.tokens})
    counts = {f"layers.{layers[n]}.experts.{e}.{of}": ids.count(e) for n, ids in chosen.items() for e in {*ids} for of in ("hidden", "intermediate")}
    assert found.tokens == counts
    assert not any(".experts.2." in key for key in found.sums)


def test_divided_experts_go_under_their_own_numbers(bundled):
    """A process that holds experts 2 to 5 counts them from 0; what others hold is below 0 or beyond."""
    base = moeglot.open(bundled)
    hidden, index = torch.randn(6, base.sizes["h"]), torch.tensor([[4, 5], [6, 7], [4, 1]]).repeat(2, 1)
    whole, part = Moments(), Moments()
    whole.watch(Experts.of(base, 2), hidden, index)
    part.watch(Experts.of(base, 2, experts=range(2, 6)), hidden, index - 2)
    assert set(part.sums) == {f"layers.2.experts.{n}.{name}" for n in (4, 5) for name in ("hidden", "intermediate")}
    assert all(torch.equal(tensor, whole.sums[key]) for key, tensor in part.sums.items())


@pytest.mark.skipif(not FIVE, reason="once is enough")
def test_gptq_with_them_is_nearer_in_the_outputs(bundled, rows, tmp_path):
    base = moeglot.open(bundled)
    made = WRITERS["PEFT"][2](Job("gpt-oss", 8, 192, 192, 4, layers=4))
    made.tensors = {key: tensor * (0.02 if "lora_B" in key else 1) for key, tensor in made.tensors.items()}
    adapter = moeglot.open_adapter(made.save(tmp_path / "adapter"), base, "peft")
    gather(moeglot.load(bundled, "float32", native=True), rows, tmp_path / "moments.safetensors")
    kept = load_file(tmp_path / "moments.safetensors")
    error = {}
    for rounding in ("nearest", f"gptq:{tmp_path / 'moments.safetensors'}"):
        out = tmp_path / rounding.partition(":")[0]
        moeglot.merge(base, adapter, out, to="gpt-oss/llm-compressor", encode="fp8-block", round=rounding, threshold=0, allow_loss=True)
        merged, total = moeglot.open(out), 0.0
        for (layer, role, expert), change in made.changes.items():
            moments = kept.get(f"layers.{layer}.experts.{expert}.{'intermediate' if role == 'down' else 'hidden'}")
            if moments is not None:
                wanted = base.experts(layer)[role][expert].decode(torch.float32).double() + 0.02 * change
                off = merged.experts(layer)[role][expert].decode(torch.float32).double() - wanted
                total += float((off @ moments.double() @ off.mT).trace())
        error[rounding.partition(":")[0]] = total**0.5
    assert error["gptq"] < 0.8 * error["nearest"]


def test_a_file_without_an_experts_moments_is_refused(bundled, tmp_path):
    from safetensors.torch import save_file

    base = moeglot.open(bundled)
    adapter = WRITERS["PEFT"][2](Job("gpt-oss", 8, 192, 192, 4, layers=4)).save(tmp_path / "adapter")
    save_file({"layers.0.experts.0.hidden": torch.eye(192)}, tmp_path / "some.safetensors")
    with pytest.raises(moeglot.UsageError, match=r"has no layers\.0\.experts\.0\.intermediate|has no layers"):
        moeglot.merge(base, moeglot.open_adapter(adapter, base, "peft"), tmp_path / "out", round=f"gptq:{tmp_path / 'some.safetensors'}")


def test_one_row_of_text_is_enough(bundled, tmp_path):
    """Nothing is held out, as `tune` does."""
    tokenizer, text = AutoTokenizer.from_pretrained(bundled), tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 2)
    count = len(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    assert read(text, tokenizer, count, 0.0).train.tokens.shape == (1, count)
    with pytest.raises(moeglot.UsageError, match=r"(?s)0 rows.*one row is the least"):
        read(text, tokenizer, count + 1, 0.0)
    with pytest.raises(moeglot.UsageError, match=r"(?s)1 rows.*one be held out"):
        read(text, tokenizer, count, 0.1)


def test_prompts_are_text_like_any_other(bundled, tmp_path):
    """No loss is taken of them, and their tokens reach experts all the same."""
    text, out = tmp_path / "text.jsonl", tmp_path / "moments.safetensors"
    text.write_text(3 * (json.dumps({"prompt": "In the beginning God created the heaven and the earth. " * 5, "completion": " Amen"}) + "\n"))
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    count = sum(len(tokenizer(of)["input_ids"]) + 1 for of in 3 * ["In the beginning God created the heaven and the earth. " * 5 + " Amen"])
    found = CliRunner().invoke(app, ["moments", str(bundled), str(text), "-o", str(out), "--length", "8", "--json"])
    assert found.exit_code == 0, (found.output, found.exception)
    assert json.loads(found.stdout)["tokens"] == count // 8 * 8 > 8 * len(read(text, tokenizer, 8, 0.0).train)

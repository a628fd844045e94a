"""What people do to a model with adapters on its experts: disable, copy, cast, wrap, compile, load again; each computes the right thing or is refused."""

import copy
import io
import json
import pickle

import pytest
import torch
import transformers
from reading import relative
from small_models import logits
from transformers import AutoTokenizer

import moeglot
from moeglot.demo import BUNDLED
from moeglot.errors import UnsupportedAdapter, UsageError
from moeglot.integrations.transformers import VERSION
from moeglot.nn import Experts, add_lora, experts_of, load_adapter, remove_lora, save_adapter
from moeglot.nn.data import read
from moeglot.nn.tune import Recipe, tune

peft = pytest.importorskip("peft")

LIMIT, POWER = 1e-5, 1e-3
ATTENTION = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"]}
TEXT = "And God said, Let there be light: and there was light. " * 40


def fill(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def native(**options):
    return moeglot.load(BUNDLED, "float32", native=True, **options)


def both(**options):
    """PEFT's adapter on attention, ours on the experts."""
    model = peft.get_peft_model(native(), peft.LoraConfig(**ATTENTION, **options))
    add_lora(model, r=3)
    return fill(model)


def experts(**options) -> Experts:
    """Those of one layer, which are asked in the same way with every release."""
    return Experts.of(moeglot.open(BUNDLED), 0, **options)


@pytest.fixture(scope="module")
def base_logits():
    return logits(native())


def routed(tokens=9, ranks=2, h=192, e=8, seed=0):
    torch.manual_seed(seed)
    return torch.randn(tokens, h), torch.randint(e, (tokens, ranks)), torch.rand(tokens, ranks)


# --- what PEFT turns off -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_disabled_adapter_is_disabled_on_experts_too(task, copied, base_logits):
    """A reference model, as DPO and GRPO compute it."""
    model = copy.deepcopy(both(task_type=task)) if copied else both(task_type=task)
    live = logits(model)
    assert relative(live, base_logits) > POWER
    with model.disable_adapter():
        assert relative(logits(model), base_logits) <= LIMIT
    assert torch.equal(logits(model), live)
    next(module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool)).enable_adapters(False)
    with pytest.raises(UsageError, match="has its adapter disabled"):
        logits(model)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_backward_after_a_reference_is_of_the_pass_before_it(reentrant):
    """DPO's order. Checkpointing computes layers again in backward, when the last pass was one without adapters."""
    tokens, found = torch.arange(24).view(2, 12), []
    for referred in (False, True):
        model = both().train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        if referred:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=tokens, use_cache=False)
        loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert all(relative(grad, found[0][name]) <= LIMIT for name, grad in found[1].items())


@pytest.mark.parametrize("way", ["merge_and_unload", "unload", "experts alone"])
def test_what_was_disabled_is_back(way):
    model, untouched = both(), both()
    with model.disable_adapter():
        logits(model)
    found = []
    for one in (model, untouched):
        alone = way == "experts alone"
        found.append(Experts.forward(next(iter(experts_of(one).values())), *routed()) if alone else logits(getattr(one, way)()))
    assert torch.equal(*found)


def test_another_adapter_of_pefts_is_one_without_the_experts(base_logits):
    model = both()
    live = logits(model)
    model.add_adapter("other", peft.LoraConfig(**ATTENTION))  # zero
    model.set_adapter("other")
    assert relative(logits(model), base_logits) <= LIMIT
    model.base_model.set_adapter(["default", "other"])
    assert relative(logits(model), live) <= LIMIT
    model.set_adapter("other")
    model.delete_adapter("default")
    with pytest.raises(UsageError, match="'default' is gone"):
        logits(model)


@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_of_pefts_adapter_is_what_both_were_then(trained):
    """As TRL makes a reference: the adapter's copy, which is a copy of PEFT's half alone."""
    model = both() if trained else peft.get_peft_model(native(), peft.LoraConfig(**ATTENTION))
    if not trained:
        add_lora(model, r=3)
        model.eval()
    before = logits(model)
    model.add_adapter("ref", peft.LoraConfig(**ATTENTION))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.copy_(model.get_parameter(name.replace(".ref.", ".default.")))
    model.set_adapter("ref")
    assert torch.equal(logits(model), before)
    model.set_adapter("default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name and ".ref." not in name:
                parameter.add_(0.1)
    assert relative(logits(model), before) > POWER
    model.set_adapter("ref")
    if trained:
        with pytest.raises(UsageError, match="'ref' began as a copy of 'default'"):
            logits(model)
    else:
        assert torch.equal(logits(model), before)


def test_pefts_adapter_on_the_body_alone():
    """It is asked too, and copies of a body need no whole model."""
    body, tokens = native().base_model, torch.arange(24).view(2, 12)
    plain = body(tokens).last_hidden_state.detach()
    for copied in (copy.deepcopy(body), pickle.loads(pickle.dumps(body))):
        assert torch.equal(copied(tokens).last_hidden_state, plain)
    wrapped = peft.get_peft_model(body, peft.LoraConfig(**ATTENTION))
    add_lora(wrapped, r=2)
    assert relative(fill(wrapped)(input_ids=tokens).last_hidden_state, plain) > POWER
    with wrapped.disable_adapter():
        assert relative(wrapped(input_ids=tokens).last_hidden_state, plain) <= LIMIT


def test_an_adapter_that_was_merged_is_not_left_out_in_silence(tmp_path):
    model = both()
    logits(model)
    with pytest.raises(UsageError, match="no longer on the model"):
        save_adapter(model.merge_and_unload(), tmp_path / "adapter", base=BUNDLED)
    assert not list(tmp_path.iterdir())


CHANGED = {
    "merged before": "q_proj.weight is not what the base has|no longer on the model",  # PEFT before 0.21 leaves its config there
    "trained": "lm_head.weight trains",
    "changed": "router.weight is not what the base has",
    "resized": "embed_tokens.weight is not what the base has",
}


@pytest.mark.parametrize("way", CHANGED)
def test_what_an_adapter_would_leave_out_is_not_left_out_in_silence(way, tmp_path):
    """The base that it names, with it, would be another model than the one that was trained."""
    model = native()
    if way == "merged before":
        model = fill(peft.get_peft_model(model, peft.LoraConfig(**ATTENTION))).merge_and_unload()
    elif way == "resized":
        model.resize_token_embeddings(1030)
    add_lora(model, r=3)
    if way == "trained":
        model.lm_head.weight.requires_grad_(True)
    elif way == "changed":
        with torch.no_grad():
            model.model.layers[0].mlp.router.weight.mul_(1.1)
    with pytest.raises(UsageError, match=CHANGED[way]):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["merged for a while", "a whole module", "cast", "loaded, not to train"])
def test_what_an_adapter_does_not_leave_out_is_saved(way, tmp_path):
    if way == "loaded, not to train":
        save_adapter(both(), tmp_path / "first", base=BUNDLED)
        model = load_adapter(native(), tmp_path / "first")
    else:
        model = both(modules_to_save=["lm_head"] if way == "a whole module" else None)
    with torch.no_grad():
        if way == "merged for a while":
            model.merge_adapter()
        elif way == "a whole module":
            next(parameter for name, parameter in model.named_parameters() if "modules_to_save" in name).mul_(1.1)
        elif way == "cast":
            for parameter in model.parameters():
                parameter.data = parameter.to(torch.bfloat16).float()
    live = logits(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(native(), tmp_path / "adapter").eval()
    assert relative(logits(again), live) <= (LIMIT if way != "cast" else 0.05)


@pytest.mark.parametrize("way", ["another name", "transformers' own add_adapter"])
def test_ways_to_put_pefts_adapter_on(way, tmp_path):
    model, config = native(), peft.LoraConfig(**ATTENTION)
    if way == "another name":
        model = peft.get_peft_model(model, config, adapter_name="mine")
    else:
        model.add_adapter(config)
    add_lora(model, r=3)
    live = logits(fill(model))
    save_adapter(model, tmp_path / "adapter", base=BUNDLED)
    dense = peft.PeftModel.from_pretrained(moeglot.load(BUNDLED, "float32"), tmp_path / "adapter").eval()
    assert relative(logits(dense), live) <= LIMIT


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_experts_that_peft_froze_are_not_left_untrained_in_silence(way):
    model = native()
    mine = add_lora(model, r=2)
    if way == "get_peft_model":
        model = peft.get_peft_model(model, peft.LoraConfig(**ATTENTION))
    else:
        model.add_adapter(peft.LoraConfig(**ATTENTION))
    fill(model).train()
    for parameter in mine:
        parameter.requires_grad_(False)  # PEFT before 0.19 leaves them alone in some of its ways
    with pytest.raises(UsageError, match="is frozen, and PEFT's trains"):
        logits.__wrapped__(model)
    logits(model)  # nothing is trained
    for parameter in mine:
        parameter.requires_grad_(True)
    logits.__wrapped__(model).square().sum().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in mine)


def test_other_methods_of_peft_are_refused_before_they_train():
    model = peft.get_peft_model(native(), peft.LoHaConfig(r=2, alpha=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedAdapter, match="LOHA"):
        add_lora(model)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_is_refused(tmp_path):
    save_adapter(both(), tmp_path / "adapter", base=BUNDLED)
    wrapped = peft.get_peft_model(native(), peft.LoraConfig(**ATTENTION))
    with pytest.raises(UsageError, match="PEFT has an adapter"):
        load_adapter(wrapped, tmp_path / "adapter", base=BUNDLED)
    assert not any(module.lora for module in experts_of(wrapped).values())


@pytest.mark.parametrize("way", ["Trainer's", "another adapter", "all of the model"])
def test_half_of_what_trains_is_not_loaded_in_silence(way, tmp_path):
    """Trainer keeps of a PEFT model what PEFT saves, and resumes from that."""
    model = both()
    model.save_pretrained(tmp_path / "half")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if way == "another adapter":
        model.load_adapter(tmp_path / "half", "other", is_trainable=True)
    elif way == "all of the model":
        model.load_state_dict(model.state_dict())
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.mul_(2)
        with pytest.raises(UsageError, match="nothing for the adapter of the experts"):
            model.load_adapter(tmp_path / "half", "default", is_trainable=True)
        assert all(torch.equal(parameter, before[name] * (2 if "lora" in name else 1)) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("lost", ["all", "one", "under other names"])
def test_an_adapter_that_a_state_lacks_is_not_begun_anew_in_silence(lost):
    """Trainer loads with strict=False, and only logs what is missing."""
    model = native()
    add_lora(model, r=2)
    state = fill(model).state_dict()
    assert not model.load_state_dict(state, strict=False).missing_keys
    mine = [key for key in state if ".lora." in key]
    for key in mine[:1] if lost == "one" else mine:
        tensor = state.pop(key)
        if lost == "under other names":
            state[key.replace("model.", "backbone.")] = tensor
    with pytest.raises(UsageError, match="adapter of the experts, which trains"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(UsageError, match="adapter of the experts, which trains"):
        model.load_state_dict({key.replace("model.", "backbone."): tensor for key, tensor in state.items()}, strict=False)


@pytest.mark.parametrize("attention", [False, True])
def test_an_adapter_that_fsdp_divided_is_saved_once_it_is_whole(attention, tmp_path):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = native()
    if attention:
        model = peft.get_peft_model(model, peft.LoraConfig(**ATTENTION))
    add_lora(model, r=2)
    live = logits(fill(model))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(UsageError, match=r"divided among processes(?s:.*)unshard\(\)"):
            save_adapter(model, tmp_path / "adapter", base=BUNDLED)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        save_adapter(model, tmp_path / "adapter", base=BUNDLED)
    finally:
        torch.distributed.destroy_process_group()
    assert relative(logits(load_adapter(native(), tmp_path / "adapter").eval()), live) <= LIMIT


# --- what PEFT asks of its own adapter ------------------------------------------------------------------------------------------------------------


def test_rows_with_adapters_of_their_own_are_refused():
    """PEFT refuses them on adapted parameters."""
    model, tokens = both(), torch.arange(24).view(2, 12)
    with torch.no_grad(), pytest.raises(UsageError, match="adapter_names"):
        model(input_ids=tokens, use_cache=False, adapter_names=["__base__", "default"])
    model = both()
    remove_lora(model)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False, adapter_names=["__base__", "default"])


def test_an_adapter_that_is_not_active_is_left_out(base_logits):
    model = both()
    model.base_model.set_adapter([])
    assert relative(logits(model), base_logits) <= LIMIT
    model.base_model.set_adapter(["default"])
    assert relative(logits(model), base_logits) > POWER


@pytest.mark.parametrize("rslora", [False, True])
def test_another_scale_of_pefts_adapter_is_refused(rslora):
    from peft.helpers import rescale_adapter_scale

    model = both(use_rslora=rslora, rank_pattern={"o_proj": 3}, alpha_pattern={"o_proj": 7})
    live = logits(model)
    for factor in (0.0, 0.25):
        with rescale_adapter_scale(model, factor), pytest.raises(UsageError, match="has the scale"):
            logits(model)
        next(module for module in model.modules() if hasattr(module, "set_scale")).set_scale("default", factor)
        with pytest.raises(UsageError, match="has the scale"):
            logits(model)
        next(module for module in model.modules() if hasattr(module, "set_scale")).set_scale("default", 1)
    assert torch.equal(logits(model), live)


def test_biases_beside_experts_are_refused_before_they_train():
    model = peft.get_peft_model(native(), peft.LoraConfig(**ATTENTION, lora_bias=True))
    with pytest.raises(UnsupportedAdapter, match="lora_bias"):
        add_lora(model)


def test_b_trains_alone(tmp_path):
    """LoRA-FA."""
    model = both().train()
    gradients = []
    for alone in (False, True):
        model.zero_grad()
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.requires_grad_(not alone or name.endswith(".b") or "lora_B" in name)
        logits.__wrapped__(model).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert 0 < len(gradients[1]) < len(gradients[0])
    assert all(torch.equal(gradient, gradients[0][name]) for name, gradient in gradients[1].items())
    save_adapter(model, tmp_path / "adapter", base=BUNDLED)


# --- what trains ---------------------------------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_loaded_to_train_is_all_that_trains(tmp_path):
    model = native()
    add_lora(model, r=2, targets=("gate",))
    with torch.no_grad():
        for module in experts_of(model).values():
            torch.nn.init.normal_(module.lora["first"].b[:, :192])
    save_adapter(model, tmp_path / "adapter", base=BUNDLED)
    again = load_adapter(native(), tmp_path / "adapter", trainable=True)
    assert {name.rpartition(".")[2] for name, parameter in again.named_parameters() if parameter.requires_grad} == {"a", "b"}
    assert {lora.targets for module in experts_of(again).values() for lora in module.lora.values()} == {("gate",)}


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("backend", ["eager", "grouped", "reference"])
def test_targets_are_kept_by_copies(way, backend):
    model = native(backend=backend)
    add_lora(model, r=2, targets="gate")
    if way == "deepcopy":
        model = copy.deepcopy(model)
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        model = torch.load(buffer, weights_only=False)
    fill(model).train()
    logits.__wrapped__(model).square().sum().backward()
    for module in experts_of(model).values():
        gate, up = module.lora["first"].b.grad.chunk(2, 1)
        assert float(gate.abs().max()) > 0
        assert float(up.abs().max()) == 0


def test_factors_are_float32_whatever_is_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        added = add_lora(native(), r=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in added} == {torch.float32}


def test_no_gradient_of_a_gradient_and_the_factors_of_the_call():
    module = experts()
    add_lora(module, r=2)
    fill(module).train()
    hidden, index, weights = routed()
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(module(hidden, index, weights).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
    other = {name: (2 * parameter.detach()).requires_grad_() for name, parameter in module.named_parameters()}
    torch.func.functional_call(module, other, (hidden, index, weights)).square().sum().backward()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(other[name])
    module(hidden, index, weights).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert relative(other[name].grad, parameter.grad) <= LIMIT


# --- what is asked of a module ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "eager", "batched", "grouped"])
def test_ids_below_zero_are_skipped(backend):
    module = experts(backend=backend)
    hidden, index, weights = routed()
    index[::3, 1] = -1
    expected = module(hidden, index.clamp(min=0), torch.where(index < 0, 0, weights))
    assert relative(module(hidden, index, weights), expected) <= LIMIT
    assert relative(module(hidden, index.clamp(min=0), weights), expected) > POWER


def test_shapes_that_mean_something_else():
    module = experts()
    hidden, index, weights = routed()
    with pytest.raises(UsageError, match="gather"):
        module(hidden, index, torch.rand(9, 8))
    with pytest.raises(UsageError, match="each token has k experts"):
        module(hidden, index[:5], weights[:5])


def test_codes_that_somebody_cast_are_refused(tmp_path):
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "bf16")
    model = moeglot.load(tmp_path / "bf16", "float32", native=True, encode="fp8-block")
    module = next(iter(experts_of(model).values()))
    line = module.lines[0]
    for name, buffer in line.named_buffers():
        line._buffers[name] = buffer.to(torch.bfloat16)
    with pytest.raises(UsageError, match="no cast keeps"):
        Experts.forward(module, *routed())


def test_the_reference_has_no_dropout():
    module = experts(backend="reference")
    add_lora(module, r=2, dropout=0.5)
    with pytest.raises(UsageError, match="no dropout"):
        module.train()(*routed())
    assert module.eval()(*routed()).shape == (9, 192)


def test_a_compiled_model_computes_the_same(base_logits):
    model = native()
    compiled = torch.compile(model, backend="aot_eager")
    assert relative(logits(compiled), base_logits) <= LIMIT


@pytest.mark.skipif(VERSION < (5, 23), reason="the registry came with 5.23")
def test_a_registered_module_without_tokens():
    from moeglot.integrations.transformers_register import experts_forward

    dense = moeglot.load(BUNDLED, "float32").model.layers[0].mlp.experts
    hidden, index, weights = routed(tokens=0)
    assert experts_forward(dense, hidden, index, weights).shape == (0, 192)


@pytest.mark.parametrize("device", ["meta", "nope", "cuda:7"])
def test_devices_that_are_none(device):
    with pytest.raises(UsageError, match="device"):
        native(device=device)


# --- runs ------------------------------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_over_the_numbers_that_it_began_with(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "bf16")
    words = AutoTokenizer.from_pretrained(BUNDLED)

    def run(recipe=None, out="out", encode=None, **options):
        model = moeglot.load(tmp_path / "bf16", "float32", native=True, encode=encode)
        return tune(model, words, tmp_path / "text.txt", tmp_path / out, recipe or Recipe(steps=2, batch=1, length=16, r=2), **options)

    with pytest.raises(UsageError, match="'gates'"):
        run(Recipe(steps=2, batch=1, length=16, targets=("gates",)))
    assert not (tmp_path / "out").exists()
    run()
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["held"] == {"dtype": "float32", "experts": ["bfloat16"]}
    with pytest.raises(UsageError, match="another held"):
        run(encode="nf4", resume=True)


def test_lines_of_json_whatever_stands_in_their_strings(tmp_path):
    words, rows = AutoTokenizer.from_pretrained(BUNDLED), [{"text": f"{TEXT}\u2028{TEXT}\x85 end"}] * 2
    for name, start in (("a.jsonl", ""), ("b.NDJSON", "\ufeff")):
        (tmp_path / name).write_text(start + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        found = read(tmp_path / name, words, 16, 0.2)
        text = words.decode(torch.cat([found.train.tokens, found.held_out.tokens]).flatten())
        assert '"text"' not in text
        assert "light" in text


def test_messages_however_they_are_divided(tmp_path):
    """As they are, or as TRL has them: a prompt and a completion that are lists."""
    words = AutoTokenizer.from_pretrained(BUNDLED)
    words.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    asked, answered = {"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT[::-1]}
    found = []
    for name, row in (("a", {"messages": [asked, answered]}), ("b", {"prompt": [asked], "completion": [answered]})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        found.append(read(tmp_path / f"{name}.jsonl", words, 1024, 0.0).train)
    assert torch.equal(found[0].tokens, found[1].tokens)
    asked, answered = (words.decode(found[1].tokens[(found[1].labels == -100) == read_]) for read_ in (True, False))
    assert asked.startswith("user:")
    assert answered.startswith("assistant:")


transformers.logging.set_verbosity_error()

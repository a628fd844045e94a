"""`experts_implementation="moeglot"` on stock modules: output and gradients are those of transformers' own; refused without a registry."""

import families
import pytest
import torch
import transformers
from held_models import NAMES, model_of
from reading import relative

from moeglot.errors import UsageError
from moeglot.integrations.transformers import VERSION, register

LIMIT = 1e-5
transformers.logging.set_verbosity_error()


@pytest.mark.skipif(VERSION >= (5, 23), reason="5.23 has a registry")
def test_a_release_without_a_registry_says_what_works():
    with pytest.raises(UsageError, match="native=True"):
        register()


@pytest.mark.skipif(VERSION < (5, 23), reason="its registry came with 5.23")
@pytest.mark.parametrize("size", ["square", "neither"])
@pytest.mark.parametrize("name", [*NAMES, "muse-spark", "aria-text", "openai-privacy-filter"])
def test_it_computes_what_theirs_do(name, size):
    register()
    register()
    try:
        live = model_of(name, size)
    except StopIteration:
        pytest.skip("no such family")
    live.set_experts_implementation("eager")
    expected = families.logits(live)
    live.set_experts_implementation("moeglot")
    assert relative(families.logits(live), expected) <= LIMIT


@pytest.mark.skipif(VERSION < (5, 23), reason="its registry came with 5.23")
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-moe", "nemotron-h"])
def test_gradients_are_theirs(name):
    register()
    found = {}
    for way in ("eager", "moeglot"):
        live = model_of(name, "neither")
        live.set_experts_implementation(way)
        out = live(input_ids=torch.arange(16).view(2, 8) + 3, use_cache=False).logits
        torch.manual_seed(0)
        out.backward(torch.randn_like(out))
        found[way] = {key: parameter.grad for key, parameter in live.named_parameters() if parameter.grad is not None}
    assert found["eager"].keys() == found["moeglot"].keys()
    assert max(relative(found["moeglot"][key], grad) for key, grad in found["eager"].items() if grad.any()) <= LIMIT


@pytest.mark.skipif(VERSION < (5, 23), reason="its registry came with 5.23")
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-moe"])
def test_experts_that_live_elsewhere_are_skipped(name):
    """transformers' own contract of expert parallelism: an id of num_experts, a weight of zero."""
    register()
    live = model_of(name, "neither")
    module = next(module for key, module in live.named_modules() if key.endswith(".experts"))
    torch.manual_seed(0)
    hidden, index, weights = torch.randn(9, 64, requires_grad=True), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    weights = weights.masked_fill(index == 3, 0)
    module._is_expert_parallel = True
    found = {}
    for way in ("grouped_mm", "moeglot"):
        live.set_experts_implementation(way)
        out = module(hidden, index.clone(), weights)
        found[way] = (out.detach(), *torch.autograd.grad(out.sum(), hidden))
    assert all(relative(mine, theirs) <= LIMIT for mine, theirs in zip(found["moeglot"], found["grouped_mm"], strict=True))
    assert found["moeglot"][0].isfinite().all()

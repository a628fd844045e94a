"""LoRA on encoded experts against float64 autograd through dense matrices, written down here; every gradient, and each of them broken on purpose."""

import itertools
import os
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
from reading import relative
from synthetic import SIZES, write_checkpoint

import moeglot
from moeglot.errors import UsageError
from moeglot.nn import Experts, add_lora, compute, remove_lora, routed

LIMIT, POWER = 1e-5, 1e-3
FORMATS = (
    "gpt-oss/openai",
    "gpt-oss/transformers",
    "qwen3-moe/hub",
    "qwen3-moe/transformers-5",
    "mixtral/hub+fp8-block",
    "nemotron-h/hub",
    "qwen3-moe/hub+nf4",
    "qwen3-moe/hub+int8-channel",
)
TOKENS, RANKS, R = 11, 2, 3


BACKENDS = ("eager", "grouped", "batched", "reference", "auto", *(("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()))


def module_of(name: str, folder, backend="eager", targets=("gate", "up", "down"), dropout=0.0, sizes=None) -> Experts:
    """One layer of a random checkpoint, with an adapter whose factors are random."""
    plain, _, coding = name.partition("+")
    if not (folder / "config.json").exists():
        write_checkpoint(folder, plain, {"h": 64, "i": 32, **(sizes or {})}, dtype=torch.float32)
    path = folder
    if coding:
        path = folder.with_name(folder.name + "-" + coding)
        if not path.exists():
            moeglot.convert(folder, name, path, allow_loss=True)
    module = Experts.of(moeglot.open(path, None if coding else plain), 0, backend=backend)
    torch.manual_seed(0)
    add_lora(module, R, 2 * R, targets, dropout)
    with torch.no_grad():
        for lora in module.adapters.values():
            lora.b.normal_()
            if lora.targets != lora.roles:
                lora.b.mul_(
                    lora.b.new_tensor([float(role in targets) for role in lora.roles]).repeat_interleave(len(lora.b[0]) // len(lora.roles)).view(1, -1, 1)
                )
    return module


def inputs(dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    hidden, weights = torch.randn(TOKENS, 64) * 2, torch.rand(TOKENS, RANKS)
    index = torch.stack([torch.randperm(SIZES["e"])[:RANKS] for _ in range(TOKENS)])
    index[0, 1] = SIZES["e"]  # a slot that belongs to nobody here
    return hidden.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()


def activate(name: str, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    if name.startswith("gpt-oss"):
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return torch.nn.functional.silu(gate) * up if gate is not None else torch.relu(up) ** 2


def dense(module: Experts, name: str, hidden, index, weights, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Every token and expert by itself, with W + s B A formed, in float64."""
    roles = [{role: each.decode(torch.float64) for line in module.lines for role, each in line.roles(expert).items()} for expert in range(module.num_experts)]
    rows = []
    for token in range(len(hidden)):
        total = torch.zeros(hidden.shape[1], dtype=torch.float64)
        for rank in range(index.shape[1]):
            expert = int(index[token, rank])
            if expert == module.num_experts:
                continue
            changed = dict(roles[expert])
            for place, (a, b) in factors.items():
                held = module.adapters[place]
                for role, part in zip(held.roles, b[expert].chunk(len(held.roles)), strict=True):
                    changed[role] = changed[role] + held.scale * part @ a[expert]
            given = {role: changed[role] @ hidden[token] + changed.get(f"{role}_bias", 0) for role in ("gate", "up") if role in changed}
            inner = activate(name, given.get("gate"), given["up"])
            total = total + weights[token, rank] * (changed["down"] @ inner + changed.get("down_bias", 0))
        rows.append(total)
    return torch.stack(rows)


def gradients(module: Experts, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the module finds in float32, and float64 autograd: output and every gradient, by name."""
    hidden, index, weights = inputs()
    torch.manual_seed(2)
    cotangent = torch.randn(hidden.shape)
    out = module(hidden, index, weights)
    out.backward(cotangent)
    found = {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad}
    wide = {place: tuple(t.detach().double().requires_grad_() for t in (lora.a, lora.b)) for place, lora in module.adapters.items()}
    hidden, index, weights = inputs(torch.float64)
    right = dense(module, name, hidden, index, weights, wide)
    right.backward(cotangent.double())
    expected = {"out": right.detach(), "hidden": hidden.grad, "weights": weights.grad}
    for place, lora in module.adapters.items():
        found |= {f"{place}.a": lora.a.grad.clone(), f"{place}.b": lora.b.grad.clone()}
        expected |= {f"{place}.a": wide[place][0].grad, f"{place}.b": wide[place][1].grad}
        lora.a.grad = lora.b.grad = None
    return found, expected


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: relative(found[name].double(), right) for name, right in expected.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_dense_matrices(name, backend, tmp_path):
    module = module_of(name, tmp_path / "base", backend)
    found, expected = gradients(module, name)
    assert max(worst(found, expected).values()) <= LIMIT
    with torch.no_grad():
        assert relative(module(*inputs()).double(), expected["out"]) <= LIMIT


@pytest.mark.parametrize("targets", [("gate",), ("up", "down"), ("down",), ("gate", "up")], ids="-".join)
def test_some_targets_alone(targets, tmp_path):
    module = module_of("gpt-oss/openai", tmp_path / "base", targets=targets)
    found, expected = gradients(module, "gpt-oss/openai")
    for place, lora in module.adapters.items():
        if lora.targets != lora.roles:  # what is no target gets no gradient
            kept = lora.b.new_tensor([float(role in targets) for role in lora.roles]).repeat_interleave(len(lora.b[0]) // len(lora.roles)).view(1, -1, 1)
            assert not found[f"{place}.b"].mul(1 - kept).any()
            expected[f"{place}.b"] = expected[f"{place}.b"] * kept
    assert max(worst(found, expected).values()) <= LIMIT


MUTATIONS = {
    "adapter of down is not in the gradient of its input": (compute.Part, "through_a", lambda self, back: through_a(self, back) * 0),
    "scale is left out of the gradient of b": (compute, "outer", lambda a, b, ends: outer(a, b, ends) * 1.01),
    "routing weights are left out": (
        routed,
        "_through_down",
        lambda down, inner, grad, w, into: through_down(down, inner, grad, w * 0 + 1, into),
    ),
    "a bias is left out of the routing weights' gradient": (
        compute.Held,
        "dense",
        lambda self, experts, dtype: held_dense(self, experts, dtype) * (len(self.shape) > 1),
    ),
    "the matrices are turned in backward": (compute.Part, "through", lambda self, lines: through(self, lines).flip(-1)),
}
through_a, outer, through_down = compute.Part.through_a, compute.outer, routed._through_down
held_dense, through = compute.Held.dense, compute.Part.through


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_step_is_seen_by_a_wide_margin(mutation, tmp_path, monkeypatch):
    module = module_of("gpt-oss/openai", tmp_path / "base")
    with torch.no_grad():  # random checkpoints have small biases
        next(line for line in module.lines if line.line.short == "down_proj_bias").part_value.normal_()
    expected = gradients(module, "gpt-oss/openai")[1]
    monkeypatch.setattr(*MUTATIONS[mutation])
    found, _ = gradients(module, "gpt-oss/openai")
    assert max(worst(found, expected).values()) > POWER


@pytest.mark.parametrize("most", [0, compute.TOGETHER], ids=["each by itself", "together"])
def test_the_factors_of_a_block(most, tmp_path, monkeypatch):
    """Several experts in one product; a row that is changed by the others' factors too is seen."""
    monkeypatch.setattr(compute, "TOGETHER", most)
    module = module_of("gpt-oss/openai", tmp_path / "base", "grouped", sizes={"e": 8})
    found, expected = gradients(module, "gpt-oss/openai")
    assert max(worst(found, expected).values()) <= LIMIT
    right, seen = compute.Part.others.func, []

    def none(self):
        seen.append(right(self))
        return None if seen[-1] is None else torch.zeros_like(seen[-1])

    broken = cached_property(none)
    broken.__set_name__(compute.Part, "others")
    monkeypatch.setattr(compute.Part, "others", broken)
    found, _ = gradients(module, "gpt-oss/openai")
    assert any(mask is not None for mask in seen) == bool(most)
    assert (max(worst(found, expected).values()) > POWER) == bool(most)


def test_where_torchs_grouped_product_is_one_kernel(monkeypatch):
    """Elsewhere it asks the device where each run ends, and a step that must not wait for that cannot use it."""
    from moeglot.nn.grouped import is_native

    for capability, native in {(7, 5): False, (8, 0): False, (8, 9): False, (9, 0): True, (10, 3): True, (11, 0): False, (12, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert is_native(torch.device("cuda", 0), torch.bfloat16) == native, capability
        assert not is_native(torch.device("cuda", 0), torch.float32)
    assert not is_native(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("backend", ["eager", "grouped"])
def test_grouped_kernels_and_padded_strides(backend, tmp_path, monkeypatch):
    """torch's own grouped_mm, as on a GPU, on rows whose strides it refuses."""
    from moeglot.nn import backends, grouped

    monkeypatch.setattr(grouped, "is_native", lambda *_: True)
    monkeypatch.setitem(backends.BUDGET, "cpu", 1 << 16)
    module = module_of("qwen3-moe/transformers-5", tmp_path / "base", backend, sizes={"h": 64, "i": 35})
    with pytest.raises(RuntimeError, match="16 bytes"):
        torch.nn.functional.grouped_mm(torch.randn(8, 35), torch.randn(2, 64, 35).mT, offs=torch.tensor([4, 8], dtype=torch.int32))
    assert max(worst(*gradients(module, "qwen3-moe")).values()) <= LIMIT


@pytest.mark.parametrize("backend", ["eager", "grouped"])
def test_sums_as_on_a_gpu(backend, tmp_path, monkeypatch):
    """Each slot has a place of its own, also those that belong to nobody."""
    from moeglot.nn import routing

    monkeypatch.setattr(routing, "adds_in_order", lambda device: False)
    module = module_of("gpt-oss/openai", tmp_path / "base", backend)
    assert max(worst(*gradients(module, "gpt-oss/openai")).values()) <= LIMIT


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_experts(backend, tmp_path):
    module = module_of("gpt-oss/openai", tmp_path / "base", backend)
    none = module(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert none.shape == (0, 64)
    hidden = torch.randn(3, 64, requires_grad=True)
    out = module(hidden, torch.full((3, 2), SIZES["e"]), torch.ones(3, 2))
    assert not out.any()


def test_dropout_is_the_same_in_backward_and_off_in_evaluation(tmp_path):
    """The loss along a random direction, by differences in float64 against the gradient; the same seed draws the same mask."""
    module = module_of("qwen3-moe/hub", tmp_path / "base", dropout=0.4).double()
    hidden, index, weights = inputs(torch.float64)

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        return module(hidden, index, weights).square().sum()

    loss().backward()
    for tensor in (hidden, weights, *(parameter for lora in module.adapters.values() for parameter in lora.parameters())):
        direction, step = torch.randn_like(tensor), 1e-6
        with torch.no_grad():
            tensor += step * direction
            high = loss()
            tensor -= 2 * step * direction
            low = loss()
            tensor += step * direction
        along = float((tensor.grad * direction).sum())
        assert abs(float(high - low) / (2 * step) - along) <= 1e-5 * abs(along) + 1e-8
    dropped = module(hidden, index, weights)
    assert not torch.equal(dropped, module(hidden, index, weights))
    module.eval()
    assert torch.equal(module(hidden, index, weights), module(hidden, index, weights))
    assert relative(dropped.detach(), module(hidden, index, weights).detach()) > POWER


@pytest.mark.parametrize("targets", [("gate", "up"), ("down",)], ids="-".join)
def test_dropout_is_the_whole_adapter_on_average(targets, tmp_path):
    """Of a change so small that the output is linear in it."""
    module = module_of("qwen3-moe/hub", tmp_path / "base", targets=targets, dropout=0.4).double()
    hidden, index, weights = (tensor.detach() for tensor in inputs(torch.float64))
    (lora,) = module.adapters.values()
    with torch.no_grad():
        small = lora.b * 1e-6
        lora.b.zero_()
        plain = module(hidden, index, weights)
        lora.b.copy_(small)
        mean = sum(module(hidden, index, weights) - plain for _ in range(400)) / 400
        assert relative(mean, module.eval()(hidden, index, weights) - plain) < 0.15


def test_each_block_of_each_adapter_has_a_mask_of_its_own(tmp_path):
    module = module_of("qwen3-moe/hub", tmp_path / "base", dropout=0.5)
    blocks, x = [SimpleNamespace(experts=slice(n, n + 1)) for n in range(SIZES["e"])], torch.ones(8, 64)
    masks = [module.factors(place, seed=7).mask(block, x) for place in ("first", "down") for block in blocks]
    for one, other in itertools.combinations(masks, 2):
        assert 0.4 < float((one == other).double().mean()) < 0.6


def test_nothing_dense_is_kept(tmp_path):
    """What autograd saves: the tokens, the weights of routing, its order and ends, and the factors."""
    module, saved = module_of("gpt-oss/openai", tmp_path / "base"), []
    hidden, index, weights = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        module(hidden, index, weights)
    factors = {tuple(p.shape) for lora in module.adapters.values() for p in lora.parameters()}
    assert {tuple(t.shape) for t in saved} <= {tuple(hidden.shape), tuple(weights.shape), (TOKENS * RANKS,), (SIZES["e"],)} | factors
    assert any(t.data_ptr() == hidden.data_ptr() for t in saved)


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(tmp_path):
    write_checkpoint(tmp_path / "base", "gpt-oss/openai")
    module = Experts.of(moeglot.open(tmp_path / "base"), 0)
    hidden, index, weights = inputs()
    before = module(hidden, index, weights).detach()
    added = add_lora(module, 4)
    assert [parameter.shape for parameter in added] == [parameter.shape for parameter in module.parameters()]
    assert torch.equal(module(hidden, index, weights), before)
    with pytest.raises(UsageError, match="has an adapter"):
        add_lora(module, 4)
    with pytest.raises(KeyError, match="gate"):
        module.factors("gate")
    remove_lora(module)
    assert not list(module.parameters())
    for wrong, told in (
        ({"r": 0}, "a rank is"),
        ({"targets": ("q_proj",)}, "tune --modules"),
        ({"dropout": 1.0}, "below 1"),
        ({"targets": ()}, "targets name"),
    ):
        with pytest.raises(UsageError, match=told):
            add_lora(module, **{"r": 4, **wrong})
    with pytest.raises(UsageError, match="native=True"):
        add_lora(torch.nn.Linear(2, 2), 4)


def test_float16_and_bfloat16_and_autocast(tmp_path):
    module = module_of("gpt-oss/openai", tmp_path / "base")
    hidden, index, weights = inputs()
    right = module(hidden, index, weights).detach()
    for dtype, limit in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        found = module(hidden.to(dtype), index, weights.to(dtype))
        assert found.dtype == dtype
        assert relative(found.detach().float(), right) <= limit
    with torch.autocast("cpu", torch.bfloat16):
        found = module(hidden, index, weights)
    assert found.dtype == torch.float32
    assert 1e-5 < relative(found.detach(), right) <= 3e-2
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_gradients_in_bfloat16_with_and_without_products_of_it(tmp_path, monkeypatch):
    """A CPU without products of 16 bits takes the way over float32, which is off by no more than the rounding of what comes in and out.

    On such a CPU they are torch's plain loop, since oneDNN refuses them.
    """
    from moeglot.nn import grouped

    onednn = grouped.has_onednn() and grouped.has_kernels(torch.bfloat16)
    monkeypatch.setattr(grouped, "has_onednn", lambda: onednn)
    module, off = module_of("gpt-oss/openai", tmp_path / "base"), []
    torch.manual_seed(2)
    cotangent = torch.randn(TOKENS, 64).bfloat16()
    wide = {place: tuple(t.detach().double() for t in (lora.a, lora.b)) for place, lora in module.adapters.items()}
    hidden, index, weights = (t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs(torch.bfloat16))
    right = dense(module, "gpt-oss", hidden, index, weights, wide)
    right.backward(cotangent.double())
    for has in (True, False):
        monkeypatch.setattr(grouped, "has_kernels", lambda dtype, has=has: has)
        x, index, w = inputs(torch.bfloat16)
        out = module(x, index, w)
        out.backward(cotangent)
        found = {"out": out.detach(), "hidden": x.grad, "weights": w.grad}
        off.append(max(worst(found, {"out": right.detach(), "hidden": hidden.grad, "weights": weights.grad}).values()))
    assert max(off) <= 3e-2
    assert off[1] <= 1.5 * off[0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)], ids=str)
def test_products_of_any_shape(dtype, limit):
    """Those that go to oneDNN, whose rows are padded, and those that do not; matrices as they lie, turned and with gaps; no rows at all."""
    from moeglot.nn.grouped import outer, product

    torch.manual_seed(5)
    for n, inner, out in ((0, 64, 96), (1, 64, 96), (17, 64, 96), (50, 35, 67), (50, 8, 64), (50, 64, 8)):
        x, grad, ends = torch.randn(n, inner).to(dtype), torch.randn(n, out).to(dtype), torch.tensor([n])
        for matrix in (torch.randn(inner, out), torch.randn(out, inner).mT, torch.randn(2 * inner, out)[::2]):
            found, expected = product(x, matrix.to(dtype)), x.double() @ matrix.to(dtype).double()
            assert (found.shape, found.dtype) == (expected.shape, dtype)
            assert not n or relative(found.double(), expected) <= limit
        found, expected = outer(x, grad, ends)[0], x.double().mT @ grad.double()
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        assert not n or relative(found.double(), expected) <= limit


FUSED = {
    "scale is left out of the gradients of the factors": ("outer", lambda right: lambda *given, **how: right(*given, **how) * 1.01),
    "the matrices are turned in backward": ("Step.backward", lambda right: lambda *given, **how: right(*given, **how).flip(-1)),
    "what follows a is left out in backward": ("Step.through_b", lambda right: lambda *given, **how: right(*given, **how) * 0),
    "the adapter is left out": ("Step.low", lambda right: lambda *given, **how: right(*given, **how) * 0),
    "slots of another token are summed": ("Step.summed", lambda right: lambda step, slots: right(step, slots.roll(1, 0))),
}


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not at work (make matrix-triton)")
@pytest.mark.parametrize("mutation", FUSED)
def test_a_wrong_step_of_the_kernels_is_seen(mutation, tmp_path, monkeypatch):
    from moeglot.nn import fused

    module = module_of("gpt-oss/openai", tmp_path / "base", "triton")
    place, wrong = FUSED[mutation]
    owner, name = (fused.Step, place.partition(".")[2]) if "." in place else (fused, place)
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    assert max(worst(*gradients(module, "gpt-oss/openai")).values()) > POWER

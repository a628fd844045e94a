"""The small kernels around the products, run by Triton's interpreter in float32: routing, activation and sum, against torch's."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter of Triton's kernels needs TRITON_INTERPRET=1 before Python starts (make matrix-triton)", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (make matrix-triton)")

from routed_products import relative

from moeglot.experts import Expert
from moeglot.formats import FAMILIES
from moeglot.kernels.triton import between, route
from moeglot.nn.routing import Routing

LIMIT, POWER = 1e-6, 1e-3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize(("tokens", "ranks", "experts"), [(1, 1, 2), (1, 8, 5), (33, 3, 4), (33, 8, 130), (70, 2, 1), (128, 8, 64)])
def test_slots_are_sorted_as_torch_sorts_them(tokens, ranks, experts, dtype):
    """With ids of nobody on both sides."""
    torch.manual_seed(tokens + ranks)
    index = torch.randint(-2 if dtype.is_signed else 0, experts + 3, (tokens, ranks)).to(dtype)
    expected = Routing.of(index, experts)
    order, starts, ends = route.route(index, experts)
    assert (order.dtype, ends.dtype) == (expected.order.dtype, expected.ends.dtype)
    assert torch.equal(order, expected.order)
    assert torch.equal(ends, expected.ends)
    assert torch.equal(starts, torch.nn.functional.pad(expected.ends[:-1], (1, 0)))


def test_ids_that_no_32_bits_hold_are_nobodys():
    index = torch.tensor([[1 << 32, 0], [-(1 << 40), 1]])
    assert torch.equal(route.route(index, 2)[0], Routing.of(index, 2).order)


EXPERTS = {(family.activation.kind, family.activation.function[1]): Expert.of(family, {}) for family in FAMILIES}
OTHERS = [Expert("swiglu", name, {}, ("gate", "up", "down")) for name in ("gelu", "gelu_new", "swish", "relu", "relu2")]
CAPPED = [Expert("capped-swiglu", "silu", {"limit": 1.0}, ("gate", "up", "down")), Expert("softcapped-swiglu", "silu", {"gate_cap": 4.0, "up_cap": 25.0}, ())]


def of_all(rows: int, columns: int, scale: float, gated: bool) -> dict[str, dict[str, torch.Tensor]]:
    """As the products of each arrangement of gate and up leave them: name -> role -> [n, i]."""
    torch.manual_seed(rows + columns)
    values = torch.randn(rows, 2, columns) * scale
    gate, up = values.unbind(1)
    if not gated:
        return {"alone": {"up": up.contiguous()}}
    rows_of = {"one after the other": values.flatten(1).view(rows, 2, columns).unbind(1), "in turns": values.mT.contiguous().unbind(-1)}
    return {name: dict(zip(("gate", "up"), both, strict=True)) for name, both in rows_of.items()} | {
        "apart": {"gate": gate.contiguous(), "up": up.contiguous()}
    }


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("expert", [*EXPERTS.values(), *OTHERS, *CAPPED], ids=lambda expert: f"{expert.kind}-{expert.function}")
def test_activations_of_all_families(expert, scale):
    for rows, columns in ((1, 40), (5, 700)):
        for name, given in of_all(rows, columns, scale, expert.kind != "ungated").items():
            expected = expert.activate({role: one.double() for role, one in given.items()})
            found = between.activated(expert.kind, expert.function, expert.numbers, given)
            assert found.is_contiguous()
            assert relative(found, expected) <= LIMIT, name
            if len(given) == 2:
                swapped = between.activated(expert.kind, expert.function, expert.numbers, {"gate": given["up"], "up": given["gate"]})
                assert relative(swapped, expected) > POWER


def test_what_is_not_finite_stays_so():
    gate, up = torch.tensor([[torch.nan, 1.0, torch.inf, 2.0]]), torch.tensor([[1.0, torch.nan, 2.0, -torch.inf]])
    for expert in [*EXPERTS.values(), *CAPPED]:
        if expert.kind != "ungated":
            found = between.activated(expert.kind, expert.function, expert.numbers, {"gate": gate, "up": up})
            expected = expert.activate({"gate": gate, "up": up})
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_what_the_kernel_does_not_know_is_left_to_torch():
    given = {"gate": torch.ones(2, 3), "up": torch.ones(2, 3)}
    assert between.activated("swiglu", "mish", {}, given) is None
    assert between.activated("another", "silu", {}, given) is None
    assert between.activated("ungated", "relu", {}, given) is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 33])
def test_sums_of_a_tokens_slots(tokens, ranks):
    slots = torch.randn(tokens * ranks, 600, generator=torch.Generator().manual_seed(ranks))
    found, expected = between.summed(slots, tokens), slots.double().view(tokens, ranks, -1).sum(1)
    assert relative(found, expected) <= LIMIT
    assert torch.equal(found, between.summed(slots, tokens))
    if ranks > 1 and tokens > 1:
        assert relative(between.summed(slots.roll(1, 0), tokens), expected) > POWER

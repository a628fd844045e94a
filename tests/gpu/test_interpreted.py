"""The Triton kernels run by Triton's interpreter on a CPU, in float32: decoding bit for bit against torch's tables, products against float64."""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter of Triton's kernels needs TRITON_INTERPRET=1 before Python starts (make matrix-triton)", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (make matrix-triton)")

from routed_products import KINDS, Case, relative
from synthetic import write_checkpoint

import moeglot
from moeglot.encodings import by_name
from moeglot.errors import BadNumbers, UsageError
from moeglot.kernels import backend, fp8, mxfp4
from moeglot.kernels.triton import dequant, gemm
from moeglot.kernels.triton.gemm import Change, Matrices, Rows
from moeglot.kernels.triton.launch import check_dtype
from moeglot.kernels.triton.outer import outer
from moeglot.nn import Experts, add_lora, coded, fused

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN: a GPU's holds anything, and the interpreter would find zeros there."""

    def with_nan(made):
        return made.fill_(torch.nan) if made.dtype in (torch.float32, torch.bfloat16) else made

    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        usual = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, usual=usual, **options: with_nan(usual(*given, **options)))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, the sign of zero and of NaN too."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, and NaN where the other has NaN, whatever its payload."""
    return bool((a.isnan() == b.isnan()).all()) and same(a.nan_to_num(nan=3.5), b.nan_to_num(nan=3.5))


def places(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """[rows, columns] as it may lie in memory; filled with what no decoding leaves."""
    rows, columns = shape
    found = {
        "rows": torch.empty(rows, columns, dtype=dtype),
        "turned": torch.empty(columns, rows, dtype=dtype).mT,
        "every other row, turned": torch.empty(columns, rows, 2, dtype=dtype)[..., 1].mT,
    }
    return {name: place.fill_(7.25) for name, place in found.items()}


# --- decoding --------------------------------------------------------------------------------------------------------------------------


@DTYPES
def test_mxfp4_over_all_bytes_and_scales(dtype):
    scale = BYTES[:253].view(-1, 1).expand(253, 16).contiguous()
    packed = BYTES.view(1, 16, 16).expand(253, 16, 16).contiguous()
    with backend.using("torch"):
        expected = mxfp4.decode(packed, scale, dtype)
    for name, place in places((253, 512), dtype).items():
        assert same(dequant.mxfp4(packed, scale, place), expected), name
    with backend.using("triton"):
        assert same(mxfp4.decode(packed, scale, dtype), expected)


@pytest.mark.parametrize("scale", [252, 253, 254, 255])
def test_mxfp4_refuses_what_the_tables_refuse(scale):
    for code in range(16):
        parts = torch.full((2, 1, 16), code * 17, dtype=torch.uint8), torch.full((2, 1), scale, dtype=torch.uint8)
        told = []
        for name in ("torch", "triton"):
            with backend.using(name):
                try:
                    mxfp4.decode(*parts, torch.bfloat16)
                    told.append(None)
                except BadNumbers as error:
                    told.append(str(error))
        assert told[0] == told[1], code
    assert bool(dequant.mxfp4(*parts, torch.zeros(2, 32)).isnan().all()) == (scale == 255)


@DTYPES
def test_fp8_over_all_bytes_and_many_scales(dtype):
    """All codes, the two NaN too, under scales of all sizes, subnormal ones too, so that products round and underflow; blocks with short tails."""
    exponents = torch.arange(-149, 119).float()
    factors = torch.cat([torch.exp2(exponents[::3]), torch.exp2(exponents[30::4]) * 1.3371, -torch.exp2(exponents[100:104])])
    weight = BYTES.view(1, 256).expand(3 * len(factors) - 1, 256).contiguous().view(torch.float8_e4m3fn)
    scale = torch.stack([factors, factors.flip(0), factors, factors.roll(7)], -1).contiguous()
    for block in ((3, 64), (3, 80)):
        with backend.using("torch"):
            expected = fp8.decode(weight, scale, block, dtype)
        for name, place in places((len(weight), 256), dtype).items():
            assert alike(dequant.fp8(weight, scale, block, place), expected), name
        with backend.using("triton"):
            assert alike(fp8.decode(weight, scale, block, dtype), expected)


@pytest.mark.parametrize("name", ["mxfp4", "fp8-block", "fp8-block:e8m0", "fp8-channel", "fp8-tensor", "mxfp8"])
def test_encodings_of_several_experts(name):
    encoding = by_name(name)
    parts = encoding.encode(torch.randn(3, 160, 192, generator=torch.Generator().manual_seed(1)))
    expected = encoding.decode(parts, torch.bfloat16)
    turned = torch.empty(3, 192, 160, dtype=torch.bfloat16)
    with backend.using("triton"):
        assert same(encoding.decode(parts, torch.bfloat16), expected)
        assert encoding.decode(parts, torch.bfloat16, turned.mT).data_ptr() == turned.data_ptr()
    assert same(turned.mT, expected)


def test_a_wrong_bit_is_seen():
    """The power of the comparisons above: one code's sign, that of a zero too, and one scale."""
    packed, scale = BYTES.view(1, 16, 16).contiguous(), torch.full((1, 16), 127, dtype=torch.uint8)
    expected = mxfp4.decode(packed, scale, torch.float32)
    for wrong in (packed ^ (BYTES == 0).byte().view_as(packed) * 8, packed ^ (BYTES == 77).byte().view_as(packed) * 8):
        assert not same(dequant.mxfp4(wrong, scale, torch.empty(1, 512)), expected)
    assert not same(dequant.mxfp4(packed, scale + (torch.arange(16) == 5).byte(), torch.empty(1, 512)), expected)


# --- products --------------------------------------------------------------------------------------------------------------------------

CASES = {
    "square": ((4, 64, 64), 9, 2, ()),
    "h = 2i, an expert without tokens": ((5, 64, 128), 13, 2, (2,)),
    "e = h, most experts without tokens": ((32, 32, 32), 3, 2, (0, 31)),
    "no whole tiles": ((3, 160, 96), 37, 3, (1,)),
    "one expert has all tokens": ((4, 64, 32), 40, 1, (0, 1, 3)),
    "more tiles than stand together": ((4, 64, 64), 70, 2, ()),
    "nobody is here": ((2, 32, 32), 3, 2, (0, 1)),
}
LIMIT, POWER = 1e-5, 1e-3
ALONG = pytest.mark.parametrize("along", [True, False], ids=["forward", "backward"])


def case_of(name: str, kind: str) -> Case:
    sizes, tokens, ranks, idle = CASES[name]
    return Case(kind, sizes, tokens, ranks, idle)


@ALONG
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_products_against_float64(name, kind, along):
    case = case_of(name, kind)
    x = case.random(case.tokens, case.sizes[2 if along else 1])
    found = gemm.product(x, case.matrices, case.rows, along, gather=True)
    assert torch.equal(found[case.count :], torch.zeros_like(found[case.count :]))
    in_slots = gemm.product(x, case.matrices, case.rows, along, gather=True, scatter=True)
    assert torch.equal(in_slots[case.rows.order], found)
    if case.count:
        assert relative(found, case.expected(x, along, gather=True)) <= LIMIT


@ALONG
@pytest.mark.parametrize("rank", [3, 20, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_done_to_a_tile(kind, rank, along):
    case = Case(kind, (3, 64, 96), 12, 2, (1,))
    e, n = case.sizes[0], len(case.rows.order)
    inner, outer_ = (case.sizes[2], case.sizes[1]) if along else (case.sizes[1], case.sizes[2])
    x, change = case.random(n, inner), Change(case.random(n, rank), case.random(e, outer_, rank).mT)
    options = {"scatter": True, "bias": case.random(e, outer_), "change": change, "weights": case.random(n)}
    expected = case.expected(x, along, **options)
    assert relative(gemm.product(x, case.matrices, case.rows, along, **options), expected) <= LIMIT
    for left_out in options:
        assert relative(gemm.product(x, case.matrices, case.rows, along, **{**options, left_out: None}), expected) > POWER, left_out


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as every third of a larger tensor, among others."""
    return torch.full((*tensor.shape, 3), 7.25, dtype=tensor.dtype)[..., 1].copy_(tensor)


def test_all_that_is_given_to_a_product_may_have_gaps():
    case = Case("fp8", (3, 64, 96), 12, 2, (1,))
    x, bias, low, weights = case.random(24, 96), case.random(3, 64), case.random(24, 5), case.random(24)
    side = case.random(3, 64, 5).mT
    expected = gemm.product(x, case.matrices, case.rows, True, bias=bias, change=Change(low, side), weights=weights)
    x, bias, low, side, weights, scale = map(with_gaps, (x, bias, low, side, weights, case.matrices.scale))
    matrices = replace(case.matrices, scale=scale)
    assert torch.equal(gemm.product(x, matrices, case.rows, True, bias=bias, change=Change(low, side), weights=weights), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_matrix_is_seen(kind):
    """The power of the comparisons above: matrices turned, experts rolled, rows of one expert taken for another's, gate and up taken for each other."""
    case = case_of("square", kind)
    x = case.random(case.tokens, 64)
    expected = case.expected(x, True, gather=True)
    right = gemm.product(x, case.matrices, case.rows, True, gather=True)
    assert relative(right, expected) <= LIMIT
    turned = gemm.product(x, case.matrices, case.rows, False, gather=True)
    rolled = replace(case.matrices, codes=case.matrices.codes.view(torch.uint8).roll(1, 0).view(case.matrices.codes.dtype))
    swapped = replace(case.matrices, codes=case.matrices.codes.view(torch.uint8).roll(32, 1).view(case.matrices.codes.dtype))
    shifted = Rows(case.rows.starts, (case.rows.ends - 1).clamp(min=0), case.rows.order, case.rows.ranks)
    for wrong in (turned, *(gemm.product(x, matrices, case.rows, True, gather=True) for matrices in (rolled, swapped))):
        assert relative(wrong, expected) > 100 * POWER
    assert not relative(gemm.product(x, case.matrices, shifted, True, gather=True), expected) <= POWER


@pytest.mark.parametrize("rank", [5, 70])
@pytest.mark.parametrize("gather", [True, False])
def test_sums_over_an_experts_rows(gather, rank):
    case = case_of("one expert has all tokens", "plain")
    n = len(case.rows.order)
    narrow, wide = case.random(n, rank), case.random(case.tokens if gather else n, 40)
    rows = wide[case.rows.order // case.ranks] if gather else wide
    expected = torch.zeros(case.sizes[0], rank, 40, dtype=torch.float64)
    for m in range(case.count):
        expected[case.ids[m]] += torch.outer(narrow[m].double(), rows[m].double())
    assert relative(outer(narrow, wide, case.rows, gather), expected) <= LIMIT


def test_some_experts_write_beside_the_others():
    case = case_of("h = 2i, an expert without tokens", "mxfp4")
    x, out = case.random(case.tokens, 128), torch.zeros(case.tokens * 2, 64)
    for some in (range(2), range(2, 5)):
        mine = slice(some.start, some.stop)
        few = Matrices("mxfp4", case.matrices.codes[mine], case.matrices.scale[mine], (len(some), 64, 128))
        gemm.product(x, few, case.rows.some(some), True, gather=True, out=out)
    assert torch.equal(out, gemm.product(x, case.matrices, case.rows, True, gather=True))


# --- layers ----------------------------------------------------------------------------------------------------------------------------


def layer(tmp_path, name: str, backend: str = "triton") -> Experts:
    torch.manual_seed(0)  # of the adapter that it may get
    write_checkpoint(tmp_path / "base", name, {"h": 64, "i": 32, "e": 4}, dtype=torch.float32)
    return Experts.of(moeglot.open(tmp_path / "base", name), 0, backend=backend)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(11, 64) * 2, torch.stack([torch.randperm(5)[:2] for _ in range(11)]), torch.rand(11, 2)


@pytest.mark.parametrize("name", ["gpt-oss/openai", "qwen3-moe/hub"])
def test_many_rows_are_decoded_first(name, tmp_path, monkeypatch):
    """Above the crossover, torch's grouped GEMM: on this machine it is a loop, and the numbers are the same."""
    module = layer(tmp_path, name)
    expected, calls = module(*inputs()), []
    monkeypatch.setattr(coded, "CROSSOVER", 1)
    monkeypatch.setattr(coded, "is_native", lambda *_: True)
    whole = coded._decoded_first
    monkeypatch.setattr(coded, "_decoded_first", lambda *given: calls.append(1) or whole(*given))
    assert relative(module(*inputs()), expected) <= LIMIT
    assert calls


def test_routing_weights_that_are_a_column_of_all(tmp_path):
    """As a router with one expert a token hands them out: [t, 1], a row's stride from the next."""
    module, (hidden, _, _), weights = layer(tmp_path, "gpt-oss/openai"), inputs(), torch.rand(11, 4)
    index, one = torch.randint(0, 4, (11, 1)), weights[:, :1].requires_grad_()
    assert one.stride() == (4, 1)
    found = {}
    for module.backend in ("reference", "triton"):
        out = module(hidden, index, one)
        found[module.backend] = out.detach(), torch.autograd.grad(out.square().sum(), one)[0]
    for mine, expected in zip(found["triton"], found["reference"], strict=True):
        assert relative(mine, expected) <= LIMIT
    side_by_side = weights.reshape(-1)[:11].view(11, 1)
    assert relative(module(hidden, index, side_by_side).detach(), found["reference"][0]) > POWER


def test_scales_that_one_multiplication_cannot_reach(tmp_path, monkeypatch):
    """A scale above 128: the layer is decoded by the way that takes any scale, and the kernels would have been wrong."""
    module = layer(tmp_path, "gpt-oss/openai")
    line = next(line for line in module.lines if line.line.short == "gate_up_proj")
    assert coded.matrices(line, torch.float32)
    state = module.state_dict()
    key = next(key for key in state if key.endswith("gate_up_proj_scales"))
    module.load_state_dict({**state, key: torch.full_like(state[key], 127).index_fill_(1, torch.tensor([3]), 129)})
    assert coded.matrices(line, torch.float32) is None
    module.backend = "reference"
    expected = module(*inputs())
    module.backend = "triton"
    assert relative(module(*inputs()), expected) <= LIMIT
    monkeypatch.setattr(coded, "LARGEST_SCALE", 255)
    assert not relative(module(*inputs()), expected) <= POWER


def test_dropout_draws_once_for_both_directions(tmp_path):
    """The loss along a random direction, by differences, against the gradient."""
    module = layer(tmp_path, "gpt-oss/openai")
    add_lora(module, 3, 6, dropout=0.4)
    for lora in module.adapters.values():
        torch.nn.init.normal_(lora.b)
    hidden, index, weights = inputs()

    def loss(shift: float, direction: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return module(hidden + shift * direction, index, weights).double().square().sum()

    direction = torch.randn_like(hidden)
    hidden.requires_grad_()
    loss(0, direction).backward()
    along, step = float((hidden.grad.double() * direction).sum()), 1e-3
    with torch.no_grad():
        differences = float(loss(step, direction) - loss(-step, direction)) / (2 * step)
    assert abs(differences - along) <= 2e-3 * abs(along)


def test_tokens_are_gathered_in_the_kernels(tmp_path, monkeypatch):
    """A copy of them for each slot is made for dropout alone."""
    module, (hidden, index, weights) = layer(tmp_path, "gpt-oss/openai"), inputs()
    add_lora(module, 3, 6, dropout=0.4)
    monkeypatch.setattr(fused.Step, "gathered", lambda *_: pytest.fail("gathered"))
    with pytest.raises(pytest.fail.Exception):
        module(hidden, index, weights)
    for lora in module.adapters.values():
        lora.dropout = 0.0
    module(hidden.requires_grad_(), index, weights).sum().backward()


def test_a_conversion_by_the_kernels_writes_the_same_bytes(tmp_path):
    write_checkpoint(tmp_path / "base", "gpt-oss/openai", {"h": 64, "i": 32})
    for name in ("torch", "triton"):
        with backend.using(name):
            moeglot.convert(tmp_path / "base", "gpt-oss/transformers", tmp_path / name, encode="bfloat16", workers=1)  # the interpreter is one for all threads
    files = sorted(path.name for path in (tmp_path / "torch").glob("*.safetensors"))
    assert files
    assert all((tmp_path / "torch" / file).read_bytes() == (tmp_path / "triton" / file).read_bytes() for file in files)


def test_what_cannot_run_is_refused():
    with pytest.raises(UsageError, match="TRITON_INTERPRET"):
        check_dtype(torch.bfloat16)
    with pytest.raises(UsageError, match="no cuda kernels"), backend.using("cuda"):
        pass

"""The Triton kernels on a GPU: decoding bit for bit, products and gradients against float64, no wait for the device, and capture in a graph."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (make matrix-triton)")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here: what needs one was not tested", allow_module_level=True)

from routed_products import KINDS, Case, relative
from synthetic import write_checkpoint

import moeglot
from moeglot.errors import BadNumbers
from moeglot.experts import Expert
from moeglot.formats import FAMILIES
from moeglot.kernels import backend, fp8, mxfp4
from moeglot.kernels.triton import between, route
from moeglot.kernels.triton.gemm import Change, product
from moeglot.kernels.triton.tiles import table_of
from moeglot.nn import Experts, add_lora
from moeglot.nn.routing import Routing

pytestmark = pytest.mark.skipif(table_of(torch.device("cuda")) is None, reason="the kernels that multiply are for sm_80 and later")
BYTES = torch.arange(256, dtype=torch.uint8)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
ALONG = pytest.mark.parametrize("along", [True, False], ids=["forward", "backward"])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, except what NaN carries."""
    a, b = a.cpu(), b.cpu()
    return bool((a.isnan() == b.isnan()).all()) and torch.equal(
        a.nan_to_num(nan=3.5).contiguous().view(torch.uint8), b.nan_to_num(nan=3.5).contiguous().view(torch.uint8)
    )


@DTYPES
def test_mxfp4_over_all_bytes_and_scales(dtype):
    scale = BYTES[:253].view(-1, 1).expand(253, 16).contiguous()
    packed = BYTES.view(1, 16, 16).expand(253, 16, 16).contiguous()
    expected = mxfp4.decode(packed, scale, dtype)
    assert same(mxfp4.decode(packed.cuda(), scale.cuda(), dtype), expected)
    turned = torch.empty(512, 253, dtype=dtype, device="cuda")
    assert same(mxfp4.decode(packed.cuda(), scale.cuda(), dtype, turned.mT), expected)
    with backend.using("torch"):
        assert same(mxfp4.decode(packed.cuda(), scale.cuda(), torch.float32), mxfp4.decode(packed, scale, torch.float32))
    with pytest.raises(BadNumbers, match="255"):
        mxfp4.decode(packed.cuda(), torch.full_like(scale, 255).cuda(), dtype)


@DTYPES
def test_fp8_over_all_bytes_and_many_scales(dtype):
    exponents = torch.arange(-149, 119).float()
    factors = torch.cat([torch.exp2(exponents), torch.exp2(exponents[30:]) * 1.3371])
    weight = BYTES.view(1, 256).expand(len(factors), 256).contiguous().view(torch.float8_e4m3fn)
    scale = torch.stack([factors, factors.flip(0)], -1).contiguous()
    expected = fp8.decode(weight, scale, (1, 128), dtype)
    assert same(fp8.decode(weight.cuda(), scale.cuda(), (1, 128), dtype), expected)
    turned = torch.empty(256, len(factors), dtype=dtype, device="cuda")
    assert same(fp8.decode(weight.cuda(), scale.cuda(), (1, 128), dtype, turned.mT), expected)


@ALONG
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 150, 700, 1500])
@pytest.mark.parametrize("sizes", [(8, 256, 256), (8, 512, 256), (5, 576, 2880)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_against_float64(kind, sizes, tokens, dtype, along):
    """Every size of tile. In bfloat16 the sums are exact to float32, and one rounding remains; FP8's and MXFP4's numbers are bfloat16s."""
    case = Case(kind, sizes, tokens, 2, (1,), "cuda", dtype)
    inner, outer = (sizes[2], sizes[1]) if along else (sizes[1], sizes[2])
    x, n = case.random(tokens, inner), tokens * 2
    change = Change(case.random(n, 16), case.random(sizes[0], outer, 16).mT)
    options = {"gather": True, "scatter": True, "bias": case.random(sizes[0], outer), "change": change, "weights": case.random(n)}
    if kind == "fp8":
        scale = case.matrices.scale.repeat_interleave(128, 1)[:, : sizes[1]].repeat_interleave(128, 2)[..., : sizes[2]]
        case.dense = case.matrices.codes.double() * scale.double()
    elif kind == "plain":
        case.dense = case.matrices.codes.double()
    expected = case.expected(x, along, **options)
    found = product(x, case.matrices, case.rows, along, **options)
    assert relative(found, expected) <= (2**-8 if dtype == torch.bfloat16 else 1e-5)
    if dtype == torch.bfloat16:  # the rounding of the result is all that is lost
        assert relative(found, expected.bfloat16()) <= 2**-9
    options["change"] = Change(change.low.flip(0), change.side)  # the same kernel, which takes a second to compile
    assert relative(product(x, case.matrices, case.rows, along, **options), expected) > 2**-5


@pytest.mark.parametrize(("tokens", "ranks", "experts"), [(1, 4, 32), (33, 8, 300), (128, 8, 128)])
def test_few_slots_are_sorted_as_torch_sorts_them(tokens, ranks, experts):
    torch.manual_seed(tokens)
    index = torch.randint(-2, experts + 3, (tokens, ranks), device="cuda")
    expected, (order, _, ends) = Routing.of(index, experts), route.route(index, experts)
    assert torch.equal(order, expected.order)
    assert torch.equal(ends, expected.ends)


@pytest.mark.parametrize("family", {str(family.activation): family for family in FAMILIES}.values(), ids=lambda family: family.name)
def test_activations_and_sums_are_rounded_once(family):
    """In bfloat16, of gate and up that take turns, against float64."""
    torch.manual_seed(3)
    expert, both = Expert.of(family, {}), torch.randn(50, 700, 2, device="cuda", dtype=torch.bfloat16) * 3
    given = {"gate": both[..., 0], "up": both[..., 1]} if expert.kind != "ungated" else {"up": both[..., 1]}
    found = between.activated(expert.kind, expert.function, expert.numbers, given)
    assert relative(found, expert.activate({role: one.double() for role, one in given.items()})) <= 2**-8
    assert relative(between.summed(found, 10), found.double().view(10, 5, -1).sum(1)) <= 2**-8


def layer(folder, backend: str, device: str = "cuda") -> Experts:
    if not folder.exists():
        write_checkpoint(folder, "gpt-oss/openai", {"h": 128, "i": 64, "e": 8}, dtype=torch.float32)
    module = Experts.of(moeglot.open(folder, "gpt-oss/openai"), 0, backend=backend)
    torch.manual_seed(0)
    add_lora(module, 16, 32)
    for factors in module.adapters.values():
        torch.nn.init.normal_(factors.b)
    return module.to(device)


def inputs(dtype: torch.dtype, tokens: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(9)[:2] for _ in range(tokens)]).cuda()  # the ninth lives elsewhere
    return torch.randn(tokens, 128).to(dtype).cuda(), index, torch.rand(tokens, 2).to(dtype).cuda()


def trained(folder, backend: str, device: str, dtype: torch.dtype, precision: torch.dtype) -> dict[str, torch.Tensor]:
    """A step that trains, on numbers of `dtype`, computed in `precision`: what it gives, and its gradients."""
    module = layer(folder, backend, device)
    hidden, index, weights = (given.to(device) for given in inputs(dtype))
    hidden, weights = (given.to(precision).requires_grad_() for given in (hidden, weights))
    out = module(hidden, index, weights)
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape).to(dtype).to(device).to(precision))
    grads = {f"{place}.{side}": getattr(lora, side).grad for place, lora in module.adapters.items() for side in "ab"}
    return {name: one.detach().cpu() for name, one in {"out": out, "hidden": hidden.grad, "weights": weights.grad, **grads}.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_a_layer(dtype, tmp_path):
    """In bfloat16, what gate and up give is rounded, and the rest of the layer makes more of that: as much as it makes on a CPU, one expert at a time."""
    expected = trained(tmp_path / "base", "reference", "cuda", dtype, torch.float32)
    found = trained(tmp_path / "base", "triton", "cuda", dtype, dtype)
    usual = trained(tmp_path / "base", "eager", "cpu", dtype, dtype)
    for name, one in expected.items():
        rounded = relative(usual[name], one)
        assert rounded <= (5e-2 if dtype == torch.bfloat16 else 1e-5), name
        assert relative(found[name], one) <= (1.5 * rounded if dtype == torch.bfloat16 else 1e-5), name


def test_a_step_never_waits_for_the_device(tmp_path):
    module = layer(tmp_path / "base", "triton")
    hidden, index, weights = inputs(torch.bfloat16)
    hidden.requires_grad_()
    module(hidden, index, weights).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(hidden, index, weights).sum().backward()
        module.backend = "grouped"  # waits, so that the check is seen to fail
        with pytest.raises(RuntimeError, match="synchroniz"):
            module(hidden, index, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_captured_in_a_graph(tmp_path):
    """Replayed for other tokens with another routing, the numbers are those of a step that was not captured."""
    module = layer(tmp_path / "base", "triton")
    given = inputs(torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(*given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(*given)
        given[0].copy_(torch.randn_like(given[0]))
        given[1].copy_(given[1].flip(0))
        graph.replay()
        assert torch.equal(out, module(*given))


@pytest.mark.parametrize("name", ["gpt-oss/openai", "mixtral/hub+fp8-block"])
def test_a_conversion_on_the_gpu_writes_the_same_bytes(name, tmp_path):
    plain = name.partition("+")[0]
    write_checkpoint(tmp_path / "base", plain, {"h": 128, "i": 128}, dtype=torch.float32)
    source = tmp_path / "base"
    if plain != name:
        moeglot.convert(source, name, source := tmp_path / "coded", allow_loss=True)
    to = "gpt-oss/transformers" if plain == "gpt-oss/openai" else "mixtral/hub"
    for device in ("cpu", "cuda"):
        moeglot.convert(source, to, tmp_path / device, encode="bfloat16", allow_loss=True, device=device)
    files = sorted(path.name for path in (tmp_path / "cpu").glob("*.safetensors"))
    assert files
    assert all((tmp_path / "cpu" / file).read_bytes() == (tmp_path / "cuda" / file).read_bytes() for file in files)

"""What works: every family, encoding and shape, decoded and native, in whichever transformers is installed, against stock modules with weights decoded here.

Each cell quantizes a random model, decodes the file by the producers' rules (`held_models.matrix`, none of moeglot's), puts the numbers into the stock
model and compares float32 logits: of `moeglot.load`, and of `moeglot.load(native=True)` in every backend. What cannot be is refused, and that is the cell.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import families
import pytest
import torch
import transformers
from cells import EVERY
from devices import DEVICE
from held_models import CODINGS, FORMS, LAYOUTS, NAMES, experts_of, model_of, native_works, overwritten, quantized
from reading import relative
from safetensors.torch import load_file

import moeglot
from moeglot.demo import BUNDLED
from moeglot.errors import UsageError
from moeglot.formats import FAMILIES
from moeglot.integrations.transformers import VERSION
from moeglot.kernels import backend as kernels

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LIMIT, POWER = 1e-5, 1e-3
NEWEST = VERSION >= (5, 6)
SIZES = families.SIZES if NEWEST or EVERY else ("square",)
BACKENDS = ("reference", "eager", "grouped", "batched")
ON_A_GPU = ("triton", "auto") if DEVICE.startswith("cuda") else ()
ON_THE_WAY = ("mxfp4", "fp8-block", "nf4")
REFUSED = (
    *("dbrx", "jetmoe", "unlimited-ocr", "deepseek-ocr2", "kimi-k25", "mistral-large4", "step3p7"),
    *("inkling2", "inkling2-text", "dots3-note", "qwen3-omni-moe", "nemo-speechlm", "switch-transformers", "nllb-moe", "ernie4-5-vl-moe"),
    *(("granitemoe", "granitemoeshared", "granitemoehybrid", "aria", "aria-text") if VERSION < (5, 6) else ()),
    *(("aria", "aria-text") if (5, 6) <= VERSION < (5, 20) else ()),
    *(("qwen3-omni-moe-thinker",) if (5, 6) <= VERSION < (5, 23) else ()),
)
"""Families whose experts a release asks in a way of its own, names unlike any layout that moeglot knows, or has in more modules than one."""


def cells(names: Sequence[str], codings: Iterable[str]) -> list[tuple[str, str, str]]:
    """(family, size, coding): every cell if asked, since a release takes half an hour; else in the newest each family in each coding once, two thirds of
    them square, and in the others half of them, all square."""
    pairs = [(n + m, name, coding) for n, name in enumerate(names) for m, coding in enumerate(codings)]
    if EVERY:
        return [(name, size, coding) for _, name, coding in pairs for size in families.SIZES]
    if NEWEST:
        return [(name, "square" if place % 3 else ("h=2i", "neither")[place // 3 % 2], coding) for place, name, coding in pairs]
    return [(name, "square", coding) for place, name, coding in pairs if place % 2 == 0]


def loaded(folder: Path, **options) -> torch.nn.Module:
    """In float32, on the device that is tried."""
    return moeglot.load(folder, "float32", DEVICE, **options)


def holds(folder: Path, name: str, expected: torch.Tensor, backends=(*BACKENDS, *ON_A_GPU), **options) -> None:
    """The same logits in every backend; or the refusal, where the release has no module to take the place of."""
    if not native_works(name):
        with pytest.raises(UsageError, match="by itself"):
            moeglot.load(folder, dtype="float32", native=True, **options)
        return
    model = loaded(folder, native=True, backend=backends[0], **options)
    for backend in backends:
        for module in moeglot.nn.experts_of(model).values():
            module.backend = backend
        assert relative(families.logits(model), expected) <= LIMIT, backend


# --- the matrix ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "coding"),
    [cell for cell in cells([name for name in NAMES if LAYOUTS.get(name, "hub")], CODINGS) if f"{cell[0]}/{LAYOUTS.get(cell[0], 'hub')}+{cell[2]}" in FORMS],
)
def test_quantized_on_disk(name, size, coding, tmp_path):
    as_decoded(*quantized(name, size, coding, tmp_path), name, size)


@pytest.mark.parametrize("encode", ["nf4:nested", "fp4:nested"])
def test_nested_absmax(encode, tmp_path):
    as_decoded(*quantized("qwen3-moe", "square", encode[:3], tmp_path, encode), "qwen3-moe", "square")


def as_decoded(live: torch.nn.Module, folder: Path, name: str, size: str) -> None:
    """What is loaded computes what the stock model does with the numbers of the file."""
    before = families.logits(live)
    expected = families.logits(overwritten(live, name, load_file(folder / "model.safetensors"), size))
    assert relative(before, expected) > POWER  # the encoding shows, so it matters that it is decoded
    assert relative(families.logits(loaded(folder)), expected) <= LIMIT
    holds(folder, name, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_plain_on_disk(name, size, tmp_path):
    live = model_of(name, size)
    expected = families.logits(live)
    for original in (True, False) if VERSION >= (5, 0) else (True,):
        families.saved(live, folder := tmp_path / f"{original}", original)
        assert relative(families.logits(loaded(folder)), expected) <= LIMIT
        holds(folder, name, expected)


@pytest.mark.parametrize("size", SIZES)
def test_gpt_oss_in_mxfp4(size, tmp_path):
    live = model_of("gpt-oss", size)
    families.saved(live, tmp_path / "saved", True)
    moeglot.convert(tmp_path / "saved", "gpt-oss/openai", folder := tmp_path / "out", allow_loss=True)
    before = families.logits(live)
    expected = families.logits(overwritten(live, "gpt-oss", load_file(folder / "model.safetensors"), size))
    assert relative(before, expected) > POWER
    assert relative(families.logits(loaded(folder)), expected) <= LIMIT
    holds(folder, "gpt-oss", expected)


@pytest.mark.parametrize(("name", "size", "encode"), cells(NAMES, ON_THE_WAY))
def test_quantized_on_the_way(name, size, encode, tmp_path):
    """The bytes that it holds, decoded here, give the same logits in the stock model; and they are what the encoding's own file would hold."""
    live = model_of(name, size)
    before = families.logits(live)
    families.saved(live, tmp_path, True)
    if not native_works(name):
        holds(tmp_path, name, before, encode=encode)
        return
    model = loaded(tmp_path, native=True, encode=encode)
    expected = families.logits(overwritten(live, name, {key: tensor.cpu() for key, tensor in model.state_dict().items()}, size))
    assert relative(before, expected) > POWER
    assert relative(families.logits(model), expected) <= LIMIT
    holds(tmp_path, name, expected, encode=encode)


# --- what it holds ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
def test_its_state_dict_is_the_bytes_on_disk(coding, tmp_path):
    if VERSION < (5, 0):
        pytest.skip("4.57 has no module for all experts of Qwen")
    _, folder = quantized("qwen3-moe", "neither", coding, tmp_path)
    file, state = load_file(folder / "model.safetensors"), moeglot.load(folder, native=True).half().float().state_dict()
    mine = {key: tensor for key, tensor in file.items() if ".experts." in key}
    assert mine
    for key, tensor in mine.items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key
    assert {key for key in state if ".experts." in key} == mine.keys()


def test_it_loads_its_state_dict_and_refuses_another(tmp_path):
    if VERSION < (5, 0):
        pytest.skip("4.57 has no module for all experts of Qwen")
    from moeglot.nn import Experts

    _, folder = quantized("qwen3-moe", "h=2i", "fp8-block", tmp_path)
    checkpoint = moeglot.open(folder)
    one, other = (Experts.of(checkpoint, layer) for layer in checkpoint.layers[:2])
    assert not all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    key, state = "0.gate_proj.weight", one.state_dict()
    for wrong in ({**state, "more": torch.ones(1)}, {k: v for k, v in state.items() if k != key}, {**state, key: state[key].float()}):
        with pytest.raises(RuntimeError, match="more|" + key):
            other.load_state_dict(wrong)


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_dict_is_assigned_to_placeholders(whole, tmp_path):
    """torch's own way to fill a model that was built on meta; without `assign` torch copies nothing, and warns."""
    model = moeglot.load(moeglot.demo.BUNDLED, "float32", native=True)
    module = next(module for module in model.modules() if type(module).__name__ in ("Experts", "ScoresOfAll"))
    filled, expected = (model, families.logits(model)) if whole else (module, None)
    state = {key: tensor.clone() for key, tensor in filled.state_dict().items()}
    filled.to("meta")
    with pytest.raises(RuntimeError, match=r"placeholder(.|\n)*assign=True"):
        filled.load_state_dict(state)
    with pytest.raises(RuntimeError, match="down_proj_blocks"):
        filled.load_state_dict({key: tensor for key, tensor in state.items() if "down_proj_blocks" not in key}, assign=True)
    filled.to("meta")
    filled.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in module.buffers())
    assert all(torch.equal(tensor, state[key]) for key, tensor in filled.state_dict().items())
    if whole:
        left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
        assert all("rotary" in name for name in left), left  # of no state dict: whoever builds a model on meta makes it anew
        again = moeglot.load(moeglot.demo.BUNDLED, "float32", native=True)
        model.model.rotary_emb = again.model.rotary_emb
        assert torch.equal(families.logits(model), expected)


@pytest.mark.parametrize("away", [0, 7, -1, -9], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_that_live_elsewhere_are_skipped(backend, away, tmp_path):
    """The contract of expert parallelism: local ids, and num_experts for all others; any id that is none of ours means that. The parts add up to the whole."""
    from moeglot.nn import Experts

    live = model_of("gpt-oss", "square")
    families.saved(live, tmp_path, True)
    checkpoint, e = moeglot.open(tmp_path), 3
    layer = checkpoint.layers[0]
    torch.manual_seed(0)
    hidden, index, weights = torch.randn(9, 64), torch.randint(0, e, (9, 2)), torch.rand(9, 2)
    whole = Experts.of(checkpoint, layer, backend="reference")(hidden, index, weights)
    parts = []
    for some in (range(2), range(2, 3)):
        here = (index >= some.start) & (index < some.stop)
        module = Experts.of(checkpoint, layer, experts=some, backend=backend)
        assert module.num_experts == len(some)
        ids = torch.where(here, index - some.start, len(some) + away if away >= 0 else away)
        parts.append(module(hidden, ids, torch.where(here, weights, torch.nan)))
        if backend != "reference":
            given = hidden.clone().requires_grad_()
            module(given, ids.int(), torch.where(here, weights, torch.nan)).sum().backward()
            assert bool(given.grad.isfinite().all())
            assert torch.equal(given.grad.any(-1), here.any(-1))
    assert relative(sum(parts), whole) <= LIMIT
    assert relative(parts[0], whole) > POWER


@pytest.mark.skipif(not kernels.installed(), reason="numba is not installed")
def test_few_tokens_are_multiplied_out_of_the_codes(monkeypatch):
    """Each token alone, and a handful: what the reference computes; and what the codes give is what counts."""
    from moeglot.kernels import mxfp4
    from moeglot.nn import Experts

    module = Experts.of(moeglot.open(BUNDLED), 0, backend="eager")
    reference = Experts.of(moeglot.open(BUNDLED), 0, backend="reference")
    sizes = module.sizes
    torch.manual_seed(0)
    for tokens in (1, 5):
        hidden = torch.randn(tokens, sizes["h"])
        index, weights = torch.stack([torch.randperm(sizes["e"])[:4] for _ in range(tokens)]), torch.rand(tokens, 4)
        expected = reference(hidden, index, weights)
        with kernels.using("numba"):
            assert relative(module(hidden, index, weights), expected) <= LIMIT
            with monkeypatch.context() as broken:
                broken.setattr(mxfp4, "times", lambda x, packed, scale: x.new_zeros(len(x), len(packed)))
                assert relative(module(hidden, index, weights), expected) > POWER


@pytest.mark.skipif(not kernels.installed(), reason="numba is not installed")
@pytest.mark.parametrize("encode", ["mxfp4", "fp8-block", "nf4", "int4:32", "int8-pack:32"])
def test_an_expert_decoded_by_several_threads_has_the_same_bits(encode, tmp_path, monkeypatch):
    from moeglot.kernels import threads

    families.saved(model_of("qwen3-moe", "square"), tmp_path, True)
    module = next(one for one in moeglot.load(tmp_path, native=True, encode=encode).modules() if type(one).__name__ == "Experts")
    monkeypatch.setattr(threads, "WORTH", 64)
    found = []
    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        with kernels.using("numba"):
            found.append([line.dense(some, torch.bfloat16).clone() for line in module.lines for some in (range(1, 2), range(3))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_have_one_order(backend, tmp_path):
    from moeglot.nn import Experts

    families.saved(model_of("gpt-oss", "neither"), tmp_path, True)
    module = Experts.of(moeglot.open(tmp_path), 0, backend=backend)
    hidden, index, weights = torch.randn(40, 64).bfloat16(), torch.randint(0, 3, (40, 2)), torch.rand(40, 2).bfloat16()
    first = module(hidden, index, weights)
    assert all(torch.equal(module(hidden, index, weights), first) for _ in range(3))


# --- what is refused -------------------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    live = model_of("gpt-oss", "square")
    families.saved(live, folder := tmp_path / "plain", True)
    moeglot.convert(folder, "gpt-oss/openai", coded := tmp_path / "mxfp4", allow_loss=True)
    for wrong, words in (
        ({"native": True, "backend": "fast"}, "not a backend"),
        ({"native": True, "encode": "bfloat16"}, "no quantization"),
        ({"native": True, "encode": "mxfp4", "modules_to_not_convert": ["experts"]}, "converted nothing"),
        ({"native": True, "encode": "mxfp4", "modules_to_not_convert": ["layers.0.mpl"]}, "names layers.0.mpl, and the model has no such module"),
        ({"encode": "mxfp4"}, "native=True"),
        ({"dtype": "float64"}, "no model computes in it"),
        ({"device_map": {"": "cuda:77"}}, "there is no device 'cuda:77'"),
    ):
        with pytest.raises(UsageError, match=words):
            moeglot.load(folder, **wrong)
    with pytest.raises(UsageError, match="quantized already"):
        moeglot.load(coded, native=True, encode="mxfp4")
    for some in (range(2, 9), range(0), [0, 1], range(0, 2, 2)):
        with pytest.raises(UsageError, match="experts that follow each other"):
            moeglot.nn.Experts.of(moeglot.open(folder), 0, experts=some)


@pytest.mark.parametrize("encode", ["mxfp4", "nvfp4", "int4:32"])
def test_sizes_that_are_no_whole_number_of_blocks(encode, tmp_path, monkeypatch):
    monkeypatch.setitem(families.SIZES, "ragged", (3, 72, 40))
    families.saved(model_of("gpt-oss", "ragged"), tmp_path, True)
    with pytest.raises(moeglot.MoeglotError, match="blocks"):
        moeglot.load(tmp_path, native=True, encode=encode)


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path):
    """Nor is anybody asked whether to run it."""
    families.saved(model_of("deepseek-v3", "square"), tmp_path, True)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2", "auto_map": own}))
    with pytest.raises(UsageError, match="moeglot runs none"):
        moeglot.load(tmp_path)


def test_what_gate_and_up_cannot_share(tmp_path):
    """Eight zero points to a word, of rows of gate and up that take turns. The way that the refusal names leads there."""
    encode = "int4:32:asymmetric"
    families.saved(model_of("gpt-oss", "square"), folder := tmp_path / "plain", True)
    with pytest.raises(UsageError, match="would belong to gate and up at once") as refused:
        moeglot.load(folder, native=True, encode=encode)
    assert len(str(refused.value).splitlines()) == 3
    moeglot.convert(folder, "gpt-oss/llm-compressor", out := tmp_path / "apart", encode=encode, allow_loss=True)
    decoded, native = (loaded(out, native=native) for native in (False, True))
    assert relative(families.logits(native), families.logits(decoded)) <= LIMIT


def test_modules_to_not_convert(tmp_path):
    live = model_of("gpt-oss", "h=2i")
    families.saved(live, tmp_path, True)
    model = moeglot.load(tmp_path, native=True, encode="mxfp4", modules_to_not_convert=["layers.1.mlp"])
    assert {layer: module.is_encoded for layer, module in experts_of(model).items()} == {0: True, 1: False, 2: True}


@pytest.mark.skipif(VERSION < (5, 0), reason="4.57 has no module for all experts")
@pytest.mark.parametrize("name", [family.name for family in FAMILIES if not family.unverified and family.name not in NAMES and (NEWEST or EVERY)])
def test_every_other_family_holds_or_is_refused(name, tmp_path):
    if name == "diffusion-gemma" and VERSION < (5, 23):
        pytest.skip(f"transformers {transformers.__version__} builds it with images alone")
    live = model_of(name, "neither")
    families.saved(live, tmp_path, True)
    if name in REFUSED:
        with pytest.raises(UsageError, match="native"):
            moeglot.load(tmp_path, dtype="float32", native=True)
        return
    if not experts_of(live):
        pytest.skip(f"a small {name} has no experts in transformers {transformers.__version__}")
    expected = families.logits(live)
    assert relative(families.logits(loaded(tmp_path, native=True)), expected) <= LIMIT

"""Laws of every coding: identified by what its producer writes, the same bytes through every layout, and never decoded on the way."""

import json
import pickle
from functools import cache

import pytest
import torch
from cells import tried
from reading import differing, tensors
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.codings import CODINGS
from moeglot.conversion.carrying import Carrying
from moeglot.conversion.convert import carry_out
from moeglot.errors import LossRefused, MoeglotError, UnknownFormat
from moeglot.formats import PLAIN, by_name, variants
from moeglot.planning.units import estimate
from moeglot.reports.report import plan_json

LAYOUTS = ("qwen3-moe/hub", "qwen3-moe/transformers-5")
QWEN = [coding for coding in CODINGS if not coding.families]
SIZES = {"square": (2, 128, 128), "h=2i": (2, 256, 128), "2h=i": (2, 128, 256)}


def without_marks(folder):
    """As another producer would have written it."""
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt"})


def each(codings, layouts=LAYOUTS[:1]):
    """(layout, coding, sizes): square, and every third at another size."""
    found = [(layout, coding) for coding in codings for layout in layouts if layout == LAYOUTS[0] or coding.stacked]
    cells = [(*one, size) for n, one in enumerate(found) for k, size in enumerate(SIZES) if tried(n, k)]
    return pytest.mark.parametrize(("layout", "coding", "sizes"), cells, ids=[f"{layout}+{coding.name}-{size}" for layout, coding, size in cells])


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """(layout, coding, sizes) -> a checkpoint of trained-like numbers, coded by us, unmarked; made once, to be read alone."""

    @cache
    def made(layout, coding, sizes):
        folder = tmp_path_factory.mktemp("coded")
        write_checkpoint(folder / "plain", layout, dict(zip("ehi", sizes, strict=True)), 1)
        moeglot.convert(folder / "plain", f"{layout}+{coding}", folder / "coded", allow_loss=True)
        without_marks(folder / "coded")
        return folder / "coded"

    return lambda layout, coding, sizes: made(layout, coding.name, SIZES[sizes])


@pytest.fixture(scope="module")
def decoded(coded, tmp_path_factory):
    """(coding, sizes) -> the same of one matrix an expert, in float32; made once, to be read alone."""

    @cache
    def made(source):
        out = tmp_path_factory.mktemp("decoded") / "float32"
        moeglot.convert(source, LAYOUTS[0], out, encode="float32")
        return out

    return lambda coding, sizes: made(coded(LAYOUTS[0], coding, sizes))


def test_a_variant_reads_config_json_as_its_layout():
    """So that it is read once for all of them."""
    found = [(form, variant) for form in PLAIN for variant in variants(form)]
    assert len(found) > len(PLAIN)
    assert [variant.name for form, variant in found if (variant.layout, variant.config, variant.family) != (form.name, form.config, form.family)] == []


@pytest.mark.parametrize("coding", [coding for coding in QWEN if coding.stacked], ids=lambda coding: coding.name)
def test_all_experts_in_one_tensor_decode_as_one_matrix_each(coding, coded, tmp_path):
    """To float32, which holds every number, so that a slice that has its axes already is decoded at once, unless gate and up have a scale each."""
    source = coded(LAYOUTS[1], coding, "square")
    for n, layout in enumerate(LAYOUTS):
        moeglot.convert(source, layout, tmp_path / str(n), encode="float32")
    moeglot.convert(tmp_path / "0", LAYOUTS[1], tmp_path / "stacked")
    assert differing(tmp_path / "stacked", tmp_path / "1") == []


@each(QWEN, LAYOUTS)
def test_it_is_identified_and_returns_as_it_is(coding, layout, sizes, coded, tmp_path):
    source = coded(layout, coding, sizes)
    found = moeglot.identify(source)
    assert found.format
    assert found.format.name == f"{layout}+{coding.name}", found
    moeglot.convert(source, found.format.name, tmp_path / "again")
    assert differing(source, tmp_path / "again") == []
    assert (
        json.loads((source / "config.json").read_text())["quantization_config"]
        == json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    )


@each([c for c in QWEN if c.stacked and not any(part.flat for part in c.encoding.parts)])
def test_one_by_one_and_stacked_are_repacked_without_a_decode(layout, coding, sizes, coded, tmp_path):
    source = coded(layout, coding, sizes)
    there = moeglot.plan(source, f"{LAYOUTS[1]}+{coding.name}")
    assert all(step.moves_codes for step in there.steps)
    assert carry_out(there, tmp_path / "stacked").report.verdict == "holds"
    without_marks(tmp_path / "stacked")
    assert moeglot.convert(tmp_path / "stacked", f"{LAYOUTS[0]}+{coding.name}", tmp_path / "back").report.verdict == "holds"
    assert differing(source, tmp_path / "back") == []


@each(QWEN)
def test_decoded_to_float32_it_returns(layout, coding, sizes, coded, decoded, tmp_path):
    """float32 holds what every encoding decodes to; encoded again, the values are the same, and the bytes wherever values determine them."""
    source = coded(LAYOUTS[0], coding, sizes)
    back = moeglot.convert(decoded(coding, sizes), f"{LAYOUTS[0]}+{coding.name}", tmp_path / "back")
    assert back.report.verdict == "holds"
    assert moeglot.compare(source, tmp_path / "back").verdict == "holds"


@pytest.mark.parametrize(("layout", "router"), [("granitemoe/hub", "block_sparse_moe.router.layer.weight"), ("jetmoe/hub", "mlp.router.layer.weight")])
@pytest.mark.parametrize("coding", ["fp8-block", "nf4"])
def test_a_router_beside_stacked_linears(layout, router, coding, tmp_path):
    """All experts of a role in one Linear, and the router in another beside it: coded, too, it is none of their tensors."""
    plain = write_checkpoint(tmp_path / "plain", layout, {"e": 4, "h": 128, "i": 128}, 1)
    given = load_file(plain / "model.safetensors")
    save_file({**given, f"model.layers.0.{router}": torch.randn(4, 128)}, plain / "model.safetensors", {"format": "pt"})
    moeglot.convert(plain, f"{layout}+{coding}", tmp_path / "coded", allow_loss=True)
    moeglot.convert(tmp_path / "coded", layout, tmp_path / "float32", encode="float32")
    assert moeglot.compare(tmp_path / "coded", tmp_path / "float32").verdict == "holds"


def test_a_loss_is_stated_before_and_after(tmp_path):
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 4, "h": 128, "i": 128}, 1)
    plan = estimate(moeglot.plan(tmp_path / "plain", LAYOUTS[0], encode="fp8-block"))
    assert plan.target.name == f"{LAYOUTS[0]}+fp8-block"
    (expected,) = plan.expected_loss.values()
    with pytest.raises(LossRefused, match="relative error"):
        moeglot.convert(tmp_path / "plain", LAYOUTS[0], tmp_path / "out", encode="fp8-block")
    certificate = moeglot.convert(tmp_path / "plain", LAYOUTS[0], tmp_path / "out", encode="fp8-block", allow_loss=True)
    (loss,) = certificate.losses.values()
    assert 0.01 < loss.relative < 0.05
    assert abs(expected.relative / loss.relative - 1) < 0.2


def test_signs_of_zero_are_a_change_without_an_error(tmp_path):
    """INT4 has no negative zero: it is told as a change, and no number stands for an error that nobody measured."""
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 2, "h": 128, "i": 128}, 1)
    moeglot.convert(tmp_path / "plain", LAYOUTS[0], tmp_path / "coded", encode="int4:32", allow_loss=True)
    for name in ("decoded", "turned"):
        moeglot.convert(tmp_path / "coded", LAYOUTS[0], tmp_path / name, encode="float32")
    path = tmp_path / "turned" / "model.safetensors"
    held = {key: torch.where(tensor == 0, -0.0, tensor) if "0.up_proj" in key else tensor for key, tensor in load_file(path).items()}
    save_file(held, path, {"format": "pt"})
    (values,) = (check for check in moeglot.compare(tmp_path / "turned", tmp_path / "decoded").checks if check.what == "canonical tensors")
    assert values.verdict == "does not hold"
    assert values.detail == "1 of 6 differ; relative error 0, as of signs of zero"
    assert (values.figures["unequal"], values.figures["relative_error"]) == (1, {"gate": 0, "up": 0, "down": 0})
    plan = estimate(moeglot.plan(tmp_path / "turned", LAYOUTS[0], encode="int4:32"))
    (verb,) = plan.lossy
    assert (plan.expected_loss[verb].changed > 0, plan.expected_loss[verb].relative) == (True, 0)
    told = plan_json(plan)
    assert (told["needs_allow_loss"], {step["expected_relative_error"] for step in told["steps"]}) == (True, {0})
    with pytest.raises(LossRefused, match="changes numbers: relative error 0, as of signs of zero"):
        moeglot.convert(tmp_path / "turned", LAYOUTS[0], tmp_path / "again", encode="int4:32")
    certificate = moeglot.convert(tmp_path / "turned", LAYOUTS[0], tmp_path / "again", encode="int4:32", allow_loss=True)
    assert certificate.report.verdict == "holds"


def test_the_block_size_is_what_config_says(tmp_path):
    """192 rows have two scales under 128 and under 96: a shape cannot tell, config.json must."""
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 2, "h": 192, "i": 192}, 1)
    moeglot.convert(tmp_path / "plain", f"{LAYOUTS[0]}+fp8-block", tmp_path / "coded", allow_loss=True)
    without_marks(tmp_path / "coded")
    told = json.loads((tmp_path / "coded" / "config.json").read_text())
    right = moeglot.open(tmp_path / "coded").experts(0)["up"][0].decode(torch.float32)
    told["quantization_config"]["weight_block_size"] = [96, 96]
    (tmp_path / "coded" / "config.json").write_text(json.dumps(told))
    wrong = moeglot.open(tmp_path / "coded").experts(0)["up"][0].decode(torch.float32)
    assert float((wrong - right).norm() / right.norm()) > 1e-3
    told["quantization_config"].pop("weight_block_size")
    (tmp_path / "coded" / "config.json").write_text(json.dumps(told))
    with pytest.raises(moeglot.MoeglotError, match="quantization_config"):
        moeglot.open(tmp_path / "coded")


@pytest.mark.parametrize("coding", QWEN, ids=[c.name for c in QWEN])
def test_another_process_gets_checkpoint_and_plan(coding, coded, decoded, tmp_path):
    """As a spawned one does, and a task of a cluster."""
    checkpoint = moeglot.open(coded(LAYOUTS[0], coding, "square"))
    plan = moeglot.plan(checkpoint, LAYOUTS[0], encode="float32")
    there_checkpoint, there = pickle.loads(pickle.dumps((checkpoint, plan)))
    assert there_checkpoint.format == checkpoint.format
    assert carry_out(there, tmp_path / "there", Carrying(allow_loss=True, workers=1)).report.verdict == "holds"
    assert differing(decoded(coding, "square"), tmp_path / "there") == []


def test_codings_of_one_family_too():
    assert [pickle.loads(pickle.dumps(coding)).name for coding in CODINGS] == [coding.name for coding in CODINGS]


def test_every_coding_has_a_format_of_every_plain_layout():
    assert by_name("qwen3-moe/hub+fp8-block").coding in CODINGS


def test_mxfp4_becomes_nvfp4_without_loss(tmp_path):
    """Where the powers of a matrix span no more than E4M3 does: each group of 32 becomes two of 16 with the same values."""
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 4, "h": 128, "i": 128}, 1)
    moeglot.convert(tmp_path / "plain", f"{LAYOUTS[0]}+mxfp4-pack", tmp_path / "mxfp4", allow_loss=True)
    certificate = moeglot.convert(tmp_path / "mxfp4", f"{LAYOUTS[0]}+nvfp4-modelopt", tmp_path / "nvfp4")
    assert certificate.report.verdict == "holds"
    assert all(loss.changed == 0 for loss in certificate.losses.values())
    assert moeglot.compare(tmp_path / "mxfp4", tmp_path / "nvfp4").verdict == "holds"


@pytest.mark.parametrize(("a", "b"), [("nvfp4-modelopt", "nvfp4-pack"), ("nvfp4-pack", "nvfp4-modelopt")])
def test_the_two_conventions_of_nvfp4_become_each_other(a, b, tmp_path):
    """The codes and the groups' scales stay; the global becomes its reciprocal, and values move by their last places at most, which is stated."""
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 4, "h": 128, "i": 128}, 1)
    moeglot.convert(tmp_path / "plain", f"{LAYOUTS[0]}+{a}", tmp_path / "a", allow_loss=True)
    certificate = moeglot.convert(tmp_path / "a", f"{LAYOUTS[0]}+{b}", tmp_path / "b", allow_loss=True)
    assert certificate.report.verdict == "holds"
    assert sum(certificate.losses.values(), start=type(next(iter(certificate.losses.values())))()).relative < 3e-7
    mine, theirs = moeglot.open(tmp_path / "a").experts(0)["up"][1].parts, moeglot.open(tmp_path / "b").experts(0)["up"][1].parts
    assert torch.equal(mine["packed"], theirs["packed"])
    assert torch.equal(mine["scale"].view(torch.uint8), theirs["scale"].view(torch.uint8))
    assert abs(float(mine["global"] * theirs["global"]) - 1) < 1e-6


def test_deepseek_v4_keeps_its_experts_in_mxfp4_and_the_rest_in_fp8(tmp_path):
    """I8 codes and E8M0 scales for routed experts, FP8 with `.scale` for the others; both decoded together, and carried as they are."""
    hub = "deepseek-v4/hub"
    write_checkpoint(tmp_path / "plain", hub, {"e": 4, "h": 128, "i": 128}, 1)
    moeglot.convert(tmp_path / "plain", f"{hub}+fp4-experts", tmp_path / "coded", allow_loss=True)
    without_marks(tmp_path / "coded")
    found = moeglot.open(tmp_path / "coded")
    assert found.format.name == f"{hub}+fp4-experts"
    entries = [found.source.entries[f"layers.{found.layers[0]}.ffn.experts.0.w1.{suffix}"] for suffix in ("weight", "scale")]
    assert [(entry.dtype, entry.shape) for entry in entries] == [("I8", (128, 64)), ("F8_E8M0", (128, 4))]
    path = tmp_path / "coded" / "model.safetensors"
    held = load_file(path)
    held["layers.0.attn.wq_a.weight"] = torch.full((128, 128), 1.5).to(torch.float8_e4m3fn)
    held["layers.0.attn.wq_a.scale"] = torch.full((1, 1), 0.25)
    save_file(held, path, {"format": "pt"})
    told = json.loads((tmp_path / "coded" / "config.json").read_text())
    moeglot.convert(tmp_path / "coded", hub, tmp_path / "back")
    assert torch.equal(tensors(tmp_path / "back")["layers.0.attn.wq_a.weight"], torch.full((128, 128), 0.375).bfloat16())
    moeglot.convert(tmp_path / "coded", f"{hub}+fp4-experts", tmp_path / "again")
    assert differing(tmp_path / "coded", tmp_path / "again") == []
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == told["quantization_config"]
    assert moeglot.compare(tmp_path / "coded", tmp_path / "back").verdict == "holds"


def test_deepseek_v4_says_beside_quantization_config_that_its_experts_are_in_fp4(tmp_path):
    """As in its release; what stays so says it there again, and what is coded otherwise says it nowhere.

    https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash
    """
    hub = "deepseek-v4/hub"
    write_checkpoint(tmp_path / "plain", hub, {"e": 4, "h": 128, "i": 128}, 1)
    moeglot.convert(tmp_path / "plain", f"{hub}+fp4-experts", tmp_path / "coded", allow_loss=True)
    without_marks(tmp_path / "coded")
    told = json.loads((path := tmp_path / "coded" / "config.json").read_text())
    told["expert_dtype"] = told["quantization_config"].pop("expert_dtype")
    path.write_text(json.dumps(told))
    assert moeglot.open(tmp_path / "coded").format.name == f"{hub}+fp4-experts"
    for target, said in ((f"{hub}+fp4-experts", "fp4"), (hub, None), (f"{hub}+fp8-block-scale", None)):
        out = tmp_path / target.replace("/", "-")
        moeglot.convert(tmp_path / "coded", target, out, allow_loss=True)
        without_marks(out)
        assert json.loads((out / "config.json").read_text()).get("expert_dtype") == said
        assert moeglot.open(out).format.name == target
    assert differing(tmp_path / "coded", tmp_path / "deepseek-v4-hub+fp4-experts") == []
    told["quantization_config"]["expert_dtype"] = "fp8"  # what is in it comes first
    path.write_text(json.dumps(told))
    with pytest.raises(MoeglotError):
        moeglot.open(tmp_path / "coded")


@pytest.mark.parametrize("coding", ["fp8-block-scale", "fp8-qscale"])
def test_other_names_of_the_same_scales(coding, tmp_path):
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 2, "h": 128, "i": 128}, 1)
    moeglot.convert(tmp_path / "plain", f"{LAYOUTS[0]}+{coding}", tmp_path / "a", allow_loss=True)
    moeglot.convert(tmp_path / "a", f"{LAYOUTS[0]}+fp8-block", tmp_path / "b")
    assert moeglot.compare(tmp_path / "a", tmp_path / "b").verdict == "holds"


MXFP8 = [
    ("mxfp8-minimax", LAYOUTS[0], {"activation_scheme": "dynamic", "weight_block_size": [1, 32]}),
    ("mxfp8-hunyuan", LAYOUTS[0], {"kv_cache_quant_algo": None}),
    ("mxfp8-hunyuan", LAYOUTS[1], {}),
]


@pytest.mark.parametrize(("coding", "layout", "said"), MXFP8, ids=["minimax", "hunyuan", "hunyuan-stacked"])
def test_mxfp8_by_its_own_name(coding, layout, said, tmp_path):
    """What MiniMax and Tencent say of it; other groups, or experts that are coded otherwise, are not taken for it.

    https://huggingface.co/MiniMaxAI/MiniMax-M3-MXFP8, https://huggingface.co/tencent/Hy4-preview
    """
    write_checkpoint(tmp_path / "plain", layout, {"e": 2, "h": 128, "i": 128}, 1)
    moeglot.convert(tmp_path / "plain", f"{layout}+{coding}", tmp_path / "a", allow_loss=True)
    without_marks(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    told, ignored = json.loads(path.read_text()), ["lm_head", "model.layers.0.mlp.gate"]

    def declare(**more):
        path.write_text(json.dumps(told | {"quantization_config": {"quant_method": "mxfp8", "ignored_layers": ignored, **said, **more}}))

    declare()
    assert moeglot.open(tmp_path / "a").format.name == f"{layout}+{coding}"
    moeglot.convert(tmp_path / "a", f"{layout}+mxfp8", tmp_path / "b", allow_loss=True)  # compressed-tensors' name for them
    assert moeglot.compare(tmp_path / "a", tmp_path / "b").verdict == "holds"
    for more in ({"weight_block_size": [1, 64]}, {"moe_quant_algo": "NVFP4"}):
        declare(**more)
        with pytest.raises(UnknownFormat, match=next(iter(more))):
            moeglot.open(tmp_path / "a")


def test_a_quantization_config_of_the_text_model_counts(tmp_path):
    """Kimi-K2.5 keeps it there."""
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 2, "h": 128, "i": 128}, 1)
    moeglot.convert(tmp_path / "plain", f"{LAYOUTS[0]}+int4-pack", tmp_path / "a", allow_loss=True)
    without_marks(tmp_path / "a")
    told = json.loads((tmp_path / "a" / "config.json").read_text())
    told["text_config"] = {"quantization_config": told.pop("quantization_config")}
    (tmp_path / "a" / "config.json").write_text(json.dumps(told))
    assert moeglot.open(tmp_path / "a").format.name == f"{LAYOUTS[0]}+int4-pack"
    moeglot.convert(tmp_path / "a", LAYOUTS[0], tmp_path / "b", allow_loss=True)
    assert "quantization_config" not in (tmp_path / "b" / "config.json").read_text()

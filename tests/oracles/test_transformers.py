"""Real transformers, whichever is installed: what it saves we read, what we write it loads, and both compute the same."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled
from reading import relative
from small_models import GOLDEN, SIZES, logits, model_of, readable
from synthetic import write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import moeglot
from moeglot.demo import BUNDLED
from moeglot.errors import NotVerified, UsageError
from moeglot.floats import values
from moeglot.integrations.transformers import VERSION

LIMIT = 1e-5


def load(path: Path, **options) -> torch.nn.Module:
    """By transformers alone; not one key missing or unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.float().eval()


@pytest.fixture(params=[(family, size) for family in ("gpt-oss", "qwen3-moe", "mixtral") for size in SIZES], ids="-".join)
def model(request):
    family, size = request.param
    return family, model_of(family, *SIZES[size])


def saved_ways() -> list[dict]:
    return [{}] if VERSION < (5, 0) else [{}, {"save_original_format": False}]


def test_we_read_what_it_saves_and_it_reads_what_we_write(model, tmp_path):
    family, live = model
    expected = logits(live)
    for n, way in enumerate(saved_ways()):
        live.save_pretrained(tmp_path / f"saved{n}", max_shard_size="100kB", **way)
        source = moeglot.open(tmp_path / f"saved{n}")
        assert source.format.family.name == family
        report = moeglot.verify(source, "transformers")
        assert report.verdict == "holds", report
        for to in readable(family):
            out = tmp_path / f"{n}-{to.split('/')[1]}"
            assert moeglot.convert(source, to, out).report.verdict == "holds"
            assert relative(logits(load(out, dtype=torch.float32)), expected) <= LIMIT
            assert moeglot.verify(out, "transformers").verdict == "holds"


def test_the_canonical_form_is_what_the_module_computes_with(model, tmp_path):
    """Against the tensors in the live module's memory, by their own axes, written down here and nowhere else."""
    family, live = model
    live.save_pretrained(tmp_path / "saved")
    source = moeglot.open(tmp_path / "saved")
    experts = source.experts(0)
    module = next(m for name, m in live.named_modules() if name.endswith(("layers.0.mlp.experts", "layers.0.block_sparse_moe.experts")))
    for expert in (0, source.sizes["e"] - 1):
        gate, up, down = (experts[role][expert].decode(torch.float32) for role in ("gate", "up", "down"))
        if isinstance(module, torch.nn.ModuleList):
            names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
            expected = [getattr(module[expert], name).weight for name in names]
        elif family == "gpt-oss":
            both = module.gate_up_proj[expert]
            expected = [both[:, 0::2].T, both[:, 1::2].T, module.down_proj[expert].T]
        else:
            both = module.gate_up_proj[expert]
            expected = [both[: len(both) // 2], both[len(both) // 2 :], module.down_proj[expert]]
        for found, right in zip((gate, up, down), expected, strict=True):
            assert torch.equal(found, right)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", ["openai", "ocp", "compressed-tensors"])
def test_mxfp4_that_we_write_it_decodes_to_the_same_bits(size, rule, tmp_path):
    live = model_of("gpt-oss", *SIZES[size]).bfloat16()
    live.save_pretrained(tmp_path / "bf16")
    certificate = moeglot.convert(tmp_path / "bf16", "gpt-oss/openai", tmp_path / "mxfp4", encode=f"mxfp4:{rule}", allow_loss=True)
    assert certificate.report.verdict == "holds"
    ours = moeglot.open(tmp_path / "mxfp4")
    theirs = load(tmp_path / "mxfp4", dtype=torch.bfloat16)
    for layer in ours.layers:
        module = theirs.model.layers[layer].mlp.experts
        for expert in range(ours.sizes["e"]):
            experts = ours.experts(layer)
            gate, up, down = (experts[role][expert].decode(torch.float32) for role in ("gate", "up", "down"))
            assert torch.equal(module.gate_up_proj[expert][:, 0::2].T, gate)
            assert torch.equal(module.gate_up_proj[expert][:, 1::2].T, up)
            assert torch.equal(module.down_proj[expert].T, down)
    assert moeglot.convert(ours, "gpt-oss/transformers", tmp_path / "back").report.verdict == "holds"
    assert relative(logits(load(tmp_path / "back", dtype=torch.float32)), logits(theirs)) <= LIMIT


def test_its_own_decoder_agrees_on_every_byte_and_scale():
    from transformers.integrations import mxfp4 as theirs

    from moeglot.encodings.mxfp4 import MXFP4

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 251, 16, 16).contiguous()
    scales = torch.arange(2, 253, dtype=torch.uint8).view(1, 251, 1).expand(1, 251, 16).contiguous()
    found = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # [E, in, out]
    ours = MXFP4().decode({"packed": blocks, "scale": scales}, torch.bfloat16)
    assert torch.equal(values(found).parts["value"].mT.contiguous().view(torch.int16), ours.view(torch.int16))


def test_the_bundled_model_computes_the_same_in_every_version(tmp_path):
    """Logits of the newest version, kept in a file; a config that 5.23 saved must not lose its rope or its expert count in 4.57."""
    golden = json.loads(GOLDEN.read_text())
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "bf16")
    for path, dtype in ((BUNDLED, torch.bfloat16), (tmp_path / "bf16", torch.float32)):
        model = load(path, dtype=dtype)
        with torch.no_grad():
            found = model(input_ids=torch.tensor([golden["tokens"]])).logits[0, -1]
        assert relative(found, torch.tensor(golden["logits"])) <= LIMIT
    assert AutoConfig.from_pretrained(tmp_path / "bf16").to_dict().get("quantization_config") is None


@pytest.mark.parametrize("bars", [True, False])
def test_what_the_library_tells_stays_as_the_caller_has_it(bars):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity(logging.INFO)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        assert moeglot.verify(BUNDLED, "transformers").verdict == "holds"
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == (logging.INFO, bars, not bars)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 has no fused Qwen3-MoE or Mixtral to read")
def test_the_fused_formats_are_its_live_state_dict(tmp_path):
    for family in ("qwen3-moe", "mixtral"):
        live = model_of(family, 4, 64, 32)
        live.save_pretrained(tmp_path / family)
        moeglot.convert(tmp_path / family, f"{family}/transformers-5", tmp_path / f"{family}-5")
        written, state = moeglot.open(tmp_path / f"{family}-5").source.entries, live.state_dict()
        assert written.keys() == state.keys()
        for name, entry in written.items():
            assert torch.equal(entry.read(), state[name])


def test_a_turned_down_proj_loads_without_a_word_and_verify_names_it(tmp_path):
    """The power of all of this: transformers takes it, we do not."""
    from moeglot.demo import write_turned

    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "bf16")
    write_turned(tmp_path / "bf16", tmp_path / "turned")
    load(tmp_path / "turned", dtype=torch.float32)
    report = moeglot.verify(tmp_path / "turned", BUNDLED)
    assert report.exit_status == 1
    assert 'down_proj is read as "e h i"' in next(c.detail for c in report.checks if c.level == "forward")


@pytest.mark.parametrize(
    ("name", "said", "error", "wrong"),
    [
        ("kimi-k2/hub", {}, UsageError, "knows no model_type kimi_k2"),
        ("qwen3-moe/hub", {"hidden_act": "swishy"}, UsageError, "builds no model as config.json says it"),
        ("qwen3-moe/hub", {"vocab_size": 33}, NotVerified, "mismatched keys, first lm_head.weight"),
    ],
)
def test_what_it_does_not_load_is_refused_in_our_words(name, said, error, wrong, tmp_path):
    folder = write_checkpoint(tmp_path / "m", name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    with pytest.raises(error, match=wrong):
        moeglot.verify(folder, "transformers")
    if error is UsageError:
        with pytest.raises(error, match=wrong):
            moeglot.load(folder, "float32")


def test_the_versions_are_the_ones_that_we_speak_to():
    assert transformers.__version__ in ("4.57.6", "5.5.4", "5.23.0")

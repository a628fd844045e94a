"""Each known way to corrupt experts, by name and by who shipped it: `verify` fails it by a wide margin and says which reading fits.

The corruptions are written here with plain tensor operations, so that no code of ours is on both sides.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.demo import BUNDLED
from moeglot.errors import Contradiction, UsageError
from moeglot.experts import Expert, relative_error
from moeglot.floats import values
from moeglot.verification.misreadings import right

Tensors = dict[str, torch.Tensor]
LIMIT = 1e-5


@dataclass(frozen=True)
class Wrong:
    """`fits`: what verify must name, or None where the right numbers are gone."""

    name: str
    source: str
    corrupt: Callable[[Tensors], None]
    fits: str | None


def each(tensors: Tensors, ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = [name for name in tensors if name.endswith(ending)]
    assert found
    for name in found:
        changed = change(tensors[name])
        assert changed.shape == tensors[name].shape, "a corruption that a shape shows is no wrong of this kind"
        tensors[name] = changed.contiguous()


def concatenate_last(both: torch.Tensor) -> torch.Tensor:
    return torch.cat([both[..., ::2], both[..., 1::2]], -1)


def interleave_rows(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


def swap_pairs(both: torch.Tensor) -> torch.Tensor:
    return torch.stack([both[..., 1::2], both[..., ::2]], -1).flatten(-2)


def swap_halves(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, 1)
    return torch.cat([up, gate], 1)


def turn(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT


def several(*changes: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    def corrupt(tensors: Tensors) -> None:
        for change in changes:
            change(tensors)

    return corrupt


def on(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: each(tensors, ending, change)


def exchange(a: str, b: str) -> Callable[[Tensors], None]:
    def corrupt(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(a)]:
            other = name.removesuffix(a) + b
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return corrupt


def roll(shift: int) -> Callable[[Tensors], None]:
    def corrupt(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].roll(shift, 0)

    return corrupt


GPT_OSS = [
    Wrong("down_proj in the other orientation", "axolotl 0.19, any reader by shape", on("down_proj", turn), 'down_proj is read as "e h i"'),
    Wrong("gate_up concatenated", "openai_privacy_filter's layout", on("gate_up_proj", concatenate_last), 'gate_up_proj is read as "e h (p i)"'),
    Wrong(
        "gate_up concatenated, biases too",
        "the same, consistently",
        several(on("gate_up_proj", concatenate_last), on("gate_up_proj_bias", concatenate_last)),
        'gate_up_proj is read as "e h (p i)" and gate_up_proj_bias is read as "e (p i)"',
    ),
    Wrong("up before gate", "a swapped pair", on("gate_up_proj", swap_pairs), 'gate_up_proj is read as "e h (i p)", up before gate'),
    Wrong(
        "concatenated and turned",
        "two bugs at once",
        several(on("gate_up_proj", concatenate_last), on("down_proj", turn)),
        'gate_up_proj is read as "e h (p i)" and down_proj is read as "e h i"',
    ),
    Wrong("experts rolled", "a local index taken for a global one under expert parallelism", roll(1), "experts rolled by 1"),
    Wrong("experts rolled back", "the same, the other way", roll(-1), "experts rolled by -1"),
    Wrong("gate_up biases dropped", "Megatron's legacy GroupedMLP, which has no place for them", on("gate_up_proj_bias", torch.zeros_like), None),
    Wrong("down biases dropped", "the same", on("down_proj_bias", torch.zeros_like), None),
    Wrong(
        "one expert left uninitialised",
        "transformers 4.57 after missing keys",
        on("down_proj", lambda t: t.clone().index_fill_(0, torch.tensor(len(t) - 1), 0.01)),
        None,
    ),
]


def caught(report: moeglot.Report, fits: str | None) -> None:
    """It does not hold, by at least 100 times the limit, and the cause is named."""
    assert report.exit_status == 1
    forward = next(check for check in report.checks if check.level == "forward")
    assert forward.verdict == "does not hold"
    assert forward.figures["relative_error"] >= 100 * LIMIT
    assert forward.figures["fits_if"] == fits
    assert ("fits if " + fits if fits else "no other reading") in forward.detail


def corrupted(source, wrong: Wrong):
    tensors = load_file(source / "model.safetensors")
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    wrong.corrupt(tensors)
    assert before == {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.fixture(scope="session")
def fingerprint(tmp_path_factory):
    path = tmp_path_factory.mktemp("fingerprint") / "king-james.json"
    moeglot.fingerprint(BUNDLED).save(path)
    return path


@pytest.mark.parametrize("wrong", GPT_OSS, ids=lambda wrong: wrong.name)
def test_gpt_oss_trained_and_square(wrong, tmp_path, fingerprint):
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "bf16")
    subject = corrupted(tmp_path / "bf16", wrong)
    caught(moeglot.verify(subject, BUNDLED), wrong.fits)
    caught(moeglot.verify(subject, fingerprint), wrong.fits)
    assert moeglot.compare(subject, BUNDLED).exit_status == 1


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.router.weight", "model.norm.weight"])
def test_a_tensor_that_is_no_expert(tmp_path, name):
    """The experts are the source's, and the model is not."""
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "out")
    assert [report(tmp_path / "out", BUNDLED).exit_status for report in (moeglot.verify, moeglot.compare)] == [0, 0]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file({**tensors, name: tensors[name].roll(1, 0)}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    for report in (moeglot.verify, moeglot.compare):
        wrong = [check for check in report(tmp_path / "out", BUNDLED).checks if check.verdict == "does not hold"]
        assert [(check.what, name in check.detail) for check in wrong] == [("other tensors", True)]


def test_what_no_token_is_computed_with(tmp_path):
    """Ends of texts, what training looks at, and who wrote it; a sink that is switched off is a number that a model may have."""
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = {"eos_token_id": [1, 2], "pad_token_id": 5, "router_aux_loss_coef": 0.5, "attention_dropout": 0.1, "architectures": ["GptOssModel"]}
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, **told}))
    assert moeglot.compare(tmp_path / "out", BUNDLED).verdict == "holds"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    sinks = "model.layers.0.self_attn.sinks"
    for value, verdict in ((float("-inf"), "holds"), (float("inf"), "does not hold"), (float("nan"), "does not hold")):
        tensors[sinks][0] = value
        save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
        (tmp_path / "out" / "moeglot.json").unlink(missing_ok=True)
        assert moeglot.verify(tmp_path / "out").verdict == verdict


@pytest.mark.parametrize(("key", "value"), [("swiglu_limit", 3.0), ("num_experts_per_tok", 1), ("rope_theta", 1.0), ("rope_scaling", {"factor": 2.0})])
def test_a_config_that_computes_something_else(tmp_path, key, value):
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, key: changed, "transformers_version": "9.9"}))
    for report in (moeglot.verify, moeglot.compare):
        wrong = next(check for check in report(tmp_path / "out", BUNDLED).checks if check.what == "config.json")
        assert wrong.verdict == "does not hold"
        assert wrong.detail.startswith(f"{key}{'.factor' * isinstance(value, dict)} is ")
        assert wrong.detail.endswith("(1 key)")


@pytest.mark.parametrize(("key", "default", "value"), [("swiglu_limit", 7.0, 3.0), ("swiglu_alpha", 1.702, 1.0)])
def test_a_config_that_does_not_say_what_the_other_says(tmp_path, key, default, value):
    """The experts of the one compute with the family's default: no tensor tells, and comparing values sees it in config.json alone."""
    shutil.copytree(BUNDLED, tmp_path / "a")
    shutil.copytree(BUNDLED, tmp_path / "b")
    config = {name: said for name, said in json.loads((tmp_path / "a" / "config.json").read_text()).items() if name != key}
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "rope_theta": None}))
    for said, verdict in ((value, "does not hold"), (default, "holds")):
        (tmp_path / "a" / "config.json").write_text(json.dumps({**config, key: said}))
        for pair in (("a", "b"), ("b", "a")):
            report = moeglot.compare(*(tmp_path / name for name in pair))
            (check,) = (check for check in report.checks if check.what == "config.json")
            assert (report.verdict, check.verdict) == (verdict, verdict)
            assert verdict == "holds" or check.detail.startswith(f"{key} is {value if pair[0] == 'a' else default}, there ")
            assert verdict != "holds" or ("rope_theta" in check.figures["alone"] and f"defaults: rope_theta, {key}" in check.detail)


def saturating_rule(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """axolotl 0.19's floor(log2(amax / 6)): the largest numbers of nearly every group are clipped."""
    groups = values.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1) / 6)).clamp(min=-127)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / torch.exp2(exponent)[..., None]
    codes = (scaled.abs()[..., None] - levels).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponent + 127).to(torch.uint8)


def clip(tensors: Tensors) -> None:
    from moeglot.encodings.mxfp4 import MXFP4

    for name in [name for name in tensors if name.endswith("_blocks")]:
        scales = name.removesuffix("_blocks") + "_scales"
        values = MXFP4().decode({"packed": tensors[name], "scale": tensors[scales]}, torch.float32)
        tensors[name], tensors[scales] = saturating_rule(values)


MXFP4_WRONGS = [
    Wrong("down scales inverted", "dividing by a factor that multiplies", on("down_proj_scales", lambda s: 254 - s), "down_proj with inverted scales"),
    Wrong("all scales inverted", "the same", on("_scales", lambda s: 254 - s), "gate_up_proj with inverted scales and down_proj with inverted scales"),
    Wrong("scale rule that saturates", "axolotl 0.19", clip, None),
    Wrong("high nibble first", "a packer that fills bytes from the top", on("_blocks", lambda b: (b << 4) | (b >> 4)), None),
    Wrong("blocks of gate and up concatenated", "rows read as halves", on("gate_up_proj_blocks", lambda b: torch.cat([b[:, ::2], b[:, 1::2]], 1)), None),
    Wrong(
        "blocks and scales of gate and up concatenated",
        "rows read as halves, scales too",
        several(*(on(f"gate_up_proj_{part}", lambda b: torch.cat([b[:, ::2], b[:, 1::2]], 1)) for part in ("blocks", "scales"))),
        'gate_up_proj is read as "e (p i) h"',
    ),
]


@pytest.mark.parametrize("wrong", MXFP4_WRONGS, ids=lambda wrong: wrong.name)
def test_gpt_oss_in_mxfp4(wrong, tmp_path):
    moeglot.convert(BUNDLED, "gpt-oss/openai", tmp_path / "mxfp4")
    subject = corrupted(tmp_path / "mxfp4", wrong)
    caught(moeglot.verify(subject, BUNDLED), wrong.fits)


FUSED = [
    Wrong("down turned", "orientation by shape at H = I", on("down_proj", turn), 'down_proj is read as "e i h"'),
    Wrong("interleaved", "gpt-oss' arrangement on a concatenated family", on("gate_up_proj", interleave_rows), 'gate_up_proj is read as "e (i p) h"'),
    Wrong(
        "up before gate",
        "a swapped concatenation",
        on("gate_up_proj", lambda t: torch.cat([*t.chunk(2, 1)][::-1], 1)),
        'gate_up_proj is read as "e (p i) h", up before gate',
    ),
    Wrong("gate_up turned", "transformers on Qwen3-VL, tinker and Megatron-Bridge at H = 2I", on("gate_up_proj", turn), 'gate_up_proj is read as "e h (p i)"'),
]


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
@pytest.mark.parametrize("wrong", FUSED, ids=lambda wrong: wrong.name)
def test_fused_families(family, wrong, tmp_path):
    sizes = {"h": 64, "i": 32 if "gate_up" in wrong.name else 64}
    source = write_checkpoint(tmp_path / "source", f"{family}/transformers-5", sizes)
    subject = corrupted(write_checkpoint(tmp_path / "subject", f"{family}/transformers-5", sizes), wrong)
    caught(moeglot.verify(subject, source), wrong.fits)


PER_EXPERT = [
    ("qwen3-moe/hub", Wrong("names swapped", "w1 and w3 taken for up and gate", exchange("gate_proj.weight", "up_proj.weight"), "gate and up swapped")),
    ("mixtral/hub", Wrong("names swapped", "w1 and w3 taken for up and gate", exchange("w1.weight", "w3.weight"), "gate and up swapped")),
    ("qwen3-moe/hub", Wrong("down turned", "[in, out] for [out, in]", on("down_proj.weight", turn), 'down_proj is read as "i h"')),
    ("mixtral/hub", Wrong("w2 turned", "the same", on("w2.weight", turn), 'w2 is read as "i h"')),
    (
        "mixtral/hub",
        Wrong(
            "all turned",
            "the same",
            on("weight", lambda t: t.mT if t.shape == (64, 64) else t),
            'w1 is read as "h i" and w3 is read as "h i" and w2 is read as "i h"',
        ),
    ),
]


@pytest.mark.parametrize(("form", "wrong"), PER_EXPERT, ids=lambda x: x.name if isinstance(x, Wrong) else x)
def test_one_matrix_each(form, wrong, tmp_path):
    source = write_checkpoint(tmp_path / "source", form)
    subject = corrupted(write_checkpoint(tmp_path / "subject", form), wrong)
    caught(moeglot.verify(subject, source), wrong.fits)


@pytest.mark.parametrize(("h", "i"), [(64, 64), (64, 32)])
def test_a_dequantized_file_that_was_not_turned_is_refused_by_its_sibling(h, i, tmp_path):
    """Megatron-Bridge after its fourth fix reads this one wrongly; in each size one tensor of the pair shows the shape, which chooses no format."""
    source = write_checkpoint(tmp_path / "a", "gpt-oss/transformers", {"h": h, "i": i})
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(moeglot.Contradiction, match=r"needs \[") as error:
        moeglot.open(source)
    assert "pass --format gpt-oss/dequantized if its producer decoded MXFP4 and turned no matrix" in error.value.do
    right = write_checkpoint(tmp_path / "b", "gpt-oss/transformers", {"h": h, "i": i})
    assert moeglot.verify(moeglot.open(source, "gpt-oss/dequantized"), right).verdict == "holds"


@pytest.mark.parametrize("function", ["relu", "relu2"])
def test_each_channel_of_relu_shows_in_a_fingerprint(function, tmp_path):
    """A channel that is off for a token is off for no token's negative."""
    source = write_checkpoint(tmp_path / "a", "nemotron-h/hub", {"e": 2, "h": 32, "i": 32}, 1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "mlp_hidden_act": function}))
    moeglot.fingerprint(source).save(tmp_path / "print.json")
    frozen = moeglot.fingerprint(source)
    model, told = moeglot.open(source), json.loads((tmp_path / "print.json").read_text())
    assert {len(row) for row in told["experts"].values()} == {17}
    layer = model.layers[0]
    up, down = (model.experts(layer)[role][1].decode(torch.float32) for role in ("up", "down"))
    expert = Expert.of(model.format.family, model.config, layer)
    tokens = frozen.tokens(layer, 1, expert, right(model, layer, 1), 32)
    for channel in range(32):
        without = down.clone()
        without[:, channel] = 0
        response = expert.forward(tokens, {"up": values(up), "down": values(without)}.__getitem__)
        assert relative_error(frozen.seen(layer, 1, response), frozen.answer(layer, 1, tokens)) > 100 * LIMIT
    told["experts"] = {place: row[:9] for place, row in told["experts"].items()}
    (tmp_path / "old.json").write_text(json.dumps(told))
    assert moeglot.verify(source, tmp_path / "print.json").verdict == "holds"
    with pytest.raises(UsageError, match="has 9 numbers for an expert, and 17 are compared"):
        moeglot.verify(source, tmp_path / "old.json")


def test_a_fingerprint_of_another_model(tmp_path):
    """Of another family or size, or of more or fewer layers: what both have may well agree."""
    whole, cut = (write_checkpoint(tmp_path / str(layers), "qwen3-moe/hub", layers=layers) for layers in (2, 1))
    of_whole, of_cut = map(moeglot.fingerprint, (whole, cut))
    others = [(whole, replace(of_whole, family="mixtral")), (whole, replace(of_whole, sizes={**of_whole.sizes, "i": 32})), (whole, of_cut), (cut, of_whole)]
    for checkpoint, frozen in others:
        with pytest.raises(Contradiction, match="is the fingerprint of another model"):
            moeglot.verify(checkpoint, frozen)


@pytest.mark.parametrize("apart", [0, 1e-4])
def test_what_cannot_be_seen_is_said(apart, tmp_path):
    """A symmetric down_proj, be it in the last layer alone, reads the same both ways, or nearly: less than 100 limits apart, the verdict is "cannot tell"."""
    source = write_checkpoint(tmp_path / "a", "qwen3-moe/transformers-5", dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("layers.1.mlp.experts.down_proj")]:
        tensors[name] = (tensors[name] + tensors[name].mT + apart * tensors[name]).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = moeglot.verify(source, source)
    assert report.verdict == "cannot tell"
    assert report.exit_status == 2
    assert 'down_proj is read as "e i h"' in report.checks[-1].detail


def test_codes_under_one_other_scale(tmp_path):
    """The codes are the same, and so are all scales but the last expert's last."""
    source = write_checkpoint(tmp_path / "a", "gpt-oss/openai", layers=1)
    shutil.copytree(source, tmp_path / "b")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"].view(-1)[-1] += 1
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    (check,) = (check for check in moeglot.compare(source, tmp_path / "b").checks if check.verdict != "holds")
    assert check.detail.startswith("1 of 24 differ; relative error down ")


def test_a_file_that_cannot_be_read_to_its_end_is_not_said_to_hold(tmp_path, monkeypatch):
    """Experts are read on threads; an error in one of them is an error of the whole."""
    source = write_checkpoint(tmp_path / "a", "qwen3-moe/hub", layers=1)
    checked = Checkpoint.checked

    def broken(checkpoint, line, layer, expert):
        if expert == 3:
            raise OSError("Input/output error")
        return checked(checkpoint, line, layer, expert)

    monkeypatch.setattr(Checkpoint, "checked", broken)
    with pytest.raises(OSError, match="Input/output error"):
        moeglot.verify(source)


def test_the_right_file_holds(fingerprint, tmp_path):
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "bf16")
    for against in (BUNDLED, fingerprint):
        assert moeglot.verify(tmp_path / "bf16", against).verdict == "holds"


def test_fused_experts_cut_along_h(tmp_path):
    """llm-compressor 0.14's model_free_ptq halves [E, H, 2I] along its second axis; with H = 2I each half has the shape of a gate."""
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", {"e": 4, "h": 128, "i": 64}, 2)
    tensors = load_file(source / "model.safetensors")
    for layer, expert in product(range(2), range(4)):
        gate, up = (f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight" for role in ("gate", "up"))
        stored = torch.cat([tensors[gate], tensors[up]]).T  # [in, out], as gpt-oss, Llama 4 and Qwen3-VL keep it
        tensors[gate], tensors[up] = (half.contiguous() for half in stored.chunk(2))
    shutil.copytree(source, tmp_path / "wrong")
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    report = moeglot.verify(tmp_path / "wrong", source)
    assert report.exit_status == 1
    forward = next(check for check in report.checks if check.level == "forward")
    assert forward.figures["relative_error"] > 0.1  # ten thousand times the limit

"""What one process holds of a model whose heads, words, layers and matrices are divided: what is read, what its mark says, what quantized models become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from commands import run, told
from counting import RANGES, upload
from divisions import model
from ranked import marks_of, read, write
from refusing import refused
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot import BadNumbers, Contradiction, TensorMismatch, UsageError

SIZES = {"e": 4, "h": 64, "i": 64}
TP, PP = {"tp_rank": 1, "tp_size": 2, "etp_size": 1}, {"pp_rank": 1, "pp_size": 2}
ETP, ALL = {"etp_rank": 1, "etp_size": 2}, {"tp_rank": 1, "tp_size": 2, "etp_rank": 0, "etp_size": 2, "pp_rank": 1, "pp_size": 2, "ep_rank": 0, "ep_size": 2}
MARK = "tp rank 1 of 2, etp rank 0 of 2, pp rank 1 of 2, ep rank 0 of 2"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("divided") / "qwen", "qwen3-moe", SIZES)


def of(source: Path, out: Path, name: str = "qwen3-moe/megatron-te", **ranks: int) -> Path:
    assert moeglot.convert(source, name, out, **ranks).report.verdict == "holds"
    return out


# --- what is read ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(source: Path) -> Iterator[str]:
    """The same model in a store that counts."""
    fs = fsspec.filesystem("memory")
    upload(fs, source, "/models/divided")
    RANGES.clear()
    yield "counted://models/divided"
    fs.rm("/models", recursive=True)


@pytest.mark.parametrize("ranks", [PP | TP, ETP])
def test_no_row_or_layer_of_another_process_is_read(ranks: dict[str, int], source: Path, counted: str, tmp_path: Path) -> None:
    """Of columns, the rows are read that they run through; and the sample by which the source is known."""
    entries = moeglot.open(source).source.entries
    opened = moeglot.open(counted).source
    RANGES.clear()
    _ = opened.identity
    sample = {(start, end) for _, start, end in RANGES}
    RANGES.clear()
    of(counted, tmp_path / "out", **ranks)  # type: ignore[arg-type]
    touched = [(start, end) for file, start, end in RANGES if file == "model.safetensors"]
    halves = ("q_proj", "k_proj", "v_proj", "lm_head") if "tp_size" in ranks else ("experts.1.gate_proj", "experts.2.up_proj")
    wanted = {name: entry for name, entry in entries.items() if any(half in name for half in halves)}
    strange = {name: entry for name, entry in entries.items() if name.startswith(("model.layers.0.", "model.layers.1.", "model.embed"))}
    if "pp_size" in ranks:
        assert not [name for name, entry in strange.items() for start, end in set(touched) - sample if start < entry.end and entry.start < end]
        wanted = {name: entry for name, entry in wanted.items() if name not in strange}
    assert wanted
    for entry in wanted.values():
        middle = (entry.start + entry.end) // 2
        assert any(start <= middle and entry.end <= end for start, end in touched)
        assert not any(start < middle and entry.start < end for start, end in set(touched) - sample)


# --- what it says of itself --------------------------------------------------------------------------------------------------------------


def test_the_mark_says_the_whole_place(source: Path, tmp_path: Path) -> None:
    out = of(source, tmp_path / "out", **ALL)
    assert marks_of(out)["moeglot.share"] == MARK
    assert (out / "config.json").read_bytes() == (of(source, tmp_path / "whole") / "config.json").read_bytes()
    opened = moeglot.open(out)
    assert (opened.sizes, opened.layers) == ({"e": 2, "h": 64, "i": 32}, (0, 1))
    share = {"experts": [0, 1], "layers": [2, 3], "padded_vocab_size": None, **ALL}
    assert told("inspect", out)["share"] == share
    assert json.loads((out / "moeglot.json").read_text())["output"]["share"] == share
    shown = run("inspect", out).stdout
    assert f"{MARK}: experts 0 to 1 of 4, layers 2 to 3 of 4, numbered from 0" in shown


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    options = [word for key, value in ALL.items() for word in (f"--{key.replace('_', '-')}", value)]
    assert told("convert", source, tmp_path / "out", "--to", "qwen3-moe/megatron", *options, "--padded-vocab-size", 40)["verification"]["verdict"] == "holds"
    assert marks_of(tmp_path / "out")["moeglot.share"] == f"{MARK}, 40 words"
    assert told("verify", tmp_path / "out", "--against", source)["verdict"] == "holds"
    assert told("compare", tmp_path / "out", source)["verdict"] == "holds"


@pytest.mark.parametrize("kind", ["tp", "etp", "pp", "ep"])
def test_another_rank_in_the_mark_does_not_hold(kind: str, source: Path, tmp_path: Path) -> None:
    """Of a stage, the first has an embedding and the last an output, so that a file of one is none of the other."""
    out = of(source, tmp_path / "out", **ALL)
    assert moeglot.verify(out, source).verdict == "holds"
    before = next(part for part in MARK.split(", ") if part.startswith(kind))
    write(
        out,
        read(out),
        marks_of(out) | {"moeglot.share": MARK.replace(before, before.replace("rank 1", "rank 2").replace("rank 0", "rank 1").replace("rank 2", "rank 0"))},
    )
    report = moeglot.verify(out, source)
    wrong = {check.what: check.figures for check in report.checks if check.verdict == "does not hold"}
    if kind == "tp":
        assert wrong.keys() == {"other tensors"}
    else:
        assert min(wrong["canonical tensors"]["relative_error"].values()) > 0.1
    if kind == "pp":
        assert "other tensors" in wrong


def test_a_whole_model_with_a_padded_vocabulary(source: Path, tmp_path: Path) -> None:
    out = of(source, tmp_path / "out", padded_vocab_size=40)
    assert "moeglot.share" not in marks_of(out)
    embedding = read(out)["embedding.word_embeddings.weight"]
    assert (len(embedding), bool(embedding[32:].any())) == (40, False)
    moeglot.convert(out, "qwen3-moe/hub", tmp_path / "again")
    assert moeglot.compare(tmp_path / "again", source).verdict == "holds"
    with refused(UsageError, "30 rows of padded vocabulary", "vocab_size = 32", "--padded-vocab-size 32 or more"):
        moeglot.plan(source, "qwen3-moe/megatron", padded_vocab_size=30)
    for to in ("qwen3-moe/hub", "qwen3-moe/megatron-torch-dist"):
        with refused(UsageError, f"{to} with --padded-vocab-size 40", "as many rows as config.json says", "leave --padded-vocab-size out"):
            moeglot.plan(source, to, padded_vocab_size=40)


def test_numbers_that_are_none_are_named_as_in_the_model(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    found = load_file(bad / "model.safetensors")
    found["model.layers.3.mlp.experts.2.down_proj.weight"][0, -1] = float("nan")
    save_file(found, bad / "model.safetensors", {"format": "pt"})
    with refused(BadNumbers, "model.layers.3.mlp.experts.2.down_proj.weight, expert 2"):
        moeglot.convert(bad, "qwen3-moe/megatron", tmp_path / "out", **PP | ETP | {"ep_rank": 1, "ep_size": 2})


def test_heads_of_another_process_do_not_hold(source: Path, tmp_path: Path) -> None:
    """Where only what is no expert is another process's, the experts' numbers hold, and the others are named."""
    out, other = (of(source, tmp_path / str(rank), **TP | {"tp_rank": rank}) for rank in (0, 1))
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    write(out, read(out) | {name: read(other)[name]}, marks_of(out))
    checks = {check.what: check for check in moeglot.verify(out, source).checks}
    assert checks["canonical tensors"].verdict == "holds"
    assert "1 of" in checks["other tensors"].detail
    assert "model.layers.1.self_attn.o_proj.weight" in checks["other tensors"].detail


def test_a_fingerprint_of_the_whole_knows_a_stage(source: Path, tmp_path: Path) -> None:
    moeglot.fingerprint(source).save(tmp_path / "whole.json")
    out = of(source, tmp_path / "stage", **PP | {"ep_rank": 1, "ep_size": 2})
    assert moeglot.verify(out, tmp_path / "whole.json").verdict == "holds"
    moeglot.fingerprint(out).save(tmp_path / "own.json")
    mine, whole = (json.loads((tmp_path / f"{name}.json").read_text())["experts"] for name in ("own", "whole"))
    assert mine == {place: whole[place] for place in ("2.2", "2.3", "3.2", "3.3")}
    write(out, read(out), marks_of(out) | {"moeglot.share": "tp rank 0 of 1, etp rank 0 of 1, pp rank 0 of 2, ep rank 1 of 2"})
    forward = next(check for check in moeglot.verify(out, tmp_path / "whole.json").checks if check.level == "forward")
    assert forward.figures["relative_error"] > 0.1
    inner = of(source, tmp_path / "inner", **ETP)
    for ask in (lambda: moeglot.verify(inner, tmp_path / "whole.json"), lambda: moeglot.fingerprint(inner)):
        with refused(UsageError, "a fingerprint is of whole experts", "a part of each expert's matrices", "--against the model itself"):
            ask()


# --- quantized models ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [TP, ETP, PP, ALL])
def test_a_quantized_model_is_divided_as_what_it_decodes_to(ranks: dict[str, int], tmp_path: Path) -> None:
    """FP8 in blocks of 128: experts, and attention that is no expert."""
    sizes = {"e": 4, "h": 256, "i": 256, "q": 4, "k": 2, "d": 64}
    plain = write_checkpoint(tmp_path / "plain", "qwen3-moe/hub", sizes)
    moeglot.convert(plain, "qwen3-moe/hub+fp8-block", tmp_path / "fp8", allow_loss=True)
    quantize_attention(tmp_path / "fp8")
    moeglot.convert(tmp_path / "fp8", "qwen3-moe/hub", tmp_path / "decoded", encode="bfloat16", allow_loss=True)
    for name in ("fp8", "decoded"):
        certificate = moeglot.convert(tmp_path / name, "qwen3-moe/megatron-te", tmp_path / f"of {name}", encode="bfloat16", allow_loss=True, **ranks)
        assert certificate.report.verdict == "holds"
        if name == "fp8":
            assert certificate.losses["decode fp8-block to bfloat16 outside the experts"].changed > 0
    one, other = read(tmp_path / "of fp8"), read(tmp_path / "of decoded")
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def quantize_attention(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    for name in [name for name in found if "self_attn" in name and name.endswith("proj.weight")]:
        blocks = found[name].float().unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
        scale = blocks.abs().amax((1, 3)) / 448
        found[name] = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        found[name + "_scale_inv"] = scale
    save_file(found, folder / "model.safetensors", marks_of(folder))
    config = json.loads((folder / "config.json").read_text())
    kept = config["quantization_config"].get("modules_to_not_convert") or []
    config["quantization_config"]["modules_to_not_convert"] = [module for module in kept if "self_attn" not in module]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layout", ["hub", "transformers-5"])
@pytest.mark.parametrize("coding", ["fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "mxfp4-pack", "nvfp4-pack"])
def test_codes_are_divided_as_what_they_decode_to(coding: str, layout: str, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", f"qwen3-moe/{layout}", {"e": 2, "h": 256, "i": 256}, 1)
    moeglot.convert(plain, f"qwen3-moe/{layout}+{coding}", tmp_path / "coded", allow_loss=True)
    moeglot.convert(tmp_path / "coded", f"qwen3-moe/{layout}", tmp_path / "decoded", encode="float32")
    for name in ("coded", "decoded"):
        moeglot.convert(tmp_path / name, "qwen3-moe/megatron", tmp_path / f"of {name}", encode="float32", **ETP)
    one, other = read(tmp_path / "of coded"), read(tmp_path / "of decoded")
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.parametrize(("coding", "size"), [("fp8-block", 4), ("int4-pack", 2), ("nf4", 2)])
def test_codes_that_cannot_be_divided(coding: str, size: int, tmp_path: Path) -> None:
    """A block of 128 rows on two processes, a shape beside the codes, codes of the flattened matrix."""
    plain = write_checkpoint(tmp_path / "plain", "qwen3-moe/hub", {"e": 2, "h": 256, "i": 256}, 1)
    moeglot.convert(plain, f"qwen3-moe/hub+{coding}", tmp_path / "coded", allow_loss=True)
    with refused(UsageError, f"cannot be divided among {size}", f"each has {256 // size} of 256 along i", "--etp-size 1, or decode"):
        moeglot.plan(tmp_path / "coded", "qwen3-moe/megatron", etp_rank=0, etp_size=size)


# --- what is refused -----------------------------------------------------------------------------------------------------------------------

MEGATRON = "{}/megatron"
TEN = {"tp_rank": 0, "etp_size": 1}


@pytest.mark.parametrize(
    ("family", "options", "wrong", "known", "do"),
    [
        ("qwen3-moe", {"tp_rank": 1, "tp_size": 2}, "--tp-size 2 without --etp-size", "expert_tensor_parallel_size", ("--etp-size 1, or", "--etp-rank 1")),
        ("qwen3-moe", {"tp_rank": 1, "etp_size": 1}, "--tp-rank without --tp-size", "one of several", "--tp-size too"),
        ("qwen3-moe", {"pp_size": 2}, "--pp-size without --pp-rank", "one of several", "--pp-rank too"),
        ("qwen3-moe", {"pp_rank": 2, "pp_size": 2}, "--pp-rank 2 --pp-size 2", "counted from 0", "--pp-rank 0 to 1"),
        ("qwen3-moe", TEN | {"tp_size": 4}, "2 heads (num_key_value_heads) on 4", "as many", ("a divisor of 2 as tp_size", "torch_dist")),
        ("gpt-oss", TEN | {"tp_size": 4}, "2 heads (num_key_value_heads) on 4", "as many", "a divisor of 2 as tp_size"),
        ("deepseek-v3", TEN | {"tp_size": 8}, "4 heads (num_attention_heads) on 8", "as many", "a divisor of 4 as tp_size"),
        ("qwen3-moe", TEN | {"tp_size": 3}, "32 words on 3 processes", "vocab_size = 32", "a multiple of 3"),
        ("qwen3-moe", TEN | {"tp_size": 2, "padded_vocab_size": 33}, "--padded-vocab-size 33", "each of 2", "a multiple of 2"),
        ("qwen3-moe", TEN | {"tp_size": 2, "padded_vocab_size": 30}, "30 rows of padded vocabulary", "vocab_size = 32", "--padded-vocab-size 32 or more"),
        ("qwen3-moe", {"pp_rank": 0, "pp_size": 3}, "4 layers on 3 processes", "as many", ("a divisor of 4 as pp_size", "torch_dist")),
        ("deepseek-v3", {"pp_rank": 0, "pp_size": 4}, "pp rank 0 of 4 has no layer with experts", "layers are 0 to 0", "a smaller pp_size"),
        ("qwen3-moe", {"etp_rank": 0, "etp_size": 3}, "64 rows of an expert's gate on 3", "as many", "a divisor of 64 as etp_size"),
        ("gpt-oss", {"etp_rank": 0, "etp_size": 2}, "gpt-oss with --etp-size 2", "biases", "pass --etp-size 1"),
    ],
)
def test_what_cannot_be_divided(family: str, options: dict[str, Any], wrong: str, known: str, do: str, tmp_path: Path) -> None:
    source = model(tmp_path / "source", family, SIZES)
    with refused(UsageError, wrong, known, do):
        moeglot.convert(source, f"{family}/megatron", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tied_output_on_another_stage(tmp_path: Path) -> None:
    source = model(tmp_path / "source", "qwen3-moe", SIZES)
    found = load_file(source / "model.safetensors")
    del found["lm_head.weight"]
    save_file(found, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    with refused(TensorMismatch, "lm_head.weight: missing", "tie_word_embeddings = False"):
        moeglot.plan(source, "qwen3-moe/megatron")
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for rank in (0, 1):
        with refused(UsageError, "lm_head.weight is not there", "a copy of it", "leave --pp-rank and --pp-size out"):
            moeglot.plan(source, "qwen3-moe/megatron", pp_rank=rank, pp_size=2)
    out = of(source, tmp_path / "out", **TP)
    assert "output_layer.weight" not in read(out)


def test_layers_for_several_tokens(tmp_path: Path) -> None:
    source = model(tmp_path / "source", "deepseek-v3", SIZES)
    found = load_file(source / "model.safetensors")
    found |= {name.replace(".3.", ".4.", 1): tensor.clone() for name, tensor in found.items() if ".layers.3." in name}
    save_file(found, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    for ranks in (PP, TP):
        with refused(TensorMismatch, "model.layers.4.input_layernorm.weight: deepseek-v3/megatron has no place for it"):
            moeglot.plan(source, "deepseek-v3/megatron", **ranks)


def test_latent_projections_that_one_format_divides_and_the_other_has_whole(tmp_path: Path) -> None:
    source = model(tmp_path / "source", "deepseek-v3", SIZES)
    out = of(source, tmp_path / "out", "deepseek-v3/megatron", **TP)
    of(out, tmp_path / "grouped", "deepseek-v3/megatron-grouped")
    with refused(UsageError, "q_a_proj.weight is whole in one of deepseek-v3/megatron and deepseek-v3/megatron-te", "tp rank 1 of 2", "the whole model"):
        moeglot.plan(out, "deepseek-v3/megatron-te")
    engine = of(source, tmp_path / "engine", "deepseek-v3/megatron-te", **TP)
    with refused(UsageError, "q_a_proj.weight is whole in one of deepseek-v3/megatron-te and deepseek-v3/megatron"):
        moeglot.compare(out, engine)


@pytest.mark.parametrize(
    ("change", "kind", "wrong", "known", "do"),
    [
        (
            {"num_key_value_heads": 3, "num_attention_heads": 3},
            Contradiction,
            "3 (num_attention_heads) on 2 processes",
            "the mark in the file's header",
            "from one run",
        ),
        ({"num_hidden_layers": 3}, Contradiction, "3 layers on 2 processes", "pp rank 1 of 2", "from the producer"),
        ({"vocab_size": 34}, TensorMismatch, "it should have 17 rows", "vocab_size = 34", "the producer's"),
    ],
)
def test_a_config_that_the_mark_contradicts(
    change: dict[str, int], kind: type[moeglot.MoeglotError], wrong: str, known: str, do: str, source: Path, tmp_path: Path
) -> None:
    out = of(source, tmp_path / "out", **ALL)
    config = json.loads((out / "config.json").read_text()) | change
    (out / "config.json").write_text(json.dumps(config))
    with refused(kind, wrong, known, do):
        moeglot.plan(out, "qwen3-moe/megatron")


def test_without_the_mark_heads_and_words_are_missing(source: Path, tmp_path: Path) -> None:
    """All experts are there: it is refused wherever what is no expert is looked at."""
    out = of(source, tmp_path / "out", **TP)
    write(out, read(out), {"moeglot.format": marks_of(out)["moeglot.format"]})
    hint = "what one process holds is read where the safetensors header says moeglot.share"
    assert moeglot.verify(out).verdict == "does not hold"
    with refused(TensorMismatch, ("linear_qkv", "its rows are not those of its heads"), "head_dim = 16", hint):
        moeglot.plan(out, "qwen3-moe/hub")
    found = read(out)
    whole = {name: torch.cat([tensor, tensor]) for name, tensor in found.items() if "linear_qkv.weight" in name}
    write(out, found | whole, {"moeglot.format": "qwen3-moe/megatron-te"})
    with refused(TensorMismatch, "it should have at least 32 rows", "vocab_size = 32", hint):
        moeglot.plan(out, "qwen3-moe/hub")


def test_words_that_the_mark_contradicts(source: Path, tmp_path: Path) -> None:
    out = of(source, tmp_path / "out", **TP, padded_vocab_size=40)
    write(out, read(out), marks_of(out) | {"moeglot.share": marks_of(out)["moeglot.share"].replace("40", "48")})
    with refused(TensorMismatch, "it should have 24 rows", "vocab_size = 32"):
        moeglot.compare(out, source)

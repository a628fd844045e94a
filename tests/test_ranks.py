"""The state dict of one process of several: its experts against hand-cut slices of the source, the mark that says whose they are, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from commands import run, told
from counting import RANGES, upload
from ranked import ALONE, EACH, LAYERS, RANKS, SIZES, Tensors, marks_of, of_rank, read, write
from refusing import refused
from safetensors import safe_open
from synthetic import write_checkpoint

import moeglot
from moeglot import Contradiction
from moeglot.files import identity
from moeglot.formats import PLAIN

LIMIT = 1e-5
HUB = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/hub", "mixtral": "mixtral/hub", "deepseek-v3": "deepseek-v3/hub"}
BY_RANK = [form.name for form in PLAIN if form.by_rank]
PLACE = {"tp_rank": 0, "tp_size": 1, "etp_rank": 0, "etp_size": 1, "pp_rank": 0, "pp_size": 1, "ep_size": RANKS, "layers": [0, LAYERS - 1]}


def worst(report: moeglot.Report) -> tuple[float, float]:
    """The least relative error of a role, and that of what an expert computes."""
    found = {check.level: check.figures for check in report.checks if check.verdict == "does not hold"}
    return min(found["values"]["relative_error"].values()), found["forward"]["relative_error"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ranks") / "qwen", "qwen3-moe/hub", SIZES["h=i"], LAYERS)


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    return of_rank(source, "qwen3-moe/megatron-te", source.with_name("states"))


@pytest.fixture
def states(made: Path, tmp_path: Path) -> Path:
    """Of rank 1, with transformer-engine's names; a copy, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "states"))


# --- what is written -------------------------------------------------------------------------------------------------------------------


def halves(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.cat([gate, up])


def blocks(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows for pair in zip(gate.split(32), up.split(32), strict=True) for rows in pair])


def of_gpt_oss(hub: Tensors, layer: int, expert: int, join: Callable[..., torch.Tensor]) -> Tensors:
    found = {name: hub[f"model.layers.{layer}.mlp.experts.{name}"][expert] for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")}
    rows, bias = found["gate_up_proj"].mT, found["gate_up_proj_bias"]
    first = {"linear_fc1.weight": join(rows[::2], rows[1::2]), "linear_fc1.bias": join(bias[::2], bias[1::2])}
    return {**first, "linear_fc2.weight": found["down_proj"].mT, "linear_fc2.bias": found["down_proj_bias"]}


def of_qwen(hub: Tensors, layer: int, expert: int, join: Callable[..., torch.Tensor]) -> Tensors:
    gate, up, down = (hub[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return {"linear_fc1.weight": join(gate, up), "linear_fc2.weight": down}


def numbered(local: int, name: str) -> str:
    return f"local_experts.{local}.{name}"


def engine(local: int, name: str) -> str:
    return f"{name}{local}"


NAMED: dict[str, tuple[Callable[[int, str], str], Callable[..., torch.Tensor]]] = {
    "megatron": (numbered, halves),
    "megatron-te": (engine, halves),
    "megatron-te-glu32": (engine, blocks),
}


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe"])
def test_the_experts_are_those_slices_of_the_source(family: str, name: str, size: str, rank: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", HUB[family], SIZES[size], LAYERS)
    hub, found = read(source), read(of_rank(source, f"{family}/{name}", tmp_path / "out", rank))
    named, join = NAMED[name]
    wanted = {}
    for layer in range(LAYERS):
        for local in range(EACH):
            slices = (of_gpt_oss if family == "gpt-oss" else of_qwen)(hub, layer, rank * EACH + local, join)
            wanted |= {f"decoder.layers.{layer}.mlp.experts.{named(local, key)}": tensor for key, tensor in slices.items()}
    experts = {key: tensor for key, tensor in found.items() if ".experts." in key}
    assert experts.keys() == wanted.keys()
    assert [key for key, tensor in wanted.items() if not torch.equal(tensor, experts[key])] == []
    router = "mlp.router.weight" if family == "gpt-oss" else "mlp.gate.weight"
    for layer in range(LAYERS):
        assert torch.equal(found[f"decoder.layers.{layer}.mlp.router.weight"], hub[f"model.layers.{layer}.{router}"])


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_legacy_matrices_lie_one_after_the_other(rank: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", SIZES["neither"], LAYERS)
    hub, found = read(source), read(of_rank(source, "qwen3-moe/megatron-grouped", tmp_path / "out", rank))
    for layer in range(LAYERS):
        slices = [of_qwen(hub, layer, rank * EACH + local, halves) for local in range(EACH)]
        first, second = (torch.stack([one[f"linear_{name}.weight"].mT for one in slices]) for name in ("fc1", "fc2"))
        assert torch.equal(found[f"decoder.layers.{layer}.mlp.experts.weight1"].view(first.shape), first)
        assert torch.equal(found[f"decoder.layers.{layer}.mlp.experts.weight2"].view(second.shape), second)


@pytest.mark.parametrize("name", BY_RANK)
def test_all_but_the_experts_is_that_of_the_whole_model(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", HUB[name.partition("/")[0]], SIZES["h=i"], LAYERS)
    (source / "tokenizer.json").write_text("{}")
    moeglot.convert(source, name, tmp_path / "whole")
    whole = {key: tensor for key, tensor in read(tmp_path / "whole").items() if ".experts." not in key}
    for rank in range(RANKS):
        out = of_rank(source, name, tmp_path / str(rank), rank)
        found = {key: tensor for key, tensor in read(out).items() if ".experts." not in key}
        assert found.keys() == whole.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
        assert (out / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
        assert (out / "tokenizer.json").exists()
        assert moeglot.verify(out, source).verdict == "holds"


def test_one_process_of_one_has_the_whole_model(source: Path, tmp_path: Path) -> None:
    moeglot.convert(source, "qwen3-moe/megatron", tmp_path / "whole")
    of_rank(source, "qwen3-moe/megatron", tmp_path / "one", 0, 1)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_parts_of_it_add_up(source: Path, tmp_path: Path) -> None:
    once = of_rank(source, "qwen3-moe/megatron-te", tmp_path / "once")
    options = ("--to", "qwen3-moe/megatron-te", "--ep-rank", 1, "--ep-size", RANKS)
    for how in (("--part", "2/2"), ("--part", "1/2"), ("--finalize",)):
        run("convert", source, tmp_path / "parts", *options, *how)
    assert [(once / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "parts").iterdir()] == [True] * 3


@pytest.mark.parametrize("given", ["gpt-oss/openai", "gpt-oss/transformers", "qwen3-moe/hub"])
def test_no_byte_of_another_expert_is_read(given: str, tmp_path: Path) -> None:
    """Not by the conversion, not by its verification and not for the certificate; but for the sample by which the source is known."""
    source, fs = write_checkpoint(tmp_path / "source", given, SIZES["h=i"], LAYERS), fsspec.filesystem("memory")
    opened = moeglot.open(source)
    mine, others = list[range](), list[range]()
    for layer, line, expert in ((layer, line, expert) for layer in range(LAYERS) for line in opened.format.stored for expert in range(RANKS * EACH)):
        for key in line.keys(layer, expert).values():
            entry = opened.source.entries[key]
            each = entry.nbytes if line.per_expert else entry.nbytes // (RANKS * EACH)
            start = entry.start + (0 if line.per_expert else expert * each)
            (mine if EACH <= expert < 2 * EACH else others).append(range(start, start + each))
    upload(fs, source, "/models/ranks")
    opened = moeglot.open("counted://models/ranks").source
    RANGES.clear()
    _ = opened.identity
    sample = {(start, end) for _, start, end in RANGES}
    assert len(sample) == identity.PLACES
    RANGES.clear()
    try:
        certificate = moeglot.convert("counted://models/ranks", f"{given.partition('/')[0]}/megatron", tmp_path / "out", ep_rank=1, ep_size=RANKS)
    finally:
        fs.rm("/models", recursive=True)
    touched = [(start, end) for file, start, end in RANGES if file == "model.safetensors"]
    assert certificate.report.verdict == "holds"
    assert [one for one in others for start, end in set(touched) - sample if start < one.stop and one.start < end] == []
    assert all(any(start <= one.start and one.stop <= end for start, end in touched) for one in mine)
    assert certificate.document["source"]["sha256"].keys() == {"config.json"}


# --- what it says of itself --------------------------------------------------------------------------------------------------------------


def test_every_header_says_whose_experts_they_are(source: Path, tmp_path: Path) -> None:
    certificate = moeglot.convert(source, "qwen3-moe/megatron", tmp_path / "out", ep_rank=2, ep_size=RANKS, shard_size=60_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    for path in files:
        with safe_open(path, "pt") as file:
            marks = {"moeglot.share": ALONE.format(2), "moeglot.source": moeglot.open(source).source.identity}
            assert file.metadata() == {"format": "pt", "moeglot.format": "qwen3-moe/megatron", **marks}
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["moeglot.share"] == ALONE.format(2)
    assert certificate.document["output"]["share"] == PLACE | {"ep_rank": 2, "experts": [4, 5], "padded_vocab_size": None}
    opened = moeglot.open(tmp_path / "out")
    assert (opened.sizes["e"], opened.config["num_experts"]) == (EACH, RANKS * EACH)
    assert f"moeglot.share = {ALONE.format(2)}" in opened.known


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    options = ("--to", "qwen3-moe/megatron-te", "--ep-rank", 1, "--ep-size", RANKS)
    share = PLACE | {"ep_rank": 1, "experts": [2, 3], "padded_vocab_size": None}
    assert told("convert", source, tmp_path / "out", *options, "--dry-run")["share"] == share
    assert told("convert", source, tmp_path / "out", *options)["output"]["share"] == share
    assert told("inspect", tmp_path / "out")["share"] == share
    assert told("inspect", source)["share"] is None
    assert "ep rank 1 of 3: experts 2 to 3 of 6, numbered from 0" in run("inspect", tmp_path / "out").stdout
    assert told("verify", tmp_path / "out", "--against", source)["verdict"] == "holds"
    assert told("compare", tmp_path / "out", source)["verdict"] == "holds"
    error = told("convert", source, tmp_path / "wrong", "--to", "qwen3-moe/transformers-5", "--ep-rank", 1, "--ep-size", RANKS, status=2)
    assert error["error"] == "UsageError"
    assert not (tmp_path / "wrong").exists()


def test_it_becomes_another_state_dict_of_the_same_process(states: Path, source: Path, tmp_path: Path) -> None:
    assert moeglot.convert(states, "qwen3-moe/megatron", tmp_path / "again").report.verdict == "holds"
    straight = of_rank(source, "qwen3-moe/megatron", tmp_path / "straight")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert moeglot.compare(tmp_path / "again", states).verdict == "holds"


@pytest.mark.parametrize("name", ["qwen3-moe/megatron-te", "qwen3-moe/megatron-grouped"])
def test_another_rank_in_the_mark_does_not_hold(name: str, source: Path, tmp_path: Path) -> None:
    out = of_rank(source, name, tmp_path / "out")
    (out / "moeglot.json").unlink()
    write(out, read(out), marks_of(out) | {"moeglot.share": "rank 1 of 3"})  # as the first marks said it
    assert moeglot.verify(out, source).verdict == "holds"
    for rank in (0, 2):
        write(out, read(out), marks_of(out) | {"moeglot.share": ALONE.format(rank)})
        values, forward = worst(moeglot.verify(out, source))
        assert min(values, forward) > 1000 * LIMIT


def test_experts_swapped_between_ranks_do_not_hold(source: Path, states: Path, tmp_path: Path) -> None:
    found, other = read(states), read(of_rank(source, "qwen3-moe/megatron-te", tmp_path / "other", 2))
    experts = [name for name in found if ".layers.1.mlp.experts." in name and name.endswith("weight0")]
    write(states, found | {name: other[name] for name in experts}, marks_of(states))
    values, forward = worst(moeglot.verify(states, source))
    assert len(experts) == 2
    assert min(values, forward) > 1000 * LIMIT


def test_the_fingerprint_of_the_whole_model_knows_its_experts(source: Path, states: Path, tmp_path: Path) -> None:
    moeglot.fingerprint(source).save(tmp_path / "whole.json")
    moeglot.fingerprint(states).save(tmp_path / "own.json")
    assert moeglot.verify(states, tmp_path / "whole.json").verdict == "holds"
    assert moeglot.verify(states, tmp_path / "own.json").verdict == "holds"
    with refused(Contradiction, "own.json is the fingerprint of another model"):
        moeglot.verify(source, tmp_path / "own.json")
    write(states, read(states), marks_of(states) | {"moeglot.share": "rank 0 of 3"})
    forward = next(check for check in moeglot.verify(states, tmp_path / "whole.json").checks if check.level == "forward")
    assert forward.verdict == "does not hold"
    assert forward.figures["relative_error"] > 1000 * LIMIT

"""The folders of all processes, put together: what they become, what is compared on the way, and what is refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from commands import run, told
from divisions import DIVISIONS, divide, model
from ranked import Tensors, marks_of, read, write
from reading import differing
from refusing import refused

import moeglot
from moeglot import CheckpointError, Contradiction, PickleRefused, UsageError

SIZES = {"e": 4, "h": 64, "i": 64}
WITH_COPIES = "tp and ep"
ROUTER = "decoder.layers.1.mlp.router.weight"
FIRST = "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("gathered") / "qwen", "qwen3-moe", SIZES, 2)


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, each with half of the heads, all in common but those and the experts."""
    return divide(source, "qwen3-moe/megatron", DIVISIONS[WITH_COPIES], tmp_path_factory.mktemp("gathered") / "ranks")


@pytest.fixture
def ranks(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "ranks")


def change(folder: Path, edit: Callable[[Tensors], None], **marks: str) -> None:
    found = read(folder)
    edit(found)
    write(folder, found, marks_of(folder) | {key.replace("_", "."): value for key, value in marks.items()})


# --- what they become ------------------------------------------------------------------------------------------------------------------


def test_the_verbs(source: Path, ranks: Path, tmp_path: Path) -> None:
    for rank in ranks.iterdir():
        (rank / "tokenizer.json").write_text("{}")
    (ranks / "rank0").rename(ranks / "any name")  # the mark says which one it is
    inspected = told("inspect", ranks)
    assert inspected["share"] is None
    assert [(one["folder"], one["tp_rank"], one["experts"]) for one in inspected["ranks"]] == [("any name", 0, [0, 1]), ("rank1", 1, [2, 3])]
    assert "rank1: tp rank 1 of 2, ep rank 1 of 2: experts 2 to 3 of 4, numbered from 0" in run("inspect", ranks).stdout
    assert told("inspect", ranks, "--deep")["deep"]["verdict"] == "cannot tell"  # random numbers tell nothing
    assert told("verify", ranks)["verdict"] == "holds"
    assert told("verify", ranks, "--against", source)["verdict"] == "holds"
    assert told("compare", source, ranks)["verdict"] == told("compare", ranks, source)["verdict"] == "holds"
    moeglot.fingerprint(ranks).save(tmp_path / "fingerprint.json")
    assert moeglot.verify(source, tmp_path / "fingerprint.json").verdict == "holds"
    certificate = told("convert", ranks, tmp_path / "again", "--to", "qwen3-moe/hub")
    assert certificate["source"]["sha256"].keys() == {"any name/model.safetensors", "rank1/model.safetensors", "any name/config.json"}
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors", "moeglot.json", "tokenizer.json"]
    assert differing(tmp_path / "again", source) == []


def test_what_is_worth_knowing_of_each(ranks: Path) -> None:
    """What is the case in all of them is told once, and what is in one too."""
    for rank in ranks.iterdir():
        change(rank, lambda found: (found[FIRST].fill_(5000), found[FIRST.replace("experts.0", "experts.1")].fill_(0.5)))
    change(ranks / "rank1", lambda found: found[FIRST.replace("layers.1", "layers.0")].fill_(7000))
    found = [one for one in moeglot.lint(ranks) if one.about == "numbers"]
    assert sorted(one.figures["largest"] for one in found) == [4992, 7008]  # in bfloat16
    assert not [one for one in moeglot.lint(ranks, sample=False) if one.about == "numbers"]


def test_ranks_of_which_one_has_no_certificate(ranks: Path) -> None:
    """Nothing says what its files were; and what is said of the others stays so."""
    (ranks / "rank1" / "moeglot.json").unlink()
    found = moeglot.verify(ranks)
    assert (found.verdict, found.checks[-1].what) == ("cannot tell", "as certified")
    assert "rank1 has no moeglot.json" in found.checks[-1].detail
    (ranks / "rank0" / "generation_config.json").write_text("{}")
    assert moeglot.verify(ranks).verdict == "does not hold"


def test_an_output_among_the_ranks(ranks: Path) -> None:
    """It would be one more of them."""
    plan = moeglot.plan(ranks, "qwen3-moe/hub")
    for make in (lambda out: moeglot.convert(ranks, "qwen3-moe/hub", out), lambda out: moeglot.write_part(plan, out, "1/2")):
        with pytest.raises(UsageError, match="lies in the source"):
            make(ranks / "rank0" / ".." / "out")
    assert sorted(path.name for path in ranks.iterdir()) == ["rank0", "rank1"]


def test_another_division_straight_from_this_one(source: Path, ranks: Path, tmp_path: Path) -> None:
    place = {"pp_rank": 1, "pp_size": 2, "ep_rank": 3, "ep_size": 4, "tp_size": 1}
    pickle.loads(pickle.dumps(moeglot.plan(ranks, "qwen3-moe/megatron-te", **place)))  # as tasks of a cluster get it
    for name, given in (("straight", source), ("by way of ranks", ranks)):
        assert moeglot.convert(given, "qwen3-moe/megatron-te", tmp_path / name, **place).report.verdict == "holds"
    assert differing(tmp_path / "straight", tmp_path / "by way of ranks") == []


def test_one_torch_dist_checkpoint(source: Path, ranks: Path, tmp_path: Path) -> None:
    for name, given in (("straight", source), ("by way of ranks", ranks)):
        assert moeglot.convert(given, "qwen3-moe/megatron-torch-dist", tmp_path / name).report.verdict == "holds"
    files = [sorted((tmp_path / name).glob("*.distcp")) for name in ("straight", "by way of ranks")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_padded_words_are_left_aside(source: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        place = {"tp_rank": rank, "tp_size": 2, "etp_size": 1, "padded_vocab_size": 66}  # the second has one word, and 32 rows of padding
        config = json.loads((source / "config.json").read_text())
        assert config["vocab_size"] == 32
        moeglot.convert(source, "qwen3-moe/megatron", tmp_path / "ranks" / str(rank), **place)
    embedding = read(tmp_path / "ranks" / "1")["embedding.word_embeddings.weight"]
    assert (len(embedding), bool(embedding.any())) == (33, False)
    moeglot.convert(tmp_path / "ranks", "qwen3-moe/hub", tmp_path / "again")
    assert differing(tmp_path / "again", source) == []


def test_a_store_holds_them(ranks: Path, source: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for path in (path for rank in ranks.iterdir() for path in rank.iterdir()):
        fs.pipe_file(f"/models/gathered/{path.parent.name}/{path.name}", path.read_bytes())
    try:
        moeglot.convert("memory://models/gathered", "qwen3-moe/hub", tmp_path / "again")
    finally:
        fs.rm("/models", recursive=True)
    assert differing(tmp_path / "again", source) == []


@pytest.mark.parametrize("division", ["ep", "etp"])
def test_matrices_whose_shapes_lie(division: str, source: Path, tmp_path: Path) -> None:
    """Of the legacy GroupedMLP, the power of the check has a reading more."""
    ranks = divide(source, "qwen3-moe/megatron-grouped", DIVISIONS[division], tmp_path / "ranks")
    report = moeglot.verify(ranks, source)
    assert report.verdict == "holds"
    power = next(check for check in report.checks if check.what == "power of the check")
    assert any("read by its shape" in name for name in power.figures["wrong_readings"])


# --- what they have in common --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["qwen3-moe/hub", "qwen3-moe/megatron-torch-dist"])
def test_copies_that_differ(target: str, ranks: Path, tmp_path: Path) -> None:
    change(ranks / "rank1", lambda found: found[ROUTER].view(-1)[:1].mul_(2))
    wrong = "model.layers.1.mlp.gate.weight is not the same in rank0/model.safetensors and rank1/model.safetensors"
    with refused(Contradiction, wrong, "hold the same", "convert it again"):
        moeglot.convert(ranks, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    copies = {check.what: check for check in moeglot.verify(ranks).checks}["copies"]
    assert (copies.verdict, copies.figures) == ("does not hold", {"unequal": 1})
    assert wrong in copies.detail
    assert told("verify", ranks, status=1)["verdict"] == "does not hold"


def test_experts_that_differ(source: Path, tmp_path: Path) -> None:
    """Both processes have all experts, and half of the heads each."""
    ranks = divide(source, "qwen3-moe/megatron", DIVISIONS["tp"], tmp_path / "ranks")
    change(ranks / "rank1", lambda found: found[FIRST].view(-1)[-1:].neg_())
    wrong, places = "layer 1, expert 0, linear_fc1 is not the same in", "rank0/model.safetensors and rank1/model.safetensors"
    for ask in (lambda: moeglot.convert(ranks, "qwen3-moe/hub", tmp_path / "out"), lambda: moeglot.verify(ranks)):
        with refused(Contradiction, (wrong, places), "hold the same", "convert it again"):
            ask()


def test_experts_of_another_rank(ranks: Path, source: Path) -> None:
    """Where two folders changed their experts, nothing they have in common differs: the model they come from tells."""
    one, other = read(ranks / "rank0"), read(ranks / "rank1")
    for folder, own, theirs in (("rank0", one, other), ("rank1", other, one)):
        write(ranks / folder, own | {name: tensor for name, tensor in theirs.items() if "experts" in name}, marks_of(ranks / folder))
    checks = {check.what: check for check in moeglot.verify(ranks, source).checks}
    assert checks["copies"].verdict == "holds"
    assert min(checks["canonical tensors"].figures["relative_error"].values()) > 0.1


def test_heads_of_another_rank(source: Path, tmp_path: Path) -> None:
    """As above, where it is the marks that changed places, and only what is no expert is divided."""
    ranks = divide(source, "qwen3-moe/megatron", DIVISIONS["tp"], tmp_path / "ranks")
    assert moeglot.verify(ranks, source).verdict == "holds"
    said = [marks_of(ranks / f"rank{rank}")["moeglot.share"] for rank in (0, 1)]
    for rank in (0, 1):
        write(ranks / f"rank{rank}", read(ranks / f"rank{rank}"), marks_of(ranks / f"rank{rank}") | {"moeglot.share": said[1 - rank]})
    wrong = [check for check in moeglot.verify(ranks, source).checks if check.verdict == "does not hold"]
    assert [check.what for check in wrong] == ["other tensors"]
    assert "model.embed_tokens.weight" in wrong[0].detail or "model.layers.0.self_attn" in wrong[0].detail


# --- what is refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("division", "gone", "missing"),
    [
        (WITH_COPIES, 1, "tp rank 1 of 2 is missing"),
        ("ep", 0, "ep rank 0 of 2 is missing"),
        ("etp", 1, "etp rank 1 of 2 is missing"),
        ("pp", 0, "pp rank 0 of 2 is missing"),
    ],
)
def test_a_process_that_is_missing(division: str, gone: int, missing: str, source: Path, tmp_path: Path) -> None:
    ranks = divide(source, "qwen3-moe/megatron", DIVISIONS[division], tmp_path / "ranks")
    shutil.rmtree(ranks / f"rank{gone}")
    with refused(CheckpointError, missing, f"rank{1 - gone} has ", "put its folder there"):
        moeglot.open(ranks)
    (ranks / f"rank{gone}.partial").mkdir()  # what a conversion leaves that was killed
    with refused(CheckpointError, f"rank{gone}.partial: no safetensors file is here"):
        moeglot.open(ranks)


def test_experts_that_no_folder_has(source: Path, tmp_path: Path) -> None:
    """Of tensor parallelism both are there; of expert parallelism only one half."""
    for rank in (0, 1):
        place = {"tp_rank": rank, "tp_size": 2, "etp_size": 1, "ep_rank": 0, "ep_size": 2}
        moeglot.convert(source, "qwen3-moe/megatron", tmp_path / "ranks" / str(rank), **place)
    with refused(CheckpointError, "ranks: ep rank 1 of 2 is missing", "tp rank 1 of 2, ep rank 0 of 2"):
        moeglot.open(tmp_path / "ranks")


def test_two_of_one_rank(ranks: Path) -> None:
    shutil.copytree(ranks / "rank0", ranks / "rank0 again")
    with refused(Contradiction, "has tp rank 0 of 2, ep rank 0 of 2 twice", "in rank0 and in rank0 again", "remove one"):
        moeglot.open(ranks)


def test_marks_of_two_divisions(ranks: Path, source: Path) -> None:
    moeglot.convert(source, "qwen3-moe/megatron", ranks / "rank2", ep_rank=1, ep_size=4)
    with refused(Contradiction, "folders of different models", ("moeglot.share says tp_size = 2 in", "and tp_size = 1 in", "rank2"), "for one division"):
        moeglot.open(ranks)


def test_folders_of_two_formats(ranks: Path, source: Path) -> None:
    shutil.rmtree(ranks / "rank1")
    moeglot.convert(source, "qwen3-moe/megatron-te", ranks / "rank1", tp_rank=1, tp_size=2, etp_size=1, ep_rank=1, ep_size=2)
    with refused(Contradiction, "folders of different models", ("moeglot.format says qwen3-moe/megatron in", "and qwen3-moe/megatron-te in")):
        moeglot.open(ranks)


def test_configs_that_differ(ranks: Path) -> None:
    config = json.loads((ranks / "rank1" / "config.json").read_text())
    (ranks / "rank1" / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    with refused(Contradiction, "folders of different models", ("config.json says rope_theta = None in", "and rope_theta = 5 in"), "of one model"):
        moeglot.open(ranks)


@pytest.mark.parametrize(
    ("edit", "wrong"),
    [
        (lambda found: found.pop("decoder.layers.1.self_attention.q_layernorm.weight"), "model.layers.1.self_attn.q_norm.weight is in one of"),
        (lambda found: found.update({ROUTER: found[ROUTER].float()}), "model.layers.1.mlp.gate.weight is not alike in all folders"),
        (
            lambda found: found.update({key: found[key].float() for key in found if ".1.mlp.experts" in key and "fc1" in key}),
            "layer 1: linear_fc1 is ",
        ),
    ],
)
@pytest.mark.parametrize("rank", ["rank0", "rank1"])
def test_tensors_that_are_not_alike(rank: str, edit: Callable[[Tensors], None], wrong: str, ranks: Path) -> None:
    change(ranks / rank, edit)
    with refused(Contradiction, wrong, (), "write them again"):
        moeglot.plan(ranks, "qwen3-moe/hub")


def test_folders_that_do_not_say_whose_they_are(ranks: Path, source: Path, tmp_path: Path) -> None:
    parent = tmp_path / "models"
    shutil.copytree(source, parent / "one")
    with refused(CheckpointError, "models: no safetensors file is here", ("1 folders", "moeglot.share"), ("pass one of its folders", "torch_dist")):
        moeglot.open(parent)
    shutil.copytree(source, ranks / "whole")
    with refused(CheckpointError, "ranks/whole: no header says which process", ("3 folders", "takes nothing from names")):
        moeglot.open(ranks)


def test_what_megatron_itself_wrote(tmp_path: Path) -> None:
    for rank in ("mp_rank_00_000", "mp_rank_00_001"):
        (tmp_path / "iter_0000001" / rank).mkdir(parents=True)
        torch.save({}, tmp_path / "iter_0000001" / rank / "model_optim_rng.pt")
    with refused(PickleRefused, "mp_rank_00_000: only pickle files are here", "runs the code in it", "--ckpt-format torch_dist"):
        moeglot.open(tmp_path / "iter_0000001")


def test_the_folder_of_one_is_no_whole_model(ranks: Path) -> None:
    with refused(UsageError, "has what tp rank 0 of 2, ep rank 0 of 2 holds alone", (), "the folder that holds the folders of all ranks"):
        moeglot.plan(ranks / "rank0", "qwen3-moe/hub")

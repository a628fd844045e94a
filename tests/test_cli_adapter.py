"""`moeglot adapter` as a user meets it: exit statuses, JSON, plain lines."""

import re
from pathlib import Path

import pytest
import torch
from adapters import WRITERS, Job
from commands import run, told
from synthetic import write_checkpoint

import moeglot
from moeglot.adapters.config import AdapterConfig
from moeglot.checkpoints.structure import runs
from moeglot.encodings.plain import Plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    write_checkpoint(folder / "base", "qwen3-moe/hub", {"e": 4, "h": 64, "i": 32}, dtype=torch.float32)
    for name, writer in (("peft", "PEFT"), ("tinker", "tinker")):
        WRITERS[writer][2](Job("qwen3-moe", 4, 64, 32, 3)).save(folder / name)
    return folder


def test_inspect(folder):
    found = told("adapter", "inspect", folder / "tinker", "--base", folder / "base")
    assert (found["schema"], found["convention"], found["numbers"]) == ("moeglot/adapter/1", "tinker", None)
    assert found["experts"]["adapted"] == 2 * 4 * 3
    assert found["experts"]["roles"][0] == {"role": "gate", "layers": [0, 1], "ranks": [3], "scale": "2"}
    plain = run("adapter", "inspect", folder / "peft", "--base", folder / "base", "--convention", "peft").stdout
    assert "because\t--convention peft" in plain
    assert "numbers\t" in plain
    assert "down\t3\t2" in plain
    assert "\n# layers\trole\trank\tscale\n" in plain


def test_an_open_convention_is_exit_2_and_says_what_to_type(folder):
    error = told("adapter", "inspect", folder / "peft", "--base", folder / "base", status=2)
    assert error["error"] == "AmbiguousConvention"
    assert "margin" in error["known"]
    assert "cannot tell" in error["known"], "random factors have no order"
    assert "--convention peft" in error["do"]
    assert told("adapter", "inspect", folder / "peft", "--base", folder / "base", "--convention", "peftt", status=2)["error"] == "UsageError"
    assert told("adapter", "inspect", folder / "peft", "--base", folder / "base", "--convention", "tinker", status=2)["error"] == "UsageError"
    assert told("adapter", "inspect", folder / "tinker", "--base", folder / "base", "--adapter", "other", status=2)["error"] == "AdapterError"


def test_convert(folder, tmp_path):
    done = told("adapter", "convert", folder / "peft", tmp_path / "vllm", "--base", folder / "base", "--convention", "peft", "--to", "vllm")
    assert (done["schema"], done["convention"], done["tensors"]) == ("moeglot/adapter-written/1", "per-expert", 2 * 4 * 3 * 2)
    assert done["notes"] == ["the right factor that gate and up shared is written twice"]
    assert moeglot.open_adapter(tmp_path / "vllm", folder / "base").convention.name == "per-expert"
    again = told("adapter", "convert", folder / "tinker", tmp_path / "vllm", "--base", folder / "base", "--to", "peft", status=2)
    assert again["error"] == "OutputExists"
    (tmp_path / "unsloth.partial").mkdir()  # where a merge to the same name keeps what it has done
    (tmp_path / "unsloth.partial" / "journal").touch()
    plain = run("adapter", "convert", tmp_path / "vllm", tmp_path / "unsloth", "--base", folder / "base", "--to", "unsloth").stdout
    assert "8 tensors, peft" in plain
    assert (tmp_path / "unsloth.partial" / "journal").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"vllm", "unsloth", "unsloth.partial"}
    assert told("adapter", "convert", folder / "tinker", tmp_path / "x", "--base", folder / "base", "--to", "nobody", status=2)["error"] == "UsageError"


def test_conventions():
    found = told("adapter", "conventions")
    assert {known["name"] for known in found["conventions"]} >= {"peft", "grouped", "tinker"}
    assert "transformers-5" in run("adapter", "conventions").stdout


def test_merge(folder, tmp_path):
    """The plan says how the convention is known, in the notation's own brackets; the report what survived; JSON, HTML and statuses as elsewhere."""
    given = ("merge", folder / "base", folder / "peft")
    plain = run(*given, tmp_path / "out", "--convention", "peft", "--html", tmp_path / "out.html").stdout
    assert "because --convention peft, and parameters lie [e, out, in] in qwen3-moe/transformers-5" in plain
    assert "what survived of" in plain
    assert plain.rstrip().endswith("holds")
    page = (tmp_path / "out.html").read_text()
    assert f"<h1>moeglot merge {folder / 'base'} {folder / 'peft'} {tmp_path / 'out'}: holds</h1><p>moeglot {moeglot.__version__}, 20" in page
    widths = [float(width) for width in re.findall(r'<polyline [^>]* stroke-width="([0-9.]+)"', page)]
    assert len(widths) == 3
    assert sorted({*widths}, reverse=True) == widths, "lines that lie on each other all show"
    done = told(*given, tmp_path / "again", "--convention", "peft", "--encode", "bf16", "--allow-loss")
    assert done["merge"]["survived"].keys() == {"gate", "up", "down"}
    assert all(one["rec"] > 0.9 for one in done["merge"]["survived"].values())
    assert done["merge"]["notes"] == done["merge"]["fell_back_to_nearest"] == []
    assert told(*given, tmp_path / "out", "--convention", "peft", status=2)["error"] == "OutputExists"
    assert told(*given, tmp_path / "none", status=2)["error"] == "AmbiguousConvention"


def test_convert_folds_an_adapter_in_as_merge_does(folder, tmp_path):
    """What its refusals tell the user to pass is there."""
    given = ("convert", folder / "base", tmp_path / "out", "--to", "qwen3-moe/hub+mxfp4-pack", "--allow-loss", "--adapter", folder / "peft")
    assert "--convention peft" in told(*given, status=2)["do"]
    lost = told(*given, "--convention", "peft", "--threshold", "1", status=2)
    assert (lost["error"], "--threshold" in lost["do"]) == ("LossRefused", True)
    assert told(*given, "--convention", "peft", "--threshold", "0")["merge"]["convention"] == "peft"
    done = ("--convention", "peft", "--threshold", "0", "--keep-touched", "bf16", "--html", tmp_path / "page.html")
    kept = told(*given[:2], tmp_path / "kept", *given[3:], *done)
    assert moeglot.open(tmp_path / "kept").experts(0)["down"].encoding == Plain("BF16")
    assert all(one["rec"] > 0.9 for one in kept["merge"]["survived"].values())
    assert "<polyline" in (tmp_path / "page.html").read_text()


def test_convert_in_python_is_merge(folder, tmp_path):
    """With the same options; where no format is named, in that of the source."""
    options = {"convention": "peft", "threshold": 0, "encode": "bf16", "allow_loss": True, "device": "cpu"}
    moeglot.merge(folder / "base", folder / "peft", tmp_path / "merged", **options)
    moeglot.convert(folder / "base", None, tmp_path / "converted", adapter=folder / "peft", **options)
    assert [path.read_bytes() for path in sorted((tmp_path / "converted").iterdir())] == [path.read_bytes() for path in sorted((tmp_path / "merged").iterdir())]
    with pytest.raises(moeglot.UsageError, match="nothing can be decoded on 'nowhere'"):
        moeglot.merge(folder / "base", folder / "peft", tmp_path / "none", convention="peft", device="nowhere")


def test_a_conversion_has_a_page(folder, tmp_path):
    run("convert", folder / "base", tmp_path / "out", "--to", "qwen3-moe/hub", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"<h1>moeglot convert {folder / 'base'} {tmp_path / 'out'}: holds</h1>" in page
    assert "relative error by layer" in page


class Counted(list):
    read = 0

    def __iter__(self):
        Counted.read += 1
        return super().__iter__()


def test_a_list_of_modules_is_read_once_whoever_asks():
    """It may name each expert, and each expert asks."""
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(4) for expert in range(8)]
    config = AdapterConfig({"target_modules": Counted(names), "exclude_modules": Counted([*names[:4], "lm_head"]), "target_parameters": Counted(["up_proj"])})
    assert [config.names_module(name) for name in names] == [False] * 4 + [True] * 28
    assert [config.names_parameter(name) for name in names] == [True] * 32
    assert not any(map(config.names_module, ("up_proj", "xmodel.layers.0.mlp.experts.5.up_proj", "a.lm_head", "lm_head")))
    assert config.names_module("base.model.layers.0.mlp.experts.5.up_proj")
    assert Counted.read < 10


@pytest.mark.parametrize(
    ("layers", "told"), [((3,), "3"), ((0, 1), "0 to 1"), ((1, 3, 5), "1, 3, 5"), ((*range(3, 61),), "3 to 60"), ((0, 1, *range(4, 61)), "0, 1, 4 to 60")]
)
def test_layers_are_told_in_few_words(layers, told):
    assert runs(layers) == told

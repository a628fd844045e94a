"""The command line as a user meets it: exit statuses, JSON schemas, plain lines in a pipe, tables and bars on a terminal, HTML."""

import json
from pathlib import Path

import pytest
from commands import RUN, run, told
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint
from terminal import shown

import moeglot
from moeglot.demo import BUNDLED
from moeglot.planning.units import estimate


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "bf16"
    run("convert", BUNDLED, out, "--to", "gpt-oss/transformers")
    return out


@pytest.fixture(scope="module")
def turned(bf16, tmp_path_factory) -> Path:
    from moeglot.demo import write_turned

    out = tmp_path_factory.mktemp("cli") / "turned"
    write_turned(bf16, out)
    return out


def test_inspect(tmp_path):
    found = told("inspect", BUNDLED)
    assert (found["schema"], found["format"]) == ("moeglot/inspect/1", "gpt-oss/openai")
    assert found["sizes"] | {"e": 8, "h": 192, "i": 192} == found["sizes"]
    assert found["bytes"]["experts"] + found["bytes"]["other"] == sum(t.nbytes for t in load_file(BUNDLED / "model.safetensors").values())
    plain = run("inspect", BUNDLED).stdout
    assert "e (i p) h\t8 × 384 × 192\tmxfp4" in plain
    assert "\x1b" not in plain
    run("inspect", BUNDLED, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "gpt-oss/openai" in page
    assert page.count("<svg") == 1
    assert page.count("<rect") == 4 * 4 + 2  # a piece for each of four stored tensors in four layers, and two encodings in the legend
    assert "layer 3, down: 156.7 kB in mxfp4" in page  # 8 × 192 × 192 / 32 × 17 bytes
    run("inspect", BUNDLED, "--deep", "--html", tmp_path / "deep.html")
    page = (tmp_path / "deep.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<circle") == 3 * 4  # of three layers, the declared reading and three that no shape refutes
    assert "if down_proj is read as" in page


def test_inspect_one_file():
    assert told("inspect", BUNDLED / "model.safetensors")["format"] == "gpt-oss/openai"


def test_formats():
    found = told("formats")
    assert found["schema"] == "moeglot/formats/1"
    assert {"gpt-oss/openai", "gpt-oss/original", "gpt-oss/transformers", "qwen3-moe/hub", "mixtral/transformers-5"} <= {f["name"] for f in found["formats"]}
    assert all(f["source"].startswith("https://") for f in found["formats"])


def test_what_a_plan_measures_is_told_before_it_is_done():
    """One of its own matrices takes seconds in a large model."""
    told = []
    plan = moeglot.plan(BUNDLED, "gpt-oss/transformers", encode="f16")
    assert estimate(plan, lambda *progress: told.append(progress)).estimated
    assert told == [("sampling", n, 6) for n in range(7)]


def test_convert_plans_first_and_writes_nothing_on_a_dry_run(tmp_path):
    found = told("convert", BUNDLED, tmp_path / "out", "--to", "gpt-oss/transformers", "--dry-run")
    assert found["schema"] == "moeglot/plan/1"
    assert not found["needs_allow_loss"]
    assert list(tmp_path.iterdir()) == []


def test_convert_certifies(bf16, tmp_path):
    found = told("convert", bf16, tmp_path / "out", "--to", "gpt-oss/openai", "--shard-size", "1MB", "--workers", "1")
    assert found["schema"] == "moeglot/certificate/1"
    assert found["verification"]["verdict"] == "holds"
    assert {check["level"] for check in found["verification"]["checks"]} == {"structure", "values", "forward"}
    assert json.loads((tmp_path / "out" / "moeglot.json").read_text()) == {k: v for k, v in found.items() if k != "out"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    import hashlib

    for name, digest in found["output"]["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (BUNDLED / name).read_bytes()


def test_loss_needs_a_word(tmp_path):
    source = write_checkpoint(tmp_path / "a", "gpt-oss/transformers")
    plan = told("convert", source, tmp_path / "out", "--to", "gpt-oss/openai", "--dry-run")
    assert plan["needs_allow_loss"]
    expected = max(step["expected_relative_error"] for step in plan["steps"])
    found = told("convert", source, tmp_path / "out", "--to", "gpt-oss/openai", status=2)
    assert (found["schema"], found["error"]) == ("moeglot/error/1", "LossRefused")
    assert "--allow-loss" in found["do"]
    assert not (tmp_path / "out").exists()
    done = told("convert", source, tmp_path / "out", "--to", "gpt-oss/openai", "--allow-loss")
    measured = next(step for verb, step in done["steps"].items() if "encode" in verb)
    assert measured["relative_error"] == pytest.approx(expected, rel=0.3)
    assert 0.05 < measured["relative_error"] < 0.3


@pytest.mark.parametrize(("encode", "loses"), [("float32", False), ("float16", True), ("bfloat16", False)])
def test_dense_casts_that_lose_bits_count(encode, loses, bf16, tmp_path):
    arguments = ("convert", bf16, tmp_path / "out", "--to", "gpt-oss/transformers", "--encode", encode)
    if loses and told(*arguments, "--dry-run")["needs_allow_loss"]:
        run(*arguments, status=2)
        arguments = (*arguments, "--allow-loss")
    found = told(*arguments)
    assert found["verification"]["verdict"] == "holds"
    dtypes = {str(t.dtype) for name, t in load_file(tmp_path / "out" / "model.safetensors").items() if name.endswith("_proj") and "experts" in name}
    assert dtypes == {f"torch.{encode}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == encode


def test_float32_to_bfloat16_is_a_loss(tmp_path):
    import torch

    source = write_checkpoint(tmp_path / "a", "mixtral/hub", dtype=torch.float32)
    found = told("convert", source, tmp_path / "out", "--to", "mixtral/hub", "--encode", "bfloat16", status=2)
    assert found["error"] == "LossRefused"
    done = told("convert", source, tmp_path / "out", "--to", "mixtral/hub", "--encode", "bfloat16", "--allow-loss")
    assert 1e-4 < next(iter(done["steps"].values()))["relative_error"] < 1e-2


def test_compare_and_verify(bf16, turned, tmp_path):
    assert told("compare", BUNDLED, bf16)["verdict"] == "holds"
    assert told("compare", BUNDLED, turned, status=1)["verdict"] == "does not hold"
    assert told("verify", bf16, "--against", BUNDLED)["exit_status"] == 0
    found = told("verify", turned, "--against", BUNDLED, "--html", tmp_path / "page.html", status=1)
    assert any('down_proj is read as "e h i"' in check["detail"] for check in found["checks"])
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert told("verify", bf16)["verdict"] == "holds"
    assert told("verify", BUNDLED, "--against", "transformers")["verdict"] == "holds"
    assert told("verify", turned, "--against", "transformers")["verdict"] == "holds"  # it is a right file of another model: only the source knows


def test_fingerprint(bf16, turned, tmp_path):
    found = told("fingerprint", BUNDLED, "-o", tmp_path / "print.json")
    assert found["experts"] == 32
    assert found["bytes"] < 10_000
    assert told("verify", bf16, "--against", tmp_path / "print.json")["verdict"] == "holds"
    assert told("verify", turned, "--against", tmp_path / "print.json", status=1)["verdict"] == "does not hold"
    run("fingerprint", BUNDLED, "-o", tmp_path / "print.json", status=2)
    run("fingerprint", BUNDLED, "-o", tmp_path / "print.txt", status=2)
    other = write_checkpoint(tmp_path / "other", "gpt-oss/transformers")
    refused = told("verify", other, "--against", tmp_path / "print.json", status=1)
    assert refused["error"] == "Contradiction"
    assert "another model" in refused["wrong"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", BUNDLED, "out", "--to", "gpt-oss/hub"), ["is not a format", "known: gpt-oss/openai", "moeglot formats"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/transfomers"), ["did you mean gpt-oss/transformers?"]),
        (("convert", BUNDLED, "out", "--to", "qwn3-moe/hub+fp8-blok"), ["did you mean qwen3-moe/hub+fp8-block?"]),
        (("convert", BUNDLED, "out", "--to", "qwen3-moe/hub+mxfp4"), ["variants of qwen3-moe/hub: fp8-block", "pass --to qwen3-moe/hub+mxfp4-pack"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/transformers+mxfp4"), ["variants of gpt-oss/transformers: none"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--encode", "mxfp4-pack"), ["is a variant of a format", "pass --to FORMAT+mxfp4-pack"]),
        (("convert", BUNDLED, "out", "--to", "mixtral/hub"), ["stores mixtral, this is gpt-oss", "--to one of: gpt-oss/openai"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/transformers", "--encode", "mxfp4"), ["cannot hold mxfp4", "--to gpt-oss/openai"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--encode", "bf16"), ["cannot hold bfloat16", "pass --to gpt-oss/transformers\n"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--encode", "fp5"), ["'fp5' is not an encoding", "known: ", "--encode"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--shard-size", "big"), ["is no size", "--shard-size 5GB"]),
        (("inspect", "no/such/place"), ["no such file or folder"]),
        (("verify", BUNDLED, "--against", "tests/synthetic.json"), ["not a fingerprint", "moeglot fingerprint"]),
    ],
)
def test_wrong_use(arguments, words, tmp_path):
    found = run(*[tmp_path / a if a == "out" else a for a in arguments], status=2)
    for word in words:
        assert word in found.stderr
    assert found.stderr.count("\n") == 3
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_tables_and_a_bar(tmp_path):
    """In a pseudo-terminal: colours, a bar with rate and time left; in a pipe (all other tests) none of them."""
    text = shown([*RUN, "convert", str(BUNDLED), str(tmp_path / "out"), "--to", "gpt-oss/transformers"], "xterm-256color", 140).decode()
    assert "\x1b[" in text
    assert "writing" in text
    assert "━" in text
    assert "holds" in text


def test_version_and_help():
    assert run("--version").stdout.startswith("moeglot ")
    shown = run("--help").stdout
    for verb in ("inspect", "formats", "convert", "compare", "verify", "fingerprint", "demo"):
        assert verb in shown


def test_a_file_that_was_changed_after_the_certificate(bf16, tmp_path):
    """The mark in the header is a declaration: files that contradict it are an error, not a fallback to guessing."""
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(bf16, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "moeglot.format": "gpt-oss/openai"})
    found = told("inspect", folder, status=1)
    assert found["error"] == "Contradiction"
    assert "the safetensors header says gpt-oss/openai" in found["wrong"]

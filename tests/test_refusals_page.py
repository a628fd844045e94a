"""docs/refusals.md: its messages are what real runs on small damaged folders print. `python tests/test_refusals_page.py` writes them there anew."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from adapters import WRITERS, Job
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.demo import BUNDLED, write_turned

PAGE = Path(__file__).parents[1] / "docs" / "refusals.md"
START = PAGE.with_name("index.md")
BLOCK = re.compile(r"```\n\$ moeglot (.+)\n((?:.*\n)*?)```\n")
EXPERTS = "model.layers.0.mlp.experts."
QWEN = {"e": 4, "h": 64, "i": 64}


@contextmanager
def changed(folder: str, file: str = "model.safetensors") -> Iterator[dict[str, torch.Tensor]]:
    tensors = load_file(Path(folder) / file)
    yield tensors
    save_file(tensors, Path(folder) / file, {"format": "pt"})


def config(folder: str, **changes: object) -> None:
    path = Path(folder) / "config.json"
    said = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def bundled(folder: str = "king-james") -> str:
    shutil.copytree(BUNDLED, folder)
    return folder


def qwen(folder: str) -> str:
    write_checkpoint(Path(folder), "qwen3-moe/hub", QWEN)
    return folder


def bf16(folder: str) -> str:
    write_checkpoint(Path(folder), "gpt-oss/transformers", {"e": 4, "h": 96, "i": 64})
    return folder


def other() -> None:
    config(qwen("other"), model_type="brand_new_moe")


def renamed() -> None:
    with changed(qwen("renamed")) as tensors:
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key.replace("_proj", "_matrix")] = tensors.pop(key)


def no_config() -> None:
    (Path(qwen("no-config")) / "config.json").unlink()


def saved(suffix: str) -> Callable[[], None]:
    """What `save_pretrained` of two releases makes of the experts."""

    def make() -> None:
        with changed(bf16("saved")) as tensors:
            for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
                value = tensors.pop(key)
                if suffix == "_blocks":
                    tensors[key + suffix] = value
                else:
                    tensors[key.rpartition(".")[2] + suffix] = value

    return make


def held() -> None:
    config(bundled("checkpoint-50"), quantization_config={"moeglot": "experts in memory, in gpt-oss/openai; `moeglot.save` writes a checkpoint"})


def two_sizes() -> None:
    config(bundled("two-sizes"), num_experts=16)


def no_size() -> None:
    config(bundled("no-size"), intermediate_size=None)


def transposed() -> None:
    with changed(bf16("transposed")) as tensors:
        tensors[EXPERTS + "down_proj"] = tensors[EXPERTS + "down_proj"].mT.contiguous()


def turned() -> None:
    """As step 4 of `moeglot demo` has it."""
    moeglot.convert(bundled(), "gpt-oss/transformers", "bf16")
    write_turned(Path("bf16"), Path("turned"))


def concat() -> None:
    moeglot.convert(bundled(), "gpt-oss/transformers", "concat")
    with changed("concat") as tensors:
        for key in [key for key in tensors if ".gate_up_proj" in key]:
            tensors[key] = tensors[key].unflatten(-1, (-1, 2)).mT.flatten(-2).contiguous()
    (Path("concat") / "moeglot.json").unlink()


def same() -> None:
    with changed(qwen("same")) as tensors:
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = tensors[re.sub(r"experts\.\d+", "experts.0", key)].clone()


def quant() -> None:
    config(qwen("quant"), quantization_config={"quant_method": "fp8"})


def different() -> None:
    bundled()
    write_checkpoint(Path("trained"), "gpt-oss/transformers", {"e": 4, "h": 64, "i": 64})


def fingerprint() -> None:
    different()
    moeglot.fingerprint(moeglot.open("king-james")).save("king-james.json")


def two_sources() -> None:
    """The experts of one are twice as large as the other's."""
    bundled("base")
    with changed(bundled("tuned")) as tensors:
        for key in [key for key in tensors if key.endswith("_scales")]:
            tensors[key] = tensors[key] + 1
    for rank, source in enumerate(("base", "tuned")):
        moeglot.convert(source, "gpt-oss/megatron-te", f"ranks/{source}", ep_rank=rank, ep_size=2)


def no_scales() -> None:
    with changed(bundled("no-scales")) as tensors:
        del tensors[EXPERTS + "down_proj_scales"]


def few() -> None:
    with changed(qwen("few")) as tensors:
        for key in [key for key in tensors if ".experts.3." in key]:
            del tensors[key]


def extra() -> None:
    with changed(qwen("extra")) as tensors:
        tensors[EXPERTS + "4.up_proj.weight"] = tensors[EXPERTS + "3.up_proj.weight"].clone()


def scales(folder: str, value: int) -> Callable[[], None]:
    def make() -> None:
        with changed(bundled(folder)) as tensors:
            tensors[EXPERTS + "down_proj_scales"][2] = value

    return make


def nan() -> None:
    with changed(qwen("nan")) as tensors:
        tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = float("nan")


def cut() -> None:
    os.truncate(Path(bundled("cut")) / "model.safetensors", 2_000_000)


def lfs() -> None:
    said = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 3522032\n"
    (Path(bundled("lfs")) / "model.safetensors").write_text(said)


def shards() -> None:
    write_checkpoint(Path("shards"), "qwen3-moe/hub", QWEN, shards=3)
    (Path("shards") / "model-00002-of-00003.safetensors").unlink()


def index(folder: str, name: str) -> Callable[[], None]:
    def make() -> None:
        write_checkpoint(Path(folder), "qwen3-moe/hub", QWEN, shards=2)
        path = Path(folder) / "model.safetensors.index.json"
        said = json.loads(path.read_text())
        said["weight_map"]["model.embed_tokens.weight"] = name
        path.write_text(json.dumps(said))

    return make


def link() -> None:
    (Path(bundled("link")) / "model.safetensors").unlink()
    (Path("link") / "model.safetensors").symlink_to("/etc/hostname")


def twice() -> None:
    (Path(bundled("twice")) / "model.safetensors").rename("twice/a.safetensors")
    shutil.copyfile("twice/a.safetensors", "twice/model-old.safetensors")


def pickled() -> None:
    (Path(bundled("pickled")) / "model.safetensors").rename("pickled/pytorch_model.bin")


def no_file() -> None:
    (Path(qwen("odd")) / "config.json").unlink()
    (Path("odd") / "config.json").mkdir()


def there(name: str) -> Callable[[], None]:
    def make() -> None:
        bundled()
        Path(name).mkdir()

    return make


def killed() -> None:
    """Before the last thing that it had to do, and then somebody wrote to one of its files."""
    moeglot.convert(bundled(), "gpt-oss/transformers", "killed")
    Path("killed.partial").mkdir()
    config("killed", note="mine")


def pruned() -> None:
    """An adapter of a base with 4 experts, and one that has 2 of them."""
    write_checkpoint(Path("pruned"), "qwen3-moe/hub", {**QWEN, "e": 2})
    WRITERS["PEFT"][2](Job("qwen3-moe", 4, 64, 64, 8)).save(Path("adapter"))


MAKERS: dict[tuple[str, int], Callable[[], object]] = {
    ("inspect other", 0): other,
    ("inspect renamed", 0): renamed,
    ("inspect no-config", 0): no_config,
    ("inspect saved", 0): saved("$"),
    ("inspect saved", 1): saved("_blocks"),
    ("inspect checkpoint-50", 0): held,
    ("inspect two-sizes", 0): two_sizes,
    ("inspect no-size", 0): no_size,
    ("inspect transposed", 0): transposed,
    ("inspect transposed --format gpt-oss/transformers", 0): transposed,
    ("inspect quant", 0): quant,
    ("compare king-james trained", 0): different,
    ("verify trained --against king-james.json", 0): fingerprint,
    ("inspect ranks", 0): two_sources,
    ("inspect turned --deep", 0): turned,
    ("verify turned --against king-james", 0): turned,
    ("verify concat --against king-james", 0): concat,
    ("verify same --against same", 0): same,
    ("inspect no-scales", 0): no_scales,
    ("inspect few", 0): few,
    ("inspect extra", 0): extra,
    ("adapter inspect adapter --base pruned --convention peft", 0): pruned,
    ("convert nan-scale out --to gpt-oss/transformers", 0): scales("nan-scale", 255),
    ("convert zero-scale out2 --to gpt-oss/transformers", 0): scales("zero-scale", 0),
    ("verify nan", 0): nan,
    ("inspect cut", 0): cut,
    ("inspect lfs", 0): lfs,
    ("inspect shards", 0): shards,
    ("inspect path", 0): index("path", "../other/model.safetensors"),
    ("inspect link", 0): link,
    ("inspect index", 0): index("index", "model-00002-of-00002.safetensors"),
    ("inspect twice", 0): twice,
    ("inspect pickled", 0): pickled,
    ("inspect odd", 0): no_file,
    ("inspect king-james --html king-james/config.json", 0): bundled,
    ("convert king-james bf16 --to gpt-oss/transformers", 0): there("bf16"),
    ("convert king-james half --to gpt-oss/transformers", 0): there("half.partial"),
    ("convert king-james killed --to gpt-oss/transformers --resume", 0): killed,
    **{
        (f"convert king-james out3 --to {rest}", 0): bundled
        for rest in (
            "gpt-oss/transfomers",
            "mixtral/hub",
            "gpt-oss/transformers --encode mxfp4",
            "gpt-oss/megatron-torch-dist --ep-rank 1 --ep-size 4",
            "gpt-oss/megatron-te --ep-rank 1 --ep-size 3",
            "gpt-oss/megatron-te --tp-rank 1 --tp-size 8 --etp-size 1",
            "gpt-oss/megatron-te --tp-rank 1 --tp-size 2",
            "gpt-oss/megatron-te --tp-rank 1 --tp-size 2 --etp-rank 1 --etp-size 2",
        )
    },
}
"""(command, which of its runs on the page) -> what makes the folders that it is about."""


def blocks(page: str) -> dict[tuple[str, int], re.Match[str]]:
    found: dict[tuple[str, int], re.Match[str]] = {}
    for block in BLOCK.finditer(page):
        found[block[1], sum(command == block[1] for command, _ in found)] = block
    return found


def printed(key: tuple[str, int]) -> str:
    """What the command prints, plans and progress aside."""
    from moeglot.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        MAKERS[key]()
        patch.setattr(sys, "argv", ["moeglot", *key[0].split()])
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit):
            main()
        told = err.getvalue().replace(os.getcwd() + "/", "")
    refusal = re.search(r"^[A-Z]\w+: .*\n  .*\n  .*\n", told, re.M)
    return refusal[0] if refusal else re.sub(r"^forward: not checked.*\n", "", out.getvalue(), flags=re.M)


SHOWN = [*((PAGE, key) for key in MAKERS), (START, ("verify turned --against king-james", 0))]
"""Each page with the runs that it shows."""


@pytest.mark.parametrize(("page", "key"), SHOWN, ids=lambda value: value[0] if isinstance(value, tuple) else value.stem)
def test_the_page_shows_what_a_run_prints(page, key):
    assert blocks(page.read_text())[key][2] == printed(key)


def write() -> None:
    for path, key in SHOWN:
        page = path.read_text()
        block = blocks(page)[key]
        path.write_text(page[: block.start(2)] + printed(key) + page[block.end(2) :])


if __name__ == "__main__":
    write()

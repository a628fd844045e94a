"""A source that somebody writes after it was opened: what one file's header says is not read from another."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from adapters import WRITERS, Job
from counting import upload
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.conversion.stream import Engine, threads
from moeglot.errors import BrokenFile
from moeglot.files.mapped import State
from moeglot.planning.merging import moments_key

TO = "qwen3-moe/transformers-5"
CHANGED = "not the file any more whose header was read"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", "qwen3-moe/hub", dtype=torch.float32)


@pytest.fixture
def url(source: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    upload(fs, source, "/replaced")
    yield "memory://replaced"
    fs.rm("/replaced", recursive=True)


def replace(file: Path) -> None:
    """Other numbers under a longer header, as one that trained on saves them."""
    found = {name: tensor + 1 for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(found, file, {"format": "pt", "more": "x" * 64})


def cut(file: Path) -> None:
    os.truncate(file, 5000)


@pytest.mark.parametrize("change", [replace, cut, Path.unlink])
@pytest.mark.parametrize(
    "use",
    [
        lambda found, of: moeglot.convert(found, TO, of.with_name("out")),
        lambda found, of: moeglot.verify(found),
        lambda found, of: moeglot.compare(found, found),
        lambda found, of: moeglot.fingerprint(found),
    ],
    ids=["convert", "verify", "compare", "fingerprint"],
)
def test_a_source_that_was_replaced_since_it_was_opened(use: Callable[..., Any], change: Callable[[Path], None], source: Path) -> None:
    found = moeglot.open(source)
    change(source / "model.safetensors")
    with pytest.raises(BrokenFile, match=CHANGED):
        use(found, source)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def after_the_first(change: Callable[[], Any]) -> Engine:
    """Threads of which somebody changes what they read."""

    def run(*arguments: Any) -> Iterator[Any]:
        for n, unit in enumerate(threads(1)(*arguments)):
            yield unit
            if n == 0:
                change()

    return run


def test_a_source_that_is_replaced_while_it_is_read(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match=CHANGED):
        moeglot.convert(source, TO, tmp_path / "out", engine=after_the_first(lambda: replace(source / "model.safetensors")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("check", [moeglot.verify, moeglot.compare])
def test_a_source_that_is_replaced_once_all_of_it_is_compared(check: Callable[..., Any], source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def last(*both: Any) -> Any:
        replace(source / "model.safetensors")
        return settings(*both)

    settings = sys.modules["moeglot.verification.verify"].settings
    monkeypatch.setattr(sys.modules["moeglot.verification.verify"], "settings", last)
    with pytest.raises(BrokenFile, match=CHANGED):
        check(source, source)


def test_a_config_that_is_written_while_the_rest_is_read(source: Path, tmp_path: Path) -> None:
    """Else its digest would be stated as the source's."""
    config = source / "config.json"
    with pytest.raises(BrokenFile, match=r"config\.json: not what it was"):
        moeglot.convert(source, TO, tmp_path / "out", engine=after_the_first(lambda: config.write_text(config.read_text().replace("{", '{"more": 1,', 1))))


@pytest.mark.parametrize(
    "use", [lambda found, out: moeglot.convert(found, TO, out), lambda found, _: moeglot.fingerprint(found)], ids=["convert", "fingerprint"]
)
def test_a_store_whose_file_was_replaced(use: Callable[..., Any], url: str, source: Path, tmp_path: Path) -> None:
    """Its requests are for ranges, and any file has some of them."""
    found = moeglot.open(url)
    replace(source / "model.safetensors")
    upload(fsspec.filesystem("memory"), source, "/replaced")
    with pytest.raises(BrokenFile, match=CHANGED):
        use(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert moeglot.compare(url, source).verdict == "holds", "opened again, it is the new one"


def test_a_torch_dist_folder_of_which_a_file_was_replaced(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "hub", "qwen3-moe/hub")
    moeglot.convert(made, "qwen3-moe/megatron-torch-dist", tmp_path / "dist")
    found = moeglot.open(tmp_path / "dist")
    file = next((tmp_path / "dist").glob("*.distcp"))
    shutil.copy(file, tmp_path / "copy")
    os.replace(tmp_path / "copy", file)
    with pytest.raises(BrokenFile, match=CHANGED):
        moeglot.convert(found, "qwen3-moe/hub", tmp_path / "out")


def test_a_source_that_is_replaced_while_it_is_hashed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeglot.verification import certificate

    def meanwhile(*files: Any) -> Any:
        replace(source / "model.safetensors")
        return digests(*files)

    digests = certificate.digests
    monkeypatch.setattr(certificate, "digests", meanwhile)
    with pytest.raises(BrokenFile, match=CHANGED):
        moeglot.convert(source, TO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["adapter", "moments"])
def test_an_adapter_or_moments_that_were_replaced(what: str, source: Path, tmp_path: Path) -> None:
    base, rounding = moeglot.open(source), "nearest"
    files = WRITERS["PEFT"][2](Job("qwen3-moe", 4, 64, 64, 3, seed=1)).save(tmp_path / "adapter")
    file = files / "adapter_model.safetensors"
    if what == "moments":
        file, rounding = tmp_path / "moments.safetensors", f"gptq:{tmp_path / 'moments.safetensors'}"
        wide = {moments_key(layer, n, role): torch.eye(64) for layer in base.layers for n in range(4) for role in ("gate", "up", "down")}
        save_file(wide, file)
    plan = moeglot.plan(base, adapter=moeglot.open_adapter(files, base, convention="peft"), round=rounding)
    assert plan.digest
    assert plan.change
    _ = plan.change.unmeasured  # what measures the moments opens them
    plan.check_unchanged()
    replace(file)
    with pytest.raises(BrokenFile, match=CHANGED):
        plan.check_unchanged()
    from moeglot.conversion.convert import carry_out

    with pytest.raises(BrokenFile, match=CHANGED):
        carry_out(plan, tmp_path / "out")


def test_another_machine_may_number_files_otherwise(tmp_path: Path) -> None:
    """A task of a cluster is told the state as this machine saw it; size and time still tell."""
    (tmp_path / "file").write_text("text")
    here = State.of(tmp_path / "file")
    there: State = pickle.loads(pickle.dumps(here))
    there.check(tmp_path / "file", here._replace(inode=here.inode + 1))
    with pytest.raises(BrokenFile, match=CHANGED):
        here.check(tmp_path / "file", here._replace(inode=here.inode + 1))
    with pytest.raises(BrokenFile, match=CHANGED):
        there.check(tmp_path / "file", here._replace(changed=here.changed + 1))

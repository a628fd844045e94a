"""Expert parallelism: two processes that hold half of the experts each compute what one with all of them does, by transformers' own strategies.

The judge is the stock model of one process, with weights decoded by `moeglot.load`, which test_native.py compares with the producers' rules.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.demo import BUNDLED
from moeglot.errors import BadNumbers, NotVerified, UsageError
from moeglot.integrations import transformers_load, transformers_parallel
from moeglot.integrations.transformers import VERSION
from moeglot.integrations.transformers_state import expert_names

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LIMIT, POWER = 1e-5, 1e-3
TOKENS = [[1, 5, 9, 2, 17, 30, 11, 4], [3, 8, 21, 6, 19, 2, 7, 13]]
SIZES = {"e": 4, "h": 64, "i": 64}
MODELS = {
    "gpt-oss bf16": ("gpt-oss/transformers", {}),
    "gpt-oss mxfp4": ("gpt-oss/openai", {}),
    "qwen3-moe bf16": ("qwen3-moe/hub", {}),
    "qwen3-moe fp8": ("qwen3-moe/hub", {"encode": "fp8-block"}),
}
WORKS = pytest.mark.skipif(VERSION < (5, 23), reason="this release divides no experts, or wrongly; see below")


def checkpoint(folder: Path, name: str, sizes: dict[str, int] = SIZES) -> Path:
    return write_checkpoint(folder / name.replace(" ", "-"), MODELS[name][0], sizes, layers=2)


def divided(out: Path, paths: list[Path], more: dict[str, Any] | None = None, **options: Any) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """(logits, what was told) of each of two processes."""
    out.mkdir()
    job = {"paths": [str(path) for path in paths], "out": str(out), "options": options, "tokens": TOKENS, "warm": str(BUNDLED), **(more or {})}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).with_name("dividing.py"))]
    ran = subprocess.run([*command, json.dumps(job)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [torch.load(out / f"logits-{n}.pt") for n in range(2)], [json.loads((out / f"told-{n}.json").read_text()) for n in range(2)]


def alone(path: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = moeglot.load(path, dtype="float32", **options)(input_ids=torch.tensor(TOKENS)).logits
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@WORKS
@pytest.mark.parametrize(("name", "native"), [(name, native) for name, (_, options) in MODELS.items() for native in (True, False) if native or not options])
def test_two_processes_compute_what_one_does(name: str, native: bool, tmp_path: Path) -> None:
    """And one that has the other's experts does not."""
    path, options = checkpoint(tmp_path, name), MODELS[name][1] if native else {}
    whole = alone(path, **({"native": True, **options} if options else {}))
    logits, told = divided(tmp_path / "two", [path], dtype="float32", native=native, **options)
    for found, said in zip(logits, told, strict=True):
        print(f"{name}, {'native' if native else 'stock'}: {apart(found, whole):.2g} of {float(whole.abs().max()):.2g}")
        assert apart(found, whole) <= LIMIT
        assert set(said["held"].values()) == {SIZES["e"] // 2}
        assert said["refused"] is None
    wrong, _ = divided(tmp_path / "wrong", [rolled(path, tmp_path / "rolled")], dtype="float32", native=native, **options)
    assert apart(wrong[0], whole) > POWER


def rolled(path: Path, to: Path) -> Path:
    """The same checkpoint, its experts in another order: what a process computes that takes the wrong half."""
    shutil.copytree(path, to)
    tensors = load_file(to / "model.safetensors")
    stacked = {key: tensor.roll(2, 0) for key, tensor in tensors.items() if ".experts." in key and tensor.shape[0] == SIZES["e"] and tensor.ndim > 1}
    each = {key: tensors[_other(key)] for key in tensors if ".experts." in key and key not in stacked}
    save_file({**tensors, **(stacked or each)}, to / "model.safetensors", {"format": "pt"})
    return to


def _other(key: str) -> str:
    before, _, after = key.partition(".experts.")
    number, _, rest = after.partition(".")
    return f"{before}.experts.{(int(number) + 2) % SIZES['e']}.{rest}"


@WORKS
@pytest.mark.parametrize("native", [True, False], ids=["native", "stock"])
@pytest.mark.parametrize("name", ["gpt-oss mxfp4", "qwen3-moe bf16"])
def test_a_process_reads_its_own_experts_alone(name: str, native: bool, tmp_path: Path) -> None:
    """The other half is NaN in the file of each process, which whoever reads it refuses."""
    path = checkpoint(tmp_path, name)
    halves = [spoiled(path, tmp_path / f"for-{rank}", range(2 - 2 * rank, 4 - 2 * rank)) for rank in range(2)]
    logits, _ = divided(tmp_path / "two", halves, dtype="float32", native=native)
    assert apart(logits[0], alone(path)) <= LIMIT
    for half in halves:
        with pytest.raises(BadNumbers):
            moeglot.load(half, dtype="float32", native=native)


def spoiled(path: Path, to: Path, experts: range) -> Path:
    """A copy in which every byte of these experts is 255: NaN as a float, and as a scale of MXFP4."""
    shutil.copytree(path, to)
    tensors = load_file(to / "model.safetensors")
    for key, tensor in tensors.items():
        here = key.partition(".experts.")[2].split(".")[0]
        if here.isdecimal():
            if int(here) in experts:
                tensor.view(torch.uint8).fill_(255)
        elif here:
            tensor[experts.start : experts.stop].view(torch.uint8).fill_(255)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@WORKS
@pytest.mark.parametrize("native", [True, False], ids=["native", "stock"])
def test_a_process_needs_memory_for_half_of_the_experts(native: bool, tmp_path: Path) -> None:
    """Nearly all of this model is experts: 75 MB of them in bfloat16 in each of two layers."""
    sizes = {"e": 16, "h": 768, "i": 1024}
    path = write_checkpoint(tmp_path / "large", "qwen3-moe/hub", sizes, layers=2)
    experts = 2 * sizes["e"] * 3 * sizes["h"] * sizes["i"] * 2
    _, told = divided(tmp_path / "two", [path], native=native)
    code = f"""
import json, sys
sys.path[:0] = {json.dumps([str(Path(__file__).parent)])}
from dividing import Peak, moeglot
moeglot.load({str(BUNDLED)!r}, native=True)
with Peak() as peak:
    model = moeglot.load({str(path)!r}, native={native})
print(peak.most)
"""
    one = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    shares = [said["peak"] / experts for said in told]
    print(f"{'native' if native else 'stock'}: {shares[0]:.2f} and {shares[1]:.2f} of the experts, one process {one / experts:.2f}")
    assert all(0.4 < said["peak"] / one < 0.6 for said in told)
    assert one / experts > 0.95


@WORKS
@pytest.mark.parametrize("name", ["gpt-oss mxfp4", "qwen3-moe bf16"])
def test_gradients_go_to_all_processes_tokens(name: str, tmp_path: Path) -> None:
    """In training, tokens travel; the gradient of the embeddings is that of the whole model."""
    path = checkpoint(tmp_path, name)
    divided(tmp_path / "two", [path], {"grad": True}, dtype="float32", native=True)
    model = moeglot.load(path, dtype="float32", native=True)
    model.get_input_embeddings().weight.requires_grad_(True)
    model(input_ids=torch.tensor(TOKENS)).logits.square().mean().backward()
    whole = model.get_input_embeddings().weight.grad
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"grad-{rank}.pt")
        assert float((found - whole).norm() / whole.norm()) <= LIMIT


@WORKS
@pytest.mark.parametrize("native", [True, False], ids=["native", "stock"])
def test_a_divided_model_is_not_saved(native: bool, tmp_path: Path) -> None:
    """One process has half of it."""
    _, told = divided(tmp_path / "two", [checkpoint(tmp_path, "gpt-oss bf16")], {"save": "gpt-oss/transformers"}, native=native)
    assert all("divided among processes" in said["saved"] for said in told)
    assert not list((tmp_path / "two").glob("saved-*"))


# --- what is refused -------------------------------------------------------------------------------------------------------------------


def test_releases_that_are_wrong_are_refused(tmp_path: Path) -> None:
    """4.57 divides nothing and does not say so; 5.5 computes something else."""
    path = checkpoint(tmp_path, "gpt-oss bf16")
    known = (
        "every process holds all experts" if VERSION < (5, 0) else "computes something else" if VERSION < (5, 23) else "torch.distributed is not initialized"
    )
    with pytest.raises(UsageError) as refused:
        moeglot.load(path, native=VERSION >= (5, 0), ep_size=2)
    assert known in refused.value.known


@pytest.mark.skipif(VERSION >= (5, 23), reason="this release is right")
def test_what_this_release_does_itself(tmp_path: Path) -> None:
    """Why it is refused: asked for expert parallelism, it leaves all experts on each process; the guard sees that, and nobody else says so."""
    path = checkpoint(tmp_path, "gpt-oss bf16")
    logits, told = divided(tmp_path / "two", [path], {"library": True})
    print(f"transformers {transformers.__version__}: off by {apart(logits[0], alone(path)):.2g}; {told[0]['refused']}")
    assert all("holds 4 of 4 experts" in said["refused"] for said in told)
    if VERSION >= (5, 0):
        assert apart(logits[0], alone(path)) > 0.1, "and what it computes is wrong"


def test_a_model_that_is_not_divided_is_found_out(tmp_path: Path) -> None:
    """Whatever the library was asked for: the guard looks at what memory holds. A native module and a stock one."""
    path = checkpoint(tmp_path, "gpt-oss bf16")
    opened = moeglot.open(path)
    for native in (False, True):
        model = moeglot.load(path, native=native)
        shapes = {name: tuple(tensor.shape) for name, tensor in moeglot.load(path).state_dict().items()}
        names = expert_names(transformers_load.layout(opened, shapes, transformers_load._dtype(opened, None)))
        transformers_parallel.require_divided(model, names, 1)
        with pytest.raises(NotVerified, match="holds 4 of 4 experts"):
            transformers_parallel.require_divided(model, names, 2)


@WORKS
def test_processes_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "qwen3-moe bf16")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for options, wrong in (({"ep_size": 2}, "ep_size=2"), ({"ep_size": 1, "ep_rank": 1}, "ep_rank=1")):
            with pytest.raises(UsageError, match=wrong):
                moeglot.load(path, native=True, **options)
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(UsageError, match="without ep_size"):
        moeglot.load(path, native=True, ep_rank=0)


@pytest.mark.parametrize("size", [3, 8])
def test_experts_that_cannot_be_divided_evenly_are_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"4 experts on {size} processes"):
        transformers_parallel.Share(0, size).experts(4)

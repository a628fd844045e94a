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


def job(out: Path, paths: list[Path], more: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """What two processes are to do, one path for both or one for each; `out` gets what they found."""
    out.mkdir()
    return {"paths": [str(path) for path in paths], "out": str(out), "options": options, "tokens": TOKENS, "warm": str(BUNDLED), **(more or {})}


def divided(*jobs: dict[str, Any]) -> list[tuple[list[torch.Tensor], list[dict[str, Any]]]]:
    """(logits, what was told) of each of two processes, for each job; they start once, since a start is most of the time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).with_name("dividing.py"))]
    ran = subprocess.run([*command, json.dumps(jobs)], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [(both(Path(one["out"]), "logits"), [json.loads((Path(one["out"]) / f"told-{n}.json").read_text()) for n in range(2)]) for one in jobs]


def both(out: Path, name: str) -> list[torch.Tensor]:
    return [torch.load(out / f"{name}-{n}.pt") for n in range(2)]


def alone(path: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = moeglot.load(path, dtype="float32", **options)(input_ids=torch.tensor(TOKENS)).logits
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@WORKS
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """And two of which each has the other's experts do not."""
    cells = [(name, native) for name, (_, options) in MODELS.items() for native in (True, False) if native or not options]
    wholes, jobs = [], []
    for n, (name, native) in enumerate(cells):
        (folder := tmp_path / str(n)).mkdir()
        path, options = checkpoint(folder, name), MODELS[name][1] if native else {}
        wholes.append(alone(path, **({"native": True, **options} if options else {})))
        for out, of in (("two", path), ("wrong", rolled(path, folder / "rolled"))):
            jobs.append(job(folder / out, [of], dtype="float32", native=native, **options))
    found = divided(*jobs)
    for (name, native), whole, (logits, told), (wrong, _) in zip(cells, wholes, found[::2], found[1::2], strict=True):
        cell = f"{name}, {'native' if native else 'stock'}"
        print(f"{cell}: {max(apart(one, whole) for one in logits):.2g}, the others' {apart(wrong[0], whole):.2g}, of {float(whole.abs().max()):.2g}")
        assert all(apart(one, whole) <= LIMIT for one in logits), cell
        assert all(set(said["held"].values()) == {SIZES["e"] // 2} and said["refused"] is None for said in told), cell
        assert apart(wrong[0], whole) > POWER, cell


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
def test_a_process_reads_its_own_experts_alone(tmp_path: Path) -> None:
    """The other half is NaN in the file of each process, which whoever reads it refuses."""
    wholes, halves, jobs = [], [], []
    for name in ("gpt-oss mxfp4", "qwen3-moe bf16"):
        path = checkpoint(tmp_path, name)
        halves.append([spoiled(path, tmp_path / f"{path.name}-for-{rank}", range(2 - 2 * rank, 4 - 2 * rank)) for rank in range(2)])
        for native in (True, False):
            wholes.append(alone(path))
            jobs.append(job(tmp_path / f"{path.name}-{native}", halves[-1], dtype="float32", native=native))
    for whole, one, (logits, _) in zip(wholes, jobs, divided(*jobs), strict=True):
        assert apart(logits[0], whole) <= LIMIT, one["out"]
    for half in [half for both in halves for half in both]:
        for native in (True, False):
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
    """Nearly all of this model is experts: 151 MB of them in bfloat16, in 8 layers. While stock modules load, transformers has some tensors twice: how many
    depends on its threads.
    """
    sizes = {"e": 16, "h": 384, "i": 512}
    path = write_checkpoint(tmp_path / "large", "qwen3-moe/hub", sizes, layers=8)
    experts = 8 * sizes["e"] * 3 * sizes["h"] * sizes["i"] * 2
    ((_, told),) = divided(job(tmp_path / "two", [path], native=native))
    code = f"""
import json, sys
sys.path[:0] = {json.dumps([str(Path(__file__).parent)])}
from dividing import Peak, moeglot
moeglot.load({str(BUNDLED)!r}, native=True)
with Peak() as peak:
    model = moeglot.load({str(path)!r}, native={native})
print(json.dumps([peak.most, peak.kept]))
"""
    most, kept = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    shares = [(said["kept"] / experts, said["peak"] / experts) for said in told]
    print(f"kept, peak, of the experts: {shares} by two processes, {(kept / experts, most / experts)} by one")
    assert kept / experts > 0.95
    assert all(0.4 < said["kept"] / kept < 0.6 for said in told)
    assert all(said["peak"] / most < 0.75 for said in told)


@WORKS
def test_gradients_go_to_all_processes_tokens_and_no_process_saves(tmp_path: Path) -> None:
    """In training, tokens travel; the gradient of the embeddings is that of the whole model. And one process, which has half of it, saves no model."""
    paths = [checkpoint(tmp_path, name) for name in ("gpt-oss mxfp4", "qwen3-moe bf16")]
    training = [job(tmp_path / f"grad-{n}", [path], {"grad": True}, dtype="float32", native=True) for n, path in enumerate(paths)]
    plain = checkpoint(tmp_path, "gpt-oss bf16")
    saving = [job(tmp_path / f"save-{native}", [plain], {"save": "gpt-oss/transformers"}, native=native) for native in (True, False)]
    found = divided(*training, *saving)
    for path, one in zip(paths, training, strict=True):
        model = moeglot.load(path, dtype="float32", native=True)
        model.get_input_embeddings().weight.requires_grad_(True)
        model(input_ids=torch.tensor(TOKENS)).logits.square().mean().backward()
        whole = model.get_input_embeddings().weight.grad
        assert all(float((grad - whole).norm() / whole.norm()) <= LIMIT for grad in both(Path(one["out"]), "grad")), path.name
    for one, (_, told) in zip(saving, found[2:], strict=True):
        assert all("divided among processes" in said["saved"] for said in told)
        assert not list(Path(one["out"]).glob("saved-*"))


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
    ((logits, told),) = divided(job(tmp_path / "two", [path], {"library": True}))
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
        transformers_parallel.Rank(0, size).of(4)

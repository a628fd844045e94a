"""benchmarks/gpu.py loses nothing to a case that raises, dies, hangs or has no time left; here, its cases are stubs, or small ones in Triton's interpreter."""

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (make matrix-triton)")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DOES = {
    "gives": "",
    "raises": "raise RuntimeError('CUDA error: an illegal memory access was encountered')",
    "dies": "import os; os.abort()",
    "hangs": "import time; time.sleep(60)",
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpu_cases", "gpu_layers"):
        sys.modules.pop(name, None)


@pytest.fixture
def figure(gpu):
    pytest.importorskip("triton", reason="triton is not installed (make matrix-triton)")
    return importlib.import_module("gpu_cases").Figure


def command(name: str, part: Path) -> list[str]:
    """A process that writes one figure and then does what its name says."""
    text = json.dumps({"device": "a GPU", "triton": "3", "figures": [{"case": name, "name": "first"}]})
    return [sys.executable, "-c", f"open({str(part)!r}, 'w').write({text!r}); {DOES[name] or 'pass'}"]


def test_a_case_that_fails_is_a_row(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "A_CASE", 2.0)
    path, seen = tmp_path / "results" / "gpu.json", []

    def watched(name, part):
        seen.append(path.exists() and len(json.loads(path.read_text())["figures"]))
        return command(name, part)

    found = gpu.every([*DOES, "gives"], watched, path)
    assert seen == [False, 1, 3, 5, 7]  # written anew after each
    assert json.loads(path.read_text()) == found
    assert (found["device"], found["triton"]) == ("a GPU", "3")
    assert [row["case"] for row in found["figures"]] == ["gives", "raises", "raises", "dies", "dies", "hangs", "hangs", "gives"]
    errors = [row["failed"] for row in found["figures"] if "failed" in row]
    assert "illegal memory access" in errors[0]
    assert "-6" in errors[1]
    assert "longer than 2 s" in errors[2]
    assert not [*path.parent.glob("*.partial")]


def test_the_table_says_what_failed(gpu, figure, capsys):
    one = figure("one token", "floor", 12.5, 1.25, None, 1e-3, 1e-3)
    rows = [{"case": "few", **asdict(one), "holds": one.holds}, {"case": "many", "failed": "no memory"}]
    gpu.show(gpu.Console(width=200), {"figures": rows, "device": "H", "torch": "2", "triton": "3.6"})
    told = capsys.readouterr().out
    assert all(word in told for word in ("one token", "12.5", "1.25", "holds", "no memory", "failed", "triton 3.6"))


def test_what_no_time_is_left_for_is_a_row(gpu, tmp_path):
    found = gpu.every(DOES, command, tmp_path / "gpu.json", 0.0)
    assert [row["failed"] for row in found["figures"]] == ["no time was left for it"] * len(DOES)


def test_an_error_keeps_the_figures_before_it(gpu, figure, tmp_path):
    def figures():
        yield figure("what", "against", 1.0, 1.0, 1.5, 1e-3, 1e-3)
        raise ValueError("a wrong one\nwith more to say")

    gpu.one("case", figures(), tmp_path / "gpu.json", {"device": "a GPU"})
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "a GPU"
    assert [row.get("failed") for row in found["figures"]] == [None, "ValueError: a wrong one"]
    assert found["figures"][0]["holds"]
    assert not figure("what", "against", 1.0, 1.6, 1.5, 1e-3, 1e-3).holds
    assert not figure("what", "against", 1.0, 1.0, 1.5, 3e-3, 1e-3).holds


def test_a_layer_lies_where_it_is_measured(gpu, figure, monkeypatch):
    """On a device that this machine has; its generator is the CPU's, since that device has none."""
    usual = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda _: usual("cpu"))
    for shape in SMALL.values():
        module = importlib.import_module("gpu_layers").layer(*shape, "meta")
        assert {buffer.device.type for buffer in module.buffers()} == {"meta"}


# --- cases -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cases(gpu, monkeypatch):
    """The cases at small sizes in Triton's interpreter, in float32; each work runs once, and no time is taken."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter of Triton's kernels needs TRITON_INTERPRET=1 before Python starts (make matrix-triton)")
    found = importlib.import_module("gpu_cases")

    def timed(contestants, rounds):
        return {name: float(work() is None) + 1.0 for name, work in contestants.items()}

    replaced = {"captured": lambda work: work, "copying": lambda nbytes: lambda: nbytes, "timed": timed, "in_kernels": lambda work: 1.0}
    for name, value in {"DEVICE": "cpu", "DTYPE": torch.float32, "ROWS": (2, 3), "TOKENS": 9, "fitting": lambda shape: shape, **replaced}.items():
        monkeypatch.setattr(found, name, value)
    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 30)
    return found


SMALL = {"mxfp4": ("gpt-oss/openai", {"e": 3, "h": 64, "i": 32, "k": 2}), "fp8": ("qwen3-moe/hub+fp8-block", {"e": 3, "h": 64, "i": 32, "k": 2})}


@pytest.mark.parametrize(("case", "shape"), [("decoding", "fp8"), ("few", "mxfp4"), ("many", "fp8"), ("crossover", "mxfp4"), ("training", "mxfp4")])
def test_both_sides_compute_the_same(case, shape, cases):
    figures = list(getattr(cases, case)(SMALL[shape], 1))
    assert figures
    assert all(max(figure.error, figure.usual) <= 1e-5 for figure in figures), figures


def test_a_wrong_kernel_does_not_hold_however_fast_it_is(cases, monkeypatch):
    assert next(cases.few(SMALL["mxfp4"], 1)).holds
    right = cases.coded.product
    monkeypatch.setattr(cases.coded, "product", lambda *given, **options: right(*given, **options) * 1.01)
    assert not next(cases.few(SMALL["mxfp4"], 1)).holds

"""benchmarks/gpu.py loses nothing to a case that raises, dies, hangs or has no time left; its cases are stubs here, on a CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
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
    errors = [row["error"] for row in found["figures"] if "error" in row]
    assert "illegal memory access" in errors[0]
    assert "-6" in errors[1]
    assert "longer than 2 s" in errors[2]
    assert not [*path.parent.glob("*.partial")]


def test_what_no_time_is_left_for_is_a_row(gpu, tmp_path):
    found = gpu.every(DOES, command, tmp_path / "gpu.json", 0.0)
    assert [row["error"] for row in found["figures"]] == ["no time was left for it"] * len(DOES)


def test_an_error_keeps_the_figures_before_it(gpu, tmp_path):
    def figures():
        yield gpu.Figure("what", "against", 1.0, 1.0, 1.5)
        raise ValueError("a wrong one\nwith more to say")

    gpu.one("case", figures(), tmp_path / "gpu.json", {"device": "a GPU"})
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "a GPU"
    assert [row.get("error") for row in found["figures"]] == [None, "ValueError: a wrong one"]
    assert found["figures"][0]["holds"]

"""Models are the same whatever torch's default dtype is; transformers sets it for all threads while it builds one, and they may load meanwhile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import default_steps
import pytest
import torch
import transformers
from defaults import under

import moeglot
from moeglot.errors import NotVerified


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("default")
    default_steps.prepare(found)
    return found


def test_a_default_changes_no_model(folder):
    """Weights, logits and what is saved; what a release refuses, it refuses."""
    expected, *others = ((one, under(folder, one, "models")) for one in ("float32", "bfloat16", "float64"))
    assert not all("Error" in bits for bits in expected[1]["during"].values())
    for when, steps in expected[1].items():
        wrong = {f"{default}: {name}": found[when][name] for default, found in others for name, bits in steps.items() if found[when][name] != bits}
        assert not wrong, f"{when}: {len(wrong)} of {len(steps)}: {wrong}"


def test_threads_load_in_dtypes_of_their_own(folder):
    before, jobs = torch.get_default_dtype(), [("bfloat16", "fp8-block"), ("float32", "nvfp4-pack"), ("bfloat16", "mxfp4-pack"), ("float32", "nf4")]
    expected = {job: moeglot.load(folder / job[1], dtype=job[0]).state_dict() for job in jobs}
    with ThreadPoolExecutor(4) as pool:
        for job, model in pool.map(lambda job: (job, moeglot.load(folder / job[1], dtype=job[0])), jobs * 6):
            found = model.state_dict()
            assert [name for name, tensor in expected[job].items() if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)] == []
    assert torch.get_default_dtype() == before


def test_a_model_in_another_dtype_is_refused(folder, monkeypatch):
    """What a program does to the library that builds models in two threads: the default changes after it was set."""
    build = transformers.Qwen3MoeForCausalLM.__init__

    def late(self, *args, **kwargs):
        torch.set_default_dtype(torch.bfloat16)
        build(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "__init__", late)
    try:
        with pytest.raises(NotVerified, match=r"parameters in another dtype than float32, first \S+ in torch\.bfloat16"):
            moeglot.load(folder / "nf4", dtype="float32")
    finally:
        torch.set_default_dtype(torch.float32)

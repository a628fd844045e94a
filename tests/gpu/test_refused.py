"""What needs a GPU or Triton and has none is refused in three lines, before anything is touched."""

import os
from types import SimpleNamespace

import pytest
import torch
from synthetic import write_checkpoint
from typer.testing import CliRunner

import moeglot
from moeglot.cli.main import app
from moeglot.errors import UsageError
from moeglot.kernels.backend import has_triton
from moeglot.nn import Experts
from moeglot.nn.backends import choose

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, so nothing is refused")


def three_lines(error: UsageError) -> list[str]:
    lines = str(error).splitlines()
    assert len(lines) == 3
    return lines


@no_gpu
def test_a_conversion_on_a_gpu_that_is_not_there(tmp_path):
    write_checkpoint(tmp_path / "base", "gpt-oss/openai")
    with pytest.raises(UsageError) as refused:
        moeglot.convert(tmp_path / "base", "gpt-oss/transformers", tmp_path / "out", device="cuda")
    wrong, known, do = three_lines(refused.value)
    assert "'cuda'" in wrong
    assert "no CUDA device" in known
    assert "leave --device out" in do
    given = ["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--to", "gpt-oss/transformers"]
    assert CliRunner().invoke(app, [*given, "--device", "cuda"]).exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert CliRunner().invoke(app, [*given, "--device", "cpu"]).exit_code == 0


def test_the_backend_by_name_on_a_cpu(tmp_path):
    write_checkpoint(tmp_path / "base", "gpt-oss/openai")
    if not has_triton():
        with pytest.raises(UsageError, match="triton is not installed") as refused:
            Experts.of(moeglot.open(tmp_path / "base"), 0, backend="triton")
        assert "moeglot[triton]" in three_lines(refused.value)[2]
        return
    module = Experts.of(moeglot.open(tmp_path / "base"), 0, backend="triton")
    given = torch.zeros(3, dtype=torch.long).view(3, 1), torch.ones(3, 1)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    dtype = torch.bfloat16 if interpreted else torch.float32
    with pytest.raises(UsageError, match="TRITON_INTERPRET") as refused:
        module(torch.randn(3, 64, dtype=dtype), *given)
    three_lines(refused.value)
    if interpreted:
        assert module(torch.randn(3, 64), *given).shape == (3, 64)


@pytest.mark.skipif(not has_triton(), reason="triton is not installed (make matrix-triton)")
@pytest.mark.parametrize(
    ("version", "capability", "able"), [("3.6.0", (10, 0), False), ("3.6.0", (11, 0), False), ("3.6.0", (9, 0), True), ("3.10.1", (10, 0), True)]
)
def test_a_compiler_that_fails_for_a_gpu_is_not_asked(version, capability, able, tmp_path, monkeypatch):
    """Triton before 3.7, for sm_100 and 110: absent where it is our choice, refused where it is asked for by name."""
    import triton

    from moeglot.kernels.triton import tiles

    write_checkpoint(tmp_path / "base", "gpt-oss/openai")
    module = Experts.of(moeglot.open(tmp_path / "base"), 0)
    there, index = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.long)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(tiles, "table_of", lambda _: tiles.table(capability))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert choose(module, there, index) == ("triton" if able else "batched")
    module.backend = "triton"
    if able:
        assert choose(module, there, index) == "triton"
        return
    with pytest.raises(UsageError, match=f"sm_{capability[0]}{capability[1]}") as refused:
        choose(module, there, index)
    assert "3.7" in three_lines(refused.value)[2]

"""Compiled kernels kept in files: called without numba, refused where they are not what was written, and never code that reaches outside of itself."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeglot.encodings import by_name
from moeglot.kernels import backend
from moeglot.kernels.compiled import jit, linked

pytestmark = [
    pytest.mark.skipif(not backend.installed(), reason="numba is not installed"),
    pytest.mark.skipif(linked.here() is None, reason="code is kept on x86-64 with Linux only"),
]
ENCODINGS = ("mxfp4", "fp8-block", "fp8-channel", "nvfp4", "int4:32", "nf4")


def kernels() -> list[jit._Kernel]:
    modules = [module for name, module in sys.modules.items() if name.startswith("moeglot.kernels.compiled.")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, jit._Kernel)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are kept, empty."""
    monkeypatch.setattr(linked, "folders", lambda: (tmp_path,))
    return tmp_path


def test_every_kernel_is_linked() -> None:
    torch.manual_seed(0)
    values = torch.randn(256, 512)
    with backend.using("numba"):
        for dtype in (torch.bfloat16, torch.float32):
            for name in ENCODINGS:
                encoding = by_name(name)
                encoding.decode(encoding.encode(values.to(dtype)), dtype)
                encoding.decode(encoding.encode(values.to(dtype)), dtype, torch.empty(512, 256, dtype=dtype).mT)
    called = {kernel.function.__name__: kernel.entries for kernel in kernels() if kernel.entries}
    assert len(called) > 8
    assert not [name for name, entries in called.items() if jit._by_numba in entries.values()]


PROGRAM = """
import sys, torch
from moeglot.encodings import by_name
from moeglot.kernels import backend
torch.manual_seed(0)
values = torch.randn(64, 256).bfloat16()
with backend.using(sys.argv[1]):
    parts = by_name("mxfp4").encode(values)
    print(sum(int(part.to(torch.int64).sum()) for part in parts.values()), "numba" in sys.modules)
"""


def test_the_next_process_imports_no_numba(tmp_path: Path) -> None:
    """The first may, or may find what another test left."""
    place = {"PYTHONPYCACHEPREFIX": str(tmp_path), "MOEGLOT_KERNELS": ""}

    def run(name: str) -> list[str]:
        found = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=True, env={**os.environ, **place})
        return found.stdout.split()

    expected = run("torch")[0]
    assert run("numba") == [expected, "True"]
    assert list(tmp_path.rglob("*.kernel"))
    assert run("numba") == [expected, "False"]


@jit.jit
def _add(values: jit.Array, by: float, count: int, out: jit.Array) -> bool:
    for k in range(count):
        out[k] = values[k] + by
    return count > 2


@jit.jit
def _sine(values: jit.Array, out: jit.Array) -> int:
    for k in range(len(values)):
        out[k] = math.sin(values[k])
    return len(values)


@pytest.fixture
def fresh() -> None:
    for kernel in (_add, _sine):
        kernel.entries.clear()


def added() -> tuple[torch.Tensor, bool]:
    values, out = torch.arange(4.0), torch.zeros(4)
    by = torch.tensor(0.5).numpy()[()]
    return out, _add(jit.memory(values).view("float32"), by, 4, jit.memory(out).view("float32"))


EXPECTED = [0.5, 1.5, 2.5, 3.5]


@pytest.mark.usefixtures("fresh")
def test_arguments_and_results(folder: Path) -> None:
    out, result = added()
    assert (out.tolist(), result) == (EXPECTED, True)
    assert len(list(folder.iterdir())) == 1
    values = torch.zeros(1)
    by = torch.tensor(0.5).numpy()[()]
    assert _add(jit.memory(values).view("float32"), by, 1, jit.memory(values).view("float32")) is False


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_not_run(damage: str, folder: Path) -> None:
    added()
    (path,) = folder.iterdir()
    good = path.read_bytes()
    bad = {"cut": good[:-8], "changed": good[:-8] + bytes(8), "empty": b""}[damage]
    path.write_bytes(bad)
    assert linked.kept("test_linked._add", ("array float32", "float32", "int64", "array float32")) is None
    _add.entries.clear()
    assert added()[0].tolist() == EXPECTED
    assert path.read_bytes() == good


@pytest.mark.usefixtures("fresh")
def test_where_nothing_can_be_kept_numba_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(linked, "folders", lambda: (tmp_path / "file",))
    assert added() is not None
    assert added()[0].tolist() == EXPECTED
    assert list(_add.entries.values()) == [jit._by_numba]
    _add.entries.clear()


@pytest.mark.usefixtures("fresh")
def test_code_that_reaches_outside_is_numba_s(folder: Path) -> None:
    values, out = torch.arange(4.0), torch.zeros(4)
    assert _sine(jit.memory(values).view("float32"), jit.memory(out).view("float32")) == 4
    assert torch.allclose(out, values.sin())
    assert list(_sine.entries.values()) == [jit._by_numba]
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("fresh")
def test_another_way_to_call_is_not_linked() -> None:
    """What numba's function takes is compared with what we hand over."""
    takes = ("array float32", "float32", "int64", "array float32")
    import numba

    types = tuple(jit._type(numba, one) for one in takes)
    _add.compiled.compile(types)
    assembly = _add.compiled.inspect_llvm(types)
    linked.linked(assembly, "bool", takes)
    with pytest.raises(linked.NotLinked, match="it takes"):
        linked.linked(assembly, "bool", ("array float32", "float64", "int64", "array float32"))
    with pytest.raises(linked.NotLinked, match="returns complex128"):
        linked.linked(assembly, "complex128", takes)

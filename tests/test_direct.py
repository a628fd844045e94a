"""Writing past the page cache: the same bytes as through it, for every size and place; and mapped pages that are let go can be read again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

import moeglot
from moeglot import scratch
from moeglot.checkpoints.dense import HubTensor
from moeglot.conversion import stream
from moeglot.demo import BUNDLED
from moeglot.files.direct import LARGE, PIECE, Output
from moeglot.files.mapped import let_go
from moeglot.files.shards import Entry

PAGE = 4096


@pytest.mark.parametrize("size", [0, 1, 1000, LARGE, LARGE + 1, LARGE + PAGE, PIECE + LARGE + 8, 2 * PIECE])
@pytest.mark.parametrize("offset", [0, PAGE, PAGE + 2])
def test_bytes_get_where_they_belong(size, offset, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xff" * (offset + size + 100))
    tensor = scratch.empty((size,), torch.uint8)
    tensor.copy_(torch.arange(size) % 251)
    output = Output(path)
    assert output.write(tensor, offset) == size
    output.close()
    found = path.read_bytes()
    assert found[offset : offset + size] == bytes(tensor.tolist())
    assert found[:offset] == b"\xff" * offset
    assert found[offset + size :] == b"\xff" * 100


@pytest.mark.parametrize("when", ["opening", "writing"])
def test_a_file_system_that_has_no_such_thing(when, tmp_path, monkeypatch):
    """It says EINVAL when the file is opened, or not before the first write."""
    path, wrote = tmp_path / "file", []
    path.write_bytes(bytes(LARGE))
    really_open, really_write = os.open, os.pwrite

    def opening(path, flags, *mode):
        if when == "opening" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return really_open(path, flags, *mode)

    output_direct = []

    def writing(descriptor, data, offset):
        if when == "writing" and descriptor in output_direct:
            raise OSError(errno.EINVAL, "not aligned enough")
        wrote.append(descriptor)
        return really_write(descriptor, data, offset)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)
    output = Output(path)
    output_direct.append(output._direct)
    tensor = scratch.empty((LARGE,), torch.uint8)
    tensor.fill_(7)
    output.write(tensor, 0)
    output.close()
    assert set(wrote) == {output._descriptor}
    assert path.read_bytes() == bytes([7]) * LARGE


def test_dense_tensors_are_compared_whole_and_can_be_let_go(tmp_path):
    data = bytearray(os.urandom(5 * 1000))
    (tmp_path / "a").write_bytes(data)
    data[-1] ^= 1
    (tmp_path / "b").write_bytes(data)
    a, b = (HubTensor("t", Entry("t", "U8", (5, 1000), tmp_path / name, 0, 5000)) for name in "ab")
    first = a.read()
    before = first.clone()
    let_go()
    assert torch.equal(first, before)
    assert a.same(a)
    assert not a.same(b)
    assert not a.same(HubTensor("t", Entry("t", "I8", (5, 1000), tmp_path / "a", 0, 5000)))


def test_few_files_are_open_at_a_time(monkeypatch, tmp_path):
    """An output may have more files than a process may open."""
    held, most = set(), []
    opened, closed = Output.__init__, Output.close

    def opening(self, path):
        opened(self, path)
        held.add(self)
        most.append(len(held))

    def closing(self, flush=False):
        closed(self, flush)
        held.remove(self)

    monkeypatch.setattr(Output, "__init__", opening)
    monkeypatch.setattr(Output, "close", closing)
    monkeypatch.setattr(stream, "OPEN", 3, raising=False)
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "out", shard_size=1000, workers=2)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 20
    assert max(most) <= 3 + 2
    assert not held


def test_a_command_may_open_as_many_files_as_the_system_allows():
    code = "import resource as r; from moeglot.checks import allow_many_files; n = r.RLIMIT_NOFILE; r.setrlimit(n, (64, 300)); allow_many_files()"
    code += "; print(r.getrlimit(n))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "(300, 300)\n"

"""The safetensors library's opinion on our container: what it refuses we refuse, what we read it reads equal, what we write it loads."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moeglot import BrokenFile, UsageError
from moeglot.dtypes import DTYPES
from moeglot.files.direct import allocate
from moeglot.files.shards import ALIGNMENT, MAX_HEADER, Entry, Slot, _describe, describe, plan_shards, read_header, tensor_bytes, write_at
from moeglot.sizes import parse_size

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NAMES = ("F32", "BF16", "F16", "U8", "I64", "BOOL", "F8_E4M3")
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 33]), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    """A few tensors of any type, 0-d and empty ones among them, of random bytes (for BOOL, of truth values)."""
    keys = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return {key: _random(draw(st.sampled_from(NAMES)), draw(shapes), random) for key in keys if key != "__metadata__"}


def _random(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    dtype = DTYPES[name].torch
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8, generator=random).bool()
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=random).view(dtype).view(shape)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _described(found: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Name -> dtype, shape, bytes: equal only if everything is, NaN payloads too."""
    return {name: (tensor.dtype, tuple(tensor.shape), _bytes(tensor)) for name, tensor in found.items()}


def _ours(path: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in read_header(path)[0].items()}


@contextmanager
def _new_file(data: bytes = b"") -> Iterator[Path]:
    """A file with these bytes, at a path that no other example uses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        yield path


# --- reading -------------------------------------------------------------------------------------------------------------------------


@QUICK
@given(tensors(), st.dictionaries(st.sampled_from("abc"), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)))
def test_what_the_library_saves_we_read_equal(given: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    with _new_file() as path:
        save_file(given, path, metadata or None)
        assert _described(_ours(path)) == _described(given)
        assert read_header(path)[1] == metadata


@QUICK
@given(tensors(), st.integers(0, 15))
def test_data_may_start_at_any_byte(given: dict[str, torch.Tensor], spaces: int) -> None:
    """Nothing makes a header a multiple of anything; the library pads its own, other writers do not."""
    with _new_file() as path:
        save_file(given, path)
        raw = path.read_bytes()
        length = 8 + int.from_bytes(raw[:8], "little")
        header = raw[8:length].rstrip(b" ") + b" " * spaces
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[length:])
        assert _described(_ours(path)) == _described(given)


@QUICK
@given(st.sampled_from(NAMES), st.integers(1, 9), st.integers(0, 5), st.data())
def test_rows_are_read_as_the_library_slices_them(name: str, rows: int, columns: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, rows))
    count = data.draw(st.integers(0, rows - first))
    given = {"before": torch.zeros(3, dtype=torch.uint8), "x": _random(name, (rows, columns), torch.Generator().manual_seed(rows))}
    with _new_file() as path:
        save_file(given, path)
        with safe_open(path, "pt") as file:
            expected = file.get_slice("x")[first : first + count]
        assert _described({"x": read_header(path)[0]["x"].read(first, count)}) == _described({"x": expected})


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A header that describes a tebibyte is checked at once: the data behind it is a hole that nobody fills."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (1 << 40))
    assert read_header(path)[0]["x"].nbytes == 1 << 40


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    """What is mapped belongs to the file that was there, not to its name."""
    path = tmp_path / "model.safetensors"
    for value in (1, 2):
        save_file({"x": torch.full((4,), value)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        assert read_header(path)[0]["x"].read().tolist() == [value] * 4


# --- refusing ------------------------------------------------------------------------------------------------------------------------


def _library_refuses(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return False
    except SafetensorError:
        return True


def _agree(data: bytes) -> None:
    """What the library refuses raises `BrokenFile` and nothing else; what we accept, we read as the library does."""
    with _new_file(data) as path:
        refused = _library_refuses(path)
        try:
            found = _ours(path)
        except BrokenFile:
            return
        assert not refused, f"read as {found}"
        assert _described(found) == _described(load_file(path))


def _valid() -> bytes:
    given = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b.c": torch.ones(5, dtype=torch.bfloat16), "d": torch.zeros(0, 4, dtype=torch.uint8)}
    with _new_file() as path:
        save_file(given, path, {"format": "pt"})
        return path.read_bytes()


VALID = _valid()
DATA = 8 + int.from_bytes(VALID[:8], "little")
TOKENS = (*b'0 1 -0 -1 24 1e2 2.0 18446744073709551616 true null NaN "" [] {} , ] " \xff'.split(), b"\n")


def _relength(data: bytes, header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data[DATA:]


def test_the_unbroken_file_is_accepted() -> None:
    """Otherwise the mutations below would prove nothing."""
    with _new_file(VALID) as path:
        assert not _library_refuses(path)
        assert set(_ours(path)) == {"a", "b.c", "d"}


def _mostly(right: object, *others: object) -> st.SearchStrategy[object]:
    return st.sampled_from([*[right] * len(others), *others])


DESCRIPTIONS = st.fixed_dictionaries(
    {
        "dtype": _mostly("U8", "BOOL", "F32", "F4", None, ["U8"]),
        "shape": _mostly([2], [1, 2], [], [0], [2.0], [True, 2], [-1, -2], ["2"], [[2]], [None], 2, None, "", "2", {}),
        "data_offsets": _mostly([0, 2], [4, 6], [0, 0], [0, 2.0], [False, 2], [-2, 0], [2, 0], [0, "2"], [0, 2, 4], [0], [], 2, None, "02", {}),
    }
) | st.sampled_from([None, 1, "dtype", [], {}, {"dtype": "U8"}, {"dtype": "U8", "shape": [2]}])


@MANY
@given(st.lists(DESCRIPTIONS, max_size=2))
def test_descriptions_are_looked_at_together_as_strictly_as_each_by_itself(descriptions: list[object]) -> None:
    header = dict(zip("ab", descriptions, strict=False))

    def told(entries: Callable[[], dict[str, Entry]]) -> dict[str, Entry] | str:
        try:
            return entries()
        except BrokenFile as error:
            return str(error)

    each = told(lambda: {name: _describe(Path("x"), name, value, 8) for name, value in header.items()})
    assert told(lambda: describe(Path("x"), header, 8)) == each


@MANY
@given(st.integers(0, DATA - 1), st.integers(1, 255))
def test_flipped_bits_in_the_header(at: int, flip: int) -> None:
    _agree(VALID[:at] + bytes([VALID[at] ^ flip]) + VALID[at + 1 :])


@QUICK
@given(st.integers(0, len(VALID) - 1), st.binary(max_size=3))
def test_truncated_or_overlong(end: int, more: bytes) -> None:
    _agree(VALID[:end])
    _agree(VALID + more)


@pytest.mark.parametrize("token", TOKENS)
def test_another_token_in_the_header(token: bytes) -> None:
    """Every number, text and bracket of the header replaced by another token, one at a time."""
    for found in re.finditer(rb'\d+|"[^"]*"|[][{}:,]', VALID[8:DATA]):
        start, end = found.span()
        _agree(_relength(VALID, VALID[8 : 8 + start] + token + VALID[8 + end : DATA]))


NUMBERS = st.one_of(st.integers(0, 60), st.integers(-(2**70), 2**70), st.sampled_from([2**31, 2**32, 2**63, 2**64, True, False, 2.0, None, "0", [], {}]))


@MANY
@given(st.sampled_from(["a", "b.c", "d"]), st.sampled_from(["shape", "data_offsets", "dtype"]), st.lists(NUMBERS, max_size=3), st.booleans())
def test_other_shapes_and_offsets(name: str, field: str, value: list[object], bare: bool) -> None:
    header = json.loads(VALID[8:DATA])
    header[name][field] = value[0] if bare and value else value
    _agree(_relength(VALID, json.dumps(header).encode()))


@MANY
@given(st.permutations(["a", "b.c", "d"]), st.lists(st.sampled_from([0, 10, 24, 34]), min_size=4, max_size=4))
def test_holes_overlaps_and_other_orders(names: list[str], cuts: list[int]) -> None:
    header = {name: {"dtype": "U8", "shape": [abs(end - start)], "data_offsets": [start, end]} for name, start, end in zip(names, cuts, cuts[1:], strict=False)}
    _agree(_relength(VALID, json.dumps(header).encode()))


TENSOR = '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
ODD_HEADERS = {
    "byte order mark": (b"\xef\xbb\xbf" + TENSOR.encode(), 8),
    "UTF-16": (TENSOR.encode("utf-16-le"), 8),
    "UTF-32": (TENSOR.encode("utf-32-le"), 8),
    "half a surrogate pair": (TENSOR.encode().replace(b"x", b"\xed\xa0\x80"), 8),
    "half a surrogate pair, escaped": (TENSOR.replace("x", "\\ud800").encode(), 8),
    "half a surrogate pair in metadata": (TENSOR.replace('"x"', '"__metadata__":{"a":"\\ud800"},"x"').encode(), 8),
    "minus zero": (TENSOR.replace("[0,8]", "[-0,8]").encode(), 8),
    "shape is text": (TENSOR.replace("[2]", '""').replace("8]", "4]").encode(), 4),
    "shape is an object": (TENSOR.replace("[2]", "{}").replace("8]", "4]").encode(), 4),
    "size beyond 64 bits": (TENSOR.replace("[2]", "[18446744073709551616,0]").replace("8]", "0]").encode(), 0),
    "product beyond 64 bits": (TENSOR.replace("[2]", "[4294967296,4294967296,0]").replace("8]", "0]").encode(), 0),
    "NaN": (TENSOR.replace("[2]", '[2],"more":NaN').encode(), 8),
    "infinity": (TENSOR.replace("[2]", '[2],"more":Infinity').encode(), 8),
    "number beyond any float": (TENSOR.replace("[2]", '[2],"more":1e999').encode(), 8),
    "very deep": (TENSOR.replace("[2]", '[2],"more":' + "[" * 200 + "]" * 200).encode(), 8),
    "deeper than Python": (b"[" * 100_000, 8),
    "integer with 5000 digits": (TENSOR.replace("[2]", "[" + "9" * 5000 + "]").encode(), 8),
}


@pytest.mark.parametrize("odd", ODD_HEADERS)
def test_headers_that_python_would_forgive(odd: str) -> None:
    """Python's json reads more than the format allows; a file must not hold other tensors for us than for everybody else."""
    header, size = ODD_HEADERS[odd]
    data = len(header).to_bytes(8, "little") + header + bytes(size)
    with _new_file(data) as path:
        assert _library_refuses(path)
    _agree(data)


def test_the_largest_header_is_the_librarys(tmp_path: Path) -> None:
    """One byte more than the limit is refused by both, although the file is long enough."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little"))
    os.truncate(path, 8 + MAX_HEADER + 1)
    assert _library_refuses(path)
    with pytest.raises(BrokenFile):
        read_header(path)


# --- writing -------------------------------------------------------------------------------------------------------------------------


def _write(folder: Path, given: Mapping[str, torch.Tensor], shard_size: int, metadata: Mapping[str, str]) -> list[Path]:
    names = {dtype.torch: name for name, dtype in DTYPES.items()}
    shards = plan_shards([Slot(key, names[tensor.dtype], tuple(tensor.shape)) for key, tensor in given.items()], shard_size, metadata)
    for shard in shards:
        allocate(folder / shard.file, shard)
        assert (folder / shard.file).stat().st_size == shard.nbytes
        descriptor = os.open(folder / shard.file, os.O_RDWR)
        for name, offset in shard.offsets.items():
            write_at(descriptor, tensor_bytes(given[name]), offset)
        os.close(descriptor)
    return [folder / shard.file for shard in shards]


@QUICK
@given(tensors(), st.sampled_from([1, 40, 200, 10**6]), st.dictionaries(st.sampled_from("abc"), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)))
def test_what_we_write_the_library_loads_equal(given: dict[str, torch.Tensor], shard_size: int, metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written: dict[str, torch.Tensor] = {}
        for path in _write(Path(folder), given, shard_size, metadata):
            loaded = load_file(path)
            with safe_open(path, "pt") as file:
                assert (file.metadata() or {}) == metadata
            assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % ALIGNMENT == 0
            assert sum(tensor.nbytes for tensor in loaded.values()) <= shard_size or sum(tensor.nbytes > 0 for tensor in loaded.values()) == 1
            assert not written.keys() & loaded.keys()
            written |= loaded
        assert _described(written) == _described(given)


def test_alignment_is_a_page() -> None:
    assert ALIGNMENT == 4096


@pytest.mark.parametrize(("shard_size", "files"), [(99, [1, 1, 1, 1]), (100, [1, 1, 1, 1]), (199, [1, 1, 1, 1]), (200, [2, 2]), (300, [3, 1]), (400, [4])])
def test_shards_are_filled_up_and_no_further(shard_size: int, files: list[int]) -> None:
    shards = plan_shards([Slot(f"t{n}", "U8", (100,)) for n in range(4)], shard_size, {})
    assert [len(shard.slots) for shard in shards] == files
    names = [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))] if len(files) > 1 else ["model.safetensors"]
    assert [shard.file for shard in shards] == names


def test_many_tensors_of_one_file_are_each_measured_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a model has of experts: planning is linear in them."""
    measured, nbytes, count = 0, Slot.nbytes.fget, 20_000

    def counted(slot: Slot) -> int:
        nonlocal measured
        measured += 1
        assert measured <= 8 * count
        return nbytes(slot)

    monkeypatch.setattr(Slot, "nbytes", property(counted))
    (shard,) = plan_shards([Slot(f"t{n}", "U8", (1,)) for n in range(count)], count, {})
    assert shard.nbytes == len(shard.header) + count


def test_a_transposed_tensor_is_written_row_major(tmp_path: Path) -> None:
    given = torch.arange(6, dtype=torch.int64).view(2, 3).t()
    (path,) = _write(tmp_path, {"x": given}, 10**6, {})
    assert load_file(path)["x"].equal(given)


def test_threads_that_open_several_files_at_once_each_read_their_own(tmp_path):
    """Maps are made when they are first needed, by whichever threads come first."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    from moeglot.files.mapped import forget_mappings
    from moeglot.files.shards import read_header

    entries = []
    for n in range(8):
        save_file({"x": torch.full((4,), float(n))}, tmp_path / f"{n}.safetensors")
        entries.append(read_header(tmp_path / f"{n}.safetensors")[0]["x"])
    together = Barrier(8)

    def read(entry):
        together.wait()
        return float(entry.read()[0])

    with ThreadPoolExecutor(8) as pool:
        for _ in range(60):
            forget_mappings()
            assert list(pool.map(read, entries)) == [float(n) for n in range(8)]


@pytest.mark.parametrize(("told", "nbytes"), [("5GB", 5 * 10**9), ("5GiB", 5 << 30), ("1.5 kiB", 1536), ("2KB", 2000), ("3T", 3 * 10**12), (7, 7), ("1B", 1)])
def test_sizes(told, nbytes):
    assert parse_size(told) == nbytes


@pytest.mark.parametrize("told", ["", "5iB", "0.4", "0.0004 kB", "0", "-1", "5 PB", "9" * 400, "GB"])
def test_what_is_no_size(told):
    with pytest.raises(UsageError, match="is no size"):
        parse_size(told)

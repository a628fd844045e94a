"""The compiled kernels give the bits of torch's tables, wherever they write; which of them computes is said in one place."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from strategies import make_parts

from moeglot.encoding import WHOLE, Encoding
from moeglot.encodings import ENCODINGS
from moeglot.encodings.bnb4 import BNB4
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.int4 import INT4
from moeglot.encodings.mxfp4 import RULES, mxfp4
from moeglot.encodings.nvfp4 import NVFP4
from moeglot.encodings.plain import Plain
from moeglot.errors import BadNumbers, UsageError
from moeglot.kernels import added, backend, bits, threads
from moeglot.kernels import mxfp4 as kernel
from moeglot.kernels.alternate import widen

needs_numba = pytest.mark.skipif(not backend.installed(), reason="numba is not installed")
CODED = {name: encoding for name, encoding in ENCODINGS.items() if not isinstance(encoding, Plain)}
CODED |= {"fp8-block-48x32": FP8((48, 32), "F32"), "fp8-all-rows": FP8((WHOLE, 16), "F32"), "nf4": BNB4(), "fp4": BNB4("fp4"), "nf4:4096": BNB4(blocksize=4096)}
EACH = pytest.mark.parametrize("encoding", CODED.values(), ids=CODED)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64], ids=str)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, the sign of zero too."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def places(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """[out, in] as it may lie in somebody's memory: straight, with gaps, turned, turned and interleaved, at an odd place."""
    rows, columns = shape
    return {
        "straight": torch.zeros(rows, columns, dtype=dtype),
        "every other row": torch.zeros(rows, 2, columns, dtype=dtype)[:, 1],
        "with a gap": torch.zeros(rows, columns + 3, dtype=dtype)[:, 1:-2],
        "turned": torch.zeros(columns, rows, dtype=dtype).mT,
        "turned and interleaved": torch.zeros(columns, rows, 2, dtype=dtype)[..., 1].mT,
    }


def _lying(encoding: Encoding, rows: int, columns: int) -> tuple[int, int]:
    """The shape of a matrix [out, in] as this encoding has it."""
    return (columns, rows) if encoding.is_turned else (rows, columns)


def parts_of(encoding: Encoding, shape: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    if isinstance(encoding, BNB4):
        return encoding.encode(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16())
    return dict(make_parts(encoding, shape, seed).parts)


@EACH
@DTYPES
@pytest.mark.parametrize("name", ["torch", pytest.param("numba", marks=needs_numba)])
def test_decode_writes_where_it_is_told(encoding, dtype, name):
    shape = _lying(encoding, 192, 256)
    parts = parts_of(encoding, shape, 1)
    with backend.using("torch"):
        expected = encoding.decode(parts, dtype)
    with backend.using(name):
        assert same(encoding.decode(parts, dtype), expected)
        for place, out in places(shape, dtype).items():
            assert encoding.decode(parts, dtype, out).data_ptr() == out.data_ptr()
            assert same(out, expected), place
        experts = torch.empty(3, *shape, dtype=dtype)
        if not isinstance(encoding, BNB4):
            assert same(encoding.decode(parts_of(encoding, (3, *shape), 2), dtype, experts), encoding.decode(parts_of(encoding, (3, *shape), 2), dtype))


@needs_numba
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mxfp4_over_all_bytes_and_scales(dtype):
    """Every scale that `decode` takes, in every place; the two paths of a turned tile, with common scales only and with rare ones, both; more rows
    than a tile."""
    scale = torch.arange(253, dtype=torch.uint8).repeat_interleave(9).view(-1, 1).expand(2277, 16).contiguous()
    packed = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(2277, 16, 16).contiguous()
    for some in (slice(None), slice(10, -5)):
        with backend.using("torch"):
            expected = kernel.decode(packed[some], scale[some], dtype)
        with backend.using("numba"):
            for place, out in places((len(expected), 512), dtype).items():
                assert same(kernel.decode(packed[some], scale[some], dtype, out), expected), place


@pytest.mark.parametrize("name", ["torch", pytest.param("numba", marks=needs_numba)])
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (4, 32), (13, 96), (130, 160), (2055, 64)], ids=str)
def test_mxfp4_is_turned_at_all_sizes(shape, name, monkeypatch):
    """In tiles of some rows and some groups, with rows left over, of codes with gaps between rows and where no word starts."""
    rows, groups = shape[0], shape[1] // 32
    monkeypatch.setattr(kernel, "BYTES", 512)
    monkeypatch.setattr(kernel, "CHUNK", 1024)
    codes = torch.randint(0, 256, (4 + rows * 2 * groups * 16,), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
    scale = torch.randint(0, 253, (rows, groups), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
    for start in (0, 4):
        packed = codes[start : start + rows * 2 * groups * 16].view(rows, 2, groups, 16)[:, 1]
        with backend.using("torch"):
            expected = kernel.decode(packed, scale, torch.float64).bfloat16()
        with backend.using(name):
            for place, out in places(shape, torch.bfloat16).items():
                assert same(kernel.decode(packed, scale, torch.bfloat16, out), expected), (place, start)


@needs_numba
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (33, 2880)], ids=str)
def test_mxfp4_multiplies_out_of_its_codes(shape, count):
    """Against float64 and the slow decoding; codes of all magnitudes under scales far apart, rows of a larger tensor, and tokens with gaps."""
    rows, columns = shape
    random = torch.Generator().manual_seed(rows)
    packed = torch.randint(0, 256, (rows, 2, columns // 32, 16), generator=random, dtype=torch.uint8)[:, 1]
    scale = torch.randint(100, 140, (rows, columns // 32), generator=random, dtype=torch.uint8)
    x = torch.randn(count, columns + 5, generator=random)[:, 5:]
    with backend.using("torch"):
        weight = kernel.decode(packed, scale, torch.float64)
        assert kernel.times(x, packed, scale) is None
    expected = x.double() @ weight.mT
    with backend.using("numba"):
        found = kernel.times(x, packed, scale)
        half = kernel.times(x.bfloat16(), packed, scale)
        wrong = kernel.times(x.roll(1, -1), packed, scale)
    magnitude = x.double().abs() @ weight.abs().mT
    assert ((found - expected).abs() <= 1e-6 * magnitude).all()
    assert half.dtype == torch.bfloat16
    assert ((half - x.bfloat16().double() @ weight.mT).abs() <= 2**-8 * expected.abs().amax() + 1e-6 * magnitude).all()
    assert not ((wrong - expected).abs() <= 1e-4 * magnitude).all()


@pytest.mark.parametrize("name", [name for name in backend.NAMES if name == "torch" or backend.installed()])
def test_codes_are_taken_from_any_byte_on(name):
    """Eight at a time where that is fast; a slice may begin between."""
    random = torch.Generator().manual_seed(4)
    packed, scale = torch.randint(0, 256, (40, 2, 16), generator=random, dtype=torch.uint8), torch.full((40, 2), 121, dtype=torch.uint8)
    packed[:7, 1] &= 0xDD  # no code is 6 or 7
    left, right = 0.01 * torch.randn(40, 3, generator=random), torch.randn(3, 64, generator=random)
    shifted = torch.cat([packed.new_zeros(5), packed.flatten()])[5:].view(packed.shape)
    groups = int((torch.maximum(packed & 7, packed >> 4 & 7).amax(-1) <= 5).sum())
    with backend.using(name):
        assert kernel.undetermined(packed.view(-1, 16)) == kernel.undetermined(shifted.view(-1, 16)) == groups
        assert groups >= 7
        for one, other in zip(added.added(packed, scale, left, right, "away"), added.added(shifted, scale, left, right, "away"), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@needs_numba
@pytest.mark.parametrize("way", ["torch's OpenMP", "a pool"])
def test_rows_shared_out_among_threads_give_the_same_bits(way, monkeypatch):
    """Uneven shares too; and what one of them raises is raised."""
    if way == "a pool":
        monkeypatch.setattr(threads, "_team", lambda: None)
    random = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 256, (37, 2, 16), generator=random, dtype=torch.uint8)
    scale, x = torch.randint(100, 140, (37, 2), generator=random, dtype=torch.uint8), torch.randn(3, 64, generator=random)
    monkeypatch.setattr(threads, "WORTH", 64)
    found = {}
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert threads.shares(packed.numel() * 2) == count
        with backend.using("numba"):
            found[count] = kernel.times(x, packed, scale)
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[1], found[5])
    done = []
    with pytest.raises(ZeroDivisionError):
        threads.together([lambda: done.append(1), lambda: 1 / 0])
    assert done == [1]
    if way == "a pool":
        both = threading.Barrier(2, timeout=600)
        threads.together([both.wait, both.wait])  # neither would come back from a thread that they share


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="torch has another OpenMP there")
def test_the_threads_are_those_of_torch():
    """Work on rows starts no threads beside them and ends none of them; all of it is done by a team that is smaller, as one within a team is."""
    seen = subprocess.run([sys.executable, "-c", TEAM], check=True, capture_output=True, text=True)
    before, after, done, inside = seen.stdout.split()
    assert before == after
    assert done == "01234"
    assert inside == "01234"


TEAM = """
import os, threading, time, torch
from moeglot.kernels import threads
torch.set_num_threads(4)
torch.ones(1 << 22).add_(1)
assert threads._team()
before = sorted(os.listdir("/proc/self/task"))
done, inside = [], []
both = threading.Barrier(2, timeout=600)
threads.together([both.wait, both.wait])  # side by side: neither would come back from a thread that they share
time.sleep(0.1)  # a thread that ends is there for a while
after = sorted(os.listdir("/proc/self/task"))
print(*("-".join(one) for one in (before, after)))
threads.together([lambda n=n: done.append(n) for n in range(5)])
within = lambda: threads.together([lambda n=n: inside.append(n) for n in range(5)])
threads.together([within, lambda: None])
print(*("".join(map(str, sorted(one))) for one in (done, inside)))
"""


@needs_numba
@pytest.mark.parametrize("place", ["straight", "turned", "turned and interleaved"])
def test_mxfp4_refuses_the_same_numbers(place):
    """Each code under each of the scales that make some codes infinite, and 255, which is NaN."""
    for scale in (252, 253, 254, 255):
        for code in range(16):
            parts = torch.full((64, 2, 16), code * 17, dtype=torch.uint8), torch.full((64, 2), scale, dtype=torch.uint8)
            refused = []
            for name in backend.NAMES:
                with backend.using(name):
                    try:
                        kernel.decode(*parts, torch.bfloat16, places((64, 64), torch.bfloat16)[place])
                        refused.append(None)
                    except BadNumbers as error:
                        refused.append(str(error))
            assert refused[0] == refused[1], (scale, code)
            assert (refused[0] is not None) == (scale == 255 or 2.0 ** (scale - 127) * float([0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7]) >= 2.0**128)


SPECIAL = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 2.0**-133, 3e38, -3e38, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0])


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """[64, 128]: of all sizes, halfway between codes, subnormal, zeros of both signs."""
    random = torch.Generator().manual_seed(3)
    found = torch.randn(64, 128, generator=random) * torch.exp2(torch.randint(-140, 120, (64, 1), generator=random).float())
    found[1] = torch.randint(-30, 31, (128,), generator=random) / 4
    found[2, : len(SPECIAL)] = SPECIAL
    found[3], found[4] = 0.0, -0.0
    found[5] = torch.randint(-30, 31, (128,), generator=random) * 2.0**-130
    return found.to(dtype)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_mxfp4_encodes_to_the_same_bytes(rule, dtype):
    values = numbers(dtype).nan_to_num(posinf=60000.0, neginf=-60000.0)
    assert _coded_alike(mxfp4(rule), values)
    assert _coded_alike(mxfp4(rule), values.mT.contiguous().mT)


@needs_numba
@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_encoder_writes_the_same_bytes(encoding, dtype):
    random = torch.Generator().manual_seed(4)
    values = (torch.randn(192, 256, generator=random) * torch.exp2(torch.randint(-20, 4, (192, 1), generator=random).float())).to(dtype)
    values[7], values[8] = 0.0, -0.0
    values = values.view(_lying(encoding, 192, 256))
    grid = encoding.decode(parts_of(encoding, tuple(values.shape), 5), torch.float32).to(dtype)
    for given in (values, values.mT.contiguous().mT, grid):
        assert _coded_alike(encoding, given)


def _coded_alike(encoding: Encoding, values: torch.Tensor) -> bool:
    found = []
    for name in backend.NAMES:
        with backend.using(name):
            found.append(encoding.encode(values))
    return all(same(found[0][part], found[1][part]) for part in found[0])


@needs_numba
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("width", [1, 3, 16, 255])
@pytest.mark.parametrize("nan", [False, True])
def test_fp8_by_torch_is_torch_s_own_conversion(start, width, nan):
    """Every code, under scales that round: the products of float32 in torch's conversion, which is the slower one."""
    codes = torch.arange(256, dtype=torch.uint8).roll(-start)
    codes[(codes & 127) == 127] = 255 if nan else 0
    weight = codes.repeat(8)[start:].view(torch.float8_e4m3fn)[: 2040 // width * width].view(-1, width)
    scale = torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(width)) + 0.1
    with backend.using("torch"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert same(FP8((1, WHOLE), "F32").decode({"weight": weight, "scale": scale}, dtype), (weight.to(torch.float32) * scale).to(dtype))


def test_a_wrong_bit_is_seen():
    """The power of the comparisons above: one code, one scale, one sign of zero."""
    parts = parts_of(mxfp4("openai"), (64, 64), 1)
    right = kernel.decode(parts["packed"], parts["scale"], torch.bfloat16)
    for change in ("packed", "scale"):
        wrong = {**parts, change: parts[change].clone()}
        wrong[change].view(-1)[5] ^= 1
        assert not same(kernel.decode(wrong["packed"], wrong["scale"], torch.bfloat16), right)
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))


# --- which kernels ---------------------------------------------------------------------------------------------------------------------


def test_the_environment_says_which_kernels(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.current() == "torch"
    assert backend.compiled("mxfp4", torch.zeros(1)) is None
    monkeypatch.setenv(backend.VARIABLE, "fortran")
    with pytest.raises(UsageError, match="no fortran kernels"):
        backend.current()
    monkeypatch.delenv(backend.VARIABLE)
    assert backend.current() == ("numba" if backend.installed() else "torch")


def test_other_memory_than_this_machine_s_is_torch_s():
    assert backend.compiled("mxfp4", torch.zeros(1, device="meta")) is None


def test_torch_s_kernels_need_no_numba():
    code = "import sys, torch; from moeglot.encodings import by_name; by_name('mxfp4').encode(torch.randn(4, 32)); print('numba' in sys.modules)"
    environment = {"MOEGLOT_KERNELS": "torch", "PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.strip() == "False"


@needs_numba
def test_kernels_run_side_by_side_and_leave_torch_s_threads_alone():
    before = torch.get_num_threads()
    encodings = [CODED[name] for name in ("mxfp4", "fp8-block", "nvfp4", "int4:32", "nf4")]
    parts = [parts_of(encoding, (128, 256), 1) for encoding in encodings]
    with backend.using("numba"), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: encodings[n % 5].decode(parts[n % 5], torch.bfloat16), range(40)))
        assert all(same(values, encodings[n % 5].decode(parts[n % 5], torch.bfloat16)) for n, values in enumerate(found))
    assert torch.get_num_threads() == before


def test_an_out_of_another_shape_is_refused():
    parts = parts_of(NVFP4(), (16, 64), 1)
    for wrong in (torch.empty(64, 16), torch.empty(16, 64, dtype=torch.float64)):
        with pytest.raises(ValueError, match="out is"):
            NVFP4().decode(parts, torch.float32, wrong)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("gap", [0, 1, 2])
def test_numbers_two_apart_become_float32(first, turned, gap):
    """All bits that a bfloat16 can have, to the last number that the memory holds; None of them are widened where they do not lie so."""
    columns = 255
    memory = torch.arange(first + 260 * (2 * columns + gap), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for spare in range(2):
        values = memory[: len(memory) - gap - spare].as_strided((259, columns), (2 * columns + gap, 2), first)
        values, out = (values.mT, torch.empty(columns, 259)) if turned else (values, torch.empty(values.shape))
        place = out.mT.contiguous().mT if turned else out
        decoded = Plain("BF16").decode({"value": values}, torch.float32, place)
        assert decoded is place
        assert same(place.contiguous(), values.to(torch.float32).contiguous())
        assert widen(values, place) == (gap != 1)
    assert not widen(values.contiguous(), place)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (257, 36), (300, 30), (513, 64)], ids=str)
@pytest.mark.parametrize("gap", [1, 2])
def test_turned_matrices_are_the_same_to_the_last_bit(dtype, shape, gap):
    values = torch.randint(0, 30000, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = values.mT.repeat_interleave(gap, 1).contiguous()[:, ::gap].mT
    with backend.using("numba"):
        assert bits.same(turned, values)
        for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)):
            for bit in (1, 1 << 14):
                values[row, column] ^= bit
                assert not bits.same(turned, values)
                assert not bits.same(values, turned)
                values[row, column] ^= bit


@pytest.mark.parametrize("name", CODED)
def test_parts_of_any_strides_and_matrices_without_rows(name):
    encoding = CODED[name]
    shape = _lying(encoding, 64, 256)
    parts = encoding.encode(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    strided = {part: tensor if part in ("shape", "state") else torch.stack([tensor, tensor], -1)[..., 0] for part, tensor in parts.items()}
    for kernels in backend.NAMES if backend.installed() else ("torch",):
        with backend.using(kernels):
            for dtype in (torch.bfloat16, torch.float32):
                assert torch.equal(encoding.decode(strided, dtype), encoding.decode(parts, dtype)), (kernels, dtype)
            none = _lying(encoding, 0, 256)
            assert encoding.decode(encoding.encode(torch.empty(none)), torch.float32).shape == none


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale", ["F32", "BF16", "F16"])
def test_int4_refuses_the_same_scales(scale, bad):
    encoding = INT4(32, scale=scale)
    parts = encoding.encode(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    parts["scale"][3, 1] = bad
    for kernels in backend.NAMES if backend.installed() else ("torch",):
        for dtype in (torch.bfloat16, torch.float32):
            with backend.using(kernels), pytest.raises(BadNumbers, match="INT4 scale is NaN or infinite"):
                encoding.decode(parts, dtype)


@needs_numba
def test_a_compiled_kernel_is_not_entered_with_other_memory():
    """Half as much of it, another dtype of the same size, or none at all."""
    from moeglot.kernels.compiled import added, bnb4, fp8, grid, int4, mxfp4, nvfp4

    x, packed, scale = torch.ones(2, 64), torch.zeros(8, 2, 16, dtype=torch.uint8), torch.full((8, 2), 127, dtype=torch.uint8)
    ones, codes = torch.ones(8, 2), torch.zeros(8, 32, dtype=torch.uint8)
    calls = {
        "times": (lambda out: mxfp4.times(x, packed, scale, out), (2, 8), torch.float32),
        "mxfp4": (lambda out: mxfp4.decode(packed, scale, out), (8, 64), torch.bfloat16),
        "mxfp4 encoded": (lambda out: mxfp4.encode(torch.ones(8, 32), "ceil", "even", out, scale[:, 0].contiguous()), (8, 16), torch.uint8),
        "nvfp4": (lambda out: nvfp4.decode(codes[:, :16], ones, out), (8, 32), torch.float32),
        "nvfp4 encoded": (lambda out: nvfp4.encode(torch.ones(8, 16), ones[:, 0], out), (8, 8), torch.uint8),
        "int4": (lambda out: int4.decode(torch.zeros(8, 8, dtype=torch.int32), ones, 32, out), (8, 64), torch.float32),
        "int4 encoded": (lambda out: int4.encode(torch.ones(8, 64), ones, 32, out), (8, 8), torch.int32),
        "fp8": (lambda out: fp8.decode(torch.zeros(8, 64).to(torch.float8_e4m3fn), ones[:1], (8, 32), out), (8, 64), torch.bfloat16),
        "fp8 encoded": (lambda out: fp8.encode(torch.ones(8, 64), ones[:1], (8, 32), out), (8, 64), torch.float8_e4m3fn),
        "largest": (lambda out: grid.largest(torch.ones(8, 64), (1, 32), out), (8, 2), torch.float32),
        "refuted": (lambda out: grid.refuted(torch.ones(8, 64), ones, (1, 32), "int4", ones.clone(), out), (8, 2), torch.float32),
        "nf4": (lambda out: bnb4.decode(codes.flatten(), torch.ones(8), torch.ones(16), 64, out), (512,), torch.float32),
        "nf4 encoded": (
            lambda out: bnb4.nearest(torch.ones(8, 64), torch.arange(15.0), torch.arange(16).to(torch.uint8), torch.empty(256, 1, dtype=torch.uint8), out),
            (8,),
            torch.float32,
        ),
        "added": (lambda out: added.added(packed, scale, torch.ones(8, 1), torch.ones(1, 64), "even", out, scale.clone()), (8, 2, 16), torch.uint8),
    }
    for name, (call, shape, dtype) in calls.items():
        call(torch.zeros(shape, dtype=dtype))
        half = torch.zeros((*shape[:-1], shape[-1] // 2), dtype=dtype)
        other = torch.zeros(shape, dtype={1: torch.int8, 2: torch.float16, 4: torch.uint32}[dtype.itemsize])
        wider = torch.zeros(shape, dtype=torch.float64)
        for wrong in (half, other, wider, torch.zeros(shape, dtype=dtype, device="meta")):
            with pytest.raises(ValueError, match="a kernel"):
                print(name, call(wrong))


IN_OTHER_MEMORY = """
import os, sys, torch
from moeglot.files.direct import Output
from moeglot.encodings.quant_state import QuantState
from moeglot.experts import relative_error
from moeglot.kernels import mxfp4
from moeglot.kernels.compiled import jit
from moeglot.files.shards import Piece

path = sys.argv[1]
open(path, "wb").write(bytes(16))
put = Output(path).put
calls = {
    "out": lambda: mxfp4.decode(torch.zeros(64, 2, 16).byte(), torch.full((64, 2), 127).byte(), torch.float32, torch.empty(8, 8)),
    "shape": lambda: jit.checked(torch.ones(2), (3,), torch.float32),
    "device": lambda: jit.memory(torch.ones(2, device="meta")),
    "dtype": lambda: jit.singles(torch.ones(2).int()),
    "too long": lambda: put(torch.ones(9).byte(), (Piece(0, 8),)),
    "too far": lambda: put(torch.ones(4).byte(), (Piece(0, 8),), 5),
    "too short for its pieces": lambda: put(torch.ones(7).byte(), (Piece(0, 4), Piece(4, 4))),
    "not from the first": lambda: put(torch.ones(4).byte(), (Piece(0, 8, (12,)),), 4),
    "quant_state": lambda: QuantState("nf4", 64, "BF16", (2, 64)).write(16),
    "broadcast": lambda: relative_error(torch.ones(2, 2), torch.ones(2)),
}
for name, call in calls.items():
    try:
        call()
    except ValueError:
        continue
    print(name, "was not refused")
put(torch.ones(4).byte(), (Piece(0, 8),), 4)
print(list(open(path, "rb").read()))
"""


def test_other_memory_is_refused_by_python_without_asserts(tmp_path):
    command, environment = [sys.executable, "-O", "-c", IN_OTHER_MEMORY, str(tmp_path / "file")], {"MOEGLOT_KERNELS": "torch", "PYTHONPATH": ":".join(sys.path)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [str([0] * 4 + [1] * 4 + [0] * 8)]

"""The kernels compiled for GPUs that need not be here: nothing spills, and a weight costs a few instructions; a kernel that breaks either is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (make matrix-triton)")

import triton

from moeglot.kernels.triton.tiles import SINGLE, TABLES, Tiles

pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
    reason=f"the machine code is counted as triton 3.7 makes it; {triton.__version__} makes other code, and none of the products with MXFP4 for sm_100",
)

CEILINGS = {
    # kind, architecture: rows of the tile -> instructions a weight in the loop, of all kinds: loads, decoding, matrix instructions, bookkeeping
    ("mxfp4", 80): {16: 6.2, 32: 8.8},
    ("mxfp4", 90): {16: 5.7, 32: 5.9, 64: 6.3, 128: 6.8, 256: 8.8},
    ("mxfp4", 100): {16: 5.4, 32: 5.6, 64: 5.8, 128: 7.1},
    ("mxfp4", 120): {16: 5.9, 32: 8.4},
    ("fp8", 80): {16: 6.2, 32: 10.0},
    ("fp8", 90): {16: 5.2, 32: 5.7, 64: 7.0, 128: 8.9},
    ("fp8", 100): {16: 5.2, 32: 5.7, 64: 7.0},
    ("fp8", 120): {16: 6.2, 32: 10.0},
}
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that a program may take: 163, 99 or 227 KB (CUDA C++ Programming Guide, technical specifications by compute capability)."""
LOADS = {80: 1.0, 90: 0.6, 100: 0.6, 120: 1.0}
"""Loads a weight: of its four or eight bits, its scale, and the tokens; on sm_80 and 120 the tensor cores read registers alone. A table of codes
needs one more for each."""


def assembled(kind: str, along: bool, arch: int, tiles: list[Tiles]) -> list[dict]:
    words = [kind, "along" if along else "across", str(arch), *(f"{one.rows},{one.outer},{one.inner},{one.warps},{one.stages}" for one in tiles)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, Path(__file__).with_name("assembly.py"), *words], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def steps(kind: str, arch: int):
    return TABLES[f"sm_{arch}"].of(kind.partition("-")[0])


@pytest.mark.parametrize(("kind", "arch", "along"), [(*one, along) for one in CEILINGS for along in (True, False) if along or one[1] != 120])
def test_nothing_spills_and_decoding_is_cheap(kind, arch, along):
    tiles = [one for _, one in steps(kind, arch)]
    assert [one.rows for one in tiles] == list(CEILINGS[kind, arch])
    found = assembled(kind, along, arch, tiles)
    for one, ceiling, got in zip(tiles, CEILINGS[kind, arch].values(), found, strict=True):
        assert (got["spills"], got["stack"]) == (0, 0), one
        assert any("MMA" in name for name in got["loop"]), one
        assert 2 < got["a_weight"] <= ceiling, (one, got)
        assert 0 < got["loads"] <= LOADS[arch], (one, got)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_kernel_that_looks_codes_up_is_seen(arch):
    tiles = steps("mxfp4", arch)[0][1]
    found = assembled("mxfp4-by-table", True, arch, [tiles])[0]
    assert found["a_weight"] > CEILINGS["mxfp4", arch][tiles.rows]
    assert found["loads"] > LOADS[arch]


@pytest.mark.parametrize("arch", [90, 100])
def test_a_kernel_that_spills_is_seen(arch):
    found = assembled("mxfp4", True, arch, [Tiles(128, 256, 64, 8, 3)])[0]
    assert found["spills"] > 0
    assert found["stack"] > 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_other_kernels_compile_and_do_not_spill(arch):
    found = assembled("others", True, arch, [])
    assert {"mxfp4", "fp8", "outer", "route", "sum", "bare"} < {each["name"] for each in found}
    assert not {each["name"]: each["spills"] for each in found if each["spills"] or each["stack"]}
    assert not any(name in each["loop"] for each in found for name in ("STL", "LDL"))


@pytest.mark.parametrize("arch", [86, 120])
def test_float32_fits_where_shared_memory_is_short(arch):
    """What takes the most: plain numbers with an adapter of a large rank. A tile twice as long would not fit."""
    for along in (True, False):
        fits, too_long = assembled("plain-float32-512", along, arch, [SINGLE, Tiles(16, 128, 64, 4, 4)])
        assert fits["shared"] <= SHARED[arch] < too_long["shared"]
        assert (fits["spills"], fits["stack"]) == (0, 0)


@pytest.mark.parametrize("kind", ["mxfp4-512", "plain-512"])
@pytest.mark.parametrize("arch", [86, 90, 100])
def test_an_adapter_of_a_large_rank_fits(arch, kind):
    """Beside the largest tile."""
    largest = steps(kind, 80 if arch == 86 else arch)[-1][1]
    found = assembled(kind, True, arch, [largest])[0]
    assert found["shared"] <= SHARED[arch]
    assert (found["spills"], found["stack"]) == (0, 0)

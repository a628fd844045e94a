"""Compiles a kernel for a GPU that need not be there, and counts what the machine code does: run as a program, since TRITON_INTERPRET must not be set.

`python assembly.py KIND along|across ARCH ROWS,OUTER,INNER,WARPS,STAGES …` prints a JSON list; KIND `others` is all other kernels.
`plain-float32-512` computes in float32, with an adapter of rank 512, and `mxfp4-by-table` looks its codes up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "x": "*bf16",
    "starts": "*i32",
    "ends": "*i32",
    "order": "*i64",
    "bias": "*bf16",
    "low": "*bf16",
    "side": "*bf16",
    "weights": "*bf16",
    "out": "*bf16",
}
NO_SIDE = {"side_expert": 0, "side_rank": 0, "side_out": 0}
SINGLE = {name: "*fp32" for name, kind in POINTERS.items() if kind == "*bf16"}
CODES = {"mxfp4": ("*i32", "*u8"), "fp8": ("*i32", "*fp32"), "plain": ("*bf16", None)}


def compiled(kernel, given: dict, arch: int, warps: int, stages: int):
    """given: name -> type of an argument, or the value of a constant. Addresses and strides are multiples of 16, as those of torch's tensors are."""
    names = kernel.arg_names
    types = ("*", "i32", "fp32")
    signature = {name: given[name] if isinstance(given[name], str) and given[name].startswith(types) else "constexpr" for name in names}
    constants = {(names.index(name),): given[name] for name in names if signature[name] == "constexpr"}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if signature[name].startswith("*") or name.startswith(("x_", "codes_", "side_"))}
    aligned = {place: what for place, what in aligned.items() if place not in constants}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})


@triton.jit
def by_table(word, factor):
    """What `eight` does, by a table of the sixteen numbers that is looked up for each code."""
    code = tl.arange(0, 16)
    magnitude = tl.where(code % 8 < 4, (code % 8) * 0.5, tl.where(code % 8 == 7, 6.0, code % 8 - 2.0))
    table = tl.where(code < 8, magnitude, -magnitude)
    nibbles = (word[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    found = tl.gather(table, nibbles.reshape([nibbles.numel]), 0).to(factor.dtype).reshape(nibbles.shape) * factor[:, :, None]
    return found.reshape([word.shape[0], word.shape[1] * 8])


def product(kind: str, along: bool, arch: int, rows: int, outer: int, inner: int, warps: int, stages: int, other: dict | None = None):
    """The grouped product of gpt-oss-20b's gate_up_proj, with bias, an adapter of rank 16, gather, scatter and weights."""
    from moeglot.kernels.triton import codes as decoding
    from moeglot.kernels.triton import gemm

    kind, *words = kind.split("-")
    if "table" in words:
        decoding.eight = by_table
    codes, scales = CODES[kind]
    codes = "*fp32" if "float32" in words and kind == "plain" else codes
    rank = next((int(word) for word in words if word.isdecimal()), 16)
    given = {**POINTERS, "codes": codes, "scales": scales, **dict.fromkeys(("tiles", "experts", "rows", "x_row", "side_expert", "side_out"), "i32")}
    strides = {"codes_expert": "i32", "codes_row": "i32", "codes_column": 1} if kind == "plain" else {"codes_expert": 0, "codes_row": 0, "codes_column": 0}
    sizes = {"HEIGHT": 5760, "WIDTH": 2880, "BLOCK_HEIGHT": 128, "BLOCK_WIDTH": 128}
    flags = {"RANKS": 4, "EXPERTS": 32, "KIND": kind, "ALONG": along, "GATHER": True, "SCATTER": True}
    adapter = {"RANK": rank, "LOW": gemm.ranks_at_once(rank), "side_rank": 1}
    numbers = {**SINGLE, "COMPUTE": tl.float32} if "float32" in words else {"COMPUTE": tl.bfloat16}
    given |= strides | sizes | flags | adapter | {"M": rows, "N": outer, "K": inner, "TOGETHER": 8} | numbers | (other or {})
    return compiled(gemm._product, given, arch, warps, stages)


def others(arch: int) -> dict:
    """The kernels beside the product, and products of other types and with less to do: name -> found."""
    from moeglot.kernels.triton import between, dequant, gemm, outer, route

    codes = {"words": "*i32", "codes": "*u8", "scales": "*u8", "out": "*i16", "rows": "i32", "groups": "i32", "columns": "i32"}
    strides = {"out_matrix": "i32", "out_row": "i32", "out_column": 1, "HEIGHT": 128, "WIDTH": 128, "HALF": True, "ROWS": dequant.ROWS}
    found = {"mxfp4": compiled(dequant._mxfp4, {**codes, **strides, "WORDS": dequant.WORDS}, arch, 4, 3)}
    turned = {**codes, **strides, "out_row": 1, "out_column": "i32"}
    found["mxfp4 turned"] = compiled(dequant._mxfp4, {**turned, "WORDS": dequant.WORDS}, arch, 4, 3)
    found["mxfp4 to float32"] = compiled(dequant._mxfp4, {**codes, **strides, "HALF": False, "out": "*fp32", "WORDS": dequant.WORDS}, arch, 4, 3)
    found["fp8"] = compiled(dequant._fp8, {**codes, **strides, "scales": "*fp32", "COLUMNS": dequant.COLUMNS}, arch, 4, 3)
    for name, rank in (("outer", 16), ("outer of rank 512", 512)):
        sizes = {"RANKS": 4, "GATHER": True, "RANK": rank, "COLUMNS": 2880, "R": gemm.ranks_at_once(rank), "C": 128, "M": 32}
        found[name] = compiled(outer._outer, {**POINTERS, "narrow": "*bf16", "wide": "*bf16", "out": "*fp32", **sizes}, arch, 4, 3)
    numbers = {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "first": "fp32", "second": "fp32", "WIDTH": 2880, "COLUMNS": between.COLUMNS}
    in_turns = {"gate_row": "i32", "gate_column": 2, "up_row": "i32", "up_column": 2}
    for kind, function in (("clamped-swiglu", "silu"), ("softcapped-swiglu", "silu"), ("ungated", "gelu"), ("swiglu", "gelu_tanh")):
        found[f"{kind} {function}"] = compiled(between._activated, {**numbers, **in_turns, "KIND": kind, "FUNCTION": function}, arch, 4, 3)
    found["sum"] = compiled(between._summed, {"slots": "*bf16", "out": "*bf16", "RANKS": 4, "WIDTH": 2880, "COLUMNS": between.COLUMNS}, arch, 4, 3)
    for name, ids in (("route", "*i64"), ("route of bytes", "*u8")):
        pointers = {"ids": ids, "order": "*i64", "starts": "*i32", "ends": "*i32", "count": "i32", "experts": "i32"}
        found[name] = compiled(route._route, {**pointers, "SLOTS": route.SLOTS, "OTHERS": route.OTHERS}, arch, 4, 3)
    found["bare"] = product("mxfp4", True, arch, 16, 128, 64, 4, 4, {"bias": None, "low": None, "side": None, "weights": None, "RANK": 0, **NO_SIDE})
    found["float32"] = product("mxfp4-float32", True, arch, 16, 128, 32, 4, 4)
    found["plain"] = product("plain", True, arch, 16, 128, 64, 4, 4)
    return found


def counted(found, weights: int, warps: int) -> dict:
    """Of the innermost loop that multiplies: instructions for each decoded weight, and what spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        text = subprocess.run([BIN / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    lines = [(int(match[1], 16), match[2]) for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    body = loop(lines)
    names = [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in body]
    threads = 32 * warps
    kinds = {name: sum(each.split(".")[0] == name for each in names) for name in sorted({each.split(".")[0] for each in names})}
    stack = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert stack, usage.stdout
    return {
        "loads": sum(kinds.get(name, 0) for name in ("LDS", "LDG", "LDC", "LDL", "LD")) * threads / weights,
        "a_weight": len(body) * threads / weights,
        "spills": sum(name.split(".")[0] in ("STL", "LDL") for _, line in lines for name in [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]]),
        "registers": int(stack[1]),
        "stack": int(stack[2]),
        "shared": found.metadata.shared,
        "loop": kinds,
    }


def loop(lines: list[tuple[int, str]]) -> list[str]:
    """The shortest run between a branch backwards and its target that holds a matrix instruction, and neither writes a result nor ends the program."""
    best: list[str] = []
    for n, (address, line) in enumerate(lines):
        jump = re.search(r"\bBRA\S*\s+(?:\S+,\s*)*`?\(?\.?L?_?x?_?(?:0x)?([0-9a-f]+)\)?$", line.strip())
        if not jump or int(jump[1], 16) >= address:
            continue
        inside = [text for at, text in lines[: n + 1] if at >= int(jump[1], 16)]
        multiplies = any("MMA" in text for text in inside) and not any(re.search(r"\b(STG|EXIT)\b", text) for text in inside)
        if multiplies and (not best or len(inside) < len(best)):
            best = inside
    return best


if __name__ == "__main__":
    kind, along, arch, *tiles = sys.argv[1:]
    found = [counted(each, 1, 4) | {"name": name} for name, each in others(int(arch)).items()] if kind == "others" else []
    for rows, outer, inner, warps, stages in (map(int, each.split(",")) for each in tiles):
        found.append(counted(product(kind, along == "along", int(arch), rows, outer, inner, warps, stages), outer * inner, warps))
    print(json.dumps(found))

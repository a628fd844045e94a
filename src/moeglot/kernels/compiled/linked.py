"""Machine code in a file: what numba compiled once is mapped and called without numba, which takes a second and 40 MB to start. On x86-64 with Linux.

LLVM's object file is linked into one run of bytes that refers to nothing outside of it, so that it works at any address and is mapped as it lies.
https://gitlab.com/x86-psABIs/x86-64-ABI for relocations; https://numba.readthedocs.io/en/stable/developer/architecture.html for the function that numba
makes: it returns a status, and takes where the result goes, where an error would go, and for an array its owners, sizes, memory and strides.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import mmap
import os
import platform
import re
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy

PAGE = 4096
"""Bytes before the code: what it is, as JSON."""
NUMBERS = {
    "none": ("ptr", "8x"),
    "bool": ("i8", "?7x"),
    "int8": ("i8", "b7x"),
    "uint8": ("i8", "B7x"),
    "int32": ("i32", "i4x"),
    "uint32": ("i32", "I4x"),
    "int64": ("i64", "q"),
    "uint64": ("i64", "Q"),
    "float32": ("float", "f4x"),
    "float64": ("double", "d"),
}
"""numba's name of a type -> LLVM's, and that of `struct`, in eight bytes."""
ARRAY = ("ptr", "ptr", "i64", "i64", "ptr", "i64", "i64")
"""What a kernel of numba takes for an array of one axis: two owners, numbers, bytes of one, memory, and its size and its stride."""
LIBRARY = """
define ptr @memset(ptr %to, i32 %value, i64 %count) "no-builtins" {
  %byte = trunc i32 %value to i8
  br label %test
test:
  %n = phi i64 [ 0, %0 ], [ %next, %loop ]
  %more = icmp ult i64 %n, %count
  br i1 %more, label %loop, label %done
loop:
  %place = getelementptr i8, ptr %to, i64 %n
  store i8 %byte, ptr %place
  %next = add i64 %n, 1
  br label %test
done:
  ret ptr %to
}
"""
"""What LLVM calls where it recognizes a loop, so that nothing outside is called."""
ENTRY = "moeglot_entry"
PC32, PLT32 = 2, 4
WRITABLE, ALLOCATED, PROGRAM, RELOCATIONS = 1, 2, 1, 4

Entry = Callable[..., Any]


class NotLinked(Exception):
    """The code refers to something outside of it, or is not called in the way that we know: numba is to call it."""


class Code(NamedTuple):
    """`code`: bytes for any address; `entry`: where in it the function is; `returns`: numba's name of the type."""

    code: bytes
    entry: int
    returns: str


# --- kept in files ---------------------------------------------------------------------------------------------------------------------


@cache
def here() -> str | None:
    """What the code in a file depends on, as a short name: our sources, numba and its settings, and the processor. None where we keep none."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or struct.calcsize("P") != 8:
        return None
    try:
        flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), None)
        sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        versions = [sys.version, version("numba"), version("llvmlite")]
    except (OSError, PackageNotFoundError):
        return None
    if not flags or not sources:
        return None
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_")]
    return hashlib.sha256(b"\0".join([*sources, *(text.encode() for text in (*versions, flags, *settings))])).hexdigest()[:16]


def folders() -> tuple[Path, ...]:
    """Where code is kept: beside the bytecode of this file, or where that cannot be written, in the user's cache."""
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeglot"
    return Path(importlib.util.cache_from_source(__file__)).parent, cached


def kept(name: str, takes: tuple[str, ...]) -> Entry | None:
    """The function of a kernel from its file, or None where there is no file that can be mapped."""
    if not (mark := here()):
        return None
    for folder in folders():
        try:
            with (folder / f"{_file(name, takes)}-{mark}.kernel").open("rb") as file:
                found = _mapped(file.fileno(), takes)
        except (OSError, ValueError, KeyError):
            continue  # not there, cut short, or in a place from which nothing may be run
        return found
    return None


def _file(name: str, takes: tuple[str, ...]) -> str:
    return f"{name}.{hashlib.sha256(' '.join(takes).encode()).hexdigest()[:8]}"


def _mapped(descriptor: int, takes: tuple[str, ...]) -> Entry:
    said = json.loads(os.pread(descriptor, PAGE, 0))
    code = mmap.mmap(descriptor, said["length"], flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC, offset=PAGE)
    if hashlib.sha256(code).hexdigest() != said["sha256"]:
        raise ValueError("not the code that was written")
    address = numpy.frombuffer(code, numpy.uint8).ctypes.data
    return _callable(address + said["entry"], said["returns"], takes, code)


def keep(name: str, takes: tuple[str, ...], linked: Code) -> None:
    """Write a kernel's code to its file, whole or not at all; where no folder can be written, the next process compiles it again."""
    said = {"kernel": name, "takes": takes, "returns": linked.returns, "entry": linked.entry}
    head = json.dumps(said | {"length": len(linked.code), "sha256": hashlib.sha256(linked.code).hexdigest()}).encode()
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".kernel", delete=False) as file:
                file.write(head.ljust(PAGE) + linked.code)
            os.replace(file.name, folder / f"{_file(name, takes)}-{here()}.kernel")
        except OSError:
            continue
        return


def _callable(address: int, returns: str, takes: tuple[str, ...], code: Any) -> Entry:
    """`code`: the memory, which lives as long as the function."""
    function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p, ctypes.c_char_p)(address)
    given, result = struct.Struct("<" + "".join("QQ" if _is_array(one) else NUMBERS[one][1] for one in takes)), struct.Struct("<" + NUMBERS[returns][1])

    def call(*numbers: Any) -> Any:
        """`numbers`: for an array, where it begins and how many it has."""
        room = ctypes.create_string_buffer(16)
        if status := function(room, given.pack(*numbers)):
            raise RuntimeError(f"a compiled kernel of {len(code)} bytes returned the status {status}")
        return next(iter(result.unpack_from(room)), None)

    return call


def _is_array(kind: str) -> bool:
    return kind.startswith("array ")


# --- linking ---------------------------------------------------------------------------------------------------------------------------


def linked(assembly: str, returns: str, takes: tuple[str, ...]) -> Code:
    """LLVM's assembly of a numba function, optimized -> code for any address; raises `NotLinked`."""
    import llvmlite.binding as llvm

    bodies = {found[1]: found[0] for found in re.finditer(r'^define [^@\n]*@"?([^"(\s]+)"?\(.*?^}\n', assembly, re.M | re.S)}
    name = next((one for one in bodies if f"cfunc.{one}" in bodies), "")
    needed, left = set[str](), [name]
    while left:
        if (one := left.pop()) in bodies and one not in needed:
            needed.add(one)
            left += re.findall(r'@"?([^"(),\s]+)"?', bodies[one])
    for one in bodies.keys() - needed:
        assembly = assembly.replace(bodies[one], "")
    if not name or returns not in NUMBERS:
        raise NotLinked(f"no function that can be called, or one that returns {returns}")
    try:
        module = llvm.parse_assembly(assembly + LIBRARY + _called(name, takes))
    except RuntimeError as error:
        raise NotLinked(str(error)) from error
    found = tuple("ptr" if (kind := str(one.type)).endswith("*") else kind for one in module.get_function(name).arguments)
    expected = [kind for one in takes for kind in (ARRAY if _is_array(one) else (NUMBERS[one][0],))]
    if found != ("ptr", "ptr", *expected):
        raise NotLinked(f"it takes {found}")
    machine = llvm.Target.from_default_triple().create_target_machine(
        opt=3, cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), reloc="pic", codemodel="small"
    )
    return Code(*_link(machine.emit_object(module), ENTRY), returns)


def _called(name: str, takes: tuple[str, ...]) -> str:
    """A function in LLVM's assembly that takes room for a result and all arguments in one run of memory, and calls numba's with them."""
    loads, passed, at = list[str](), ["ptr %room", "ptr %error"], 0

    def load(kind: str) -> str:
        nonlocal at
        loads.extend((f"%p{at} = getelementptr i8, ptr %given, i64 {at}", f"%v{at} = load {kind}, ptr %p{at}"))
        at += 8
        return f"{kind} %v{at - 8}"

    for one in takes:
        if _is_array(one):
            each, begin, size = f"i64 {numpy.dtype(one.split()[1]).itemsize}", load("ptr"), load("i64")
            passed += ["ptr null", "ptr null", size, each, begin, size, each]
        else:
            passed.append(load(NUMBERS[one][0]))
    call = f'%status = call i32 @"{name}"({", ".join(passed)})'
    lines = ("%error = getelementptr i8, ptr %room, i64 8", *loads, call, "ret i32 %status")
    return f"define i32 @{ENTRY}(ptr %room, ptr %given) {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"


def _link(data: bytes, name: str) -> tuple[bytes, int]:
    """An object file -> the code of a function and all that it refers to, and where in it the function is."""
    at, each, count = (*struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3A))
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, at + n * each) for n in range(count)]
    table = next(section for section in sections if section[1] == 2)
    symbols = [struct.unpack_from("<IBBHQQ", data, table[4] + n) for n in range(0, table[5], 24)]
    strings = data[sections[table[6]][4] :]

    def named(symbol: Any) -> str:
        return strings[symbol[0] : strings.index(b"\0", symbol[0])].decode()

    changes: dict[int, list[tuple[int, int, int, int]]] = {}
    for section in sections:
        if section[1] == RELOCATIONS:
            for n in range(section[4], section[4] + section[5], 24):
                offset, what, addend = struct.unpack_from("<QQq", data, n)
                changes.setdefault(section[7], []).append((offset, what & 0xFFFFFFFF, what >> 32, addend))
    wanted = next(symbol for symbol in symbols if named(symbol) == name)
    places, code, left = dict[int, int](), bytearray(), [wanted[3]]
    while left:
        if (number := left.pop()) in places:
            continue
        if not 0 < number < count or sections[number][1] != PROGRAM or sections[number][2] & (WRITABLE | ALLOCATED) != ALLOCATED:
            raise NotLinked("it refers to memory that is written, or to what is not in it")
        code += bytes(-len(code) % 64)
        places[number] = len(code)
        code += data[sections[number][4] : sections[number][4] + sections[number][5]]
        left += [_section(symbols[to], named) for _, _, to, _ in changes.get(number, ())]
    for number, start in places.items():
        for offset, kind, to, addend in changes.get(number, ()):
            if kind not in (PC32, PLT32):
                raise NotLinked(f"a relocation of the type {kind}")
            value = places[symbols[to][3]] + symbols[to][4] + addend - (start + offset)
            struct.pack_into("<i", code, start + offset, value)
    return bytes(code), places[wanted[3]] + wanted[4]


def _section(symbol: Any, named: Callable[[Any], str]) -> int:
    if symbol[3] == 0:
        raise NotLinked(f"it refers to {named(symbol)}")
    return int(symbol[3])

"""Pickles looked at without running anything in them: every class and function that one names becomes a record of what it was to be called with."""

from __future__ import annotations

import io
import pickle
from pickletools import genops, markobject, opcodes, stackslice
from typing import Any

from moeglot.errors import BrokenFile

DEEPEST = 100
"""Tuples in tuples; Python hashes those of some hundred thousand levels without end, in C."""
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_PUTS, _GETS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"}), frozenset({"GET", "BINGET", "LONG_BINGET"})
_TAKES = {op.name: (sum(one not in (markobject, stackslice) for one in op.stack_before), markobject in op.stack_before) for op in opcodes}
"""Opcode -> how many values it takes from the stack, and whether it takes what lies above the last mark, too."""
_GIVES = {op.name: len(op.stack_after) for op in opcodes}
_VALUES = frozenset({op.name for op in opcodes if not op.stack_before and len(op.stack_after) == 1}) - _GETS - {"MARK"}


class Record:
    """In place of an object: `kind` is the dotted name of its class or of the function that was to make it, `args` and `state` what these were to get."""

    kind = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Record:
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """What a mapping is filled by; nobody asks for it again."""

    def append(self, value: Any) -> None:
        """What a list is filled by; nobody asks for it again."""

    def __getattr__(self, name: str) -> Any:
        state = object.__getattribute__(self, "state")
        if isinstance(state, dict) and name in state:
            return state[name]
        raise AttributeError(name)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[Record]:
        return type(name, (Record,), {"kind": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def look_at(data: bytes, what: str) -> Any:
    """A pickle's content, with a `Record` for everything that is no plain value; raises `BrokenFile`."""
    try:
        _check_depth(data)
        return _Reader(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, MemoryError, OverflowError, RecursionError) as error:
        raise BrokenFile(f"{what}: no pickle that can be read", str(error).split("\n")[0], "fetch it again from its producer; nothing in it was run") from error


def _check_depth(data: bytes) -> None:
    """Raises `ValueError` for tuples that lie too deep in each other, for a length that is not there, and for a place in the memo that costs memory.

    Each value on the stack is how deep the tuples in it are, or deeper.
    """
    stack, marks, memo = list[int](), list[int](), dict[int | None, int]()
    for op, arg, _ in genops(data):
        name = op.name
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _VALUES:
            stack.append(0)
        elif name in _GETS:
            stack.append(memo[arg])
        elif name in _PUTS:
            if arg is None or arg > len(data):
                raise ValueError(f"place {arg} in a memo of at most {len(data)}")
            memo[arg] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            count, marked = _TAKES[name]
            at = (marks.pop() if marked else len(stack)) - count
            deep = max(stack[at:], default=0) + (name in _TUPLES)
            if at < 0 or deep > DEEPEST:
                raise ValueError("tuples that lie too deep in each other" if at >= 0 else "it takes more values than there are")
            stack[at:] = [deep] * _GIVES[name]


def is_a(found: Any, name: str) -> bool:
    """It is, or was to be made by, a class or function of this name."""
    return isinstance(found, Record) and found.kind.rpartition(".")[2] == name


def numbers(found: Any) -> tuple[int, ...] | None:
    """A torch.Size or a tuple of whole numbers."""
    value = found.args[0] if is_a(found, "Size") and found.args else found
    return tuple(value) if isinstance(value, (tuple, list)) and all(type(n) is int and n >= 0 for n in value) else None

"""Pickles looked at without running anything in them: every class and function that one names becomes a record of what it was to be called with."""

from __future__ import annotations

import io
import pickle
from typing import Any

from moeglot.errors import BrokenFile


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
        return _Reader(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, UnicodeError) as error:
        raise BrokenFile(f"{what}: no pickle that can be read", str(error).split("\n")[0], "fetch it again from its producer; nothing in it was run") from error


def is_a(found: Any, name: str) -> bool:
    """It is, or was to be made by, a class or function of this name."""
    return isinstance(found, Record) and found.kind.rpartition(".")[2] == name


def numbers(found: Any) -> tuple[int, ...] | None:
    """A torch.Size or a tuple of whole numbers."""
    value = found.args[0] if is_a(found, "Size") and found.args else found
    return tuple(value) if isinstance(value, (tuple, list)) and all(type(n) is int and n >= 0 for n in value) else None

"""The encodings that we know, by the names that `--encode` takes."""

from __future__ import annotations

from moeglot.dtypes import DTYPES, WEIGHT_DTYPES, by_torch_name
from moeglot.encoding import Encoding
from moeglot.encodings import bnb4
from moeglot.encodings.mxfp4 import RULES, mxfp4
from moeglot.encodings.plain import Plain
from moeglot.errors import UsageError

NAMES = (*(DTYPES[name].torch_name for name in WEIGHT_DTYPES), "mxfp4", *(f"mxfp4:{rule}" for rule in RULES), "nf4", "nf4:nested", "fp4", "fp4:nested")


def by_name(name: str) -> Encoding:
    """`"mxfp4:ocp"` -> MXFP4 with OCP's rules, `"bfloat16"` -> plain BF16; raises `UsageError`."""
    kind, _, rule = name.partition(":")
    if kind == "mxfp4" and (not rule or rule in RULES):
        return mxfp4(rule or "openai")
    if kind in ("nf4", "fp4"):
        return bnb4.by_name(name)
    try:
        dtype = by_torch_name(name)
    except UsageError:
        dtype = None
    if dtype is None or dtype.name not in WEIGHT_DTYPES:
        raise UsageError(f"{name!r} is not an encoding that we can write", "known: " + ", ".join(NAMES), "pass --encode one of these")
    return Plain(dtype.name)

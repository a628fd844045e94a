"""The encodings that we know, by the names that `--encode` takes."""

from __future__ import annotations

from moeglot.dtypes import DTYPES, WEIGHT_DTYPES, by_torch_name
from moeglot.encoding import WHOLE, Encoding
from moeglot.encodings import bnb4
from moeglot.encodings.fp8 import FP8, MX_GROUP
from moeglot.encodings.gptq import GPTQ
from moeglot.encodings.int4 import INT4
from moeglot.encodings.int8 import INT8
from moeglot.encodings.mxfp4 import RULES, mxfp4
from moeglot.encodings.nvfp4 import NVFP4
from moeglot.encodings.plain import Plain
from moeglot.errors import UsageError

ENCODINGS: dict[str, Encoding] = {
    **{DTYPES[name].torch_name: Plain(name) for name in WEIGHT_DTYPES},
    "mxfp4": mxfp4("openai"),
    **{f"mxfp4:{rule}": mxfp4(rule) for rule in RULES},
    "fp8-block": FP8(scale="F32"),
    "fp8-block:bf16": FP8(scale="BF16"),
    "fp8-block:e8m0": FP8(scale="F8_E8M0"),
    "fp8-block:u8": FP8(scale="U8"),
    "fp8-channel": FP8((1, WHOLE), "F32"),
    "fp8-channel:bf16": FP8((1, WHOLE), "BF16"),
    "fp8-tensor": FP8((WHOLE, WHOLE), "F32"),
    "fp8-tensor:bf16": FP8((WHOLE, WHOLE), "BF16"),
    "mxfp8": FP8((1, MX_GROUP), "U8"),
    "nvfp4": NVFP4(),
    "nvfp4:compressed-tensors": NVFP4("compressed-tensors"),
    "int4:32": INT4(32),
    "int4:32:kimi": INT4(32, "kimi"),
    "int4:64": INT4(64),
    "int4:128": INT4(128),
    "int4:channel": INT4(WHOLE),
    "int4:32:asymmetric": INT4(32, zero=True),
    "int4:128:asymmetric": INT4(128, zero=True),
    "int4:channel:asymmetric": INT4(WHOLE, zero=True),
    "int8-channel": INT8(),
    "int8-channel:asymmetric": INT8(symmetric=False),
    "int8-tensor": INT8((WHOLE, WHOLE)),
    "int8-group:128": INT8((1, 128)),
    "int8-pack:channel": INT8(container="words"),
    "int8-pack:32": INT8((1, 32), "words"),
    "int8-pack:128": INT8((1, 128), "words"),
    "int8-pack:128:asymmetric": INT8((1, 128), "words", symmetric=False),
    "gptq:128": GPTQ(128, less=True),
    "gptq:32": GPTQ(32, less=True),
    "gptq:128:asymmetric:v2": GPTQ(128, symmetric=False),
    "awq:128": GPTQ(128, packing="awq"),
    "awq:128:asymmetric": GPTQ(128, packing="awq", symmetric=False),
    "awq:64:asymmetric": GPTQ(64, packing="awq", symmetric=False),
}
NAMES = (*ENCODINGS, "nf4", "nf4:nested", "fp4", "fp4:nested")


def by_name(name: str) -> Encoding:
    """`"mxfp4:ocp"` -> MXFP4 with OCP's rules, `"bfloat16"` or `"bf16"` -> plain BF16; raises `UsageError`."""
    if not isinstance(name, str):
        raise UsageError(f"encode = {name!r} is no name", "an encoding is named by text", 'such as encode="float32" or encode="mxfp4"')
    try:
        dtype = by_torch_name(name)
    except UsageError:
        dtype = None
    if name.partition(":")[0] in ("nf4", "fp4"):
        return bnb4.by_name(name)
    found = ENCODINGS.get(dtype.torch_name if dtype else name)
    if found is None:
        raise UsageError(f"{name!r} is not an encoding that we can write", "known: " + ", ".join(NAMES), "pass --encode one of these")
    return found

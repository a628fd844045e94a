"""How GPTQ, AWQ and AutoRound keep quantized matrices: words of integers that lie [in, out], and what config.json says of each module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moeglot.codings.coding import Coding
from moeglot.codings.rules import Quantization, laid, method, packing, settings, sixteen, skipped
from moeglot.encoding import WHOLE, Encoding
from moeglot.encodings.gptq import GPTQ

GPTQMODEL = "https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/quantization/config.py"
AUTOROUND = "https://github.com/intel/auto-round/blob/main/auto_round/export/export_to_autoround/export.py"
AUTOAWQ = "https://github.com/casper-hansen/AutoAWQ/blob/main/awq/modules/linear/gemm.py"
LESS = {"gptq": True, "gptq_v2": False}
"""checkpoint_format, or format: whether zero points are stored less one. Who says nothing means the first."""
PARTS = {"packed": ".qweight", "zero_point": ".qzeros", "scale": ".scales"}


def _group(said: Mapping[str, Any]) -> int | None:
    """Inputs to a scale; None if nothing says how many."""
    size = said.get("group_size", said.get("q_group_size"))
    return WHOLE if size == -1 else size if isinstance(size, int) and size > 0 else None


def _read_gptq(said: Quantization, module: str) -> Encoding | None:
    if method(said) != "gptq":
        return None
    found = settings(said, module)
    less, group = LESS.get(laid(found, "gptq")), _group(found)
    known = found.get("bits") in (4, 8) and str(found.get("pack_dtype") or "int32") == "int32"
    if not known or less is None or group is None:
        return None
    return GPTQ(group, found["bits"], symmetric=found.get("sym", True) is True, less=less, order=True, act=found.get("desc_act") is True)


def _write_gptq(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, GPTQ)
    return {
        "quant_method": "gptq",
        "bits": encoding.bits,
        "group_size": encoding.group or -1,
        "sym": encoding.symmetric,
        "desc_act": encoding.act,
        "checkpoint_format": "gptq" if encoding.less else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": skipped(kept),
    }


GPTQ_WORDS = Coding(
    "gptq",
    GPTQ(less=True, order=True),
    linear={**PARTS, "order": ".g_idx"},
    stacked={},
    read=_read_gptq,
    write=_write_gptq,
    source=GPTQMODEL,
    about="GPTQ's INT4 or INT8, [in, out], with the group of each input",
    judges=("gptqmodel",),
    kept="dynamic",
    turned=True,
)


def _read_auto_round(said: Quantization, module: str) -> Encoding | None:
    found, packed = settings(said, module), packing(said)
    group = _group(found)
    if packed not in ("auto_gptq", "gptqmodel") or found.get("bits") not in (4, 8) or found.get("data_type", "int") != "int" or group is None:
        return None
    return GPTQ(group, found["bits"], symmetric=found.get("sym", True) is True, less=packed == "auto_gptq")


def _write_auto_round(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, GPTQ)
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if encoding.less else "auto_round:gptqmodel",
        "bits": encoding.bits,
        "group_size": encoding.group or -1,
        "sym": encoding.symmetric,
        "data_type": "int",
        "extra_config": sixteen(kept),
    }


AUTO_ROUND_WORDS = replace(
    GPTQ_WORDS,
    name="auto-round",
    encoding=GPTQ(less=True),
    read=_read_auto_round,
    write=_write_auto_round,
    source=AUTOROUND,
    about="AutoRound's INT4 or INT8 in GPTQ's words",
    judges=("auto-round",),
    kept="extra_config",
    spelled=True,
)


def _read_awq(said: Quantization, module: str) -> Encoding | None:
    found = settings(said, module)
    group = _group(found)
    own = method(said) == "awq" and laid(found, "gemm") == "gemm" and found.get("backend") in (None, "auto", "autoawq")
    if not (own or packing(said) == "auto_awq") or found.get("bits", found.get("w_bit")) != 4 or group is None:
        return None
    symmetric = found.get("zero_point", True) is not True if own else found.get("sym", True) is True
    return GPTQ(group, packing="awq", symmetric=symmetric)


def _write_awq(encoding: Encoding, kept: Sequence[str]) -> dict[str, Any]:
    assert isinstance(encoding, GPTQ)
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": encoding.bits,
        "group_size": encoding.group or -1,
        "zero_point": not encoding.symmetric,
        "modules_to_not_convert": list(kept),
        "dynamic": skipped(kept),  # where GPTQModel, which reads AWQ too, looks
    }


AWQ_WORDS = Coding(
    "awq",
    GPTQ(packing="awq", symmetric=False),
    linear=PARTS,
    stacked={},
    read=_read_awq,
    write=_write_awq,
    source=AUTOAWQ,
    about="AWQ's INT4 (gemm), [in, out], with a zero point for each group",
    judges=("gptqmodel", "auto-round"),
    kept="modules_to_not_convert",
    turned=True,
)

"""quantize_config.json and its like, in which GPTQ, AWQ and AutoRound say again what config.json says: GPTQModel reads them first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeglot.codings.coding import MODELOPT_FILE, SAID_AGAIN, said
from moeglot.codings.rules import AUTO_ROUND, ROTATIONS, Quantization, laid, mapping, method, packing
from moeglot.errors import Contradiction


def check_again(config: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]]) -> None:
    """Raises `Contradiction` where such a file decodes otherwise than config.json. `read`: a file beside it, {} if there is none."""
    here = said(config)
    if (who := method(here)) not in ("gptq", "awq", *AUTO_ROUND):
        return
    for name in (name for name in SAID_AGAIN if name != MODELOPT_FILE):
        there = read(name)
        if not there.keys() & {"bits", "w_bit", "quant_method"}:
            continue  # of something else
        mine, theirs = _told(here), _told({**there, "quant_method": method(there) or who})
        for key in (key for key in mine if None not in (mine[key], theirs.get(key, False)) and mine[key] != theirs.get(key, False)):
            wrong = f"config.json says {key} = {_briefly(mine[key])}, and {name} {_briefly(theirs.get(key))}"
            known = f"both are written from one quantization; GPTQModel reads {name} first, most others config.json"
            raise Contradiction(wrong, known, "take both from the checkpoint's producer, or remove the stale one")


def _told(one: Quantization) -> dict[str, Any]:
    """What decides how its words are decoded, in one word for each thing; None where it says nothing and nothing is usual."""
    who = "auto-round" if method(one) in AUTO_ROUND else method(one)
    told = {
        "quant_method": who,
        "bits": one.get("bits", one.get("w_bit")),
        "group_size": one.get("group_size", one.get("q_group_size")),
        "pack_dtype": str(one.get("pack_dtype") or "int32"),
        **{key: one.get(key) or False for key in ROTATIONS},
        **{key: mapping(one[key]) if one.get(key) is not None else None for key in ("dynamic", "extra_config")},
    }
    if who == "awq":
        return {**told, "version": laid(one, "gemm"), "zero_point": one.get("zero_point", True)}
    if who == "gptq":
        told |= {"checkpoint_format": laid(one, "gptq"), "desc_act": bool(one.get("desc_act"))}
    return {**told, "sym": one.get("sym", True), "packing_format": packing(one) or None}


def _briefly(value: Any) -> str:
    return str(value)[:80]
